"""The fast keyed fingerprint that a round commits on. (The digest of a state is a blob's id: ``dht/blobs/tree.py``.)

A message authentication code under a key that is agreed only after every member holds its result, so that nobody can
prepare two vectors that agree; then even a MAC that is not collision resistant is sound. AEGIS-128L over 4 MiB pieces
where the CPU has AES (64 MiB in 3 ms; keyed BLAKE3 takes 18, BLAKE2b 96), keyed BLAKE3 otherwise. Members must compute
the same one: the leader picks an algorithm that all of them offer (:func:`choose_fingerprint`).
"""

from __future__ import annotations

import functools
import struct
import time
from collections.abc import Sequence
from typing import TypeAlias

import nacl.bindings  # noqa: F401  runs sodium_init, which picks the AES implementations of nacl._sodium below
from blake3 import blake3
from nacl._sodium import ffi, lib

from ..transport.errors import ProtocolMisuse
from . import defaults

Buffer: TypeAlias = bytes | bytearray | memoryview

FINGERPRINT_BYTES = 32
FINGERPRINT_KEY_BYTES = 32

AEGIS = "aegis128l"
BLAKE3 = "blake3"

ALGORITHMS = (AEGIS, BLAKE3)

_FINGERPRINT = "shoal 2026 fingerprint v1"


def fingerprint(algorithm: str, key: bytes, data: Buffer) -> bytes:
    """32-byte MAC of ``data`` under ``key`` (32 bytes, never used for other data before it is public). Blocking."""
    if len(key) != FINGERPRINT_KEY_BYTES:
        raise ProtocolMisuse("a fingerprint key is 32 bytes")
    # One key per algorithm, so that no tag of one says anything about the other.
    own_key = blake3(key + algorithm.encode(), derive_key_context=_FINGERPRINT).digest()
    match algorithm:
        case "aegis128l":
            return _aegis(own_key, data)
        case "blake3":
            return blake3(data, key=own_key).digest()
        case _:
            raise ProtocolMisuse(f"unknown fingerprint algorithm {algorithm!r}")


def _aegis(key: bytes, data: Buffer) -> bytes:
    """AEGIS-128L tags (empty message, piece as associated data, nonce = piece number), gathered by keyed BLAKE3."""
    view = memoryview(data)
    tags = blake3(key=key)
    tags.update(struct.pack("<Q", len(view)))
    tag, tag_size = ffi.new("unsigned char[]", 32), ffi.new("unsigned long long *")
    source = ffi.from_buffer(view)
    for number, start in enumerate(range(0, len(view), defaults.FINGERPRINT_PIECE)):
        size = min(defaults.FINGERPRINT_PIECE, len(view) - start)
        lib.crypto_aead_aegis128l_encrypt(
            tag, tag_size, ffi.NULL, 0, source + start, size, ffi.NULL, struct.pack("<QQ", number, 0), key[:16]
        )
        tags.update(bytes(ffi.buffer(tag, 32)))
    return tags.digest()


@functools.cache
def local_fingerprints() -> tuple[str, ...]:
    """The algorithms that are fast on this machine, best first. BLAKE3 always is one."""
    return (AEGIS, BLAKE3) if _aes_in_hardware() else (BLAKE3,)


def choose_fingerprint(offers: Sequence[Sequence[str]]) -> tuple[str, str]:
    """The algorithm for a round and why, from what each member offers."""
    if offers and all(AEGIS in offer for offer in offers):
        return AEGIS, "every member has AES in hardware"
    lacking = sum(AEGIS not in offer for offer in offers)
    return BLAKE3, f"{lacking} of {len(offers)} members have no AES in hardware"


def _aes_in_hardware() -> bool:
    # With and without AES differ 400-fold (5 GB/s, 10 MB/s), so the best of a few tries cannot be mistaken, however
    # busy the machine; hence reading the real clock here decides nothing that could differ between runs.
    if not hasattr(lib, "crypto_aead_aegis128l_encrypt"):
        return False
    probe, key = bytes(1 << 16), bytes(32)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        _aegis(key, probe)
        best = min(best, time.perf_counter() - start)
    return best < len(probe) / defaults.AEGIS_MIN_RATE
