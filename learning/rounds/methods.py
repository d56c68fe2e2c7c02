"""The calls in which rounds travel: one per message, and three for bulk."""

from __future__ import annotations

import attrs

from ...transport.mux import Priority
from ...transport.rpc import Method
from .messages import MESSAGES, check_codec


@attrs.frozen
class Ack:
    """Heard."""


@attrs.frozen
class Scatter:
    """A contributor's elements ``start..stop``; the body is their code by ``codec``, for fp32 their bytes."""

    key: bytes
    start: int
    stop: int
    codec: str = "fp32"

    def __attrs_post_init__(self) -> None:
        check_codec(self.codec)


@attrs.frozen
class Shared:
    """Combined slice ``index`` (elements ``start..stop``) of (attempt, epoch, hash of members).

    The body is its code by ``codec``: its owner encodes it once, and all, the owner too, decode the same bytes.
    """

    key: bytes
    attempt: int
    epoch: int
    index: int
    start: int
    stop: int
    members: bytes
    codec: str = "fp32"

    def __attrs_post_init__(self) -> None:
        check_codec(self.codec)


@attrs.frozen
class Want:
    """Elements ``start..stop`` of a result in fp32: of (attempt, epoch), or of the record with ``digest``, if any."""

    key: bytes
    attempt: int
    epoch: int
    start: int
    stop: int
    digest: bytes


@attrs.frozen
class Given:
    """The body held what was asked for, of this hash of members."""

    members: bytes


#: One unary call per message class: ``round.ready``, ``round.plan`` …
SAY: dict[type, Method] = {  # type: ignore[type-arg]
    kind: Method(f"round.{kind.__name__.lower()}", kind, Ack) for kind in MESSAGES
}
SCATTER = Method("round.scatter", Scatter, Ack, Priority.BULK)
SHARE = Method("round.share", Shared, Ack, Priority.BULK)
WANT = Method("round.want", Want, Given, Priority.BULK)
