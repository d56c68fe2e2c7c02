"""The states that a peer keeps in memory: the last ones, and those that somebody loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import trio

from shoal.learning import defaults
from shoal.learning.rounds.messages import Certificate, CommitRecord
from shoal.learning.snapshots import Snapshot, Snapshots
from shoal.learning.store import Head, RunStore
from shoal.learning.sync import load_state, state_digest
from shoal.transport.errors import ConfigError
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


def live(round: int, model: torch.Tensor) -> Snapshot:
    return Snapshot(round, {"weights": model}, snapshot(round).head, live=True)


@pytest.mark.parametrize("on_disk", [False, True])
async def test_a_live_state_that_is_being_loaded_is_put_away_before_the_model_moves(
    on_disk: bool, tmp_path: Path
) -> None:
    async with swarm() as s:
        joiner, holder = await s.add(), await s.add()
        s.world.set_uplink(holder.name, 0.5e6)
        snapshots, model = Snapshots(holder.blobs, tmp_path / "run" if on_disk else None), torch.full((SIZE,), 1.0)
        loaded: dict[str, torch.Tensor] = {}
        first = live(1, model)
        snapshots.keep(first)
        await snapshots.settle(first)

        async def load() -> None:
            vectors, done = await load_state(
                joiner.blobs, first.digest, 1, SIZE, [holder.peer], lambda what, peer, detail: None
            )
            assert done.seconds > 5.0 and not done.liars
            loaded.update(vectors)

        s.nursery.start_soon(load)
        await trio.sleep(3.0)
        for round in range(2, 9):
            await snapshots.moving()
            model.fill_(round)
            new = live(round, model)
            snapshots.keep(new)
            await snapshots.settle(new)
            await trio.sleep(1.0)
        assert torch.equal(loaded["weights"], torch.full((SIZE,), 1.0))
        assert first.digest == state_digest(1, {"weights": torch.full((SIZE,), 1.0)})
        await trio.sleep(defaults.HOLD_IDLE + 2.0)
        new = live(9, model)
        snapshots.keep(new)
        assert holder.blobs.offered(first.digest) is None
        assert not on_disk or not list((tmp_path / "run").iterdir())


async def test_a_live_state_that_nobody_asked_for_is_gone_when_the_model_moves() -> None:
    async with swarm() as s:
        holder = await s.add()
        snapshots, model = Snapshots(holder.blobs), torch.full((8,), 1.0)
        first, store = live(1, model), RunStore(None)
        snapshots.keep(first)
        await snapshots.settle(first)
        assert torch.equal(snapshots.weights(), torch.full((8,), 1.0))
        await trio.sleep(2 * defaults.HOLD_IDLE)
        await snapshots.moving()
        model.fill_(2.0)
        assert holder.blobs.offered(first.digest) is None
        with pytest.raises(ConfigError, match="has just left the state after round 1"):
            snapshots.weights()
        await snapshots.save(store)
        assert store.load_state() is None
        seen: list[int] = []

        async def read() -> None:
            async with snapshots.reading() as found:
                seen.append(found.round)

        s.nursery.start_soon(read)
        await trio.sleep(1.0)
        assert not seen
        second = live(2, model)
        snapshots.keep(second)
        await snapshots.settle(second)
        await trio.sleep(0.1)
        assert seen == [2]
        snapshots.asked()
        await snapshots.moving()
        assert holder.blobs.offered(second.digest) is not None


async def test_the_model_does_not_move_while_its_state_is_read() -> None:
    async with swarm() as s:
        holder = await s.add()
        snapshots, moved = Snapshots(holder.blobs), trio.Event()
        first = live(1, torch.full((8,), 1.0))
        snapshots.keep(first)
        await snapshots.settle(first)

        async def move() -> None:
            await snapshots.moving()
            moved.set()

        with first.read():
            s.nursery.start_soon(move)
            await trio.sleep(5.0)
            assert not moved.is_set()
        await trio.sleep(0.1)
        assert moved.is_set()
