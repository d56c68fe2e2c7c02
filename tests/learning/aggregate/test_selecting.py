"""Rules that choose vectors (Krum, Multi-Krum, MDA, SMEA, MoNNA) against their definitions in numpy, and byzfl."""

from __future__ import annotations

import itertools

import attrs
import numpy as np
import pytest

from shoal.learning.aggregate import Result, aggregate
from shoal.learning.aggregate.krum import DEFINITIONS
from tests.learning.aggregate.cases import Example, Floats, byzfl, examples, needs_byzfl

#: Scores closer than this, relative to the largest distance, are equal but for rounding.
TIE = 1e-9


def distances(x: Floats) -> Floats:
    return np.linalg.norm(x[:, None, :] - x[None, :, :], axis=2)


def chosen_of(result: Result, case: Example, count: int) -> list[int]:
    """The members that were chosen; the result is their mean."""
    assert result.quality is not None and result.coefficients is not None
    members = np.flatnonzero(result.quality).tolist()
    assert len(members) == count and set(result.quality.tolist()) <= {0.0, 1.0}
    chosen = case.wide[members]
    off = np.abs(result.vector.numpy() - chosen.mean(axis=0))
    assert (off <= 1e-6 * np.abs(chosen).mean(axis=0) + 1e-30).all()
    return members


def best_are_chosen(scores: Floats, members: list[int], scale: float) -> bool:
    others = np.setdiff1d(np.arange(len(scores)), members)
    return not len(others) or scores[members].max() <= scores[others].min() + TIE * scale


def krum_scores(case: Example, definition: str) -> Floats:
    others = case.n - case.f - (2 if definition == "blanchard" else 1)
    apart = distances(case.wide)
    costs = apart if definition == "garfield" else apart**2
    return np.array([np.sort(np.delete(row, i))[:others].sum() for i, row in enumerate(costs)])


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_krum_and_multikrum_choose_the_smallest_scores_in_a_thousand_cases(definition: str) -> None:
    for case in examples(1000):
        scores = krum_scores(case, definition)
        scale = float(scores.max())
        one = aggregate(case.x, f"krum:f={case.f},definition={definition}")
        assert best_are_chosen(scores, chosen_of(one, case, 1), scale), case
        keep = case.n - case.f - (0 if definition == "byzfl" else 2)
        for text, count in ((f"multikrum:f={case.f},definition={definition}", keep), ("", 3)):
            text = text or f"multikrum:f={case.f},definition={definition},keep=3"
            assert best_are_chosen(scores, chosen_of(aggregate(case.x, text), case, count), scale), case


def test_the_definitions_of_krum_choose_different_vectors() -> None:
    chosen = {definition: [] for definition in DEFINITIONS}  # type: dict[str, list[int]]
    for case in examples(500, sizes=(9,), kinds=("normal",), d=2):
        case = attrs.evolve(case, f=2)
        for definition in DEFINITIONS:
            result = aggregate(case.x, f"krum:f={case.f},definition={definition}")
            assert result.quality is not None
            chosen[definition].append(int(np.argmax(result.quality)))
    shares = {
        other: np.mean(np.array(chosen["byzfl"]) != np.array(chosen[other])) for other in ("blanchard", "garfield")
    }
    assert 0.2 < shares["blanchard"] < 0.45 and 0.1 < shares["garfield"] < 0.35, shares


@needs_byzfl
@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("krum:f={f},definition=byzfl", "Krum"),
        ("multikrum:f={f},definition=byzfl", "MultiKrum"),
        ("mda:f={f}", "MDA"),
        ("monna:f={f}", "MoNNA"),
    ],
)
def test_a_thousand_random_cases_agree_with_byzfl(text: str, name: str) -> None:
    # Of equal scores byzfl takes any: no integers, where unlike vectors tie, and no duplicates, which tie in part.
    sizes = (5, 9) if name == "MDA" else (5, 9, 15, 16)
    for case in examples(1000, kinds=("normal", "outliers", "shifted"), sizes=sizes):
        ours = aggregate(case.x, text.format(f=case.f))
        theirs = getattr(byzfl, name)(f=case.f)(case.wide)
        assert ours.quality is not None
        size = np.abs(case.wide[ours.quality > 0]).mean(axis=0)
        assert (np.abs(ours.vector.numpy() - theirs) <= 2e-6 * size + 1e-30).all(), (case.kind, case.f, case.x)


