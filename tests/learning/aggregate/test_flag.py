"""Flag on the Gram matrix against the authors' algorithm, written down with SVDs of the vectors themselves."""

from __future__ import annotations

import numpy as np
import pytest

from shoal.learning.aggregate import aggregate, resolve
from shoal.learning.aggregate.flag import Flag
from shoal.learning.aggregate.geometry import points
from tests.learning.aggregate.cases import Floats, examples


def reference_flag(units: Floats, r: int, steps: int, lam: float, y: Floats) -> tuple[Floats, list[float]]:
    """``irls_flag`` and ``flag_mean_iteration`` of the authors' repository; ``units`` (d, p), ``y`` (d, r)."""
    p = units.shape[1]

    def objective(y: Floats) -> float:
        return float(np.sqrt(np.maximum(min(r, 1) - ((y.T @ units) ** 2).sum(axis=0), 0)).sum())

    errors = [objective(y)]
    gain, step = 1.0, 0
    before = y
    while step < steps and gain > 1e-10 and errors[-1] > 1e-10:
        before = y
        columns = [(abs(1 - ((y.T @ g) ** 2).sum()) + 1e-7) ** (-1 / 4) * g for g in units.T]
        if lam > 0:
            for i in range(p):
                for j in range(p):
                    if i != j:
                        apart = units[:, i] - units[:, j]
                        weight = (abs(1 - ((y.T @ apart) ** 2).sum()) + 1e-7) ** (-1 / 4) * lam / (p * (p - 1))
                        columns.append(weight * apart)
        y = np.linalg.svd(np.stack(columns, axis=1), full_matrices=False)[0][:, :r]
        errors.append(objective(y))
        gain = errors[-2] - errors[-1]
        step += 1
    return (y, errors) if gain > 0 else (before, errors[:-1])


