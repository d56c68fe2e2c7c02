"""The calls in which rounds travel: one per message, and those for bulk."""

from __future__ import annotations

import attrs

from ...transport.identity import PeerId
from ...transport.mux import Priority
from ...transport.rpc import Method
from .messages import MESSAGES, check_codec
from .statements import UNMARKED, Combined, Mark


@attrs.frozen
class Ack:
    """Heard."""


@attrs.frozen
class Scatter:
    """A contributor's elements ``start..stop``; the body is their code by ``codec``, for fp32 their bytes.

    ``mark``: what it signed of them, where a run has audits; ``contributor``: whose they are, if not the sender's own.
    """

    key: bytes
    start: int
    stop: int
    codec: str = "fp32"
    mark: Mark = UNMARKED
    contributor: PeerId | None = None

    def __attrs_post_init__(self) -> None:
        check_codec(self.codec)


@attrs.frozen
class Taken:
    """The part is here. ``receipt``: the owner's signature for it, where a run has audits."""

    receipt: bytes = b""


@attrs.frozen
class Forward:
    """The sender's own part, for ``owner``, which does not take it from the sender itself. The body as in Scatter."""

    key: bytes
    owner: PeerId
    start: int
    stop: int
    codec: str
    mark: Mark

    def __attrs_post_init__(self) -> None:
        check_codec(self.codec)


@attrs.frozen
class Passed:
    """The sum of slice ``index`` (elements ``start..stop``) of (attempt, epoch), on its way round a ring.

    The body is its bytes in fp32: of all members from the one behind the slice's owner to the sender, each times its
    weight ÷ the weight of all."""

    key: bytes
    attempt: int
    epoch: int
    index: int
    start: int
    stop: int


@attrs.frozen
class Shared:
    """Combined slice ``index`` (elements ``start..stop``) of (attempt, epoch, hash of members).

    The body is its code by ``codec``: its owner encodes it once, and all, the owner too, decode the same bytes.
    ``signed``: by the owner, where a run has audits.
    """

    key: bytes
    attempt: int
    epoch: int
    index: int
    start: int
    stop: int
    members: bytes
    codec: str = "fp32"
    signed: Combined | None = None

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
    """The body held what was asked for, of this hash of members. ``signed``: as in :class:`Shared`, of a slice."""

    members: bytes
    signed: Combined | None = None


@attrs.frozen
class AskPart:
    """Part ``number`` of elements ``start..stop`` as its owner got it from all members or, with ``own``, as the one
    that is asked sent it itself."""

    key: bytes
    attempt: int
    epoch: int
    start: int
    stop: int
    number: int
    own: bool


@attrs.frozen
class Opened:
    """The body held what was asked for, member by member, and behind it the owner's inner products, part by part.

    ``marks``: what each has signed of its whole slice; ``paths``: the siblings on the way from the part to that root.
    """

    marks: tuple[Mark, ...]
    paths: tuple[tuple[bytes, ...], ...]


#: One unary call per message class: ``round.ready``, ``round.plan`` …
SAY: dict[type, Method] = {  # type: ignore[type-arg]
    kind: Method(f"round.{kind.__name__.lower()}", kind, Ack) for kind in MESSAGES
}
SCATTER = Method("round.scatter", Scatter, Taken, Priority.BULK)
FORWARD = Method("round.forward", Forward, Taken, Priority.BULK)
PASS = Method("round.pass", Passed, Ack, Priority.BULK)
SHARE = Method("round.share", Shared, Ack, Priority.BULK)
WANT = Method("round.want", Want, Given, Priority.BULK)
PART = Method("round.part", AskPart, Opened, Priority.BULK)
