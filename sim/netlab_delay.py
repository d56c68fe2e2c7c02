"""A link between two namespaces that holds every packet up: ``python -m shoal.sim.netlab_delay NS DEV NS DEV SECONDS``.

For kernels without netem. Each end is a TUN device in its namespace; this process carries packets from one to the other
when they are due. It prints a line once both devices are there, and its end takes them away.
"""

from __future__ import annotations

import fcntl
import os
import select
import struct
import sys
import time
from collections import deque
from pathlib import Path

from . import defaults
from .netlab_system import inside

TUN = Path("/dev/net/tun")

# linux/if_tun.h: packets without a header of their own
_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000


def open_tun(namespace: str, device: str) -> int:
    """A new TUN device in a namespace; its file descriptor, non-blocking."""
    with inside(namespace):
        descriptor = os.open(TUN, os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", device.encode(), _IFF_TUN | _IFF_NO_PI))
    return descriptor


def carry(one: int, other: int, seconds: float) -> None:
    """Carry packets both ways, each ``seconds`` late, in order; for ever. A full queue drops, as a router's does."""
    ways = ((one, other, deque[tuple[float, bytes]]()), (other, one, deque[tuple[float, bytes]]()))
    while True:
        due = min((queue[0][0] for _, _, queue in ways if queue), default=None)
        wait = None if due is None else max(0.0, due - time.monotonic())
        ready, _, _ = select.select([one, other], [], [], wait)
        now = time.monotonic()
        for source, sink, queue in ways:
            if source in ready:
                for _ in range(64):
                    try:
                        packet = os.read(source, 65536)
                    except BlockingIOError:
                        break
                    if len(queue) < defaults.LAB_DELAY_QUEUE:
                        queue.append((now + seconds, packet))
            while queue and queue[0][0] <= now:
                packet = queue.popleft()[1]
                try:
                    os.write(sink, packet)
                except OSError:
                    pass  # the device is down, or its queue is full: the packet is lost, as packets are


def main() -> None:
    namespace, device, other_namespace, other_device, seconds = sys.argv[1:]
    ends = open_tun(namespace, device), open_tun(other_namespace, other_device)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    carry(*ends, float(seconds))


if __name__ == "__main__":
    main()
