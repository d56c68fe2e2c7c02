"""The memory network: conformance, its model of lines, and its faults."""

from __future__ import annotations

import random

from shoal.transport.address import Address
from shoal.transport.memory import MemoryWorld
from shoal.transport.network import Network

from .stream_conformance import StreamConformance


class TestConformance(StreamConformance):
    def networks(self) -> tuple[Network, Network]:
        world = MemoryWorld(random.Random(0))
        return world.network("here"), world.network("there")

    def bind(self) -> Address:
        return Address("mem", "there", 0)
