"""What we know about how to reach other peers: their newest signed records, bounded, least recently used first out."""

from __future__ import annotations

from . import defaults
from .address import Address, PeerRecord, RelayAddress, Service, SignedPeerRecord
from .identity import Identity, PeerId


class Contacts:
    """Verified records by peer. A contact is not a link, and costs nothing but memory."""

    def __init__(self, limit: int = defaults.MAX_CONTACTS) -> None:
        self._limit = limit
        self._records: dict[PeerId, tuple[SignedPeerRecord, PeerRecord]] = {}  # least recently used first

    def __len__(self) -> int:
        return len(self._records)

    def learn(self, signed: SignedPeerRecord, wall: float) -> PeerRecord:
        """Verify and keep ``signed`` unless a newer one is known. Raises :class:`DecodeError`."""
        record = signed.open(wall)
        known = self._records.pop(record.peer, None)
        if known is not None and known[1].seq >= record.seq:
            signed, _ = known
            self._records[record.peer] = known
            return known[1]
        self._records[record.peer] = (signed, record)
        if len(self._records) > self._limit:
            del self._records[next(iter(self._records))]
        return record

    def get(self, peer: PeerId, wall: float) -> tuple[SignedPeerRecord, PeerRecord] | None:
        """The newest record of ``peer`` that has not expired."""
        known = self._records.pop(peer, None)
        if known is None or known[1].expires < wall - defaults.CLOCK_SKEW:
            return None
        self._records[peer] = known
        return known

    def offering(self, service: Service, wall: float) -> list[PeerRecord]:
        """Records of peers that offer ``service`` and have not expired, most recently used first."""
        fresh = wall - defaults.CLOCK_SKEW
        records = [record for _, record in self._records.values() if service in record.services]
        return [record for record in reversed(records) if record.expires >= fresh]

    def peers(self) -> list[PeerId]:
        return list(self._records)


class OwnRecord:
    """Our own record, signed anew only when what stands in it has changed or half its life is over."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._signed: SignedPeerRecord | None = None
        self._content: tuple[object, ...] = ()
        self._seq = 0
        self._expires = 0.0

    def signed(
        self,
        addresses: tuple[Address, ...],
        wall: float,
        *,
        relays: tuple[RelayAddress, ...] = (),
        services: tuple[Service, ...] = (),
    ) -> SignedPeerRecord:
        """The record for ``addresses``, ``relays`` and ``services``; ``wall``: now, Unix seconds."""
        fresh = self._expires > wall + defaults.PEER_RECORD_LIFETIME / 2
        content = (addresses, relays, services)
        if self._signed is None or not fresh or content != self._content:
            # Milliseconds rise over restarts too, and no more than one record per millisecond is signed.
            self._seq = max(int(wall * 1000), self._seq + 1)
            self._expires = wall + defaults.PEER_RECORD_LIFETIME
            self._content = content
            self._signed = SignedPeerRecord.sign(
                self._identity, addresses, seq=self._seq, expires=self._expires, relays=relays, services=services
            )
        return self._signed
