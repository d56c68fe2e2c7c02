"""One end of a transfer between hosts with several paths: ``serve ADDRESS…``, or ``send PEER ADDRESS MB SECONDS``."""

from __future__ import annotations

import json
import sys

import trio

from shoal.transport.address import Address
from shoal.transport.endpoint import Endpoint
from shoal.transport.host import RealHost
from shoal.transport.identity import Identity, PeerId

from ..transport.sinks import SINK, Size, sink


async def main(what: str, *arguments: str) -> None:
    host = RealHost()
    endpoint = Endpoint(host, Identity(host.entropy(32)))
    endpoint.serve(SINK, sink)
    async with trio.open_nursery() as nursery:
        if what == "serve":
            await nursery.start(endpoint.run, [Address("tcp", address, 0) for address in arguments])
            print(endpoint.peer_id.text, endpoint.addresses()[0], flush=True)
            await trio.sleep_forever()
        peer, address, size, seconds = PeerId.parse(arguments[0]), Address.parse(arguments[1]), *arguments[2:]
        await nursery.start(endpoint.run, [])
        link = await endpoint.connect(peer, [address])
        part = bytes(int(size) << 20)
        began, rates, carried = trio.current_time(), [], {}
        while trio.current_time() < began + float(seconds):
            start = trio.current_time()
            await endpoint.call(peer, SINK, Size(len(part)), body=[part], timeout=120)
            rates.append(len(part) / (trio.current_time() - start))
            carried = {pipe.remote.host: pipe.bytes_sent for pipe in link.pipes if pipe.bulk_only}
        print(json.dumps({"rates": rates, "carried": carried, "reason": link.width.reason}), flush=True)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main, *sys.argv[1:])
