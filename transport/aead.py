"""The ciphers of records: AEGIS-256, AEGIS-128L and ChaCha20-Poly1305 in place, how fast each is here, and the choice.

AEGIS is several times as fast as ChaCha20-Poly1305 where the CPU has AES instructions, and a hundred times slower
where it has not. So every node measures its ciphers once, offers them with their speeds, and :func:`choose` picks the
one whose slower side is fastest.
"""

from __future__ import annotations

import functools
import os
import struct
import time
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import nacl.bindings  # calls sodium_init(), where libsodium picks its implementations: must come before the next line
from nacl._sodium import ffi, lib

from . import defaults
from .errors import HandshakeError

_pack_counter = struct.Struct("<Q").pack_into


@attrs.frozen
class Suite:
    """One AEAD of libsodium: sizes in bytes, and where the 64-bit counter stands in the nonce (elsewhere zeros)."""

    name: str
    key: int
    nonce: int
    counter_at: int
    tag: int
    encrypt: Callable[..., int]
    decrypt: Callable[..., int]
    #: Where both stand in memory.
    addresses: tuple[int, int]


def _addresses(prefix: str) -> tuple[int, int]:
    encrypt, decrypt = (ffi.addressof(lib, f"{prefix}_{what}") for what in ("encrypt", "decrypt"))
    return int(ffi.cast("uintptr_t", encrypt)), int(ffi.cast("uintptr_t", decrypt))


_AEGIS256 = Suite(
    "aegis-256",
    nacl.bindings.crypto_aead_aegis256_KEYBYTES,
    nacl.bindings.crypto_aead_aegis256_NPUBBYTES,
    0,
    nacl.bindings.crypto_aead_aegis256_ABYTES,
    lib.crypto_aead_aegis256_encrypt,
    lib.crypto_aead_aegis256_decrypt,
    _addresses("crypto_aead_aegis256"),
)
_AEGIS128L = Suite(
    "aegis-128l",
    nacl.bindings.crypto_aead_aegis128l_KEYBYTES,
    nacl.bindings.crypto_aead_aegis128l_NPUBBYTES,
    0,
    nacl.bindings.crypto_aead_aegis128l_ABYTES,
    lib.crypto_aead_aegis128l_encrypt,
    lib.crypto_aead_aegis128l_decrypt,
    _addresses("crypto_aead_aegis128l"),
)
_CHACHA = Suite(
    "chacha20-poly1305",
    nacl.bindings.crypto_aead_chacha20poly1305_ietf_KEYBYTES,
    nacl.bindings.crypto_aead_chacha20poly1305_ietf_NPUBBYTES,
    4,  # as RFC 8439 and Noise lay it out
    nacl.bindings.crypto_aead_chacha20poly1305_ietf_ABYTES,
    lib.crypto_aead_chacha20poly1305_ietf_encrypt,
    lib.crypto_aead_chacha20poly1305_ietf_decrypt,
    _addresses("crypto_aead_chacha20poly1305_ietf"),
)

#: Name → suite, of all that this version can run.
SUITES: dict[str, Suite] = {suite.name: suite for suite in (_AEGIS128L, _AEGIS256, _CHACHA)}


