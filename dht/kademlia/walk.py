"""Asking other peers: single questions with their bookkeeping, and whole lookups driven over RPC."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TypeVar

import trio

from ...transport import deadlines
from ...transport.address import SignedPeerRecord
from ...transport.endpoint import Endpoint
from ...transport.errors import DecodeError, Overloaded, RemoteError, RemoteRefused
from ...transport.identity import PeerId
from ...transport.link import Link
from ...transport.rpc import Method
from . import defaults, messages
from .keys import BITS, node_key, to_bytes
from .lookup import Lookup
from .lookup_run import Ask, LookupRun, Reply
from .region import SizeEstimate
from .service import Counters
from .table import Contact, RoutingTable, networks_of

Q = TypeVar("Q")
R = TypeVar("R")

#: Refusals that mean that the peer does not take part in the DHT. Any other one comes from a live peer that serves.
NOT_SERVING = ("unknown_method", "unknown_protocol", "bad_request")


class Walker:
    """Sends questions for the peer behind ``endpoint``; keeps ``table`` and the lost contacts up to date."""

    def __init__(self, endpoint: Endpoint, table: RoutingTable, counters: Counters, *, serve: bool) -> None:
        self.endpoint, self.table, self.counters, self._serve = endpoint, table, counters, serve
        self.host = endpoint.host
        self.size = SizeEstimate()
        #: Contacts that left the table because they did not answer, longest ago first: tried again later.
        self.lost: dict[PeerId, SignedPeerRecord] = {}

    # -- bookkeeping -----------------------------------------------------------------------------------------

    def heard(self, peer: PeerId) -> None:
        """``peer`` is alive and serves: into the table with it, if we know where it can be reached."""
        now, held = self.host.now(), self.table.get(peer)
        if held is not None and not held.failures and now - held.last_seen < defaults.HEARD_ANEW:
            return
        record = self.endpoint.contact(peer)
        if record is None:
            return
        link, wall = self.endpoint.link(peer), self.host.wall()
        rtt = None if link is None or link.rtt <= 0 else link.rtt
        if held is not None and held.record is record and held.expires > wall:
            self.table.touch(held, now, rtt)
            return
        try:
            opened = record.open(wall)
        except DecodeError:  # it ran out: the next link or ping brings a fresh one
            return
        if held is not None and held.record == record:
            networks = held.networks
        else:
            # Where it really comes from counts as well as what it says.
            networks = networks_of(opened.addresses if link is None else (link.remote, *opened.addresses))
        self.table.seen(Contact(peer, record, opened.expires, networks, now, rtt), now)
        self.lost.pop(peer, None)

    def missed(self, peer: PeerId) -> None:
        """``peer`` did not answer."""
        dropped = self.table.failed(peer)
        if dropped is not None:
            self.remember(peer, dropped.record)

    def remember(self, peer: PeerId, record: SignedPeerRecord) -> None:
        """Keep a contact that is not in the table, to try it again."""
        if peer == self.endpoint.peer_id:
            return
        self.lost.pop(peer, None)
        self.lost[peer] = record
        if len(self.lost) > defaults.MAX_LOST:
            del self.lost[next(iter(self.lost))]

    def learn(self, record: SignedPeerRecord) -> None:
        """Hand a contact to the endpoint unless it has this very one. Raises :class:`DecodeError`."""
        peer = record.open(self.host.wall()).peer
        if peer != self.endpoint.peer_id and self.endpoint.contact(peer) != record:
            self.endpoint.learn(record)

    def patience(self, link: Link | None) -> float:
        """Seconds for one question, the dial to a peer without a link included."""
        return deadlines.query(0.0 if link is None else link.rtt, self.endpoint.lag.value(self.host.now()))

    # -- one question ----------------------------------------------------------------------------------------

    async def ask(self, peer: PeerId, method: Method[Q, R], request: Q) -> R:
        """One call with its deadline; what becomes of it is noted in the table.

        Raises :class:`RemoteError`, or :class:`Overloaded` when we have no link to spare.
        """
        self.counters.queries += 1
        link = self.endpoint.link(peer)
        if link is None and (held := self.table.get(peer)) is not None and self.endpoint.contact(peer) is None:
            # The endpoint forgets contacts it did not need for long; ours in the table are worth keeping.
            self.learn(held.record)
        try:
            answer = await self.endpoint.call(peer, method, request, timeout=self.patience(link))
        except RemoteRefused as error:
            self.counters.refusals += 1
            if error.code in NOT_SERVING:
                self.missed(peer)
            else:
                self.heard(peer)
            raise
        except RemoteError:
            self.counters.failures += 1
            self.missed(peer)
            raise
        except Overloaded:
            self.counters.failures += 1
            raise
        self.counters.answers += 1
        self.heard(peer)
        return answer

    async def ask_all(
        self, peers: Sequence[PeerId], method: Method[Q, R], request: Q, *, n: int | None = None
    ) -> tuple[int, dict[PeerId, RemoteError]]:
        """Ask the first ``n`` (default: all) of ``peers`` the same, and for each that is not there a later one.

        ALPHA_MAX are asked at a time.
        Returns how many answered, and the errors of the others.
        """
        errors: dict[PeerId, RemoteError] = {}
        answered, left = 0, len(peers) if n is None else n
        queue = iter(peers)

        async def worker() -> None:
            nonlocal answered, left
            while left and (peer := next(queue, None)) is not None:
                left -= 1
                try:
                    await self.ask(peer, method, request)
                    answered += 1
                except RemoteRefused as error:
                    errors[peer] = error
                except (RemoteError, Overloaded) as error:
                    errors[peer] = error if isinstance(error, RemoteError) else RemoteError(str(error), peer=peer.short)
                    left += 1

        async with trio.open_nursery() as nursery:
            for _ in range(min(defaults.ALPHA_MAX, left)):
                nursery.start_soon(worker)
        return answered, errors

    # -- lookups ---------------------------------------------------------------------------------------------

    async def walk(
        self,
        target: int,
        ask: Ask,
        *,
        paths: int = 1,
        k: int | None = None,
        settled: int | None = None,
    ) -> Lookup:
        """Run a lookup: ``ask`` puts the question to one peer and raises :class:`RemoteError` when that fails.

        ``k``: how many of the closest must have answered (default: the table's k). ``settled``: that so many have is
        enough; of the others in :meth:`Lookup.ranked` the contacts are verified and learned then.

        Ends when the lookup is done, when a reply is enough, or after LOOKUP_DEADLINE with what was found by
        then. Cancelling cancels the queries in flight.
        """
        self.counters.lookups += 1
        contacts = self.table.closest(target, self.table.k)
        seeds = [contact.peer for contact in contacts]
        outside: list[PeerId] = []
        if paths > 1:
            near = dict.fromkeys(seeds)
            far = [contact.peer for contact in self.table if contact.peer not in near]
            outside = self.host.random.sample(far, min(defaults.ALPHA, len(far)))
        lookup = Lookup(
            target,
            seeds,
            own=self.endpoint.peer_id,
            k=k or self.table.k,
            paths=paths,
            outside=outside,
            settled=settled,
        )
        run = LookupRun(self, lookup, ask, self._costs(target, contacts))
        if not await run.run(defaults.LOOKUP_DEADLINE):
            self.counters.lookups_expired += 1
        if settled is not None:
            run.introduce_all()
        self.table.refreshed(target, self.host.now())
        return lookup

    async def measure(self) -> None:
        """Estimate the swarm's size anew, unless that was done lately."""
        if not self.size.renew(self.host.now()):
            return
        for _ in range(defaults.SIZE_LOOKUPS):
            place = self.host.random.getrandbits(BITS)
            lookup = await self.find(place, paths=defaults.CAREFUL_PATHS)
            self.size.note([node_key(peer) ^ place for peer in lookup.closest], self.host.now())

    def _costs(self, target: int, contacts: Sequence[Contact]) -> Mapping[PeerId, float] | None:
        """Seconds that the first answer of each contact is likely to take; None where the closest are to be asked.

        They are where the closest contacts' part of the key space holds hardly more peers than we know of it.
        """
        size, k = self.size.value, self.table.k
        if size is None or not contacts or size * 2.0 ** ((contacts[0].key ^ target).bit_length() - BITS) <= 3 * k:
            return None
        known = [contact.rtt for contact in contacts if contact.rtt is not None]
        usual = statistics.median(known) if known else 0.0
        return {
            # Without a link: connection, handshake and hello come before the question.
            c.peer: (usual if c.rtt is None else c.rtt) * (1 if self.endpoint.link(c.peer) is not None else 4)
            for c in contacts
        }

    async def find(
        self,
        target: int,
        *,
        paths: int = 1,
        wanted: PeerId | None = None,
        k: int | None = None,
        settled: int | None = None,
    ) -> Lookup:
        """Find the ``k`` (default: the table's) peers closest to ``target``.

        Learns the contact of ``wanted`` and ends when somebody has it.
        """
        request = messages.Find(to_bytes(target), self._serve)

        async def ask(peer: PeerId, _: Lookup) -> Reply:
            closer = (await self.ask(peer, messages.FIND, request)).closer
            if wanted is None:
                return Reply(closer)
            found = False
            for record in closer[: self.table.k]:
                if record.claimed == wanted:
                    opened = record.open(-float("inf"))
                    if opened.expires > self.host.wall():
                        self.learn(record)
                        found = True
            return Reply(closer, enough=found)

        return await self.walk(target, ask, paths=paths, k=k, settled=settled)
