"""Shoal: links over TCP, streams and calls of endpoints."""

from __future__ import annotations

from typing import Any

import attrs
import trio

from shoal.transport.address import Address
from shoal.transport.endpoint import Endpoint
from shoal.transport.host import RealHost
from shoal.transport.identity import Identity, PeerId
from shoal.transport.mux import Priority
from shoal.transport.rpc import Call, Method

from .base import MESSAGE, Server, TrioClient, check

#: Links one process holds here: every limit of the endpoint itself must be above it.
LINKS = 4096


@attrs.frozen
class Echo:
    data: bytes


@attrs.frozen
class Take:
    count: int


ECHO = Method("bench.echo", Echo, Echo)
TAKE = Method("bench.take", Take, Take, Priority.BULK)


def endpoint() -> Endpoint:
    host = RealHost()
    return Endpoint(host, Identity(host.entropy(32)), max_links=LINKS)


class ShoalServer(Server):
    async def listen(self) -> dict[str, Any]:
        self._endpoint = endpoint()
        self._endpoint._acceptor.throttle = None  # all the handshakes of a run come from one address
        self._endpoint.serve(TAKE, self._take)
        self._endpoint.serve(ECHO, self._echo)
        await self.nursery.start(self._endpoint.run, [Address("tcp", "127.0.0.1", 0)])
        return {"peer": self._endpoint.peer_id.text, "address": str(self._endpoint.addresses()[0])}

    async def _take(self, call: Call[Take]) -> Take:
        buffer = memoryview(bytearray(MESSAGE))
        for number in range(call.request.count):
            await call.read_into(buffer)
            check(number, buffer)
        return call.request

    async def _echo(self, call: Call[Echo]) -> Echo:
        return call.request


class ShoalClient(TrioClient):
    async def meet(self, hello: dict[str, Any]) -> dict[str, Any]:
        self._endpoint = endpoint()
        await self.nursery.start(self._endpoint.run, [])
        self._peer = PeerId.parse(hello["peer"])
        self._address = Address.parse(hello["address"])
        self._link = await self._endpoint.connect(self._peer, [self._address])
        return {"cipher": self._link.cipher}

    async def stream(self, messages: list[bytes], count: int) -> None:
        body = [messages[number % len(messages)] for number in range(count)]
        answer = await self._endpoint.call(self._peer, TAKE, Take(count), body=body, timeout=3600)
        if answer.count != count:
            raise AssertionError("not everything arrived")

    async def echo(self, data: bytes) -> bytes:
        return (await self._endpoint.call(self._peer, ECHO, Echo(data))).data

    async def handshake(self) -> None:
        link = await self._endpoint.identify(self._address)
        link.say_goodbye("measured")

    async def stranger(self) -> None:
        async with trio.open_nursery() as nursery:
            other = endpoint()
            await nursery.start(other.run, [])
            link = await other.identify(self._address)
            await link.aclose()
            nursery.cancel_scope.cancel()

    async def hold(self, count: int) -> None:
        for _ in range(count):
            other = endpoint()
            await self.nursery.start(other.run, [])
            await other.connect(self._peer, [self._address])
