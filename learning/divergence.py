"""Is our state that of the others? Asked when a commit names another one; what most voters hold is what counts.

Every commit record carries the digest of the state before its round, as its leader holds it. Memory that lost a bit, a
library that rounds otherwise, a bug: a peer whose state differs for any reason sees another digest than its own in the
very next record. That does not say yet which of the two is wrong, so it asks all voters, and if most hold another state
it takes over theirs and goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import attrs
import trio

from ..transport.errors import RemoteError, RemoteRefused
from ..transport.identity import PeerId
from ..transport.rpc import Call, Method
from . import defaults
from .rounds.decisions import candidates
from .rounds.messages import CommitRecord, quorum
from .sync import describe_load, load_state

if TYPE_CHECKING:
    from .chain import Chain

log = logging.getLogger(__name__)


@attrs.frozen
class AskDigest:
    """Which state do you hold after round ``round`` of run ``run``?"""

    run: bytes
    round: int


@attrs.frozen
class SaidDigest:
    """Its digest; empty when it is not held (any more)."""

    digest: bytes


DIGEST = Method("run.digest", AskDigest, SaidDigest)


@attrs.frozen
class Verdict:
    """Which state after ``round`` counts. ``digest``: empty while too few say what they hold."""

    round: int
    digest: bytes
    holders: tuple[PeerId, ...]
    reason: str


def judge(round: int, said: Mapping[PeerId, bytes], order: Sequence[PeerId]) -> Verdict:
    """The state that most voters hold, of those who ``said`` which; of several the one whose holder comes first.

    ``order``: all voters, in an order that nobody chose and all know, so that of two that differ not both give way.
    """
    groups: dict[bytes, list[PeerId]] = {}
    for peer in order:
        if said.get(peer):
            groups.setdefault(said[peer], []).append(peer)
    known = sum(map(len, groups.values()))
    if known < quorum(len(order)):
        return Verdict(round, b"", (), f"only {known} of {len(order)} voters say which state they hold")
    digest, holders = max(groups.items(), key=lambda group: (len(group[1]), -order.index(group[1][0])))
    most = f"{len(holders)} of {known} voters hold the state {digest.hex()[:16]}"
    tied = sum(len(group) == len(holders) for group in groups.values()) > 1
    first = f", as many as hold another one; that of {holders[0].short} counts" if tied else ""
    return Verdict(round, digest, tuple(holders), most + first)


class Divergence:
    """Compares our last final state with the voters', for :class:`shoal.learning.chain.Chain`.

    ``doubt``: our state is wrong, and which one is right; None while there is no reason to think so.
    """

    def __init__(self, chain: Chain) -> None:
        self._chain, self._run, self._host = chain, chain.run, chain.host
        self.doubt: Verdict | None = None
        self._comparing: tuple[bytes, trio.Event] | None = None
        chain.endpoint.serve(DIGEST, self._on_digest)

    def suspect(self, record: CommitRecord) -> trio.Event:
        """``record`` names another state than ours: find out who is right. The event is set once that is known.

        If it is us who are wrong, the run steps aside, and :attr:`doubt` says what to load. Compared once per state.
        """
        ours = self._chain.own_digest()
        if self._comparing is None or self._comparing[0] != ours:
            self._comparing = (ours, trio.Event())
            self._run.nursery.start_soon(self._compare, record, ours, self._comparing[1])
        return self._comparing[1]

    async def confirm(self, record: CommitRecord) -> str | None:
        """None when our state is the one that the committed ``record`` goes on from, as far as anybody can tell."""
        snapshot = self._run.snapshots[-1] if self._run.snapshots else None
        if snapshot is None or snapshot.round != record.round - 1 or not record.state:
            return None
        await snapshot.ready.wait()
        if snapshot.digest == record.state:
            return None
        await self.suspect(record).wait()
        return self.doubt.reason if self.doubt is not None else None

    async def _compare(self, record: CommitRecord, ours: bytes, known: trio.Event) -> None:
        round = record.round - 1
        try:
            verdict = await self.ask(round, ours)
            if verdict.digest in (b"", ours):
                what = "kept" if verdict.digest else "kept, since nobody can tell"
                self._tell("differs", f"round {record.round} was proposed on another state than ours", verdict, what)
            elif self._chain.own_digest() == ours:
                self.doubt = verdict
                self._tell("diverged", f"our state after round {round} is {ours.hex()[:16]}", verdict, "loading theirs")
                self._run.step_aside(f"our state after round {round} is not that of the others")
        finally:
            known.set()

    def _tell(self, what: str, which: str, verdict: Verdict, then: str) -> None:
        detail = f"{which}; {verdict.reason}: {then}"
        log.warning("%s", detail)
        self._run.emit("run", what, detail=detail)

    async def ask(self, round: int, ours: bytes) -> Verdict:
        """Ask all voters which state after ``round`` they hold; ours is ``ours``. At most about four seconds."""
        head = self._chain.head.record
        order = candidates(head.digest, head.round + 1, head.roster)
        said = {self._chain.me: ours}
        message = AskDigest(self._run.run_id, round)

        async def one(peer: PeerId) -> None:
            try:
                answer = await self._chain.endpoint.call(peer, DIGEST, message, timeout=defaults.ASK_HEADS)
            except RemoteError:
                return
            said[peer] = answer.digest

        async with trio.open_nursery() as nursery:
            for peer in order:
                if peer != self._chain.me:
                    nursery.start_soon(one, peer)
        return judge(round, said, order)

    async def heal(self, doubt: Verdict) -> bool:
        """Put the state that counts in the place of ours, at the same commit. True when there is nothing to heal."""
        chain, run = self._chain, self._run
        chain.reason = f"our state differs from that of the others: {doubt.reason}"
        try:
            vectors, done = await load_state(
                run.blobs, doubt.digest, doubt.round, run.layout.size, doubt.holders, chain.tell_of_holder
            )
        except RemoteError as error:
            run.emit("run", "state-failed", detail=str(error))
            # Its holders may be gone, or ahead of us, which the next look at their heads will tell.
            ours = chain.own_digest()
            again = await self.ask(doubt.round, ours)
            self.doubt = None if again.digest == ours else again if again.digest else doubt
            return self.doubt is None
        await run.adopt(vectors, chain.head)
        run.emit("run", "loaded", detail=f"round {doubt.round} {describe_load(done, doubt.digest)}")
        return True

    async def _on_digest(self, call: Call[AskDigest]) -> SaidDigest:
        if call.request.run != self._run.run_id:
            raise RemoteRefused("unknown-run", "this peer takes no part in that run")
        # The newest of a round: what was loaded in place of what turned out to be wrong.
        for snapshot in reversed(self._run.snapshots):
            if snapshot.round == call.request.round:
                self._run.shelf.asked()
                await snapshot.ready.wait()
                return SaidDigest(snapshot.digest)
        return SaidDigest(b"")
