"""py-libp2p: Noise and yamux over TCP, one stream per call as its users do it."""

from __future__ import annotations

from typing import Any

import trio
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as Noise
from multiaddr import Multiaddr

from .base import COUNT, MESSAGE, SMALL, Server, TrioClient, check

ECHO = "/bench/echo/1"
TAKE = "/bench/take/1"


def host() -> Any:
    key = create_new_key_pair()
    noise = {NOISE: Noise(key, noise_privkey=create_noise_key().private_key)}
    return new_host(key_pair=key, sec_opt=noise, muxer_preference="YAMUX")


async def exactly(stream: Any, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        more = await stream.read(size - len(data))
        if not more:
            raise AssertionError(f"the stream ended after {len(data)} of {size} bytes")
        data += more
    return bytes(data)


class Libp2pServer(Server):
    async def listen(self) -> dict[str, Any]:
        self._host = host()
        self._host.set_stream_handler(ECHO, self._echo)
        self._host.set_stream_handler(TAKE, self._take)
        return await self.nursery.start(serve, self._host)

    async def _echo(self, stream: Any) -> None:
        await stream.write(await exactly(stream, SMALL))
        await stream.close()

    async def _take(self, stream: Any) -> None:
        count = int.from_bytes(await exactly(stream, COUNT), "big")
        for number in range(count):
            check(number, await exactly(stream, MESSAGE))
        await stream.write(count.to_bytes(COUNT, "big"))
        await stream.close()


async def serve(one: Any, *, task_status: trio.TaskStatus[dict[str, Any]] = trio.TASK_STATUS_IGNORED) -> None:
    async with one.run(listen_addrs=[Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        task_status.started({"address": str(one.get_addrs()[0])})
        await trio.sleep_forever()


class Libp2pClient(TrioClient):
    async def meet(self, hello: dict[str, Any]) -> dict[str, Any]:
        self._host = host()
        await self.nursery.start(serve, self._host)
        self._info = info_from_p2p_addr(Multiaddr(hello["address"]))
        await self._host.connect(self._info)
        return {"cipher": "Noise ChaChaPoly"}

    async def stream(self, messages: list[bytes], count: int) -> None:
        stream = await self._host.new_stream(self._info.peer_id, [TAKE])
        await stream.write(count.to_bytes(COUNT, "big"))
        for number in range(count):
            await stream.write(messages[number % len(messages)])
        if int.from_bytes(await exactly(stream, COUNT), "big") != count:
            raise AssertionError("not everything arrived")
        await stream.close()

    async def echo(self, data: bytes) -> bytes:
        stream = await self._host.new_stream(self._info.peer_id, [ECHO])
        await stream.write(data)
        answer = await exactly(stream, SMALL)
        await stream.close()
        return answer

    async def handshake(self) -> None:
        await self._host.disconnect(self._info.peer_id)
        await self._host.connect(self._info)
        await self.echo(bytes(SMALL))

    async def hold(self, count: int) -> None:
        for _ in range(count):
            other = host()
            await self.nursery.start(serve, other)
            await other.connect(self._info)
