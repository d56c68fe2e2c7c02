"""States of past rounds: which are kept, how they are found, and what a run can begin with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import pytest
import safetensors.torch
import torch
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.dht.blobs.store import Store
from shoal.learning import defaults
from shoal.learning.checkpoint_index import CheckpointNote
from shoal.learning.checkpoints import (
    Checkpoints,
    Keeping,
    checkpoint_due,
    read_model,
    write_model,
)
from shoal.learning.files import load_state
from shoal.learning.rounds.messages import Certificate, CommitRecord
from shoal.learning.snapshots import Snapshot
from shoal.learning.spec import ParameterSpec, RunSpec
from shoal.learning.store import Head
from shoal.learning.sync import state_digest
from shoal.node.checkpoints import list_checkpoints, pin_checkpoint, restore_checkpoint
from shoal.node.node import Founding, NodeConfig
from shoal.sim.world import Member, World, simulate
from shoal.transport.errors import ConfigError, Overloaded, RemoteError
from shoal.transport.identity import Identity

from ..sim import tiny

RUN = b"r" * 32
ME = Identity(b"i" * 32).peer_id
SPEC = RunSpec(
    "pull", b"", "diloco", (), 0, "available", 0, 1, 0, (ParameterSpec("at", (8, 2), "float32"),), ME, 0.0
)  # fmt: skip


def snapshot(round: int) -> Snapshot:
    vectors = {"weights": torch.arange(16.0) + round, "outer.momentum": torch.full((16,), 0.5 * round)}
    record = CommitRecord(RUN, round, "reduce", RUN, (), (), (), (ME,), 0, 0, b"", (), "", b"", "")
    return Snapshot(round, vectors, Head(record, Certificate(b"", 0, ()), (ME,)))


def note(round: int) -> CheckpointNote:
    return CheckpointNote(RUN, round, 1e9 + round)


# --- which ------------------------------------------------------------------------------------------------------------


def kept(pace: float, keeping: Keeping, rounds: int, first: int = 0) -> list[int]:
    """The rounds that are kept of a run that does one every ``pace`` seconds."""
    last, since, found = first, first * pace, []
    for round in range(first, rounds + 1):
        if checkpoint_due(keeping, round, last, since, round * pace)[0]:
            last, since = round, round * pace
            found.append(round)
    return found


def test_every_tenth_round_is_kept_and_in_slow_runs_one_in_five_minutes() -> None:
    assert kept(4.0, Keeping(), 40) == [10, 20, 30, 40]
    assert kept(200.0, Keeping(), 8) == [2, 4, 6, 8]
    assert kept(4.0, Keeping(every=0), 40) == []
    assert kept(0.01, Keeping(7, apart=0.0), 22) == [7, 14, 21]


def test_quick_runs_keep_multiples_that_lie_half_a_minute_apart() -> None:
    found = kept(0.1, Keeping(), 3000)
    assert found[:4] == [320, 640, 960, 1280]


@settings(max_examples=15, deadline=None)
@given(pace=st.floats(0.01, 20.0), first=st.integers(0, 500))
def test_who_came_later_keeps_the_same_rounds(pace: float, first: int) -> None:
    early, late = kept(pace, Keeping(), 2000), kept(pace, Keeping(), 2000, first)
    common = set(early) & set(late)
    assert len(common) >= len(late) // 2 - 1


def test_the_last_ones_stay_and_those_that_are_pinned() -> None:
    checkpoints = Checkpoints(Store(None))
    checkpoints.save(snapshot(10), note(10), 3)
    checkpoints.pin("10", True)
    for round in range(20, 80, 10):
        checkpoints.save(snapshot(round), note(round), 3)
    assert [found.round for found in checkpoints.known()] == [10, 50, 60, 70]
    checkpoints.pin("10", False)
    checkpoints.save(snapshot(80), note(80), 3)
    assert [found.round for found in checkpoints.known()] == [60, 70, 80]


def test_a_full_store_is_named_and_what_was_kept_stays() -> None:
    checkpoints = Checkpoints(Store(None, 900))
    checkpoints.save(snapshot(10), note(10), 3)
    checkpoints.pin("10", True)
    with pytest.raises(Overloaded, match="quota"):
        checkpoints.save(snapshot(20), note(20), 3)
    assert [found.round for found in checkpoints.known()] == [10]


# --- finding and reading ----------------------------------------------------------------------------------------------


def test_a_checkpoint_is_named_by_its_round_or_the_beginning_of_its_digest(tmp_path: Path) -> None:
    checkpoints = Checkpoints(Store(tmp_path))
    for round in (10, 20):
        checkpoints.save(snapshot(round), note(round), 3)
    digest = state_digest(20, snapshot(20).vectors).hex()
    assert checkpoints.find("20").digest == checkpoints.find(digest[:6]).digest == digest
    assert checkpoints.find(digest.upper()).round == 20
    branch = attrs.evolve(snapshot(20), vectors={"weights": torch.zeros(16)})
    checkpoints.save(branch, note(20), 3)
    with pytest.raises(ConfigError, match="20 names 2 checkpoints"):
        checkpoints.find("20")
    for ref, said in (("30", "rounds kept: 10, 20, 20"), ("abc", "expected a round"), ("ffffffffff", "no checkpoint")):
        with pytest.raises(ConfigError, match=said):
            checkpoints.find(ref)
    checkpoints.store.close()


def test_a_checkpoint_comes_back_bit_for_bit_and_damage_is_named(tmp_path: Path) -> None:
    checkpoints = Checkpoints(Store(tmp_path))
    checkpoints.save(snapshot(10), note(10), 3)
    blob = bytes.fromhex(checkpoints.find("10").digest)
    round, vectors = checkpoints.load(blob, SPEC)
    assert round == 10
    assert state_digest(round, vectors) == blob
    file = Path(checkpoints.find("10").path)
    assert torch.equal(safetensors.torch.load_file(file)["weights"], snapshot(10).vectors["weights"])
    other = attrs.evolve(SPEC, parameters=(ParameterSpec("at", (4,), "float32"),))
    with pytest.raises(ConfigError, match="another model"):
        checkpoints.load(blob, other)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=f"{file.name[:16]}.*damaged or not complete"):
        checkpoints.load(blob, SPEC)
    assert not checkpoints.find("10").complete
    checkpoints.store.close()


# --- model files ------------------------------------------------------------------------------------------------------


def test_a_model_file_gives_back_the_state_to_the_same_strategy_and_the_weights_to_any(tmp_path: Path) -> None:
    path, vectors = tmp_path / "m.safetensors", snapshot(7).vectors
    assert write_model(path, SPEC, RUN, 7, vectors, b"d" * 32) == f"round 7, state {(b'd' * 8).hex()}"
    tensors, notes = load_state(path)
    assert tensors["at"].shape == (8, 2)
    assert notes["round"] == "7" and notes["strategy"] == "diloco"
    digest, found = read_model(path, SPEC.parameters, "diloco")
    assert sorted(found) == ["outer.momentum", "weights"]
    assert all(torch.equal(found[name], vectors[name]) for name in found)
    assert digest == state_digest(0, vectors)
    assert sorted(read_model(path, SPEC.parameters, "allreduce")[1]) == ["weights"]


def test_any_safetensors_file_with_the_model_s_tensors_will_do_and_others_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"at": torch.ones(8, 2)}, path)
    assert torch.equal(read_model(path, SPEC.parameters, "diloco")[1]["weights"], torch.ones(16))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"at": torch.ones(8, 3)}, "at is 8x3 float32 in the file, 8x2 float32 in the task"),
        ({"it": torch.ones(8, 2)}, "it 8x2 float32 in the file, missing in the task"),
        ({}, "at 8x2 float32 in the task, missing in the file"),
        ({"at": torch.full((8, 2), float("nan"))}, "not finite in weights"),
    ]
    for tensors, said in cases:
        safetensors.torch.save_file(tensors, path)
        with pytest.raises(ConfigError, match=said) as caught:
            read_model(path, SPEC.parameters, "diloco")
        assert str(path) in str(caught.value)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ConfigError, match="damaged"):
        read_model(path, SPEC.parameters, "diloco")
    with pytest.raises(ConfigError, match="there is no file"):
        read_model(tmp_path / "none", SPEC.parameters, "diloco")


# --- in a swarm -------------------------------------------------------------------------------------------------------


async def reach(world: World, round: int) -> None:
    await world.until(
        lambda: all(m.node.run_here is not None and m.run.round >= round for m in world.live()), "a round"
    )


def test_members_keep_the_same_states_and_help_each_other_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "CHECKPOINT_APART", 0.0)
    monkeypatch.setattr(Keeping.__init__, "__defaults__", (4, 0.0, 2, 1 << 30))
    found: list[str] = []

    async def script(world: World) -> None:
        await reach(world, 9)
        first, other = world.members[0], world.members[1]
        known = await list_checkpoints(first.run)
        assert [each.round for each in known] == [4, 8]
        assert [each.digest for each in await list_checkpoints(other.run)] == [each.digest for each in known]
        await pin_checkpoint(first.run, "4", True)
        # A member that does not hold it gets it from the others, by its whole digest.
        assert other.run.store.blobs.remove(bytes.fromhex(known[0].digest))
        with pytest.raises(ConfigError, match="no checkpoint 4 here"):
            await restore_checkpoint(other.run, "4", tmp_path / "no")
        said = await restore_checkpoint(other.run, known[0].digest, tmp_path / "there")
        assert said.startswith("round 4, ") and "fetched from" in said
        assert await restore_checkpoint(first.run, "4", tmp_path / "here")
        for name in ("here", "there"):
            digest, _ = read_model(tmp_path / name, first.run.spec.parameters, "diloco")
            found.append(digest.hex())
        again = {each.round: each for each in await list_checkpoints(other.run)}
        assert again[4].complete and again[4].when == 0
        with pytest.raises(RemoteError, match="nobody brings blob"):
            await restore_checkpoint(first.run, "ab" * 32, tmp_path / "none")
        assert not (tmp_path / "none").exists()
        # One whose disk went bad is mended by the others.
        store = first.run.store.blobs
        store._files.data[bytes.fromhex(known[0].digest)][-1] ^= 1  # type: ignore[attr-defined]
        assert "fetched from" in await restore_checkpoint(first.run, "4", tmp_path / "mended")
        assert (tmp_path / "mended").exists()

    simulate(tiny.scenario(3, 60), script)
    assert len(set(found)) == 1


def found_from(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever founds a run in a world begins with ``file``."""

    def config(**fields: Any) -> NodeConfig:
        made = NodeConfig(**fields)
        return attrs.evolve(made, origin=file) if made.founding is not None else made

    monkeypatch.setattr("shoal.sim.world.NodeConfig", config)


