"""The states that a peer keeps in memory: the last ones, and those that somebody loads."""

from __future__ import annotations

import torch
import trio

from shoal.learning import defaults
from shoal.learning.rounds.messages import Certificate, CommitRecord
from shoal.learning.snapshots import Snapshot, Snapshots
from shoal.learning.store import Head
from shoal.learning.sync import load_state, state_digest
from shoal.transport.identity import Identity

from ..dht.blobs.swarm import swarm

ME = Identity(b"i" * 32).peer_id
SIZE = 1 << 20


def snapshot(round: int) -> Snapshot:
    record = CommitRecord(b"r", round, "reduce", b"r", (), (), (), (ME,), 0, 0, b"", (), "", b"", "")
    vectors = {"weights": torch.full((SIZE,), float(round))}
    return Snapshot(round, vectors, Head(record, Certificate(b"", 0, ()), (ME,)))


async def test_a_state_that_is_being_loaded_is_held_while_rounds_go_on_and_let_go_afterwards() -> None:
    async with swarm() as s:
        joiner, holder = await s.add(), await s.add()
        s.world.set_uplink(holder.name, 0.5e6)  # 4 MiB take 8.4 s
        snapshots = Snapshots(holder.blobs)
        loaded: dict[str, torch.Tensor] = {}

        async def rounds() -> None:
            for round in range(1, 40):
                new = snapshot(round)
                snapshots.keep(new)
                await snapshots.settle(new)
                await trio.sleep(1.0)

        async def load() -> None:
            digest = state_digest(2, snapshot(2).vectors)
            vectors, done = await load_state(
                joiner.blobs, digest, 2, SIZE, [holder.peer], lambda what, peer, detail: None
            )
            assert done.seconds > 5.0
            loaded.update(vectors)

        s.nursery.start_soon(rounds)
        await trio.sleep(1.5)
        s.nursery.start_soon(load)
        await trio.sleep(6.0)
        assert [each.round for each in snapshots.last] == [7, 8]
        assert [each.round for each in snapshots.held()] == [2, 7, 8]
        await trio.sleep(8.0)
        assert torch.equal(loaded["weights"], snapshot(2).vectors["weights"])
        await trio.sleep(defaults.HOLD_IDLE + 2.0)
        rounds_now = [each.round for each in snapshots.held()]
        assert 2 not in rounds_now and len(rounds_now) == 2
        assert holder.blobs.offered(state_digest(2, snapshot(2).vectors)) is None


async def test_no_more_than_two_states_are_held_however_many_are_loaded() -> None:
    async with swarm() as s:
        joiner, holder = await s.add(), await s.add()
        snapshots = Snapshots(holder.blobs)
        for round in range(1, 8):
            new = snapshot(round)
            snapshots.keep(new)
            await snapshots.settle(new)
            await load_state(joiner.blobs, new.digest, round, SIZE, [holder.peer], lambda what, peer, detail: None)
        assert [each.round for each in snapshots.held()] == [4, 5, 6, 7]
