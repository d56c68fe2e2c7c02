"""One round on one peer: drives the voter and the leader, moves their bytes, ends with a commit and its result."""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable, Sequence

import attrs
import trio
from torch import Tensor

from ...transport.endpoint import Endpoint
from ...transport.errors import RemoteRefused
from ...transport.identity import PeerId
from ...transport.waiter import Waiter
from ...transport.wire import printable
from ..digest import local_fingerprints
from ..reduce.buffers import Buffers
from ..reduce.coding import PLAIN, Coding
from ..reduce.filling import Filling
from ..reduce.measured import measured
from ..reduce.memory import RoundMemory
from .actions import (
    Action,
    Assess,
    Check,
    Circulate,
    Combine,
    Done,
    Examine,
    Fingerprint,
    Look,
    Measure,
    Note,
    Persist,
    Prepare,
    Promise,
    Pull,
    Push,
    Send,
    Share,
    Verify,
    Weigh,
)
from .audits import Auditor
from .circling import source
from .claims import Proof
from .decisions import candidates, resume_at
from .leader import Leader
from .messages import (
    ANSWERED,
    TO_LEADER,
    Commit,
    Plan,
    Ready,
    Reject,
    verify_certificate,
)
from .passes import Passes
from .payloads import GATHER, Payload
from .post import Post
from .results import Results
from .scales import Scales
from .setting import Setting
from .terms import accepts_needed
from .traffic import Traffic
from .trainee import SAID, Trainee
from .voter import Voter


