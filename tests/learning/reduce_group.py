"""Peers that reduce vectors over real endpoints on the memory network, in virtual time, without a run around them."""

from __future__ import annotations

import hashlib
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

import attrs
import torch
import trio
from torch import Tensor

from shoal.learning import defaults, exact
from shoal.learning.reduce.coding import PLAIN, Coding
from shoal.learning.rounds.actions import Note
from shoal.learning.rounds.decisions import candidates
from shoal.learning.rounds.hub import Hub
from shoal.learning.rounds.instance import Instance
from shoal.learning.rounds.lies import Lie
from shoal.learning.rounds.messages import Accepted, CommitRecord, OnTrial, instance_key
from shoal.learning.rounds.pace import pace
from shoal.learning.rounds.post import Post
from shoal.learning.rounds.presence import Presence
from shoal.learning.rounds.setting import Setting
from shoal.learning.rounds.terms import Terms, fill
from shoal.learning.rounds.weighing import MEAN
from shoal.sim.virtual import VirtualHost
from shoal.transport.address import Address
from shoal.transport.aead import NOMINAL_CIPHERS
from shoal.transport.endpoint import Endpoint
from shoal.transport.host import RealHost
from shoal.transport.identity import Identity, PeerId
from shoal.transport.memory import MemoryWorld
from shoal.transport.memory_flow import Route

RUN = bytes(32)


@attrs.define(eq=False)
class Member:
    """One peer. ``result`` and ``ended`` (virtual seconds) are set when it holds the committed result of the round."""

    name: str
    endpoint: Endpoint
    vector: Tensor
    #: Where it listens.
    address: Address
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    notes: list[tuple[float, Note]] = attrs.field(factory=list)
    lost: list[tuple[float, PeerId]] = attrs.field(factory=list)
    votes: dict[bytes, tuple[int, Accepted | None]] = attrs.field(factory=dict)
    #: What its looks found, and the proofs it got, in all rounds.
    verdicts: list[tuple[PeerId, str]] = attrs.field(factory=list)
    lies: list[Lie] = attrs.field(factory=list)
    #: What it does to slices that it combines, if it lies.
    distort: Callable[[Tensor], None] | None = None
    nursery: trio.Nursery = attrs.field(init=False)
    post: Post = attrs.field(init=False)
    presence: Presence = attrs.field(init=False)
    hub: Hub = attrs.field(init=False)
    instance: Instance = attrs.field(init=False)
    result: Tensor | None = None
    ended: float = 0.0
    dead: bool = False

    @property
    def me(self) -> PeerId:
        return self.endpoint.peer_id

    @property
    def plans(self) -> list[str]:
        """What it was told of the plans it followed."""
        return [note.detail for _, note in self.notes if (note.phase, note.what) == ("scatter", "begin")]

    @property
    def sent(self) -> int:
        return sum(link.bytes_sent for link in self.endpoint.links())


