"""Modelled reduces beside those of the full protocol: seconds and bytes."""

from __future__ import annotations

import hashlib

import pytest

from shoal.learning.reduce.codecs import resolve
from shoal.sim.field_links import CONTROL, MESSAGE, Line, cost, longest, transfer
from shoal.sim.reduce_world import ReduceScenario, reduce_rounds
from shoal.transport.identity import Identity, PeerId


def peers(count: int) -> tuple[PeerId, ...]:
    """Those of a reduce world with seed 0."""
    seeds = (hashlib.blake2b(f"0 peer{n}".encode(), digest_size=32).digest() for n in range(count))
    return tuple(Identity(seed).peer_id for seed in seeds)


@pytest.mark.parametrize(
    ("uplinks", "size", "rounds"),
    [
        ((12.5e6,) * 16, 1 << 20, 1),
        ((12.5e6,) * 4, 4 << 20, 1),
        ((12.5e6,) * 2, 1 << 12, 1),
        # Once they have measured their lines.
        (tuple(6.25e6 * factor for factor in (1, 2, 1, 2)), 4 << 20, 3),
    ],
)
def test_a_reduce_takes_the_time_and_bytes_of_the_full_protocol(
    uplinks: tuple[float, ...], size: int, rounds: int
) -> None:
    *_, real = reduce_rounds(ReduceScenario(uplinks, size, latency=0.04, rounds=rounds))
    lines = dict(zip(peers(len(uplinks)), (Line(up, latency=0.04) for up in uplinks), strict=True))
    order = tuple(sorted(lines))
    modelled = cost(order, order, tuple(lines[peer] for peer in order), size // 4, "fp32", 1)
    assert modelled.seconds == pytest.approx(real.seconds, rel=0.1)
    assert sum(modelled.sent) == pytest.approx(sum(real.sent), rel=0.05)


@pytest.mark.parametrize("codec", ["fp32", "int8", "topk:0.01"])
def test_bytes_are_exactly_those_of_the_code_and_of_each_message(codec: str) -> None:
    order, length = tuple(sorted(peers(4))), 4096
    found = cost(order, order, (Line(),) * 4, length, codec, 1)
    slices = sum(resolve(codec).wire_size(piece.stop - piece.start) for piece in found.slices)
    # Every slice goes from three to its owner, and from it to three, in a message each.
    bulk = 3 * 2 * slices + MESSAGE * 3 * 2 * 4
    control = sum(found.sent) - bulk
    leader = max(found.sent) - min(found.sent) + CONTROL * MESSAGE
    assert control == leader + 3 * CONTROL * MESSAGE


def test_a_narrow_downlink_and_the_longest_way_decide() -> None:
    order = tuple(sorted(peers(4)))
    lines = [Line(1e6, 1e6, 0.01)] * 4
    even = cost(order, order, tuple(lines), 1 << 16, "fp32", 1)
    lines[2] = Line(1e6, 1e5, 0.05)
    narrow = cost(order, order, tuple(lines), 1 << 16, "fp32", 1)
    assert narrow.latency == longest([0.01, 0.01, 0.05, 0.01]) == pytest.approx(0.03)
    assert narrow.gather == pytest.approx(10 * even.gather, rel=0.01)
    assert transfer(1000, Line(1e4, latency=0.1), Line(1e6, 1e6, 0.1)) == pytest.approx(0.2 + 0.1)


def test_a_far_too_slow_line_is_left_out_but_gets_the_result() -> None:
    order = tuple(sorted(peers(5)))
    lines = (Line(1e6), Line(1e6), Line(1e4), Line(1e6), Line(1e6))
    found = cost(order, order, lines, 1 << 16, "fp32", 1)
    assert found.late == (order[2],)
    assert all(piece.owner != order[2] for piece in found.slices)
    assert "left out" in found.reason


def test_one_alone_sends_nothing_and_waits_for_nobody() -> None:
    (alone,) = peers(1)
    found = cost((alone,), (alone,), (Line(1e6, latency=0.05),), 4096, "fp32", 1)
    assert found.sent == (0,)
    assert found.seconds == 0.0
