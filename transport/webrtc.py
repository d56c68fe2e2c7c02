"""The WebRTC way to a peer: a byte stream over a data channel, signalled through a common peer.

One side calls :func:`offer`, the other's :class:`WebRtcAnswerer` answers; the exchange is one message and its answer.
The protocols run in an engine (:class:`WebRtcEngine`; a child process on real hosts, none in virtual time), because
they are written in Python and would starve the loop. The stream is as trustworthy as a TCP connection: who is at its
other end, the Noise handshake inside tells.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable

import trio

from . import deadlines, defaults
from .errors import LocalError, Overloaded, PeerUnreachable, RemoteError, RemoteRefused, WaitExpired
from .host import Host
from .network import ByteStream
from .webrtc_signal import (
    Close,
    Description,
    Ended,
    Failed,
    IceServers,
    Local,
    Opened,
    Remote,
    Setup,
)
from .wire import pack, unpack

log = logging.getLogger(__name__)

#: The kind of the one message and its answer.
KIND = "webrtc"

#: Sends a message of a kind through a common peer and returns its answer. Raises :class:`RemoteError`.
Ask = Callable[[str, bytes], Awaitable[bytes]]


class EngineGone(RemoteError):
    """The engine of a connection ended without saying why; the text says how."""


class EngineProcess(ABC):
    """One engine, of one connection. ``data``: the connection's bytes; ``pid``: of its process, for people."""

    data: trio.SocketStream
    pid: int

    @abstractmethod
    async def send(self, message: Setup | Remote | Close) -> None:
        """Raises :class:`EngineGone`."""

    @abstractmethod
    async def receive(self) -> Local | Opened | Ended | Failed:
        """The next message. Cancellation loses none. Raises :class:`EngineGone` when there will be no more."""

    @abstractmethod
    def allow_unsent(self, size: int) -> None:
        """About ``size`` bytes may wait in ``data`` until the engine takes them."""

    @abstractmethod
    async def aclose(self) -> None:
        """Let it deliver what was sent, within ``deadlines.webrtc_close()``, and end it. Cancelled, it kills."""

    @abstractmethod
    async def kill(self) -> None:
        """End it now. Nothing of it is left when this returns, even when cancelled."""


class WebRtcEngine(ABC):
    """What a host offers that has WebRTC: engines to launch."""

    @abstractmethod
    def available(self) -> tuple[bool, str]:
        """Whether one can be launched here, and why (not)."""

    @abstractmethod
    async def launch(self) -> EngineProcess:
        """Start one. Raises :class:`LocalError` where there is none, :class:`Overloaded` above the limit."""


class WebRtcStream(ByteStream):
    """A data channel as a byte stream. ``how``: the kinds of addresses it runs between, for people.

    Its engine's death or the loss of the path is a :class:`trio.BrokenResourceError` that says which, after the bytes
    that had arrived. :meth:`aclose` delivers what was sent, for a second at most; cancelled, it drops it.
    """

    def __init__(self, engine: EngineProcess, opened: Opened) -> None:
        self.remote = opened.theirs
        self.local = opened.ours
        self.how = opened.how
        self.engine = engine
        self._data = engine.data
        self._end: str | None = None
        self._closed = False
        self._asking = trio.Lock()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        try:
            await self._data.send_all(data)
        except trio.BrokenResourceError:
            raise trio.BrokenResourceError(await self._why() or "the far side has closed") from None

    async def wait_send_all_might_not_block(self) -> None:
        try:
            await self._data.wait_send_all_might_not_block()
        except trio.BrokenResourceError:
            raise trio.BrokenResourceError(await self._why() or "the far side has closed") from None

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        try:
            data = bytes(await self._data.receive_some(defaults.READ_SIZE if max_bytes is None else max_bytes))
        except trio.BrokenResourceError:
            data = b""  # the engine ended with bytes of ours unread; what it says tells whether that was an end
        return data or await self._ended()

    async def receive_into(self, buffer: memoryview) -> int:
        try:
            size = await self._data.socket.recv_into(buffer)
        except OSError:
            if self._closed:
                raise trio.ClosedResourceError("this stream was already closed") from None
            size = 0
        return size or len(await self._ended())

    async def _ended(self) -> bytes:
        """No more bytes come: an end that the far side meant, or raises :class:`trio.BrokenResourceError`."""
        reason = await self._why()
        if self._closed:
            raise trio.ClosedResourceError("this stream was already closed")
        if reason:
            raise trio.BrokenResourceError(reason)
        return b""

    async def _why(self) -> str:
        """Why the bytes ended: empty when the far side sent its end. The engine's word comes before its socket ends."""
        async with self._asking:
            if self._end is None:
                try:
                    with trio.fail_after(deadlines.webrtc_close()):
                        message = await self.engine.receive()
                    self._end = f"WebRTC connection lost: {message.reason}" if isinstance(message, Failed) else ""
                except EngineGone as error:
                    self._end = str(error)
                except trio.TooSlowError:
                    return ""
            return self._end

    def allow_unsent(self, size: int) -> None:
        self.engine.allow_unsent(size)

    async def send_eof(self) -> None:
        try:
            await self._data.send_eof()
        except trio.BrokenResourceError:
            raise trio.BrokenResourceError(await self._why() or "the far side has closed") from None

    async def aclose(self) -> None:
        if self._closed:
            await trio.lowlevel.checkpoint()
            return
        self._closed = True
        try:
            await self._data.aclose()
        finally:
            await self.engine.aclose()


