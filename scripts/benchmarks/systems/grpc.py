"""grpc.aio without encryption: a unary echo and a client stream of bulk messages, all on one channel."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc

from .base import MESSAGE, AsyncioClient, Server, check

OPTIONS = [("grpc.max_receive_message_length", 2 * MESSAGE), ("grpc.max_send_message_length", 2 * MESSAGE)]


class GrpcServer(Server):
    framework = "asyncio"

    async def listen(self) -> dict[str, Any]:
        async def echo(request: bytes, _: Any) -> bytes:
            return request

        async def take(requests: AsyncIterator[bytes], _: Any) -> bytes:
            number = 0
            async for data in requests:
                check(number, data)
                number += 1
            return number.to_bytes(8, "big")

        self._server = grpc.aio.server(options=OPTIONS)
        handlers = {
            "Echo": grpc.unary_unary_rpc_method_handler(echo),
            "Take": grpc.stream_unary_rpc_method_handler(take),
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench", handlers),))
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        return {"port": port}


class GrpcClient(AsyncioClient):
    async def meet(self, hello: dict[str, Any]) -> dict[str, Any]:
        self._target = f"127.0.0.1:{hello['port']}"
        self._channel = grpc.aio.insecure_channel(self._target, options=OPTIONS)
        self._echo = self._channel.unary_unary("/bench/Echo")
        self._take = self._channel.stream_unary("/bench/Take")
        await self._channel.channel_ready()
        return {"cipher": "none"}

    async def stream(self, messages: list[bytes], count: int) -> None:
        async def requests() -> AsyncIterator[bytes]:
            for number in range(count):
                yield messages[number % len(messages)]

        if int.from_bytes(await self._take(requests()), "big") != count:
            raise AssertionError("not everything arrived")

    async def echo(self, data: bytes) -> bytes:
        answer: bytes = await self._echo(data)
        return answer
