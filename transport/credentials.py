"""The X25519 key of a node, certified by its identity: made for an hour of handshakes, checked once per certificate.

A node uses one certified X25519 key for many handshakes (:class:`Credentials`, an hour by default), and remembers which
certificates it has checked. Both halve the cost of a handshake and take nothing from it: forward secrecy comes from the
ephemeral keys, fresh on both sides of each handshake and forgotten at its end (Noise 7.7: the payloads of XX after
message 2 have strong forward secrecy with static keys of any age). Who steals that key out of our memory can pass for
us until its certificate expires; but in the same memory lies the identity key, which certifies others. A certificate
that was checked is remembered by all its bytes, so nothing else passes for it; its expiry is looked at each time.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable

import attrs

from . import defaults
from .aead import CipherOffer
from .errors import HandshakeError
from .identity import Identity, PeerId
from .noise import KeyPair
from .wire import pack, unpack

_EXPIRY = struct.Struct(">d")
_CERTIFICATE_LABEL = b"shoal session key v1\0"


@attrs.frozen
class Hello:
    """What a peer says of itself, encrypted in the handshake.

    ``signature`` by ``peer`` over a fixed label, its X25519 key and ``expires`` (Unix seconds).
    """

    peer: PeerId
    expires: float
    signature: bytes
    ciphers: tuple[CipherOffer, ...]


class Credentials:
    """The X25519 key of ``identity`` and its :class:`Hello`, kept for :data:`defaults.CERTIFICATE_REUSE` seconds."""

    def __init__(self, identity: Identity, entropy: Callable[[int], bytes]) -> None:
        self.identity = identity
        self._entropy = entropy
        self._made = 0.0
        self._static: KeyPair | None = None
        self._expires = 0.0
        self._signature = b""
        self._hello: tuple[tuple[CipherOffer, ...], bytes] = ((), b"")

    def at(self, wall: float) -> KeyPair:
        """The key to shake hands with at ``wall`` (Unix seconds); a new one when the last is too old."""
        if self._static is None or not self._made <= wall < self._made + defaults.CERTIFICATE_REUSE:
            self._made = wall
            self._static = KeyPair.generate(self._entropy)
            self._expires = wall + defaults.CERTIFICATE_LIFETIME
            self._signature = self.identity.sign(_certified(self._static.public, self._expires))
            self._hello = ((), b"")
        return self._static

    def hello(self, ciphers: tuple[CipherOffer, ...]) -> bytes:
        """The packed :class:`Hello` for the key that :meth:`at` returned last."""
        if not self._hello[1] or self._hello[0] != ciphers:
            hello = Hello(self.identity.peer_id, self._expires, self._signature, ciphers)
            self._hello = (ciphers, pack(hello))
        return self._hello[1]


@functools.lru_cache(maxsize=defaults.KNOWN_CERTIFICATES)
def read_hello(payload: bytes, static: bytes) -> Hello:
    """The hello in ``payload``, once its signature has proved good for the key ``static``.

    Raises :class:`DecodeError`, :class:`HandshakeError` for the signature. What raises is not remembered.
    """
    hello = unpack(Hello, payload, limit=defaults.MAX_HANDSHAKE)
    if not hello.peer.verify(_certified(static, hello.expires), hello.signature):
        raise HandshakeError("its session key is not certified by the identity it claims")
    return hello


def _certified(static: bytes, expires: float) -> bytes:
    return _CERTIFICATE_LABEL + static + _EXPIRY.pack(expires)
