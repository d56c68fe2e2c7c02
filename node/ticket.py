"""The line of text that lets a stranger join a run: where to knock, which run, who founded it.

Layout, before base32 (lower case, no padding) and behind the prefix ``shoal1``::

    length     2 bytes   of the whole payload, checksum included: tells a truncated ticket from an altered one
    flags      1 byte    bit 0: a 32-byte key of a private swarm follows; other bits: from a newer Shoal, refused
    run id    32 bytes
    founder   32 bytes   PeerId; the run spec must carry this key's signature
    key       32 bytes   only with bit 0
    count      1 byte    addresses that follow: kind (4, 6 or 0 for mem), host, port (2 bytes)
    checksum   4 bytes   BLAKE2b over prefix and everything before it
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import re

import attrs

from ..transport.address import Address
from ..transport.errors import ConfigError
from ..transport.identity import PeerId
from . import defaults

PREFIX = "shoal1"

_PRIVATE = 0b0000_0001
_CHECKSUM = 4
_ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"
_AGAIN = "copy it again from the terminal that printed it"


@attrs.frozen
class Ticket:
    """Everything a joiner needs. ``run_id``: 32 bytes. ``psk``: 32 secret bytes of a private swarm, or None."""

    run_id: bytes
    founder: PeerId
    addresses: tuple[Address, ...]
    psk: bytes | None = attrs.field(default=None, repr=False)

    def __attrs_post_init__(self) -> None:
        if len(self.run_id) != 32:
            raise ValueError("a run id is 32 bytes")
        if self.psk is not None and len(self.psk) != 32:
            raise ValueError("the key of a private swarm is 32 bytes")

    def __str__(self) -> str:
        return self.encode()

    def encode(self) -> str:
        """The text form. At most :data:`defaults.MAX_TICKET_ADDRESSES` addresses travel, the first ones."""
        body = bytearray([_PRIVATE if self.psk else 0])
        body += self.run_id + self.founder.key + (self.psk or b"")
        addresses = self.addresses[: defaults.MAX_TICKET_ADDRESSES]
        body.append(len(addresses))
        for address in addresses:
            body += _pack_address(address)
        payload = (2 + len(body) + _CHECKSUM).to_bytes(2, "big") + bytes(body)
        payload += _checksum(payload)
        return PREFIX + base64.b32encode(payload).decode().rstrip("=").lower()

    @classmethod
    def parse(cls, text: str) -> Ticket:
        """Read the text form; white space from line breaks is ignored.

        Raises :class:`ConfigError` that says what is wrong (wrong prefix, other version, cut short, too
        long, a character that cannot stand in a ticket, altered) and what to do.
        """
        text = "".join(text.split()).lower()
        _check_prefix(text)
        body = text[len(PREFIX) :]
        for place, character in enumerate(body, len(PREFIX) + 1):
            if character not in _ALPHABET:
                raise ConfigError(
                    f"the ticket holds {character!r} at character {place}, which no ticket contains; {_AGAIN}"
                )
        expected = _announced_characters(body)
        if len(body) < expected:
            raise ConfigError(
                f"the ticket is cut short: {len(text)} of {len(PREFIX) + expected} characters; {_AGAIN}, whole"
            )
        if len(body) > expected:
            raise ConfigError(
                f"the ticket has {len(body) - expected} characters too many at its end "
                f"({len(text)} instead of {len(PREFIX) + expected}); {_AGAIN}"
            )
        payload = base64.b32decode(body.upper() + "=" * (-len(body) % 8))
        canonical = base64.b32encode(payload).decode().rstrip("=").lower()
        if _checksum(payload[:-_CHECKSUM]) != payload[-_CHECKSUM:] or canonical != body:
            raise ConfigError(f"the ticket was altered: its checksum does not match; {_AGAIN}")
        try:
            return cls._unpack(payload[2:-_CHECKSUM])
        except (ValueError, IndexError):
            # The checksum holds, so these are the bytes that somebody's Shoal wrote.
            raise ConfigError(
                "the ticket holds something this version of Shoal does not know; "
                "upgrade Shoal here, or make the ticket with the version that runs here"
            ) from None

    @classmethod
    def _unpack(cls, body: bytes) -> Ticket:
        flags, run_id, founder = body[0], body[1:33], body[33:65]
        if flags & ~_PRIVATE:
            raise ValueError("unknown flags")
        at = 65
        psk = None
        if flags & _PRIVATE:
            psk, at = body[at : at + 32], at + 32
        count, at = body[at], at + 1
        addresses = []
        for _ in range(count):
            address, at = _unpack_address(body, at)
            addresses.append(address)
        if at != len(body):
            raise ValueError("bytes left over")
        return cls(run_id, PeerId(founder), tuple(addresses), psk)


def _check_prefix(text: str) -> None:
    if text.startswith(PREFIX):
        return
    if not text:
        raise ConfigError("the ticket is empty; a ticket is the text beginning with shoal1 that `shoal start` prints")
    other = re.match(r"shoal([02-9]|1\d)", text)
    if other is not None:
        raise ConfigError(
            f"this is a ticket of version {other[1]}; the Shoal on this machine reads version {PREFIX[-1]}: "
            "both machines need the same version of Shoal"
        )
    shown = text if len(text) <= 16 else text[:16] + "…"
    raise ConfigError(
        f"{shown!r} is not a ticket: a ticket begins with {PREFIX!r}; `shoal start` and `shoal status` print it"
    )


def _announced_characters(body: str) -> int:
    """Characters after the prefix that a whole ticket of the announced length has."""
    if len(body) < 4:
        raise ConfigError(f"the ticket is cut short: only {len(PREFIX) + len(body)} characters; {_AGAIN}, whole")
    bits = 0
    for character in body[:4]:
        bits = bits << 5 | _ALPHABET.index(character)
    length = bits >> 4
    if not 2 + 66 + _CHECKSUM <= length <= defaults.MAX_TICKET_BYTES:
        raise ConfigError(f"the ticket was altered: it claims to hold {length} bytes; {_AGAIN}")
    return -(-length * 8 // 5)


def _checksum(data: bytes) -> bytes:
    return hashlib.blake2b(PREFIX.encode() + data, digest_size=_CHECKSUM, person=b"shoal ticket").digest()


def _pack_address(address: Address) -> bytes:
    port = address.port.to_bytes(2, "big")
    if address.kind == "mem":
        host = address.host.encode("ascii")
        return bytes([0, len(host)]) + host + port
    parsed = ipaddress.ip_address(address.host.partition("%")[0])
    return bytes([parsed.version]) + parsed.packed + port


def _unpack_address(body: bytes, at: int) -> tuple[Address, int]:
    kind = body[at]
    if kind == 0:
        size, at = body[at + 1], at + 2
    else:
        size, at = {4: 4, 6: 16}.get(kind, 0), at + 1
    raw, port = body[at : at + size], body[at + size : at + size + 2]
    if size == 0 or len(raw) != size or len(port) != 2:
        raise ValueError("bad address")
    host = raw.decode("ascii") if kind == 0 else str(ipaddress.ip_address(raw))
    return Address("mem" if kind == 0 else "tcp", host, int.from_bytes(port, "big")), at + size + 2
