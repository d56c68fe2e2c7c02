"""A process in which pycrdt meets what the guard lets pass; its parent sees whether it comes out alive.

``python -m documents.guard_child SEED SECONDS FILE``, with ``tests`` and ``tests/dht`` in PYTHONPATH: FILE holds the
input at hand, for when the process is gone.
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

from hostile.samples import bent

from shoal.dht.documents.guard_decoder import GuardError

from .updates import checked, honest, imagined


def main(seed: int, seconds: float, file: Path) -> None:
    rng = random.Random(seed)
    end = time.monotonic() + seconds
    tried = passed = refused_honest = 0
    while time.monotonic() < end:
        client = rng.choice((1, 5, 127, 128, rng.randrange(1 << 53)))  # short ones: bent bytes hit other things
        before = honest(rng, client, rng.randrange(8))
        try:
            guard, _ = checked(client, before)
        except GuardError:
            refused_honest += 1
            continue
        others = honest(rng, client, 2)
        for _ in range(30):
            match rng.randrange(4):
                case 0 | 1:
                    update = imagined(rng, client, guard.next)
                case _:
                    update = rng.choice([*others, imagined(rng, client, guard.next), *before])
                    for _ in range(rng.choice((1, 1, 2, 3))):
                        update = bent(update, rng)
            # What was written before it, or half of that: bent clocks then fit now and again.
            history = before[: rng.choice((0, len(before) // 2, len(before), len(before)))]
            file.write_text(repr((client, history, update)))
            tried += 1
            try:
                checked(client, [*history, update])
                passed += 1
            except GuardError:
                pass
    print(tried, passed, refused_honest)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), Path(sys.argv[3]))
