"""hivemind's p2pd: a Go daemon (libp2p, TLS or Noise, over TCP) beside each Python process, spoken to by asyncio."""

from __future__ import annotations

from typing import Any

from google.protobuf.wrappers_pb2 import BytesValue
from hivemind.p2p import P2P, PeerID
from multiaddr import Multiaddr

from .base import COUNT, MESSAGE, AsyncioClient, Server, check

PLAIN = {"auto_nat": False, "nat_port_map": False, "use_relay": False, "dht_mode": "client", "idle_timeout": 3600}
LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)


class HivemindServer(Server):
    framework = "asyncio"

    async def listen(self) -> dict[str, Any]:
        async def echo(request: BytesValue, _: Any) -> BytesValue:
            return request

        async def take(_: Any, reader: Any, writer: Any) -> None:
            count = int.from_bytes(await reader.readexactly(COUNT), "big")
            for number in range(count):
                check(number, await reader.readexactly(MESSAGE))
            writer.write(count.to_bytes(COUNT, "big"))
            await writer.drain()
            writer.close()

        self._node = await P2P.create(host_maddrs=LOOPBACK, **PLAIN)
        await self._node.add_protobuf_handler("echo", echo, BytesValue)
        await self._node.add_binary_stream_handler("take", take)
        addresses = await self._node.get_visible_maddrs(latest=True)
        return {"peer": self._node.peer_id.to_base58(), "address": str(addresses[0]).rsplit("/p2p/", 1)[0]}


class HivemindClient(AsyncioClient):
    async def meet(self, hello: dict[str, Any]) -> dict[str, Any]:
        self._peer = PeerID.from_base58(hello["peer"])
        self._address = Multiaddr(hello["address"])
        self._node = await P2P.create(host_maddrs=LOOPBACK, **PLAIN)
        await self._node._client.connect(self._peer, [self._address])
        return {"cipher": "libp2p TLS 1.3"}

    async def stream(self, messages: list[bytes], count: int) -> None:
        _, reader, writer = await self._node.call_binary_stream_handler(self._peer, "take")
        try:
            writer.write(count.to_bytes(COUNT, "big"))
            for number in range(count):
                writer.write(messages[number % len(messages)])
                await writer.drain()
            if int.from_bytes(await reader.readexactly(COUNT), "big") != count:
                raise AssertionError("not everything arrived")
        finally:
            writer.close()

    async def echo(self, data: bytes) -> bytes:
        answer = await self._node.call_protobuf_handler(self._peer, "echo", BytesValue(value=data), BytesValue)
        return bytes(answer.value)

    async def handshake(self) -> None:
        await self._node._client.disconnect(self._peer)
        await self._node._client.connect(self._peer, [self._address])