class Aead:
    """One suite under one key, encrypting and decrypting in the caller's buffer, without a copy.

    The caller never uses a ``counter`` twice for sealing. ``ad`` is authenticated and not encrypted.
    """

    def __init__(self, suite: Suite, key: bytes) -> None:
        if len(key) != suite.key:
            raise ValueError(f"a key of {suite.name} has {suite.key} bytes")
        self.suite = suite
        self._key = key
        self._nonce = bytearray(suite.nonce)
        self._nonce_pointer: Any = ffi.from_buffer(self._nonce)

    @property
    def key(self) -> bytes:
        return self._key

    def seal(self, buffer: bytearray | memoryview, start: int, stop: int, counter: int, ad: bytes) -> None:
        """Encrypt ``buffer[start:stop]`` where it stands and put the tag at ``buffer[stop:stop + suite.tag]``."""
        if not 0 <= start <= stop <= len(buffer) - self.suite.tag:
            raise ValueError("no room for the tag")
        _pack_counter(self._nonce, self.suite.counter_at, counter)
        whole = ffi.from_buffer(buffer)  # held by name: it keeps the buffer in its place during the call
        place = whole + start
        null = ffi.NULL
        self.suite.encrypt(place, null, place, stop - start, ad, len(ad), null, self._nonce_pointer, self._key)

    def seal_from(
        self, source: bytes | bytearray | memoryview, buffer: memoryview, start: int, counter: int, ad: bytes
    ) -> None:
        """Encrypt ``source`` to ``buffer[start:]``, and put the tag behind it. They must not overlap."""
        size = len(source)
        if not 0 <= start <= len(buffer) - size - self.suite.tag:
            raise ValueError("no room for the tag")
        _pack_counter(self._nonce, self.suite.counter_at, counter)
        origin, whole = ffi.from_buffer(source), ffi.from_buffer(buffer)  # held by name, as above
        null = ffi.NULL
        self.suite.encrypt(whole + start, null, origin, size, ad, len(ad), null, self._nonce_pointer, self._key)

    def open_into(
        self, buffer: bytearray | memoryview, start: int, target: memoryview, counter: int, ad: bytes
    ) -> bool:
        """As :meth:`open` of ``buffer[start:]``, with the plaintext in ``target``, which has its size."""
        size = len(buffer) - start
        if start < 0 or size - self.suite.tag != len(target):
            raise ValueError("the target has another size than the plaintext")
        _pack_counter(self._nonce, self.suite.counter_at, counter)
        origin, whole = ffi.from_buffer(buffer), ffi.from_buffer(target)  # held by name, as above
        null = ffi.NULL
        return (
            self.suite.decrypt(whole, null, null, origin + start, size, ad, len(ad), self._nonce_pointer, self._key)
            == 0
        )

    def open(self, buffer: bytearray | memoryview, start: int, stop: int, counter: int, ad: bytes) -> bool:
        """Decrypt ``buffer[start:stop]``, tag included, where it stands: plaintext in ``buffer[start:stop - tag]``.

        False when it is not what was sealed under this key, counter and ``ad``; the buffer's content is then undefined.
        """
        if not 0 <= start <= stop <= len(buffer):
            raise ValueError("beyond the buffer")
        if stop - start < self.suite.tag:
            return False
        _pack_counter(self._nonce, self.suite.counter_at, counter)
        whole = ffi.from_buffer(buffer)  # held by name: it keeps the buffer in its place during the call
        place = whole + start
        null = ffi.NULL
        return (
            self.suite.decrypt(place, null, null, place, stop - start, ad, len(ad), self._nonce_pointer, self._key) == 0
        )


@attrs.frozen
class CipherOffer:
    """One cipher a peer can run, and how fast: 10⁶ bytes per second on one core."""

    name: str
    mb_per_s: int


#: Offers that do not depend on the machine, for virtual time: the figures of DESIGN.md, section 4.
NOMINAL_CIPHERS = (
    CipherOffer(_AEGIS128L.name, 5900),
    CipherOffer(_AEGIS256.name, 4400),
    CipherOffer(_CHACHA.name, 950),
)


@functools.cache
def local_ciphers() -> tuple[CipherOffer, ...]:
    """What this machine can run, measured once per process in a few ms. Depends on the machine: see NOMINAL_CIPHERS."""
    return tuple(CipherOffer(suite.name, measure(suite)) for suite in SUITES.values())


#: The time that this thread ran where there is such a clock: others that run meanwhile must not choose the cipher.
_busy = time.perf_counter if os.name == "nt" else time.thread_time


def measure(suite: Suite, clock: Callable[[], float] = _busy) -> int:
    """Speed of sealing with ``suite`` here, in 10⁶ bytes per second, at least 1: the best of a few short runs."""
    aead = Aead(suite, bytes(suite.key))
    buffer = bytearray(defaults.MEASURE_BYTES + suite.tag)
    began = clock()
    best = float("inf")
    for counter in range(16):
        before = clock()
        aead.seal(buffer, 0, defaults.MEASURE_BYTES, counter, b"")
        after = clock()
        best = min(best, after - before)
        if after - began > defaults.MEASURE_TIME:
            break
    return max(1, int(defaults.MEASURE_BYTES / max(best, 1e-9) / 1e6))


def choose(ours: Sequence[CipherOffer], theirs: Sequence[CipherOffer]) -> tuple[str, str]:
    """The cipher of a link, as ``(name, reason)``: the one whose slower side is fastest; ties go to the first name.

    Both peers come to the same answer, whoever is ``ours``. Raises :class:`HandshakeError` when nothing is in common.
    """
    their_speed = {offer.name: offer.mb_per_s for offer in theirs if offer.name in SUITES}
    common = {offer.name: min(offer.mb_per_s, their_speed[offer.name]) for offer in ours if offer.name in their_speed}
    if not common:
        raise HandshakeError("no cipher in common with the peer")
    ranking = sorted(common, key=lambda name: (-common[name], name))
    if len(ranking) == 1:
        return ranking[0], "the only cipher in common"
    others = ", ".join(f"{name} {common[name]}" for name in ranking[1:])
    return ranking[0], f"{common[ranking[0]]} MB/s on the slower side; {others}"
