"""How a part of our contribution gets to an owner that may not want it: directly, else through two other members.

Only where a run has audits: a part carries its contributor's mark, so anybody may hand it on, and the owner's answer
is a receipt. An owner that says afterwards that it has nothing contradicts its signature; see :mod:`.challenges`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import trio

from ...transport.endpoint import Endpoint
from ...transport.errors import RemoteError, RemoteRefused
from ...transport.identity import PeerId
from ...transport.rpc import Call
from ..reduce.buffers import Buffers, Part
from ..reduce.codecs import resolve
from .actions import Action, Note, Send
from .audits import Auditor
from .claims import Denied, Receipt
from .messages import Plan
from .methods import FORWARD, SCATTER, Forward, Scatter, Taken
from .passes import Passes
from .setting import Setting
from .statements import mark_fault, receipt_bytes
from .voter import Voter

log = logging.getLogger(__name__)

#: Members through which a part goes that its owner does not take from us.
CARRIERS = 2

#: Shares of the time for contributions: after the first a part without a receipt is sent through others as well, and
#: those wait for the owner for the second, so that the leader hears of it before that time is over.
OVERDUE, CARRYING = 0.6, 0.25


class Delivery:
    """``feed`` tells the voter. ``fault`` is what says whether a part holds finite numbers. Everything may be
    cancelled."""

    def __init__(
        self,
        endpoint: Endpoint,
        setting: Setting,
        voter: Voter,
        buffers: Buffers,
        passes: Passes,
        auditor: Auditor,
        feed: Callable[[Callable[[], Sequence[Action]]], None],
        fault: Callable[[Part, int], str | None],
    ) -> None:
        self._endpoint, self._setting, self._voter, self._buffers = endpoint, setting, voter, buffers
        self._passes, self._auditor, self._feed, self._fault = passes, auditor, feed, fault

    async def push(self, owner: PeerId, request: Scatter, part: Part) -> bool:
        """Bring a part of ours to ``owner``; whether it has signed for it."""
        done = False

        async def directly(overdue: trio.CancelScope) -> None:
            nonlocal done
            try:
                taken = await self._endpoint.call(owner, SCATTER, request, body=[part.data])
                done = self._signed(owner, request, taken.receipt) or done
            except RemoteRefused as error:
                self._setting.note(Note("scatter", "refused", error.reason, owner))
            except RemoteError as error:
                log.debug("slice for %s: %s", owner.short, error)
            overdue.cancel()

        async with trio.open_nursery() as nursery:
            with trio.move_on_after(OVERDUE * self._voter.scatter_time()) as overdue:
                nursery.start_soon(directly, overdue)
                await trio.sleep_forever()
            if not done and self._voter.frozen is None:
                done = await self._through_others(owner, request, part) or done
            if done:
                nursery.cancel_scope.cancel()
        return done

    def _signed(self, owner: PeerId, request: Scatter, receipt: bytes) -> bool:
        me = self._endpoint.peer_id
        data = receipt_bytes(request.key, request.start, request.stop, request.codec, me, request.mark.root)
        if not owner.verify(data, receipt):
            self._setting.note(Note("scatter", "no-receipt", "it does not sign for our contribution", owner))
            return False
        shown = Receipt(request.start, request.stop, request.codec, request.mark.root, receipt)
        self._feed(lambda: self._voter.receipted(owner, shown))
        return True

    async def _through_others(self, owner: PeerId, request: Scatter, part: Part) -> bool:
        plan = self._voter.plan
        me, voters = self._endpoint.peer_id, self._setting.voters
        # Those on trial carry nothing, and nobody carries theirs: it would be no proof of anything.
        others = () if plan is None or me not in voters else plan.receivers
        carriers = [p for p in others if p not in (me, owner) and p in voters and p not in self._voter.lost]
        done = False

        async def through(carrier: PeerId) -> None:
            nonlocal done
            asked = Forward(request.key, owner, request.start, request.stop, request.codec, request.mark)
            try:
                taken = await self._endpoint.call(carrier, FORWARD, asked, body=[part.data])
                done = self._signed(owner, request, taken.receipt) or done
            except RemoteError as error:
                log.debug("slice for %s by way of %s: %s", owner.short, carrier.short, error)

        async with trio.open_nursery() as nursery:
            for carrier in carriers[:CARRIERS]:
                nursery.start_soon(through, carrier)
        return done

    async def on_forward(self, call: Call[Forward]) -> Taken:
        """Hand a contributor's part on to an owner that does not take it from itself."""
        request, sender, plan = call.request, call.peer, self._voter.plan
        if sender not in self._setting.voters:
            raise RemoteRefused("not-a-voter", f"{sender.short} is no voter of round {self._setting.round}")
        codec, elements = resolve(request.codec), request.stop - request.start
        if request.owner == self._endpoint.peer_id:
            raise RemoteRefused("bad-range", "that part is for ourselves: it is scattered, not forwarded")
        if not self._auditor.audits(codec) or plan is None or not _expected(plan, request, sender):
            raise RemoteRefused("bad-range", "nobody expects that part in this round")
        wrong = mark_fault(request.mark, sender, request.key, request.start, request.stop, codec.name)
        room = self._buffers.room_for(sender, request.start, request.stop, codec) if wrong is None else None
        if room is None:
            raise RemoteRefused("bad-range", wrong or "that is too much")
        await call.read_into(room.data)
        wrong = await self._passes.run(elements, self._fault, room, elements)
        if wrong is None:
            tree = await self._passes.run(elements, self._auditor.ledger.tree, room, elements)
            wrong = None if tree.root == request.mark.root else "what was signed is another one"
        if wrong is not None:
            raise RemoteRefused("unsigned", f"that part is not handed on: {wrong}")
        carried = Scatter(request.key, request.start, request.stop, codec.name, request.mark, sender)
        data = receipt_bytes(request.key, request.start, request.stop, codec.name, sender, request.mark.root)
        why = "it does not answer"
        try:
            with trio.move_on_after(CARRYING * self._voter.scatter_time()):
                taken = await self._endpoint.call(request.owner, SCATTER, carried, body=[room.data])
                if request.owner.verify(data, taken.receipt):
                    return taken
                why = "it signs for nothing"
        except RemoteError as error:
            why = str(error)
        self._setting.note(Note("scatter", "denied", f"does not take a part of {sender.short}: {why}", request.owner))
        denied = Denied(request.key, plan.attempt, plan.epoch, sender, request.owner)
        leader = self._voter.leader(plan.attempt)
        self._feed(lambda: [Send(leader, denied)])
        raise RemoteRefused("denied", f"{request.owner.short} does not take it: {why[:200]}")


def _expected(plan: Plan, request: Forward, sender: PeerId) -> bool:
    place = request.owner, request.start, request.stop
    return sender in plan.members and any((p.owner, p.start, p.stop) == place for p in plan.slices)
