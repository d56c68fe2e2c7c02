"""What a strategy is: an async function over a peer, with named, checked parameters."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import attrs

from ...transport.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from ..peer import Peer
    from ..state import Layout


class Strategy(ABC):
    """Subclasses are frozen attrs classes; their fields are the parameters (``--set name=value``).

    ``replicated``: all peers hold identical state after each round, which the commits of the run then prove.
    Otherwise rounds happen in gossip groups of ``group`` peers (0: of all) and states differ.

    ``ledger``: a state follows from any earlier one and what was said in the rounds between (:meth:`replay`), and the
    model is moved by ``peer.descend`` and ``peer.load`` alone, at the end of a round: until then it is the state.
    """

    replicated: ClassVar[bool] = True
    group: ClassVar[int] = 0
    ledger: ClassVar[bool] = False

    @abstractmethod
    async def run(self, peer: Peer) -> None:
        """Train until ``peer.rounds()`` ends. When membership is lost: cancelled, begun anew from a committed state."""

    @property
    def round_steps(self) -> int:
        """Steps of training in one round."""
        return int(getattr(self, "inner_steps", 1))

    def replay(
        self,
        run: bytes,
        layout: Layout,
        trainable: Sequence[str],
        vectors: dict[str, Tensor],
        round: int,
        voters: Sequence[bytes],
        said: Mapping[bytes, bytes],
    ) -> None:
        """Bring a state, in place, from before ``round`` to after it. ``said``: see :meth:`Round.gather`. Blocking."""
        raise NotImplementedError

    @classmethod
    def configure(cls, name: str, args: Mapping[str, float]) -> Self:
        """Build from ``(name, value)`` pairs. Raises :class:`ConfigError` naming an unknown or unusable parameter."""
        fields = {field.name: field for field in attrs.fields(cls)}  # type: ignore[arg-type]
        values: dict[str, float | int] = {}
        for key, value in args.items():
            if key not in fields:
                known = ", ".join(f"{f.name}={f.default}" for f in fields.values())
                raise ConfigError(f"strategy {name} has no parameter {key!r}; it has {known or 'none'}")
            if not math.isfinite(value):
                raise ConfigError(f"strategy {name}: {key} must be a finite number, got {value}")
            whole = isinstance(fields[key].default, int)
            if whole and value != int(value):
                raise ConfigError(f"strategy {name}: {key} must be a whole number, got {value}")
            values[key] = int(value) if whole else float(value)
        try:
            return cls(**values)
        except ValueError as error:
            raise ConfigError(f"strategy {name}: {error}") from None


def positive(instance: object, attribute: attrs.Attribute[Any], value: float) -> None:
    """Attrs validator: above zero."""
    if not value > 0:
        raise ValueError(f"{attribute.name} must be above 0, got {value}")


def fraction(instance: object, attribute: attrs.Attribute[Any], value: float) -> None:
    """Attrs validator: 0 <= value < 1."""
    if not 0 <= value < 1:
        raise ValueError(f"{attribute.name} must be in 0..1 (1 excluded), got {value}")


def share(instance: object, attribute: attrs.Attribute[Any], value: float) -> None:
    """Attrs validator: 0 <= value <= 1."""
    if not 0 <= value <= 1:
        raise ValueError(f"{attribute.name} must be in 0..1, got {value}")


def switch(instance: object, attribute: attrs.Attribute[Any], value: int) -> None:
    """Attrs validator: 0 (off) or 1 (on)."""
    if value not in (0, 1):
        raise ValueError(f"{attribute.name} must be 0 or 1, got {value}")


def not_negative(instance: object, attribute: attrs.Attribute[Any], value: float) -> None:
    """Attrs validator: zero or more."""
    if not value >= 0:
        raise ValueError(f"{attribute.name} must not be negative, got {value}")
