"""Addresses, and the signed record in which a peer publishes its own."""

from __future__ import annotations

import ipaddress
import re
from functools import lru_cache
from typing import Literal, TypeAlias
from weakref import WeakValueDictionary

import attrs

from . import defaults
from .errors import ConfigError, DecodeError
from .identity import Identity, PeerId
from .wire import converter, expect, pack, unpack

_HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,252}[A-Za-z0-9])?")
#: ``%eth0`` of a link-local IPv6 address. ipaddress takes any text there, line breaks included.
_SCOPE = re.compile(r"[A-Za-z0-9_.-]{1,32}")
_TEXT = re.compile(
    r"(?:(?P<kind>[a-z]+)://)?(?:\[(?P<six>[^\[\]]*:[^\[\]]*)\]|(?P<host>[^:\[\]]+)):(?P<port>[0-9]{1,5})"
)
_KINDS = ("tcp", "mem")


@attrs.frozen(order=True)
class Address:
    """One place a peer may be reached: ``tcp://127.0.0.1:4001``, ``tcp://[::1]:4001``, ``mem://n7:1``.

    ``host`` of a ``tcp`` address is an IP literal (names are resolved before they become addresses).
    """

    kind: str
    host: str
    port: int

    def __attrs_post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(f"unknown kind of address {self.kind!r}")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port {self.port} is not in 0..65535")
        if self.kind == "tcp":
            scope = getattr(ipaddress.ip_address(self.host), "scope_id", None)
            if scope is not None and not _SCOPE.fullmatch(scope):
                raise ValueError(f"bad IPv6 scope {scope!r}")
        elif not _HOST_NAME.fullmatch(self.host):
            raise ValueError(f"bad host name {self.host!r}")

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.kind}://{host}:{self.port}"

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read the text form; ``IP:PORT`` without a scheme means tcp. Raises :class:`ConfigError`."""
        match = _TEXT.fullmatch(text)
        if match is None:
            raise ConfigError(f"{text!r} is not an address; expected IP:PORT, for instance 203.0.113.5:4001")
        try:
            kind, host = match["kind"] or "tcp", match["six"] or match["host"]
            if kind == "tcp" and match["host"] and not host.replace(".", "").isdigit():
                raise ValueError(f"{host!r} is a name, give the IP address behind it")
            return cls(kind, str(ipaddress.ip_address(host)) if kind == "tcp" else host, int(match["port"]))
        except ValueError as error:
            raise ConfigError(f"{text!r} is not an address: {error}") from None


#: Seen from afar: this machine only, this cable only, one network behind a NAT, or anybody.
Scope: TypeAlias = Literal["loopback", "link", "private", "public"]

_PRIVATE = tuple(
    ipaddress.ip_network(text)
    for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7")
)


@lru_cache(maxsize=1024)
def scope_of(address: Address) -> Scope:
    """From where ``address`` can be dialled. RFC 1918, RFC 6598 (carriers' NAT) and RFC 4193 are private.

    Not ``ipaddress.is_private``: that counts the documentation nets too, the public ones of every lab.
    """
    if address.kind == "mem":
        return "public"
    ip = ipaddress.ip_address(address.host)
    if ip.is_loopback:
        return "loopback"
    if ip.is_link_local:
        return "link"
    return "private" if any(ip in network for network in _PRIVATE if network.version == ip.version) else "public"


def family_of(address: Address) -> str:
    """``"IPv4"``, ``"IPv6"``, or ``"memory"``."""
    return "memory" if address.kind == "mem" else "IPv6" if ":" in address.host else "IPv4"


def neighbours(one: Address, other: Address) -> bool:
    """True when both seem to be on one local network: the same IPv4 /24 or IPv6 /64, or the same memory host."""
    if family_of(one) != family_of(other):
        return False
    if one.kind == "mem":
        return one.host == other.host
    bits = 24 if ":" not in one.host else 64
    first, second = (ipaddress.ip_address(address.host.partition("%")[0]) for address in (one, other))
    shift = first.max_prefixlen - bits
    return int(first) >> shift == int(second) >> shift


#: How a packed record goes on after its first byte: its first field is its peer, 32 bytes.
_PEER_FIRST = b"\xa4peer\xc4\x20"

SIGNATURE_BYTES = 64

#: What a reachable peer may do for others: forward circuits and signals; answer STUN at its listening port, by UDP.
Service: TypeAlias = Literal["relay", "stun"]


@attrs.frozen
class RelayAddress:
    """A peer that forwards circuits, and signals, to the one whose record this stands in."""

    peer: PeerId
    addresses: tuple[Address, ...]


@attrs.frozen
class PeerRecord:
    """Where a peer says it can be reached; the newest ``seq`` wins. Times are Unix seconds.

    ``relays``: where it holds reservations, as it is not reachable itself. ``services``: what it does for others.
    """

    peer: PeerId
    seq: int
    expires: float
    addresses: tuple[Address, ...]
    relays: tuple[RelayAddress, ...] = ()
    services: tuple[Service, ...] = ()


@attrs.frozen
class SignedPeerRecord:
    """A packed :class:`PeerRecord` and its author's signature. Only :meth:`open` gives the content.

    Travels as one string of bytes, the signature first (64 bytes). Records are decoded by the thousand and most are
    never used: equal ones that came over the wire are one object as long as somebody holds it, and it is verified when
    it is first opened.
    """

    record: bytes
    signature: bytes
    _content: PeerRecord | None = attrs.field(default=None, init=False, eq=False, repr=False)
    _wire: bytes = attrs.field(default=b"", init=False, eq=False, repr=False)
    #: Whose record it says it is, not verified; None when that cannot be told, and :meth:`open` would refuse it.
    claimed: PeerId | None = attrs.field(init=False, eq=False, repr=False)

    _LABEL = b"shoal peer record v1\0"

    @claimed.default
    def _read_claimed(self) -> PeerId | None:
        head = len(_PEER_FIRST)
        if self.record[1 : 1 + head] != _PEER_FIRST or len(self.record) < head + 33:
            return None
        return PeerId(self.record[1 + head : head + 33])

    def to_bytes(self) -> bytes:
        if not self._wire:
            # Whoever is in a table is named to others again and again.
            object.__setattr__(self, "_wire", self.signature + self.record)
        return self._wire

    @classmethod
    def from_bytes(cls, data: bytes) -> SignedPeerRecord:
        """What :meth:`to_bytes` made. Raises ``ValueError`` for less than a signature."""
        known = _known.get(data)
        if known is None:
            if len(data) <= SIGNATURE_BYTES:
                raise ValueError(f"a signed peer record of {len(data)} bytes")
            known = _known[data] = cls(data[SIGNATURE_BYTES:], data[:SIGNATURE_BYTES])
            object.__setattr__(known, "_wire", data)
        return known

    @classmethod
    def sign(
        cls,
        identity: Identity,
        addresses: tuple[Address, ...],
        *,
        seq: int,
        expires: float,
        relays: tuple[RelayAddress, ...] = (),
        services: tuple[Service, ...] = (),
    ) -> SignedPeerRecord:
        """Sign where ``identity`` can be reached: the first addresses and relays, as many as a record may hold.

        Where not all fit, addresses go first: who has relays is reached through them.
        """
        addresses = addresses[: defaults.MAX_ADDRESSES]
        relays = tuple(
            RelayAddress(relay.peer, relay.addresses[: defaults.MAX_RELAY_ADDRESSES])
            for relay in relays[: defaults.MAX_RECORD_RELAYS]
        )
        while True:
            packed = pack(PeerRecord(identity.peer_id, seq, expires, addresses, relays, services))
            if len(packed) <= defaults.MAX_PEER_RECORD:
                return cls(packed, identity.sign(cls._LABEL + packed))
            if addresses:
                addresses = addresses[:-1]
            else:
                relays = relays[:-1]

    def open(self, wall: float) -> PeerRecord:
        """Verify and return the record. ``wall``: now, Unix seconds. Raises :class:`DecodeError`."""
        if len(self.record) > defaults.MAX_PEER_RECORD:
            raise DecodeError(f"peer record of {len(self.record)} bytes, at most {defaults.MAX_PEER_RECORD} allowed")
        record = self._content
        if record is None:
            record = _opened(self.record, self._LABEL, self.signature)
            object.__setattr__(self, "_content", record)  # verified: the same bytes need not be again
        if record.expires < wall - defaults.CLOCK_SKEW:
            raise DecodeError("peer record has expired", peer=record.peer.short)
        return record


#: Records that came over the wire and are still held, by their bytes.
_known: WeakValueDictionary[bytes, SignedPeerRecord] = WeakValueDictionary()

converter.register_structure_hook(SignedPeerRecord, lambda value, _: SignedPeerRecord.from_bytes(expect(bytes, value)))
converter.register_unstructure_hook(SignedPeerRecord, SignedPeerRecord.to_bytes)


@lru_cache(maxsize=4096)
def _opened(packed: bytes, label: bytes, signature: bytes) -> PeerRecord:
    """Decode and verify once (100 µs) however often the same record comes by. Failures are not remembered."""
    record = unpack(PeerRecord, packed)
    if packed[1 : 1 + len(_PEER_FIRST)] != _PEER_FIRST:
        raise DecodeError("peer record that does not begin with its peer", peer=record.peer.short)
    if not record.peer.verify(label + packed, signature):
        raise DecodeError("peer record with a wrong signature", peer=record.peer.short)
    if len(record.addresses) > defaults.MAX_ADDRESSES:
        raise DecodeError(f"peer record with {len(record.addresses)} addresses", peer=record.peer.short)
    if len(record.relays) > defaults.MAX_RECORD_RELAYS:
        raise DecodeError(f"peer record with {len(record.relays)} relays", peer=record.peer.short)
    for relay in record.relays:
        if len(relay.addresses) > defaults.MAX_RELAY_ADDRESSES:
            raise DecodeError(f"peer record with {len(relay.addresses)} addresses of a relay", peer=record.peer.short)
        if relay.peer == record.peer:
            raise DecodeError("peer record that names its author as its own relay", peer=record.peer.short)
    if len(dict.fromkeys(record.services)) != len(record.services):
        raise DecodeError("peer record that names a service twice", peer=record.peer.short)
    return record
