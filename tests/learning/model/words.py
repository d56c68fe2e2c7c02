"""Words of the model: steps, budgets of faults, what is broken, and how messages are shown to people."""

from __future__ import annotations

import hashlib
from typing import Any

import attrs

from shoal.learning.rounds.messages import Commit, CommitRecord, Propose, Ready

from .seats import Value

Step = tuple[Any, ...]
Pair = tuple[int, int]


class Broken(AssertionError):
    """Something that must never happen has happened."""


@attrs.frozen
class Budget:
    """How many faults of each kind a way may have, and how many of all together.

    ``timer``: a timer fires before everything that is under way has come. ``drop``, ``twice``: a message is lost, or
    comes twice. ``crash``: a peer dies, losing all but what it stored. ``alarm``: a peer takes another for lost that
    is not. ``cut``: nothing passes from one peer to another, until it is mended. ``skip``: a message is overtaken by
    the one behind it. ``hold``: what goes from one peer to another is held back, for as long as it takes.
    """

    timer: int = 0
    drop: int = 0
    twice: int = 0
    crash: int = 0
    alarm: int = 0
    cut: int = 0
    skip: int = 0
    hold: int = 0
    total: int = 99

    def less(self, kind: str) -> Budget | None:
        left: int = getattr(self, kind)
        if left <= 0 or self.total <= 0:
            return None
        return attrs.evolve(self, **{kind: left - 1, "total": self.total - 1})


def printed(value: Value, nonces: tuple[bytes, ...]) -> bytes:
    """Stands for the fingerprint of a result."""
    members, weights = value
    return hashlib.blake2b(repr((list(map(bytes, members)), weights, nonces)).encode(), digest_size=16).digest()


def brief(message: Any) -> str:
    """For people who read a trace."""
    if isinstance(message, CommitRecord):
        return f"{message.digest.hex()[:6]} (branch {message.branch}, mean of {len(message.members)})"
    if isinstance(message, Commit):
        return f"{brief(message.record)} agreed at attempt {message.certificate.attempt}"
    parts = [f"attempt {message.attempt}"]
    if isinstance(message, Propose):
        parts.append(brief(message.record))
    if isinstance(message, Ready) and message.accepted is not None:
        held = "held" if message.holds else "no longer held"
        parts.append(f"accepted {brief(message.accepted.record)} at {message.accepted.attempt}, {held}")
    return ", ".join(parts)
