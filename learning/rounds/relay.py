"""The sums of one round on one peer, where contributions go round a ring: see :mod:`.circling`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...transport.endpoint import Endpoint
from ...transport.errors import RemoteError, RemoteRefused
from ...transport.identity import PeerId
from ...transport.rpc import Call
from .. import exact
from ..reduce.buffers import Buffers, Part
from ..reduce.codecs import FP32
from ..state import bytes_view
from .actions import Action, Circulate, Combine
from .circling import source
from .decisions import shares
from .messages import Plan
from .methods import PASS, Ack, Passed
from .passes import Passes
from .post import Post
from .setting import Setting
from .voter import Voter

log = logging.getLogger(__name__)


class Relay:
    """``feed`` tells the voter. Everything may be cancelled."""

    def __init__(
        self,
        endpoint: Endpoint,
        setting: Setting,
        voter: Voter,
        buffers: Buffers,
        passes: Passes,
        post: Post,
        feed: Callable[[Callable[[], Sequence[Action]]], None],
    ) -> None:
        self._endpoint, self._setting, self._voter, self._buffers = endpoint, setting, voter, buffers
        self._passes, self._post, self._feed = passes, post, feed
        #: What came round, by (sender, attempt, epoch, index); None: it is on its way here.
        self._sums: dict[tuple[PeerId, int, int, int], Tensor | None] = {}

    def open(self, generation: tuple[int, int]) -> None:
        """What came for older plans is needed no more."""
        self._sums = {place: total for place, total in self._sums.items() if place[1:3] >= generation}

    def drop(self) -> None:
        """Nothing of it is needed any more."""
        self._sums.clear()

    async def on_pass(self, call: Call[Passed]) -> Ack:
        """Take a sum of weighted contributions from the member before us."""
        request, sender, now = call.request, call.peer, self._endpoint.host.now
        place, elements = (request.attempt, request.epoch, request.index), request.stop - request.start
        if sender not in self._setting.voters:
            raise RemoteRefused("not-a-voter", f"{sender.short} is no voter of round {self._setting.round}")
        newest = self._voter.plan
        if newest is not None and place[:2] < (newest.attempt, newest.epoch):
            raise RemoteRefused("late", "that ring was given up")
        if (plan := self._plan(*place[:2])) is not None:
            fits = self._voter.passes(plan, request.index, sender)
            if not fits or plan.slices[request.index].range != (request.start, request.stop):
                raise RemoteRefused("bad-range", "that sum is not the plan's")
        if request.epoch:
            raise RemoteRefused("bad-range", "no ring comes after the first epoch")
        if (sender, *place) in self._sums:
            raise RemoteRefused("busy", "that sum is on its way already")
        part = self._buffers.room_for(sender, request.start, request.stop, FP32)
        if part is None or part.vector is None:
            raise RemoteRefused("bad-range", f"elements {request.start}..{request.stop} are too many")
        self._sums[sender, *place] = None
        try:
            await call.read_into(part.data)
        except BaseException:
            self._sums.pop((sender, *place), None)  # it may come back, and begin again
            raise
        wrong = await self._passes.run(elements, exact.check_finite, part.vector)
        if wrong is not None:
            self._feed(lambda: self._voter.sum_refused(*place[:2], f"what came round the ring: {wrong}"))
            raise RemoteRefused("not-finite", f"a sum of round {self._setting.round} is refused: {wrong}")
        if (sender, *place) not in self._sums:
            raise RemoteRefused("late", "that ring was given up")
        self._sums[sender, *place] = part.vector
        self._feed(lambda: self._voter.sum_received(now(), sender, *place))
        return Ack()

    async def circulate(self, action: Circulate) -> None:
        """Add our own part, which is there, and pass the sum on."""
        plan = self._plan(action.attempt, action.epoch)
        if plan is None or (own := self._buffers.own) is None:
            return
        place = action.attempt, action.epoch, action.index
        start, stop = plan.slices[action.index].range
        before = self._came(plan, action.index)
        if before is not None and len(before) != stop - start:  # it came before the plan
            self._feed(lambda: self._voter.sum_refused(*place[:2], "a sum of another length came round the ring"))
            return
        if action.to == self._endpoint.peer_id:
            self._feed(lambda: self._voter.sum_closed(self._endpoint.host.now(), *place))
            return
        total = self._buffers.room(stop - start) if before is None else before
        await self._passes.run(stop - start, add, before, own[start:stop], self._factor(plan, plan.members), total)
        await self._post.leave_first()
        request = Passed(self._setting.key, *place, start, stop)
        try:
            await self._endpoint.call(action.to, PASS, request, body=[bytes_view(total)])
        except RemoteRefused as error:
            why = f"{action.to.short} refuses a sum: {error.reason}"
            log.debug("%s", why)
            self._feed(lambda: self._voter.sum_refused(*place[:2], why))
        except RemoteError as error:
            # Whether it is lost, others find out. If it is not, the ring does not close in time.
            log.debug("sum of a slice for %s: %s", action.to.short, error)

    def closing(self, plan: Plan, action: Combine) -> Callable[[], list[Part]]:
        """What writes the slices ``action.indices`` of ours, whose sums have come, into the present result. Blocking;
        it holds what it needs."""
        own, result, factor = self._buffers.own, self._buffers.result, self._factor(plan, action.members)
        assert own is not None and result is not None
        work = []
        for index in action.indices:
            start, stop = plan.slices[index].range
            total = self._came(plan, index)
            assert total is not None  # or it would not be said to be held
            work.append((total, own[start:stop], result[start:stop]))

        def compute() -> list[Part]:
            for before, mine, out in work:
                add(before, mine, factor, out)
            return [Part(FP32, bytes_view(out), out) for _, _, out in work]

        return compute

    def _plan(self, attempt: int, epoch: int) -> Plan | None:
        """The present plan, if it is that one and has a ring."""
        plan = self._voter.plan
        return plan if plan is not None and plan.ring and (plan.attempt, plan.epoch) == (attempt, epoch) else None

    def _came(self, plan: Plan, index: int) -> Tensor | None:
        """The sum of slice ``index`` that the member before us has passed on; None where we begin with it."""
        before = source(plan, index, self._endpoint.peer_id)
        if before is None or before == plan.slices[index].owner:
            return None
        return self._sums.get((before, plan.attempt, plan.epoch, index))

    def _factor(self, plan: Plan, members: Sequence[PeerId]) -> float:
        """Our part in the mean: sums of parts stay as small as what they are made of."""
        weights = shares(plan, members)[1]
        return weights[list(members).index(self._endpoint.peer_id)] / sum(weights)


def add(before: Tensor | None, own: Tensor, factor: float, out: Tensor) -> None:
    """``out`` becomes ``before`` (may be the same; None: nothing) and ``factor`` times ``own``. fp32, 1-D. Blocking."""
    if before is None:
        torch.mul(own, factor, out=out)
    else:
        torch.add(before, own, alpha=factor, out=out)