@pytest.mark.parametrize("strategy", ["diloco", "noloco"])
def test_a_run_founded_from_a_file_begins_with_its_weights_on_every_member(
    strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: dict[int, torch.Tensor] = {}
    file = tmp_path / "origin.safetensors"
    safetensors.torch.save_file({"at": torch.arange(float(tiny.SIZE))}, file)
    base = tiny.scenario(3, 4)
    founding = (
        attrs.evolve(base.founding, strategy=strategy, strategy_args=()) if strategy == "noloco" else base.founding
    )

    async def script(world: World) -> None:
        for member in world.members.values():
            await world.until(lambda m=member: m.node.run_here is not None and m.run.snapshots != [], "a state")  # type: ignore[misc]

    found_from(file, monkeypatch)

    def watch(world: World) -> None:
        def hook(member: Member, event: object) -> None:
            run = member.node.run_here
            if run is not None and run.snapshots and member.number not in begun:
                begun[member.number] = run.snapshots[0].vectors["weights"].clone()
                assert run.snapshots[0].round == 0

        world.hooks.append(hook)

    async def main(world: World) -> None:
        watch(world)
        await script(world)

    world = simulate(attrs.evolve(base, founding=founding), main)
    assert world.members[0].run.spec.origin == state_digest(0, {"weights": torch.arange(float(tiny.SIZE))})
    assert sorted(begun) == [0, 1, 2]
    assert all(torch.equal(weights, torch.arange(float(tiny.SIZE))) for weights in begun.values())
    if strategy == "diloco":
        assert len({member.run.digest() for member in world.live()}) == 1


def test_a_founder_whose_beginning_was_never_saved_does_not_begin_with_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "origin.safetensors"
    safetensors.torch.save_file({"at": torch.ones(tiny.SIZE)}, file)
    found_from(file, monkeypatch)

    async def script(world: World) -> None:
        await reach(world, 1)
        world.kill(0)
        # As if it had died after the spec was written, and before the state was.
        world._stored[0]._state = None
        world.restart(0)
        await trio.sleep(30.0)

    founding = Founding(strategy="diloco", strategy_args=tiny.PLAIN, min_peers=1, rounds=0)
    with pytest.raises(BaseExceptionGroup) as caught:
        simulate(attrs.evolve(tiny.scenario(1, 4), founding=founding), script)
    error = caught.value
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, ConfigError)
    assert "was not saved at its founding" in str(error)
