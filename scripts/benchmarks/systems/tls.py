"""TLS 1.3 of trio and OpenSSL, with a certificate of an authority made on the spot."""

from __future__ import annotations

import ssl
from typing import Any

import trio
import trustme

from .base import SMALL
from .memory_plain import TcpClient, TcpServer, exactly


class TlsServer(TcpServer):
    async def listen(self) -> dict[str, Any]:
        authority = trustme.CA()
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._context.minimum_version = ssl.TLSVersion.TLSv1_3
        authority.issue_cert("127.0.0.1").configure_cert(self._context)
        return {**await super().listen(), "authority": authority.cert_pem.bytes().decode()}

    def wrap(self, stream: trio.SocketStream) -> trio.abc.Stream:
        return trio.SSLStream(stream, self._context, server_side=True, https_compatible=True)


class TlsClient(TcpClient):
    async def meet(self, hello: dict[str, Any]) -> dict[str, Any]:
        await super().meet(hello)
        self._context = ssl.create_default_context(cadata=hello["authority"])
        self._context.minimum_version = ssl.TLSVersion.TLSv1_3
        stream = await self.connect()
        await stream.send_all(b"c" + bytes(SMALL))
        await exactly(stream, SMALL)
        cipher = stream.cipher()[0]
        await trio.aclose_forcefully(stream)
        return {"cipher": cipher}

    async def connect(self) -> trio.abc.Stream:
        raw = await trio.open_tcp_stream("127.0.0.1", self._hello["port"])
        return trio.SSLStream(raw, self._context, server_hostname="127.0.0.1", https_compatible=True)
