"""Strategies against known answers, by hand and against torch, and as swarms in virtual time."""

from __future__ import annotations

import random
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import attrs
import pytest
import torch
from torch import Tensor, nn

from shoal.learning import exact
from shoal.learning.faults import Faults
from shoal.learning.strategies import BUILTIN, resolve
from shoal.learning.strategies.noloco import Momentum, NoLoCo
from shoal.learning.strategies.outer import Nesterov
from shoal.node.node import Founding
from shoal.sim.world import Scenario, World, simulate
from shoal.transport.errors import ConfigError
from shoal.transport.memory import Route

from ..sim.tiny import RATE, SIZE, Pull, target

# -- outer steps ----------------------------------------------------------------------------------------

GRADIENTS = (1.0, 0.5, -0.2, 0.3)


def test_the_outer_step_gives_the_known_answers_of_nesterov() -> None:
    outer, at, found = Nesterov(0.7, 0.9), torch.zeros(1), []
    for gradient in GRADIENTS:
        at = outer.step(at, torch.tensor([gradient]))
        found.append(at.item())
    assert found == pytest.approx([-1.33, -2.562, -3.0898, -4.08982], abs=1e-6)


def test_the_outer_step_is_that_of_torch() -> None:
    generator = torch.Generator().manual_seed(1)
    at = torch.randn(50, generator=generator)
    parameter = nn.Parameter(at.clone())
    theirs, ours = torch.optim.SGD([parameter], lr=0.4, momentum=0.8, nesterov=True), Nesterov(0.4, 0.8)
    for _ in range(20):
        gradient = torch.randn(50, generator=generator)
        parameter.grad = gradient.clone()
        theirs.step()
        at = ours.step(at, gradient)
    torch.testing.assert_close(at, parameter.detach(), rtol=1e-5, atol=1e-6)


def test_without_momentum_and_with_rate_one_the_outer_step_only_subtracts() -> None:
    start, gradient = torch.randn(9), torch.randn(9)
    assert torch.equal(Nesterov(1.0, 0.0).step(start, gradient), start - gradient)


def test_the_outer_step_leaves_its_inputs_alone_and_goes_on_from_its_saved_state() -> None:
    one, start, gradient = Nesterov(0.7, 0.9), torch.randn(9), torch.randn(9)
    kept = start.clone(), gradient.clone()
    one.step(start, gradient)
    assert torch.equal(start, kept[0]) and torch.equal(gradient, kept[1])
    other = Nesterov(0.7, 0.9)
    other.restore(one.vectors())
    assert torch.equal(one.step(start, gradient), other.step(start, gradient))
    other.restore({})
    assert other.vectors() == {}


# -- NoLoCo ---------------------------------------------------------------------------------------------


def pull_together(rule: Any, rounds: int, peers: int = 16, size: int = 64) -> Tensor:
    """Peers that do not train: their weights after ``rounds`` rounds of random pairs, shape (peers, size)."""
    phis = list(torch.randn(peers, size, generator=torch.Generator().manual_seed(3)))
    outers, chance = [Momentum() for _ in phis], random.Random(5)
    zero = torch.zeros(size)
    for _ in range(rounds):
        order = chance.sample(range(peers), peers)
        for a, b in zip(order[::2], order[1::2], strict=True):
            mean = exact.weighted_mean([phis[a], phis[b]], [1.0, 1.0])
            for one in (a, b):
                phis[one] = exact.add(phis[one], outers[one].step(rule, phis[one], zero, mean))
    return torch.stack(phis)


def rule(alpha: float, gamma: float, beta: float = 0.7) -> NoLoCo:
    """The step's parameters, also those that :class:`NoLoCo` refuses."""
    return cast(NoLoCo, SimpleNamespace(alpha=alpha, beta=beta, gamma=gamma))


def test_a_pair_with_gamma_one_and_no_momentum_agrees_after_one_step() -> None:
    phis = pull_together(rule(0.0, 1.0), rounds=1, peers=2)
    torch.testing.assert_close(phis[0], phis[1], rtol=0, atol=1e-6)


def test_without_gamma_peers_never_agree() -> None:
    before, after = pull_together(rule(0.5, 0.0), 0), pull_together(rule(0.5, 0.0), 30)
    assert torch.equal(before, after)


