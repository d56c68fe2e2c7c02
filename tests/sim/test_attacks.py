"""What liars send: the definitions of the papers, byzfl's beside them where it is installed."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from torch import Tensor

from shoal.sim.attacks import ATTACKS, Knowledge, resolve
from shoal.transport.errors import ConfigError

from ..learning.aggregate.cases import needs_byzfl


def known(seed: int = 0, *, liars: int = 3, honest: int = 12, size: int = 40, **more: object) -> Knowledge:
    random = torch.Generator().manual_seed(seed)
    rows = torch.randn(honest + liars, size, generator=random) + 1.0
    before = torch.randn(size, generator=random)
    return Knowledge(own=rows[honest:], honest=rows[:honest], before=before, random=random, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", list(ATTACKS))
def test_every_attack_gives_a_row_for_each_liar_and_the_same_for_the_same_seed(name: str) -> None:
    flipped = known().own * 0.5
    first, again = (resolve(name).craft(known(relabelled=flipped)) for _ in range(2))
    assert first.shape == (3, 40)
    assert first.dtype == torch.float32
    assert torch.equal(first.nan_to_num(7.0), again.nan_to_num(7.0))
    assert torch.isfinite(first).all() == (name != "inf")
    honest = known()
    assert not torch.equal(first, honest.own), "that is no attack"


@pytest.mark.parametrize("name", list(ATTACKS))
def test_every_attack_works_for_one_liar_who_sees_only_its_own_work_in_the_first_round(name: str) -> None:
    own = torch.randn(1, 8, generator=torch.Generator().manual_seed(1))
    alone = Knowledge(own=own, honest=own, before=None, random=torch.Generator(), relabelled=-own)
    assert resolve(name).craft(alone).shape == (1, 8)


def test_a_sleeper_works_until_it_is_trusted() -> None:
    trusted, one_is_not = torch.tensor([0.2, 0.3, 0.02]), torch.tensor([0.2, 0.3, 0.005])
    mean = known().honest.mean(0)
    assert torch.equal(resolve("sleeper").craft(known(scores=one_is_not)), mean.expand(3, -1))
    assert torch.equal(resolve("sleeper:tau=3").craft(known(scores=trusted)), -3 * mean.expand(3, -1))
    assert torch.equal(resolve("sleeper").craft(known()), -2 * mean.expand(3, -1)), "nothing remembers them"


def test_attacks_have_the_factors_of_their_papers() -> None:
    about = known()
    mean, deviation = about.honest.mean(0), about.honest.std(0)
    for text, row in {
        "ipm": -2.0 * mean,
        "ipm:tau=0.1": -0.1 * mean,
        "alie": mean + 1.5 * deviation,
        "mimic": about.honest[0],
        "mimic:victim=5": about.honest[5],
    }.items():
        rows = resolve(text).craft(about)
        for one in rows:
            torch.testing.assert_close(one, row)
    torch.testing.assert_close(resolve("reverse").craft(about), -10.0 * about.own)
    assert float(resolve("gaussian").craft(known(size=4000)).std()) == pytest.approx(10.0, rel=0.02)
    assert float(resolve("random").craft(about).min()) >= 0.0


def test_an_optimal_attack_does_the_most_harm_among_its_factors() -> None:
    def clipped(rows: Tensor) -> Tensor:
        """A rule that ignores what is far from the median."""
        middle = rows.median(0).values
        near = (rows - middle).norm(dim=1) < 2.0 * (rows - middle).norm(dim=1).median()
        return rows[near].mean(0)

    about = known(rule=clipped)
    for name in ("alie", "ipm"):
        best = resolve(f"optimal_{name}").craft(about)
        harm = float((clipped(torch.cat([about.honest, best])) - about.mean).norm())
        for tau in (0.1, 0.5, 1.5, 5.0, 20.0):
            row = resolve(f"{name}:tau={tau}").craft(about)
            # The factors that are tried lie a factor of 1.5 apart.
            assert float((clipped(torch.cat([about.honest, row])) - about.mean).norm()) <= 1.5 * harm


def test_texts_that_name_no_attack_are_refused_with_what_there_is() -> None:
    for text, words in {
        "alei": "no attack 'alei'; there are signflip",
        "": "no attack ''",
        "alie:z=1": "alie has no 'z'; it has tau",
        "alie:tau=much": "tau must be a number, got 'much'",
        "inf:x=1": "it has no parameters",
    }.items():
        with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
            resolve(text)


@needs_byzfl
@pytest.mark.parametrize("seed", range(20))
def test_the_attacks_that_byzfl_knows_are_its(seed: int) -> None:
    theirs, about = importlib.import_module("byzfl.attacks.attacks"), known(seed)
    honest = about.honest.numpy()
    for text, attack in {
        "ipm:tau=0.7": theirs.InnerProductManipulation(tau=0.7),
        "alie:tau=1.2": theirs.ALittleIsEnough(tau=1.2),
        "mimic:victim=4": theirs.Mimic(epsilon=4),
    }.items():
        np.testing.assert_allclose(resolve(text).craft(about)[0].numpy(), attack(honest), rtol=1e-5, atol=1e-6)
