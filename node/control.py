"""What a running node tells other processes of the same user, over a local socket: strict msgpack messages.

A connection carries one request and its answer (for :class:`Watch`: a stream of frames until the node ends). A frame is
4 bytes of length and a packed :class:`Envelope`. The client half needs neither torch nor trio: it answers at once.
"""

from __future__ import annotations

import math
import struct
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import attrs

from ..learning.events import Checkpoint, Event, RoundReport, RunStatus, Standing
from ..transport.errors import ConfigError, DecodeError, LocalError, ShoalError
from ..transport.wire import pack, unpack
from . import defaults, doc_messages, local_socket
from .datadir import DataDir
from .dht_messages import DHT_MESSAGES, DHT_REQUESTS

if TYPE_CHECKING:
    import trio

M = TypeVar("M")


# --- requests ---------------------------------------------------------------------------------------------------------


@attrs.frozen
class GetStatus:
    """Answered by :class:`NodeStatus`."""


@attrs.frozen
class GetPeers:
    """Answered by :class:`PeerList`."""


@attrs.frozen
class GetHealth:
    """Answered by :class:`NodeHealth`."""


@attrs.frozen
class Stop:
    """Say goodbye, save, end. Answered by :class:`Done` before the node ends."""


@attrs.frozen
class Export:
    """Write the run's present weights to ``path`` (absolute) as safetensors. Answered by :class:`Done`."""

    path: str


@attrs.frozen
class GetCheckpoints:
    """Answered by :class:`CheckpointList`."""


@attrs.frozen
class RestoreCheckpoint:
    """Write the checkpoint ``ref`` (a round, the beginning of a digest) to ``path`` (absolute). Answered by
    :class:`Done`, when it is there: one that is not here is fetched from other members."""

    ref: str
    path: str


@attrs.frozen
class PinCheckpoint:
    """Keep the checkpoint ``ref`` for ever, or no more. Answered by :class:`Done`."""

    ref: str
    pinned: bool


@attrs.frozen
class Watch:
    """Answered by :class:`EventFrame`, :class:`RoundFrame` …, from the node's start; at its end :class:`Ended`."""


# --- answers ----------------------------------------------------------------------------------------------------------


@attrs.frozen
class NodeStatus:
    """The moment. ``reach``: who can connect to this node, a sentence. ``t``: seconds since the node started.

    ``role``: ``peer`` or ``relay``. ``private``: whether the ticket is a secret. ``notes``: further lines for people.
    """

    pid: int
    data_dir: str
    peer: str
    ticket: str
    t: float
    addresses: tuple[str, ...]
    reach: str
    links: int
    bytes_sent: int
    bytes_received: int
    rounds: int
    run: RunStatus | None
    role: str = "peer"
    private: bool = False
    notes: tuple[tuple[str, str], ...] = ()


@attrs.frozen
class NodeHealth:
    """What a node has found out about its own place on the network.

    ``state``: reachable, unreachable, unknown or off; ``reason`` with the evidence. Addresses as text.

    ``external``: under which others see it and which are not its own. ``confirmed``: at which strangers reached it.
    ``relays``: where it has a place; ``candidates``: peers known to relay. ``ways``: of its links, by name.
    """

    state: str
    reason: str
    external: tuple[str, ...]
    confirmed: tuple[str, ...]
    relays: tuple[str, ...]
    candidates: tuple[str, ...]
    ways: tuple[str, ...]
    port_mapping: str
    mapped: str


@attrs.frozen
class PeerInfo:
    """One live link. ``direction``: ``out`` when we dialled. ``rtt_ms``: smoothed. ``member``: in our round.

    ``way``: how the peer is reached (direct, reversal, punch, webrtc, relay), ``reason``: why so.
    """

    peer: str
    address: str
    direction: str
    cipher: str
    rtt_ms: float
    bytes_sent: int
    bytes_received: int
    member: bool
    way: str = "direct"
    reason: str = ""


@attrs.frozen
class PeerList:
    """``peers``: live links. ``standings``: of all peers of the run, with a link or not, the one seen last first."""

    peers: tuple[PeerInfo, ...]
    standings: tuple[Standing, ...] = ()
    trial: tuple[tuple[str, int], ...] = ()  # see RunStatus


@attrs.frozen
class CheckpointList:
    checkpoints: tuple[Checkpoint, ...]


@attrs.frozen
class Done:
    """It is done. ``detail``: a sentence for people."""

    detail: str = ""


@attrs.frozen
class Refused:
    """It was not done. ``reason``: a sentence for people."""

    reason: str


@attrs.frozen
class EventFrame:
    event: Event


@attrs.frozen
class RoundFrame:
    """``samples``: this peer's own in the round. Bytes: on all links since the node started."""

    report: RoundReport
    samples: int
    bytes_sent: int
    bytes_received: int


