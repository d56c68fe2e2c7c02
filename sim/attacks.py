"""What liars send instead of their work: attacks of the literature, for simulations. Pure functions of what they know.

Names and signs are those of the papers and of byzfl; where an attack has a factor, its default is the customary one.
An attack never sees a rule's secrets, as there are none, but the strongest ones try the rule that they face on what
they know and take the factor that does most harm.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from ..transport.errors import ConfigError
from .attack_names import LYING_DIGEST, LYING_OWNER

#: What a rule makes of rows (n, d): (d,).
Rule = Callable[[Tensor], Tensor]


@attrs.frozen(eq=False)
class Knowledge:
    """What the liars know in one round.

    ``own`` (k, d): what they would honestly have sent. ``honest`` (h, d): what the others send; who sees only its own
    work takes that. ``before`` (d,): the last result, None in the first round. ``rule``: what is done with all rows.
    ``random``: theirs in common, of this round. ``relabelled`` (k, d): their gradients on falsely labelled data.
    ``scores`` (k,): what a rule with a memory remembers of them, where it has one.
    """

    own: Tensor
    honest: Tensor
    before: Tensor | None
    random: torch.Generator
    rule: Rule | None = None
    relabelled: Tensor | None = None
    scores: Tensor | None = None

    @property
    def mean(self) -> Tensor:
        return self.honest.mean(0)

    @property
    def deviation(self) -> Tensor:
        """Standard deviation by coordinate, unbiased; where only one row is known, its distance to the last result."""
        if len(self.honest) > 1:
            return self.honest.std(0)
        return (self.honest[0] - self.before).abs() if self.before is not None else self.honest[0].abs()


class Attack(ABC):
    """One attack; its fields are its parameters."""

    name: ClassVar[str]
    #: One line for people.
    about: ClassVar[str]

    @abstractmethod
    def craft(self, known: Knowledge) -> Tensor:
        """The rows (k, d), float32, that the liars send."""


def alike(row: Tensor, known: Knowledge) -> Tensor:
    """All liars send the same."""
    return row.expand(len(known.own), -1).clone()


@attrs.frozen
class SignFlip(Attack):
    """Each sends the opposite of its work, ``factor`` times as long (1: Li et al. 2019; 10: "reverse" of Flag's)."""

    name = "signflip"
    about = "the opposite of the honest work"
    factor: float = 1.0

    def craft(self, known: Knowledge) -> Tensor:
        return -self.factor * known.own


@attrs.frozen
class Reverse(SignFlip):
    """Ten times the opposite, as in the Flag paper's repository."""

    name = "reverse"
    about = "ten times the opposite of the honest work"
    factor: float = 10.0


@attrs.frozen
class Uniform(Attack):
    """Numbers in [0, 1), all positive: the "random" attack of the Flag paper's repository."""

    name = "random"
    about = "numbers in [0, 1)"

    def craft(self, known: Knowledge) -> Tensor:
        return torch.rand(known.own.shape, generator=known.random)


@attrs.frozen
class Gaussian(Attack):
    """Independent normal numbers with standard deviation ``sigma``."""

    name = "gaussian"
    about = "normal numbers of standard deviation sigma (10)"
    sigma: float = 10.0

    def craft(self, known: Knowledge) -> Tensor:
        return self.sigma * torch.randn(known.own.shape, generator=known.random)


@attrs.frozen
class InnerProduct(Attack):
    """Inner-product manipulation (Xie et al. 2019): minus ``tau`` times the honest mean; all alike."""

    name = "ipm"
    about = "minus tau times the honest mean"
    tau: float = 2.0

    def craft(self, known: Knowledge) -> Tensor:
        return alike(-self.tau * known.mean, known)


@attrs.frozen
class LittleIsEnough(Attack):
    """A little is enough (Baruch et al. 2019): the honest mean plus ``tau`` standard deviations; all alike."""

    name = "alie"
    about = "the honest mean, tau standard deviations off"
    tau: float = 1.5

    def craft(self, known: Knowledge) -> Tensor:
        return alike(known.mean + self.tau * known.deviation, known)


class _Optimal(Attack):
    """The factor that drives the rule's result farthest from the honest mean (Shejwalkar and Houmansadr 2021)."""

    #: Factors that are tried: from small to far beyond what hides, evenly in their logarithm.
    _FACTORS = tuple(0.05 * 1.5**step for step in range(16))

    @abstractmethod
    def row(self, known: Knowledge, factor: float) -> Tensor: ...

    def craft(self, known: Knowledge) -> Tensor:
        if known.rule is None:
            return alike(self.row(known, 1.5), known)
        best, worst = self.row(known, self._FACTORS[0]), -1.0
        for factor in self._FACTORS:
            row = self.row(known, factor)
            result = known.rule(torch.cat([known.honest, alike(row, known)]))
            harm = float((result - known.mean).norm())
            if harm > worst:
                best, worst = row, harm
        return alike(best, known)


@attrs.frozen
class OptimalInnerProduct(_Optimal):
    name = "optimal_ipm"
    about = "ipm with the factor that harms the rule most"

    def row(self, known: Knowledge, factor: float) -> Tensor:
        return -factor * known.mean


@attrs.frozen
class OptimalLittleIsEnough(_Optimal):
    name = "optimal_alie"
    about = "alie with the factor that harms the rule most"

    def row(self, known: Knowledge, factor: float) -> Tensor:
        return known.mean + factor * known.deviation


@attrs.frozen
class Mimic(Attack):
    """All copy one honest member, whose work then counts too much (Karimireddy et al. 2022)."""

    name = "mimic"
    about = "copies of what one honest member sends"
    victim: int = 0

    def craft(self, known: Knowledge) -> Tensor:
        return alike(known.honest[self.victim % len(known.honest)], known)


@attrs.frozen
class LabelFlip(Attack):
    """Honest training on false labels (class c becomes 9 - c): no outlier in any norm."""

    name = "labelflip"
    about = "honest training on false labels"

    def craft(self, known: Knowledge) -> Tensor:
        if known.relabelled is None:
            raise ConfigError("attack labelflip: nothing here trains on false labels")
        return known.relabelled


@attrs.frozen
class NotFinite(Attack):
    """Infinities and NaN. They must not reach any rule."""

    name = "inf"
    about = "infinities and NaN"

    def craft(self, known: Knowledge) -> Tensor:
        rows = torch.full_like(known.own, float("inf"))
        rows[:, ::2] = float("nan")
        return rows


@attrs.frozen
class Replay(Attack):
    """The last result again, ``factor`` times as long."""

    name = "replay"
    about = "factor times the last result"
    factor: float = 10.0

    def craft(self, known: Knowledge) -> Tensor:
        return alike(-self.factor * (known.mean if known.before is None else known.before), known)


@attrs.frozen
class FreeRider(Attack):
    """No work: the last result with a little noise, which looks like work."""

    name = "freerider"
    about = "the last result with some noise instead of work"
    noise: float = 0.1

    def craft(self, known: Knowledge) -> Tensor:
        last = torch.zeros_like(known.own[0]) if known.before is None else known.before
        scale = self.noise * float(last.norm()) / len(last) ** 0.5
        noise: Tensor = scale * torch.randn(known.own.shape, generator=known.random)
        return last + noise


@attrs.frozen
class Collude(Attack):
    """Some send a poison, the others lie between it and the honest mean and make it look usual.

    The poison: ``tau`` times the mean magnitude of a coordinate, against the sign of each.
    """

    name = "collude"
    about = "some poison, the others make it look usual"
    tau: float = 3.0

    def craft(self, known: Knowledge) -> Tensor:
        poison = -self.tau * known.mean.abs().mean() * torch.sign(known.mean)
        return known.mean + torch.linspace(1.0, 0.25, len(known.own))[:, None] * poison


@attrs.frozen
class Sleeper(Attack):
    """Made for rules with a memory: the honest mean until it trusts all of them, then -``tau`` times it; all alike."""

    name = "sleeper"
    about = "the honest mean until a rule's memory trusts them, then minus tau times it"
    tau: float = 2.0

    def craft(self, known: Knowledge) -> Tensor:
        # A step takes at most 2 / rounds of the trust away: struck at a hair above 0, they are left out for a while.
        trusted = known.scores is None or float(known.scores.min()) > 0.01
        return alike(-self.tau * known.mean if trusted else known.mean, known)


ATTACKS: Mapping[str, type[Attack]] = {
    kind.name: kind
    for kind in (
        *(SignFlip, Reverse, Uniform, Gaussian, InnerProduct, LittleIsEnough),
        *(OptimalInnerProduct, OptimalLittleIsEnough, Mimic, LabelFlip, NotFinite, Replay, FreeRider, Collude),
        Sleeper,
    )
}


def check(text: str) -> None:
    """Raises :class:`ConfigError` for what no liar in a process of its own can do."""
    if text not in (LYING_OWNER, LYING_DIGEST):
        try:
            resolve(text)
        except ConfigError as error:
            more = f", {LYING_OWNER}, {LYING_DIGEST}" if "there are" in str(error) else ""
            raise ConfigError(f"{error}{more}") from None


def resolve(text: str) -> Attack:
    """``alie`` or ``alie:tau=1.2``. Raises :class:`ConfigError` that says what is wrong and what there is."""
    name, _, rest = text.partition(":")
    kind = ATTACKS.get(name)
    if kind is None:
        raise ConfigError(f"there is no attack {name!r}; there are {', '.join(ATTACKS)}")
    known = {field.name: field for field in attrs.fields(kind)}  # type: ignore[arg-type]
    values: dict[str, float | int] = {}
    for item in rest.split(",") if rest else []:
        key, _, value = (part.strip() for part in item.partition("="))
        if key not in known:
            raise ConfigError(f"attack {text!r}: {name} has no {key!r}; it has {', '.join(known) or 'no parameters'}")
        try:
            values[key] = int(value) if str(known[key].type) == "int" else float(value)
        except ValueError:
            raise ConfigError(f"attack {text!r}: {key} must be a number, got {value!r}") from None
    return kind(**values)
