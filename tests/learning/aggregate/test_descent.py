"""The stage with a memory: its definition, what it leaves out, and what it is for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shoal.learning.aggregate import aggregate, resolve
from shoal.transport.errors import ConfigError
from tests.learning.aggregate.cases import Floats, examples


def defined(x: Floats, scores: Floats, f: int, rounds: int) -> tuple[Floats, Floats]:
    """(the mean that follows, the scores after), from the vectors themselves."""
    lengths = np.linalg.norm(x, axis=1)
    m = np.median(lengths)
    units = np.array([row / length if length else row for row, length in zip(x, lengths, strict=True)])
    out = [i for _, i in sorted(zip(scores, range(len(x)), strict=True))[:f] if scores[i] < 0]
    kept = [i for i in range(len(x)) if i not in out]
    r = sum((min(lengths[j], m) * units[j] for j in kept), np.zeros(x.shape[1]))
    after = scores.copy()
    if np.linalg.norm(r) > 0:
        after = scores + (units @ r / np.linalg.norm(r) - scores) / rounds
    return m * units[kept].mean(axis=0), after


def test_a_thousand_random_cases_agree_with_the_definition() -> None:
    rng = np.random.default_rng(0)
    for number, case in enumerate(examples(1000)):
        scores = rng.uniform(-1, 1, case.n) * rng.integers(0, 2, case.n)  # ties at 0 too
        rounds = int(rng.integers(1, 200))
        x = case.x.copy()
        if number % 7 == 0:
            x[rng.integers(case.n)] = 0.0
        vector, after = defined(x.astype(np.float64), scores, case.f, rounds)
        found = aggregate(x, f"descent:f={case.f},rounds={rounds}+mean", scores=scores)
        assert found.scores is not None and found.quality is not None
        assert np.abs(found.vector.numpy() - vector).max() <= 1e-5 * max(1e-30, float(np.abs(x).max())), case
        # Where everybody's pull cancels, its direction is a rounding error.
        pull = np.linalg.norm(vector) / max(1e-30, float(np.median(np.linalg.norm(x, axis=1))))
        if pull > 1e-6:
            assert np.abs(found.scores - after).max() < 1e-6, case
        assert (np.abs(found.scores) <= 1).all()
        assert set(np.flatnonzero(found.quality == 0)) - set(np.flatnonzero(~x.any(axis=1))) == {
            i for _, i in sorted(zip(scores, range(case.n), strict=True))[: case.f] if scores[i] < 0 and x[i].any()
        }


def test_it_follows_members_and_not_units() -> None:
    rng = np.random.default_rng(1)
    for case in examples(200, seed=2, kinds=("normal", "outliers", "shifted")):
        scores, order = rng.uniform(-1, 1, case.n), rng.permutation(case.n)
        rule = f"descent:f={case.f}+mean"
        plain = aggregate(case.x, rule, scores=scores)
        moved = aggregate(case.x[order], rule, scores=scores[order])
        larger = aggregate(case.x * np.float32(1024), rule, scores=scores)
        assert plain.scores is not None and moved.scores is not None and larger.scores is not None
        assert np.abs(moved.scores - plain.scores[order]).max() < 1e-9
        assert np.abs(larger.scores - plain.scores).max() < 1e-9
        scale = float(plain.vector.abs().max()) + 1e-12
        assert float((moved.vector - plain.vector).abs().max()) <= 1e-5 * scale
        assert float((larger.vector - 1024 * plain.vector).abs().max()) <= 1024e-5 * scale


def test_who_is_new_is_trusted_and_nobody_is_left_out_without_a_reason() -> None:
    x = np.random.default_rng(3).standard_normal((9, 20)).astype(np.float32)
    first = aggregate(x, "descent:f=3+mean")
    assert torch.equal(first.vector, aggregate(x, "normalise:to=median+mean").vector)
    assert first.coefficients is not None and (first.coefficients > 0).all()


def test_no_more_than_f_are_left_out_and_the_stages_behind_see_the_others() -> None:
    x = np.random.default_rng(4).standard_normal((9, 20)).astype(np.float32)
    scores = np.array([-0.5, -0.1, 0.2, -0.5, 0.0, 0.3, 0.1, -0.2, 0.4])
    lengths = np.linalg.norm(x, axis=1)
    equal = x / lengths[:, None] * np.median(lengths)
    for f, out in ((0, []), (1, [0]), (2, [0, 3]), (4, [0, 1, 3, 7])):
        kept = [i for i in range(9) if i not in out]
        for rule in ("mean", "median", "geometric_median", "trimmed_mean:f=1", "krum:f=1", "nnm:f=1+median"):
            if "f=" in rule and len(kept) - 2 < 3:
                continue
            found = aggregate(x, f"descent:f={f}+{rule}", scores=scores)
            expected = aggregate(equal[kept].astype(np.float32), rule)
            assert float((found.vector - expected.vector).abs().max()) < 1e-5, (f, rule)
            if found.quality is not None:
                assert not found.quality[out].any()


def test_the_last_result_passes_by() -> None:
    x = np.random.default_rng(5).standard_normal((7, 20)).astype(np.float32)
    last, scores = torch.ones(20), np.array([0, 0, -0.5, 0, 0, 0, 0])
    found = aggregate(x, "descent:f=1+centered_clipping", reference=last, scores=scores)
    lengths = np.linalg.norm(x, axis=1)
    kept = np.delete(x / lengths[:, None] * np.median(lengths), 2, axis=0).astype(np.float32)
    expected = aggregate(kept, "centered_clipping", reference=last)
    assert float((found.vector - expected.vector).abs().max()) < 1e-5


def test_too_few_members_are_refused() -> None:
    for text, n, words in (
        ("descent:f=2+mean", 4, "descent: f = 2 of 4 vectors cannot be tolerated"),
        ("descent:f=1+trimmed_mean:f=2", 5, "trimmed_mean: f = 2 of 4 vectors"),
    ):
        with pytest.raises(ConfigError, match=words):
            resolve(text).check(n)
    resolve("descent:f=1+trimmed_mean:f=2").check(6)
    with pytest.raises(ConfigError, match="3 scores for 5 vectors"):
        aggregate(np.ones((5, 2), np.float32), "descent:f=1+mean", scores=np.zeros(3))


@pytest.mark.parametrize("seed", range(5))
def test_peers_whose_losses_have_other_minima_are_told_from_those_who_work_against_all(seed: int) -> None:
    """Losses ½ ‖A_i (x - x*)‖² that each see a few of the dimensions: no two peers agree, all have x* in common.

    Three of 15 send the opposite of what they would. On the way the three are left out and nobody else. (Near x* all
    gradients are noise and everybody agrees with itself: then they are let in again, and do no harm.)
    """
    rng = np.random.default_rng(seed)
    d, n = 24, 15
    goal = 5.0 * rng.standard_normal(d)
    eyes = [rng.random(d) < 0.25 for _ in range(n)]
    for i in range(d):
        eyes[i % 12][i] = True  # every dimension is seen by somebody honest

    def train(rule: str, n: int = n) -> tuple[float, Floats, Floats | None]:
        noise = np.random.default_rng(seed)
        at, scores = np.zeros(d), np.zeros(n)
        after, quality = scores, None
        for step in range(120):
            rows = [eye * (at - goal + 0.3 * noise.standard_normal(d)) for eye in eyes[:n]]
            x = np.stack(rows).astype(np.float32)
            x[12:] *= -1
            found = aggregate(x, rule, scores=scores)
            if found.scores is not None:
                scores = found.scores
            if step == 30:
                after, quality = scores, found.quality
            at = at - 0.2 * found.vector.numpy()
        return float(np.linalg.norm(at - goal) / np.linalg.norm(goal)), after, quality

    left, scores, quality = train("descent:f=3+mean")
    assert quality is not None
    assert (scores[12:] < 0).all() and (scores[:12] > 0).all(), scores
    assert not quality[12:].any() and quality[:12].all()
    assert left < 1.1 * train("normalise:to=median+mean", 12)[0] + 0.01, "as without them"