class Group:
    """``members`` in the order of their keys. :meth:`reduce` does one round; ``hooks`` see every note at once."""

    def __init__(self, world: MemoryWorld, members: list[Member]) -> None:
        self.world, self.members = world, members
        self.voters = tuple(member.me for member in members)
        self.head = CommitRecord(RUN, 0, "genesis", b"", (), (), (), self.voters, 0, 0, b"", (), "", b"", "")
        self.hooks: list[Callable[[Member, Note], None]] = []
        #: Called with every member whose instance of a round has just been made.
        self.open_hooks: list[Callable[[Member], None]] = []
        self.began = 0.0
        #: How everybody's contribution travels.
        self.coding = PLAIN
        self.codings: dict[str, Coding] = {}
        #: What everybody combines by.
        self.rule = MEAN
        #: Looks of each peer in a round.
        self.audit = 0.0
        #: Members that are on trial and no voters.
        self.trial: tuple[OnTrial, ...] = ()

    @property
    def leader(self) -> Member:
        """Of the first attempt of the next round."""
        first = candidates(self.head.digest, self.head.round + 1, self.voters)[0]
        return next(member for member in self.members if member.me == first)

    def put_on_trial(self, member: Member, left: int = 3) -> None:
        """``member`` is no voter in the rounds to come."""
        self.voters = tuple(voter for voter in self.voters if voter != member.me)
        self.trial = tuple(sorted((*self.trial, OnTrial(member.me, left)), key=lambda each: each.peer))
        self.head = attrs.evolve(self.head, roster=self.voters, trial=self.trial)

    def live(self) -> list[Member]:
        return [member for member in self.members if not member.dead]

    def kill(self, member: Member) -> None:
        """SIGKILL, now."""
        member.dead = True
        self.world.kill(member.name)
        member.scope.cancel()

    def open(self, member: Member) -> None:
        head, round = self.head, self.head.round + 1
        key = instance_key(RUN, round, head.digest, self.voters)
        base = attrs.evolve(head, round=round, prev=head.digest, reason="")
        size = 4 * member.vector.numel()

        def note(note: Note) -> None:
            if member.dead:
                return
            member.notes.append((trio.current_time(), note))
            for hook in self.hooks:
                hook(member, note)

        terms = Terms(partial(fill, lambda: base), lambda: (), lambda: (), False, defaults.MAX_ROSTER, True, 3)
        member.notes, member.result = [], None
        member.instance = Instance(
            member.endpoint,
            member.post,
            Setting(
                key=key,
                round=round,
                prev=head.digest,
                voters=self.voters,
                terms=terms,
                pace=pace(member.endpoint, self.voters, size, 0.0),
                check=lambda record: None if record.prev == head.digest else "another history",
                max_length=member.vector.numel(),
                save=lambda promised, accepted: member.votes.update({key: (promised, accepted)}),
                stored=member.votes.get(key),
                note=note,
                hold=lambda phase: member.dead,
                rule=self.rule,
                run=RUN,
                audit=self.audit,
                audited=lambda peer, verdict, why: member.verdicts.append((peer, verdict)),
                slandered=lambda peer: member.verdicts.append((peer, "false-accusation")),
                proven=member.lies.append,
                distort=member.distort,
                trial=self.trial,
            ),
            member.presence.lost,
            member.hub.memory,
        )
        for hook in self.open_hooks:
            hook(member)
        member.hub.add(member.instance)
        member.nursery.start_soon(self._take_part, member)

    async def _take_part(self, member: Member) -> None:
        instance = member.instance
        member.nursery.start_soon(instance.run)
        instance.begin(
            member.vector, 1, 1, member.vector.numel(), "", coding=self.codings.get(member.name, self.coding)
        )
        member.result = await instance.outcome()
        member.ended = trio.current_time()
        assert instance.commit is not None
        member.hub.remember(instance.commit)

    async def reduce(self, *, limit: float, wait_for: list[Member] | None = None) -> float:
        """One round of all that live: virtual seconds until ``wait_for`` (default: who lives then) have its result."""
        self.began = trio.current_time()
        for member in self.live():
            self.open(member)
        with trio.move_on_after(limit):
            while any(member.result is None for member in wait_for or self.live()):
                await trio.sleep(0.002)
            return trio.current_time() - self.began
        raise AssertionError(f"not within {limit:g} s: " + "; ".join(self.describe(member) for member in self.live()))

    @staticmethod
    def describe(member: Member) -> str:
        voter = member.instance.voter
        return f"{member.name}: attempt {voter.attempt}, {voter.phase}, {voter.reason}"

    def check(self, *, members: list[Member], holders: list[Member] | None = None) -> None:
        """One record everywhere, of exactly ``members``; everybody holds the bits of their mean."""
        parts = [member.vector for member in self.members if member in members]
        mean = exact.weighted_mean(parts, [1.0] * len(parts))
        for member in holders or self.live():
            commit = member.instance.commit
            assert commit is not None, self.describe(member)
            assert commit.record.members == tuple(m.me for m in self.members if m in members), commit.record.reason
            assert member.result is not None
            assert torch.equal(member.result, mean)
        digests = {m.instance.commit.record.digest for m in self.members if m.instance.commit is not None}
        assert len(digests) == 1

    def advance(self) -> None:
        """On to the next round."""
        commit = self.live()[0].instance.commit
        assert commit is not None
        self.head = commit.record


async def _run_member(member: Member, *, task_status: trio.TaskStatus[None]) -> None:
    with member.scope:
        async with trio.open_nursery() as nursery:
            member.nursery = nursery
            await nursery.start(member.endpoint.run, [member.address])
            member.post = Post(member.endpoint, nursery)
            member.presence = Presence(member.endpoint, nursery)
            member.hub = Hub(member.endpoint, member.post)

            def changed(peer: PeerId, why: str | None) -> None:
                if why is not None:
                    member.lost.append((trio.current_time(), peer))
                member.hub.peer_changed(peer, why)

            member.presence.on_change = changed
            task_status.started()
            await trio.sleep_forever()


@asynccontextmanager
async def reduce_group(
    count: int, elements: int, *, route: Route | None = None, seed: int = 0, real: bool = False
) -> AsyncIterator[Group]:
    """``count`` peers that hold vectors of ``elements`` float32 and are connected in pairs. ``real``: over sockets."""
    world = MemoryWorld(random.Random(f"group {seed}"), default=route or Route(latency=0.005, bandwidth=50e6))
    members = []
    for number in range(count):
        name = f"peer{number}"
        host = RealHost() if real else VirtualHost(name, world, seed=seed)
        if not real:
            host.ciphers = NOMINAL_CIPHERS
        address = Address("tcp", "127.0.0.1", 0) if real else Address("mem", name, 4001)
        identity = Identity(hashlib.blake2b(f"{seed} {number}".encode(), digest_size=32).digest())
        generator = torch.Generator().manual_seed(1000 * seed + number)
        vector = torch.randn(elements, generator=generator)
        members.append(Member(name, Endpoint(host, identity), vector, address))
    members.sort(key=lambda member: member.me)
    async with trio.open_nursery() as nursery:
        for member in members:
            await nursery.start(_run_member, member)
        for index, member in enumerate(members):
            for other in members[index + 1 :]:
                await member.endpoint.connect(other.me, list(other.endpoint.addresses()))
        group = Group(world, members)
        for member in members:
            member.presence.watch(group.voters)
        yield group
        nursery.cancel_scope.cancel()
