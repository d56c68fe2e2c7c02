"""Starts the engine of a WebRTC connection as a child process: a socket pair for bytes, pipes for messages."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys

import trio

from . import deadlines, defaults
from .errors import DecodeError, LocalError, Overloaded
from .webrtc import EngineGone, EngineProcess, WebRtcEngine
from .webrtc_signal import Close, Ended, Failed, FromEngine, Local, Opened, Remote, Setup, ToEngine
from .wire import pack, unpack


class ChildProcess(EngineProcess):
    """One running engine. It ends when its stdin closes, so never later than this process."""

    def __init__(self, process: trio.Process, data: trio.SocketStream, owner: ChildEngine) -> None:
        self.data = data
        self.pid = process.pid
        self._process = process
        self._owner = owner
        self._buffer = bytearray()
        self._opened = False
        self._gone = False

    async def send(self, message: Setup | Remote | Close) -> None:
        data = pack(ToEngine(message))
        try:
            assert self._process.stdin is not None
            await self._process.stdin.send_all(len(data).to_bytes(4, "big") + data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise EngineGone(self._epitaph()) from None

    async def receive(self) -> Local | Opened | Ended | Failed:
        """The next message. Cancellation loses none. Raises :class:`EngineGone` when there will be no more."""
        assert self._process.stdout is not None
        while True:
            if len(self._buffer) >= 4:
                size = int.from_bytes(self._buffer[:4], "big")
                if size > defaults.MAX_WEBRTC_MESSAGE:
                    raise EngineGone("the WebRTC engine speaks nonsense")
                if len(self._buffer) >= 4 + size:
                    data = bytes(self._buffer[4 : 4 + size])
                    del self._buffer[: 4 + size]
                    try:
                        message = unpack(FromEngine, data, limit=defaults.MAX_WEBRTC_MESSAGE).message
                    except DecodeError as error:
                        raise EngineGone(f"the WebRTC engine speaks nonsense: {error}") from None
                    self._opened |= isinstance(message, Opened)
                    return message
            try:
                more = await self._process.stdout.receive_some(defaults.MAX_WEBRTC_MESSAGE)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                more = b""
            if not more:
                with trio.move_on_after(deadlines.webrtc_abort()):
                    await self._process.wait()  # its pipe closes a moment before it is dead
                raise EngineGone(self._epitaph())
            self._buffer += more

    def allow_unsent(self, size: int) -> None:
        with contextlib.suppress(OSError, trio.ClosedResourceError):  # at its end, other calls say so
            self.data.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)

    def _epitaph(self) -> str:
        code = self._process.poll()
        if code is not None and code < 0:
            return f"the WebRTC engine was killed ({signal.Signals(-code).name})"
        return "the WebRTC engine died" if code is None else f"the WebRTC engine died (exit status {code})"

    async def aclose(self) -> None:
        try:
            with trio.move_on_after(deadlines.webrtc_close()):
                try:
                    await self.send(Close(True))
                    await self._process.wait()
                except EngineGone:
                    pass
        finally:
            with trio.CancelScope(shield=True):  # bounded: the kernel ends what is killed
                await self.kill()

    async def kill(self) -> None:
        if self._gone:
            return
        self._gone = True
        self._owner.running -= 1
        with trio.CancelScope(shield=True):  # bounded, as above
            if self._opened and self._process.stdin is not None:
                # The end of its stdin is enough, and lets it tell the far side, which would learn by silence.
                await trio.aclose_forcefully(self._process.stdin)
                with trio.move_on_after(deadlines.webrtc_abort()):
                    await self._process.wait()
            if self._process.poll() is None:
                self._process.kill()
            await self._process.wait()
            for pipe in (self.data, self._process.stdin, self._process.stdout):
                if pipe is not None:
                    await trio.aclose_forcefully(pipe)


class ChildEngine(WebRtcEngine):
    """Child processes of this machine, at most ``limit`` at once."""

    def __init__(self, limit: int = defaults.MAX_WEBRTC) -> None:
        self.limit = limit
        self.running = 0

    def available(self) -> tuple[bool, str]:
        if os.name == "nt":
            return False, "WebRTC needs a socket pair that a child process inherits; Windows has none"
        if importlib.util.find_spec("aiortc") is None:
            return False, "aiortc is not installed (pip install aiortc)"
        return True, "aiortc is installed"

    def interpreter(self) -> list[str]:
        """What runs Python: the NAT lab's runs it on another host."""
        return [sys.executable]

    async def launch(self) -> ChildProcess:
        usable, reason = self.available()
        if not usable:
            raise LocalError(reason)
        if self.running >= self.limit:
            raise Overloaded(f"{self.running} WebRTC connections, at most {self.limit} at once")
        self.running += 1
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                process = await trio.lowlevel.open_process(
                    [*self.interpreter(), "-m", "shoal.transport.webrtc_child", str(theirs.fileno())],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                    # Ctrl-C is for us; we end it.
                    start_new_session=True,
                )
        except BaseException:
            ours.close()
            self.running -= 1
            raise
        ours.setblocking(False)
        return ChildProcess(process, trio.SocketStream(trio.socket.from_stdlib_socket(ours)), self)
