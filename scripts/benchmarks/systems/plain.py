"""Plain TCP of trio: the least that two processes can say to each other.

A connection begins with one letter. ``m``: 8 bytes announce how many bulk messages follow, 8 bytes go back when all
have come. ``c``: calls of ``SMALL`` bytes, each echoed.
"""

from __future__ import annotations

from typing import Any

import trio

from .base import COUNT, MESSAGE, SMALL, Server, TrioClient, check

#: What is read at a time: the size of Shoal's records, so that only the rest differs.
PIECE = 256 << 10


async def exactly(stream: trio.abc.Stream, size: int) -> bytes:
    """The next ``size`` bytes; fewer only at the end."""
    data = await stream.receive_some(size)
    while data and len(data) < size:
        more = await stream.receive_some(size - len(data))
        if not more:
            break
        data = bytes(data) + bytes(more)
    return bytes(data)


class TcpServer(Server):
    async def listen(self) -> dict[str, Any]:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.nursery.start_soon(trio.serve_listeners, self._serve, listeners)
        return {"port": listeners[0].socket.getsockname()[1]}

    async def _serve(self, raw: trio.SocketStream) -> None:
        stream = self.wrap(raw)
        try:
            match await exactly(stream, 1):
                case b"m":
                    await self._take(stream)
                case b"c":
                    while data := await exactly(stream, SMALL):
                        await stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the client has gone
        finally:
            await trio.aclose_forcefully(stream)

    async def _take(self, stream: trio.abc.Stream) -> None:
        buffer = memoryview(bytearray(MESSAGE))
        count = int.from_bytes(await exactly(stream, COUNT), "big")
        for number in range(count):
            done = 0
            while done < MESSAGE:
                data = await stream.receive_some(min(PIECE, MESSAGE - done))
                if not data:
                    return
                buffer[done : done + len(data)] = data
                done += len(data)
            check(number, buffer)
        await stream.send_all(count.to_bytes(COUNT, "big"))

    def wrap(self, stream: trio.SocketStream) -> trio.abc.Stream:
        return stream


class TcpClient(TrioClient):
    """Every stream and every call in flight has a connection of its own."""

    def __init__(self) -> None:
        self._idle: list[trio.abc.Stream] = []
        self._held: list[trio.abc.Stream] = []

    async def meet(self, hello: dict[str, Any]) -> dict[str, Any]:
        self._hello = hello
        return {"cipher": "none"}

    async def connect(self) -> trio.abc.Stream:
        return await trio.open_tcp_stream("127.0.0.1", self._hello["port"])

    async def stream(self, messages: list[bytes], count: int) -> None:
        stream = await self.connect()
        try:
            await stream.send_all(b"m" + count.to_bytes(COUNT, "big"))
            for number in range(count):
                await stream.send_all(messages[number % len(messages)])
            if int.from_bytes(await exactly(stream, COUNT), "big") != count:
                raise AssertionError("not everything arrived")
        finally:
            await trio.aclose_forcefully(stream)

    async def echo(self, data: bytes) -> bytes:
        if self._idle:
            stream = self._idle.pop()
            await stream.send_all(data)
        else:
            stream = await self.connect()
            await stream.send_all(b"c" + data)
        answer = await exactly(stream, SMALL)
        self._idle.append(stream)
        return answer

    async def handshake(self) -> None:
        stream = await self.connect()
        await stream.send_all(b"c" + bytes(SMALL))
        await exactly(stream, SMALL)
        await trio.aclose_forcefully(stream)

    async def hold(self, count: int) -> None:
        for _ in range(count):
            stream = await self.connect()
            await stream.send_all(b"c" + bytes(SMALL))
            await exactly(stream, SMALL)
            self._held.append(stream)
