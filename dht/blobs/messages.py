"""What peers ask each other about blobs."""

from __future__ import annotations

import attrs

from ...transport.mux import Priority
from ...transport.rpc import Method
from .tree import Outline


@attrs.frozen
class AskBlob:
    """Do you hold ``blob``, and what of it? ``outline``: its outline is wanted too."""

    blob: bytes
    outline: bool


@attrs.frozen
class BlobInfo:
    """What the sender holds: all chunks if ``complete``, else those of the bitmap ``bits`` (:class:`.bits.Bits`)."""

    outline: Outline | None
    complete: bool
    bits: bytes


@attrs.frozen
class AskLeaves:
    """Page ``page`` of the leaves of ``blob``."""

    blob: bytes
    page: int


@attrs.frozen
class Leaves:
    leaves: bytes


@attrs.frozen
class AskChunks:
    """The bytes of these chunks of ``blob``, in this order, in the body of the answer."""

    blob: bytes
    chunks: tuple[int, ...]


@attrs.frozen
class Sent:
    """All that was asked for stands before this."""


INFO = Method("blob.info", AskBlob, BlobInfo)
LEAVES = Method("blob.leaves", AskLeaves, Leaves)
CHUNKS = Method("blob.chunks", AskChunks, Sent, Priority.BULK)

#: Codes of refusals: it holds nothing of the blob; not this chunk (any more); too much at once.
UNKNOWN, MISSING, BUSY = "unknown-blob", "missing-chunk", "busy"
