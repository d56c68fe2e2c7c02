"""What we know about how to reach other peers: their newest signed records, bounded, least recently used first out."""

from __future__ import annotations

from . import defaults
from .address import PeerRecord, SignedPeerRecord
from .identity import PeerId


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

    def peers(self) -> list[PeerId]:
        return list(self._records)
