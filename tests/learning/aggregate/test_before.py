"""Pre-aggregators against their definitions and byzfl, alone (before the mean) and before other rules."""

from __future__ import annotations

import numpy as np
import pytest

from shoal.learning.aggregate import aggregate, partial_gram, resolve
from shoal.learning.aggregate.base import Before
from tests.learning.aggregate.cases import Example, Floats, byzfl, examples, needs_byzfl


def rows_of(text: str, case: Example, seed: int = 0) -> Floats:
    """What the pre-aggregator ``text`` makes of the vectors, in float64."""
    rule = resolve(f"{text}+median")
    matrix = rule.decide(np.asarray(case.wide @ case.wide.T), case.n, seed).matrix
    return np.asarray(matrix @ case.wide)


def sizes(case: Example) -> float:
    return float(np.abs(case.wide).max())


def test_neighbours_are_mixed_as_defined_in_a_thousand_cases() -> None:
    for case in examples(1000):
        matrix = resolve(f"nnm:f={case.f}+median").decide(case.wide @ case.wide.T, case.n).matrix
        apart = np.linalg.norm(case.wide[:, None] - case.wide[None], axis=2) ** 2
        for i, row in enumerate(matrix):
            members = np.flatnonzero(row)
            assert len(members) == case.n - case.f and i in members
            assert np.allclose(row[members], 1 / len(members))
            others = np.setdiff1d(np.arange(case.n), members)
            assert not len(others) or apart[i, members].max() <= apart[i, others].min() + 1e-9 * apart.max()


@needs_byzfl
@pytest.mark.parametrize(("text", "name"), [("nnm:f={f}", "NNM"), ("arc:f={f}", "ARC"), ("clipping:c=3", "Clipping")])
def test_a_thousand_random_cases_agree_with_byzfl(text: str, name: str) -> None:
    kinds = ("normal", "outliers", "shifted")
    for case in examples(1000, kinds=kinds):
        arguments = {"c": 3.0} if name == "Clipping" else {"f": case.f}
        theirs = getattr(byzfl, name)(**arguments)(case.wide.copy())
        ours = rows_of(text.format(f=case.f), case)
        assert np.abs(ours - theirs).max() <= 1e-9 * sizes(case), case


def test_clipping_and_arc_agree_with_their_definitions() -> None:
    for case in examples(300):
        lengths = np.linalg.norm(case.wide, axis=1)
        clipped = case.wide * np.minimum(1, 3 / np.maximum(lengths, 1e-300))[:, None]
        assert np.allclose(rows_of("clipping:c=3", case), clipped, atol=1e-9 * sizes(case))
        k = int(2 * case.f / case.n * (case.n - case.f) + 1e-12)
        bound = np.sort(lengths)[case.n - k - 1]
        clipped = case.wide * np.minimum(1, bound / np.maximum(lengths, 1e-300))[:, None]
        assert np.allclose(rows_of(f"arc:f={case.f}", case), clipped, atol=1e-9 * sizes(case))


def test_buckets_hold_every_vector_once_and_change_with_the_seed() -> None:
    for n, s in ((15, 2), (16, 4), (5, 1), (5, 7)):
        found = set()
        for seed in range(20):
            rule = resolve(f"bucketing:s={s}+median")
            matrix = rule.decide(np.eye(n), n, seed).matrix
            assert matrix.shape == (-(-n // s), n)
            assert ((matrix > 0).sum(axis=0) == 1).all() and np.allclose(matrix.sum(axis=1), 1)
            assert [len(np.flatnonzero(row)) for row in matrix[:-1]] == [s] * (len(matrix) - 1)
            assert (rule.decide(np.eye(n), n, seed).matrix == matrix).all()
            found.add(matrix.tobytes())
        assert len(found) > (1 if s < n else 0)
        other = resolve(f"bucketing:s={s},seed=9+median").decide(np.eye(n), n, 0).matrix
        assert s >= n or other.tobytes() != resolve(f"bucketing:s={s}+median").decide(np.eye(n), n, 0).matrix.tobytes()


def test_vectors_of_length_one_and_their_mean() -> None:
    for case in examples(300):
        lengths = np.linalg.norm(case.wide, axis=1, keepdims=True)
        units = np.divide(case.wide, lengths, out=np.zeros_like(case.wide), where=lengths > 0)
        assert np.allclose(aggregate(case.x, "normalise+mean").vector, units.mean(axis=0), atol=1e-6)


@pytest.mark.parametrize(
    "text",
    [
        "nnm+trimmed_mean:f={f}",
        "nnm+median:f={f}",
        "arc+nnm+median:f={f}",
        "nnm+multikrum:f={f},definition=byzfl",
        "clipping:c=3+geometric_median",
        "arc+nnm+flag:f={f}",
        "nnm+caf:f={f}",
        "nnm+centered_clipping:f={f},tau=2,iterations=2,unit=length",
        "bucketing:s=1+median",
        "arc+mean:f={f}",
    ],
)
def test_a_chain_is_one_after_the_other(text: str) -> None:
    for case in examples(150, kinds=("normal", "outliers")):
        rule = resolve(text.format(f=case.f))
        chain = aggregate(case.x, rule)
        rows = case.wide
        for stage in rule.before:
            assert isinstance(stage, Before)
            rows = stage.matrix(rows @ rows.T, 0) @ rows
        alone = aggregate(rows.astype(np.float32), str(rule.rule))
        size = float(np.median(np.abs(rows).max(axis=1))) + 1.0
        if "flag" in text:  # a sum of p/m unit vectors
            size = 4.0
        assert np.abs(chain.vector.numpy() - alone.vector.numpy()).max() <= 2e-5 * size, case


def test_the_last_result_passes_by_what_stands_before_the_rule() -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((9, 6)).astype(np.float32)
    last = rng.standard_normal(6).astype(np.float32) * 5
    rule = resolve("bucketing:s=2+centered_clipping:tau=0.5,iterations=3,unit=length")
    chain = aggregate(x, rule, reference=_tensor(last), seed=4)
    matrix = rule.before[0].matrix(np.eye(9), 4)
    alone = aggregate((matrix @ x).astype(np.float32), str(rule.rule), reference=_tensor(last))
    assert np.allclose(chain.vector, alone.vector, atol=1e-5)
    assert chain.coefficients is not None and len(chain.coefficients) == 10
    assert chain.quality is not None and len(chain.quality) == 9


def test_the_quality_of_mixed_rows_is_shared_out_by_their_parts() -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((6, 5)).astype(np.float32)
    x[4] *= 1e6
    rule = resolve("bucketing:s=2+krum:f=0")
    matrix = rule.before[0].matrix(np.eye(6), 0)
    result = aggregate(x, rule)
    assert result.quality is not None
    bucket = int(np.argmax(matrix[:, 4]))
    assert result.quality[np.flatnonzero(matrix[bucket])].tolist() == [0.0, 0.0]
    assert sorted(result.quality.tolist()) == [0.0] * 4 + [1.0] * 2


def _tensor(array: np.ndarray):  # type: ignore[no-untyped-def, type-arg]
    import torch

    return torch.from_numpy(array)


def test_partial_gram_of_equal_rows_is_equal_to_the_bit() -> None:
    import torch

    g = torch.randn(1001, generator=torch.Generator().manual_seed(1))
    for n in (1, 3, 4, 5, 9, 16, 33):
        gram = partial_gram([g] * n)
        assert len(np.unique(gram)) == 1