def gradients(seed: int = 0, d: int = 400, p: int = 15, f: int = 3) -> Floats:
    """(p, d): honest ones are a common direction and noise of the same length, the first f noise alone, ten times as
    long."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(d) + rng.standard_normal((p, d))
    x[:f] = 10 * rng.standard_normal((f, d))
    return x


def start(seed: int, d: int, m: int) -> Floats:
    return np.linalg.qr(np.random.default_rng(seed).random((d, m)) - 0.5)[0]


@pytest.mark.parametrize("lam", [0.0, 2.0])
@pytest.mark.parametrize("steps", [1, 5])
def test_the_subspace_is_that_of_the_svd(lam: float, steps: int) -> None:
    for seed in range(5):
        x = gradients(seed)
        units = (x / np.linalg.norm(x, axis=1, keepdims=True)).T
        first = start(seed, 400, 8)
        theirs, errors = reference_flag(units, 8, steps, lam, first)
        small, back = points(units.T @ units)
        rule = Flag(m=8, lam=lam, pairs="authors", iterations=steps)
        apart = units[:, :, None] - units[:, None, :]
        pair_ratios = (np.einsum("dm,dij->mij", first, apart) ** 2).sum(axis=0)
        y, ratios, objectives = rule.subspace(small, small, 8, ((first.T @ units) ** 2).sum(axis=0), pair_ratios)
        ours = units @ back @ y
        assert np.abs(ours @ ours.T - theirs @ theirs.T).max() < 1e-10
        assert np.allclose(objectives, errors, rtol=0, atol=1e-7)  # roots of numbers near 0
        assert np.allclose(ratios, ((theirs.T @ units) ** 2).sum(axis=0), atol=1e-10)


def test_the_output_is_that_of_the_authors_code_in_many_dimensions() -> None:
    # The start is random there, with v_i of about m/d; ours is v_i = 0, the limit.
    x = gradients(3, d=4000).astype(np.float32)
    wide = x.astype(np.float64)
    units = (wide / np.linalg.norm(wide, axis=1, keepdims=True)).T
    y, _ = reference_flag(units, 8, 1, 0.0, start(1, 4000, 8))
    expected = y @ (y.T @ units).sum(axis=1) / 8
    result = aggregate(x, "flag").vector.numpy()
    assert np.linalg.norm(result - expected) < 1e-3 * np.linalg.norm(expected)
    # Check d of the reference pack: it is close to a multiple of the sum of unit vectors.
    total = units.sum(axis=1)
    assert result @ total / np.linalg.norm(result) / np.linalg.norm(total) > 0.99


def test_the_objective_falls_with_every_step_until_it_stops() -> None:
    for seed in range(10):
        x = gradients(seed)
        units = (x / np.linalg.norm(x, axis=1, keepdims=True)).T
        small, _ = points(units.T @ units)
        for lam in (0.0, 0.5):
            objectives = Flag(iterations=500, lam=lam).subspace(small, small, 8, np.zeros(15))[2]
            assert (np.diff(objectives) < 0).all()
            assert 3 < len(objectives) < 500


def test_the_objective_goes_as_in_the_reference_run() -> None:
    # d = 400, p = 15, m = 8: 14.87 before, 5.345 after one step, 4.240 after five, 4.184 at the end. The data are not
    # known; those here, noise of 0.7 times the signal, give numbers within a few percent.
    for seed in range(5):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal(400) + 0.7 * rng.standard_normal((15, 400))
        units = (x / np.linalg.norm(x, axis=1, keepdims=True)).T
        small, _ = points(units.T @ units)
        v = ((start(seed, 400, 8).T @ units) ** 2).sum(axis=0)
        found = Flag(iterations=500).subspace(small, small, 8, v)[2]
        assert np.allclose([found[0], found[1], found[5], found[-1]], [14.87, 5.345, 4.240, 4.184], rtol=0.09)
        assert 8 < len(found) < 80


def test_equal_vectors_give_that_vector() -> None:
    g = np.random.default_rng(1).standard_normal(50).astype(np.float32)
    x = np.tile(g, (7, 1))
    length = float(np.linalg.norm(g.astype(np.float64)))
    for iterations in (1, 100):
        normal = aggregate(x, f"flag:iterations={iterations}").vector.numpy()  # ĝ p/m
        assert np.allclose(normal, g / length * 7 / 4, rtol=1e-6)
        paper = aggregate(x, f"flag:scaling=paper,normalise=false,iterations={iterations}").vector.numpy()
        assert np.allclose(paper, g, rtol=1e-6)
    result = aggregate(x, "flag")
    assert result.quality is not None and np.allclose(result.quality, 1.0)


@pytest.mark.parametrize(("p", "m"), [(5, 5), (5, 7), (1, 1), (9, 9)])
def test_a_subspace_of_all_dimensions_gives_the_sum_over_m(p: int, m: int) -> None:
    x = np.random.default_rng(p).standard_normal((p, 40)).astype(np.float32)
    wide = x.astype(np.float64)
    units = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    for lam in (0.0, 1.0):
        result = aggregate(x, f"flag:m={m},lam={lam}").vector.numpy()
        assert np.allclose(result, units.sum(axis=0) / m, atol=1e-6)
        raw = aggregate(x, f"flag:m={m},lam={lam},normalise=false,scaling=paper").vector.numpy()
        assert np.allclose(raw, wide.mean(axis=0), atol=1e-6)


def test_without_m_it_is_half_of_the_vectors_rounded_up() -> None:
    x = np.random.default_rng(1).standard_normal((15, 60)).astype(np.float32)
    for p, m in ((15, 8), (7, 4), (6, 4), (2, 2), (1, 1)):
        assert aggregate(x[:p], "flag").vector.tolist() == aggregate(x[:p], f"flag:m={m}").vector.tolist()


def test_a_vector_of_zeros_is_no_direction() -> None:
    x = np.random.default_rng(1).standard_normal((5, 20)).astype(np.float32)
    x[2] = 0.0
    result = aggregate(x, "flag:m=4")
    assert result.quality is not None and result.quality[2] < 1e-12
    assert np.allclose(result.quality[[0, 1, 3, 4]], 1.0)
    assert aggregate(np.zeros((5, 20), np.float32), "flag:lam=1").vector.tolist() == [0.0] * 20


@pytest.mark.parametrize(
    "text", ["flag", "flag:iterations=5", "flag:lam=1,iterations=3", "flag:scaling=paper,normalise=false"]
)
def test_it_turns_with_the_vectors_and_does_not_see_their_order(text: str) -> None:
    rng = np.random.default_rng(7)
    for seed in range(10):
        x = gradients(seed, d=30, p=9).astype(np.float32)
        first = aggregate(x, text)
        order = rng.permutation(9)
        permuted = aggregate(x[order], text)
        assert first.quality is not None and permuted.quality is not None
        assert np.allclose(permuted.vector, first.vector, atol=2e-5)
        assert np.allclose(permuted.quality, first.quality[order], atol=1e-6)
        turn = np.linalg.qr(rng.standard_normal((30, 30)))[0]
        turned = aggregate((x @ turn).astype(np.float32), text)
        assert np.allclose(turned.vector, first.vector.numpy() @ turn, atol=2e-4)


def test_a_thousand_random_cases_are_projections_of_the_sum() -> None:
    # Whatever Y is: the result is Y Yᵀ of the sum, so ⟨result m, sum⟩ = ‖result m‖², and ratios are within 0 … 1.
    for case in examples(1000):
        for text in ("flag", "flag:iterations=20,lam=0.5"):
            result = aggregate(case.x, text)
            lengths = np.linalg.norm(case.wide, axis=1, keepdims=True)
            total = np.divide(case.wide, lengths, out=np.zeros_like(case.wide), where=lengths > 0).sum(axis=0)
            found = result.vector.numpy() * -(-(case.n + 1) // 2)
            assert abs(found @ total - found @ found) <= 1e-5 * (total @ total) + 1e-5, case
            assert result.quality is not None and ((result.quality >= 0) & (result.quality <= 1)).all()


def test_its_text_says_what_differs_from_the_defaults() -> None:
    assert str(resolve("flag")) == "flag"
    assert str(resolve("flag:lam=2,scaling=paper,normalise=false")) == "flag:lam=2.0,scaling=paper,normalise=false"
