"""Learning strategies: one paper, one file, its algorithm as an async function over a peer and its rounds."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ...transport.errors import ConfigError

if TYPE_CHECKING:
    from .base import Strategy

#: Strategies that a run spec may name.
BUILTIN: Mapping[str, tuple[str, str]] = {
    "diloco": (".diloco", "DiLoCo"),
    "streaming": (".streaming", "StreamingDiLoCo"),
    "async": (".async_diloco", "AsyncDiLoCo"),
    "co2": (".co2", "CO2"),
    "noloco": (".noloco", "NoLoCo"),
    "fedavg": (".fedavg", "FedAvg"),
    "scaffold": (".scaffold", "Scaffold"),
    "allreduce": (".allreduce", "AllReduce"),
    "spsa": (".spsa", "SPSA"),
    "local": (".local", "Local"),
    "gossip": (".averaging", "Gossip"),
    "dimat": (".dimat", "Dimat"),
}

#: Those whose rounds combine nothing: what is said in them is all (:attr:`Strategy.ledger`).
LEDGERS = frozenset(("spsa",))


def names() -> str:
    """All of them, for people; needs no torch."""
    return ", ".join(sorted(BUILTIN))


def check_name(name: str) -> None:
    """Raises :class:`ConfigError` for a name that is none of these; needs no torch."""
    if name not in BUILTIN:
        raise ConfigError(f"unknown strategy {name!r}: built-in strategies are {names()}")


def resolve(name: str, args: Mapping[str, float]) -> Strategy:
    """The strategy ``name`` with ``args`` over its defaults. Raises :class:`ConfigError` naming what is wrong."""
    check_name(name)
    module, kind = BUILTIN[name]
    found: type[Strategy] = getattr(importlib.import_module(module, __package__), kind)
    return found.configure(name, args)
