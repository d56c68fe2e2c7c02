"""STUN Binding messages, sans-IO: what address somebody sees us under, and what that says about a NAT (RFC 8489).

    request     20 bytes: type, length, magic cookie, 96 random bits; then attributes (type, length, value, padding)
    success     the same 96 bits, XOR-MAPPED-ADDRESS (the source of the request as the server saw it), FINGERPRINT
    error 420   for attributes that must be understood and are not; lists them in UNKNOWN-ATTRIBUTES

There is no authentication: an answer is believed as far as its 96 bits were guessed by nobody off the path, and is used
only as a hint where to dial (the link above checks identities). :mod:`shoal.transport.stun_service` is the I/O.
"""

from __future__ import annotations

import ipaddress
import struct
import zlib
from typing import Literal

import attrs

from . import defaults
from .address import Address
from .errors import DecodeError, ProtocolMisuse

COOKIE = 0x2112A442
BINDING = 0x001
HEADER = struct.Struct("!HHI12s")

XOR_MAPPED_ADDRESS = 0x0020
MAPPED_ADDRESS = 0x0001
ERROR_CODE = 0x0009
UNKNOWN_ATTRIBUTES = 0x000A
FINGERPRINT = 0x8028
#: Attributes that a server must understand (below 0x8000) and does: those of RFC 8489 18.3. All but the first few speak
#: of authentication, which we do not ask for and therefore pass over (RFC 8489 6.3.1).
UNDERSTOOD = frozenset((0x0001, 0x0006, 0x0008, 0x0009, 0x000A, 0x0014, 0x0015, 0x001C, 0x001D, 0x001E, 0x0020))

Kind = Literal["request", "indication", "success", "error"]
#: The two class bits of a message type, as they stand in it (RFC 8489, figure 3).
_CLASS: dict[Kind, int] = {"request": 0x000, "indication": 0x010, "success": 0x100, "error": 0x110}
_KIND: dict[int, Kind] = {bits: kind for kind, bits in _CLASS.items()}
_FINGERPRINT_XOR = 0x5354554E


@attrs.frozen
class StunMessage:
    """One STUN message. ``attributes`` in their order, without FINGERPRINT; values without padding."""

    kind: Kind
    transaction: bytes
    attributes: tuple[tuple[int, bytes], ...] = ()
    method: int = BINDING

    def first(self, attribute: int) -> bytes | None:
        """The value of the first attribute of that type: further ones are passed over (RFC 8489 5)."""
        return next((value for kind, value in self.attributes if kind == attribute), None)


def encode(message: StunMessage, *, fingerprint: bool = True) -> bytes:
    """The datagram. Raises :class:`ProtocolMisuse` for what the format cannot hold."""
    if len(message.transaction) != 12 or not 0 <= message.method < 0x1000:
        raise ProtocolMisuse(f"not a STUN message: {message!r}")
    body = b"".join(_attribute(kind, value) for kind, value in message.attributes)
    size = len(body) + (8 if fingerprint else 0)
    if HEADER.size + size > defaults.MAX_STUN:
        raise ProtocolMisuse(f"STUN message of {HEADER.size + size} bytes, at most {defaults.MAX_STUN} allowed")
    method = message.method & 0x00F | (message.method & 0x070) << 1 | (message.method & 0xF80) << 2
    data = HEADER.pack(method | _CLASS[message.kind], size, COOKIE, message.transaction) + body
    return data + _attribute(FINGERPRINT, _fingerprint(data)) if fingerprint else data


def decode(data: bytes) -> StunMessage:
    """Read one datagram. Raises :class:`DecodeError`, and nothing else whatever the bytes.

    Classic STUN (RFC 3489, no magic cookie) is refused. A FINGERPRINT must be right and last where there is one.
    """
    if not HEADER.size <= len(data) <= defaults.MAX_STUN:
        raise DecodeError(f"not STUN: {len(data)} bytes")
    kind, size, cookie, transaction = HEADER.unpack_from(data)
    if kind & 0xC000 or cookie != COOKIE:
        raise DecodeError("not STUN: wrong magic")
    if size != len(data) - HEADER.size or size % 4:
        raise DecodeError(f"STUN message says {size} bytes and has {len(data) - HEADER.size}")
    attributes: list[tuple[int, bytes]] = []
    at = HEADER.size
    while at < len(data):
        # at is a multiple of four and so is len(data): the head is whole.
        attribute, length = struct.unpack_from("!HH", data, at)
        start, at = at, at + 4 + length + -length % 4
        if at > len(data):
            raise DecodeError("a STUN attribute ends beyond its message")
        value = data[start + 4 : start + 4 + length]
        if attribute == FINGERPRINT:
            if at != len(data) or value != _fingerprint(data[:start]):
                raise DecodeError("STUN message with a wrong fingerprint")
            break
        attributes.append((attribute, value))
    method = kind & 0x000F | (kind & 0x00E0) >> 1 | (kind & 0x3E00) >> 2
    return StunMessage(_KIND[kind & 0x0110], transaction, tuple(attributes), method)


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("!HH", kind, len(value)) + value + bytes(-len(value) % 4)


