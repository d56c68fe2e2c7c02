"""One direction of a connection in the memory network: routes, lines, queues of pieces, and what faults do to them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

import attrs
import trio

#: Bytes of one segment: what Ethernet leaves of 1500. Only the loss model knows segments.
SEGMENT = 1460
#: Seconds: TCP's least retransmission timeout on Linux, and its greatest.
RETRANSMIT_MIN, RETRANSMIT_MAX = 0.2, 120.0


@attrs.frozen
class Route:
    """One direction between two machines: seconds, bytes per second, bytes."""

    latency: float = 0.0
    bandwidth: float = math.inf
    loss: float = 0.0  #: probability of losing one segment
    jitter: float = 0.0  #: up to this many seconds on top of the latency, uniform; never reorders
    window: int = 4 << 20  #: bytes on their way or unread; Linux tunes itself up to about this
    buffer: int = 64 << 10  #: bytes not on the line yet which a sender need not wait for

    @property
    def rate(self) -> float:
        """Bytes per second that one connection reaches: the bandwidth, or less under loss (Mathis et al. 1997)."""
        if self.loss <= 0 or self.latency <= 0:
            return self.bandwidth
        return min(self.bandwidth, 1.22 * SEGMENT / (2 * self.latency * math.sqrt(self.loss)))

    @property
    def timeout(self) -> float:
        """Seconds until TCP first repeats what was not acknowledged."""
        return RETRANSMIT_MIN + 2 * self.latency

    def retransmission(self, size: int, draw: Callable[[], float]) -> float:
        """Seconds that a piece of ``size`` bytes is late for lost segments; ``draw`` gives uniform numbers."""
        if self.loss <= 0:
            return 0.0
        segments = max(1, -(-size // SEGMENT))
        late, wait = 0.0, self.timeout
        if draw() < 1 - (1 - self.loss) ** segments:
            # with enough segments behind it a loss is noticed after a round trip, otherwise by the timer
            late += 2 * self.latency if segments > 4 else wait
            while draw() < self.loss and wait < RETRANSMIT_MAX:
                wait *= 2
                late += wait
        return late


def retry_time(began: float, timeout: float, now: float) -> float:
    """When TCP, unanswered since ``began``, next sends again, at or after ``now``: doubling pauses, 120 s at most."""
    at = began
    while at < now:
        at += timeout
        timeout = min(2 * timeout, RETRANSMIT_MAX)
    return at


class Sleeper:
    """At most one task that sleeps until a time or until woken, whichever is first."""

    __slots__ = ("_scope", "_task")

    def __init__(self) -> None:
        self._task: trio.lowlevel.Task | None = None
        self._scope: trio.CancelScope | None = None

    def wake_at(self, time: float) -> None:
        """Let the sleeper, if there is one, wake up then at the latest, without waking it before."""
        if self._scope is not None and time < self._scope.deadline:
            self._scope.deadline = time

    def wake(self) -> None:
        if self._task is not None:
            task, self._task = self._task, None
            trio.lowlevel.reschedule(task)

    async def sleep(self, until: float = math.inf) -> None:
        with trio.CancelScope(deadline=until) as self._scope:
            try:
                await self._park()
            finally:
                self._scope = None

    async def _park(self) -> None:
        def abort(_: object) -> trio.lowlevel.Abort:
            self._task = None
            return trio.lowlevel.Abort.SUCCEEDED

        self._task = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(abort)


class Machine:
    """What outlives a process: the uplink (bytes per second) and its queue."""

    __slots__ = ("busy_until", "name", "uplink")

    def __init__(self, name: str) -> None:
        self.name = name
        self.uplink = math.inf
        self.busy_until = -math.inf


class Lane:
    """One direction between two machines: its route, its queue for the line, its count of bytes."""

    __slots__ = ("busy_until", "route", "sent", "source", "target")

    def __init__(self, source: Machine, target: Machine, route: Route) -> None:
        self.source, self.target, self.route = source, target, route
        self.busy_until = -math.inf
        self.sent = 0

    @property
    def rate(self) -> float:
        """Bytes per second when nobody else uses line and uplink."""
        return min(self.route.rate, self.source.uplink)

    def transmit(self, now: float, size: int) -> float:
        """Queue ``size`` bytes; returns when the last of them has left the near end.

        Uplink and line work at the same time (cut-through), so a big piece is not delayed twice.
        """
        begin = now
        if self.source.uplink < math.inf:
            begin = max(now, self.source.busy_until)
            self.source.busy_until = begin + size / self.source.uplink
        self.busy_until = max(begin, self.busy_until) + size / self.route.rate
        return max(self.busy_until, begin + size / self.source.uplink)


class World(Protocol):
    """What a flow needs of the world around it."""

    def draw(self) -> float: ...

    def separated(self, source: str, target: str) -> bool: ...

    def note(self, what: str, lane: Lane, size: int) -> None: ...


class Mark:
    """What can stand in a flow beside bytes."""

    def __init__(self, name: str) -> None:
        self.name = name


EOF: Final = Mark("eof")
RESET: Final = Mark("reset")


class Piece:
    __slots__ = ("arrival", "data", "size")

    def __init__(self, arrival: float, data: bytes | memoryview | Mark, size: int) -> None:
        self.arrival, self.data, self.size = arrival, data, size


class Flow:
    """The bytes of one stream in one direction, from the send call to the receive call."""

    __slots__ = (
        "closed", "drained_at", "eof", "lane", "last_arrival", "outstanding", "pieces", "reader", "reset", "retry_from",
        "reverse", "stalled", "stalled_bytes", "world", "writer",
    )  # fmt: skip

    reverse: Flow

    def __init__(self, world: World, lane: Lane) -> None:
        self.world, self.lane = world, lane
        self.pieces: deque[Piece] = deque()
        self.outstanding = 0  # bytes on their way or unread
        self.drained_at = -math.inf  # when the last byte leaves the near end
        self.last_arrival = -math.inf
        self.closed = False  # the reading end is closed: bytes that arrive are answered with a reset
        self.eof = False  # the writing end will send no more
        self.reset: Piece | None = None
        self.reader, self.writer = Sleeper(), Sleeper()
        self.stalled = world.separated(lane.source.name, lane.target.name)
        self.stalled_bytes = 0
        self.retry_from = math.inf  # since when something is unacknowledged

    # the writing end

    def push(self, data: bytes | memoryview | Mark, size: int, *, earliest: float = -math.inf) -> None:
        """Send one piece, not before ``earliest`` (a reset may answer bytes that are still on their way)."""
        now = trio.current_time()
        self.world.note(data.name if isinstance(data, Mark) else "send", self.lane, size)
        self.lane.sent += size
        self.outstanding += size
        piece = Piece(math.inf, data, size)
        if self.stalled:
            self.stalled_bytes += size
            self.retry_from = min(self.retry_from, now)
        else:
            # Marks take no time on the line, and must not reserve it for later: that would hold up other streams.
            self.drained_at = self.lane.transmit(now, size) if size else max(now, earliest, self.drained_at)
            self._arrive(piece)
        if data is RESET:
            self.reset = piece
            self.reverse.writer.wake()  # whoever sends the other way learns of it at its arrival
        self.pieces.append(piece)
        if self.closed:
            self._bounce()
        elif len(self.pieces) == 1:
            self.reader.wake_at(piece.arrival)

    def _arrive(self, piece: Piece) -> None:
        """Set when a piece arrives that leaves the near end at ``drained_at``."""
        route = self.lane.route
        late = route.retransmission(piece.size, self.world.draw)
        if route.jitter:
            late += route.jitter * self.world.draw()
        piece.arrival = self.last_arrival = max(self.drained_at + route.latency + late, self.last_arrival)

    def ready_at(self) -> float:
        """Until when the writer has to wait, as far as is known now: infinity if only an event can tell."""
        if self.outstanding > self.lane.route.window or self.stalled_bytes > self.lane.route.buffer:
            ready = math.inf
        else:
            ready = self.drained_at - self.lane.route.buffer / self.lane.rate
        return min(ready, math.inf if self.reverse.reset is None else self.reverse.reset.arrival)

    def broken(self) -> bool:
        """Whether a reset from the far end has arrived where this flow is written."""
        reset = self.reverse.reset
        return reset is not None and reset.arrival <= trio.current_time()

    # the reading end

    def ready(self) -> Piece | None:
        """The first piece if it has arrived."""
        return self.pieces[0] if self.pieces and self.pieces[0].arrival <= trio.current_time() else None

    def take(self, piece: Piece, most: int | None) -> bytes:
        """Read up to ``most`` bytes of the first piece, which must be data."""
        data = piece.data
        assert not isinstance(data, Mark)
        if most is None or most >= len(data):
            self.pieces.popleft()
        else:
            data, piece.data = data[:most], memoryview(data)[most:]
        self.outstanding -= len(data)
        if self.outstanding <= self.lane.route.window:
            self.writer.wake()
        self.world.note("receive", self.lane, len(data))
        if isinstance(data, memoryview):
            whole = data.obj
            data = whole if isinstance(whole, bytes) and len(whole) == len(data) else data.tobytes()
        return data

    def close_reader(self) -> None:
        """Nobody will read any more. Bytes unread and bytes to come are answered with a reset."""
        self.closed = True
        self._bounce()

    def _bounce(self) -> None:
        """Drop what arrives at the closed end; bytes among it are answered with a reset once they are there."""
        arrival = min((piece.arrival for piece in self.pieces if piece.size), default=math.inf)
        if arrival < math.inf:
            self.reverse.push_reset(arrival)
        if not self.stalled:
            self.pieces.clear()  # they stay counted as outstanding: their writer waits for the reset

    def push_reset(self, earliest: float) -> None:
        if self.reset is None and not self.closed:
            self.push(RESET, 0, earliest=earliest)

    # the network between

    def stall(self) -> None:
        """What is on its way is lost for now."""
        now = trio.current_time()
        self.stalled = True
        for piece in self.pieces:
            if piece.arrival > now:
                piece.arrival = math.inf
                self.stalled_bytes += piece.size
                self.retry_from = now

    def resume(self) -> None:
        """What was lost is sent again when the timer next fires."""
        now = trio.current_time()
        self.stalled, self.stalled_bytes = False, 0
        if self.retry_from < math.inf:
            self.drained_at = retry_time(self.retry_from, self.lane.route.timeout, now)
            self.retry_from = math.inf
            for piece in self.pieces:
                if piece.arrival == math.inf:
                    self.drained_at += piece.size / self.lane.rate
                    self._arrive(piece)
        if self.closed:
            self._bounce()
        self.wake()

    def wake(self) -> None:
        self.reader.wake()
        self.writer.wake()
        self.reverse.writer.wake()
