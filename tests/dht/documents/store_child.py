"""Writes in a document until it is killed: ``python -m documents.store_child FOLDER WALL`` in ``tests/dht``.

A line for each envelope that is stored, and so could have gone out: incarnation, counter, id, and the sum of all that
was written before, which stands in the document too.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pycrdt

from shoal.dht.documents.store import DocumentStore

from .swarm import IDS, SPEC, replica, signed

ME = IDS[0]


def main(folder: Path, wall: float) -> None:
    rng = random.Random(wall)
    store = DocumentStore(folder / "documents.sqlite")
    loaded = store.load(SPEC.id, ME.peer_id)
    held = replica()
    held.load(loaded.envelopes, loaded.evidence, wall, loaded.own)
    print("open", *store.notices, flush=True)
    now = 0.0
    while True:
        now += 1000.0
        if held.must_begin(ME.peer_id):
            held.begin(ME.peer_id, store.reserve(SPEC.id, ME.peer_id, wall))
        draft = held.write(lambda doc: count(doc, rng), ME, wall)
        assert draft is not None
        store.append([draft], ME.peer_id)
        verdict = held.offer(draft, wall, now)
        assert verdict.kept, verdict
        print("wrote", draft.incarnation, draft.counter, draft.id.hex(), held.view(ME.peer_id)["m"]["sum"], flush=True)
        if rng.random() < 0.3:  # what others write lies beside it
            theirs = held.range_of(IDS[1].peer_id)
            counter = 0 if theirs is None else theirs.next + 1
            previous = bytes(32) if counter == 0 else bytes(31) + b"\1"
            other = signed(IDS[1], b"\0\0", counter, previous, snapshot=True)
            assert held.offer(other, wall, now).kept
            store.append([other])


def count(doc: pycrdt.Doc[Any], rng: random.Random) -> None:
    numbers = doc.get("m", type=pycrdt.Map)
    numbers["sum"] = int(numbers.get("sum", 0)) + 1
    numbers[f"k{rng.randrange(20)}"] = "x" * rng.randrange(300)


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