@pytest.mark.parametrize(("alpha", "stable"), [(0.5, 1.5), (0.0, 2.0), (0.9, 0.38)])
def test_peers_agree_exactly_for_the_gammas_that_are_allowed(alpha: float, stable: float) -> None:
    assert pull_together(rule(alpha, 0.8 * stable), 300).std(0).max() < 0.05
    assert pull_together(rule(alpha, 1.25 * stable), 300).std(0).max() > 10
    NoLoCo(alpha=alpha, gamma=0.99 * stable)
    with pytest.raises(ValueError, match="unstable"):
        NoLoCo(alpha=alpha, gamma=1.01 * stable)


def test_the_error_of_an_unstable_gamma_names_the_bound() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve("noloco", {"alpha": 0.9, "gamma": 0.7})
    assert str(caught.value).endswith(
        "strategy noloco: gamma 0.7 is unstable with alpha 0.9: it must be below 2 (1 - alpha²) = 0.38"
    )


def test_peers_move_where_their_training_went_and_not_away_from_it() -> None:
    # The paper's eq. 1 has the opposite sign and diverges.
    phi, delta = torch.zeros(3), torch.tensor([1.0, -2.0, 0.0])
    step = Momentum().step(rule(0.5, 0.7, beta=0.5), phi, delta, phi)
    assert torch.equal(step, torch.tensor([0.5, -1.0, 0.0]))


def test_the_momentum_of_a_peer_goes_on_from_its_saved_state() -> None:
    one, other, phi, delta = Momentum(), Momentum(), torch.randn(5), torch.randn(5)
    one.step(rule(0.5, 0.7), phi, delta, phi)
    other.restore(one.vectors())
    assert torch.equal(one.step(rule(0.5, 0.7), phi, delta, phi), other.step(rule(0.5, 0.7), phi, delta, phi))


# -- parameters -----------------------------------------------------------------------------------------


def test_every_built_in_strategy_has_sound_defaults() -> None:
    for name in BUILTIN:
        strategy = resolve(name, {})
        again = resolve(name, {f.name: getattr(strategy, f.name) for f in attrs.fields(type(strategy))})  # type: ignore[arg-type]
        assert strategy == again


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("dilico", {}, "unknown strategy 'dilico': built-in strategies are allreduce, async, co2, diloco"),
        ("os.path", {}, "unknown strategy 'os.path'"),
        ("diloco", {"lr": 1.0}, "strategy diloco has no parameter 'lr'; it has inner_steps=20, outer_lr=0.7"),
        ("allreduce", {"lr": 1.0}, "strategy allreduce has no parameter 'lr'; it has none"),
        ("diloco", {"inner_steps": 2.5}, "inner_steps must be a whole number, got 2.5"),
        ("diloco", {"inner_steps": 0.0}, "inner_steps must be above 0, got 0"),
        ("diloco", {"outer_lr": -1.0}, "outer_lr must be above 0, got -1.0"),
        ("diloco", {"momentum": 1.0}, "momentum must be in 0..1 (1 excluded), got 1.0"),
        ("local", {"inner_steps": -5.0}, "inner_steps must be above 0, got -5"),
        ("diloco", {"outer_lr": float("nan")}, "outer_lr must be a finite number, got nan"),
        ("diloco", {"outer_lr": float("inf")}, "outer_lr must be a finite number, got inf"),
        ("diloco", {"inner_steps": float("inf")}, "inner_steps must be a finite number, got inf"),
        ("diloco", {"inner_steps": float("nan")}, "inner_steps must be a finite number, got nan"),
    ],
)
def test_parameters_that_do_not_exist_or_make_no_sense_are_named(
    name: str, args: dict[str, float], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(name, args)
    assert message in str(caught.value)


# -- swarms ---------------------------------------------------------------------------------------------


def swarm(
    strategy: str, args: dict[str, float], nodes: int, rounds: int, make_task: type = Pull, **more: Any
) -> Scenario:
    founding = Founding(strategy=strategy, strategy_args=tuple(args.items()), min_peers=nodes, rounds=rounds)
    return partial(Scenario, nodes, founding, make_task=make_task, route=Route(latency=0.02))(**more)


def weights(world: World) -> list[Tensor]:
    return [member.run.weights() for member in world.live()]


def pulled(start: Tensor, peers: list[bytes], steps: int) -> Tensor:
    """Plain SGD on the mean gradient of ``peers``, with torch."""
    at = nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([at], lr=RATE)
    for _ in range(steps):
        grads = [at.detach() - target(peer) for peer in peers]
        at.grad = exact.weighted_mean(grads, [1.0] * len(grads))
        optimizer.step()
    return at.detach()


def begun(world: World) -> Tensor:
    """The weights of round 0, from a hook that saw them."""
    return cast(Tensor, world.beginning)  # type: ignore[attr-defined]


async def remember_beginning(world: World) -> None:
    founder = world.members[0]
    await world.until(lambda: founder.node.run_here is not None and bool(founder.run.snapshots), "a first state")
    world.beginning = founder.run.snapshots[0].vectors["weights"].clone()  # type: ignore[attr-defined]
    assert founder.run.snapshots[0].round == 0


def test_local_training_of_one_peer_is_plain_training_bit_for_bit() -> None:
    world = simulate(swarm("local", {"inner_steps": 3}, 1, 4), remember_beginning)
    (found,) = weights(world)
    assert torch.equal(found, pulled(begun(world), [world.members[0].run.me.key], 12))


def test_data_parallel_training_of_one_peer_is_plain_training_bit_for_bit() -> None:
    world = simulate(swarm("allreduce", {}, 1, 6), remember_beginning)
    (found,) = weights(world)
    assert torch.equal(found, pulled(begun(world), [world.members[0].run.me.key], 6))


def test_data_parallel_training_steps_with_the_mean_gradient_of_all_bit_for_bit() -> None:
    world = simulate(swarm("allreduce", {}, 4, 6), remember_beginning)
    found, peers = weights(world), sorted(member.run.me for member in world.live())
    assert all(torch.equal(found[0], other) for other in found)
    assert torch.equal(found[0], pulled(begun(world), [peer.key for peer in peers], 6))


def test_one_peer_of_diloco_with_a_plain_outer_step_trains_as_if_alone() -> None:
    world = simulate(swarm("diloco", {"inner_steps": 5, "outer_lr": 1.0, "momentum": 0.0}, 1, 4), remember_beginning)
    (found,) = weights(world)
    plain = pulled(begun(world), [world.members[0].run.me.key], 20)
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-6)


