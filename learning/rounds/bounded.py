"""What all messages of a round have in common: no number is beyond 63 bits, no text unfit for a terminal."""

from __future__ import annotations

import attrs

#: Characters of a reason: people read it, and records with theirs are kept.
MAX_REASON = 2000


class Bounded:
    """A message whose integers are all 0 ≤ n < 2⁶³, its texts short and fit for a terminal, whatever a peer sends."""

    __slots__ = ()

    def __attrs_post_init__(self) -> None:
        for value in attrs.astuple(self, recurse=False):  # type: ignore[arg-type]
            for item in value if isinstance(value, tuple) else (value,):
                if isinstance(item, int) and not 0 <= item < 1 << 63:
                    raise ValueError(f"{item} is out of range")
                if isinstance(item, str) and not (len(item) <= MAX_REASON and item.isprintable()):
                    raise ValueError("a text that is too long or holds control characters")
