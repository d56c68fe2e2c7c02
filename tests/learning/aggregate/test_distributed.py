"""Owners of slices, a decision that travels as bytes, members that check it: the same as all vectors in one place."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from shoal.learning.aggregate import Decision, aggregate, fault, linear_combination, partial_gram, resolve
from shoal.learning.reduce import kernels, pure_kernels
from shoal.transport.errors import ProtocolMisuse
from tests.learning.aggregate.cases import examples

TEXTS = [
    "mean",
    "median",
    "trimmed_mean:f=2",
    "meamed:f=2",
    "flag",
    "flag:iterations=3,lam=0.5",
    "flag:scaling=paper,normalise=false",
    "krum:f=2",
    "multikrum:f=2",
    "geometric_median",
    "centered_clipping:tau=3,iterations=2",
    "centered_clipping:start=zero,iterations=3",
    "mda:f=2",
    "monna:f=2",
    "caf:f=2",
    "smea:f=2",
    "nnm+trimmed_mean:f=2",
    "bucketing+median",
    "arc+nnm+multikrum:f=2,definition=byzfl",
    "clipping:c=40+mean",
    "normalise+mean",
    "normalise:to=median+mean",
    "descent:f=2+mean",
    "descent:f=2+median",
    "descent:f=2+nnm+trimmed_mean",
]
BOUNDS = [0, 1, 700, 701, 1500, 2999]


def contributions(seed: int = 0, n: int = 9, d: int = 2999) -> list[Tensor]:
    rng = np.random.default_rng(seed)
    common = rng.standard_normal(d)
    x = common + rng.standard_normal((n, d))
    x[3] = -10 * x[3]
    x[5] = x[6]
    x[7] *= 1e4
    return [torch.from_numpy(row.astype(np.float32)) for row in x]


@pytest.mark.parametrize("text", TEXTS)
def test_slices_give_what_all_vectors_in_one_place_give(text: str) -> None:
    rule = resolve(text)
    rows = contributions()
    last = torch.from_numpy(np.random.default_rng(9).standard_normal(2999).astype(np.float32))
    whole = aggregate(rows, rule, reference=last, seed=5).vector
    if rule.needs_reference:
        rows.append(last)
    slices = [[row[a:b] for row in rows] for a, b in itertools.pairwise(BOUNDS)]
    decision = None
    if rule.needs_gram:
        gram = np.sum([partial_gram(one) for one in slices], axis=0)
        data = rule.decide(gram, 9, seed=5).data
        decision = Decision.read(data, len(rows))
        assert decision.data == data
        assert decision.differs(rule.decide(partial_gram(rows), 9, seed=5), gram) is None
    found = []
    for pure in (False, True):  # two peers, one without a compiler
        out = torch.full((2999,), 7.0)
        before = kernels.active
        kernels.active = pure_kernels if pure else before
        try:
            for part, a, b in zip(slices, BOUNDS[:-1], BOUNDS[1:], strict=True):
                assert rule.combine(part, decision, out[a:b])
        finally:
            kernels.active = before
        found.append(out)
    assert found[0].numpy().tobytes() == found[1].numpy().tobytes()
    assert float((found[0] - whole).norm()) <= 1e-6 * float(whole.norm())
    if decision is None:
        assert found[0].numpy().tobytes() == whole.numpy().tobytes()


def test_inner_products_are_those_of_float64_on_both_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    for n, d in ((1, 1), (2, 7), (3, 128), (5, 129), (16, 5000), (31, 70_001), (70, 300)):
        x = (rng.standard_normal((n, d)) * 10.0 ** rng.uniform(-6, 6, (n, 1))).astype(np.float32)
        rows = [torch.from_numpy(row) for row in x]
        wide = x.astype(np.longdouble)
        exact, size = wide @ wide.T, np.abs(wide) @ np.abs(wide).T
        for implementation in (kernels.active, pure_kernels):
            monkeypatch.setattr(kernels, "active", implementation)
            gram = partial_gram(rows)
            assert (gram == gram.T).all()
            assert (np.abs(gram - exact) <= 1e-14 * size).all()
        monkeypatch.undo()


@pytest.mark.parametrize("text", [t for t in TEXTS if resolve(t).needs_gram and not resolve(t).needs_reference])
@pytest.mark.parametrize("length", [1.2e-38, 1e-30, 1e-6, 1e30])
def test_no_row_is_so_short_or_long_that_the_decision_over_it_cannot_travel(text: str, length: float) -> None:
    """Else one contributor would end every round: whoever decides has coefficients that all others refuse."""
    rule = resolve(text)
    rows = contributions()
    rows[4] = torch.zeros(len(rows[4]))
    rows[4][0] = length
    gram = partial_gram(rows)
    own = rule.decide(gram, len(rows), 3)
    assert Decision.read(own.data, len(rows)).differs(own, gram) is None
    out = torch.empty(len(rows[0]))
    assert rule.combine(rows, Decision.read(own.data, len(rows)), out)
    assert bool(torch.isfinite(out).all())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_inner_products_show_what_is_not_finite(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    for implementation in (kernels.active, pure_kernels):
        monkeypatch.setattr(kernels, "active", implementation)
        rows = [torch.full((300,), 3e38) for _ in range(5)]
        assert np.isfinite(partial_gram(rows)).all()
        rows[3][299] = value
        assert np.isfinite(np.diag(partial_gram(rows))).tolist() == [True, True, True, False, True]


def test_zero_coefficients_leave_their_rows_unread() -> None:
    rows = [torch.tensor([1.0, 2.0]), torch.tensor([float("nan")] * 2), torch.tensor([3.0, 5.0])]
    out = torch.zeros(2)
    linear_combination(rows, np.array([2.0, 0.0, -1.0]), out)
    assert out.tolist() == [-1.0, -1.0]
    linear_combination(rows, np.zeros(3), out)
    assert out.tolist() == [0.0, 0.0]


def test_a_false_decision_is_told_from_rounding() -> None:
    rows = contributions(1)
    gram = partial_gram(rows)
    for text in ("flag", "multikrum:f=2", "geometric_median", "nnm+median:f=2"):
        rule = resolve(text)
        own = rule.decide(gram, 9)
        close = Decision(own.matrix * (1 + 1e-9))
        assert close.differs(own, gram) is None
        off = own.matrix.copy()
        off[0, 0] += 1e-3
        assert "off by" in str(Decision(off).differs(own, gram))
        assert "beyond" in str(Decision(own.matrix * 1e6).differs(own, gram))
        assert "rows of 9" in str(Decision(np.concatenate((own.matrix, own.matrix))).differs(own, gram))


def test_coefficients_that_differ_among_equal_vectors_are_the_same_decision() -> None:
    rows = contributions(1)  # 5 and 6 are equal
    gram = partial_gram(rows)
    own = resolve("geometric_median").decide(gram, 9)
    moved = own.matrix.copy()
    moved[0, 5] += 0.05
    moved[0, 6] -= 0.05
    assert Decision(moved).differs(own, gram) is None
    moved[0, 4] += 0.05
    moved[0, 6] -= 0.05
    assert Decision(moved).differs(own, gram) is not None


@pytest.mark.parametrize(
    ("data", "p"),
    [
        (b"", 3),
        (b"12345678", 3),
        (bytes(24 * 4), 3),
        (bytes(24), 0),
        (b"\xff" * 24, 3),
        (bytes(25), 3),
        (bytes([0] * 6 + [0x60, 0x7F]) * 3, 3),
    ],
)
def test_bytes_that_are_no_decision_are_refused(data: bytes, p: int) -> None:
    with pytest.raises(ValueError, match="bytes are no coefficients|no finite float32"):
        Decision.read(data, p)


def test_sums_that_are_no_inner_products_are_found() -> None:
    for case in examples(100):
        gram = case.wide @ case.wide.T
        gram = (gram + gram.T) / 2
        assert fault(gram, case.n) is None
    gram = np.eye(4) * 2.0
    wrong = {
        "shape": np.eye(3),
        "not finite": np.where(np.eye(4) > 0, np.nan, 0.0),
        "not symmetric": gram + np.triu(np.ones((4, 4)) * 0.1, 1),
        "negative square": -gram,
        "larger than the lengths allow": gram + 3 * (1 - np.eye(4)),
        "negative eigenvalue": gram - 1.5 * (1 - np.eye(4)),
    }
    for words, matrix in wrong.items():
        assert words in str(fault(matrix, 4))


def test_a_decision_of_another_size_is_a_misuse() -> None:
    rows = contributions(1)
    rule = resolve("flag")
    with pytest.raises(ProtocolMisuse, match="inner products of 8 rows, for 9"):
        rule.decide(np.eye(8), 9)
    with pytest.raises(ProtocolMisuse, match="needs a decision"):
        rule.combine(rows, None, torch.empty(2999))
    with pytest.raises(ProtocolMisuse, match="for 9 rows"):
        rule.combine(rows, Decision(np.ones((1, 8))), torch.empty(2999))
    with pytest.raises(ProtocolMisuse, match="for 9 rows"):
        rule.combine(rows, Decision(np.ones((2, 9))), torch.empty(2999))
    with pytest.raises(ProtocolMisuse, match="for 9 rows"):
        resolve("median").combine(rows, Decision(np.ones((1, 9))), torch.empty(2999))
    with pytest.raises(ProtocolMisuse, match="for 9 rows"):
        resolve("nnm+trimmed_mean:f=3").combine(rows, Decision(np.ones((6, 9))), torch.empty(2999))
    with pytest.raises(ProtocolMisuse, match="for 9 rows"):
        resolve("bucketing:s=2+median").combine(rows, Decision(np.ones((9, 9))), torch.empty(2999))


@pytest.mark.parametrize(
    ("text", "last", "pivot"),
    [
        ("monna:f=2", False, 0),
        ("monna:f=2,pivot=4", False, 4),
        ("centered_clipping", True, 9),
        ("centered_clipping", False, 8),
        ("centered_clipping:tau=100,unit=length", True, 9),
        ("centered_clipping:start=zero", False, 8),
    ],
)
def test_rules_that_look_at_one_row_decide_from_it_as_from_all(text: str, last: bool, pivot: int) -> None:
    rule = resolve(text)
    rows = contributions()
    if last:
        rows.append(torch.from_numpy(np.random.default_rng(9).standard_normal(2999).astype(np.float32)))
    assert rule.pivot_of(len(rows)) == pivot
    some = partial_gram(rows, pivot)
    whole = partial_gram(rows)
    known = ~np.isnan(some)
    assert known.sum() == 3 * len(rows) - 2 and (some[known] == whole[known]).all()
    found, expected = rule.decide(some, 9), rule.decide(whole, 9)
    assert found.data == expected.data
    assert found.quality is not None and expected.quality is not None
    assert found.quality.tolist() == expected.quality.tolist()


@pytest.mark.parametrize(
    "text", ["krum:f=2", "centered_clipping:iterations=2", "nnm+monna:f=2", "descent:f=2+monna:f=1"]
)
def test_rules_that_look_at_more_say_so(text: str) -> None:
    assert resolve(text).pivot_of(9) is None
