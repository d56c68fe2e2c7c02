"""The child process of a WebRTC connection: bytes between a socket of its parent and a data channel. Asyncio.

Started by :mod:`shoal.transport.webrtc_process` as ``python -m shoal.transport.webrtc_child FD``: FD is one end of a
socket pair (the bytes), stdin and stdout carry the messages of :mod:`shoal.transport.webrtc_signal`, each after its
length in four bytes. It ends when its stdin does, so it cannot outlive its parent, however that died.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
import sys
from typing import TYPE_CHECKING, Any

from . import deadlines, defaults
from .errors import RemoteProtocolError
from .webrtc_flow import ChannelFlow
from .webrtc_signal import Close, Ended, Failed, FromEngine, Remote, Setup, ToEngine
from .wire import pack, printable, unpack

if TYPE_CHECKING:
    from .webrtc_engine import AiortcEngine


class Parent:
    """The messages from and to the parent."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader

    async def receive(self) -> Setup | Remote | Close | None:
        """The next message; None when the parent is gone or wants us gone at once."""
        try:
            size = int.from_bytes(await self._reader.readexactly(4), "big")
            if size > defaults.MAX_WEBRTC_MESSAGE:
                return None
            data = await self._reader.readexactly(size)
        except asyncio.IncompleteReadError:
            return None
        return unpack(ToEngine, data, limit=defaults.MAX_WEBRTC_MESSAGE).message

    def send(self, message: FromEngine) -> None:
        """Write a message: a handful in a life, of at most 8 KiB, into an empty pipe of 64 KiB."""
        data = pack(message)
        try:
            os.write(1, len(data).to_bytes(4, "big") + data)
        except BrokenPipeError:
            os._exit(0)


class Bridge:
    """Moves bytes between the parent's socket and the channel until both have ended, or the connection is lost."""

    def __init__(self, engine: AiortcEngine, data: socket.socket, parent: Parent) -> None:
        self._engine = engine
        self._channel = engine.channel
        self._data = data
        self._parent = parent
        self._flow = ChannelFlow()
        self._room = asyncio.Event()
        self._incoming: asyncio.Queue[bytes] = asyncio.Queue()  # bounded by the flow's window
        #: The far side has all our bytes.
        self.end_confirmed = asyncio.Event()
        self._broken = False
        self._channel.bufferedAmountLowThreshold = defaults.WEBRTC_BUFFER_LOW
        self._channel.on("bufferedamountlow", self._room.set)
        self._channel.on("message", self._on_message)

    def _on_message(self, message: bytes | str) -> None:
        if self._broken:
            return
        try:
            if isinstance(message, bytes):
                self._flow.received(len(message))
                if message:
                    self._incoming.put_nowait(message)
                return
            event, answer = self._flow.text(message)
        except RemoteProtocolError as error:
            self._broken = True
            self._engine.lose(str(error))
            return
        if answer is not None:
            self._say(answer)
        if event == "end":
            self._incoming.put_nowait(b"")
        elif event == "end received":
            self.end_confirmed.set()
        self._room.set()

    def _say(self, text: str) -> None:
        if self._channel.readyState == "open":
            self._channel.send(text)

    async def _outwards(self) -> None:
        """From the parent into the channel, as far as credit and the channel's queue allow."""
        loop = asyncio.get_running_loop()
        channel, flow = self._channel, self._flow
        while True:
            while flow.credit == 0 or channel.bufferedAmount > defaults.WEBRTC_BUFFER_HIGH:
                self._room.clear()
                await self._room.wait()
            try:
                data = await loop.sock_recv(self._data, min(flow.credit, defaults.WEBRTC_READ))
            except OSError:
                data = b""  # the parent closed with bytes unread: it sends no more either
            if not data or channel.readyState != "open":
                break
            flow.sending(len(data))
            for at in range(0, len(data), defaults.WEBRTC_MESSAGE):
                channel.send(data[at : at + defaults.WEBRTC_MESSAGE])
        end = flow.end()
        if end is not None:
            self._say(end)
        await self.end_confirmed.wait()

    async def _inwards(self) -> None:
        """From the channel to the parent, no faster than it reads."""
        loop = asyncio.get_running_loop()
        ended = False
        while not ended:
            pieces = [await self._incoming.get()]
            while not self._incoming.empty():
                pieces.append(self._incoming.get_nowait())
            ended = not pieces[-1]
            data = b"".join(pieces)
            # A parent that is closing reads no more: what comes is dropped, until our own bytes have arrived.
            with contextlib.suppress(OSError):
                await loop.sock_sendall(self._data, data)
            credit = self._flow.consumed(len(data))
            if credit is not None:
                self._say(credit)
        self._parent.send(FromEngine(Ended(True)))
        with contextlib.suppress(OSError):
            self._data.shutdown(socket.SHUT_WR)

    async def run(self) -> None:
        """Until both directions have ended. Raises :class:`ConnectionError` for a connection that is lost before."""
        outwards = asyncio.ensure_future(self._outwards())
        inwards = asyncio.ensure_future(self._inwards())
        lost = asyncio.ensure_future(self._engine.lost.wait())
        both = asyncio.ensure_future(_all(outwards, inwards))
        try:
            await _first(both, lost)
            if both.done():
                both.result()
                return
            if self._flow.end_received and not self._broken:
                # All its bytes are here, and it was free to go if it has all of ours.
                await inwards
                if self.end_confirmed.is_set():
                    return
            raise ConnectionError(self._engine.lost_reason)
        finally:
            for task in (both, lost):
                task.cancel()


