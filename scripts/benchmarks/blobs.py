"""``bench.py blobs``: a blob from one and from several holder processes, beside one plain stream, in turns."""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import attrs

from shoal.dht.blobs.ends import MemorySink, MemorySource, Sink
from shoal.dht.blobs.node import Blobs
from shoal.dht.blobs.store import Store
from shoal.dht.blobs.tree import Tree, build_tree
from shoal.dht.kademlia.node import Dht
from shoal.transport.address import Address
from shoal.transport.identity import PeerId
from shoal.transport.mux import Priority
from shoal.transport.rpc import Call, Method

from .children import Worker
from .processes import children
from .report import Row, machine, show, write
from .systems.shoal import endpoint

MIB = 1 << 20


@attrs.frozen
class Give:
    size: int


PLAIN = Method("bench.plain", Give, Give, Priority.BULK)


@cache
def content(size: int) -> tuple[Tree, bytes]:
    """The same in every process."""
    data = b"".join(random.Random(at).randbytes(min(MIB, size - at)) for at in range(0, size, MIB))
    return build_tree([("weights", "F32", data)]), data


class BlobPeer(Worker):
    """Holds a blob, and fetches it from others."""

    async def do(self, order: str, arguments: dict[str, Any]) -> dict[str, Any]:
        match order:
            case "hold":
                return await self._hold(**arguments)
            case "meet":
                for address in arguments["addresses"]:
                    await self._endpoint.identify(Address.parse(address))
                return {}
            case "plain":
                return await self._plain(**arguments)
            case "fetch":
                return await self._fetch(**arguments)
            case _:
                raise ValueError(order)

    async def _hold(self, size: int) -> dict[str, Any]:
        self._endpoint = endpoint()
        self._folder = tempfile.TemporaryDirectory()
        self._blobs = Blobs(self._endpoint, Dht(self._endpoint), Store(Path(self._folder.name)))
        await self.nursery.start(self._endpoint.run, [Address("tcp", "127.0.0.1", 0)])
        tree, data = content(size)
        self._blobs.offer(MemorySource(tree, [data]))

        async def give(call: Call[Give]) -> Give:
            view = memoryview(data)
            for at in range(0, call.request.size, MIB):
                await call.write(view[at : at + MIB])
            return call.request

        self._endpoint.serve(PLAIN, give)
        return {"peer": self._endpoint.peer_id.text, "address": str(self._endpoint.addresses()[0])}

    async def _plain(self, peer: str, size: int) -> dict[str, Any]:
        out = memoryview(bytearray(size))
        begin = time.perf_counter()
        async with self._endpoint.stream(PeerId.parse(peer), PLAIN, Give(size), timeout=600.0) as reply:
            for at in range(0, size, MIB):
                await reply.read_into(out[at : at + MIB])
            await reply.result()
        seconds = time.perf_counter() - begin
        assert out == content(size)[1]
        return {"seconds": seconds}

    async def _fetch(self, peers: list[str], size: int, disk: bool) -> dict[str, Any]:
        tree, data = content(size)
        out = memoryview(bytearray(size))

        async def sink(found: Tree) -> Sink:
            return MemorySink(found, [out])

        names = [PeerId.parse(peer) for peer in peers]
        self._blobs.store.remove(tree.id)
        begin = time.perf_counter()
        if disk:
            done = await self._blobs.fetch_to_store(tree.id, peers=names)
        else:
            done = await self._blobs.fetch(tree.id, sink, peers=names, search=False)
        seconds = time.perf_counter() - begin
        assert disk or out == data
        return {"seconds": seconds, "spare": done.spare, "peers": len(done.received)}


async def run(options: argparse.Namespace) -> None:
    size = options.mb * MIB
    most = max(options.holders)
    cases = ["one plain stream", *(f"blob from {n}" for n in options.holders), f"blob from {most}, to disk"]
    rows = {case: Row("blobs", {"what": case, "bytes": size}, "shoal", "mb_s") for case in cases}
    async with children() as group:
        fetcher, *holders = await group.start("blobs", 1 + most)
        await fetcher.ask("hold", size=size)
        found = [await holder.ask("hold", size=size) for holder in holders]
        await fetcher.ask("meet", addresses=[each["address"] for each in found])
        peers = [each["peer"] for each in found]
        for number in range(-1, options.runs):
            for case in cases:
                if case.startswith("one"):
                    answer = await fetcher.ask("plain", peer=peers[0], size=size)
                else:
                    count, disk = int(case.split()[2].strip(",")), case.endswith("disk")
                    answer = await fetcher.ask("fetch", peers=peers[:count], size=size, disk=disk)
                if number >= 0:
                    rows[case].runs.append(size / answer["seconds"] / 1e6)
                    rows[case].extra.setdefault("spare", []).append(answer.get("spare", 0))
    plain = rows[cases[0]].median
    for row in rows.values():
        row.extra |= machine()
    show(
        f"{options.mb} MiB over loopback, encrypted, MB/s",
        ("what", "median", "min", "max", "× plain", "bytes in vain", "runs"),
        [
            (
                case,
                *(f"{value:.0f}" for value in (row.median, min(row.runs), max(row.runs))),
                f"{row.median / plain:.2f}",
                str(sum(row.extra["spare"]) // len(row.runs)),
                str(len(row.runs)),
            )
            for case, row in rows.items()
        ],
        ["A blob is checked chunk by chunk (BLAKE3), a plain stream is not. All share the cores."],
    )
    write(list(rows.values()), options.json)
