"""The Noise handshake, sans-IO: XX, XXpsk0 and XXpsk3 over X25519, ChaCha20-Poly1305 and BLAKE2b.

Names follow the Noise Protocol Framework, revision 34 (https://noiseprotocol.org/noise.html): ``ck`` chaining key,
``h`` handshake hash, ``e``/``s`` our ephemeral and static key pair, ``re``/``rs`` the peer's public ones.

Theory of operation::

    XX:   -> e            <- e, ee, s, es            -> s, se
    psk0: the shared key goes in before the first token: who lacks it cannot even read message 1
    psk3: the shared key goes in after the last token

A :class:`HandshakeState` is driven by ``write_message`` and ``read_message`` in turn until ``finished``; then
``split`` gives one key per direction. Whatever the bytes, ``read_message`` raises :class:`HandshakeError` or succeeds;
after an error the state is unusable.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import attrs
import nacl.bindings as sodium
import nacl.exceptions

from .errors import HandshakeError, ProtocolMisuse

KEY = 32
HASH = 64
TAG = 16
MAX_NONCE = 2**64 - 1

#: Name of the pattern → tokens of its messages. The initiator writes the even ones.
PATTERNS: dict[str, tuple[tuple[str, ...], ...]] = {
    "XX": (("e",), ("e", "ee", "s", "es"), ("s", "se")),
    "XXpsk0": (("psk", "e"), ("e", "ee", "s", "es"), ("s", "se")),
    "XXpsk3": (("e",), ("e", "ee", "s", "es"), ("s", "se", "psk")),
}


def protocol_name(pattern: str) -> str:
    """The full Noise name of one of :data:`PATTERNS`."""
    return f"Noise_{pattern}_25519_ChaChaPoly_BLAKE2b"


@attrs.frozen(repr=False)
class KeyPair:
    """An X25519 key pair, 32 bytes each."""

    private: bytes
    public: bytes

    @classmethod
    def generate(cls, entropy: Callable[[int], bytes]) -> KeyPair:
        """A new pair from 32 bytes of ``entropy``."""
        private = entropy(KEY)
        return cls(private, sodium.crypto_scalarmult_base(private))


def _dh(pair: KeyPair, public: bytes) -> bytes:
    """X25519. Raises :class:`HandshakeError` for a public key of low order: everybody would know the result."""
    try:
        shared = sodium.crypto_scalarmult(pair.private, public)
    except nacl.exceptions.RuntimeError:  # libsodium's answer to an all-zero result
        raise HandshakeError("the peer sent a key of low order") from None
    if not any(shared):
        raise HandshakeError("the peer sent a key of low order")
    return shared


_INNER = bytes(byte ^ 0x36 for byte in range(256))
_OUTER = bytes(byte ^ 0x5C for byte in range(256))


def _hmac(key: bytes, data: bytes) -> bytes:
    """HMAC-BLAKE2b (RFC 2104), ``key`` of at most 128 bytes; in half the time of hmac's objects."""
    block = key.ljust(128, b"\0")
    inner = hashlib.blake2b(block.translate(_INNER) + data).digest()
    return hashlib.blake2b(block.translate(_OUTER) + inner).digest()


def _hkdf(chaining_key: bytes, material: bytes, outputs: int) -> list[bytes]:
    """HKDF of the Noise specification (4.3): ``outputs`` (2 or 3) keys of 64 bytes."""
    secret = _hmac(chaining_key, material)
    keys = [b""]
    for number in range(1, outputs + 1):
        keys.append(_hmac(secret, keys[-1] + bytes([number])))
    return keys[1:]


class CipherState:
    """A ChaCha20-Poly1305 key and its counter of messages (Noise 5.1). Without a key it passes bytes as they are."""

    def __init__(self, key: bytes | None = None) -> None:
        self._key = key
        self._n = 0

    @property
    def has_key(self) -> bool:
        return self._key is not None

    def _nonce(self) -> bytes:
        if self._n >= MAX_NONCE:
            raise ProtocolMisuse("a Noise cipher has used up its nonces")
        return bytes(4) + self._n.to_bytes(8, "little")

    def encrypt(self, ad: bytes, plaintext: bytes) -> bytes:
        """``plaintext`` encrypted, 16 bytes longer; ``ad`` is authenticated with it."""
        if self._key is None:
            return plaintext
        box = sodium.crypto_aead_chacha20poly1305_ietf_encrypt(plaintext, ad, self._nonce(), self._key)
        self._n += 1
        return box

    def decrypt(self, ad: bytes, box: bytes) -> bytes:
        """The plaintext. Raises :class:`HandshakeError` when ``box`` or ``ad`` is not what was encrypted."""
        if self._key is None:
            return box
        if len(box) < TAG:
            raise HandshakeError("a handshake message is too short")
        try:
            plaintext = sodium.crypto_aead_chacha20poly1305_ietf_decrypt(box, ad, self._nonce(), self._key)
        except nacl.exceptions.CryptoError:
            raise HandshakeError("a handshake message does not decrypt") from None
        self._n += 1
        return plaintext


