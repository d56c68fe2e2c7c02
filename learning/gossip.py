"""Membership as a view that spreads by gossip: a small group per round, no roster that all must agree on.

Every peer keeps, for each member it knows, the round in which it was last heard. Views are exchanged with random
members every few seconds and merged by maximum. A round's groups are a function of the seed and the view (a shuffle, or
what the run's topology says: :mod:`.topologies`), so members with equal views agree on them without a word; where views
differ for a moment, a peer is left alone for a round and loses nothing but the exchange.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import attrs
import trio

from ..transport.errors import DecodeError, RemoteError, RemoteRefused
from ..transport.identity import PeerId
from ..transport.rpc import Call
from . import defaults, topologies
from .membership import Membership, Placement, certify
from .rounds.decisions import group_of
from .rounds.instance import Instance
from .rounds.messages import Commit, CommitRecord, instance_key
from .rounds.payloads import payloads_fault
from .rounds.terms import Terms, fill
from .store import Head
from .sync import VIEW, HeadInfo, Seen, View, ask_heads, describe_load, load_state
from .view import SwarmView

if TYPE_CHECKING:
    from .run import Run


class Gossip(Membership):
    """See the module."""

    gossip = True

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._round = 0
        self._total = 0
        self._view = SwarmView(self.me)
        self._has_state = False
        self.endpoint.serve(VIEW, self._on_view)

    @property
    def round(self) -> int:
        return self._round

    def members(self) -> tuple[PeerId, ...]:
        """Ourselves and everybody of whom there is news."""
        return self._view.members(self._round)

    def view(self) -> tuple[Seen, ...]:
        """The members, for others. Who has no state yet does not count itself: it would only be waited for."""
        return tuple(
            Seen(peer, self._view.rounds[peer]) for peer in self.members() if peer != self.me or self._has_state
        )

    # -- entering -----------------------------------------------------------------------------------

    async def enter(self) -> None:
        if not self._has_state:
            saved = await self.host.run_blocking(self.run.store.load_state)
            if saved is not None:
                vectors, head = saved
                await self.run.adopt(vectors, head)
            elif self.me == self.spec.founder:
                await self.begin_from_origin()
        while True:
            known = await self.known()
            # Others every time: the same few may know only each other.
            chosen = tuple(self.host.random.sample(known, min(defaults.GOSSIP_ASK, len(known))))
            infos = await ask_heads(self.endpoint, self.run.run_id, chosen, True, defaults.ASK_HEADS)
            for info in infos.values():
                self._merge(info.view)
            # The middle one: nobody can prove a round to a newcomer, but half of those asked will not lie.
            settled = sorted(info.settled for info in infos.values() if info.settled >= 0)
            ahead = settled[len(settled) // 2] if settled else -1
            if ahead > self._round + defaults.VIEW_ROUNDS or (not self._has_state and ahead > 0):
                if await self._load(infos, ahead):
                    break
            elif self.spec.origin and not self._has_state:
                if await self._load_origin(known):
                    break
            elif ahead >= 0 or self._has_state or self.me == self.spec.founder:
                # Everybody begins from the same weights, which the seed of the run gives.
                self._has_state = True
                break
            else:
                self.reason = "no member of the run can be reached yet; trying again"
            await trio.sleep(defaults.WISH_EVERY)
        if not self.run.snapshots:
            await self.run.settle()
        # Everybody ever heard of counts: who was quick may have finished and left.
        while len(self._view.rounds) < self.spec.min_peers and not any(self._view.rounds.values()):
            self.reason = f"{len(self._view.rounds)} of {self.spec.min_peers} peers are here"
            await self._exchange(self._random(1))
            await trio.sleep(defaults.GATHER_EVERY)
        if self.spec.min_peers > 1 and self._round == 0:
            # Others may still be counting, and a short run may be over before they hear of us again.
            await self._exchange(self._random(defaults.GOSSIP_ASK))
        self.reason = ""
        self.run.emit("run", "member", detail=f"{len(self.members())} peers in view, round {self._round}")

    async def _load(self, infos: dict[PeerId, HeadInfo], round: int) -> bool:
        for holder, info in infos.items():
            if info.settled != round:
                continue
            try:
                # Every member has a state of its own, so there is one holder.
                vectors, done = await load_state(
                    self.run.blobs, info.digest, round, self.run.layout.size, (holder,), self.tell_of_holder
                )
            except RemoteError as error:
                self.run.emit("run", "state-failed", holder, str(error))
                continue
            await self.run.adopt(vectors, info.head())
            self._round = round
            self.run.round = round
            self.run.emit("run", "loaded", holder, f"round {round} {describe_load(done, info.digest)}")
            return True
        return False

    async def _load_origin(self, holders: tuple[PeerId, ...]) -> bool:
        """The state that everybody begins with, which the founder has signed for."""
        try:
            vectors, done = await load_state(
                self.run.blobs, self.spec.origin, 0, self.run.layout.size, holders, self.tell_of_holder
            )
        except RemoteError as error:
            self.run.emit("run", "state-failed", detail=str(error))
            return False
        await self.run.adopt(vectors, self.head)
        self.run.emit("run", "loaded", detail=f"the beginning {describe_load(done, self.spec.origin)}")
        return True

    def adopt(self, head: Head) -> None:
        self.head, self._has_state = head, True
        self._round, self._total = head.record.round, head.record.total
        self._view.hear(self.me, self._round)

    # -- rounds -------------------------------------------------------------------------------------

    async def place(self) -> Placement:
        view = self.members()
        size = self.spec.group or self.run.strategy.group or len(view)
        ahead = sorted(self._view.rounds[peer] for peer in view if peer != self.me)
        # Whoever fell behind meets nobody; skip to where most are.
        if size > 1 and len(ahead) > 1 and ahead[len(ahead) // 2] > self._round + 1:
            self.run.emit("run", "skip", detail=f"from round {self._round} to {ahead[len(ahead) // 2]}")
            self._round = ahead[len(ahead) // 2]
            if self.spec.rounds:
                self._round = min(self._round, self.spec.rounds - 1)
        round = self._round + 1
        # Everybody ever heard of, so that parts of the data do not wander when somebody is silent for a moment.
        known = tuple(sorted(self._view.rounds))
        if size == 1:
            self.placed = Placement(round, None, b"", (self.me,), known.index(self.me), len(known), ())
            return self.placed
        if self.spec.topology:
            asked = self.spec.group or self.run.strategy.group
            voters, self._group = topologies.group_of(self.spec.topology, self.spec.seed, round, self.me, view, asked)
        else:
            voters, self._group = group_of(self.spec.seed, round, self.me, view, size)
        prev = self.run.run_id
        self.placed = Placement(
            round=round,
            key=instance_key(self.run.run_id, round, prev, voters),
            prev=prev,
            voters=voters,
            index=known.index(self.me),
            count=len(known),
            watch=voters,
        )
        return self.placed

    def terms(self) -> Terms:
        base = attrs.evolve(
            self.head.record,
            run=self.run.run_id,
            round=self.placed.round,
            prev=self.placed.prev,
            total=self._total,
            branch=0,
            state=b"",
            reason=f"{self._group}: ",
        )
        return Terms(partial(fill, lambda: base), lambda: (), self.leaving, True, defaults.MAX_ROSTER)

    def check(self, record: CommitRecord) -> str | None:
        voters = set(self.placed.voters)
        if (record.run, record.round, record.prev) != (self.run.run_id, self.placed.round, self.placed.prev):
            return "it belongs to another round"
        if any(m not in voters for m in (*record.members, *record.roster)):
            return "members are not of this group"
        if record.trial or record.opinions or record.scores:
            return "a group has nobody on trial, and remembers nothing"
        if not len(record.members) == len(record.samples) == len(record.weights):
            return "members, samples and weights differ in number"
        return payloads_fault(record, self.placed.key or b"", self.kind)

    async def confirm(self, record: CommitRecord) -> None:
        """Nothing: groups have no state in common."""

    def committed(self, commit: Commit, voters: tuple[PeerId, ...]) -> None:
        record = commit.record
        self.head = Head(record, commit.certificate, voters)
        self._round, self._total = record.round, self._total + sum(record.samples)
        for peer in (*record.roster, self.me):
            self._view.hear(peer, record.round)
        self._leaving.clear()

    def skipped(self, samples: int) -> None:
        self._round += 1
        self._total += samples
        self._view.hear(self.me, self._round)
        record = CommitRecord(
            run=self.run.run_id,
            round=self._round,
            kind="reduce",
            prev=self.run.run_id,
            members=(self.me,),
            samples=(samples,),
            weights=(1,),
            roster=(self.me,),
            total=self._total,
            branch=0,
            state=b"",
            nonces=(),
            algorithm="",
            fingerprint=b"",
            reason="alone",
        )
        # Ours alone to agree on; the proof lets a joiner believe where we are.
        self.head = certify(self.endpoint, record, (self.me,))

    async def guard(self, instance: Instance) -> None:
        await trio.sleep_forever()

    # -- gossip -------------------------------------------------------------------------------------

    def _merge(self, seen: tuple[Seen, ...]) -> None:
        for item in seen[: defaults.MAX_VIEW]:
            if item.peer == self.me or item.peer in self._leaving or not 0 <= item.round < 1 << 40:
                continue
            # A name that nobody can tell us how to reach would only be waited for.
            if item.peer in self._view.rounds or self.endpoint.contact(item.peer) is not None:
                self._view.hear(item.peer, item.round)

    def wished(self, peer: PeerId) -> None:
        self._view.hear(peer, self._round)

    def found(self, peer: PeerId) -> None:
        # Its round is learned from the next exchange of views.
        return

    def left(self, peer: PeerId) -> None:
        self.run.hub.peer_changed(peer, "left the run")

    def _message(self, to: View | None = None) -> View:
        """Our view. Asked, we add the contacts of members that the other one does not know yet."""
        known = {} if to is None else {item.peer: None for item in to.seen}
        new = () if to is None else tuple(peer for peer in self.members() if peer not in known)
        return View(self.run.run_id, self.view(), self.contacts(new))

    async def _on_view(self, call: Call[View]) -> View:
        if call.request.run != self.run.run_id:
            raise RemoteRefused("unknown-run", "this peer takes no part in that run")
        if len(call.request.seen) > defaults.MAX_VIEW or len(call.request.contacts) > 64:
            raise RemoteRefused("too-large", f"a view of {len(call.request.seen)} peers")
        self._take(call.request)
        return self._message(call.request)

    def _take(self, view: View) -> None:
        for contact in view.contacts[:64]:
            try:
                self.endpoint.learn(contact)
            except DecodeError:
                continue
        self._merge(view.seen)

    def _random(self, count: int) -> tuple[PeerId, ...]:
        others = [peer for peer in self.members() if peer != self.me]
        return tuple(self.host.random.sample(others, min(count, len(others))))

    async def _exchange(self, peers: tuple[PeerId, ...]) -> None:
        for peer in peers:
            try:
                self._take(await self.endpoint.call(peer, VIEW, self._message(), timeout=defaults.ASK_HEADS))
            except RemoteError as error:
                self.run.emit("run", "view-failed", peer, error.message)

    async def scout(self) -> None:
        turn = 0
        while True:
            await trio.sleep(defaults.GOSSIP_EVERY * (0.75 + 0.5 * self.host.random.random()))
            if not self._has_state:
                continue
            await self._exchange(self._random(2))
            turn += 1
            members = self.members()
            if len(members) == 1 or turn % defaults.STRANGERS_EVERY == 0:
                # Two halves that know only themselves are found together through what they announced.
                strangers = [peer for peer in await self.providers() if peer not in members and peer != self.me]
                await self._exchange(tuple(self.host.random.sample(strangers, min(2, len(strangers)))))

    async def leave(self) -> None:
        await self.wish(self._random(8), leave=True)
