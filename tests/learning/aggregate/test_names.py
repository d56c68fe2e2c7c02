"""Aggregators as text, and what is refused before any rule sees it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.learning.aggregate import BEFORE, RULES, aggregate, resolve
from shoal.transport.errors import ConfigError


@pytest.mark.parametrize("name", [*RULES, *BEFORE])
def test_every_name_resolves_and_its_text_resolves_to_the_same(name: str) -> None:
    text = name if name in RULES else f"{name}+median"
    rule = resolve(text + (":f=1" if "f" in _fields(name) else ""))
    assert resolve(str(rule)) == rule
    rule.check(9)


def _fields(name: str) -> list[str]:
    kind = {**RULES, **BEFORE}[name]
    return [field.name for field in kind.__attrs_attrs__]  # type: ignore[attr-defined]


def test_one_f_holds_for_all_parts() -> None:
    for text in ("nnm+trimmed_mean:f=2", "nnm:f=2+trimmed_mean", "nnm:f=2+trimmed_mean:f=2"):
        assert str(resolve(text)) == "nnm:f=2+trimmed_mean:f=2"
    assert str(resolve("arc+nnm+flag:f=3")) == "arc:f=3+nnm:f=3+flag"
    assert str(resolve(" nnm : f = 1 + median ".replace(" :", ":"))) == "nnm:f=1+median"
    assert str(resolve("arc:f=1+nnm:f=2+meamed:f=3")) == "arc:f=1+nnm:f=2+meamed:f=3"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "there is no an empty part"),
        ("flagg", "there is no 'flagg'; rules: mean, median"),
        ("nnm+", "an empty part"),
        ("median+nnm:f=1", "median is a rule and stands last; before it nnm"),
        ("nnm:f=1", "ends in nnm; a rule comes last"),
        ("descent:f=1", "ends in descent; a rule comes last"),
        ("normalise+descent:f=1+mean", "descent remembers whose a row is, so it stands first, once"),
        ("descent:f=1+descent:f=1+mean", "descent remembers whose a row is, so it stands first, once"),
        ("descent:f=1,rounds=0+mean", "descent: rounds must be 1 to 100000, got 0"),
        ("normalise:to=two+mean", "normalise: to is one of one, median, got 'two'"),
        ("median+mean", "median is a rule and stands last"),
        ("krum", "krum needs f, how many liars it tolerates: krum:f=1"),
        ("nnm:f=1+arc:f=2+meamed", "meamed needs f, the others say 1, 2"),
        ("median:f=2", "nothing in it has an f"),
        ("krum:g=2", "krum has no 'g'; it has f, definition"),
        ("krum:f", "'f' is not key=value"),
        ("krum:", "'' is not key=value"),
        ("krum:f=1,f=2", "krum says f twice"),
        ("krum:f=-1", "f must be a whole number, got '-1'"),
        ("krum:f=1.5", "f must be a whole number"),
        ("krum:f=99999999999", "f must be a whole number"),
        ("krum:f=99999999", "krum: f must be 0 or more, got 99999999"),
        ("krum:f=1,definition=mine", "krum: definition is one of blanchard, byzfl, garfield, got 'mine'"),
        ("clipping:c=nan+mean", "c must be a number, got 'nan'"),
        ("clipping:c=+mean", "c must be a number, got ''"),
        ("clipping:c=0+mean", "clipping: c must be above 0, got 0.0"),
        ("centered_clipping:tau=.", "tau must be a number"),
        ("flag:normalise=yes", "normalise is true or false, got 'yes'"),
        ("flag:iterations=0", "flag: iterations must be 1 or more"),
        ("flag:lam=1e999", "lam must be a number"),
        ("bucketing:s=0+median", "bucketing: s must be above 0, got 0"),
        ("x" * 300, "an aggregator of 300 characters; at most 256"),
    ],
)
def test_what_is_wrong_in_a_text_is_named(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(text)
    assert words in str(caught.value)


@given(st.text(alphabet="flagkrumnm:=+,.0123456789e-_ ", max_size=40))
def test_any_text_resolves_or_is_a_config_error(text: str) -> None:
    try:
        rule = resolve(text)
    except ConfigError:
        return
    assert resolve(str(rule)) == rule


@pytest.mark.parametrize(
    ("text", "n", "words"),
    [
        ("trimmed_mean:f=3", 6, "trimmed_mean: f = 3 of 6 vectors cannot be tolerated: n > 2 f, so at least 7 vectors"),
        ("meamed:f=1", 2, "n > 2 f"),
        ("krum:f=2", 6, "n >= 2 f + 3, so at least 7"),
        ("krum:f=2,definition=garfield", 6, "n >= 2 f + 3"),
        ("krum:f=3,definition=byzfl", 6, "n > 2 f"),
        ("multikrum:f=1,keep=8", 7, "keep = 8"),
        ("mda:f=2", 4, "n > 2 f"),
        ("mda:f=25", 60, "f = 25 takes too long; at most 24"),
        ("monna:f=2", 4, "n > 2 f"),
        ("monna:f=1,pivot=5", 5, "pivot = 5, counted from 0, so at least 6"),
        ("caf:f=2", 4, "n > 2 f"),
        ("smea:f=2", 4, "n > 2 f"),
        ("smea:f=16", 40, "62852101650 sets; at most 100000"),
        ("nnm:f=3+median", 6, "nnm: f = 3 of 6"),
        ("arc:f=3+median", 6, "arc: f = 3 of 6"),
        ("bucketing:s=4+trimmed_mean:f=2", 16, "trimmed_mean: f = 2 of 4"),
    ],
)
def test_what_cannot_be_tolerated_is_refused(text: str, n: int, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        aggregate(np.zeros((n, 3), np.float32), text)
    assert words in str(caught.value)


@pytest.mark.parametrize("text", ["mean", "median", "trimmed_mean:f=1", "meamed:f=1", "flag", "nnm+median:f=1"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_reaches_no_rule(text: str, value: float) -> None:
    x = np.random.default_rng(1).standard_normal((5, 400)).astype(np.float32)
    for at in (0, 200, 399):
        wrong = x.copy()
        wrong[3, at] = value
        with pytest.raises(ConfigError) as caught:
            aggregate(wrong, text)
        what = "NaN" if np.isnan(value) else "infinity"
        assert str(caught.value) == f"vector 3 is refused: {what} at {at}; 1 of 400 values are not finite"


def test_large_finite_values_are_taken() -> None:
    x = np.full((4, 3), 3e38, np.float32)
    for text in ("mean", "median", "trimmed_mean:f=1", "krum:f=0", "geometric_median"):
        assert np.allclose(aggregate(x, text).vector, 3e38, rtol=1e-6)


@pytest.mark.parametrize(
    ("vectors", "words"),
    [
        ([], "no vectors to aggregate"),
        (np.zeros((0, 3), np.float32), "no vectors to aggregate"),
        (np.zeros(3, np.float32), "a matrix (n, d), got the shape (3,)"),
        (np.zeros((2, 3)), "vector 0 is float64; rules take float32"),
        (torch.zeros(2, 3, dtype=torch.float64), "vector 0 is torch.float64 on cpu"),
        ([torch.zeros(3), torch.zeros(4)], "vector 1 has 4 elements, vector 0 has 3"),
        ([torch.zeros(3), torch.zeros(1, 3)], "vector 1 has the shape (1, 3); rules take (d,)"),
        ([torch.zeros(0)], "vector 0 has the shape (0,)"),
        ([[1.0, 2.0]], "vector 0 is a list, neither tensor nor array"),
        (torch.zeros(2, 3, device="meta"), "on meta; rules take float32 on the CPU"),
    ],
)
def test_wrong_shapes_and_types_are_refused(vectors: object, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        aggregate(vectors, "mean")  # type: ignore[arg-type]
    assert words in str(caught.value)


def test_a_wrong_reference_or_wrong_weights_are_refused() -> None:
    x = np.zeros((3, 4), np.float32)
    with pytest.raises(ConfigError, match="2 weights for 3 vectors"):
        aggregate(x, "mean", [1.0, 2.0])
    with pytest.raises(ConfigError, match="the reference is refused: NaN at 0"):
        aggregate(x, "centered_clipping", reference=torch.full((4,), float("nan")))
    with pytest.raises(ConfigError, match="vector 3 has 5 elements"):
        aggregate(x, "centered_clipping", reference=torch.zeros(5))


def test_views_and_other_layouts_are_taken() -> None:
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    expected = aggregate(x, "median").vector.tolist()
    assert aggregate(list(x.numpy()), "median").vector.tolist() == expected
    assert aggregate(x.t().contiguous().t(), "median").vector.tolist() == expected
    assert aggregate(np.asfortranarray(x.numpy()), "median").vector.tolist() == expected
    assert aggregate(x.requires_grad_(), "median").vector.tolist() == expected
