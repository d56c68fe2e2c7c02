"""What peers say of owners of slices that may be lying. Every message names its round, attempt and epoch."""

from __future__ import annotations

import attrs

from ...transport.identity import PeerId
from .. import defaults
from .bounded import Bounded


@attrs.frozen
class Accuse(Bounded):
    """The sender has found that the owner of slice ``index`` did not combine what it was given in part ``number`` of
    it, or does not show it. Whoever hears this looks there itself, and believes nobody."""

    key: bytes
    attempt: int
    epoch: int
    index: int
    number: int


@attrs.frozen
class Proof(Bounded):
    """A packed :class:`.lies.Lie`: whoever gets it checks it, and needs to look nowhere."""

    key: bytes
    lie: bytes

    def __attrs_post_init__(self) -> None:
        if len(self.lie) > defaults.MAX_LIE:
            raise ValueError(f"a proof of {len(self.lie)} bytes")


@attrs.frozen
class Missing(Bounded):
    """The leader tells a member that ``owner`` says it does not hold the member's part of its slices."""

    key: bytes
    attempt: int
    epoch: int
    owner: PeerId


@attrs.frozen
class Receipt(Bounded):
    """``owner`` has signed that it holds elements ``start..stop`` of the sender's contribution, whose root is this."""

    start: int
    stop: int
    codec: str
    root: bytes
    signature: bytes


@attrs.frozen
class Receipts(Bounded):
    """A member shows what ``owner`` has signed for."""

    key: bytes
    attempt: int
    epoch: int
    owner: PeerId
    receipts: tuple[Receipt, ...]


@attrs.frozen
class Denied(Bounded):
    """The sender has a part of ``contributor``'s that is as it should be, and ``owner`` does not take it."""

    key: bytes
    attempt: int
    epoch: int
    contributor: PeerId
    owner: PeerId
