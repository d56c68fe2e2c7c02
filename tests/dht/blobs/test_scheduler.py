"""The scheduler gets every chunk that anybody has, from whoever is there, and wastes little."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Iterable

import attrs
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shoal.dht.blobs import defaults, reference
from shoal.dht.blobs.bits import Bits
from shoal.dht.blobs.scheduler import Ask, Cancel, Scheduler
from shoal.transport.identity import Identity, PeerId

PEERS = tuple(sorted(Identity(bytes([n]) * 32).peer_id for n in range(1, 9)))
MIB = 1 << 20


def bits(size: int, chunks: Iterable[int]) -> Bits:
    made = Bits(size)
    for chunk in chunks:
        made.add(chunk)
    return made


# --- a network to try it in -------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class Peer:
    """A holder that sends ``rate`` bytes a second, after ``rtt`` seconds, until it ``dies``. A liar: wrong ones."""

    rate: float
    chunks: frozenset[int] | None = None
    rtt: float = 0.05
    dies: float = math.inf
    lies: bool = False
    busy_until: float = 0.0


@attrs.define(eq=False)
class Sim:
    """Downloads ``count`` chunks of 1 MiB. Requests of one peer are answered one after the other."""

    count: int
    peers: dict[PeerId, Peer]
    now: float = 0.0
    asked: int = 0
    received: int = 0
    events: list[tuple[float, int, PeerId, int, int]] = attrs.field(factory=list)
    running: dict[int, None] = attrs.field(factory=dict)

    def run(self, limit: float = 10_000.0) -> Scheduler:
        sched, counter = Scheduler(lambda _: MIB, range(self.count)), itertools.count()
        for name, peer in self.peers.items():
            sched.add(name, None if peer.chunks is None else bits(self.count, peer.chunks), peer.rtt, 0.0)
        while not sched.done:
            for action in sched.poll(self.now):
                self.act(sched, action, counter)
            sched.check()
            due = sched.due(self.now)
            at = min(self.events[0][0] if self.events else math.inf, due)
            assert at < limit, f"stuck at {self.now}: {sched.left} left"
            self.now = max(self.now, at)
            while self.events and self.events[0][0] <= self.now:
                _, _, name, number, chunk = heapq.heappop(self.events)
                self.arrive(sched, name, number, chunk)
        return sched

    def act(self, sched: Scheduler, action: Ask | Cancel, counter: itertools.count[int]) -> None:
        if isinstance(action, Cancel):
            self.running.pop(action.number, None)
            sched.ended(action.number)
            return
        peer = self.peers[action.peer]
        assert peer.chunks is None or peer.chunks.issuperset(action.chunks)
        self.running[action.number] = None
        at = max(self.now + peer.rtt, peer.busy_until)
        for chunk in action.chunks:
            self.asked += 1
            at += MIB / peer.rate
            if at < peer.dies:
                heapq.heappush(self.events, (at, next(counter), action.peer, action.number, chunk))
        peer.busy_until = at
        heapq.heappush(self.events, (at + 1e-6, next(counter), action.peer, action.number, -1))

    def arrive(self, sched: Scheduler, name: PeerId, number: int, chunk: int) -> None:
        if number not in self.running:
            return
        if chunk < 0:
            if self.now < self.peers[name].dies:
                del self.running[number]
                sched.ended(number)
            return
        self.received += 1
        sched.progressed(number, MIB, self.now)
        if self.peers[name].lies:
            cancels = sched.lied(number, "wrong")
            self.running.pop(number)
        elif sched.wants(chunk):
            cancels = sched.arrived(number, chunk, self.now)
        else:
            sched.skipped(number)
            cancels = []
        for cancel in cancels:
            self.running.pop(cancel.number, None)
            sched.ended(cancel.number)


def test_unequal_uplinks_are_all_used_to_the_end() -> None:
    rates = [1e6, 2e6, 4e6, 16e6]
    sim = Sim(256, {PEERS[n]: Peer(rate) for n, rate in enumerate(rates)})
    sched = sim.run()
    optimum = 256 * MIB / sum(rates)
    assert sim.now < 1.1 * optimum, f"{sim.now:.1f} s, {optimum:.1f} s at best"
    assert sim.received <= 256 + 6
    shares = [sched.holders[PEERS[n]].received / (256 * MIB) for n in range(4)]
    assert all(abs(share - rate / sum(rates)) < 0.05 for share, rate in zip(shares, rates, strict=True))


def test_a_slow_holder_does_not_keep_the_last_chunk_to_itself() -> None:
    sim = Sim(20, {PEERS[0]: Peer(10_000.0), PEERS[1]: Peer(5e6)})
    sim.run()
    # The slow one alone takes 105 s for the chunk it was given first.
    assert sim.now < 8.0


def test_a_holder_that_falls_silent_costs_no_more_than_a_pause() -> None:
    dead = {PEERS[0]: Peer(4e6, dies=1.0), PEERS[1]: Peer(4e6)}
    sim = Sim(64, dead)
    sim.run()
    assert sim.now < 1.25 * (64 * MIB / 4e6)


def test_a_liar_is_out_at_its_first_chunk() -> None:
    sim = Sim(64, {PEERS[0]: Peer(8e6, lies=True), PEERS[1]: Peer(4e6)})
    sched = sim.run()
    assert list(sched.liars) == [PEERS[0]]
    assert sim.received <= 64 + 1


def test_rare_chunks_are_asked_for_first() -> None:
    # Everybody has the first half; only one has the second.
    common = frozenset(range(32))
    sim = Sim(64, {PEERS[0]: Peer(4e6), **{PEERS[n]: Peer(4e6, common) for n in (1, 2, 3)}})
    sched = sim.run()
    assert sched.holders[PEERS[0]].received >= 32 * MIB
    # The one that everything hangs on gives only what nobody else has, or almost.
    assert sched.holders[PEERS[0]].received <= 38 * MIB


def test_a_small_blob_is_not_asked_of_everybody() -> None:
    sim = Sim(1, {peer: Peer(4e6) for peer in PEERS})
    sim.run()
    assert sim.asked == 1


def test_what_a_holder_turns_out_to_lack_is_asked_for_elsewhere() -> None:
    sched = Scheduler(lambda _: MIB, range(4))
    sched.add(PEERS[0], None, 0.1, 0.0)
    (ask,) = sched.poll(0.0)
    assert isinstance(ask, Ask)
    sched.lacks(ask.number, 0.1)
    sched.check()
    sched.add(PEERS[1], None, 0.1, 0.2)
    asked = {chunk for a in sched.poll(0.2) if isinstance(a, Ask) and a.peer == PEERS[1] for chunk in a.chunks}
    assert asked
    again = [a for a in sched.poll(1.0) if isinstance(a, Ask) and a.peer == PEERS[0]]
    assert all(chunk not in ask.chunks for a in again for chunk in a.chunks)
    for _ in range(defaults.MAX_STRIKES):
        (number,) = [a.number for a in sched.poll(100.0) if isinstance(a, Ask) and a.peer == PEERS[0]] or [0]
        if number:
            sched.failed(number, "busy", 0.0)
    sched.check()


HOLDERS = st.lists(
    st.tuples(
        st.sampled_from([1e5, 1e6, 5e6, 5e7]),
        st.one_of(st.none(), st.frozensets(st.integers(0, 23), max_size=24)),
        st.sampled_from([math.inf, math.inf, 0.5, 3.0]),
        st.booleans(),
    ),
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(holders=HOLDERS)
def test_it_gets_what_the_reference_gets_and_not_later(
    holders: list[tuple[float, frozenset[int] | None, float, bool]],
) -> None:
    # One honest holder of everything, so that both come to an end.
    peers = {PEERS[7]: Peer(1e6)}
    peers |= {PEERS[n]: Peer(rate, has, dies=dies, lies=lies) for n, (rate, has, dies, lies) in enumerate(holders)}
    sim = Sim(24, peers)
    sched = sim.run()
    assert sched.done
    assert set(sched.liars) <= {name for name, peer in peers.items() if peer.lies}
    honest = {name: peer for name, peer in peers.items() if not peer.lies and peer.dies == math.inf}
    plain = reference_time(24, honest)
    # The reference knows nothing of the dead and of liars; beside it there is a pause for each of them.
    pauses = 5.0 * (len(peers) - len(honest))
    assert sim.now <= 1.1 * plain + 2.0 + pauses, f"{sim.now:.1f} s; the reference {plain:.1f} s"


def reference_time(count: int, peers: dict[PeerId, Peer]) -> float:
    """Seconds that :mod:`reference` takes among honest holders that live."""
    has = {name: sorted(range(count) if peer.chunks is None else peer.chunks) for name, peer in peers.items()}
    wanted, done, now = list(range(count)), 0, 0.0
    flying: list[tuple[float, PeerId]] = []
    idle = list(peers)
    while done < count:
        for name, chunk in reference.assign(wanted, has, idle).items():
            wanted.remove(chunk)
            idle.remove(name)
            heapq.heappush(flying, (now + peers[name].rtt + MIB / peers[name].rate, name))
        now, name = heapq.heappop(flying)
        idle.append(name)
        done += 1
    return now


class Machine(RuleBasedStateMachine):
    """Holders come, learn, lie, fail and go in any order; whatever is open stays within reach."""

    def __init__(self) -> None:
        super().__init__()
        self.size, self.now = 12, 0.0
        self.sched = Scheduler(lambda chunk: 1000 + chunk, range(self.size))
        self.has: dict[PeerId, Bits | None] = {}
        self.asks: dict[int, Ask] = {}
        self.got: set[int] = set()

    def take(self, cancels: list[Cancel]) -> None:
        for cancel in cancels:
            self.asks.pop(cancel.number, None)
            self.sched.ended(cancel.number)

    @rule(peer=st.sampled_from(PEERS[:4]), chunks=st.one_of(st.none(), st.sets(st.integers(0, 11))))
    def comes_or_learns(self, peer: PeerId, chunks: set[int] | None) -> None:
        held = None if chunks is None else bits(self.size, chunks)
        self.sched.add(peer, held, 0.1, self.now)
        if peer not in self.sched.liars:
            self.has[peer] = None if held is None else held.copy()

    @rule(seconds=st.sampled_from([0.0, 0.01, 0.5, 5.0, 100.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        for action in self.sched.poll(self.now):
            if isinstance(action, Cancel):
                self.take([action])
                continue
            held = self.has[action.peer]
            assert action.peer in self.sched.holders
            assert len(set(action.chunks)) == len(action.chunks)
            assert not set(action.chunks) & self.got
            assert held is None or all(chunk in held for chunk in action.chunks)
            self.asks[action.number] = action
        # It has said what it had to say.
        assert not [a for a in self.sched.poll(self.now) if isinstance(a, Cancel)]
        assert self.sched.due(self.now) >= 0

    def choose(self, index: int) -> Ask:
        return self.asks[sorted(self.asks)[index % len(self.asks)]]

    @precondition(lambda self: self.asks)
    @rule(index=st.integers(0, 9), which=st.integers(0, 9))
    def a_chunk_arrives(self, index: int, which: int) -> None:
        ask = self.choose(index)
        chunk = ask.chunks[which % len(ask.chunks)]
        self.sched.progressed(ask.number, 1000 + chunk, self.now)
        self.take(self.sched.arrived(ask.number, chunk, self.now))
        self.got.add(chunk)
        assert not self.sched.wants(chunk)
        if ask.number in self.asks and not self.sched.needs(ask.number):
            del self.asks[ask.number]
            self.sched.ended(ask.number)

    @precondition(lambda self: self.asks)
    @rule(index=st.integers(0, 9), how=st.sampled_from(["lied", "failed", "gone", "lacks", "ended", "progress"]))
    def a_request_goes_wrong(self, index: int, how: str) -> None:
        ask = self.choose(index)
        if how == "progress":
            self.sched.progressed(ask.number, 10, self.now)
            return
        del self.asks[ask.number]
        match how:
            case "lied":
                self.take(self.sched.lied(ask.number, "wrong"))
                assert ask.peer not in self.sched.holders
                assert not [a for a in self.asks.values() if a.peer == ask.peer]
            case "failed":
                self.take(self.sched.failed(ask.number, "why", self.now))
            case "gone":
                self.take(self.sched.failed(ask.number, "gone", self.now, lasting=True))
                assert ask.peer not in self.sched.holders
            case "lacks":
                held = self.has[ask.peer] or Bits.full(self.size)
                held.discard(next(chunk for chunk in ask.chunks if chunk not in self.got))
                self.has[ask.peer] = held
                self.take(self.sched.lacks(ask.number, self.now))
            case _:
                self.sched.ended(ask.number)

    @invariant()
    def it_is_consistent(self) -> None:
        self.sched.check()
        assert self.sched.left == self.size - len(self.got)
        assert self.sched.done == (len(self.got) == self.size)

    def teardown(self) -> None:
        """Whatever came before: one honest holder of everything is enough."""
        honest = PEERS[7]
        self.sched.add(honest, None, 0.1, self.now)
        self.has[honest] = None
        for _ in range(200):
            if self.sched.done:
                return
            self.now += 1.0
            self.time_passes(0.0)
            for number, ask in list(self.asks.items()):
                if ask.peer == honest:
                    for chunk in ask.chunks:
                        self.sched.progressed(number, 1000, self.now)
                        self.take(self.sched.arrived(number, chunk, self.now))
                        self.got.add(chunk)
                    self.asks.pop(number, None)
                    self.sched.ended(number)
        assert self.sched.done, f"{self.sched.left} left"


Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_any_history_leaves_it_consistent_and_able_to_end = Machine.TestCase


def test_one_download_takes_the_same_decisions_every_time() -> None:
    def run() -> list[float]:
        rng = random.Random(3)
        peers = {peer: Peer(rng.choice([1e6, 3e6]), frozenset(rng.sample(range(40), 30))) for peer in PEERS[:5]}
        peers[PEERS[7]] = Peer(1e6)
        sim = Sim(40, peers)
        sim.run()
        return [sim.now, float(sim.asked), float(sim.received)]

    assert run() == run()