@attrs.frozen
class Ended:
    """The node's last word. ``outcome``: finished, left or failed; ``reason`` says why."""

    outcome: str
    reason: str
    status: NodeStatus


REQUESTS = (
    GetStatus, GetPeers, GetHealth, Stop, Export, GetCheckpoints, RestoreCheckpoint, PinCheckpoint, Watch,
    *DHT_REQUESTS, *doc_messages.REQUESTS,
)  # fmt: skip
MESSAGES: dict[str, type[Any]] = {
    kind.__name__: kind
    for kind in (
        *REQUESTS, NodeStatus, NodeHealth, PeerList, CheckpointList, Done, Refused, EventFrame, RoundFrame, Ended,
        *DHT_MESSAGES, *doc_messages.MESSAGES,
    )
}  # fmt: skip


@attrs.frozen
class Envelope:
    kind: str
    body: bytes


_HEADER = struct.Struct(">I")


def encode(message: Any) -> bytes:
    body = pack(Envelope(type(message).__name__, pack(message)))
    return _HEADER.pack(len(body)) + body


class Framer:
    """Bytes in, messages out. Raises :class:`DecodeError` on a frame that is too long or does not decode."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Any]:
        self._buffer += data
        while len(self._buffer) >= _HEADER.size:
            (length,) = _HEADER.unpack_from(self._buffer)
            if length > defaults.MAX_CONTROL_MESSAGE:
                raise DecodeError(f"control message of {length} bytes, at most {defaults.MAX_CONTROL_MESSAGE} allowed")
            if len(self._buffer) < _HEADER.size + length:
                return
            frame = bytes(self._buffer[_HEADER.size : _HEADER.size + length])
            del self._buffer[: _HEADER.size + length]
            envelope = unpack(Envelope, frame, limit=defaults.MAX_CONTROL_MESSAGE)
            kind = MESSAGES.get(envelope.kind)
            if kind is None:
                raise DecodeError(f"unknown control message {envelope.kind!r}")
            yield unpack(kind, envelope.body, limit=defaults.MAX_CONTROL_MESSAGE)


def finite(value: float | None) -> float | None:
    """None for what no message may carry: NaN and the infinities."""
    return value if value is not None and math.isfinite(value) else None


# --- client -----------------------------------------------------------------------------------------------------------


class ControlClient:
    """Talks to the node of one data directory. Every method raises :class:`ConfigError` when none is running."""

    def __init__(self, data: DataDir, *, timeout: float = defaults.CONTROL_TIMEOUT) -> None:
        self.data = data
        self._timeout = timeout

    def status(self) -> NodeStatus:
        return self._ask(GetStatus(), NodeStatus)

    def peers(self) -> PeerList:
        return self._ask(GetPeers(), PeerList)

    def health(self) -> NodeHealth:
        return self._ask(GetHealth(), NodeHealth)

    def stop(self) -> Done:
        return self._ask(Stop(), Done)

    def export(self, path: str) -> Done:
        return self._ask(Export(path), Done)

    def ask(self, request: Any, kind: type[M]) -> M:
        """The answer to any request, when it is of ``kind``."""
        return self._ask(request, kind)

    def checkpoints(self) -> tuple[Checkpoint, ...]:
        return self._ask(GetCheckpoints(), CheckpointList).checkpoints

    def restore_checkpoint(self, ref: str, path: str) -> Done:
        return self._ask(RestoreCheckpoint(ref, path), Done)

    def pin_checkpoint(self, ref: str, pinned: bool) -> Done:
        return self._ask(PinCheckpoint(ref, pinned), Done)

    def locator(self) -> str:
        try:
            return self.data.control_path.read_text().strip()
        except OSError:
            raise self.not_running() from None

    def not_running(self) -> ConfigError:
        return ConfigError(
            f"no node is running here (data directory {self.data.path}); start one with `shoal start TASK` or "
            "`shoal join TICKET`, or name another directory with --data-dir"
        )

    def _ask(self, request: Any, kind: type[M]) -> M:
        framer = Framer()
        try:
            with local_socket.connect(self.locator(), self._timeout) as raw:
                raw.sendall(encode(request))
                while data := raw.recv(65536):
                    for answer in framer.feed(data):
                        return self._accept(answer, kind)
        except TimeoutError:
            raise ConfigError(
                f"the node (pid {self.data.holder() or 'unknown'}, data directory {self.data.path}) did not answer "
                f"within {self._timeout:g} s; it may be suspended or out of memory: look at its terminal or log"
            ) from None
        except (FileNotFoundError, ConnectionRefusedError):
            raise self.not_running() from None
        except ConnectionError:
            pass
        raise ConfigError(f"the node in {self.data.path} ended before it answered")

    @staticmethod
    def _accept(answer: Any, kind: type[M]) -> M:
        if isinstance(answer, Refused):
            raise ConfigError(answer.reason)
        if not isinstance(answer, kind):
            raise DecodeError(f"the node answered with {type(answer).__name__} instead of {kind.__name__}")
        return answer


# --- server -----------------------------------------------------------------------------------------------------------


class EventLog:
    """The frames a watcher sees, from the node's start: bounded, one copy for all watchers.

    A watcher that falls more than :data:`defaults.EVENT_BUFFER` frames behind loses the oldest ones.
    """

    def __init__(self) -> None:
        import trio

        self._frames: deque[bytes] = deque(maxlen=defaults.EVENT_BUFFER)
        self._count = 0
        self._more = trio.Event()
        self._closed = False
        self._watchers = 0
        self._unwatched = trio.Event()

    def append(self, message: EventFrame | RoundFrame | Ended) -> None:
        import trio

        self._frames.append(encode(message))
        self._count += 1
        self._closed = isinstance(message, Ended)
        self._more.set()
        self._more = trio.Event()

    async def follow(self, send: Callable[[bytes], Awaitable[None]]) -> None:
        """Send every frame, old and new; returns after :class:`Ended`."""
        at = 0
        self._watchers += 1
        try:
            while True:
                oldest = self._count - len(self._frames)
                at = max(at, oldest)
                pending = b"".join(self._frames[i - oldest] for i in range(at, self._count))
                if pending:
                    at = self._count
                    await send(pending)
                elif self._closed:
                    return
                else:
                    await self._more.wait()
        finally:
            self._watchers -= 1
            self._unwatched.set()

    async def drained(self) -> None:
        """Return once every watcher has got :class:`Ended` or went away. The caller bounds the wait."""
        import trio

        while self._watchers:
            self._unwatched = trio.Event()
            await self._unwatched.wait()


class ControlServer:
    """Serves one node's control socket.

    ``answer`` gets every request but :class:`Watch` and returns the answer; a :class:`ShoalError` it raises
    travels as :class:`Refused`.
    """

    def __init__(self, data: DataDir, answer: Callable[[Any], Awaitable[Any]], events: EventLog) -> None:
        self._data = data
        self._answer = answer
        self._events = events
        self._connections = 0

    async def run(self, *, task_status: trio.TaskStatus[None] | None = None) -> None:
        """Serve until cancelled; then the socket is removed. Raises :class:`ConfigError` when it cannot be made."""
        import trio

        locator = local_socket.locator_for(self._data.path)
        listener = local_socket.listen(locator)
        try:
            self._data.control_path.write_text(locator + "\n")
            if task_status is not None:
                task_status.started()
            await trio.serve_listeners(self._serve, [listener])
        finally:
            self._data.control_path.unlink(missing_ok=True)
            local_socket.remove(locator)

    async def _serve(self, stream: trio.SocketStream) -> None:
        import trio

        if self._connections >= defaults.MAX_CONTROL_CONNECTIONS:
            await stream.aclose()
            return
        self._connections += 1
        framer = Framer()
        try:
            async with stream:
                with trio.fail_after(defaults.CONTROL_TIMEOUT):
                    request = await self._receive(stream, framer)
                if isinstance(request, Watch):
                    await self._events.follow(stream.send_all)
                elif request is not None:
                    await stream.send_all(encode(await self._reply(request)))
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError, DecodeError):
            # The other process went away or speaks something else: its connection, not our concern.
            pass
        finally:
            self._connections -= 1

    async def _receive(self, stream: trio.SocketStream, framer: Framer) -> Any:
        while data := await stream.receive_some(65536):
            for message in framer.feed(bytes(data)):
                if not isinstance(message, REQUESTS):
                    raise DecodeError(f"{type(message).__name__} is not a request")
                return message
        return None

    async def _reply(self, request: Any) -> Any:
        try:
            return await self._answer(request)
        except LocalError as error:
            return Refused(str(error))
        except ShoalError as error:
            return Refused(f"{type(error).__name__}: {error}")


class Watcher:
    """A trio client of :class:`Watch`. Use :meth:`open`; closing it does not disturb the node."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._framer = Framer()
        self._ready: deque[Any] = deque()

    @classmethod
    async def open(cls, data: DataDir) -> Watcher:
        """Raises :class:`ConfigError` when no node is running there."""
        client = ControlClient(data)
        try:
            return cls(await local_socket.open_stream(client.locator(), encode(Watch())))
        except OSError:
            raise client.not_running() from None

    async def receive(self) -> EventFrame | RoundFrame | Ended | None:
        """The next frame; None when the node ended, or was killed, without :class:`Ended`."""
        import trio

        while not self._ready:
            try:
                data = await self._stream.receive_some(65536)
            except trio.BrokenResourceError:
                data = b""
            if not data:
                return None
            self._ready.extend(self._framer.feed(bytes(data)))
        frame = self._ready.popleft()
        if not isinstance(frame, EventFrame | RoundFrame | Ended):
            raise DecodeError(f"the node sent {type(frame).__name__} to a watcher")
        return frame

    async def aclose(self) -> None:
        await self._stream.aclose()
