"""The light world of many peers: bits of the full protocol, its times and bytes, and what strategies may rely on."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import ClassVar

import attrs
import pytest
import torch

from shoal.learning import exact, topologies
from shoal.learning.peer import Peer
from shoal.learning.reduce.codecs import INT8, ErrorFeedback
from shoal.learning.strategies.base import Strategy
from shoal.node.node import Founding
from shoal.sim.field import Churn, FieldCase, FieldResult, identity_of, run_field
from shoal.sim.field_links import Line, Links
from shoal.sim.world import Scenario, simulate
from shoal.transport.errors import ConfigError
from shoal.transport.identity import PeerId
from shoal.transport.memory_flow import Route

from . import tiny

#: Fast enough that bytes take no time worth naming.
LINES = Links(Line(latency=0.02))


def case(strategy: str = "diloco", peers: int = 4, rounds: int = 3, **others: object) -> FieldCase:
    """Peers that pull towards targets of their own: see :mod:`tests.sim.tiny`."""
    args = {} if strategy == "allreduce" else {"inner_steps": 2}
    return FieldCase(strategy, args, peers, rounds, make_task=tiny.Pull, links=LINES, **others)  # type: ignore[arg-type]


def own(run: Callable[[Peer], Awaitable[None]], alike: bool = False, **others: object) -> FieldResult:
    """A field of a strategy that is ``run``, in one group. ``alike``: it says that its peers end with the same bits."""

    class Own(Strategy):
        replicated: ClassVar[bool] = alike

        async def run(self, peer: Peer) -> None:
            await run(peer)

    return run_field(attrs.evolve(case(**others), make_strategy=Own))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("strategy", "codec", "args"),
    [
        ("diloco", "fp32", {"inner_steps": 5}),
        ("diloco", "int8", {"inner_steps": 5}),
        ("allreduce", "fp32", {}),
    ],
)
def test_four_peers_end_with_the_bits_of_the_full_protocol(strategy: str, codec: str, args: dict[str, float]) -> None:
    rounds, seed = 3, 3
    founding = Founding(
        strategy=strategy, strategy_args=tuple(args.items()), min_peers=4, rounds=rounds, seed=seed, codec=codec
    )
    world = simulate(Scenario(4, founding, seed=seed, route=Route(latency=0.04)))
    links = Links(Line(latency=0.04))
    field = run_field(FieldCase(strategy, args, 4, rounds, seed=seed, codec=codec, links=links))
    for member in world.live():
        assert torch.equal(field.weights[member.number], member.run.weights())
    # And a round takes as long: from one commit to the next on the same peer.
    reports = world.members[1].run.reports
    real = (reports[-1].t - reports[0].t) / (rounds - 1)
    modelled = (field.rounds[-1].seconds - field.rounds[1].seconds) / (rounds - 1)
    assert modelled == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize("strategy", ["diloco", "noloco", "allreduce", "local"])
def test_the_same_seed_gives_the_same_bits_and_another_one_others(strategy: str) -> None:
    first, again, other = (run_field(case(strategy, seed=seed)) for seed in (1, 1, 2))
    assert first.digest() == again.digest() != other.digest()
    assert [point.round for point in first.rounds] == [0, 1, 2, 3]
    assert sorted(first.weights) == [0, 1, 2, 3]
    same = [torch.equal(first.weights[0], vector) for vector in first.weights.values()]
    assert all(same) == (strategy in ("diloco", "allreduce"))


def test_bytes_are_those_of_the_codec_and_of_messages() -> None:
    result = run_field(case(rounds=4, codec="int8"))
    reduce = result.rounds[1].bytes
    assert [point.bytes for point in result.rounds] == [reduce * n for n in range(5)]
    assert reduce == sum(result.rounds[1].sent)
    assert run_field(case("local")).sent == (0, 0, 0, 0)


def test_a_reduce_hides_behind_training_in_virtual_time() -> None:
    async def apart(peer: Peer) -> None:
        async for round in peer.rounds():
            await peer.train(20)
            await round.reduce(await peer.weights())

    async def together(peer: Peer) -> None:
        async for round in peer.rounds():
            await peer.train(1)
            handle = round.reduce_async(await peer.weights())
            await peer.train(19)
            await handle

    rounds, training, reduce = 4, 20 * tiny.Pull.step_seconds, 12 * 0.02
    one, both = own(apart, rounds=rounds).seconds, own(together, rounds=rounds).seconds
    assert one == pytest.approx(rounds * (training + reduce), rel=0.01)
    assert both == pytest.approx(rounds * training, rel=0.01)


def test_several_reduces_of_a_round_are_one_vector_and_one_membership() -> None:
    seen: dict[bytes, list[torch.Tensor]] = {}

    async def several(peer: Peer) -> None:
        async for round in peer.rounds():
            await peer.train(1)
            weights = await peer.weights()
            first = round.reduce_async(weights[:10], of=tiny.SIZE)
            await peer.train(1)
            second = round.reduce_async([weights[10:20].view(2, 5), weights[20:]])
            seen[peer.id] = [weights, await first, *await second]

    result = own(several, rounds=1)
    parts = [seen[peer.key] for peer in sorted(identity_of(0, number) for number in range(4))]
    mean = exact.weighted_mean([weights for weights, *_ in parts], [1.0] * 4)
    for _, first, second, third in parts:
        assert second.shape == (2, 5)
        assert torch.equal(torch.cat([first, second.view(-1), third]), mean)
    assert result.rounds[1].seconds == pytest.approx(2 * 0.05 + 10 * 0.02, abs=1e-3)  # ready and plan hide


def test_who_gives_nothing_takes_the_mean_of_the_others() -> None:
    seen: dict[bytes, tuple[torch.Tensor, torch.Tensor]] = {}
    quiet = min(identity_of(0, number) for number in range(4)).key

    async def some(peer: Peer) -> None:
        async for round in peer.rounds():
            await peer.train(1)
            mine = await peer.weights()
            seen[peer.id] = mine, await round.reduce(mine, why="not drawn" if peer.id == quiet else "")

    own(some, rounds=1)
    given = [mine for peer, (mine, _) in sorted(seen.items()) if peer != quiet]
    for _, result in seen.values():
        assert torch.equal(result, exact.weighted_mean(given, [1.0] * 3))


def test_what_is_not_finite_is_not_given_and_told() -> None:
    broken = identity_of(0, 2).key

    async def spoilt(peer: Peer) -> None:
        async for round in peer.rounds():
            await peer.train(1)
            mine = await peer.weights()
            assert torch.isfinite(await round.reduce(mine * torch.nan if peer.id == broken else mine)).all()

    result = own(spoilt, rounds=1)
    assert [(number, why[:12]) for _, number, why in result.notes] == [(2, "NaN at 0; 64")]


def test_error_feedback_is_settled_with_each_round() -> None:
    kept: dict[bytes, ErrorFeedback] = {}

    async def coded(peer: Peer) -> None:
        feedback = kept[peer.id] = ErrorFeedback(INT8, tiny.SIZE)
        async for round in peer.rounds():
            await peer.train(1)
            await round.reduce(await peer.weights(), codec="int8", feedback=feedback)

    own(coded, rounds=2)
    assert all(feedback.residual.abs().max() > 0 for feedback in kept.values())


def test_a_reduce_that_nobody_awaits_and_one_outside_of_a_round_are_errors() -> None:
    async def careless(peer: Peer) -> None:
        async for round in peer.rounds():
            await peer.train(1)
            round.reduce_async(await peer.weights())

    with pytest.raises(ConfigError, match="never awaited"):
        own(careless)

    async def idle(peer: Peer) -> None:
        async for _ in peer.rounds():
            await peer.train(1)

    with pytest.raises(ConfigError, match="without a reduce and without skip"):
        own(idle)


def test_a_straggler_is_waited_for_as_long_as_a_run_would_and_then_left_out() -> None:
    # Two steps of 0.05 s; grace is 3 s and the round trips.
    patient = run_field(case(slowness={3: 20.0}))
    assert patient.rounds[1].seconds == pytest.approx(2 * 0.05 * 20 + 0.24, abs=0.01)
    left = run_field(case(slowness={3: 100.0}))
    # It is in a step of 5 s, which it ends; then it fetches what was decided without it.
    assert left.rounds[1].seconds == pytest.approx(100 * 0.05 + 2 * 0.02, abs=0.01)
    assert left.rounds[1].sent[3] == 0
    same = [torch.equal(left.weights[0], vector) for vector in left.weights.values()]
    assert all(same)
    assert left.digest() == run_field(case(slowness={3: 100.0}, batched=False)).digest()


def test_a_time_budget_lets_the_quick_do_more_and_weighs_what_they_give() -> None:
    result = run_field(case(slowness={0: 3.0}, time_budget=0.5))
    assert result.rounds[1].seconds == pytest.approx(0.5 + 0.24, abs=0.15)


@pytest.mark.parametrize("strategy", ["diloco", "noloco"])
def test_who_leaves_is_not_waited_for_and_who_joins_goes_on_from_the_state_of_others(strategy: str) -> None:
    churn = (Churn(0.12, 1, "leave"), Churn(0.5, 4, "join"), Churn(0.9, 1, "join"))
    result = run_field(case(strategy, peers=5, rounds=8, churn=churn))
    assert result.digest() == run_field(case(strategy, peers=5, rounds=8, churn=churn)).digest()
    assert [point.peers for point in result.rounds][:2] == [4, 3]
    assert result.rounds[-1].peers == 5
    assert sorted(result.weights) == [0, 1, 2, 3, 4]
    # Nobody lost a grace of three seconds to it.
    assert result.seconds < 8 * 1.0
    if strategy == "diloco":
        assert all(torch.equal(result.weights[0], vector) for vector in result.weights.values())


def test_replicas_that_differ_are_an_error() -> None:
    async def stray(peer: Peer) -> None:
        async for round in peer.rounds():
            await peer.train(1)
            await round.reduce(await peer.weights())

    with pytest.raises(RuntimeError, match="replicas differ after round 1"):
        own(stray, alike=True)


@pytest.mark.parametrize("topology", ["all", "random", "grid", "ring", "full", "regular:3", "barabasi-albert:2"])
def test_gossip_runs_on_every_topology(topology: str) -> None:
    result = run_field(case("noloco", peers=9, rounds=6, topology=topology))
    assert len(result.weights) == 9
    # All pull towards each other.
    spread = torch.stack(list(result.weights.values())).std(0).mean()
    apart = torch.stack(list(run_field(case("local", peers=9, rounds=6)).weights.values())).std(0).mean()
    assert spread < 0.8 * apart
    with pytest.raises(ConfigError, match="is for strategies that gossip"):
        run_field(case("diloco", topology=topology))


def test_three_peers_of_a_gossip_run_meet_along_the_ring_in_the_full_protocol_too() -> None:
    founding = Founding(
        strategy="noloco", strategy_args=(("inner_steps", 2.0),), min_peers=5, rounds=6, topology="ring"
    )
    world = simulate(Scenario(5, founding, make_task=tiny.Pull, route=Route(latency=0.02)))
    ids = [identity_of(0, number) for number in range(5)]
    edges = topologies.neighbours("ring", 0, ids)
    pairs = 0
    for member in world.live():
        for report in member.run.reports:
            others = [peer for peer in report.members if peer != member.peer]
            pairs += len(others)
            assert all(PeerId.parse(other) in edges[PeerId.parse(member.peer)] for other in others)
    assert pairs == 6 * 4  # two pairs in each round, one peer alone
    field = run_field(FieldCase("noloco", {"inner_steps": 2}, 5, 6, make_task=tiny.Pull, topology="ring"))
    for member in world.live():
        assert torch.equal(field.weights[member.number], member.run.weights())
