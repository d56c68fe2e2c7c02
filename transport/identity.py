"""Who a peer is: an Ed25519 key, the PeerId that is its public half, and the key file."""

from __future__ import annotations

import base64
import binascii
import functools
import os
import stat
from collections.abc import Callable
from pathlib import Path

import nacl.bindings as sodium
import nacl.exceptions

from .errors import ConfigError

_KEY_HEADER = "shoal-key-v1 "


@functools.lru_cache(maxsize=1024)
def _text(key: bytes) -> str:
    # Every call and every error names its peer.
    return base64.b32encode(key).decode().rstrip("=").lower()


class PeerId(bytes):
    """A peer's public key (32 bytes). Text form: base32 in lower case; short form: its first 8 characters.

    A subclass of bytes: peers are keys of dictionaries everywhere, and hashing and comparing are a fifth of what they
    cost in a class of our own. Raises ``ValueError`` for anything but 32 bytes.
    """

    __slots__ = ()

    def __new__(cls, key: bytes) -> PeerId:
        if not isinstance(key, bytes) or len(key) != 32:
            raise ValueError("a PeerId is 32 bytes")
        return super().__new__(cls, key)

    @property
    def key(self) -> bytes:
        return bytes(self)

    @property
    def text(self) -> str:
        return _text(self)

    @property
    def short(self) -> str:
        # Of all names the one that is made most: the first 5 bytes are exactly 8 characters.
        return base64.b32encode(self[:5]).decode().lower()

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"PeerId({self.short})"

    @classmethod
    def parse(cls, text: str) -> PeerId:
        """Read the text form. Raises :class:`ConfigError`."""
        plain = text.strip().lower()
        try:
            peer = cls(base64.b32decode(plain.upper() + "===="))
        except (binascii.Error, ValueError):
            peer = None
        if peer is None or peer.text != plain:  # 52 characters hold 4 bits more than a key: only one text is the peer's
            raise ConfigError(f"{text!r} is not a peer id: expected 52 letters and digits 2-7")
        return peer

    def verify(self, message: bytes, signature: bytes) -> bool:
        """True when ``signature`` (64 bytes) is this peer's over ``message``."""
        if len(signature) != sodium.crypto_sign_BYTES:
            return False
        try:
            sodium.crypto_sign_open(signature + message, self.key)
        except (nacl.exceptions.BadSignatureError, nacl.exceptions.CryptoError, ValueError):
            return False
        return True


class Identity:
    """A peer's signing key, held in memory. ``seed`` is 32 secret bytes."""

    def __init__(self, seed: bytes) -> None:
        if len(seed) != 32:
            raise ValueError("an identity seed is 32 bytes")
        self._seed = seed
        public, self._secret = sodium.crypto_sign_seed_keypair(seed)
        self.peer_id = PeerId(public)

    def sign(self, message: bytes) -> bytes:
        """64-byte Ed25519 signature. Callers prefix ``message`` with a label of their own (domain separation)."""
        return sodium.crypto_sign(message, self._secret)[:64]

    @classmethod
    def load_or_create(cls, path: Path, entropy: Callable[[int], bytes]) -> Identity:
        """Read the key file, or make one with mode 0600.

        Raises :class:`ConfigError` naming the file when it is unreadable, malformed, or readable by others.
        """
        try:
            if path.exists():
                return cls._load(path)
            seed = entropy(32)
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            # Complete before it has its name: a crash in between must not leave half a key that stops later starts.
            draft = path.with_name(f"{path.name}.{os.getpid()}.new")
            draft.unlink(missing_ok=True)
            try:
                with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                    file.write(_KEY_HEADER + base64.b32encode(seed).decode() + "\n")
                    file.flush()
                    os.fsync(file.fileno())
                os.link(draft, path)  # unlike a rename it never replaces the key of a process that was faster
            except FileExistsError:
                return cls._load(path)
            finally:
                draft.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot write the key file {path}: {error.strerror}") from error
        return cls(seed)

    @classmethod
    def _load(cls, path: Path) -> Identity:
        try:
            mode = path.stat().st_mode
            text = path.read_text("ascii", errors="replace")
        except OSError as error:
            raise ConfigError(f"cannot read the key file {path}: {error.strerror}") from error
        if os.name == "posix" and mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ConfigError(
                f"the key file {path} can be read by others (mode {stat.S_IMODE(mode):04o}); run: chmod 600 {path}"
            )
        try:
            if not text.startswith(_KEY_HEADER):
                raise ValueError
            return cls(base64.b32decode(text[len(_KEY_HEADER) :].strip()))
        except (binascii.Error, ValueError):
            raise ConfigError(
                f"the key file {path} is damaged; restore it from a backup, or delete it to become a new peer"
            ) from None
