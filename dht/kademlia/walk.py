"""Asking other peers: single questions with their bookkeeping, and whole lookups driven over RPC."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeAlias, TypeVar

import attrs
import trio

from ...transport import deadlines
from ...transport.address import SignedPeerRecord
from ...transport.endpoint import Endpoint
from ...transport.errors import DecodeError, Overloaded, RemoteError, RemoteProtocolError, RemoteRefused
from ...transport.identity import PeerId
from ...transport.rpc import Method
from . import defaults
from .lookup import Answered, Failed, Lookup, Slow
from .service import Counters
from .table import Contact, RoutingTable, networks_of

Q = TypeVar("Q")
R = TypeVar("R")

#: Refusals that mean that the peer does not take part in the DHT. Any other one comes from a live peer that serves.
NOT_SERVING = ("unknown_method", "unknown_protocol", "bad_request")

#: The records under which peers were named in a lookup, with who named them; verified when they are used.
Claims: TypeAlias = dict[PeerId, list[tuple[PeerId, SignedPeerRecord]]]


@attrs.frozen
class Reply:
    """What one peer added to a lookup: ``closer`` as it named them; ``enough`` ends the lookup.

    ``missing``: how many more answers of its kind would be enough; None: that cannot be said.
    """

    closer: Sequence[SignedPeerRecord]
    enough: bool = False
    missing: int | None = None


class Walker:
    """Sends questions for the peer behind ``endpoint``; keeps ``table`` and the lost contacts up to date."""

    def __init__(self, endpoint: Endpoint, table: RoutingTable, counters: Counters) -> None:
        self.endpoint, self.table, self.counters = endpoint, table, counters
        self.host = endpoint.host
        #: Contacts that left the table because they did not answer, longest ago first: tried again later.
        self.lost: dict[PeerId, SignedPeerRecord] = {}

    # -- bookkeeping -----------------------------------------------------------------------------------------

    def heard(self, peer: PeerId) -> None:
        """``peer`` is alive and serves: into the table with it, if we know where it can be reached."""
        record = self.endpoint.contact(peer)
        if record is None:
            return
        try:
            opened = record.open(self.host.wall())
        except DecodeError:  # it ran out: the next link or ping brings a fresh one
            return
        link = self.endpoint.link(peer)
        now = self.host.now()
        rtt = None if link is None or link.rtt <= 0 else link.rtt
        held = self.table.get(peer)
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

    def patience(self, peer: PeerId) -> float:
        """Seconds for one question, the dial to a peer without a link included."""
        link = self.endpoint.link(peer)
        return deadlines.query(0.0 if link is None else link.rtt, self.endpoint.lag.value(self.host.now()))

    # -- one question ----------------------------------------------------------------------------------------

    async def ask(self, peer: PeerId, method: Method[Q, R], request: Q) -> R:
        """One call with its deadline; what becomes of it is noted in the table.

        Raises :class:`RemoteError`, or :class:`Overloaded` when we have no link to spare.
        """
        self.counters.queries += 1
        held = self.table.get(peer)
        if held is not None and self.endpoint.link(peer) is None and self.endpoint.contact(peer) is None:
            # The endpoint forgets contacts it did not need for long; ours in the table are worth keeping.
            self.learn(held.record)
        try:
            answer = await self.endpoint.call(peer, method, request, timeout=self.patience(peer))
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
        self, peers: Sequence[PeerId], method: Method[Q, R], request: Q
    ) -> tuple[int, dict[PeerId, RemoteError]]:
        """Ask ``peers`` the same, ALPHA_MAX at a time. Returns how many answered, and the errors of the others."""
        errors: dict[PeerId, RemoteError] = {}
        answered = 0
        limit = trio.CapacityLimiter(defaults.ALPHA_MAX)

        async def one(peer: PeerId) -> None:
            nonlocal answered
            async with limit:
                try:
                    await self.ask(peer, method, request)
                    answered += 1
                except RemoteError as error:
                    errors[peer] = error
                except Overloaded as error:
                    errors[peer] = RemoteError(str(error), peer=peer.short)

        async with trio.open_nursery() as nursery:
            for peer in peers:
                nursery.start_soon(one, peer)
        return answered, errors

    async def ask_closest(
        self, peers: Sequence[PeerId], n: int, method: Method[Q, R], request: Q
    ) -> tuple[int, dict[PeerId, RemoteError]]:
        """Ask the first ``n`` of ``peers`` the same, ALPHA_MAX at a time, and for each that is not there a later one.

        Returns how many answered, and the errors of the others.
        """
        errors: dict[PeerId, RemoteError] = {}
        answered, left = 0, n
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
            for _ in range(min(defaults.ALPHA_MAX, n)):
                nursery.start_soon(worker)
        return answered, errors

    # -- lookups ---------------------------------------------------------------------------------------------

    async def walk(
        self,
        target: int,
        ask: Callable[[PeerId], Awaitable[Reply]],
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
        seeds = [contact.peer for contact in self.table.closest(target, self.table.k)]
        lookup = Lookup(target, seeds, own=self.endpoint.peer_id, k=k or self.table.k, paths=paths, settled=settled)
        claims: Claims = {}
        asked: dict[PeerId, float] = {}  # when; oldest first, those whose answer is still awaited
        now = self.host.now

        async def query(peer: PeerId) -> None:
            event: Answered | Failed = Failed(peer)
            try:
                if peer not in claims or self._introduce(peer, claims.pop(peer), lookup):
                    reply = await ask(peer)
                    event = Answered(peer, self._named(peer, reply.closer, claims))
                    if reply.enough:
                        lookup.stop()
                    elif reply.missing is not None:
                        lookup.expect(reply.missing)
            except RemoteProtocolError:
                self.counters.lies += 1
                self.missed(peer)
            except (RemoteError, Overloaded):
                pass
            asked.pop(peer, None)
            if not lookup.done:
                launch(lookup.receive(event))
            if lookup.done:
                nursery.cancel_scope.cancel()

        def launch(peers: Sequence[PeerId]) -> None:
            began = now()
            for peer in peers:
                asked[peer] = began
                nursery.start_soon(query, peer)

        async def hurry() -> None:
            while True:
                await trio.sleep(defaults.SLOW_AFTER / 2)
                for peer, began in list(asked.items()):
                    if began > now() - defaults.SLOW_AFTER or lookup.done:
                        break
                    del asked[peer]
                    launch(lookup.receive(Slow(peer)))

        with trio.move_on_after(defaults.LOOKUP_DEADLINE) as deadline:
            async with trio.open_nursery() as nursery:
                launch(lookup.start())
                if lookup.done:
                    nursery.cancel_scope.cancel()
                nursery.start_soon(hurry)
        if deadline.cancelled_caught:
            self.counters.lookups_expired += 1
        if settled is not None:
            self._introduce_all(lookup, claims)
        self.table.refreshed(target, self.host.now())
        return lookup

    def _introduce_all(self, lookup: Lookup, claims: Claims) -> None:
        """Verify the contacts of those that are closest and were not asked; twice k, as some of them may be gone."""
        while waiting := [peer for peer in lookup.ranked(2 * lookup.k) if peer in claims]:
            for peer in waiting:
                if not self._introduce(peer, claims.pop(peer), lookup):
                    lookup.discard(peer)

    def _named(self, source: PeerId, closer: Sequence[SignedPeerRecord], claims: Claims) -> tuple[PeerId, ...]:
        """Note the peers that ``source`` named and their records, not verified. Raises :class:`DecodeError`."""
        if len(closer) > self.table.k:
            raise DecodeError(f"named {len(closer)} peers, at most {self.table.k} allowed", peer=source.short)
        peers = []
        for record in closer:
            peer = record.claimed
            if peer is None:
                raise DecodeError("named a peer under a record that is none", peer=source.short)
            # Several records of one peer: a forged one must not stand in for the real one of another source.
            held = claims.get(peer)
            if held is None:
                claims[peer] = [(source, record)]
            elif held[0][1] is not record and len(held) < defaults.MAX_CLAIMS and record not in [r for _, r in held]:
                held.append((source, record))
            peers.append(peer)
        return tuple(peers)

    def _introduce(self, peer: PeerId, claims: Sequence[tuple[PeerId, SignedPeerRecord]], lookup: Lookup) -> bool:
        """Verify the records under which others named ``peer``; False when none of them tells where it is.

        Whoever named it under a record that it never signed has lied.
        """
        wall, useful = self.host.wall(), self.endpoint.contact(peer) is not None
        for source, record in claims:
            try:
                opened = record.open(-float("inf"))
            except DecodeError:
                self.counters.lies += 1
                self.missed(source)
                lookup.expose(source)
                continue
            if opened.expires > wall and opened.addresses:
                self.learn(record)
                useful = True
        return useful
