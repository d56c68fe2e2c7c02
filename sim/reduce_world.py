"""Rounds of the group reduce in virtual time: real endpoints, encryption and rounds, without a run around them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial

import attrs
import torch
import trio
from torch import Tensor

from ..learning import defaults as learning
from ..learning import exact
from ..learning.reduce import topology
from ..learning.reduce.probes import Probes
from ..learning.rounds.actions import Note
from ..learning.rounds.hub import Hub
from ..learning.rounds.instance import Instance
from ..learning.rounds.messages import Accepted, CommitRecord, instance_key
from ..learning.rounds.pace import pace
from ..learning.rounds.post import Post
from ..learning.rounds.presence import Presence
from ..learning.rounds.setting import Setting
from ..learning.rounds.terms import Terms, fill
from ..transport.address import Address
from ..transport.aead import NOMINAL_CIPHERS
from ..transport.endpoint import Endpoint
from ..transport.errors import WaitExpired
from ..transport.identity import Identity, PeerId
from ..transport.memory import MemoryNetwork, MemoryWorld
from ..transport.memory_flow import Route
from .determinism import run_virtual, seeded
from .virtual import VirtualHost

RUN = bytes(32)
PORT = 4001

#: Virtual seconds for one round, whatever its size: none that is healthy takes so long.
ROUND_LIMIT = 3600.0


@attrs.frozen
class ReduceScenario:
    """``uplinks``: bytes per second, one per peer. ``size``: bytes of the vector, fp32. ``latency``: seconds one way.

    ``rounds``: one after the other; the first knows nothing of the lines unless they are measured before, as runs do
    (``probes``). ``routes``: (from, to) → bytes per second of
    that path, by number, where it is slower than the uplink. ``late``: number → seconds after the others at which it
    begins each round. ``lag``: number → seconds for which its event loop stands still, again and again.
    """

    uplinks: tuple[float, ...]
    size: int
    latency: float = 0.04
    rounds: int = 3
    seed: int = 0
    routes: dict[tuple[int, int], float] = attrs.field(factory=dict)
    late: dict[int, float] = attrs.field(factory=dict)
    lag: dict[int, float] = attrs.field(factory=dict)
    probes: bool = False


@attrs.frozen
class RoundResult:
    """One round as it went. Seconds since its beginning; ``phases``: name → when the last peer got there.

    ``members``: numbers of those whose contribution is in it; ``missing``: of those that had no result in time, with
    what they said; ``attempts``: more than one means that something went wrong; ``expected``: what the planner foresaw.
    """

    seconds: float
    median: float
    phases: dict[str, float]
    members: tuple[int, ...]
    missing: dict[int, str]
    attempts: int
    epochs: int
    reason: str
    shares: tuple[float, ...]
    sent: tuple[int, ...]


class ReducePeer:
    """One machine with an endpoint that does rounds."""

    def __init__(self, number: int, scenario: ReduceScenario, world: MemoryWorld) -> None:
        self.number, self.name, self.scenario = number, f"peer{number}", scenario
        host = VirtualHost(self.name, world, seed=scenario.seed)
        host.ciphers = NOMINAL_CIPHERS
        self.host = host
        seed = hashlib.blake2b(f"{scenario.seed} {self.name}".encode(), digest_size=32).digest()
        self.endpoint = Endpoint(host, Identity(seed))
        self.address = Address("mem", self.name, PORT)
        self.notes: list[tuple[float, Note]] = []
        self.instance: Instance | None = None
        self.result: Tensor | None = None
        self.ended: float | None = None

    async def start(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        await nursery.start(self.endpoint.run, [self.address])
        self.post = Post(self.endpoint, nursery)
        self.presence = Presence(self.endpoint, nursery)
        self.hub = Hub(self.endpoint, self.post)
        self.presence.on_change = self.hub.peer_changed
        self.probes = Probes(self.endpoint, nursery)
        if self.number in self.scenario.lag:
            nursery.start_soon(self._stand_still, self.scenario.lag[self.number])

    async def _stand_still(self, seconds: float) -> None:
        """Half of the time nothing runs here, as seen by others."""
        network = self.host.network
        assert isinstance(network, MemoryNetwork)
        world = network.world
        while True:
            world.freeze(self.name)
            await trio.sleep(seconds)
            world.unfreeze(self.name)
            await trio.sleep(seconds)

    def open(self, voters: tuple[PeerId, ...], head: CommitRecord) -> None:
        """Begin the round after ``head``."""
        key = instance_key(RUN, head.round + 1, head.digest, voters)
        base = attrs.evolve(head, round=head.round + 1, prev=head.digest, state=b"", reason="")

        def check(record: CommitRecord) -> str | None:
            follows = (record.run, record.round, record.prev) == (RUN, head.round + 1, head.digest)
            return None if follows else "it does not follow our last commit"

        def save(promised: int, accepted: Accepted | None) -> None:
            del promised, accepted  # nobody restarts here

        setting = Setting(
            key=key,
            round=head.round + 1,
            prev=head.digest,
            voters=voters,
            terms=Terms(partial(fill, lambda: base), lambda: (), lambda: (), False, learning.MAX_ROSTER),
            pace=pace(self.endpoint, voters, self.scenario.size, 0.0),
            check=check,
            max_length=self.scenario.size // 4,
            save=save,
            stored=None,
            note=lambda note: self.notes.append((self.host.now(), note)),
            hold=lambda phase: False,
        )
        self.instance = Instance(self.endpoint, self.post, setting, self.presence.lost)
        self.result = self.ended = None
        self.notes.clear()
        self.hub.add(self.instance)
        self._nursery.start_soon(self.instance.run)

    async def reduce(self, vector: Tensor) -> None:
        assert self.instance is not None
        await trio.sleep(self.scenario.late.get(self.number, 0.0))
        self.instance.begin(vector, 1, 1, len(vector), "")
        self.result = await self.instance.outcome()
        self.ended = self.host.now()
        if self.instance.commit is not None:
            self.hub.remember(self.instance.commit)


class ReduceWorld:
    """The peers of a scenario, all connected. See :func:`reduce_rounds`."""

    def __init__(self, scenario: ReduceScenario) -> None:
        self.scenario = scenario
        self.network = MemoryWorld(
            seeded(scenario.seed, "network"), default=Route(latency=scenario.latency, window=16 << 20)
        )
        self.peers = [ReducePeer(number, scenario, self.network) for number in range(len(scenario.uplinks))]
        self.voters = tuple(sorted(peer.endpoint.peer_id for peer in self.peers))
        self.by_id = {peer.endpoint.peer_id: peer for peer in self.peers}
        base = torch.arange(scenario.size // 4, dtype=torch.float32).remainder_(1009.0)
        # Two vectors for all, as so many of them would not fit: their mean is known.
        self.vectors = (base, base + 2.0)
        self.head = CommitRecord(RUN, 0, "genesis", b"", (), (), (), self.voters, 0, 0, b"", (), "", b"", "")

    async def connect(self, nursery: trio.Nursery) -> None:
        """Start all, and link each with each."""
        scenario = self.scenario
        for peer in self.peers:
            await peer.start(nursery)
        async with trio.open_nursery() as dials:
            for index, one_peer in enumerate(self.peers):
                for other in self.peers[index + 1 :]:
                    dials.start_soon(one_peer.endpoint.connect, other.endpoint.peer_id, [other.address])
        for each, uplink in zip(self.peers, scenario.uplinks, strict=True):
            self.network.set_uplink(each.name, uplink)
        for (sender, receiver), rate in scenario.routes.items():
            route = Route(latency=scenario.latency, bandwidth=rate, window=16 << 20)
            self.network.set_route(f"peer{sender}", f"peer{receiver}", route, one_way=True)
        for peer in self.peers:
            peer.presence.watch(self.voters)
        await trio.sleep(5.0)  # hellos and first pings are over
        if scenario.probes:
            for peer in self.peers:
                peer.probes.consider(self.voters, scenario.size, lambda: True)
            await trio.sleep(learning.PROBE_TIME + 1.0)

    async def round(self, limit: float = ROUND_LIMIT) -> RoundResult:
        """One round of all peers; ends when all that can have the result have it.

        Raises :class:`WaitExpired` when nobody has it in time, :class:`AssertionError` for wrong bits.
        """
        began = trio.current_time()
        for peer in self.peers:
            peer.open(self.voters, self.head)
        sent = [sum(link.bytes_sent for link in peer.endpoint.links()) for peer in self.peers]
        with trio.move_on_after(limit):
            async with trio.open_nursery() as nursery:
                for peer in self.peers:
                    nursery.start_soon(peer.reduce, self.vectors[peer.number % 2])
        done = [peer for peer in self.peers if peer.result is not None]
        if not done:
            raise WaitExpired(f"result of a round ({self.reasons()})", limit)
        first = done[0].instance
        assert first is not None and first.commit is not None
        record = first.commit.record
        members = tuple(self.by_id[member].number for member in record.members)
        self._verify(done, members)
        ends = sorted(peer.ended - began for peer in done if peer.ended is not None)
        plan = first.voter.plan
        shares = [0.0] * len(self.peers)
        for piece in plan.slices if plan is not None else ():
            shares[self.by_id[piece.owner].number] += (piece.stop - piece.start) / (self.scenario.size // 4)
        self.head = record
        return RoundResult(
            seconds=ends[-1],
            median=ends[len(ends) // 2],
            phases=self._phases(began),
            members=tuple(sorted(members)),
            missing={
                peer.number: peer.instance.voter.reason
                for peer in self.peers
                if peer.result is None and peer.instance is not None
            },
            attempts=first.voter.attempt + 1,
            epochs=plan.epoch + 1 if plan is not None else 0,
            reason=record.reason,
            shares=tuple(shares),
            sent=tuple(
                sum(link.bytes_sent for link in peer.endpoint.links()) - before
                for peer, before in zip(self.peers, sent, strict=True)
            ),
        )

    def reasons(self) -> str:
        """What each peer says about where it is."""
        return "; ".join(f"{p.name}: {p.instance.voter.reason}" for p in self.peers if p.instance is not None)

    def _verify(self, done: Sequence[ReducePeer], members: Sequence[int]) -> None:
        mean = torch.empty_like(self.vectors[0])
        exact.weighted_mean([self.vectors[number % 2] for number in members], [1.0] * len(members), out=mean)
        for peer in done:
            assert peer.result is not None
            assert torch.allclose(peer.result, mean, rtol=1e-6), f"{peer.name} has another result"
            assert done[0].result is not None
            assert torch.equal(peer.result, done[0].result), f"{peer.name} has other bits than {done[0].name}"

    def _phases(self, began: float) -> dict[str, float]:
        """When the last peer began each phase."""
        latest: dict[str, float] = {}
        for peer in self.peers:
            for at, note in peer.notes:
                if note.what == "begin":
                    latest[note.phase] = max(latest.get(note.phase, 0.0), at - began)
        return latest


def reduce_rounds(
    scenario: ReduceScenario, then: Callable[[ReduceWorld, RoundResult], None] = lambda world, result: None
) -> list[RoundResult]:
    """Do the rounds of ``scenario`` in virtual time. ``then``: called after each, with the world as it is.

    Deterministic in ``scenario.seed``. Raises what :meth:`ReduceWorld.round` raises.
    """

    async def main() -> list[RoundResult]:
        results = []
        async with trio.open_nursery() as nursery:
            world = ReduceWorld(scenario)
            await world.connect(nursery)
            for _ in range(scenario.rounds):
                results.append(await world.round())
                then(world, results[-1])
                await trio.sleep(1.0)
            nursery.cancel_scope.cancel()
        return results

    return run_virtual(main, seed=scenario.seed)


def optimum(scenario: ReduceScenario) -> float:
    """Seconds of the two bulk phases over these uplinks at best, without latency: see :mod:`topology`."""
    return topology.bound(scenario.size, scenario.uplinks).seconds
