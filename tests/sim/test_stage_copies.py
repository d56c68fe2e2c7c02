"""Checkpoints of stages that peers keep for each other: two neighbours lost at once, restarts, forgeries, quotas."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable

import attrs
import msgpack
import pytest
import torch
import trio
from torch import Tensor, nn

from shoal.dht.blobs.files import MemoryFiles
from shoal.learning.checkpoint_index import COPY
from shoal.learning.pipeline.copies import Copies, guarded_by, kept_fault, sign_state
from shoal.learning.pipeline.messages import KEPT, AskKept, Kept
from shoal.sim.world import Member, Scenario, World, simulate
from shoal.transport.errors import DecodeError, RemoteRefused
from shoal.transport.identity import Identity
from shoal.transport.wire import pack, unpack

from ..hostile.samples import sample
from .test_stages import Chain, founding, stage_of


class Equal(Chain):
    """Four layers built alike, but for the last."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3))


def copies_of(member: Member) -> Copies:
    assert member.node.staged is not None
    return member.node.staged.staged.copies


def of_stage(world: World, *stages: int) -> list[Member]:
    return [
        m for m in world.live() if m.node.staged is not None and m.node.staged.crew.own.part and stage_of(m) in stages
    ]


async def after_round(world: World, round: int) -> None:
    await world.until(
        lambda: any(e.what == "done" and e.round >= round for m in world.live() for e in m.events), f"round {round}"
    )


class Watch:
    """Weights that stages had after their rounds, in their first generation; and what was said of recoveries."""

    def __init__(self, world: World) -> None:
        self.states: dict[tuple[int, int], Tensor] = {}
        self.recovered: dict[int, tuple[str, Tensor]] = {}
        world.hooks.append(self._event)

    def _event(self, member: Member, event: object) -> None:
        what = getattr(event, "what", "")
        if what == "recovered":
            run = copies_of(member).run
            assert run is not None and run.spec.part is not None and run.origin is not None
            self.recovered[run.spec.part.stage] = (event.detail, run.origin["weights"])  # type: ignore[attr-defined]
        elif what == "done" and member.run.spec.part is not None and not member.run.spec.part.generation:
            self.states[member.run.spec.part.stage, member.run.round] = member.run.weights()

    def check(self, stage: int) -> int:
        """``stage`` goes on exactly from what it was after a round, and says so; the round."""
        detail, weights = self.recovered[stage]
        assert "the checkpoint of it after round " in detail, detail
        round = int(detail.partition("after round ")[2].split(",")[0])
        assert torch.equal(weights, self.states[stage, round])
        return round


async def nothing(world: World) -> None:
    await trio.sleep(0)


def lost(*stages: int, then: Callable[[World], Awaitable[None]] = nothing) -> tuple[Watch, list[str]]:
    """Four peers in four stages; who holds ``stages`` is killed at the same moment, ``then`` two others come.

    What was seen, and what those who took the stages over say to ``shoal status``.
    """
    watches, said = list[Watch](), list[str]()

    async def script(world: World) -> None:
        watches.append(Watch(world))
        await after_round(world, 7)
        for member in of_stage(world, *stages):
            world.kill(member.number)
        await then(world)
        world.start(4)
        world.start(5)
        await world.until(lambda: len(watches[0].recovered) == 2, "both stages have a holder")
        # And training goes on.
        done = {member.number: rounds(member) for member in world.live()}
        await world.until(lambda: all(rounds(m) >= done[m.number] + 2 for m in world.live()), "two more rounds")
        for member in of_stage(world, *stages):
            assert member.node.staged is not None
            said.append(dict(member.node.staged.notes())["stage"])
        world.nursery.cancel_scope.cancel()

    scenario = Scenario(6, founding(4, 4, rounds=500), make_task=Equal, evaluate_every=0, limit=400, late=(4, 5))
    simulate(scenario, script)
    return watches[0], said


def rounds(member: Member) -> int:
    return 0 if member.node.staged is None else member.node.staged.crew.own.rounds


@pytest.mark.parametrize("stages", [(1, 2), (0, 1), (2, 3)])
def test_two_neighbours_lost_at_once_go_back_to_the_checkpoints_that_peers_keep(stages: tuple[int, int]) -> None:
    watch, said = lost(*stages)
    for stage, other in (stages, stages[::-1]):
        # Also the one that is taken over when its neighbour has a holder again: that one's weights are old.
        assert f"it was lost together with stage {other}; " in watch.recovered[stage][0]
        assert 1 <= watch.check(stage) <= 8
        assert " s ago, kept by " in watch.recovered[stage][0]
    # And `shoal status` says so for as long as it is held.
    assert sum("it was lost together with stage" in each for each in said) == 2


