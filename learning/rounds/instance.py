"""One round on one peer: drives the voter and the leader, moves their bytes, ends with a commit and its result."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import trio
from torch import Tensor

from ...transport.endpoint import Endpoint
from ...transport.errors import RemoteError, RemoteRefused
from ...transport.identity import PeerId
from ...transport.rpc import Call
from ...transport.wire import printable
from .. import defaults, exact
from ..digest import choose_fingerprint, fingerprint, local_fingerprints
from ..reduce.buffers import Buffers
from ..reduce.slices import Slice
from ..state import bytes_view
from .actions import (
    Action,
    Combine,
    Done,
    Fingerprint,
    Note,
    Persist,
    Promise,
    Pull,
    Push,
    Send,
    Share,
    Verify,
)
from .decisions import candidates, resume_at
from .leader import Leader
from .messages import (
    Accept,
    Commit,
    CommitRecord,
    Convene,
    Held,
    Progress,
    Ready,
    Reject,
    members_hash,
    verify_certificate,
)
from .methods import SCATTER, SHARE, WANT, Ack, Given, Scatter, Shared, Want
from .post import Post
from .setting import Setting
from .terms import accepts_needed
from .voter import Voter

log = logging.getLogger(__name__)

T = TypeVar("T")

_TO_LEADER = (Ready, Held, Progress, Accept, Reject)


class Instance:
    """Drives one round. ``decided`` is set with ``commit``; then :meth:`outcome` gives the result."""

    def __init__(self, endpoint: Endpoint, post: Post, setting: Setting, lost: dict[PeerId, str]) -> None:
        self._endpoint, self._post, self.setting = endpoint, post, setting
        self._host, self.me = endpoint.host, endpoint.peer_id
        self.key, self.round, self.voters = setting.key, setting.round, setting.voters
        self.commit: Commit | None = None
        self.decided = trio.Event()
        self.began: float | None = None
        self.refused: dict[PeerId, str] = {}
        self.buffers = Buffers(setting.max_length)
        secret = self._host.entropy(32)
        order = candidates(setting.prev, self.round, self.voters)
        promised, accepted = resume_at(setting.stored, order, self.me)
        self.voter = Voter(
            key=self.key,
            round=self.round,
            prev=setting.prev,
            voters=self.voters,
            identity=endpoint.identity,
            pace=setting.pace,
            # Fixed per generation and unknown to anybody until it is revealed.
            nonce=lambda attempt, epoch: hashlib.blake2b(
                b"%d,%d" % (attempt, epoch), key=secret, digest_size=16
            ).digest(),
            check=setting.check,
            max_length=setting.max_length,
            algorithms=local_fingerprints(),
            promised=promised,
            accepted=accepted,
        )
        self._first = promised
        self.voter.lost.update({p: w for p, w in lost.items() if p in self.voters})
        self.leader: Leader | None = None
        self._final: Tensor | None = None
        self._final_digest = b""
        self._printed: tuple[Tensor, str, tuple[bytes, ...], bytes] | None = None
        self._inbox_in, self._inbox = trio.open_memory_channel[Callable[[], Sequence[Action]]](math.inf)
        self._scope = trio.CancelScope()

    # -- life ---------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Drive the round and, once decided, serve its result to late peers, until :meth:`close`."""
        with self._scope:
            async with trio.open_nursery() as self._nursery:
                if self.voter.leader(self.voter.attempt) == self.me:
                    self._lead(self.voter.attempt)
                while True:
                    due = self._due()
                    step: Callable[[], Sequence[Action]] | None = None
                    with trio.move_on_at(due):
                        step = await self._inbox.receive()
                    await self._do(step() if step is not None else self._tick())
                    if self.leader is not None:
                        await self._do(self.leader.follow(self._host.now(), self.voter.attempt))

    def close(self) -> None:
        """End everything of this round. Nothing is sent any more, the buffers are free."""
        self._scope.cancel()
        self.buffers.drop_inputs()

    def begin(self, vector: Tensor | None, samples: int, weight: int, length: int, why: str) -> None:
        """Training is over: contribute ``vector`` (fp32, 1-D, finite), or nothing and say ``why``."""
        self.began = self._host.now()
        self.buffers.own = vector
        offer = Ready(self.key, self.round, 0, vector is not None, samples, weight, length, None, False, printable(why))
        self._feed(lambda: self.voter.begin(self._host.now(), offer))

    async def outcome(self) -> Tensor | None:
        """The committed result (fp32, 1-D), waiting for the commit; None when no holder could give it any more."""
        await self.decided.wait()
        assert self.commit is not None
        record = self.commit.record
        if not record.fingerprint:
            return None
        holders = tuple(accept.peer for accept in self.commit.certificate.accepts if accept.peer != self.me)
        if await self._obtain(record, holders) is None:
            self.buffers.drop_inputs()
            return self._final
        return None

    def peer_changed(self, peer: PeerId, why: str | None) -> None:
        """Presence tells of a loss (``why``) or a return (None)."""
        if peer not in self.voters:
            return

        def step() -> list[Action]:
            now = self._host.now()
            if why is None:
                if self.leader is not None:
                    self.leader.peer_alive(peer)
                return self.voter.peer_alive(now, peer)
            actions = self.voter.peer_lost(now, peer, why)
            if self.leader is not None:
                actions += self.leader.peer_lost(now, peer, why)
            return actions

        self._feed(step)

    def receive(self, sender: PeerId, message: object) -> None:
        """A message for this instance from ``sender``; a commit's certificate is checked here."""
        if isinstance(message, Commit):
            needed = accepts_needed(len(self.voters), self.setting.terms.gossip)
            wrong = verify_certificate(message.record, message.certificate, self.voters, needed)
            if message.certificate.key != self.key or message.record.prev != self.setting.prev:
                wrong = wrong or "it belongs to another round"
            if wrong is not None:
                raise RemoteRefused("bad-certificate", wrong)
        elif sender not in self.voters:
            raise RemoteRefused("not-a-voter", f"{sender.short} is no voter of round {self.round}")
        self._feed(lambda: self._receive(sender, message))

    # -- the loop -----------------------------------------------------------------------------------

    def _feed(self, step: Callable[[], Sequence[Action]]) -> None:
        self._inbox_in.send_nowait(step)

    def _due(self) -> float:
        times = [self.voter.deadline(), self.leader.deadline() if self.leader else None]
        return min((t for t in times if t is not None), default=math.inf)

    def _tick(self) -> list[Action]:
        now = self._host.now()
        actions = self.voter.tick(now)
        if self.leader is not None:
            actions += self.leader.tick(now)
        return actions

    def _receive(self, sender: PeerId, message: object) -> list[Action]:
        now = self._host.now()
        if self.commit is not None:
            if isinstance(message, Ready | Convene) and sender != self.me:
                return [Send(sender, self.commit)]
            return []
        actions: list[Action] = []
        if isinstance(message, Ready) and self.voter.leader(message.attempt) == self.me:
            known = self._first - 1 if self.leader is None else self.leader.attempt
            if known < message.attempt:
                self._lead(message.attempt)
        if isinstance(message, _TO_LEADER) and self.leader is not None:
            actions += self.leader.receive(now, sender, message)
        if not isinstance(message, _TO_LEADER) or isinstance(message, Reject):
            actions += self.voter.receive(now, sender, message)
        return actions

    def _lead(self, attempt: int) -> None:
        self.leader = Leader(
            key=self.key,
            round=self.round,
            voters=self.voters,
            attempt=attempt,
            identity=self._endpoint.identity,
            pace=self.setting.pace,
            terms=self.setting.terms,
            now=self._host.now(),
            lost=self.voter.lost,
            refused=self.voter.refused,
        )

    async def _do(self, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case Send() if action.to == self.me:
                    message = action.message
                    self._feed(lambda message=message: self._receive(self.me, message))  # type: ignore[misc]
                case Send():
                    self._post.send(action.to, action.message)
                case Push() if action.owner == self.me:
                    if self.buffers.own is not None:
                        self.buffers.keep_own(self.me, action.start, action.stop)
                        piece = (self.me, action.start, action.stop)
                        self._feed(lambda piece=piece: self.voter.slice_received(self._host.now(), *piece))  # type: ignore[misc]
                case Push():
                    self._nursery.start_soon(self._push, action)
                case Combine():
                    self._nursery.start_soon(self._combine, action)
                case Share():
                    self._nursery.start_soon(self._share, action)
                case Pull():
                    self._nursery.start_soon(self._pull, action)
                case Fingerprint():
                    self._nursery.start_soon(self._seal, action)
                case Verify():
                    self._nursery.start_soon(self._verify, action)
                case Persist():
                    await self._host.run_blocking(self.setting.save, action.promised, action.accepted)
                case Promise():
                    await self._do(self.voter.promise(action.attempt))
                case Done():
                    self.commit = action.commit
                    self.leader = None
                    self.decided.set()
                case Note():
                    self.setting.note(action)
                    if action.what == "begin" and self.setting.hold(action.phase):
                        # Fault injection: stop at this phase, for ever.
                        await trio.sleep_forever()
            self._open_generation()

    def _open_generation(self) -> None:
        """A new plan starts a new result, a freeze lets early slices in."""
        plan = self.voter.plan
        if plan is not None and self.buffers.generation != (plan.attempt, plan.epoch) and self.commit is None:
            self.buffers.open((plan.attempt, plan.epoch), plan.length)
        if plan is not None and self.buffers.generation == (plan.attempt, plan.epoch):
            self.buffers.take_early(lambda index, piece: index < len(plan.slices) and plan.slices[index] == piece)

    # -- bulk ---------------------------------------------------------------------------------------

    async def _push(self, action: Push) -> None:
        own = self.buffers.own
        if own is None:
            return
        body = [bytes_view(own[action.start : action.stop])]
        try:
            await self._endpoint.call(action.owner, SCATTER, Scatter(self.key, action.start, action.stop), body=body)
        except RemoteRefused as error:
            self.setting.note(Note("scatter", "refused", error.reason, action.owner))
        except RemoteError as error:
            log.debug("slice for %s: %s", action.owner.short, error)
            self._feed(lambda: self.voter.push_failed(self._host.now(), action.owner, action.start, action.stop))

    async def on_scatter(self, call: Call[Scatter]) -> Ack:
        """Take a contributor's part of a slice; NaN and infinities are refused and the contributor is told."""
        request, sender = call.request, call.peer
        if sender not in self.voters:
            raise RemoteRefused("not-a-voter", f"{sender.short} is no voter of round {self.round}")
        part = self.buffers.room_for(sender, request.start, request.stop)
        if part is None:
            raise RemoteRefused("bad-range", f"elements {request.start}..{request.stop} are too many")
        await call.read_into(bytes_view(part))
        wrong = await self._compute(part.numel(), exact.check_finite, part)
        if wrong is not None:
            why = f"your contribution of round {self.round} is refused: {wrong} (from element {request.start})"
            self.refused[sender] = wrong
            self.setting.note(Note("scatter", "not-finite", wrong, sender))
            raise RemoteRefused("not-finite", why)
        self.buffers.keep(sender, request.start, request.stop, part)
        self._feed(lambda: self.voter.slice_received(self._host.now(), sender, request.start, request.stop))
        return Ack()

    async def _combine(self, action: Combine) -> None:
        plan = self.voter.plan
        if plan is None or self.buffers.generation != (action.attempt, action.epoch):
            return
        ranges = [plan.slices[index].range for index in action.indices]
        combine = self.buffers.combination(action.members, action.weights, ranges)
        await self._compute(sum(stop - start for start, stop in ranges) * len(action.members), combine)
        for index in action.indices:
            self.buffers.filled[index] = None
        self._feed(lambda: self.voter.combined(self._host.now(), action.attempt, action.epoch, action.indices))

    async def _share(self, action: Share) -> None:
        plan, frozen, result = self.voter.plan, self.voter.frozen, self.buffers.result
        if (
            plan is None
            or frozen is None
            or result is None
            or (plan.attempt, plan.epoch) != (action.attempt, action.epoch)
        ):
            return
        start, stop = plan.slices[action.index].range
        request = Shared(
            self.key, action.attempt, action.epoch, action.index, start, stop, members_hash(frozen.members)
        )
        try:
            await self._endpoint.call(action.receiver, SHARE, request, body=[bytes_view(result[start:stop])])
        except RemoteError as error:
            log.debug("combined slice for %s: %s", action.receiver.short, error)

    async def on_share(self, call: Call[Shared]) -> Ack:
        """Take a combined slice from its owner; it may come before we know of plan or freeze."""
        request, sender = call.request, call.peer
        if sender not in self.voters:
            raise RemoteRefused("not-a-voter", f"{sender.short} is no voter of round {self.round}")
        target = self._target(request, sender)
        if target is None:
            part = self.buffers.room_early(sender, request.start, request.stop)
            if part is None:
                raise RemoteRefused("bad-range", "more combined slices than a round has")
            await call.read_into(bytes_view(part))
            piece = Slice(request.start, request.stop, sender)
            self.buffers.keep_early(request.attempt, request.epoch, request.index, piece, part)
            self._open_generation()
        else:
            await call.read_into(bytes_view(target))
            if self._target(request, sender) is not None:
                self.buffers.filled[request.index] = None
        if self.buffers.generation == (request.attempt, request.epoch) and request.index not in self.buffers.filled:
            raise RemoteRefused("bad-range", "that slice is not the plan's")
        self._feed(
            lambda: self.voter.combined_received(
                self._host.now(), sender, request.attempt, request.epoch, request.index, request.members
            )
        )
        return Ack()

    def _target(self, request: Shared, sender: PeerId) -> Tensor | None:
        """Where in the result a slice belongs, None when its plan is not ours (yet) or it is there already."""
        plan, result = self.voter.plan, self.buffers.result
        if plan is None or result is None or self.buffers.generation != (request.attempt, request.epoch):
            return None
        if not 0 <= request.index < len(plan.slices) or request.index in self.buffers.filled:
            return None
        piece = plan.slices[request.index]
        if piece.range != (request.start, request.stop) or piece.owner != sender:
            return None
        return result[request.start : request.stop]

    async def _pull(self, action: Pull) -> None:
        plan, result = self.voter.plan, self.buffers.result
        if plan is None or result is None or (plan.attempt, plan.epoch) != (action.attempt, action.epoch):
            return
        start, stop = plan.slices[action.index].range
        want = Want(self.key, action.attempt, action.epoch, start, stop, b"")
        try:
            async with self._endpoint.stream(action.holder, WANT, want) as reply:
                await reply.read_into(bytes_view(result[start:stop]))
                given = await reply.result()
        except RemoteError as error:
            log.debug("combined slice from %s: %s", action.holder.short, error)
            return
        self.buffers.filled[action.index] = None
        self._feed(
            lambda: self.voter.combined_received(
                self._host.now(),
                action.holder,
                action.attempt,
                action.epoch,
                action.index,
                given.members,
                pulled=True,
            )
        )

    async def on_want(self, call: Call[Want]) -> Given:
        """Give a combined slice of the present generation, or part of the result of a record."""
        request, frozen, plan = call.request, self.voter.frozen, self.voter.plan
        if request.digest:
            source = self._final if request.digest == self._final_digest else None
            if source is None:
                raise RemoteRefused("not-held", f"round {self.round}: that result is not here")
        else:
            source = self.buffers.result if self.buffers.generation == (request.attempt, request.epoch) else None
            pieces = () if plan is None else plan.slices
            indices = [i for i, p in enumerate(pieces) if p.range == (request.start, request.stop)]
            if source is None or not indices or not all(i in self.buffers.filled for i in indices):
                raise RemoteRefused("not-held", f"round {self.round}: that slice is not here")
        if not 0 <= request.start < request.stop <= source.numel():
            raise RemoteRefused("bad-range", f"elements {request.start}..{request.stop} of {source.numel()}")
        await call.write(bytes_view(source[request.start : request.stop]))
        return Given(members_hash(frozen.members) if frozen is not None else b"")

    # -- fingerprints -------------------------------------------------------------------------------

    async def _seal(self, action: Fingerprint) -> None:
        result = self.buffers.result
        assert result is not None
        algorithm, _ = choose_fingerprint(action.offers)
        value = await self._own_fingerprint(result, algorithm, action.nonces)

        def step() -> list[Action]:
            if self.leader is None:
                return []
            return self.leader.fingerprint(self._host.now(), action.attempt, action.epoch, value, algorithm)

        self._feed(step)

    async def _own_fingerprint(self, result: Tensor, algorithm: str, nonces: tuple[bytes, ...]) -> bytes:
        """Of our full result, which no longer changes: a leader needs it to propose and again to accept."""
        if self._printed is None or self._printed[0] is not result or self._printed[1:3] != (algorithm, nonces):
            self._printed = (result, algorithm, nonces, await self._fingerprint(result, algorithm, nonces))
        return self._printed[3]

    async def _fingerprint(self, result: Tensor, algorithm: str, nonces: tuple[bytes, ...]) -> bytes:
        key = hashlib.blake2b(self.key + b"".join(nonces), digest_size=32, person=b"shoal finger v1").digest()
        return await self._compute(result.numel(), fingerprint, algorithm, key, bytes_view(result))

    async def _compute(self, elements: int, fn: Callable[..., T], *args: object) -> T:
        """Off the loop, unless there are so few elements that the way to a thread and back takes longer."""
        return fn(*args) if elements <= defaults.INLINE else await self._host.run_blocking(fn, *args)

    async def _verify(self, action: Verify) -> None:
        wrong = await self._obtain(action.record, action.holders)
        self._feed(lambda: self.voter.verified(self._host.now(), action.attempt, action.record, wrong))

    async def _obtain(self, record: CommitRecord, holders: tuple[PeerId, ...]) -> str | None:
        """Make the result of ``record`` ours: what we combined, or a holder's, if its fingerprint is the record's."""
        digest = record.digest
        if self._final_digest == digest:
            return None
        if record.algorithm not in ("aegis128l", "blake3"):
            return f"unknown fingerprint algorithm {record.algorithm[:20]!r}"
        frozen, result = self.voter.frozen, self.buffers.result
        if self.voter.full and frozen is not None and result is not None and frozen.members == record.members:
            if await self._own_fingerprint(result, record.algorithm, record.nonces) == record.fingerprint:
                self._final, self._final_digest = result, digest
                return None
            self.setting.note(Note("commit", "differs", "our result differs from the proposed one"))
        length = self.voter.plan.length if self.voter.plan is not None else 0
        why = "nobody was named as a holder of the result"
        for holder in holders:
            try:
                final = await self._download(holder, digest, length)
            except RemoteError as error:
                why = str(error)
                continue
            if await self._fingerprint(final, record.algorithm, record.nonces) == record.fingerprint:
                self._final, self._final_digest = final, digest
                return None
            why = f"the result of {holder.short} has another fingerprint"
        return why

    async def _download(self, holder: PeerId, digest: bytes, length: int) -> Tensor:
        if not length:
            length = self._own_length()
        final = Buffers(length).room_for(holder, 0, length)
        assert final is not None
        async with self._endpoint.stream(holder, WANT, Want(self.key, 0, 0, 0, length, digest)) as reply:
            await reply.read_into(bytes_view(final))
            await reply.result()
        return final

    def _own_length(self) -> int:
        if self.buffers.own is not None:
            return self.buffers.own.numel()
        offer = self.voter.offer
        if offer is not None and offer.length:
            return offer.length
        raise RemoteError("the length of the result is not known yet")