def _fingerprint(before: bytes) -> bytes:
    return struct.pack("!I", zlib.crc32(before) ^ _FINGERPRINT_XOR)


def xor_address(address: Address, transaction: bytes) -> tuple[int, bytes]:
    """The attribute that carries ``address``, an IP one (RFC 8489 14.2)."""
    host = ipaddress.ip_address(address.host.partition("%")[0]).packed
    head = struct.pack("!BBH", 0, 1 if len(host) == 4 else 2, address.port ^ COOKIE >> 16)
    return XOR_MAPPED_ADDRESS, head + _xor(host, transaction)


def _xor(host: bytes, transaction: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(host, struct.pack("!I", COOKIE) + transaction, strict=False))


def mapped_address(message: StunMessage) -> Address:
    """Where a success answer says the request came from. Raises :class:`DecodeError`."""
    value = message.first(XOR_MAPPED_ADDRESS)
    plain = value is None
    if value is None:
        value = message.first(MAPPED_ADDRESS)
    if value is None:
        raise DecodeError("STUN answer without a mapped address")
    if len(value) not in (8, 20) or value[1] != (1 if len(value) == 8 else 2):
        raise DecodeError("STUN answer with a mapped address of an unknown form")
    host, port = value[4:], int.from_bytes(value[2:4], "big")
    if not plain:
        host, port = _xor(host, message.transaction), port ^ COOKIE >> 16
    return Address("tcp", str(ipaddress.ip_address(host)), port)


def request(transaction: bytes) -> bytes:
    """A Binding request; ``transaction``: 12 random bytes."""
    return encode(StunMessage("request", transaction))


def answer(data: bytes, source: Address) -> bytes | None:
    """What a server sends back to ``source`` for a datagram, None for silence.

    Malformed bytes, answers, indications and other methods get silence (RFC 8489 6.3). An answer is at most
    ``STUN_GROWTH`` bytes longer than what asked for it, so nobody gains by forging a source.
    """
    try:
        message = decode(data)
    except DecodeError:
        return None
    if message.kind != "request" or message.method != BINDING:
        return None
    unknown = [kind for kind, _ in message.attributes if kind < 0x8000 and kind not in UNDERSTOOD]
    if unknown:
        listed = b"".join(struct.pack("!H", kind) for kind in dict.fromkeys(unknown))
        refusal = ((ERROR_CODE, struct.pack("!HBB", 0, 4, 20)), (UNKNOWN_ATTRIBUTES, listed))
        return encode(StunMessage("error", message.transaction, refusal))
    return encode(StunMessage("success", message.transaction, (xor_address(source, message.transaction),)))


def read_answer(data: bytes, transaction: bytes) -> Address | str | None:
    """What a datagram says to whoever asked with ``transaction``: where they came from, a refusal in words, or None.

    None: it is no answer to that request, or one that breaks the rules; the wait goes on (RFC 8489 6.3.3 and 6.3.4).
    """
    try:
        message = decode(data)
        if message.transaction != transaction or message.method != BINDING:
            return None
        if message.kind == "success":
            if any(kind < 0x8000 and kind not in UNDERSTOOD for kind, _ in message.attributes):
                return "answered with attributes that nobody here understands"
            return mapped_address(message)
    except DecodeError:
        return None
    if message.kind != "error":
        return None
    code = message.first(ERROR_CODE)
    if code is None or len(code) < 4:
        return None
    return f"refused with code {(code[2] & 7) * 100 + code[3]}"


# --- what it says about a NAT -------------------------------------------------------------------------------------

Mapping = Literal["none", "endpoint-independent", "address-dependent", "unknown"]


@attrs.frozen
class Observation:
    """What one observer answered to requests from one local socket: ``mapped``, or None and ``trouble`` says why."""

    observer: Address
    mapped: Address | None
    trouble: str = ""


def classify_mapping(own: tuple[Address, ...], seen: tuple[Observation, ...]) -> tuple[Mapping, str]:
    """How a NAT in front of one socket maps it (RFC 4787 4.1), and the reason for people.

    ``own``: the addresses that socket has on this machine. ``none``: it is seen under one of them, nothing translates.
    ``endpoint-independent``: two hosts see the same address, so a third will too and holes can be punched ("cone").
    ``address-dependent``: they see different ones ("symmetric"). Two ports of one host cannot tell the middle two
    apart unless they differ.
    """
    found = [(observation, observation.mapped) for observation in seen if observation.mapped is not None]
    if not found:
        why = "; ".join(f"{observation.observer}: {observation.trouble}" for observation in seen)
        return "unknown", f"no observer answered ({why})" if why else "nobody was asked"
    first, mapped = found[0]
    if all(address in own for _, address in found):
        return "none", f"{first.observer} sees {mapped}, which is this machine's own address"
    for other, address in found[1:]:
        if (":" in address.host) == (":" in mapped.host) and address != mapped:
            return "address-dependent", f"{first.observer} sees {mapped}, {other.observer} sees {address}"
    for other, address in found[1:]:
        if address == mapped and other.observer.host != first.observer.host:
            return "endpoint-independent", f"{first.observer} and {other.observer} both see {mapped}"
    return "unknown", f"only {first.observer.host} answered: it sees {mapped}, and one host cannot tell the rest"