class Instance:
    """Drives one round. ``decided`` is set with ``commit``; then :meth:`outcome` gives the result.

    What happens is carried out at once, in the task that tells of it, as far as nothing has to be waited for; the task
    of :meth:`run` does the rest. ``memory``: where buffers come from.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        post: Post,
        setting: Setting,
        lost: dict[PeerId, str],
        memory: RoundMemory | None = None,
    ) -> None:
        self._endpoint, self._post, self.setting = endpoint, post, setting
        self._host, self.me = endpoint.host, endpoint.peer_id
        self.key, self.round, self.voters = setting.key, setting.round, setting.voters
        self.trial = tuple(each.peer for each in setting.trial)
        self.commit: Commit | None = None
        self.decided = trio.Event()
        self.began: float | None = None
        self.buffers = Buffers(setting.max_length, memory or RoundMemory())
        secret = self._host.entropy(32)
        order = candidates(setting.prev, self.round, self.voters)
        promised, accepted = resume_at(setting.stored, order, self.me)
        self.voter = (Trainee if self.me in self.trial else Voter)(
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
            rule=setting.rule,
            audits=setting.audit > 0 and self.me not in self.trial,
            trial=self.trial,
            scores=setting.scores,
            promised=promised,
            accepted=accepted,
        )
        self.voter.heeds = setting.heeded
        self._first = promised
        self.voter.lost.update({p: w for p, w in lost.items() if p in self.voters or p in self.trial})
        self.leader: Leader | None = None
        passes = Passes(self._host)
        self.results = Results(endpoint, setting, self.voter, self.buffers, passes)
        self.auditor = Auditor(
            endpoint, setting, self.voter, self.buffers, passes, self._feed, self._convict, self._doubt
        )
        self.traffic = Traffic(
            endpoint, setting, self.voter, self.buffers, self.results, passes, post, self._feed, self._open_generation,
            self.auditor,
        )  # fmt: skip
        self.scales = Scales(self._host, setting, self.voter, self.buffers, passes, self._feed, self.auditor)
        #: Called when this round begins to collect its result: bytes that it takes.
        self.on_open: Callable[[int], None] = lambda size: None
        #: Whether we may plan a ring.
        self.rings: Callable[[], bool] = lambda: True
        self._steps: deque[Callable[[], Sequence[Action]]] = deque()
        self._actions: deque[Action] = deque()
        self._scope = trio.CancelScope()
        self._nursery: trio.Nursery | None = None
        self._working = self._waiting = False
        self._wake = Waiter()
        self._sleep: trio.CancelScope | None = None

    # -- life ---------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Drive the round and, once decided, serve its result to late peers, until :meth:`close`."""
        with self._scope:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                try:
                    if self.voter.leader(self.voter.attempt) == self.me:
                        self._lead(self.voter.attempt)
                    while True:
                        if self._work():
                            await self._wait_for(self._actions.popleft())
                            self._waiting = False
                            continue
                        with trio.CancelScope(deadline=self._due()) as self._sleep:
                            await self._wake.wait()
                        if self._sleep.cancelled_caught:
                            self._steps.append(self._tick)
                finally:
                    self._nursery = None

    def close(self) -> None:
        """End everything of this round. Nothing is sent any more, the buffers are free."""
        self._scope.cancel()
        # The tasks that end now hold us, and the next round wants the memory at once.
        self.auditor.ledger.drop()
        self.traffic.relay.drop()
        self.buffers.drop()
        self.results.drop()

    def begin(
        self,
        vector: Tensor | None,
        samples: int,
        weight: int,
        length: int,
        why: str,
        filling: Filling | None = None,
        coding: Coding = PLAIN,
        payload: bytes | None = None,
    ) -> None:
        """Training is over: contribute ``vector`` (fp32, 1-D, finite), or nothing and say ``why``.

        ``filling``: how much of the vector is there already; None for all of it. ``coding``: how it travels.
        ``payload``: what is given instead of a vector; ``length`` is 0 then.
        """
        self.began = self._host.now()
        self.buffers.own, self.buffers.coding = vector, coding
        filling = self.traffic.filling = Filling(length) if filling is None else filling
        if not filling.full:
            # All voters do as we do: what is still being computed is waited for like a straggler's training.
            self.voter.spare = self.setting.pace.grace
            if self.leader is not None:
                self.leader.spare = self.voter.spare
        rates = measured(self._endpoint, self.voters)
        given = None if payload is None else Payload.sign(self._endpoint.identity, self.key, payload)
        gives, why, codec = vector is not None or given is not None, printable(why), coding.codec.name
        offer = Ready(self.key, self.round, 0, gives, samples, weight, length, None, False, why, rates, codec)
        offer = attrs.evolve(offer, payload=given)
        self._feed(lambda: self.voter.begin(self._host.now(), offer))

    def withdraw(self, why: str) -> None:
        """What is missing of our vector will never come: the others go on without it, and need not wait."""
        self.traffic.filling.fail(why)
        self._feed(lambda: self.voter.withdraw(self._host.now(), printable(why)))

    async def outcome(self) -> Tensor | None:
        """The committed result (fp32, 1-D), waiting for the commit; None when no holder could give it any more."""
        await self.decided.wait()
        assert self.commit is not None
        record = self.commit.record
        if not record.fingerprint and record.kind != GATHER:
            return None
        holders = tuple(accept.peer for accept in self.commit.certificate.accepts if accept.peer != self.me)
        if await self.results.obtain(record, holders) is None:
            final = self.results.final
            # Whoever waits for the result may keep the loop busy with it: what others wait for is sent before. The
            # round may be closed meanwhile, which takes nothing from who has agreed on it.
            await self._post.leave_first()
            self.auditor.ledger.drop()
            self.traffic.relay.drop()
            self.buffers.drop_inputs()
            return final
        return None

    def peer_changed(self, peer: PeerId, why: str | None) -> None:
        """Presence tells of a loss (``why``) or a return (None)."""
        if peer not in self.voters and peer not in self.trial:
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
        elif sender not in self.voters and not (sender in self.trial and isinstance(message, SAID)):
            raise RemoteRefused("not-a-voter", f"{sender.short} is no voter of round {self.round}")
        self._feed(lambda: self._receive(sender, message))

    # -- the loop -----------------------------------------------------------------------------------

    def _feed(self, step: Callable[[], Sequence[Action]]) -> None:
        """``step`` happened: carry out what follows from it, now if we can."""
        self._steps.append(step)
        if self._nursery is None or self._working or self._waiting:
            return  # it is its turn when what goes on now is done
        if self._work():
            self._wake.wake()
        elif self._sleep is not None:
            self._sleep.deadline = self._due()

    def _work(self) -> bool:
        """Carry out what is due, in order, until there is nothing more; True when the next has to be waited for."""
        self._working = True
        try:
            while True:
                if self._actions:
                    if isinstance(self._actions[0], Persist) or self._stops(self._actions[0]):
                        self._waiting = True
                        return True
                    self._carry_out(self._actions.popleft())
                elif self._steps:
                    self._actions.extend(self._steps.popleft()())
                    if self.leader is not None:
                        self._actions.extend(self.leader.follow(self._host.now(), self.voter.attempt))
                else:
                    return False
        finally:
            self._working = False

    def _stops(self, action: Action) -> bool:
        return isinstance(action, Note) and action.what == "begin" and self.setting.hold(action.phase)

    async def _wait_for(self, action: Action) -> None:
        if isinstance(action, Persist):
            await self._host.run_blocking(self.setting.save, action.promised, action.accepted)
        else:
            assert isinstance(action, Note)
            self.setting.note(action)
            await trio.sleep_forever()  # fault injection: stop at this phase, for ever

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
            if isinstance(message, ANSWERED) and sender != self.me:
                return [Send(sender, self.commit)]
            return []
        actions: list[Action] = []
        if isinstance(message, Proof) and self._nursery is not None:
            self._nursery.start_soon(self._proof, sender, message)
            return []
        if isinstance(message, Ready) and sender in self.voters and self.voter.leader(message.attempt) == self.me:
            known = self._first - 1 if self.leader is None else self.leader.attempt
            if known < message.attempt:
                self._lead(message.attempt)
        if isinstance(message, TO_LEADER) and self.leader is not None:
            actions += self.leader.receive(now, sender, message)
        if not isinstance(message, TO_LEADER) or isinstance(message, Reject):
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
            unfit=lambda record: self.setting.check(record) or self.voter.refused.get(record.digest),
            rule=self.setting.rule,
            convicted={**self.setting.expelled(), **self.voter.convicted},
            audits=self.setting.audit > 0,
            trial=self.setting.trial,
            scores=self.setting.scores,
            rings=self.rings() and not self.voter.ring_broken and not (self.voter.plan and self.voter.plan.ring),
        )
        self.leader.spare = self.voter.spare

    def _convict(self, owner: PeerId, why: str) -> list[Action]:
        """We have seen that ``owner`` lied."""
        now = self._host.now()
        actions = self.voter.convict(now, owner, why)
        if self.leader is not None:
            actions += self.leader.convict(now, owner, why)
        return actions

    def _doubt(self, plan: Plan, index: int, number: int, why: str) -> list[Action]:
        """The owner of slice ``index`` does not show its work: its slices go to others, if the leader sees the same."""
        now, place = self._host.now(), (plan.attempt, plan.epoch)
        if self.leader is not None and self.leader.attempt == plan.attempt:
            self.leader.looking()
            return self.leader.looked(now, *place, plan.slices[index].owner, why)
        return self.voter.doubt(now, *place, index, number)

    async def _proof(self, sender: PeerId, message: Proof) -> None:
        leader, plan = self.leader, self.voter.plan
        if leader is not None:
            leader.looking()
        await self.auditor.proof(sender, message)
        place = (plan.attempt, plan.epoch) if plan is not None else (-1, -1)
        self._feed(lambda: self._looked(leader, *place, None, ""))

    def _looked(
        self, leader: Leader | None, attempt: int, epoch: int, doubted: PeerId | None, why: str
    ) -> list[Action]:
        if leader is None or self.leader is not leader:
            return []
        return leader.looked(self._host.now(), attempt, epoch, doubted, why)

    async def _look(self, action: Look) -> None:
        leader = self.leader
        if leader is not None:
            leader.looking()
        doubted, why = await self.auditor.look(action)
        self._feed(lambda: self._looked(leader, action.attempt, action.epoch, doubted, why))

    def _carry_out(self, action: Action) -> None:
        assert self._nursery is not None
        match action:
            case Send() if action.to == self.me:
                message = action.message
                self._steps.append(lambda: self._receive(self.me, message))
            case Send():
                self._post.send(action.to, action.message)
            case Push() | Circulate() | Combine() | Share() | Pull():
                self.traffic.start(self._nursery, action)
            case Measure():
                self._nursery.start_soon(self.scales.measure, action)
            case Assess():
                self._nursery.start_soon(self.scales.assess, action)
            case Weigh():
                self._nursery.start_soon(self._weigh, action)
            case Check():
                self._nursery.start_soon(self.scales.check, action)
            case Examine():
                self._nursery.start_soon(self.auditor.examine, action)
            case Look():
                self._nursery.start_soon(self._look, action)
            case Fingerprint():
                self._nursery.start_soon(self._seal, action)
            case Prepare():
                self._nursery.start_soon(self.results.own_fingerprint, action.algorithm, action.nonces)
            case Verify():
                self._nursery.start_soon(self._verify, action)
            case Promise():
                self._actions.extendleft(reversed(self.voter.promise(action.attempt)))
            case Done():
                self.commit = action.commit
                self.leader = None
                self.decided.set()
            case Note():
                self.setting.note(action)
            case Persist():
                raise AssertionError("it has to be waited for")
        self._open_generation()

    def _open_generation(self) -> None:
        """A new plan starts a new result, a freeze lets early slices in."""
        plan = self.voter.plan
        if plan is not None and self.buffers.generation != (plan.attempt, plan.epoch) and self.commit is None:
            self.on_open(4 * plan.length)
            self.traffic.relay.open((plan.attempt, plan.epoch))
            self.buffers.open((plan.attempt, plan.epoch), plan.length)
        if plan is not None and self.buffers.generation == (plan.attempt, plan.epoch):
            self.buffers.take_early(plan.slices, plan.codec, lambda index: source(plan, index, self.me))

    async def _weigh(self, action: Weigh) -> None:
        leader = self.leader
        found = await self.scales.weigh(action)

        def step() -> list[Action]:
            if leader is None or self.leader is not leader:
                return []
            return leader.weighed(self._host.now(), action, found)

        self._feed(step)

    # -- the result ---------------------------------------------------------------------------------

    async def _seal(self, action: Fingerprint) -> None:
        value = await self.results.own_fingerprint(action.algorithm, action.nonces)

        def step() -> list[Action]:
            if self.leader is None:
                return []
            return self.leader.fingerprint(self._host.now(), action.attempt, action.epoch, value, action.algorithm)

        self._feed(step)

    async def _verify(self, action: Verify) -> None:
        wrong = await self.results.obtain(action.record, action.holders)
        self._feed(lambda: self.voter.verified(self._host.now(), action.attempt, action.record, wrong))
