"""A call that swallows its body, for measuring what a link moves."""

from __future__ import annotations

import attrs

from shoal.transport.frames import Priority
from shoal.transport.rpc import Call, Method


@attrs.frozen
class Size:
    """Bytes of the body, or those that came."""

    size: int


SINK = Method("test.sink", Size, Size, Priority.BULK)


async def sink(call: Call[Size]) -> Size:
    """Takes the body in pieces."""
    buffer, left = memoryview(bytearray(1 << 20)), call.body_left
    while left:
        part = min(left, len(buffer))
        await call.read_into(buffer[:part])
        left -= part
    return Size(call.request.size)
