"""Buffers for large records, used again as soon as nobody looks at them any more.

A fresh buffer of 256 KiB costs as much as encrypting it: the kernel clears its pages, Python clears it once more, and
none of it is in the cache. Who holds a view of a buffer keeps it from being used again, and nobody gives one back: a
buffer with views cannot change its size, which is how Python itself tells.
"""

from __future__ import annotations

import threading
from collections import deque

from . import defaults

#: Bytes of a buffer: a record of the largest size with its header, two tags, and the header of the next one.
SIZE = defaults.MAX_RECORD + 128


class BufferPool:
    """At most ``limit`` buffers are kept; when all are in use, further ones are made and forgotten. For one thread."""

    def __init__(self, limit: int = defaults.POOLED_BUFFERS) -> None:
        self._limit = limit
        self._buffers: deque[bytearray] = deque()

    def __len__(self) -> int:
        return len(self._buffers)

    def take(self) -> memoryview:
        """:data:`SIZE` writable bytes of any content; yours as long as you hold the view, or one made of it."""
        for _ in range(min(len(self._buffers), defaults.POOL_TRIES)):
            buffer = self._buffers[0]
            self._buffers.rotate(-1)
            try:
                buffer.append(0)
            except BufferError:
                continue
            del buffer[-1]
            # Hot in the cache: the next one who asks should get it again, if it is free by then.
            self._buffers.rotate(1)
            return memoryview(buffer)
        buffer = bytearray(SIZE)
        if len(self._buffers) < self._limit:
            self._buffers.append(buffer)
        return memoryview(buffer)


class _Pools(threading.local):
    def __init__(self) -> None:
        self.pool = BufferPool()
        self.scratch = memoryview(bytearray(defaults.SCRATCH))


_pools = _Pools()


def take() -> memoryview:
    """:meth:`BufferPool.take` of this thread's pool."""
    return _pools.pool.take()


def scratch() -> memoryview:
    """:data:`defaults.SCRATCH` bytes of this thread, of use until whoever asked for them waits."""
    return _pools.scratch
