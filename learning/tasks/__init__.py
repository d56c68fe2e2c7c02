"""Tasks that come with Shoal, by name. Resolved in :mod:`shoal.learning.task`; the names alone need no torch."""

from __future__ import annotations

from collections.abc import Mapping

from ...transport.errors import ConfigError

#: Built-in tasks: the only names that a run spec from the network may resolve to.
BUILTIN: Mapping[str, tuple[str, str]] = {
    "digits": (".tasks.digits", "Digits"),
    "digits-finetune": (".tasks.finetune", "DigitsFinetune"),
    "stdlib": (".tasks.stdlib", "Stdlib"),
    "stdlib-finetune": (".tasks.finetune", "StdlibFinetune"),
    "stdlib-small": (".tasks.stdlib", "StdlibSmall"),
    "stdlib-large": (".tasks.stdlib", "StdlibLarge"),
}


def check_name(name: str) -> None:
    """Raises :class:`ConfigError` for a name that is none of these."""
    if name not in BUILTIN:
        known = ", ".join(sorted(BUILTIN))
        raise ConfigError(f"unknown task {name!r}: built-in tasks are {known}; a task of your own is module:Class")
