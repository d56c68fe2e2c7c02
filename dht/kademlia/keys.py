"""Places in the 256-bit key space, and the XOR distance between them."""

from __future__ import annotations

import hashlib
import random
from functools import lru_cache

from ...transport.identity import PeerId

#: Bits of a key. Keys are integers in memory (distances are one XOR) and 32 bytes, big endian, on the wire.
BITS = 256


def digest(data: bytes) -> bytes:
    """BLAKE2b-256 of ``data`` (32 bytes)."""
    return hashlib.blake2b(data, digest_size=32).digest()


def _place(label: bytes, data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=32, person=label).digest(), "big")


@lru_cache(maxsize=65536)
def node_key(peer: PeerId) -> int:
    """Where ``peer`` stands. It follows from the public key: nobody takes a place without a key that hashes there."""
    return _place(b"shoal node", peer.key)


def record_key(namespace: str, key: bytes) -> int:
    """Where the record ``key`` of ``namespace`` is kept."""
    return _place(b"shoal record", namespace.encode() + b"\0" + key)


def topic_key(topic: bytes) -> int:
    """Where the providers of ``topic`` are kept."""
    return _place(b"shoal topic", topic)


def to_bytes(key: int) -> bytes:
    return key.to_bytes(BITS // 8, "big")


def from_bytes(data: bytes) -> int:
    """Raises ``ValueError`` unless ``data`` is 32 bytes."""
    if len(data) != BITS // 8:
        raise ValueError(f"a key is {BITS // 8} bytes, not {len(data)}")
    return int.from_bytes(data, "big")


def bucket_index(own: int, key: int) -> int:
    """Leading bits that ``own`` and ``key`` share, 0..255: bucket 0 is the far half of the space. ``own != key``."""
    return BITS - (own ^ key).bit_length()


def random_key(own: int, index: int, rng: random.Random) -> int:
    """A random key whose bucket, seen from ``own``, is ``index``."""
    rest = BITS - 1 - index
    return own ^ (1 << rest) ^ (rng.getrandbits(rest) if rest else 0)
