"""Records and provider announcements held for others: bounded, expiring, fair per author; sans-IO.

Times are wall-clock Unix seconds, given by the caller. Everything that enters must have passed its ``check``.
"""

from __future__ import annotations

import heapq

import attrs

from ...transport.errors import DecodeError
from ...transport.identity import PeerId
from ...transport.wire import pack, unpack
from . import defaults
from .records import Announcement, SignedRecord

#: A place in the store: namespace and key.
Place = tuple[str, bytes]


@attrs.frozen
class Verdict:
    """Whether the store keeps something; if not, ``code`` (``stale``, ``quota`` or ``full``) and ``reason`` say why."""

    kept: bool
    code: str = ""
    reason: str = ""


KEPT = Verdict(True)


@attrs.define(eq=False)
class Held:
    """A record, and when a peer last gave it to us (it then gave it to the other holders as well)."""

    record: SignedRecord
    received: float


@attrs.frozen
class StoreSnapshot:
    """What survives a restart, each item packed by itself. Another ``version`` is refused."""

    version: int
    records: tuple[bytes, ...]
    announcements: tuple[bytes, ...]


class Store:
    """What the peer with node key ``own`` keeps. When records are full, the ones farthest from ``own`` give way."""

    def __init__(
        self, own: int, *, max_records: int = defaults.MAX_RECORDS, max_announcements: int = defaults.MAX_ANNOUNCEMENTS
    ) -> None:
        self._own = own
        self._max_announcements = max_announcements
        self._max_records = max_records
        self._records: dict[Place, Held] = {}
        self._farthest: list[tuple[int, Place]] = []  # heap of (-distance, place); some have gone since
        self._swept = -float("inf")  # when a full store last looked for what has expired
        self._authors: dict[PeerId, int] = {}
        self._topics: dict[bytes, dict[PeerId, Announcement]] = {}
        self._providers: dict[PeerId, dict[bytes, None]] = {}  # → its topics, oldest first
        self._by_topics: dict[int, dict[PeerId, None]] = {}  # number of topics → who has so many
        self._announcements = 0

    # -- records ---------------------------------------------------------------------------------------------

    @property
    def record_count(self) -> int:
        return len(self._records)

    @property
    def announcement_count(self) -> int:
        return self._announcements

    def put(self, record: SignedRecord, wall: float) -> Verdict:
        """Keep ``record`` (checked) if it is the newest under its key. The same record again is fine."""
        place = (record.namespace, record.key)
        held = self._records.get(place)
        if held is not None and not record.newer_than(held.record):
            # An expired record's number still stands, or an old one would come back the moment a newer one ends.
            if held.record.expires > wall and (record.seq, record.value) == (held.record.seq, held.record.value):
                held.received = wall
                return KEPT
            return Verdict(False, "stale", f"a record with sequence number {held.record.seq} is held")
        theirs = self._authors.get(record.author, 0) - (held is not None and held.record.author == record.author)
        if theirs >= defaults.MAX_RECORDS_PER_AUTHOR:
            return Verdict(False, "quota", f"{defaults.MAX_RECORDS_PER_AUTHOR} records of this author are held")
        if held is not None:
            self._take(place)
        distance = record.place ^ self._own
        if len(self._records) >= self._max_records:
            self._sweep(wall)
            if len(self._records) >= self._max_records:
                farthest = self._find_farthest()
                if distance > -farthest[0]:
                    return Verdict(False, "full", f"{self._max_records} records closer to us are held")
                self._take(farthest[1])
        self._records[place] = Held(record, wall)
        heapq.heappush(self._farthest, (-distance, place))
        if len(self._farthest) > 2 * len(self._records) + 64:
            self._farthest = [(-(held.record.place ^ self._own), p) for p, held in self._records.items()]
            heapq.heapify(self._farthest)
        self._authors[record.author] = self._authors.get(record.author, 0) + 1
        return KEPT

    def get(self, namespace: str, key: bytes, wall: float) -> SignedRecord | None:
        held = self._records.get((namespace, key))
        return held.record if held is not None and held.record.expires > wall else None

    def to_replicate(self, wall: float) -> list[SignedRecord]:
        """Live records that nobody gave us for REPLICATE_INTERVAL and up to half as much again; handled from now on.

        How much more depends on our distance to the record: its holders, who all received it at one time, do not
        all act at one time, and the first spares the others the work.
        """
        due = []
        for held in self._records.values():
            late = ((held.record.place ^ self._own) & 0xFFFF) / 0x20000
            if held.record.expires > wall and wall - held.received >= defaults.REPLICATE_INTERVAL * (1 + late):
                held.received = wall
                due.append(held.record)
        return due

    def _find_farthest(self) -> tuple[int, Place]:
        """(-distance, place) of the record farthest from us. Looking at all of them would take 18 ms of every put."""
        while self._farthest[0][1] not in self._records:
            heapq.heappop(self._farthest)
        return self._farthest[0]

    def _sweep(self, wall: float) -> None:
        """Drop what has expired, for something new, but not for each of a flood of requests: it takes a millisecond."""
        if abs(wall - self._swept) >= defaults.SWEEP_INTERVAL:
            self._swept = wall
            self.expire(wall)

    def _take(self, place: Place) -> None:
        author = self._records.pop(place).record.author
        self._authors[author] -= 1
        if not self._authors[author]:
            del self._authors[author]

    # -- providers -------------------------------------------------------------------------------------------

    def announce(self, announcement: Announcement, wall: float) -> Verdict:
        """Keep ``announcement`` (checked), or the withdrawal it is."""
        held = self._topics.get(announcement.topic, {}).get(announcement.provider)
        if held is not None:
            if announcement.issued < held.issued:
                return Verdict(False, "stale", "a newer announcement is held")
            self._topics[announcement.topic][announcement.provider] = announcement
            return KEPT
        theirs = len(self._providers.get(announcement.provider, ()))
        if theirs >= defaults.MAX_TOPICS_PER_PROVIDER:
            return Verdict(False, "quota", f"{defaults.MAX_TOPICS_PER_PROVIDER} topics of this provider are held")
        if self._announcements >= self._max_announcements:
            self._sweep(wall)
            if self._announcements >= self._max_announcements:
                most = max(self._by_topics)
                if most <= theirs + 1:
                    return Verdict(False, "full", f"{self._max_announcements} announcements are held")
                # Topics and keys are free, so many of them must keep nobody out who has few.
                greedy = next(iter(self._by_topics[most]))
                self._forget(self._topics[next(iter(self._providers[greedy]))][greedy])
        if len(self._topics.get(announcement.topic, {})) >= defaults.MAX_PROVIDERS:
            # Live providers renew, so the one to expire first is the likeliest to be gone.
            topic = self._topics[announcement.topic]
            self._forget(min(topic.values(), key=lambda other: (other.expires, other.provider)))
        self._topics.setdefault(announcement.topic, {})[announcement.provider] = announcement
        topics = self._providers.setdefault(announcement.provider, {})
        topics[announcement.topic] = None
        self._counted(announcement.provider, len(topics) - 1, len(topics))
        self._announcements += 1
        return KEPT

    def _counted(self, provider: PeerId, before: int, after: int) -> None:
        """It has ``after`` topics now."""
        if before:
            del self._by_topics[before][provider]
            if not self._by_topics[before]:
                del self._by_topics[before]
        if after:
            self._by_topics.setdefault(after, {})[provider] = None

    def providers(self, topic: bytes, wall: float) -> list[Announcement]:
        """Live announcements of ``topic``, newest first."""
        held = [a for a in self._topics.get(topic, {}).values() if a.expires > wall and not a.withdrawn]
        return sorted(held, key=lambda a: (-a.issued, a.provider))

    def _forget(self, held: Announcement) -> None:
        topic = self._topics[held.topic]
        del topic[held.provider]
        if not topic:
            del self._topics[held.topic]
        self._announcements -= 1
        topics = self._providers[held.provider]
        del topics[held.topic]
        self._counted(held.provider, len(topics) + 1, len(topics))
        if not topics:
            del self._providers[held.provider]

    # -- both ------------------------------------------------------------------------------------------------

    def expire(self, wall: float) -> int:
        """Drop what has expired; returns how many."""
        places = [place for place, held in self._records.items() if held.record.expires <= wall]
        for place in places:
            self._take(place)
        ended = [a for topic in self._topics.values() for a in topic.values() if a.expires <= wall]
        for announcement in ended:
            self._forget(announcement)
        return len(places) + len(ended)

    def save(self) -> bytes:
        """Everything held, as one strict message."""
        return pack(
            StoreSnapshot(
                version=1,
                records=tuple(pack(held.record) for held in self._records.values()),
                announcements=tuple(pack(a) for topic in self._topics.values() for a in topic.values()),
            )
        )

    def load(self, data: bytes, wall: float) -> int:
        """Take back what :meth:`save` wrote and is still alive; returns how many.

        Raises :class:`DecodeError`, taking nothing then.

        The file is our own: signatures are not checked again here, but by everybody who is given a record.
        """
        snapshot = unpack(StoreSnapshot, data, limit=defaults.MAX_SNAPSHOT)
        if snapshot.version != 1:
            raise DecodeError(f"store snapshot of version {snapshot.version}, expected 1")
        records = [unpack(SignedRecord, item) for item in snapshot.records]
        announcements = [unpack(Announcement, item) for item in snapshot.announcements]
        kept = [self.put(record, wall).kept for record in records if record.expires > wall]
        kept += [self.announce(a, wall).kept for a in announcements if a.expires > wall]
        return sum(kept)
