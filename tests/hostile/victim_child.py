"""A node in a process of its own: answers echoes, and says on demand how it does. One JSON object per line.

Prints its address; for every line on its standard input, its counters, links and resident bytes; ends with its input.
"""

from __future__ import annotations

import json
import os
import sys

import attrs
import trio

from shoal.transport.address import Address
from shoal.transport.endpoint import Endpoint
from shoal.transport.host import RealHost
from shoal.transport.identity import Identity
from shoal.transport.rpc import Call, Method


@attrs.frozen
class Echo:
    text: str


ECHO = Method("hostile.echo", Echo, Echo)


async def echo(call: Call[Echo]) -> Echo:
    return call.request


def resident() -> int:
    """Bytes of memory of this process now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def say(**what: object) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


async def main() -> None:
    endpoint = Endpoint(RealHost(), Identity(os.urandom(32)), max_links=int(sys.argv[1]) if len(sys.argv) > 1 else 64)
    endpoint.serve(ECHO, echo)
    async with trio.open_nursery() as nursery:
        await nursery.start(endpoint.run, [Address("tcp", "0.0.0.0", 0)])
        address = endpoint._listeners[0].address
        say(port=address.port, peer=endpoint.peer_id.text)
        while line := await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
            assert line
            say(
                counters=endpoint.counters,
                links=len(endpoint.links()),
                resident=resident(),
                tasks=trio.lowlevel.current_statistics().tasks_living,
            )
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main)
