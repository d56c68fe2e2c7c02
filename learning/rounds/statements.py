"""What contributors and owners sign, so that an owner can be held to what it was given and what it made of it.

A contributor signs the root of a hash tree over the code of its part of a slice; an owner takes the part only with
that. An owner signs what it combined: whose parts with which roots, by which weights and coefficients, and the root of
a tree over the result's float32 bytes. Receivers take a combined slice only with that. See docs/audits.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import attrs

from ...transport.identity import Identity, PeerId
from ..reduce.leaves import HASH

_PART = b"shoal part v1\0"
_RECEIPT = b"shoal receipt v1\0"
_COMBINED = b"shoal combined v1\0"
_SIGNATURE = 64


@attrs.frozen
class Mark:
    """A contributor's signature of the root over its part of a slice; both empty where a run has no audits."""

    root: bytes = b""
    signature: bytes = b""


#: Of a run without audits.
UNMARKED = Mark()


@attrs.frozen
class Combined:
    """What the owner of a slice has signed, see :func:`combined_bytes`. ``products``: digest of the inner products of
    all parts of its slices, empty where the rule needs none."""

    context: bytes
    inputs: bytes
    output: bytes
    products: bytes
    signature: bytes

    def __attrs_post_init__(self) -> None:
        if not len(self.context) == len(self.inputs) == len(self.output) == HASH or len(self.products) not in (0, HASH):
            raise ValueError("hashes of another length")


def _range(key: bytes, start: int, stop: int, codec: str) -> bytes:
    return key + start.to_bytes(8, "big") + stop.to_bytes(8, "big") + codec.encode() + b"\0"


def part_bytes(key: bytes, start: int, stop: int, codec: str, root: bytes) -> bytes:
    """The bytes that a contributor signs for elements ``start..stop`` in the code of ``codec``."""
    return _PART + _range(key, start, stop, codec) + root


def sign_part(identity: Identity, key: bytes, start: int, stop: int, codec: str, root: bytes) -> Mark:
    return Mark(root, identity.sign(part_bytes(key, start, stop, codec, root)))


def mark_fault(mark: Mark, contributor: PeerId, key: bytes, start: int, stop: int, codec: str) -> str | None:
    """What is wrong with the signature of ``contributor``."""
    if len(mark.root) != HASH or len(mark.signature) != _SIGNATURE:
        return "it is not signed"
    signed = contributor.verify(part_bytes(key, start, stop, codec, mark.root), mark.signature)
    return None if signed else f"it does not bear the signature of {contributor.short}"


def context_of(members: Sequence[PeerId], weights: Sequence[int], decision: bytes) -> bytes:
    """32 bytes that name what parts are combined by: whose, with which weights, with which coefficients."""
    h = hashlib.blake2b(digest_size=HASH, person=b"shoal context 1")
    h.update(len(members).to_bytes(8, "big"))
    for member, weight in zip(members, weights, strict=True):
        h.update(member.key + weight.to_bytes(8, "big"))
    h.update(decision)
    return h.digest()


def inputs_of(roots: Sequence[bytes]) -> bytes:
    """32 bytes that name the parts of all members, in their order."""
    return hashlib.blake2b(b"".join(roots), digest_size=HASH, person=b"shoal inputs v1").digest()


def products_of(data: bytes) -> bytes:
    """32 bytes that name inner products."""
    return hashlib.blake2b(data, digest_size=HASH, person=b"shoal products1").digest() if data else b""


def combined_bytes(
    key: bytes, attempt: int, epoch: int, start: int, stop: int, codec: str, context: bytes, inputs: bytes,
    output: bytes, products: bytes,
) -> bytes:  # fmt: skip
    """The bytes that an owner signs for the combination of elements ``start..stop``."""
    generation = attempt.to_bytes(8, "big") + epoch.to_bytes(8, "big")
    return _COMBINED + generation + _range(key, start, stop, codec) + context + inputs + output + products


def combined_fault(
    combined: Combined | None, owner: PeerId, key: bytes, attempt: int, epoch: int, start: int, stop: int, codec: str,
    output: bytes,
) -> str | None:  # fmt: skip
    """What is wrong with what ``owner`` is said to have signed of a slice whose bytes have the root ``output``."""
    if combined is None:
        return "its owner has not signed it"
    if combined.output != output:
        return "its owner has signed another one"
    data = combined_bytes(
        key, attempt, epoch, start, stop, codec, combined.context, combined.inputs, output, combined.products
    )
    if not owner.verify(data, combined.signature):
        return f"it does not bear the signature of {owner.short}"
    return None


def receipt_bytes(key: bytes, start: int, stop: int, codec: str, contributor: PeerId, root: bytes) -> bytes:
    """The bytes that an owner signs when it has taken a part of ``contributor``'s."""
    return _RECEIPT + _range(key, start, stop, codec) + contributor.key + root
