"""Aggregators as text: ``flag``, ``multikrum:f=3``, ``nnm+trimmed_mean:f=2``.

::

    aggregator = { before "+" } rule
    before, rule = name [ ":" key "=" value { "," key "=" value } ]

One ``f``, at whichever part it stands, holds for all parts that have one and do not say their own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import attrs

from ...transport.errors import ConfigError
from .aggregator import Aggregator
from .base import Before, CoordinateRule, GramRule, Remembering, Stage
from .bucketing import Bucketing
from .caf import CAF
from .centered_clipping import CenteredClipping
from .clipping import ARC, Clipping, Normalise
from .descent import Descent
from .flag import Flag
from .geometric_median import GeometricMedian
from .krum import Krum, MultiKrum
from .mda import MDA
from .meamed import Meamed
from .mean import Mean
from .median import Median
from .monna import MoNNA
from .nnm import NNM
from .smea import SMEA
from .trimmed_mean import TrimmedMean

RULES: Mapping[str, type[CoordinateRule] | type[GramRule]] = {
    rule.name: rule
    for rule in (
        *(Mean, Median, TrimmedMean, Meamed),
        *(Flag, Krum, MultiKrum, GeometricMedian, CenteredClipping, MDA, MoNNA, CAF, SMEA),
    )
}
BEFORE: Mapping[str, type[Before] | type[Remembering]] = {
    stage.name: stage for stage in (NNM, Bucketing, Clipping, ARC, Normalise, Descent)
}

#: Characters of a text and of a number: texts come over the network too.
_MAX_TEXT, _MAX_NUMBER = 256, 24
_WHOLE = re.compile(r"[0-9]{1,9}")
_DECIMAL = re.compile(r"[0-9]{0,12}(?:\.[0-9]{0,12})?(?:e[+-]?[0-9]{1,2})?")


def resolve(text: str) -> Aggregator:
    """The aggregator that ``text`` names; raises :class:`ConfigError` that says which part is wrong and what there
    is."""
    if len(text) > _MAX_TEXT:
        raise ConfigError(f"an aggregator of {len(text)} characters; at most {_MAX_TEXT}")
    parts = [_part(part.strip(), text) for part in text.split("+")]
    said = {values["f"] for _, values in parts if "f" in values}
    if said and not any(_has_f(kind) for kind, _ in parts):
        raise ConfigError(f"aggregator {text!r}: nothing in it has an f")
    stages = [_stage(kind, values, said) for kind, values in parts]
    *before, rule = stages
    memory = before[0] if before and isinstance(before[0], Remembering) else None
    if memory is not None:
        del before[0]
    for stage in before:
        if isinstance(stage, Remembering):
            raise ConfigError(f"aggregator {text!r}: {stage.name} remembers whose a row is, so it stands first, once")
        if not isinstance(stage, Before):
            raise ConfigError(
                f"aggregator {text!r}: {stage.name} is a rule and stands last; before it {_known(BEFORE)}"
            )
    if not isinstance(rule, CoordinateRule | GramRule):
        raise ConfigError(f"aggregator {text!r} ends in {rule.name}; a rule comes last: {_known(RULES)}")
    return Aggregator(tuple(stage for stage in before if isinstance(stage, Before)), rule, memory)


def _part(part: str, text: str) -> tuple[type[Stage], dict[str, int | float | bool | str]]:
    """(class, parameters) of one part of ``text``."""
    name, colon, rest = part.partition(":")
    kind: type[Stage] | None = RULES.get(name) or BEFORE.get(name)
    if kind is None:
        what = f"{name!r}" if name else "an empty part"
        raise ConfigError(f"aggregator {text!r}: there is no {what}; rules: {_known(RULES)}; before: {_known(BEFORE)}")
    fields = {field.name: str(field.type) for field in attrs.fields(kind)}  # type: ignore[arg-type]
    types = fields | {"f": "int"}
    values: dict[str, int | float | bool | str] = {}
    for item in rest.split(",") if colon else []:
        key, equals, value = (word.strip() for word in item.partition("="))
        if not equals:
            raise ConfigError(f"aggregator {text!r}: {item!r} is not key=value")
        if key not in types:
            raise ConfigError(f"aggregator {text!r}: {name} has no {key!r}; it has {_known(fields) or 'no parameters'}")
        if key in values:
            raise ConfigError(f"aggregator {text!r}: {name} says {key} twice")
        values[key] = _value(f"aggregator {text!r}: {name}", key, types[key], value)
    return kind, values


def _value(where: str, key: str, kind: str, text: str) -> int | float | bool | str:
    if kind == "int":
        if _WHOLE.fullmatch(text):
            return int(text)
        raise ConfigError(f"{where}: {key} must be a whole number, got {text!r}")
    if kind == "float":
        if len(text) <= _MAX_NUMBER and _DECIMAL.fullmatch(text) and any(c.isdigit() for c in text.partition("e")[0]):
            return float(text)
        raise ConfigError(f"{where}: {key} must be a number, got {text!r}")
    if kind == "bool":
        if text in ("true", "false"):
            return text == "true"
        raise ConfigError(f"{where}: {key} is true or false, got {text!r}")
    return text


def _stage(
    kind: type[Stage], values: dict[str, int | float | bool | str], said: set[int | float | bool | str]
) -> Stage:
    if not _has_f(kind):
        values = {key: value for key, value in values.items() if key != "f"}  # it is meant for the others
    elif "f" not in values:
        if len(said) != 1:
            why = f"the others say {', '.join(str(f) for f in sorted(said))}" if said else "how many liars it tolerates"
            raise ConfigError(f"{kind.name} needs f, {why}: {kind.name}:f=1")
        values = values | {"f": next(iter(said))}
    return kind.configure(values)


def _has_f(kind: type[Stage]) -> bool:
    return any(field.name == "f" for field in attrs.fields(kind))  # type: ignore[arg-type]


def _known(names: Mapping[str, object]) -> str:
    return ", ".join(names)
