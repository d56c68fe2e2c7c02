"""Shards are pure; splits cover everything once."""

from __future__ import annotations

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.learning.shard import Shard, dirichlet_split, frozen_random

SHARD = Shard(seed=7, peer=bytes(32), round=3, index=1, count=4)


def test_equal_shards_give_equal_numbers() -> None:
    again = attrs.evolve(SHARD)
    assert torch.equal(torch.rand(8, generator=SHARD.generator("a")), torch.rand(8, generator=again.generator("a")))
    assert np.array_equal(SHARD.rng("a", 1).random(8), again.rng("a", 1).random(8))


@pytest.mark.parametrize(
    "other",
    [
        attrs.evolve(SHARD, seed=8),
        attrs.evolve(SHARD, peer=b"\1" * 32),
        attrs.evolve(SHARD, round=4),
        attrs.evolve(SHARD, index=2),
        attrs.evolve(SHARD, count=5),
        attrs.evolve(SHARD, epoch=1),
    ],
    ids=["seed", "peer", "round", "index", "count", "epoch"],
)
def test_every_field_changes_the_numbers(other: Shard) -> None:
    assert other.entropy("a") != SHARD.entropy("a")


def test_labels_keep_uses_apart() -> None:
    drawn = {SHARD.entropy(*labels) for labels in [(), ("a",), ("b",), ("a", "b"), ("ab",), ("a", 1), ("a", "1")]}
    assert len(drawn) == 7


def test_entropy_is_the_same_on_every_machine() -> None:
    assert SHARD.entropy("known") == 15790258927370571960
    assert frozen_random(1, "known").randint(1000, size=4).tolist() == [702, 78, 348, 836]


def test_a_shard_outside_its_roster_is_refused() -> None:
    with pytest.raises(ValueError, match="index lies in 0..3"):
        attrs.evolve(SHARD, index=4)
    with pytest.raises(ValueError, match="32 bytes"):
        attrs.evolve(SHARD, peer=b"short")


def test_a_later_round_is_the_same_part_and_another_roster_is_not() -> None:
    assert SHARD.same_part(attrs.evolve(SHARD, round=9, epoch=2))
    assert not SHARD.same_part(attrs.evolve(SHARD, count=5))


@given(
    samples=st.integers(1, 400),
    classes=st.integers(1, 12),
    count=st.integers(1, 20),
    alpha=st.sampled_from([0.05, 0.3, 1.0, 100.0]),
    seed=st.integers(0, 1 << 40),
)
def test_a_split_covers_every_sample_once_and_leaves_nobody_empty(
    samples: int, classes: int, count: int, alpha: float, seed: int
) -> None:
    labels = np.arange(samples) % classes
    if samples < count:
        with pytest.raises(ValueError, match="cannot be split"):
            dirichlet_split(labels, count, alpha, seed)
        return
    parts = dirichlet_split(labels, count, alpha, seed)
    assert len(parts) == count
    assert sorted(np.concatenate(parts).tolist()) == list(range(samples))
    assert min(map(len, parts)) >= max(1, min(32, samples // (2 * count)))


def test_a_split_is_deterministic_and_depends_on_the_seed() -> None:
    labels = np.arange(500) % 10
    one, two, other = (dirichlet_split(labels, 4, 0.3, seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_small_alpha_gives_peers_few_classes_and_a_large_one_all() -> None:
    labels = np.arange(2000) % 10

    def largest_share(alpha: float) -> float:
        parts = dirichlet_split(labels, 8, alpha, 0)
        return float(np.mean([np.bincount(labels[part], minlength=10).max() / len(part) for part in parts]))

    assert largest_share(0.3) > 0.25
    assert largest_share(1000.0) < 0.15
