"""Kernel TCP: conformance over IPv4 and IPv6, and what only real sockets do."""

from __future__ import annotations

import pytest

from shoal.transport.address import Address
from shoal.transport.network import Network
from shoal.transport.tcp import TcpNetwork

from .stream_conformance import StreamConformance


@pytest.mark.real
class TestConformanceOverIPv4(StreamConformance):
    def networks(self) -> tuple[Network, Network]:
        return TcpNetwork(), TcpNetwork()

    def bind(self) -> Address:
        return Address("tcp", "127.0.0.1", 0)
