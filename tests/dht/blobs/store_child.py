"""Child of test_store.py: writes chunks to a store and says which are acknowledged, until it is killed."""

from __future__ import annotations

import random
import sys
from pathlib import Path

from shoal.dht.blobs.bits import Bits
from shoal.dht.blobs.store import Store
from shoal.dht.blobs.tree import build_tree
from shoal.transport.errors import ConfigError


def main(folder: str, turn: str) -> None:
    rng = random.Random(turn)
    try:
        store = Store(Path(folder))
        while True:
            seed = rng.randrange(5)
            data = [seed.to_bytes(8, "big"), random.Random(seed).randbytes(300_000)]
            tree = build_tree([("round", "U8", data[0]), ("weights", "F32", data[1])], chunk=1 << 14)
            entry = store.entry(tree.id)
            if entry is not None and entry.complete:
                say(f"go {seed}")
                store.remove(tree.id)
                say(f"gone {seed}")
            store.begin(tree)
            wanted = list((store.bits(tree.id) or Bits(len(tree))).missing())
            chosen = rng.sample(wanted, min(len(wanted), rng.randrange(1, 8)))
            for index in chosen:
                place = tree.place(index)
                store.write(tree.id, index, data[place.part][place.offset : place.offset + place.size])
            store.flush(tree.id)
            for index in chosen:
                say(f"had {seed} {index}")
    except ConfigError as error:
        say(str(error))


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


main(*sys.argv[1:])
