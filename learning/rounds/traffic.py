"""The bytes of one round on one peer: contributions to owners, combined slices to everybody, results to who is late."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, NoReturn

import torch
import trio
from torch import Tensor

from ...transport.endpoint import Endpoint
from ...transport.errors import ProtocolMisuse, RemoteError, RemoteRefused
from ...transport.identity import PeerId
from ...transport.rpc import Body, Call
from .. import defaults, exact
from ..aggregate.aggregator import Decision
from ..reduce.buffers import Buffers, Part
from ..reduce.codecs import FP32, Codec, resolve
from ..reduce.filling import Filling
from ..reduce.slices import Slice
from ..state import bytes_view
from .actions import Action, Circulate, Combine, Note, Pull, Push, Share
from .circling import source
from .delivery import Delivery
from .downloads import download
from .messages import members_hash
from .methods import SCATTER, SHARE, Ack, Given, Scatter, Shared, Taken, Want
from .relay import Relay
from .setting import Setting
from .voter import Voter

if TYPE_CHECKING:
    from .audits import Auditor
    from .passes import Passes
    from .post import Post
    from .results import Results

log = logging.getLogger(__name__)


class Traffic:
    """Moves what the voter asks for, and tells it (``feed``) what came of it. Everything here may be cancelled."""

    def __init__(
        self,
        endpoint: Endpoint,
        setting: Setting,
        voter: Voter,
        buffers: Buffers,
        results: Results,
        passes: Passes,
        post: Post,
        feed: Callable[[Callable[[], Sequence[Action]]], None],
        generation_due: Callable[[], None],
        auditor: Auditor,
    ) -> None:
        self._auditor = auditor
        self.delivery = Delivery(endpoint, setting, voter, buffers, passes, auditor, feed, fault)
        self.relay = Relay(endpoint, setting, voter, buffers, passes, post, feed)
        self._endpoint, self._host, self.setting, self.voter = endpoint, endpoint.host, setting, voter
        self.me, self.key, self.round, self.voters = endpoint.peer_id, setting.key, setting.round, setting.voters
        self.trial = tuple(each.peer for each in setting.trial)
        self.buffers, self.results = buffers, results
        self._passes, self._post, self._feed, self._generation_due = passes, post, feed, generation_due
        #: How far our own contribution is there.
        self.filling = Filling(0)
        #: Whose contributions were refused here, and why.
        self.refused: dict[PeerId, str] = {}
        #: Combined slices (attempt, epoch, index) that are being received where they belong.
        self._landing: dict[tuple[int, int, int], trio.CancelScope] = {}

    def start(self, nursery: trio.Nursery, action: Push | Circulate | Combine | Share | Pull) -> None:
        """Carry ``action`` out in a task of ``nursery``; what is ours already needs none."""
        match action:
            case Push() if action.owner == self.me and self.filling.ready >= action.stop and self.buffers.coding.plain:
                self._keep_own(action)
            case Push() if action.owner == self.me:
                nursery.start_soon(self._keep_own_later, action)
            case Push():
                nursery.start_soon(self._push, action)
            case Circulate():
                nursery.start_soon(self._circulate, action)
            case Combine():
                nursery.start_soon(self._combine, action)
            case Share():
                nursery.start_soon(self._share, action)
            case Pull():
                nursery.start_soon(self._pull, action)

    def _keep_own(self, action: Push) -> None:
        if self.buffers.own is not None:
            self._received(self.me, action.start, action.stop, self.buffers.own_part(action.start, action.stop))

    def _received(self, contributor: PeerId, start: int, stop: int, part: Part) -> None:
        self.buffers.keep(contributor, start, stop, part)
        codec = part.codec.name
        self._feed(lambda: self.voter.slice_received(self._host.now(), contributor, start, stop, codec))

    async def _keep_own_later(self, action: Push) -> None:
        if await self._filled(action) and self.buffers.own is not None:
            part = await self._passes.run(action.stop - action.start, self.buffers.own_part, action.start, action.stop)
            self._received(self.me, action.start, action.stop, part)

    async def _filled(self, action: Push) -> bool:
        """Wait until the range is there. When it is not in time, a later plan may ask for it again."""
        with trio.move_on_after(self.voter.scatter_time()):
            if await self.filling.wait(action.stop):
                return True
        self._feed(lambda: self.voter.push_failed(self._host.now(), action.owner, action.start, action.stop))
        return False

    async def _circulate(self, action: Circulate) -> None:
        plan = self.voter.plan
        if plan is not None and (plan.attempt, plan.epoch) == (action.attempt, action.epoch):
            # Not in time: then the ring does not close, and what is there goes to the owners.
            with trio.move_on_after(self.voter.scatter_time()):
                if await self.filling.wait(plan.slices[action.index].stop):
                    await self.relay.circulate(action)

    async def _push(self, action: Push) -> None:
        if not await self._filled(action):
            return
        if self.buffers.own is None:
            return
        body: Body | list[memoryview]
        codec, elements = self.buffers.coding.codec, action.stop - action.start
        audited = self._auditor.audits(codec)
        whole = audited or not codec.elementwise or elements <= defaults.CODED_PIECE
        if self.buffers.coding.plain or whole:
            size = 0 if self.buffers.coding.plain else elements
            part = await self._passes.run(size, self.buffers.own_part, action.start, action.stop)
            mark = await self._auditor.mark(action.start, action.stop, part)
            body = [part.data]
            if audited:
                await self._post.leave_first()
                signed = Scatter(self.key, action.start, action.stop, codec.name, mark)
                if not await self.delivery.push(action.owner, signed, part):
                    at = action.owner, action.start, action.stop
                    self._feed(lambda: self.voter.push_failed(self._host.now(), *at))
                return
        else:
            body = Body(codec.wire_size(elements), partial(self._coded, action.start, action.stop))
        request = Scatter(self.key, action.start, action.stop, codec.name)
        await self._post.leave_first()
        try:
            await self._endpoint.call(action.owner, SCATTER, request, body=body)
        except RemoteRefused as error:
            self.setting.note(Note("scatter", "refused", error.reason, action.owner))
        except RemoteError as error:
            log.debug("slice for %s: %s", action.owner.short, error)
            self._feed(lambda: self.voter.push_failed(self._host.now(), action.owner, action.start, action.stop))

    async def _coded(self, start: int, stop: int) -> AsyncGenerator[memoryview, None]:
        """Our contribution to a slice in its code, piece by piece in the same memory: it is never there as a whole."""
        coding, code = self.buffers.coding, memoryview(b"")
        for at in range(start, stop, defaults.CODED_PIECE):
            end = min(at + defaults.CODED_PIECE, stop)
            if self.buffers.own is None:
                raise RemoteError("the round is over")
            code = code or self.buffers.part(end - at, coding.codec).data
            piece = code[: coding.codec.wire_size(end - at)]
            await self._passes.run(end - at, coding.encode, self.buffers.own[at:end], at, piece)
            yield piece

    async def on_scatter(self, call: Call[Scatter]) -> Taken:
        """Take a contributor's part of a slice; NaN and infinities are refused and the contributor is told."""
        request, sender = call.request, call.request.contributor or call.peer
        own = sender == call.peer and sender in self.trial
        if not own and (sender not in self.voters or call.peer not in self.voters):
            raise RemoteRefused("not-a-voter", f"{call.peer.short} is no voter of round {self.round}")
        codec, elements = resolve(request.codec), request.stop - request.start
        if sender != call.peer and not self._auditor.audits(codec):
            raise RemoteRefused("unsigned", "parts of others are taken where all are signed")
        # Whoever carries a part answers for the room that it takes.
        part = self.buffers.room_for(call.peer, request.start, request.stop, codec)
        if part is None:
            raise RemoteRefused("bad-range", f"elements {request.start}..{request.stop} are too many")
        await call.read_into(part.data)
        wrong = await self._passes.run(elements, fault, part, elements)
        if wrong is not None:
            why = f"your contribution of round {self.round} is refused: {wrong} (from element {request.start})"
            self.refused[sender] = wrong
            self.setting.note(Note("scatter", "not-finite", wrong, sender))
            raise RemoteRefused("not-finite", why)
        wrong = await self._auditor.take(sender, request.start, request.stop, part, request.mark)
        if wrong is not None:
            self.setting.note(Note("scatter", "unsigned", wrong, sender))
            raise RemoteRefused("unsigned", f"your contribution of round {self.round} is refused: {wrong}")
        self._received(sender, request.start, request.stop, part)
        return Taken(self._auditor.receipt(sender, request))

    async def _combine(self, action: Combine) -> None:
        plan = self.voter.plan
        if plan is None or self.buffers.generation != (action.attempt, action.epoch):
            return
        ranges = [plan.slices[index].range for index in action.indices]
        decision = Decision.read(action.decision, len(action.members)) if action.decision else None
        codec, rule = resolve(plan.codec), self.setting.rule
        if plan.ring:
            combine = self.relay.closing(plan, action)
        else:
            combine = self.buffers.combination(action.members, action.weights, ranges, codec, rule, decision)
        try:
            coded = await self._passes.run(sum(stop - start for start, stop in ranges) * len(action.members), combine)
        except ProtocolMisuse as error:
            # Numbers that are finite may have a mean that is not, which a codec cannot say.
            self.setting.note(Note("combine", "failed", str(error), self.me))
            return
        if self.setting.distort is not None and self.buffers.result is not None:
            for start, stop in ranges:
                self.setting.distort(self.buffers.result[start:stop])
        await self._auditor.sign(plan, action.members, action.decision, action.indices)
        if self.buffers.generation != (action.attempt, action.epoch):
            return
        for index, part in zip(action.indices, coded, strict=True):
            self.buffers.filled[index], self.buffers.coded[index] = None, part
        self._feed(lambda: self.voter.combined(self._host.now(), action.attempt, action.epoch, action.indices))

    async def _share(self, action: Share) -> None:
        plan, frozen, part = self.voter.plan, self.voter.frozen, self.buffers.coded.get(action.index)
        if plan is not None and plan.ring and part is None:
            part = self.buffers.passed_on(plan.slices[action.index], action.index)
        current = plan is not None and (plan.attempt, plan.epoch) == (action.attempt, action.epoch)
        if plan is None or frozen is None or part is None or not current:
            return
        start, stop = plan.slices[action.index].range
        members = members_hash(frozen.members)
        signed = self._auditor.signed(action.index)
        request = Shared(
            self.key, action.attempt, action.epoch, action.index, start, stop, members, part.codec.name, signed
        )
        try:
            await self._endpoint.call(action.receiver, SHARE, request, body=[part.data])
        except RemoteError as error:
            log.debug("combined slice for %s: %s", action.receiver.short, error)

    async def on_share(self, call: Call[Shared]) -> Ack:
        """Take a combined slice from its owner; it may come before we know of plan or freeze."""
        request, sender = call.request, call.peer
        if sender not in self.voters:
            raise RemoteRefused("not-a-voter", f"{sender.short} is no voter of round {self.round}")
        codec, target, place = resolve(request.codec), self._target(request, sender), _place(request)
        if target is not None and (codec is FP32 or codec.elementwise):
            with self._land(place):
                if codec is FP32:
                    await call.read_into(bytes_view(target))
                else:
                    await self._read_decoded(call, codec, target)
                await self._check_signed(request, sender, target, codec)
                if self._target(request, sender) is not None:
                    self.buffers.filled[request.index] = None
        else:
            await self._share_elsewhere(call, codec)
        if self.buffers.generation == (request.attempt, request.epoch) and request.index not in self.buffers.filled:
            raise RemoteRefused("bad-range", "that slice is not the plan's")
        self._feed(
            lambda: self.voter.combined_received(
                self._host.now(), sender, request.attempt, request.epoch, request.index, request.members
            )
        )
        return Ack()

    async def _read_decoded(self, call: Call[Shared], codec: Codec, target: Tensor) -> None:
        """Read a combined slice piece by piece: its code is never there as a whole."""
        code = self.buffers.part(min(defaults.CODED_PIECE, len(target)), codec).data
        for at in range(0, len(target), defaults.CODED_PIECE):
            end = min(at + defaults.CODED_PIECE, len(target))
            piece = code[: codec.wire_size(end - at)]
            await call.read_into(piece)
            wrong = await self._passes.run(end - at, codec.fault, piece, end - at)
            if wrong is not None:
                self._refuse_combined(call.peer, wrong)
            await self._passes.run(end - at, codec.decode, piece, target[at:end])

    async def _check_signed(self, request: Shared, sender: PeerId, result: Tensor, codec: Codec) -> None:
        """Raises :class:`RemoteRefused` for a combined slice that is not what its owner has signed."""
        place = request.attempt, request.epoch, request.start, request.stop
        wrong = await self._auditor.check(*place, sender, result, codec, request.signed)
        if wrong is not None:
            self.setting.note(Note("gather", "unsigned", wrong, sender))
            raise RemoteRefused("unsigned", f"your combined slice of round {self.round} is refused: {wrong}")

    def _refuse_combined(self, sender: PeerId, wrong: str) -> NoReturn:
        self.setting.note(Note("gather", "not-finite", wrong, sender))
        raise RemoteRefused("not-finite", f"your combined slice of round {self.round} is refused: {wrong}")

    async def _share_elsewhere(self, call: Call[Shared], codec: Codec) -> None:
        """It has no place in a result yet, or can only be decoded as a whole."""
        request, sender, elements = call.request, call.peer, call.request.stop - call.request.start
        part = self.buffers.room_early(sender, request.start, request.stop, codec)
        if part is None:
            raise RemoteRefused("bad-range", "more combined slices than a round has")
        await call.read_into(part.data)
        wrong = await self._passes.run(elements, fault, part, elements)
        if wrong is not None:
            self._refuse_combined(sender, wrong)
        target = self._target(request, sender)
        if target is None and self._auditor.audits(codec):
            decoded = await self._passes.run(elements, _decoded, part, elements)
            await self._check_signed(request, sender, decoded, codec)
            target = self._target(request, sender)
        if target is None:
            piece = Slice(request.start, request.stop, sender)
            self.buffers.keep_early(request.attempt, request.epoch, request.index, piece, part)
            self._generation_due()
            return
        with self._land(_place(request)):
            await self._passes.run(elements, codec.decode, part.data, target)
            await self._check_signed(request, sender, target, codec)
            if self._target(request, sender) is not None:
                self.buffers.filled[request.index] = None

    @contextmanager
    def _land(self, place: tuple[int, int, int]) -> Iterator[None]:
        """While a combined slice is written where it belongs. One writer at a time, or it could go on after another one
        was done, and change a result that is agreed on. Raises :class:`RemoteRefused`."""
        if place in self._landing:
            raise RemoteRefused("busy", "that slice is on its way already")
        with trio.CancelScope() as scope:
            self._landing[place] = scope
            try:
                yield
            finally:
                del self._landing[place]
        if scope.cancelled_caught:
            raise RemoteRefused("late", "that slice came from another holder")

    def _target(self, request: Shared, sender: PeerId) -> Tensor | None:
        """Where in the result a slice belongs, None when its plan is not ours (yet) or it is there already."""
        plan, result = self.voter.plan, self.buffers.result
        if plan is None or result is None or self.buffers.generation != (request.attempt, request.epoch):
            return None
        if not 0 <= request.index < len(plan.slices) or request.index in self.buffers.filled:
            return None
        piece = plan.slices[request.index]
        known = source(plan, request.index, self.me) == sender and plan.codec == request.codec
        if piece.range != (request.start, request.stop) or not known:
            return None
        return result[request.start : request.stop]

    async def _pull(self, action: Pull) -> None:
        plan, frozen, result = self.voter.plan, self.voter.frozen, self.buffers.result
        if plan is None or frozen is None or result is None:
            return
        if (plan.attempt, plan.epoch) != (action.attempt, action.epoch) or action.index in self.buffers.filled:
            return
        start, stop = plan.slices[action.index].range
        # Its owner may still be writing to the result, as slowly as it likes.
        pulled = self.buffers.room(stop - start)
        try:
            want = Want(self.key, action.attempt, action.epoch, start, stop, b"")
            given = await download(self._endpoint, action.holder, want, bytes_view(pulled))
        except RemoteError as error:
            log.debug("combined slice from %s: %s", action.holder.short, error)
            return
        codec, owner = resolve(plan.codec), plan.slices[action.index].owner
        wrong = await self._auditor.check(action.attempt, action.epoch, start, stop, owner, pulled, codec, given.signed)
        if wrong is not None:
            self.setting.note(Note("gather", "unsigned", wrong, action.holder))
            return
        place = action.attempt, action.epoch, action.index
        while place in self._landing:
            self._landing[place].cancel()
            await trio.lowlevel.checkpoint()
        current = self.buffers.result is result and given.members == members_hash(frozen.members)
        if not current or action.index in self.buffers.filled:
            return
        result[start:stop] = pulled
        self.buffers.filled[action.index] = None
        self._feed(
            lambda: self.voter.combined_received(
                self._host.now(),
                action.holder,
                action.attempt,
                action.epoch,
                action.index,
                given.members,
                pulled=True,
            )
        )

    async def on_want(self, call: Call[Want]) -> Given:
        """Give a combined slice of the present generation, or part of the result of a record."""
        request, frozen, plan = call.request, self.voter.frozen, self.voter.plan
        indices: list[int] = []
        if request.digest:
            source = self.results.final if request.digest == self.results.final_digest else None
            if source is None:
                raise RemoteRefused("not-held", f"round {self.round}: that result is not here")
        else:
            source = self.buffers.result if self.buffers.generation == (request.attempt, request.epoch) else None
            pieces = () if plan is None else plan.slices
            indices = [i for i, p in enumerate(pieces) if p.range == (request.start, request.stop)]
            if source is None or not indices or not all(i in self.buffers.filled for i in indices):
                raise RemoteRefused("not-held", f"round {self.round}: that slice is not here")
        if not 0 <= request.start < request.stop <= source.numel():
            raise RemoteRefused("bad-range", f"elements {request.start}..{request.stop} of {source.numel()}")
        signed = None if request.digest else self._auditor.signed(indices[0])
        await call.write(bytes_view(source[request.start : request.stop]))
        return Given(members_hash(frozen.members) if frozen is not None else b"", signed)


def _place(request: Shared) -> tuple[int, int, int]:
    return request.attempt, request.epoch, request.index


def _decoded(part: Part, elements: int) -> Tensor:
    """Blocking."""
    if part.vector is not None:
        return part.vector
    out = torch.empty(elements)
    part.codec.decode(part.data, out)
    return out


def fault(part: Part, elements: int) -> str | None:
    """What is wrong with what was received; None when it holds finite numbers. Blocking."""
    return exact.check_finite(part.vector) if part.vector is not None else part.codec.fault(part.data, elements)