def subsets(n: int, f: int) -> np.ndarray:  # type: ignore[type-arg]
    return np.array(list(itertools.combinations(range(n), n - f)))


def check_mda(case: Example) -> None:
    sets = subsets(case.n, case.f)
    apart = distances(case.wide)
    diameters = apart[sets[:, :, None], sets[:, None, :]].max(axis=(1, 2))
    members = chosen_of(aggregate(case.x, f"mda:f={case.f}"), case, case.n - case.f)
    mine = apart[np.ix_(members, members)].max()
    assert mine <= diameters.min() + TIE * apart.max()
    if case.kind == "ties":  # exact: the first of equal ones
        squares = np.rint(diameters**2)
        assert members == sets[np.flatnonzero(squares == squares.min())[0]].tolist()


def test_mda_finds_the_set_of_smallest_diameter_in_a_thousand_cases() -> None:
    for case in examples(900, sizes=(5, 9), most_f=3):
        check_mda(case)
    for case in examples(100, sizes=(15, 16), most_f=3):
        check_mda(case)


def test_mda_is_exact_where_all_sets_are_too_many() -> None:
    # 20 vectors at one place and 12 far away from it and each other: C(32, 12) is 2.3e8.
    rng = np.random.default_rng(4)
    x = np.concatenate((rng.standard_normal((20, 8)) * 0.1, rng.standard_normal((12, 8)) * 100)).astype(np.float32)
    order = rng.permutation(32)
    result = aggregate(x[order], "mda:f=12")
    assert result.quality is not None
    assert sorted(order[result.quality > 0].tolist()) == list(range(20))


def check_smea(case: Example) -> None:
    sets = subsets(case.n, case.f)
    groups = case.wide[sets]
    centred = groups - groups.mean(axis=1, keepdims=True)
    largest = np.linalg.svd(centred, compute_uv=False)[:, 0] ** 2
    members = chosen_of(aggregate(case.x, f"smea:f={case.f}"), case, case.n - case.f)
    mine = largest[(sets == np.array(members)).all(axis=1)][0]
    assert mine <= largest.min() + 1e-7 * float((case.wide**2).sum(axis=1).max()), case


def test_smea_finds_the_set_of_smallest_largest_eigenvalue_in_a_thousand_cases() -> None:
    for case in examples(960, sizes=(5, 9), most_f=2, kinds=("normal", "ties", "duplicates", "outliers")):
        check_smea(case)
    for case in examples(40, sizes=(15, 16), most_f=2):
        check_smea(case)


@needs_byzfl
def test_smea_agrees_with_byzfl_in_one_dimension() -> None:
    # There its single step of a power iteration from a random start is exact.
    for case in examples(300, sizes=(5, 9), kinds=("normal",), d=1):
        ours = aggregate(case.x, f"smea:f={case.f}").vector.numpy()
        assert np.abs(ours - byzfl.SMEA(f=case.f)(case.wide)).max() < 1e-6


def test_monna_takes_the_nearest_to_the_pivot_in_a_thousand_cases() -> None:
    for case in examples(1000):
        for pivot in (0, case.n - 1):
            apart = distances(case.wide)
            members = chosen_of(aggregate(case.x, f"monna:f={case.f},pivot={pivot}"), case, case.n - case.f)
            assert pivot in members and best_are_chosen(apart[pivot] ** 2, members, float(apart.max()) ** 2)


@pytest.mark.parametrize("text", ["krum:f={f}", "multikrum:f={f}", "mda:f={f}", "smea:f={f}"])
def test_choices_follow_the_vectors_when_these_are_permuted_moved_or_scaled(text: str) -> None:
    rng = np.random.default_rng(5)
    for case in examples(60, sizes=(5, 9), kinds=("normal", "outliers")):
        rule = text.format(f=case.f)
        first = aggregate(case.x, rule)
        order = rng.permutation(case.n)
        assert first.quality is not None
        changed = [(case.x * np.float32(4.0), first.quality), (-case.x, first.quality)]
        if not text.startswith("mda"):  # sets that share their longest pair have one diameter: the first is taken
            changed.append((case.x[order], first.quality[order]))
        for other, expected in changed:
            again = aggregate(other, rule)
            assert again.quality is not None
            assert again.quality.tolist() == expected.tolist()
        if case.kind == "normal":
            moved = aggregate(case.x + np.float32(16.0), rule)
            assert moved.quality is not None and moved.quality.tolist() == first.quality.tolist()