def test_checkpoints_of_lost_neighbours_outlive_a_restart_of_all_who_keep_them() -> None:
    copied: dict[int, list[int]] = {}

    async def restart(world: World) -> None:
        keepers = of_stage(world, 0, 3)
        assert len(keepers) == 2
        for member in keepers:
            # Only what is on disk outlives this: nobody who was there is left.
            copied[member.number] = sorted(copies_of(member)._mine)
            world.kill(member.number)
        await trio.sleep(3.0)
        for number in copied:
            world.start(number)
            await trio.sleep(0.5)

    watch, _ = lost(1, 2, then=restart)
    assert {stage for stages in copied.values() for stage in stages} >= {1, 2}
    for stage, other in ((1, 2), (2, 1)):
        assert f"it was lost together with stage {other}; " in watch.recovered[stage][0]
        watch.check(stage)


def test_one_generation_of_each_copy_is_kept_and_pinned_and_a_full_quota_stops_nobody() -> None:
    small = 2000

    async def script(world: World) -> None:
        # Too small for a copy of its own checkpoints' size and two of others.
        await world.until(lambda: all(m.node.run_here is not None for m in world.live()), "runs")
        world.members[2].node.store.blobs.quota = small

    world = simulate(Scenario(5, founding(4, 5, rounds=8), make_task=Equal, evaluate_every=0, limit=200), script)
    assert max(r.round for member in world.live() if stage_of(member) == 0 for r in member.run.reports) == 8
    for member in world.live():
        store = member.node.store.blobs
        kept = [entry for entry in store.entries() if entry.tag == COPY]
        if member.number == 2:
            assert store.used() <= small
            continue
        guarded = guarded_by(stage_of(member), 4)
        assert len([entry for entry in kept if entry.pinned]) == len(guarded) >= 1
        assert all(entry.complete for entry in kept)
        newest = {stage: copies_of(member)._mine[stage].kept.head.settled for stage in guarded}
        assert all(settled >= (7 if guarded[stage] else 3) for stage, settled in newest.items())


def test_a_state_counts_only_as_its_holders_signed_it() -> None:
    found: dict[str, str | None] = {}
    codes: list[str] = []

    async def script(world: World) -> None:
        await after_round(world, 3)
        (holder, *_), (other, *_) = of_stage(world, 1), of_stage(world, 0)
        kept = copies_of(holder)._here(1)
        old = next(iter(copies_of(other)._mine.values())).kept
        assert kept is not None and kept.head.settled >= 1
        staged = holder.node.staged
        assert staged is not None
        run, whole = staged.crew.run_id, staged.crew.spec
        stranger = Identity(b"7" * 32)

        def fault(kept: Kept, stage: int = 1) -> str | None:
            return kept_fault(kept, run, whole, stage, gossip=False)

        def changed(**changes: object) -> Kept:
            return attrs.evolve(kept, head=attrs.evolve(kept.head, **changes))

        other_digest = changed(digest=bytes(32))
        found.update(
            sound=fault(kept),
            stage=fault(kept, 2),
            digest=fault(other_digest),
            round=fault(changed(settled=kept.head.settled + 1)),
            record=fault(changed(record=attrs.evolve(kept.head.record, total=kept.head.record.total + 1))),
            unsigned=fault(attrs.evolve(kept, signed=())),
            twice=fault(attrs.evolve(kept, signed=kept.signed * 2)),
            stranger=fault(attrs.evolve(other_digest, signed=(sign_state(stranger, other_digest.head),))),
            another=fault(old, 1 if old.head.spec != kept.head.spec else 2),
        )
        # Whoever takes no part is told nothing, nor of another run.
        endpoint = holder.node.endpoint
        for run_asked, stage in ((bytes(32), 1), (run, 3)):
            try:
                await other.node.endpoint.call(endpoint.peer_id, KEPT, AskKept(run_asked, stage), timeout=3.0)
            except RemoteRefused as error:
                codes.append(error.code)

    simulate(Scenario(4, founding(4, 4, rounds=8), make_task=Equal, evaluate_every=0, limit=200), script)
    assert found.pop("sound") is None
    assert all(found.values()), found
    assert "signature" in (found["digest"] or "") and "none of its holders" in (found["stranger"] or "")
    assert codes[0] == "unknown-run"


def test_a_checkpoint_whose_bytes_have_changed_on_disk_is_not_gone_on_with() -> None:
    async def spoil(world: World) -> None:
        # Stage 1 is kept by the holder of stage 3 alone, and stage 2 by that of stage 0.
        (keeper,) = of_stage(world, 3)
        files = keeper.node.store.blobs._files
        assert isinstance(files, MemoryFiles)
        for entry in keeper.node.store.blobs.entries():
            if entry.tag == COPY:
                files.write(entry.id, len(files.data[entry.id]) - 8, b"\x55" * 8)

    watch, _ = lost(1, 2, then=spoil)
    assert "the checkpoint" not in watch.recovered[1][0]
    watch.check(2)


@pytest.mark.parametrize("settled", [-1, 1 << 63, -(1 << 63)])
def test_a_state_after_no_round_does_not_decode(settled: int) -> None:
    """Its id is signed with eight bytes of the round: another number would raise where it is looked at."""
    kept = sample(Kept, random.Random(1))
    raw = msgpack.unpackb(pack(kept))
    raw["head"]["settled"] = settled
    with pytest.raises(DecodeError, match="a state after round"):
        unpack(Kept, msgpack.packb(raw))