async def offer(
    host: Host,
    ask: Ask,
    servers: IceServers,
    *,
    peer: str = "",
    lag: float = 0.0,
    interfaces: tuple[str, ...] = (),
    plain: bool = False,
) -> WebRtcStream:
    """Connect to the peer that ``ask`` reaches.

    ``servers``: who tells us our outside addresses. ``interfaces``: addresses of this machine to use instead of all but
    loopback. Raises :class:`PeerUnreachable` with what was tried, also where this host has no engine or none to spare,
    and what ``ask`` raises. Bounded by ``deadlines.webrtc_setup`` and ``webrtc_connect``. Cancelled, it leaves no
    process behind.
    """
    try:
        running = await _launch(host)
    except LocalError as error:
        raise PeerUnreachable("no WebRTC connection", peer=peer, attempts=(("engine", str(error)),)) from None
    try:
        local = await _gather(running, Setup(interfaces, servers, None, plain), peer, lag)
        try:
            with trio.fail_after(deadlines.webrtc_setup(lag) + deadlines.call(0.0, lag)):
                answer = await ask(KIND, pack(local))
        except trio.TooSlowError:
            seconds = deadlines.webrtc_setup(lag) + deadlines.call(0.0, lag)
            raise WaitExpired("answer to a WebRTC offer", seconds, peer=peer) from None
        remote = _usable(answer, interfaces)
        await running.send(Remote(remote))
        return await _connect(running, peer, lag)
    except BaseException:
        await running.kill()
        raise


class WebRtcAnswerer:
    """Answers offers; every connection that comes up is handed to ``on_stream``.

    ``servers`` is asked for each offer, as public peers come and go. Run :meth:`run` while offers may come.
    """

    def __init__(
        self,
        host: Host,
        on_stream: Callable[[ByteStream], Awaitable[None]],
        servers: Callable[[], IceServers],
        *,
        interfaces: tuple[str, ...] = (),
        plain: bool = False,
    ) -> None:
        self._host = host
        self._on_stream = on_stream
        self._servers = servers
        self._interfaces = interfaces
        self._plain = plain
        self._nursery: trio.Nursery | None = None

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Hold the connections that are coming up. Cancelled, it leaves no process of them behind."""
        try:
            async with trio.open_nursery() as self._nursery:
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._nursery = None

    async def answer(self, body: bytes, *, peer: str = "", lag: float = 0.0) -> bytes:
        """The answer to the offer ``body``; the connection comes up in the background.

        Raises :class:`DecodeError` for an offer that breaks the rules, :class:`RemoteRefused` where there is no engine
        or no room (the asker's to read), :class:`PeerUnreachable` when nothing could be gathered here.
        """
        remote = _usable(body, self._interfaces)
        if self._nursery is None:
            raise RemoteRefused("unavailable", "not running", peer=peer)
        try:
            running = await _launch(self._host)
        except Overloaded as error:
            raise RemoteRefused("busy", str(error), peer=peer) from None
        except LocalError as error:
            raise RemoteRefused("unavailable", str(error), peer=peer) from None
        try:
            local = await _gather(running, Setup(self._interfaces, self._servers(), remote, self._plain), peer, lag)
            if self._nursery is None:
                raise RemoteRefused("unavailable", "stopping", peer=peer)
            self._nursery.start_soon(self._finish, running, peer, lag)
        except BaseException:
            await running.kill()
            raise
        return pack(local)

    async def _finish(self, running: EngineProcess, peer: str, lag: float) -> None:
        try:
            stream = await _connect(running, peer, lag)
        except RemoteError as error:
            log.info("WebRTC connection that was asked for did not come up: %s", error)
            await running.kill()
            return
        except BaseException:
            await running.kill()
            raise
        try:
            await self._on_stream(stream)
        except BaseException:
            await running.kill()
            raise


async def _launch(host: Host) -> EngineProcess:
    if host.webrtc is None:
        raise LocalError("this host has no WebRTC")
    return await host.webrtc.launch()


def _usable(body: bytes, interfaces: tuple[str, ...]) -> Description:
    """A stranger's description. Raises :class:`DecodeError`."""
    description = unpack(Description, body, limit=defaults.MAX_WEBRTC_MESSAGE)
    return description if any(_is_loopback(one) for one in interfaces) else description.without_loopback()


def _is_loopback(host: str) -> bool:
    return host == "::1" or host.startswith("127.")


async def _gather(running: EngineProcess, setup: Setup, peer: str, lag: float) -> Description:
    message = await _await(running, setup, deadlines.webrtc_setup(lag), "start of the WebRTC engine", peer)
    if not isinstance(message, Local):
        raise PeerUnreachable("no WebRTC connection", peer=peer, attempts=(("engine", "said nothing useful"),))
    return message.local


async def _connect(running: EngineProcess, peer: str, lag: float) -> WebRtcStream:
    message = await _await(running, None, deadlines.webrtc_connect(lag), "WebRTC connection", peer)
    if not isinstance(message, Opened):
        raise PeerUnreachable("no WebRTC connection", peer=peer, attempts=(("engine", "said nothing useful"),))
    return WebRtcStream(running, message)


async def _await(
    running: EngineProcess, first: Setup | None, seconds: float, awaited: str, peer: str
) -> Local | Opened | Ended:
    try:
        with trio.fail_after(seconds):
            if first is not None:
                await running.send(first)
            message = await running.receive()
    except trio.TooSlowError:
        raise WaitExpired(awaited, seconds, peer=peer) from None
    except EngineGone as error:
        raise PeerUnreachable("no WebRTC connection", peer=peer, attempts=(("engine", str(error)),)) from None
    if isinstance(message, Failed):
        tried = tuple(("pair", one) for one in message.tried)
        raise PeerUnreachable(f"no WebRTC connection: {message.reason}", peer=peer, attempts=tried)
    return message
