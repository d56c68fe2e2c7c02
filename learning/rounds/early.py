"""Messages for rounds that have not begun here: kept for a while, few of each peer, handed on when it begins."""

from __future__ import annotations

from typing import Any

import attrs

from ...transport.identity import PeerId
from ...transport.wire import pack
from .. import defaults


@attrs.frozen
class Letter:
    """``message`` came from ``sender`` at ``at`` (seconds)."""

    sender: PeerId
    message: Any
    at: float
    size: int


class Early:
    """In order of arrival. What is too old, or too much, is forgotten: its sender says it again."""

    def __init__(self) -> None:
        self._letters: list[Letter] = []

    def __len__(self) -> int:
        return len(self._letters)

    def keep(self, now: float, sender: PeerId, message: Any) -> None:
        """Keep ``message``, at the cost of the oldest of the same sender where it has too many, or of all."""
        size = len(pack(message))
        if size > defaults.MAX_EARLY_BYTES:
            return  # no honest one is that large, and what it decodes to is many times its bytes
        self._letters = [letter for letter in self._letters if now - letter.at < defaults.EARLY_MESSAGE]
        own = [letter for letter in self._letters if letter.sender == sender]
        while own and (len(own) >= defaults.MAX_EARLY_OF_PEER or _bytes(own) + size > defaults.MAX_EARLY_BYTES):
            self._letters.remove(own.pop(0))
        if len(self._letters) >= defaults.MAX_EARLY_MESSAGES:
            del self._letters[0]
        self._letters.append(Letter(sender, message, now, size))

    def take(self, now: float, key: bytes) -> list[Letter]:
        """Those for the round ``key``, in order; they are kept no longer."""
        found = [letter for letter in self._letters if letter.message.key == key]
        if found:
            self._letters = [letter for letter in self._letters if letter.message.key != key]
        return [letter for letter in found if now - letter.at < defaults.EARLY_MESSAGE]


def _bytes(letters: list[Letter]) -> int:
    return sum(letter.size for letter in letters)
