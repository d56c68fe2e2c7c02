"""What every measured system is asked to do: a server and a client, each in a process of its own."""

from __future__ import annotations

import asyncio
import os
import resource
import time
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import trio

from ..children import Worker

#: Bytes of one bulk message, and of a small call's request and answer.
MESSAGE = 1 << 20
SMALL = 1 << 10
#: What a bulk stream begins with: how many messages follow.
COUNT = 8
#: Different messages that are sent in turns, so that a lost or doubled one is noticed.
KINDS = 8

Act = Callable[[], Coroutine[Any, Any, None]]


def message(number: int) -> bytes:
    """The bulk message of this number."""
    mark = (number % KINDS).to_bytes(8, "big")
    return mark + bytes(range(256)) * ((MESSAGE - 16) // 256) + bytes((MESSAGE - 16) % 256) + mark


def check(number: int, data: bytes | bytearray | memoryview) -> None:
    """Raises AssertionError when ``data`` is not the message of this number: its length and both ends are looked at."""
    mark = (number % KINDS).to_bytes(8, "big")
    if len(data) != MESSAGE or data[:8] != mark or data[-8:] != mark:
        raise AssertionError(f"message {number} did not arrive as it was sent")


class Server(Worker):
    """Takes bulk messages, answers small calls with what they brought, holds links."""

    async def do(self, order: str, arguments: dict[str, Any]) -> dict[str, Any]:
        match order:
            case "start":
                many_files()
                return await self.listen()
            case "memory":
                return {"kib": memory()}
        raise ValueError(order)

    @abstractmethod
    async def listen(self) -> dict[str, Any]:
        """Begin to serve on 127.0.0.1; what a client must know."""


class Client(Worker):
    """Times what it is told to do, and checks that the other end got it."""

    async def do(self, order: str, arguments: dict[str, Any]) -> dict[str, Any]:
        match order:
            case "start":
                many_files()
                self._messages = [message(number) for number in range(KINDS)]
                return {}
            case "meet":
                return await self.meet(arguments)
            case "messages":
                began = time.perf_counter()
                await self.stream(self._messages, arguments["count"])
                return {"seconds": time.perf_counter() - began}
            case "calls":
                return await self._calls(arguments["seconds"], arguments["in_flight"])
            case "loaded":
                return await self.beside(self._endless, self._calls, arguments["seconds"], arguments["in_flight"])
            case "handshakes":
                act = self.handshake if arguments["what"] == "returning" else self.stranger
                return await self._handshakes(act, arguments["seconds"], arguments["in_flight"])
            case "hold":
                await self.hold(arguments["count"])
                return {}
        raise ValueError(order)

    async def _endless(self) -> None:
        while True:
            await self.stream(self._messages, 1024)

    async def _calls(self, seconds: float, in_flight: int) -> dict[str, Any]:
        times: list[float] = []
        began = time.perf_counter()
        ends = began + seconds

        async def caller() -> None:
            now = time.perf_counter()
            while now < ends:
                data = len(times).to_bytes(8, "big") * (SMALL // 8)
                answer = await self.echo(data)
                before, now = now, time.perf_counter()
                times.append(now - before)
                if answer != data:
                    raise AssertionError("another answer came than was asked for")

        await self.together([caller] * in_flight)
        return {"seconds": time.perf_counter() - began, "times": times}

    async def _handshakes(self, act: Act, seconds: float, in_flight: int) -> dict[str, Any]:
        count = 0
        began = time.perf_counter()

        async def shaker() -> None:
            nonlocal count
            while time.perf_counter() < began + seconds:
                await act()
                count += 1

        await self.together([shaker] * in_flight)
        return {"seconds": time.perf_counter() - began, "count": count}

    # Of the framework

    @abstractmethod
    async def together(self, acts: list[Act]) -> None:
        """Run all at once, until all are done."""

    @abstractmethod
    async def beside(
        self, load: Act, work: Callable[..., Awaitable[dict[str, Any]]], *arguments: Any
    ) -> dict[str, Any]:
        """The result of ``work`` while ``load`` goes on."""

    # Of the system

    @abstractmethod
    async def meet(self, hello: dict[str, Any]) -> dict[str, Any]:
        """Connect to the server; facts for the table (``cipher``)."""

    async def stream(self, messages: list[bytes], count: int) -> None:
        """Send ``count`` bulk messages on one stream; return when the server says it has them all."""
        raise NotImplementedError

    async def echo(self, data: bytes) -> bytes:
        """One small call."""
        raise NotImplementedError

    async def handshake(self) -> None:
        """A new connection, one small word there and back, closed."""
        raise NotImplementedError

    async def stranger(self) -> None:
        """As :meth:`handshake`, under an identity that the server has never met."""
        raise NotImplementedError

    async def hold(self, count: int) -> None:
        """Open ``count`` more links, each from a peer of its own, and keep them."""
        raise NotImplementedError


class TrioClient(Client):
    async def together(self, acts: list[Act]) -> None:
        async with trio.open_nursery() as nursery:
            for act in acts:
                nursery.start_soon(act)

    async def beside(
        self, load: Act, work: Callable[..., Awaitable[dict[str, Any]]], *arguments: Any
    ) -> dict[str, Any]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(load)
            await trio.sleep(0.3)  # until it fills every buffer there is
            result = await work(*arguments)
            nursery.cancel_scope.cancel()
        return result


class AsyncioClient(Client):
    framework = "asyncio"

    async def together(self, acts: list[Act]) -> None:
        await asyncio.gather(*(act() for act in acts))

    async def beside(
        self, load: Act, work: Callable[..., Awaitable[dict[str, Any]]], *arguments: Any
    ) -> dict[str, Any]:
        task = asyncio.create_task(load())
        await asyncio.sleep(0.3)
        try:
            return await work(*arguments)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def memory() -> int:
    """Resident KiB of this process that are its own (no mapped files)."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon:"))


def many_files() -> None:
    """As many open sockets as this machine lets a process have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