class SymmetricState:
    """Chaining key, handshake hash and the cipher between messages (Noise 5.2)."""

    def __init__(self, protocol: str) -> None:
        name = protocol.encode()
        self.h = name.ljust(HASH, b"\0") if len(name) <= HASH else hashlib.blake2b(name).digest()
        self._ck = self.h
        self._cipher = CipherState()

    @property
    def has_key(self) -> bool:
        return self._cipher.has_key

    def mix_hash(self, data: bytes) -> None:
        self.h = hashlib.blake2b(self.h + data).digest()

    def mix_key(self, material: bytes) -> None:
        self._ck, key = _hkdf(self._ck, material, 2)
        self._cipher = CipherState(key[:KEY])

    def mix_key_and_hash(self, material: bytes) -> None:
        self._ck, mixed, key = _hkdf(self._ck, material, 3)
        self.mix_hash(mixed)
        self._cipher = CipherState(key[:KEY])

    def encrypt_and_hash(self, plaintext: bytes) -> bytes:
        box = self._cipher.encrypt(self.h, plaintext)
        self.mix_hash(box)
        return box

    def decrypt_and_hash(self, box: bytes) -> bytes:
        plaintext = self._cipher.decrypt(self.h, box)
        self.mix_hash(box)
        return plaintext

    def split(self) -> tuple[bytes, bytes]:
        first, second = _hkdf(self._ck, b"", 2)
        return first[:KEY], second[:KEY]

    def export(self, label: bytes) -> bytes:
        """32 secret bytes for ``label``, bound to the whole handshake.

        HMAC under the final chaining key over label and handshake hash: independent of the keys of ``split``, which
        take the HMAC over an empty text. ``label`` is not empty.
        """
        return _hmac(self._ck, label + self.h)[:KEY]


class HandshakeState:
    """One side of a handshake (Noise 5.3).

    ``pattern``: a key of :data:`PATTERNS`. ``prologue``: what both sides must agree on. ``entropy``: source of the
    ephemeral key. ``psk``: 32 bytes for the psk patterns, else None.
    """

    def __init__(
        self,
        pattern: str,
        *,
        initiator: bool,
        prologue: bytes,
        static: KeyPair,
        entropy: Callable[[int], bytes],
        psk: bytes | None = None,
    ) -> None:
        if ("psk" in pattern) != (psk is not None):
            raise ProtocolMisuse(f"pattern {pattern} and the shared key do not go together")
        if psk is not None and len(psk) != KEY:
            raise ProtocolMisuse(f"a shared key has {KEY} bytes, not {len(psk)}")
        self.initiator = initiator
        self.remote_static: bytes | None = None
        self._messages = PATTERNS[pattern]
        self._next = 0
        self._broken = False
        self._psk = psk
        self._s = static
        self._entropy = entropy
        self._e: KeyPair | None = None
        self._re: bytes | None = None
        self._state = SymmetricState(protocol_name(pattern))
        self._state.mix_hash(prologue)

    @property
    def finished(self) -> bool:
        return self._next == len(self._messages) and not self._broken

    @property
    def our_turn(self) -> bool:
        """True when the next message is ours to write."""
        return not self.finished and (self._next % 2 == 0) == self.initiator

    @property
    def handshake_hash(self) -> bytes:
        """64 bytes that differ whenever anything in the handshake did. Final once ``finished``."""
        return self._state.h

    def write_message(self, payload: bytes = b"") -> bytes:
        """The next message, with ``payload`` in it: encrypted from message 2 on (with psk0: from message 1 on)."""
        message = bytearray()
        for token in self._begin(ours=True):
            if token == "e":
                self._e = KeyPair.generate(self._entropy)
                message += self._e.public
                self._mix_ephemeral(self._e.public)
            elif token == "s":
                message += self._state.encrypt_and_hash(self._s.public)
            else:
                self._mix(token)
        message += self._state.encrypt_and_hash(payload)
        self._next += 1
        return bytes(message)

    def read_message(self, message: bytes) -> bytes:
        """Take the peer's next message and return its payload. Raises :class:`HandshakeError`."""
        tokens = self._begin(ours=False)
        self._broken = True  # until the message proves good
        at = 0
        for token in tokens:
            if token == "e":
                self._re, at = self._take(message, at, KEY)
                self._mix_ephemeral(self._re)
            elif token == "s":
                box, at = self._take(message, at, KEY + TAG if self._state.has_key else KEY)
                self.remote_static = self._state.decrypt_and_hash(box)
            else:
                self._mix(token)
        payload = self._state.decrypt_and_hash(message[at:])
        self._broken = False
        self._next += 1
        return payload

    def split(self) -> tuple[bytes, bytes]:
        """Keys (32 bytes) to send and to receive with, once ``finished``."""
        if not self.finished:
            raise ProtocolMisuse("the handshake has not finished")
        first, second = self._state.split()
        return (first, second) if self.initiator else (second, first)

    def export(self, label: bytes) -> bytes:
        """32 secret bytes for ``label`` that only the two sides know, once ``finished``."""
        if not self.finished:
            raise ProtocolMisuse("the handshake has not finished")
        return self._state.export(label)

    def _begin(self, *, ours: bool) -> tuple[str, ...]:
        if self._broken or self.finished or self.our_turn != ours:
            raise ProtocolMisuse("not this side's turn in the handshake")
        return self._messages[self._next]

    def _take(self, message: bytes, at: int, size: int) -> tuple[bytes, int]:
        if len(message) < at + size:
            raise HandshakeError("a handshake message is too short")
        return message[at : at + size], at + size

    def _mix_ephemeral(self, public: bytes) -> None:
        self._state.mix_hash(public)
        if self._psk is not None:  # Noise 9.2: with a shared key the ephemeral ones randomise the encryption
            self._state.mix_key(public)

    def _mix(self, token: str) -> None:
        if token == "psk":
            assert self._psk is not None
            self._state.mix_key_and_hash(self._psk)
            return
        # ee, es, se: the initiator's key is named first
        ours, theirs = (token[0], token[1]) if self.initiator else (token[1], token[0])
        pair = self._e if ours == "e" else self._s
        public = self._re if theirs == "e" else self.remote_static
        assert pair is not None
        assert public is not None
        self._state.mix_key(_dh(pair, public))
