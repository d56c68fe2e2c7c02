"""How a peer's contribution to one round is coded: the codec, and what keeps the error for later."""

from __future__ import annotations

import threading
from typing import Protocol

import attrs
from torch import Tensor

from ...transport.errors import ConfigError
from .codecs import FP32, Buffer, Codec, resolve


class Feedback(Protocol):
    """What a contributor keeps between rounds of what its codec dropped: ``ErrorFeedback``, ``EControl``."""

    codec: Codec

    def encode(self, part: Tensor, start: int, out: Buffer) -> None:
        """Code elements ``start …`` of the contribution to ``out``; may be asked for again."""

    def commit(self) -> None:
        """What was coded became part of the result."""

    def rollback(self) -> None:
        """What was coded became part of nothing."""


@attrs.frozen(eq=False)
class Coding:
    """``codec`` for all that travels in the round; ``feedback``: of this contributor alone; None drops its errors."""

    codec: Codec = FP32
    feedback: Feedback | None = None
    #: Slices are coded in several threads, and what a feedback keeps is for one at a time.
    _lock: threading.Lock = attrs.field(factory=threading.Lock, init=False, repr=False)

    @classmethod
    def of(cls, name: str, feedback: Feedback | None = None) -> Coding:
        """Raises :class:`ConfigError` for an unknown codec, or one that is not the feedback's."""
        codec = resolve(name)
        if feedback is not None and feedback.codec.name != codec.name:
            raise ConfigError(f"a feedback of {feedback.codec.name} for a reduce with {codec.name}")
        return cls(codec, feedback)

    @property
    def plain(self) -> bool:
        """Vectors travel as they are."""
        return self.codec is FP32

    def encode(self, part: Tensor, start: int, out: Buffer) -> None:
        """Code ``part``, elements ``start …`` of the contribution. Blocking."""
        if self.feedback is not None:
            with self._lock:
                self.feedback.encode(part, start, out)
        else:
            self.codec.encode(part, out)

    def settle(self, contributed: bool) -> None:
        """The round is over, and our contribution was part of it or not."""
        if self.feedback is not None:
            if contributed:
                self.feedback.commit()
            else:
                self.feedback.rollback()


#: Vectors travel as they are.
PLAIN = Coding()
