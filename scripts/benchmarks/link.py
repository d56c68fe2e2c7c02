"""``bench.py link``: one encrypted link against plain TCP of trio, bulk and small calls, in turns."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any

import attrs
import trio

from shoal.transport.address import Address
from shoal.transport.endpoint import Endpoint
from shoal.transport.host import RealHost
from shoal.transport.identity import Identity, PeerId
from shoal.transport.mux import Priority
from shoal.transport.rpc import Call, Method

from .children import Worker
from .costs import Costs, measure
from .processes import Child, ask_all, children
from .report import Row, machine, show, write

#: Bytes of one call's body at most.
BODY = 64 << 20
#: Bytes of a small request, and of its answer.
SMALL = 64
#: What trio's TCP reads and writes at a time: the size of our records, so that only the rest differs.
PIECE = 256 << 10
SYSTEMS = ("shoal", "trio TCP")


@attrs.frozen
class Upload:
    size: int


@attrs.frozen
class Echo:
    data: bytes


UPLOAD = Method("bench.upload", Upload, Echo, Priority.BULK)
ECHO = Method("bench.echo", Echo, Echo)


class ShoalServer(Worker):
    """Takes bulk bodies into one buffer, answers small calls with what they brought."""

    async def do(self, order: str, arguments: dict[str, Any]) -> dict[str, Any]:
        if order != "start":
            raise ValueError(order)
        host = RealHost()
        self._endpoint = Endpoint(host, Identity(host.entropy(32)))
        self._buffer = memoryview(bytearray(BODY))
        self._endpoint.serve(UPLOAD, self._upload)
        self._endpoint.serve(ECHO, self._echo)
        await self.nursery.start(self._endpoint.run, [Address("tcp", "127.0.0.1", 0)])
        return {"peer": self._endpoint.peer_id.text, "address": str(self._endpoint.addresses()[0])}

    async def _upload(self, call: Call[Upload]) -> Echo:
        await call.read_into(self._buffer[: call.request.size])
        return Echo(bytes(self._buffer[call.request.size - SMALL : call.request.size]))

    async def _echo(self, call: Call[Echo]) -> Echo:
        return call.request


class Client(Worker):
    """Times what it is told to do, and checks that the other end got it."""

    async def do(self, order: str, arguments: dict[str, Any]) -> dict[str, Any]:
        match order:
            case "start":
                self._data = memoryview(bytes(range(256)) * (BODY // 256))
                return {}
            case "meet":
                return await self.meet(arguments)
            case "bulk":
                began = time.perf_counter()
                left = arguments["bytes"]
                while left:
                    size = min(left, BODY)
                    if await self.bulk(self._data[:size]) != self._data[size - SMALL : size]:
                        raise AssertionError("other bytes arrived than were sent")
                    left -= size
                return {"seconds": time.perf_counter() - began}
            case "calls":
                return {"seconds": await self._times(arguments["calls"])}
        raise ValueError(order)

    async def _times(self, calls: int) -> list[float]:
        times = []
        for number in range(calls):
            data = number.to_bytes(8, "big") * (SMALL // 8)
            began = time.perf_counter()
            answer = await self.echo(data)
            times.append(time.perf_counter() - began)
            if answer != data:
                raise AssertionError("another answer came than was asked for")
        return times

    async def meet(self, arguments: dict[str, Any]) -> dict[str, Any]:
        raise NotImplementedError

    async def bulk(self, data: memoryview) -> bytes:
        raise NotImplementedError

    async def echo(self, data: bytes) -> bytes:
        raise NotImplementedError


class ShoalClient(Client):
    async def meet(self, arguments: dict[str, Any]) -> dict[str, Any]:
        host = RealHost()
        self._endpoint = Endpoint(host, Identity(host.entropy(32)))
        await self.nursery.start(self._endpoint.run, [])
        self._peer = PeerId.parse(arguments["peer"])
        link = await self._endpoint.connect(self._peer, [Address.parse(arguments["address"])])
        return {"cipher": link.cipher}

    async def bulk(self, data: memoryview) -> bytes:
        return (await self._endpoint.call(self._peer, UPLOAD, Upload(len(data)), body=[data])).data

    async def echo(self, data: bytes) -> bytes:
        return (await self._endpoint.call(self._peer, ECHO, Echo(data))).data


class TcpServer(Worker):
    """The least a server can do: 8 bytes announce how many follow; the last ones go back."""

    async def do(self, order: str, arguments: dict[str, Any]) -> dict[str, Any]:
        if order != "start":
            raise ValueError(order)
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.nursery.start_soon(trio.serve_listeners, self._serve, listeners)
        return {"port": listeners[0].socket.getsockname()[1]}

    async def _serve(self, stream: trio.SocketStream) -> None:
        buffer = memoryview(bytearray(BODY))
        while True:
            head = b""
            while len(head) < 8:
                data = await stream.receive_some(8 - len(head))
                if not data:
                    return
                head += data
            size, done = int.from_bytes(head, "big"), 0
            while done < size:
                data = await stream.receive_some(min(PIECE, size - done))
                buffer[done : done + len(data)] = data
                done += len(data)
            await stream.send_all(buffer[size - SMALL : size])


class TcpClient(Client):
    async def meet(self, arguments: dict[str, Any]) -> dict[str, Any]:
        self._stream = await trio.open_tcp_stream("127.0.0.1", arguments["port"])
        return {}

    async def bulk(self, data: memoryview) -> bytes:
        await self._stream.send_all(len(data).to_bytes(8, "big"))
        await self._stream.send_all(data)
        return await self._answer()

    async def echo(self, data: bytes) -> bytes:
        await self._stream.send_all(len(data).to_bytes(8, "big") + data)
        return await self._answer()

    async def _answer(self) -> bytes:
        answer = b""
        while len(answer) < SMALL:
            answer += await self._stream.receive_some(SMALL - len(answer))
        return answer


# The parent


async def run(options: argparse.Namespace) -> None:
    size = options.mb << 20
    costs = measure()
    bulk = {s: Row("link", {"what": "bulk", "bytes": size}, s, "mb_s") for s in SYSTEMS}
    calls = {s: Row("link", {"what": "calls", "bytes": SMALL}, s, "per_s") for s in SYSTEMS}
    latencies: dict[str, list[float]] = {system: [] for system in SYSTEMS}

    async def one_bulk(system: str, child: Child, counts: bool) -> None:
        seconds = (await child.ask("bulk", bytes=size))["seconds"]
        if counts:
            bulk[system].runs.append(size / seconds / 1e6)

    async def one_calls(system: str, child: Child, counts: bool) -> None:
        times = (await child.ask("calls", calls=options.calls))["seconds"]
        if counts:
            calls[system].runs.append(len(times) / sum(times))
            latencies[system] += times

    async with children() as group:
        clients, cipher = await _connect(group)
        # One after the other: a bulk run beside small calls would measure the scheduler.
        await _turns(clients, one_bulk, options)
        await _turns(clients, one_calls, options)
    for system, times in latencies.items():
        cuts = statistics.quantiles(times, n=100)
        calls[system].extra = {"p50_ms": cuts[49] * 1e3, "p99_ms": cuts[98] * 1e3, **machine()}
        bulk[system].extra = machine()
    bulk["shoal"].extra |= {"floor_mb_s": size / costs.link_floor(size) / 1e6, "cipher": cipher}
    rows = [*bulk.values(), *calls.values()]
    _table(rows, costs, cipher)
    write(rows, options.json)


async def _connect(group: Any) -> tuple[dict[str, Child], str]:
    servers = [*await group.start("shoal-server", 1), *await group.start("tcp-server", 1)]
    clients = [*await group.start("shoal-client", 1), *await group.start("tcp-client", 1)]
    hellos = await ask_all(servers, "start")
    await ask_all(clients, "start")
    facts = await ask_all(clients, "meet", hellos)
    return dict(zip(SYSTEMS, clients, strict=True)), facts[0]["cipher"]


async def _turns(
    clients: dict[str, Child], once: Callable[[str, Child, bool], Awaitable[None]], options: argparse.Namespace
) -> None:
    ends = None if options.seconds is None else trio.current_time() + options.seconds / 2
    for number in range(-1, options.runs):
        if ends is not None and number >= 3 and trio.current_time() > ends:
            break
        for system, child in clients.items():
            await once(system, child, number >= 0)


def _table(rows: list[Row], costs: Costs, cipher: str) -> None:
    columns = ("case", "system", "median", "min", "max", "runs", "÷ TCP", "p50 ms", "p99 ms", "floor")
    lines = []
    for row, other in zip(rows, (rows[1], rows[1], rows[3], rows[3]), strict=True):
        ours, is_bulk = row.system == "shoal", row.unit == "mb_s"
        title = f"bulk, {row.case['bytes'] >> 20} MiB, MB/s" if is_bulk else f"calls of {SMALL} bytes, per s"
        lines.append(
            (
                title if ours else "",
                row.system,
                *(f"{value:.0f}" for value in (row.median, min(row.runs), max(row.runs))),
                str(len(row.runs)),
                f"{row.median / other.median:.2f}" if ours else "",
                *(("", "") if is_bulk else (f"{row.extra[key]:.3f}" for key in ("p50_ms", "p99_ms"))),
                f"{row.extra['floor_mb_s']:.0f}" if ours and is_bulk else "",
            )
        )
    facts = machine()
    notes = [
        f"shoal: {cipher}, flow control, typed and bounded messages, deadlines; trio TCP: none of these.",
        f"floor: MB/s at the measured ns per byte (TCP {costs.wire:.3f}, sealing and opening {costs.cipher:.3f}) on "
        f"two cores. {facts['cores']} cores, load {facts['load'][0]} at the end.",
    ]
    show("link: one encrypted link against plain TCP", columns, lines, notes)
