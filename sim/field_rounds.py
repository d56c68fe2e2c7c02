"""Rounds of a field: who reduces with whom, when it is over, and the same bits that owners of slices would give.

A :class:`Meeting` is one round of one group. It does what :mod:`shoal.learning.rounds` decides with messages::

    first submit ─▶ all that are present are ready, or a majority and then the grace of the real pace
                 ─▶ members: those that give something ─▶ frozen: combined in canonical order ─▶ decided for all

and takes the virtual time that :mod:`.field_links` says. Who was not ready is left out, is told when the round is
decided, and fetches the result when it asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
import trio
from torch import Tensor

from ..learning import defaults, exact
from ..learning.exchange import Reducing
from ..learning.reduce.codecs import FP32, Codec, combine
from ..learning.reduce.coding import PLAIN, Coding, Feedback
from ..learning.reduce.tensors import Bundle, Tensors, empty_vector
from ..learning.rounds.messages import quorum
from ..learning.rounds.payloads import MAX_PAYLOAD
from ..transport import deadlines
from ..transport.errors import ConfigError
from ..transport.identity import PeerId
from .field_links import BETWEEN, Cost, Line, cost, gathering, transfer

if TYPE_CHECKING:
    from .field_run import FieldRun

T = TypeVar("T", bound=Tensors)


@attrs.define(eq=False)
class Given:
    """What one member brings. ``why``: why it brings nothing. ``filled``: elements that are there, the ``last`` ones of
    them since ``filled_at``; ``worked``: seconds from the opening of its round to here."""

    peer: PeerId
    length: int
    vector: Tensor | None
    samples: int
    weight: float
    coding: Coding
    worked: float
    layout: str
    why: str = ""
    filled: int = 0
    last: int = 0
    filled_at: float = 0.0
    payload: bytes | None = None
    changed: trio.Event = attrs.field(factory=trio.Event)

    @property
    def settled(self) -> bool:
        return bool(self.why) or self.filled >= self.length

    def wake(self) -> None:
        event, self.changed = self.changed, trio.Event()
        event.set()


class Meeting:
    """See the module. ``everybody``: all of the group, in canonical order; ``lines``: theirs."""

    def __init__(
        self, round: int, everybody: tuple[PeerId, ...], lines: dict[PeerId, Line], count: Callable[[PeerId, int], None]
    ) -> None:
        """``count``: is told the bytes that each has sent."""
        self.round, self.everybody, self.lines, self._count = round, everybody, lines, count
        #: Chosen by the first contribution.
        self.codec: Codec = FP32
        self.gone: dict[PeerId, None] = {}
        self.given: dict[PeerId, Given] = {}
        self.frozen = False
        self.decided = trio.Event()
        self.members: tuple[PeerId, ...] = ()
        self.result: Tensor | None = None
        self.said: dict[bytes, bytes] = {}
        self.cost: Cost | None = None
        self._changed = trio.Event()
        self._begun = False

    @property
    def present(self) -> tuple[PeerId, ...]:
        """Those that have not left."""
        return tuple(peer for peer in self.everybody if peer not in self.gone)

    def join(self, given: Given, nursery: trio.Nursery) -> None:
        """A member is ready."""
        self.given[given.peer] = given
        if not self._begun:
            self._begun = True
            nursery.start_soon(self._run)
        self._wake()

    def leave(self, peer: PeerId) -> None:
        """It says goodbye: nobody waits for it. Frozen before, its contribution stays."""
        self.gone[peer] = None
        given = self.given.get(peer)
        if given is not None and not self.frozen:
            given.why = "left"
            given.wake()
        self._wake()

    def _wake(self) -> None:
        event, self._changed = self._changed, trio.Event()
        event.set()

    def _ready(self) -> list[PeerId]:
        return [peer for peer in self.everybody if peer in self.given and peer not in self.gone]

    async def _run(self) -> None:
        await self._gathered()
        ready = tuple(self._ready())
        if not ready:
            return  # all have left
        if any(self.given[p].payload is not None for p in ready):
            await self._gather(ready)
            return
        kind = self._kind(ready)
        givers = tuple(p for p in ready if not self.given[p].why and self._kind((p,)) == kind)
        self.cost = spent = cost(
            givers, ready, tuple(self.lines[p] for p in ready), kind[0], self.codec.name, self.round
        )
        givers = tuple(p for p in givers if p not in spent.late)
        began = trio.current_time()
        until = began + spent.freeze
        for peer in givers:
            given = self.given[peer]
            await self._filled(given, spent)
            if given.filled_at > began:
                # The last elements leave when they are there, over a line that has been free for them.
                rest = self.codec.wire_size(given.last) * (len(ready) - 1) / len(ready)
                until = max(until, given.filled_at + rest / self.lines[peer].up + BETWEEN * spent.latency)
        await trio.sleep_until(until)
        self.frozen = True
        self.members = tuple(p for p in givers if not self.given[p].why)
        contributions = [self.given[p] for p in self.members]
        self.result = combined(contributions, kind[0], [s.range for s in spent.slices], self.codec)
        for peer, size in zip(ready, spent.sent, strict=True):
            self._count(peer, size)
        await trio.sleep_until(until + spent.seconds - spent.freeze)
        self.decided.set()

    async def _gather(self, ready: tuple[PeerId, ...]) -> None:
        """Ready, propose, accept, commit: a record that holds what each gave."""
        self.frozen = True
        self.members = tuple(p for p in ready if self.given[p].payload is not None and not self.given[p].why)
        self.said = {p.key: self.given[p].payload or b"" for p in self.members}
        self.result = empty_vector(0)
        trip, sent = gathering(
            ready, tuple(self.lines[p] for p in ready), [len(x) for x in self.said.values()], self.round
        )
        for peer, size in zip(ready, sent, strict=True):
            self._count(peer, size)
        await trio.sleep(trip)
        self.decided.set()

    async def _filled(self, given: Given, spent: Cost) -> None:
        """What a contribution lacks has to follow within the patience of a run; else it is withdrawn."""
        size = self.codec.wire_size(given.length)
        slowest = min(line.up for line in self.lines.values())
        patience = deadlines.bulk_phase(defaults.TRANSFER_FLOOR, size, 2 * spent.latency, slowest)
        while not given.settled:
            with trio.move_on_after(patience + self._grace()) as waited:
                await given.changed.wait()
            if waited.cancelled_caught:
                given.why = given.why or "its elements did not come in time"

    def _kind(self, peers: Sequence[PeerId]) -> tuple[int, str]:
        """Length and layout that most of those have who give, or of all: as the real planner counts."""
        offers = [self.given[p] for p in peers]
        kinds = [(g.length, g.layout) for g in offers if not g.why] or [(g.length, g.layout) for g in offers]
        return max(sorted(kinds), key=kinds.count)

    async def _gathered(self) -> None:
        """All that are present are ready; or a majority is, and the others have had the grace that the real pace gives
        them: as long as the work took (the median of those ready), 3 s at least."""
        while len(self._ready()) < min(quorum(len(self.everybody)), len(self.present)):
            await self._changed.wait()
        with trio.move_on_after(self._grace()):
            while len(self._ready()) < len(self.present):
                await self._changed.wait()

    def _grace(self) -> float:
        worked = sorted(self.given[p].worked for p in self._ready()) or [0.0]
        trip = max(2 * self.lines[p].latency for p in self.everybody)
        return deadlines.stragglers(defaults.GRACE_FLOOR, worked[len(worked) // 2], trip)


def combined(given: Sequence[Given], length: int, ranges: Sequence[tuple[int, int]], codec: Codec) -> Tensor:
    """What all of a group end with, bit for bit as in :class:`shoal.learning.reduce.buffers.Buffers`: each slice coded
    by each contributor, combined in canonical order, coded once and decoded."""
    result = empty_vector(length)
    if not given:
        return result.zero_()
    weights = [each.weight for each in given]
    vectors = [each.vector for each in given if each.vector is not None]
    if codec is FP32:
        return exact.weighted_mean(vectors, weights, out=result)  # slicing changes no bits
    for start, stop in ranges:
        size = codec.wire_size(stop - start)
        parts = []
        for each, vector in zip(given, vectors, strict=True):
            code = bytearray(size)
            each.coding.encode(vector[start:stop], start, code)
            parts.append((codec, code))
        piece = result[start:stop]
        combine(parts, weights, piece)
        whole = bytearray(size)
        codec.encode(piece, whole)
        codec.decode(whole, piece)
    return result


class FieldExchange:
    """The reduces of one round on one peer of a field: what :class:`shoal.learning.exchange.Exchange` is in a run."""

    def __init__(self, run: FieldRun, meeting: Meeting) -> None:
        self._run, self.meeting = run, meeting
        self._handles: list[Reducing[Any]] = []
        self._taken = self._length = 0
        self._codec = ""
        self.given: Given | None = None
        self._closed = ""
        self._over = trio.Event()

    def submit(
        self,
        tensors: T,
        of: int | None,
        out: T | None,
        codec: str | None = None,
        feedback: Feedback | None = None,
        *,
        why: str = "",
    ) -> Reducing[T]:
        """See :meth:`shoal.learning.peer.Round.reduce_async`. Raises as in a run."""
        if self._closed:
            raise ConfigError(f"round {self.meeting.round} is over ({self._closed})")
        bundle = Bundle.of(tensors)
        target = None if out is None else bundle.target(out)
        if not self._handles:
            self._begin(bundle, bundle.size if of is None else of, codec, feedback, why)
        elif of not in (None, self._length):
            raise ConfigError(f"of={of}: the first reduce of round {self.meeting.round} said {self._length}")
        elif feedback is not None or codec not in (None, self._codec):
            raise ConfigError(f"one codec for all reduces of a round: the first of round {self.meeting.round} chose it")
        if self._taken + bundle.size > self._length:
            raise ConfigError(f"round {self.meeting.round} has room for {self._length} elements in all its reduces")
        handle: Reducing[T] = Reducing(bundle, target, self._taken)
        self._taken += bundle.size
        self._handles.append(handle)
        self._fill(handle)
        return handle

    async def gather(self, payload: bytes) -> dict[bytes, bytes]:
        """See :meth:`shoal.learning.peer.Round.gather`."""
        if self._closed or self.given is not None:
            raise ConfigError(f"round {self.meeting.round} takes no payload: it is over, or has an exchange already")
        if len(payload) > MAX_PAYLOAD:
            raise ConfigError(f"a payload of {len(payload)} bytes: at most {MAX_PAYLOAD} in a round")
        run, tally = self._run, self._run.take_tally()
        self.given = Given(
            peer=run.me, length=0, vector=None, samples=tally.samples, weight=1.0, coding=PLAIN,
            worked=trio.current_time() - run.began, layout="", payload=payload,
        )  # fmt: skip
        self.meeting.join(self.given, run.nursery)
        run.nursery.start_soon(self._deliver, False)
        await self._over.wait()
        return self.meeting.said

    def _begin(self, bundle: Bundle, length: int, codec: str | None, feedback: Feedback | None, why: str) -> None:
        if length > defaults.VECTORS_PER_ROUND * self._run.layout.size:
            raise ConfigError(f"{length} elements are too many for one round of this run")
        run, meeting = self._run, self.meeting
        coding = Coding.of(codec or run.codec, feedback)
        self._length, self._codec = length, coding.codec.name
        if not meeting.given:
            meeting.codec = coding.codec
        elif meeting.codec is not coding.codec and meeting.codec != coding.codec:
            raise ConfigError(f"another codec ({self._codec}) than the others' ({meeting.codec.name}) in one round")
        tally = run.take_tally()
        why = why or ("" if tally.samples else "no samples")
        whole = bundle.whole() if bundle.size == length else None
        self.given = Given(
            peer=run.me,
            length=length,
            vector=None if why else whole if whole is not None else empty_vector(length),
            samples=tally.samples,
            weight=1.0 if run.time_budget is None else float(tally.samples),
            coding=coding,
            worked=trio.current_time() - run.began,
            layout=bundle.layout + (" and more" if bundle.size < length else ""),
            why=why,
        )
        late = meeting.cost is not None
        meeting.join(self.given, run.nursery)
        run.nursery.start_soon(self._deliver, late)

    def _fill(self, handle: Reducing[Any]) -> None:
        given = self.given
        assert given is not None
        if given.vector is not None and not given.why:
            part = given.vector[handle._start : handle._start + handle._bundle.size]
            if handle._bundle.size < given.length or handle._bundle.whole() is None:
                handle._bundle.gather(part).run()
            wrong = exact.check_finite(part)
            if wrong is not None:
                self.withdraw(wrong, broken=True)
        given.filled, given.last, given.filled_at = self._taken, handle._bundle.size, trio.current_time()
        given.wake()

    def withdraw(self, why: str, *, broken: bool = False) -> None:
        """Our contribution is taken back, while it can be."""
        given = self.given
        if given is not None and not given.why and not self.meeting.frozen:
            given.why = why
            given.wake()
            self._run.withdrawn(why, broken)

    async def _deliver(self, late: bool) -> None:
        meeting, given, me = self.meeting, self.given, self._run.me
        assert given is not None
        await meeting.decided.wait()
        while not given.settled:
            await given.changed.wait()
        if late and meeting.result is not None:
            holder = meeting.members[0] if meeting.members else me
            size = meeting.codec.wire_size(meeting.result.numel())
            self._run.field.count(holder, size)
            await trio.sleep(transfer(size, meeting.lines[holder], meeting.lines[me]))
        given.coding.settle(me in meeting.members)
        if self._run.opened is not None:
            self._run.opened.members = tuple(peer.key for peer in meeting.members)
        for handle in self._handles:
            self._hand_over(handle)
        self._over.set()

    def _hand_over(self, handle: Reducing[Any]) -> None:
        result = self.meeting.result
        if handle.done() or result is None:
            return
        part = result[handle._start : handle._start + handle._bundle.size]
        views = handle._bundle.views(part) if handle._out is None else None
        if views is not None:
            handle._end(views)
            return
        into = handle._bundle.target(handle._bundle.blank()) if handle._out is None else handle._out
        handle._bundle.scatter(part, into).run()
        handle._end(into.given)

    async def settle(self) -> None:
        """The strategy is done with this round. Raises :class:`ConfigError` for a handle that nobody awaited."""
        left = [handle for handle in self._handles if not handle._awaited and not handle._cancelled]
        if left:
            raise ConfigError(f"{len(left)} reduces of round {self.meeting.round} were never awaited")
        if self.given is not None:
            if self._taken < self._length:
                self.withdraw(f"only {self._taken} of {self._length} elements were given to reduce")
            await self._over.wait()

    def close(self, why: str) -> None:
        """Handles that are not done raise."""
        self._closed = why
        for handle in self._handles:
            handle._end(error=ConfigError(f"round {self.meeting.round} is over ({why}): this reduce has no result"))
