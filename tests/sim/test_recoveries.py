"""`--recovery`: what a stage that nobody holds goes on with, on whole nodes in virtual time; and what is refused."""

from __future__ import annotations

from typing import ClassVar

import attrs
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.learning.pipeline.cutting import stages_of
from shoal.learning.pipeline.rescue import check_recovery, drawn
from shoal.learning.spec import RECOVERIES, BadSpec, Pipeline, SignedSpec
from shoal.learning.state import Layout, flatten_model
from shoal.learning.tasks.stdlib import Blocks, StdlibSmall
from shoal.node.node import Founding
from shoal.node.stages import cut_of
from shoal.sim.world import Member, Scenario, World, simulate
from shoal.transport.errors import ConfigError
from shoal.transport.identity import Identity

from .test_stages import Chain, founding, stage_of

LOST, STAGES = 1, 4


class Equal(Chain):
    """Three stages alike, and a last one. Who hands on what it gets is the identity."""

    name: ClassVar[str] = "equal"

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3))

    def silence(self, stage: nn.Module) -> None:
        assert isinstance(stage, nn.Sequential)
        (layer,) = stage
        if layer.out_features != 6:
            super().silence(stage)
        nn.init.eye_(layer.weight)
        nn.init.zeros_(layer.bias)


def rescued(recovery: str, stage: int = LOST) -> tuple[str, Tensor, dict[int, list[Tensor]]]:
    """The only holder of ``stage`` dies after some rounds: what is said of it, the weights that it goes on with, and
    those that every stage had after each round."""
    details: list[tuple[str, Tensor]] = []
    seen: dict[int, list[Tensor]] = {each: [] for each in range(STAGES)}
    done = dict.fromkeys(range(STAGES), 0)

    async def script(world: World) -> None:
        def note(member: Member, event: object) -> None:
            staged = member.node.staged
            trainer = None if staged is None else staged.staged.trainer
            if trainer is None:
                return
            if getattr(event, "what", "") == "recovered":
                now = flatten_model(Layout.of(trainer.model), trainer.model)
                details.append((event.detail, now))  # type: ignore[attr-defined]
            elif (getattr(event, "phase", ""), getattr(event, "what", "")) == ("commit", "done") and not details:
                seen[trainer.stage].append(member.run.snapshots[-1].vectors["weights"].clone())
                done[trainer.stage] = member.run.round

        world.hooks.append(note)
        await world.until(lambda: done[stage] >= 7, "7 rounds")  # what others keep is not of the beginning any more
        holders = [member for member in world.live() if stage_of(member) == stage]
        for member in holders:
            world.kill(member.number)

    simulate(Scenario(6, founding(STAGES, 6, rounds=14, recovery=recovery), make_task=Equal, limit=120), script)
    ((detail, weights),) = details
    return detail, weights, seen


def test_a_copy_is_the_stage_before_it_bit_for_bit() -> None:
    detail, weights, seen = rescued("copy")
    assert detail == "stage 1: a copy of stage 0, as is wanted"
    assert any(torch.equal(weights, each) for each in seen[0])


def test_a_stage_that_is_skipped_hands_on_what_it_gets() -> None:
    detail, weights, _ = rescued("skip")
    assert "it hands on what it gets" in detail
    assert torch.equal(weights, torch.cat([torch.eye(6).flatten(), torch.zeros(6)]))


def test_random_weights_are_neither_what_was_lost_nor_what_it_began_with() -> None:
    detail, weights, seen = rescued("random")
    assert detail == "stage 1: weights drawn anew, as is wanted"
    torch.manual_seed(0)
    first = stages_of(Equal(), STAGES)[LOST]
    assert not torch.equal(weights, flatten_model(Layout.of(first), first))
    assert not any(torch.equal(weights, each) for stage in seen.values() for each in stage)
    # As the layer draws them: in ±1/√6.
    assert 0.1 < float(weights.abs().max()) <= 6**-0.5


def test_what_is_kept_is_a_state_that_the_stage_was_in() -> None:
    detail, weights, seen = rescued("kept")
    assert "the checkpoint of it after round" in detail
    assert any(torch.equal(weights, each) for each in seen[LOST])


def test_by_default_it_is_the_mean_of_its_neighbours() -> None:
    detail, weights, seen = rescued("checkfree")
    assert "the mean of stages 0 and 2" in detail
    assert not any(torch.equal(weights, each) for stage in seen.values() for each in stage)


@pytest.mark.parametrize("recovery", ["copy", "skip"])
def test_where_it_cannot_be_had_the_usual_order_is_gone_through(recovery: str) -> None:
    # The last stage is built otherwise than all others, and cannot hand on what it gets.
    detail, weights, seen = rescued(recovery, STAGES - 1)
    assert "the checkpoint of it after round" in detail
    assert any(torch.equal(weights, each) for each in seen[STAGES - 1])


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_unknown_names_and_runs_without_stages_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="--recovery hope: one of checkfree, kept, copy, skip, random"):
        cut_of(Founding(stages=4, recovery="hope"), own_loop=False, origin=False, apart=False)
    with pytest.raises(ConfigError, match="--recovery are for runs with --stages"):
        cut_of(Founding(recovery="copy"), own_loop=False, origin=False, apart=False)


def test_what_a_task_can_never_do_is_refused_before_anything_is_signed() -> None:
    for recovery in RECOVERIES:
        check_recovery(Equal(), Pipeline(4, 1, recovery=recovery))
    with pytest.raises(ConfigError, match="--recovery skip: task chain has no stage that can be skipped"):
        check_recovery(Chain(), Pipeline(3, 1, recovery="skip"))
    with pytest.raises(ConfigError, match="--recovery copy: task chain in 3 stages has none that is built like"):
        check_recovery(Chain(), Pipeline(3, 1, recovery="copy"))


def test_nobody_follows_a_run_whose_recovery_it_does_not_know() -> None:
    world = simulate(Scenario(2, founding(2, 2, rounds=1), make_task=Chain, limit=60))
    signed = world.members[0].node.signed
    assert signed is not None
    spec = signed.open()
    assert spec.pipeline is not None
    identity = Identity(bytes(32))
    odd = attrs.evolve(spec, founder=identity.peer_id, pipeline=attrs.evolve(spec.pipeline, recovery="hope"))
    with pytest.raises(BadSpec, match="with the recovery 'hope' of stages"):
        SignedSpec.sign(identity, odd).open()


def test_blocks_of_the_built_in_task_can_be_skipped_and_its_ends_cannot() -> None:
    task = StdlibSmall()
    assert [drawn(task, 4, stage, 7, silent=True) is not None for stage in range(4)] == [False, True, True, False]
    blocks = stages_of(task, 4)[1]
    assert isinstance(blocks, Blocks)
    x = torch.randn(2, 5, task.width)
    with torch.no_grad():
        for parameter in blocks.parameters():
            parameter.add_(0.1)
        assert not torch.equal(blocks(x), x)
        task.silence(blocks)
        assert torch.equal(blocks(x), x)
    assert F.mse_loss(blocks(x), x) == 0
