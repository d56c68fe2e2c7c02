"""The light world of many peers: bits of the full protocol, its times and bytes, and what strategies may rely on."""

from __future__ import annotations

from collections.abc import Callable

import attrs
import pytest
import torch

from shoal.learning.peer import Peer
from shoal.learning.strategies.base import Strategy
from shoal.node.node import Founding
from shoal.sim.field import FieldCase, FieldResult, run_field
from shoal.sim.field_links import Line, Links
from shoal.sim.world import Scenario, simulate
from shoal.transport.memory_flow import Route

from . import tiny

#: Fast enough that bytes take no time worth naming.
LINES = Links(Line(latency=0.02))


def case(strategy: str = "diloco", peers: int = 4, rounds: int = 3, **others: object) -> FieldCase:
    """Peers that pull towards targets of their own: see :mod:`tests.sim.tiny`."""
    args = {} if strategy == "allreduce" else {"inner_steps": 2}
    return FieldCase(strategy, args, peers, rounds, make_task=tiny.Pull, links=LINES, **others)  # type: ignore[arg-type]


def own(run: Callable[[Peer], object], **others: object) -> FieldResult:
    """A field of a strategy that is ``run``."""

    @attrs.frozen
    class Own(Strategy):
        async def run(self, peer: Peer) -> None:
            await run(peer)  # type: ignore[misc]

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