async def _all(*tasks: asyncio.Future[None]) -> None:
    await asyncio.gather(*tasks)


async def _first(*tasks: asyncio.Future[Any], timeout: float | None = None) -> None:
    await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)


class Connection:
    """One connection, from Setup to its end."""

    def __init__(self, parent: Parent, data: socket.socket) -> None:
        self._parent = parent
        self._data = data
        self._remotes: asyncio.Queue[Remote] = asyncio.Queue(1)
        self._closed = asyncio.Event()
        self._engine: AiortcEngine | None = None
        self._bridge: Bridge | None = None

    async def _listen(self) -> None:
        """Take the parent's messages, until it is gone."""
        while message := await self._parent.receive():
            match message:
                case Remote():
                    await self._remotes.put(message)
                case Close():
                    self._closed.set()

    async def _work(self, setup: Setup) -> None:
        try:
            from .webrtc_engine import AiortcEngine, ConnectFailed
        except ImportError as error:
            self._parent.send(FromEngine(Failed(f"aiortc cannot be loaded: {printable(str(error))}")))
            return
        _limit_memory()
        self._engine = AiortcEngine(setup)
        try:
            self._parent.send(FromEngine(await self._engine.gather()))
            remote = setup.remote or (await self._remotes.get()).description
            self._parent.send(FromEngine(await self._engine.connect(remote)))
        except ConnectFailed as error:
            self._parent.send(FromEngine(error.failed))
            return
        self._bridge = Bridge(self._engine, self._data, self._parent)
        try:
            await self._bridge.run()
        except ConnectionError as error:
            self._parent.send(FromEngine(Failed(str(error))))

    async def run(self, setup: Setup) -> None:
        """Serve the connection; returns when it is over or was closed and has said all it had to say."""
        listening = asyncio.ensure_future(self._listen())
        working = asyncio.ensure_future(self._work(setup))
        closed = asyncio.ensure_future(self._closed.wait())
        await _first(working, closed, listening)
        if not working.done() and not listening.done() and self._bridge is not None:
            arrived = asyncio.ensure_future(self._bridge.end_confirmed.wait())
            await _first(working, arrived, listening, timeout=deadlines.webrtc_close() / 2)
        if self._engine is not None:
            # Without a parent only the far side is told: it would learn by silence, half a minute later.
            closing = asyncio.ensure_future(self._engine.aclose(flush=not listening.done()))
            await asyncio.wait([closing], timeout=deadlines.webrtc_close() / 4)
        for task in (listening, working):
            if task.done():
                task.result()


def _limit_memory() -> None:
    """A far side that fills our memory ends this process, and no other."""
    if sys.platform != "linux":
        return  # no other system that we know counts address space
    with open("/proc/self/statm", encoding="ascii") as sizes:
        used = int(sizes.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + defaults.WEBRTC_MEMORY, resource.RLIM_INFINITY))


async def serve(data: socket.socket) -> None:
    """Read Setup from stdin and serve the connection it asks for."""
    reader = asyncio.StreamReader(limit=4 * defaults.MAX_WEBRTC_MESSAGE)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin.buffer)
    parent = Parent(reader)
    setup = await parent.receive()
    if not isinstance(setup, Setup):
        return
    try:
        await Connection(parent, data).run(setup)
    except Exception as error:  # noqa: BLE001  # boundary: whatever breaks becomes the reason of the parent's one error
        parent.send(FromEngine(Failed(f"the engine broke: {type(error).__name__}: {printable(str(error))}")))


if __name__ == "__main__":
    end = socket.socket(fileno=int(sys.argv[1]))
    end.setblocking(False)
    asyncio.run(serve(end))
    # Nothing is left to be saved, and the interpreter's own goodbye takes longer than ours.
    os._exit(0)
