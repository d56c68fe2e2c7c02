"""Who is in the run, round by round: the interface between a run and its two forms of membership.

:class:`shoal.learning.chain.Chain`: one roster for all, agreed round by round through commit records (strategies whose
state is replicated). :class:`shoal.learning.gossip.Gossip`: an eventually consistent view and a small group per round.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING

import attrs
import trio

from ..transport.address import SignedPeerRecord
from ..transport.endpoint import Endpoint
from ..transport.errors import ConfigError, DecodeError, RemoteError, RemoteRefused
from ..transport.identity import PeerId
from ..transport.rpc import Call
from . import defaults
from .rounds.instance import Instance
from .rounds.messages import Certificate, Commit, CommitRecord, OnTrial, Signed, instance_key, sign_accept
from .rounds.methods import Ack
from .rounds.payloads import GATHER, REDUCE
from .rounds.remembering import NOTHING
from .rounds.terms import Terms
from .store import Head
from .sync import (
    HEAD,
    WISH,
    AskHead,
    HeadInfo,
    Seen,
    Wish,
    ask_heads,
)

if TYPE_CHECKING:
    from .run import Run


@attrs.frozen
class Placement:
    """Our place in a round. ``key`` is None when it has no exchange; ``index`` of ``count`` selects our shard.

    ``trial``: who is on trial in it, perhaps we; ``admission``: rounds of a trial, 0 where the run has none; ``few``:
    the run's rule wants more contributions than there are voters. ``scores``: what the rule remembers of the voters.
    """

    round: int
    key: bytes | None
    prev: bytes
    voters: tuple[PeerId, ...]
    index: int
    count: int
    watch: tuple[PeerId, ...]
    trial: tuple[OnTrial, ...] = ()
    admission: int = 0
    few: bool = False
    scores: Mapping[PeerId, int] = NOTHING


class Membership(ABC):
    """Shared by both forms: the services others call, wishes, and how the run's peers are found."""

    gossip: bool

    def __init__(self, run: Run) -> None:
        self.run, self.endpoint, self.me, self.spec = run, run.endpoint, run.me, run.spec
        self.host = run.host
        self.placed = Placement(0, None, b"", (), 0, 1, ())
        #: Why we wait, if we do; empty otherwise.
        self.reason = ""
        self.head: Head = founding(run)
        self._wishes: dict[PeerId, float] = {}
        self._leaving: dict[PeerId, None] = {}
        self._bootstrapped: dict[PeerId, None] = {}
        self.endpoint.serve(HEAD, self._on_head)
        self.endpoint.serve(WISH, self._on_wish)

    # -- what the run calls -------------------------------------------------------------------------

    @property
    def kind(self) -> str:
        """Of the records of this run's rounds."""
        return GATHER if self.run.strategy.ledger else REDUCE

    @property
    @abstractmethod
    def round(self) -> int:
        """Rounds committed so far."""

    @abstractmethod
    def members(self) -> tuple[PeerId, ...]:
        """Everybody in the run, as far as we know."""

    @abstractmethod
    async def enter(self) -> None:
        """Return once we are a member and hold the state to go on from."""

    @abstractmethod
    async def place(self) -> Placement:
        """Our place in the next round. Raises :class:`shoal.learning.peer.OutOfStep` when we have none."""

    @abstractmethod
    def terms(self) -> Terms:
        """What a leader of the placed round needs to know."""

    @abstractmethod
    def check(self, record: CommitRecord) -> str | None:
        """What is wrong with a proposed record, None when we may accept it."""

    @abstractmethod
    async def confirm(self, record: CommitRecord) -> None:
        """A commit is there. Raises :class:`shoal.learning.peer.OutOfStep` if it does not go on from our state."""

    @abstractmethod
    def committed(self, commit: Commit, voters: tuple[PeerId, ...]) -> None:
        """The placed round is decided."""

    @abstractmethod
    def skipped(self, samples: int) -> None:
        """The placed round ended without exchange."""

    @abstractmethod
    def adopt(self, head: Head) -> None:
        """We hold the state after ``head``."""

    @abstractmethod
    async def guard(self, instance: Instance) -> None:
        """Watch an undecided round; return when it is to be replaced by another (after :attr:`placed` was renewed)."""

    @abstractmethod
    async def scout(self) -> None:
        """Look for peers of the run and for better states, until cancelled."""

    @abstractmethod
    async def leave(self) -> None:
        """Say goodbye to the members."""

    def view(self) -> tuple[Seen, ...]:
        return ()

    # -- finding peers ------------------------------------------------------------------------------

    async def known(self) -> tuple[PeerId, ...]:
        """Peers that may be in the run: members, those at the bootstrap addresses, and those the DHT names."""
        found: dict[PeerId, None] = dict.fromkeys(self.members())
        for address in self.run.bootstrap:
            if not self._bootstrapped:
                try:
                    link = await self.endpoint.identify(address)
                    self._bootstrapped[link.peer] = None
                except RemoteError as error:
                    self.run.emit("run", "unreachable", detail=str(error))
        found.update(self._bootstrapped)
        found.update(dict.fromkeys(await self.providers()))
        found.pop(self.me, None)
        return tuple(found)

    async def providers(self) -> tuple[PeerId, ...]:
        """Peers that announced the run in the DHT."""
        try:
            records = await self.run.dht.providers(self.run.run_id)
        except RemoteError:
            return ()
        return tuple(record.open(-float("inf")).peer for record in records)

    async def ask(self, peers: tuple[PeerId, ...]) -> dict[PeerId, HeadInfo]:
        return await ask_heads(self.endpoint, self.run.run_id, peers[:32], self.gossip, defaults.ASK_HEADS)

    def contacts(self, peers: tuple[PeerId, ...]) -> tuple[SignedPeerRecord, ...]:
        """Records of ``peers`` (at most 32), ours among them, to tell others."""
        found = [self.endpoint.record()]
        for peer in peers:
            contact = self.endpoint.contact(peer)
            if contact is not None and peer != self.me:
                found.append(contact)
        return tuple(found[:32])

    # -- wishes -------------------------------------------------------------------------------------

    def wishes(self) -> tuple[PeerId, ...]:
        """Peers that wish to join and repeated it lately."""
        now = self.host.now()
        self._wishes = {peer: until for peer, until in self._wishes.items() if until > now}
        return tuple(sorted(self._wishes))

    def leaving(self) -> tuple[PeerId, ...]:
        return tuple(self._leaving)

    async def wish(self, peers: tuple[PeerId, ...], *, leave: bool = False) -> None:
        """Tell ``peers`` that we wish to join or leave, in parallel."""
        message = Wish(self.run.run_id, leave, self.endpoint.record())

        async def tell(peer: PeerId) -> None:
            try:
                await self.endpoint.call(peer, WISH, message, timeout=defaults.ASK_HEADS)
            except RemoteRefused as error:
                if error.code == "expelled":
                    self.refused(peer, error.reason)
            except RemoteError:
                return

        async with trio.open_nursery() as nursery:
            for peer in peers:
                if peer != self.me:
                    nursery.start_soon(tell, peer)

    # -- services -----------------------------------------------------------------------------------

    def _mine(self, run: bytes) -> None:
        if run != self.run.run_id:
            raise RemoteRefused("unknown-run", "this peer takes no part in that run")

    async def _on_head(self, call: Call[AskHead]) -> HeadInfo:
        self._mine(call.request.run)
        last = self.run.snapshots[-1] if self.run.snapshots else None
        self.run.shelf.asked()
        return HeadInfo(
            spec=self.run.signed,
            record=self.head.record,
            certificate=self.head.certificate,
            voters=self.head.voters,
            contacts=self.contacts(self.members()),
            settled=last.round if last is not None and last.digest else -1,
            digest=last.digest if last is not None else b"",
            view=self.view(),
        )

    async def _on_wish(self, call: Call[Wish]) -> Ack:
        self._mine(call.request.run)
        if call.request.leave:
            self._wishes.pop(call.peer, None)
            if call.peer not in self.members():
                return Ack()
            self._leaving[call.peer] = None
            self.left(call.peer)
            return Ack()
        try:
            if call.request.contact.open(self.host.wall()).peer != call.peer:
                raise RemoteRefused("bad-contact", "the contact is not the sender's")
            self.endpoint.learn(call.request.contact)
        except DecodeError as error:
            raise RemoteRefused("bad-contact", str(error)) from None
        if (why := self.run.liars.reasons.get(call.peer)) is not None:
            raise RemoteRefused("expelled", f"you are expelled from this run: {why}")
        if len(self.wishes()) >= defaults.MAX_WISHES and call.peer not in self._wishes:
            raise RemoteRefused("busy", "too many peers wish to join at once")
        self._leaving.pop(call.peer, None)
        self._wishes[call.peer] = self.host.now() + defaults.WISH_LIFETIME
        self.wished(call.peer)
        return Ack()

    def refused(self, peer: PeerId, why: str) -> None:
        """``peer`` takes us for a liar, and will never take us in."""
        self.reason = f"{peer.short}: {why}"
        self.run.emit("run", "unwelcome", peer, why)

    @abstractmethod
    def wished(self, peer: PeerId) -> None:
        """A peer wishes to join."""

    @abstractmethod
    def found(self, peer: PeerId) -> None:
        """A link to a watched peer is up, for the first time or again."""

    @abstractmethod
    def left(self, peer: PeerId) -> None:
        """A member says goodbye."""

    def loading(self) -> tuple[PeerId, ...]:
        """Voters of the placed round that are loading the state, to be waited for."""
        return ()

    async def begin_from_origin(self) -> bool:
        """The founder, without a saved state: load what the run begins with, and save it before anything is trained.

        False when it is gone and the run is a stage's, which others may hold: a lost stage is founded anew. Otherwise
        raises :class:`ConfigError`: a fresh model would be another run.
        """
        origin = self.run.origin
        if origin is None and self.spec.part is not None:
            return False
        if origin is None and self.spec.origin:
            raise ConfigError(
                f"this run begins with the state {self.spec.origin.hex()[:16]}, which was not saved at its founding; "
                "found another with `shoal start TASK --from FILE` and another --data-dir"
            )
        if origin is not None:
            await self.host.run_blocking(self.run.store.save_state, origin, self.head)
            await self.run.adopt(origin, self.head)
            self.run.origin = None  # saved now: memory for it is not kept
        return True

    def tell_of_holder(self, what: str, peer: PeerId, detail: str) -> None:
        """A holder of a state that we load was ``lost``, or is a ``liar``."""
        self.run.emit("run", "liar" if what == "liar" else "state-failed", peer, detail)


def founding(run: Run) -> Head:
    """The first head of a run. Every peer can write down its record; only the founder can sign it."""
    founder = run.spec.founder
    record = CommitRecord(
        run=run.run_id,
        round=0,
        kind="genesis",
        prev=run.run_id,
        members=(),
        samples=(),
        weights=(),
        roster=(founder,),
        total=0,
        branch=0,
        state=b"",
        nonces=(),
        algorithm="",
        fingerprint=b"",
        reason="founded",
    )
    return certify(run.endpoint, record, (founder,)) if run.me == founder else Head(record, Certificate(b"", 0, ()), ())


def certify(endpoint: Endpoint, record: CommitRecord, voters: tuple[PeerId, ...]) -> Head:
    """A record that we alone may agree on, with our signature."""
    key = instance_key(record.run, record.round, record.prev, voters)
    accept = sign_accept(endpoint.identity, key, 0, record.digest)
    return Head(record, Certificate(key, 0, (Signed(endpoint.peer_id, accept.signature),)), voters)
