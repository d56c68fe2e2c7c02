"""Engines that misbehave: run in place of Python, with how, and with what Python would have been given.

``lossy``: loses and delays datagrams of data. ``greedy``: sends without being asked for more.
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
import sys

from shoal.transport import webrtc_child
from shoal.transport.webrtc_flow import ChannelFlow
from shoal.transport.webrtc_sctp import BatchedDatagrams

LOST, LATE = 0.02, 0.02

chance = random.Random(7)
receive = BatchedDatagrams._datagram


def lossy(self: BatchedDatagrams, data: bytes, source: tuple[str, int], packets: list[bytes]) -> None:
    drawn = chance.random()
    if drawn < LOST:
        return
    if drawn < LOST + LATE:
        late: list[bytes] = []

        def arrive() -> None:
            receive(self, data, source, late)
            self.on_packets(late)

        asyncio.get_running_loop().call_later(0.005, arrive)
        return
    receive(self, data, source, packets)


if __name__ == "__main__":
    match sys.argv[1]:
        case "lossy":
            BatchedDatagrams._datagram = lossy  # type: ignore[method-assign]
        case "greedy":
            ChannelFlow.credit = property(lambda self: 1 << 30)  # type: ignore[assignment, method-assign]
    end = socket.socket(fileno=int(sys.argv[-1]))
    end.setblocking(False)
    asyncio.run(webrtc_child.serve(end))
    os._exit(0)
