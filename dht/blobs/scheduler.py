"""Which chunks of a blob to ask of which holder: a pure state machine, told the time.

Theory of operation. Every chunk that is wanted is *open* (nobody is asked for it), *flying* (one or more holders are),
or done. A holder with room is given open chunks, those first that the fewest holders have (*rarest first*): whoever
leaves next then takes with it as little as possible that nobody else has. Its room follows its measured rate: enough
for :data:`defaults.AHEAD` seconds and two round trips: a fast holder never waits for us, and a slow one never sits on
much. When nothing is open for a holder with room, it is given what others would deliver later than it (*endgame*),
and whatever arrives first ends the other requests. A holder that delivers nothing for longer than it should is
*stalled*: its chunks are open again, and what it still delivers is welcome. A holder that sends a wrong chunk is out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import attrs

from ...transport import deadlines
from ...transport.errors import ProtocolMisuse
from ...transport.identity import PeerId
from . import defaults
from .bits import Bits


@attrs.frozen
class Ask:
    """Ask ``peer`` for these chunks, in this order. ``number`` names the request; ``why``, for people."""

    number: int
    peer: PeerId
    chunks: tuple[int, ...]
    why: str


@attrs.frozen
class Cancel:
    """Nothing more is wanted of this request."""

    number: int


@attrs.define(eq=False)
class _Flight:
    number: int
    chunks: dict[int, None]  # not here yet, in the order in which they come
    got: int = 0  # bytes of the first of them


@attrs.define(eq=False)
class Holder:
    """A peer that has some chunks: ``bits``, None when it has all."""

    peer: PeerId
    bits: Bits | None
    rtt: float
    #: Bytes per second, measured lately; None before.
    rate: float | None = None
    #: Bytes that it delivered and that were right.
    received: int = 0
    strikes: int = 0
    #: When it may be asked again.
    ready: float = 0.0
    stalled: bool = False
    flights: dict[int, _Flight] = attrs.field(factory=dict)
    progress: float = 0.0
    _bytes: float = 0.0
    _seconds: float = 0.0
    dry: bool = False  # nothing is open that it has

    @property
    def partial(self) -> Iterable[int]:
        """Its chunks, where they are not all."""
        return () if self.bits is None else self.bits

    def has(self, chunk: int) -> bool:
        return self.bits is None or chunk in self.bits

    def flying(self) -> Iterator[int]:
        for flight in self.flights.values():
            yield from flight.chunks

    def measure(self, size: int, now: float) -> None:
        """``size`` bytes have come since the last sign of it."""
        since = max(now - self.progress, 0.0)
        fade = 0.5 ** (since / defaults.RATE_MEMORY)
        self._bytes, self._seconds = self._bytes * fade + size, self._seconds * fade + since
        self.progress, self.stalled = now, False
        self.rate = self._bytes / max(self._seconds, 1e-6)


class Scheduler:
    """See the module. ``size``: bytes of a chunk by number. ``wanted``: the chunks to get, in the order of liking.

    ``lag``: how late our own loop runs, seconds.
    """

    def __init__(
        self, size: Callable[[int], int], wanted: Iterable[int], lag: Callable[[], float] = lambda: 0.0
    ) -> None:
        self._size, self._lag = size, lag
        #: Open chunks by how many partial holders have them; those that have all make no difference.
        self._open: dict[int, dict[int, None]] = {0: dict.fromkeys(wanted)}
        self._level: dict[int, int] = {}  # chunk → that number, where it is not 0
        self._left = dict.fromkeys(self._open[0])
        self._flying: dict[int, list[int]] = {}  # chunk → requests that bring it
        self._asks: dict[int, Holder] = {}
        self.holders: dict[PeerId, Holder] = {}
        #: Who was given up, and why; liars for good.
        self.lost: dict[PeerId, str] = {}
        self.liars: dict[PeerId, str] = {}
        self._number = 0

    @property
    def done(self) -> bool:
        return not self._left

    @property
    def left(self) -> int:
        """Chunks still to come."""
        return len(self._left)

    def wants(self, chunk: int) -> bool:
        return chunk in self._left

    def needs(self, number: int) -> bool:
        """Whether request ``number`` still brings something that is wanted."""
        holder = self._asks.get(number)
        return holder is not None and bool(holder.flights[number].chunks)

    # -- holders -----------------------------------------------------------------------------------------------------

    def add(self, peer: PeerId, bits: Bits | None, rtt: float, now: float) -> None:
        """``peer`` has these chunks (None: all): a new holder, or news of one. Liars stay out."""
        if peer in self.liars:
            return
        holder = self.holders.get(peer)
        if holder is None:
            self.lost.pop(peer, None)
            self.holders[peer] = holder = Holder(peer, bits, rtt, progress=now)
        else:
            self._count(holder.partial, -1)
            holder.bits = bits
        self._count(holder.partial, 1)
        holder.dry = False

    def drop(self, peer: PeerId, why: str, *, lied: bool = False) -> list[Cancel]:
        """``peer`` is not asked any more; what it was asked for is open again. Returns its requests."""
        if lied:
            self.liars[peer] = why
        holder = self.holders.pop(peer, None)
        if holder is None:
            return []
        if not lied:
            self.lost[peer] = why
        self._count(holder.partial, -1)
        numbers = list(holder.flights)
        for number in numbers:
            self._land(number)
        return [Cancel(number) for number in numbers]

    def _count(self, chunks: Iterable[int], change: int) -> None:
        """One partial holder more (1) or less (-1) has these."""
        for chunk in chunks:
            level = self._level.get(chunk, 0)
            if chunk in self._open.get(level, ()):
                del self._open[level][chunk]
                self._open.setdefault(level + change, {})[chunk] = None
            self._level[chunk] = level + change

    # -- asking ------------------------------------------------------------------------------------------------------

    def poll(self, now: float) -> list[Ask | Cancel]:
        """What to do now. Call it after every event, and at :meth:`due`."""
        actions: list[Ask | Cancel] = []
        for holder in list(self.holders.values()):
            if holder.flights and not holder.stalled and now >= self._stalls(holder):
                holder.stalled = True
                for chunk in holder.flying():
                    self._open_again(chunk)
        for holder in list(self.holders.values()):
            while (ask := self._ask(holder, now)) is not None:
                actions.append(ask)
        return actions

    def due(self, now: float) -> float:
        """When :meth:`poll` may have something new to say although nothing happened."""
        times = [math.inf]
        for holder in self.holders.values():
            if holder.flights and not holder.stalled:
                times.append(self._stalls(holder))
                if holder.rate is None and self._unknown(holder) > now:
                    times.append(self._unknown(holder))
            if holder.ready > now:
                times.append(holder.ready)
        return min(times)

    def _stalls(self, holder: Holder) -> float:
        seconds = deadlines.bulk_phase(
            defaults.STALL_FLOOR, self.piece(holder.peer), holder.rtt, holder.rate, self._lag()
        )
        return holder.progress + seconds

    def piece(self, peer: PeerId) -> int:
        """Bytes of ``peer`` to wait for at a time."""
        holder = self.holders.get(peer)
        rate = holder.rate if holder is not None else None
        if rate is None:
            return defaults.PIECE_FIRST
        return int(min(max(rate * defaults.AHEAD, defaults.PIECE_FIRST), defaults.CHUNK))

    def _ask(self, holder: Holder, now: float) -> Ask | None:
        if holder.stalled or now < holder.ready or len(holder.flights) >= defaults.ASKS_PER_PEER:
            return None
        ahead, room = self._ahead(holder), self._room(holder)
        if ahead >= room and holder.flights:
            return None
        chunks, why = self._rarest(holder, room), "rarest first"
        if not chunks:
            chunks, why = self._latest(holder, ahead, now), "endgame: the other would be later"
        if not chunks:
            return None
        self._number += 1
        if not holder.flights:
            holder.progress = now
        holder.flights[self._number] = _Flight(self._number, dict.fromkeys(chunks))
        self._asks[self._number] = holder
        for chunk in chunks:
            self._flying.setdefault(chunk, []).append(self._number)
        return Ask(self._number, holder.peer, tuple(chunks), why)

    def _ahead(self, holder: Holder) -> int:
        """Bytes that ``holder`` still owes."""
        owed = sum(self._size(chunk) for chunk in holder.flying())
        return owed - sum(flight.got for flight in holder.flights.values())

    @staticmethod
    def _room(holder: Holder) -> int:
        """Bytes that may be on their way from ``holder``. One chunk until its rate is known."""
        if holder.rate is None:
            return defaults.CHUNK
        return int(min(holder.rate * (defaults.AHEAD + 2 * holder.rtt), defaults.MAX_AHEAD))

    def _rarest(self, holder: Holder, room: int) -> list[int]:
        """Open chunks for ``holder``: one more than half of its ``room`` holds at most."""
        if holder.dry:
            return []
        limit = min(max(room // defaults.ASKS_PER_PEER, 1), defaults.MAX_ASK_BYTES)
        found: list[int] = []
        size = 0
        for level in sorted(self._open):
            for chunk in self._open[level]:
                if not holder.has(chunk):
                    continue
                found.append(chunk)
                size += self._size(chunk)
                if size >= limit or len(found) >= defaults.MAX_ASK_CHUNKS:
                    break
            else:
                continue
            break
        else:
            # Everything was looked at.
            holder.dry = True
        for chunk in found:
            del self._open[self._level.get(chunk, 0)][chunk]
        return sorted(found)

    def _latest(self, holder: Holder, ahead: int, now: float) -> list[int]:
        """The flying chunk that would come last, if ``holder`` would bring it sooner; nothing otherwise."""
        if holder.rate is None and holder.flights:
            return []
        best: tuple[float, int] | None = None
        for other in self.holders.values():
            if other is holder:
                continue
            before = -sum(flight.got for flight in other.flights.values())
            for chunk in other.flying():
                before += self._size(chunk)
                flights = self._flying[chunk]
                if len(flights) >= defaults.MAX_COPIES or not holder.has(chunk):
                    continue
                if any(self._asks[number] is holder for number in flights):
                    continue
                wait = self._wait(other, before, now)
                if best is None or wait > best[0]:
                    best = wait, chunk
        if best is None or best[0] <= 0:
            return []
        ours = (ahead + self._size(best[1])) / holder.rate + 2 * holder.rtt if holder.rate is not None else 0.0
        return [best[1]] if ours < best[0] else []

    def _wait(self, holder: Holder, size: int, now: float) -> float:
        """Seconds until ``holder`` has brought ``size`` bytes; nobody knows when it has brought none for a while."""
        if holder.stalled or (holder.rate is None and now >= self._unknown(holder)):
            return math.inf
        return 0.0 if holder.rate is None else size / holder.rate

    @staticmethod
    def _unknown(holder: Holder) -> float:
        return holder.progress + defaults.AHEAD + 2 * holder.rtt

    # -- what happened -----------------------------------------------------------------------------------------------

    def progressed(self, number: int, size: int, now: float) -> None:
        """``size`` more bytes of request ``number`` have come."""
        holder = self._asks.get(number)
        if holder is None:
            return
        if holder.stalled:
            # It goes on: others need not be asked for what nobody else was asked for yet.
            for chunk in holder.flying():
                self._open.get(self._level.get(chunk, 0), {}).pop(chunk, None)
        holder.measure(size, now)
        holder.flights[number].got += size

    def skipped(self, number: int) -> None:
        """The chunk that request ``number`` was bringing had come from elsewhere."""
        holder = self._asks.get(number)
        if holder is not None:
            holder.flights[number].got = 0

    def arrived(self, number: int, chunk: int, now: float) -> list[Cancel]:
        """Request ``number`` brought a chunk, and it is right. Returns what need not go on."""
        holder = self._asks.get(number)
        if chunk not in self._left:
            return []
        if holder is not None:
            holder.received += self._size(chunk)
            holder.strikes = 0
        del self._left[chunk]
        self._open.get(self._level.get(chunk, 0), {}).pop(chunk, None)
        cancels = []
        for other in self._flying.pop(chunk, ()):
            flight = self._asks[other].flights[other]
            flight.chunks.pop(chunk, None)
            if other == number:
                flight.got = 0
            if not flight.chunks and other != number:
                cancels.append(Cancel(other))
        return cancels

    def lied(self, number: int, why: str) -> list[Cancel]:
        """What request ``number`` brought is wrong: its peer is out."""
        holder = self._asks.get(number)
        return [] if holder is None else self.drop(holder.peer, why, lied=True)

    def lacks(self, number: int, now: float) -> list[Cancel]:
        """The peer of request ``number`` says that it does not have the next chunk that it was asked for."""
        holder = self._asks.get(number)
        if holder is None:
            return []
        flight = holder.flights[number]
        if holder.bits is None:
            holder.bits = Bits.full(1 + max((*self._left, *flight.chunks), default=0))
            self._count(holder.bits, 1)
        gone = [chunk for chunk in list(flight.chunks)[:1] if chunk in holder.bits]
        for chunk in gone:
            holder.bits.discard(chunk)
        self._count(gone, -1)
        return self.failed(number, "it does not have what it said it had", now)

    def failed(self, number: int, why: str, now: float, *, pause: float = 0.0, lasting: bool = False) -> list[Cancel]:
        """Request ``number`` ended early. The peer is given up after several in a row; if ``lasting``, at once."""
        holder = self._asks.get(number)
        if holder is None:
            return []
        self._land(number)
        holder.strikes += 1
        if lasting or holder.strikes >= defaults.MAX_STRIKES:
            return self.drop(holder.peer, why)
        holder.ready = now + max(pause, defaults.FIRST_PAUSE * 2 ** (holder.strikes - 1))
        return []

    def ended(self, number: int) -> None:
        """Request ``number`` ended as it should, or because we broke it off."""
        if number in self._asks:
            self._land(number)

    def _land(self, number: int) -> None:
        """A request is over: what it did not bring is open again, unless another one brings it."""
        holder = self._asks.pop(number)
        flight = holder.flights.pop(number)
        for chunk in flight.chunks:
            flights = self._flying[chunk]
            flights.remove(number)
            if not flights:
                del self._flying[chunk]
                self._open_again(chunk)
        if not holder.flights:
            holder.stalled = False

    def _open_again(self, chunk: int) -> None:
        if chunk not in self._left:
            return
        flights = self._flying.get(chunk, ())
        if any(not self._asks[number].stalled for number in flights):
            return
        self._open.setdefault(self._level.get(chunk, 0), {})[chunk] = None
        for holder in self.holders.values():
            holder.dry = False

    def check(self) -> None:
        """What always holds, for tests. Raises :class:`ProtocolMisuse`."""
        opened = {chunk for chunks in self._open.values() for chunk in chunks}
        if not opened <= set(self._left) or not set(self._flying) <= set(self._left):
            raise ProtocolMisuse("a chunk that is done is open or flying")
        if set(self._left) - opened - set(self._flying):
            raise ProtocolMisuse("a chunk that is wanted is neither open nor flying")
        for chunk, numbers in self._flying.items():
            if any(chunk not in self._asks[number].flights[number].chunks for number in numbers):
                raise ProtocolMisuse("a request that does not know its chunk")
            if chunk in opened and any(not self._asks[number].stalled for number in numbers):
                raise ProtocolMisuse("a chunk is open although somebody brings it")