def test_diloco_with_one_inner_step_and_a_plain_outer_step_is_data_parallel_training() -> None:
    world = simulate(swarm("diloco", {"inner_steps": 1, "outer_lr": 1.0, "momentum": 0.0}, 4, 6), remember_beginning)
    found, peers = weights(world), sorted(member.run.me for member in world.live())
    assert all(torch.equal(found[0], other) for other in found)
    parallel = pulled(begun(world), [peer.key for peer in peers], 6)
    torch.testing.assert_close(found[0], parallel, rtol=1e-5, atol=1e-6)


def test_noloco_pairs_draw_together_and_to_what_all_want() -> None:
    world = simulate(swarm("noloco", {"inner_steps": 2}, 6, 15))
    found = torch.stack(weights(world))
    wanted = torch.stack([target(member.run.me.key) for member in world.live()])
    assert found.std(0).mean() < 0.75 * wanted.std(0).mean()
    assert (found.mean(0) - wanted.mean(0)).abs().mean() < 0.3


def test_peers_that_train_locally_end_at_what_each_of_them_wants() -> None:
    world = simulate(swarm("local", {"inner_steps": 5}, 3, 8))
    for member in world.live():
        torch.testing.assert_close(member.run.weights(), target(member.run.me.key), rtol=1e-3, atol=1e-3)


class Adaptive(Pull):
    """With an optimiser that has a state."""

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=0.05)


def test_a_contribution_that_is_not_a_number_leaves_a_replicated_optimiser_alone() -> None:
    world = simulate(swarm("allreduce", {}, 3, 8, Adaptive, faults={1: Faults(spoil=(3, 4))}))
    assert len({member.run.digest() for member in world.live()}) == 1
    assert not any(event.what in ("step-aside", "out-of-step") for m in world.live() for event in m.events)
    for report in world.members[0].run.reports:
        assert (world.members[1].peer in report.members) == (report.round not in (3, 4))


def test_whoever_joins_late_takes_over_the_replicated_optimiser() -> None:
    async def script(world: World) -> None:
        founder = world.members[0]
        await world.until(lambda: founder.node.run_here is not None and founder.run.round >= 3, "round 3")
        world.start(3)

    world = simulate(swarm("allreduce", {}, 3, 20, Adaptive, late=(3,)), script)
    assert len({member.run.digest() for member in world.live()}) == 1
    assert len(world.members[3].run.reports) > 5
    names = world.members[3].run.snapshots[-1].vectors
    assert sum(vector.numel() == SIZE for vector in names.values()) == 3
