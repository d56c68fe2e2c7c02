"""A writer that is killed at any moment has lost nothing that it acknowledged, and never contradicts itself."""

from __future__ import annotations

import itertools
import os
import random
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import attrs
import pytest

from shoal.dht.documents.store import DocumentStore

from .swarm import IDS, SPEC, WALL, Writer, replica

TESTS = Path(__file__).parents[2]


@attrs.define
class Witness:
    """What the outside has seen of the writer."""

    reader: Writer = attrs.Factory(lambda: Writer(IDS[6]))
    signed: dict[tuple[int, int], str] = attrs.Factory(dict)
    last: tuple[int, int] = (-1, -1)
    sum: int = 0

    def saw(self, line: str) -> None:
        word, *rest = line.split()
        if word != "wrote":
            return
        incarnation, counter, id, total = int(rest[0]), int(rest[1]), rest[2], int(rest[3])
        place = incarnation, counter
        assert place not in self.signed, f"envelope {place} was written twice"
        assert place > self.last
        assert total == self.sum + 1, "what was acknowledged before is gone"
        self.signed[place] = id
        self.last, self.sum = place, total


def run_and_kill(folder: Path, wall: float, seconds: float, witness: Witness) -> int:
    """One life of the writer; returns how many envelopes it acknowledged."""
    child = subprocess.Popen(
        [sys.executable, "-m", "documents.store_child", str(folder), str(wall)],
        env={**os.environ, "PYTHONPATH": str(TESTS / "dht")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert child.stdout is not None and child.stderr is not None
    ready, _, _ = select.select([child.stdout], [], [], 60.0)
    assert ready, "the writer does not start"
    time.sleep(seconds)
    child.send_signal(signal.SIGKILL)
    out, error = child.communicate()
    assert child.returncode == -signal.SIGKILL, error.decode()
    text = out.decode()
    lines = text[: text.rfind("\n") + 1].splitlines()
    for line in lines:
        witness.saw(line)
    return sum(line.startswith("wrote") for line in lines)


def look(folder: Path, witness: Witness) -> None:
    """After a kill: the chain is whole, and reaches what was acknowledged."""
    store = DocumentStore(folder / "documents.sqlite")
    loaded = store.load(SPEC.id, IDS[0].peer_id)
    assert store.notices == []
    mine = [envelope for envelope in loaded.envelopes if envelope.author == IDS[0].peer_id]
    for before, after in itertools.pairwise(mine):
        assert after.counter == before.counter + 1 and after.previous == before.id
    for envelope in mine:
        assert witness.signed.get(envelope.place, envelope.id.hex()) == envelope.id.hex()
    held = replica()
    assert held.load(loaded.envelopes, loaded.evidence, WALL) == len(loaded.envelopes)
    assert not witness.signed or (mine and mine[-1].place >= witness.last)
    if mine:
        # One more may be there, which was on disk when the process died before it could say so.
        witness.sum = held.view(IDS[0].peer_id)["m"]["sum"]
        witness.last = mine[-1].place
        witness.signed[witness.last] = mine[-1].id.hex()
    for envelope in loaded.envelopes:  # somebody who has followed from the beginning sees no contradiction
        verdict = witness.reader.offer(envelope)
        assert verdict.kept or verdict.code in ("duplicate", "stale"), verdict
    store.close()


def kill_in_a_loop(folder: Path, kills: int, seed: int) -> int:
    """At least so many kills, and more on a busy machine, where a life may end before a word is written."""
    rng, witness, wrote = random.Random(seed), Witness(), 0
    for life in range(10 * kills):
        if life >= kills and wrote > kills:
            break
        wrote += run_and_kill(folder, WALL + life, rng.choice((0.0, 0.002, 0.01, 0.03, 0.06)), witness)
        look(folder, witness)
    assert len({incarnation for incarnation, _ in witness.signed}) <= 2  # it goes on with its chain
    return wrote


@pytest.mark.process
@pytest.mark.real(timeout=300)
def test_a_writer_killed_thirty_times_keeps_every_acknowledged_envelope_and_one_history(tmp_path: Path) -> None:
    assert kill_in_a_loop(tmp_path, 30, 1) > 30


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 6))
def test_a_writer_killed_hundreds_of_times_keeps_every_acknowledged_envelope(tmp_path: Path, seed: int) -> None:
    assert kill_in_a_loop(tmp_path, 200, seed) > 200
