"""Whether strangers can dial us: the verdict from evidence, dial-backs and their limits, what nodes do about it."""

from __future__ import annotations

import pytest
import trio

from shoal.transport import defaults
from shoal.transport.address import Address
from shoal.transport.dialback import DIAL_BACK, DIAL_FOR, DialBack, DialFor, Dialled, no_proof, permitted
from shoal.transport.endpoint import Endpoint
from shoal.transport.errors import RemoteRefused
from shoal.transport.identity import Identity
from shoal.transport.planner import Reach
from shoal.transport.reachability import Observation, Trial, candidates, judge
from shoal.transport.reservations import one_version_only
from shoal.transport.traversal import Traversal

from .harness import Real, Virtual, World, nodes

A, B, C = (Identity(bytes([n]) * 32).peer_id for n in (1, 2, 3))


def at(text: str) -> Address:
    return Address.parse(text)


OWN = at("192.168.1.7:4001")
OWN6 = at("[2001:db8::7]:4001")
OUTER = at("198.51.100.7:4001")
LIE = at("203.0.113.66:4001")
LATE = 1e5


def seen(address: Address, *, incoming: bool = False, peer: object = A) -> Observation:
    return Observation(peer, address, incoming, LATE)  # type: ignore[arg-type]


def trial(address: Address, outcome: str, *, ago: float = 1.0, reason: str = "timed out") -> Trial:
    return Trial(Dialled(address, outcome, B, reason), A, LATE - ago)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("own", "mapped", "observations", "trials", "state", "words"),
    [
        ((), (), (), (), Reach.UNREACHABLE, "does not listen"),
        ((OWN,), (), (), (), Reach.UNKNOWN, "nobody has tried"),
        # a neighbour has dialled us, and nobody sees a NAT
        ((OWN,), (), (seen(OWN, incoming=True),), (), Reach.REACHABLE, "has dialled us"),
        # the same, but somebody outside sees another address than ours: the neighbour proves nothing
        ((OWN,), (), (seen(OWN, incoming=True), seen(OUTER)), (), Reach.UNKNOWN, "there is a NAT"),
        # ... and then strangers fail
        (
            (OWN,),
            (),
            (seen(OWN, incoming=True), seen(OUTER)),
            (trial(OUTER, "failed"), trial(OWN, "reached")),
            Reach.UNREACHABLE,
            "behind a NAT",
        ),
        # ... or the port is forwarded
        ((OWN,), (), (seen(OUTER),), (trial(OUTER, "reached"),), Reach.REACHABLE, "could dial"),
        ((OWN,), (), (seen(OUTER, incoming=True),), (), Reach.REACHABLE, "has dialled us"),
        ((OWN,), (OUTER,), (seen(OUTER),), (trial(OUTER, "reached"),), Reach.REACHABLE, "could dial"),
        # a NAT of IPv4 says nothing of IPv6
        ((OWN, OWN6), (), (seen(OUTER), seen(OWN6, incoming=True)), (), Reach.REACHABLE, "has dialled us"),
        # one who claims to see a NAT is no majority
        ((OUTER,), (), (seen(OUTER, incoming=True), seen(LIE)), (), Reach.REACHABLE, "has dialled us"),
        ((OUTER,), (), (seen(OUTER, incoming=True), seen(LIE), seen(LIE)), (), Reach.UNKNOWN, "there is a NAT"),
        # a firewall without a NAT
        ((OUTER,), (), (seen(OUTER),), (trial(OUTER, "failed"),), Reach.UNREACHABLE, "timed out"),
        # newer evidence counts
        ((OUTER,), (), (), (trial(OUTER, "reached", ago=50), trial(OUTER, "failed")), Reach.UNREACHABLE, "timed"),
        ((OUTER,), (), (), (trial(OUTER, "failed", ago=50), trial(OUTER, "reached")), Reach.REACHABLE, "could dial"),
        # old evidence does not
        ((OUTER,), (), (), (trial(OUTER, "failed", ago=defaults.UNREACH_LIFETIME),), Reach.UNKNOWN, "nobody"),
        ((OUTER,), (), (), (trial(OUTER, "reached", ago=defaults.REACH_LIFETIME),), Reach.UNKNOWN, "nobody"),
        ((OUTER,), (), (), (trial(OUTER, "not_tried"),), Reach.UNKNOWN, "nobody"),
        # one of two addresses is enough
        ((OWN6, OUTER), (), (), (trial(OUTER, "failed"), trial(OWN6, "reached")), Reach.REACHABLE, "could dial"),
    ],
)
def test_the_verdict_follows_the_evidence(
    own: tuple[Address, ...],
    mapped: tuple[Address, ...],
    observations: tuple[Observation, ...],
    trials: tuple[Trial, ...],
    state: Reach,
    words: str,
) -> None:
    verdict = judge(own, mapped, observations, trials, LATE)
    assert verdict.state is state
    assert words in verdict.reason
    assert bool(verdict.confirmed) is (state is Reach.REACHABLE)


@pytest.mark.parametrize(
    ("address", "seen_at", "allowed"),
    [
        ("198.51.100.7:80", "198.51.100.7:50000", True),
        ("198.51.100.8:80", "198.51.100.7:50000", False),
        ("192.168.1.7:80", "198.51.100.7:50000", False),  # our own network is none of its business
        ("192.168.1.7:80", "192.168.1.9:50000", True),
        ("10.0.0.1:80", "127.0.0.1:50000", True),
        ("127.0.0.1:80", "127.0.0.1:50000", True),
        ("127.0.0.1:80", "192.168.1.9:50000", False),  # what listens on our own machine is none of its business
        ("[::1]:80", "192.168.1.9:50000", False),
        ("198.51.100.7:80", "192.168.1.9:50000", False),
        ("198.51.100.7:0", "198.51.100.7:50000", False),
        ("mem://a:1", "mem://a:50000", True),
        ("mem://b:1", "mem://a:50000", False),
        ("mem://a:1", "127.0.0.1:1", False),
    ],
)
def test_who_asks_has_only_its_own_addresses_dialled(address: str, seen_at: str, allowed: bool) -> None:
    assert permitted(at(address), at(seen_at)) is allowed


def test_a_peer_is_asked_for_what_it_can_know() -> None:
    own = (OWN, OWN6, at("127.0.0.1:4001"))
    assert candidates(own, (), at("198.51.100.7:50000")) == [OUTER]
    assert candidates(own, (), at("192.168.1.7:50000")) == [OWN]
    assert candidates(own, (at("198.51.100.7:9"),), at("198.51.100.7:50000")) == [at("198.51.100.7:9"), OUTER]
    assert candidates(own[2:], (), at("127.0.0.1:50000")) == [own[2]]


@pytest.mark.parametrize(
    ("own", "address", "proves"),
    [
        ((OUTER,), OUTER, True),
        ((OUTER,), OWN6, False),
        ((OWN6, at("127.0.0.1:4001")), OUTER, False),
        ((OWN6, OUTER), OWN6, True),
        # a node on loopback alone may dial out all the same; and who listens nowhere, too
        ((at("127.0.0.1:4001"),), OWN6, True),
        ((), OUTER, True),
    ],
)
def test_who_lacks_an_ip_version_proves_nothing_of_it(own: tuple[Address, ...], address: Address, proves: bool) -> None:
    assert (no_proof(own, address) == "") is proves


def test_who_is_public_by_one_ip_version_alone_needs_a_relay_for_the_others() -> None:
    public6 = at("[2a00:30::7]:4001")
    assert one_version_only((OUTER, OWN)) and one_version_only((public6,))
    assert not one_version_only((OUTER, public6))
    assert not one_version_only((OWN,)) and not one_version_only((at("mem://n7:1"),)), "nobody is public there"


def reach(endpoint: Endpoint) -> Reach:
    assert endpoint.traversal is not None
    return endpoint.traversal.reach().state


async def until(endpoint: Endpoint, state: Reach, seconds: float = 30.0) -> str:
    """Until that is its verdict; the reason."""
    assert endpoint.traversal is not None
    with trio.fail_after(seconds):
        while reach(endpoint) is not state:
            await trio.sleep(0.05)
    return endpoint.traversal.reachability.verdict.reason


class Worlds:
    def world(self) -> World:
        raise NotImplementedError

    async def test_who_is_dialled_knows_it_at_once_and_who_dials_has_himself_dialled(self) -> None:
        async with nodes(self.world()) as n:
            a, b, c = [await n.add(name, traversal=Traversal(ways=("direct",))) for name in "abc"]
            await c.connect(a.peer_id, a.addresses())
            await b.connect(a.peer_id, a.addresses())
            assert b.peer_id.short in await until(a, Reach.REACHABLE) or reach(a) is Reach.REACHABLE
            # by c, whom a has asked (in one process of real sockets all come from one address: a dials itself)
            reason = await until(b, Reach.REACHABLE)
            assert "could dial" in reason
            if isinstance(n.world, Virtual):
                assert c.peer_id.short in reason
            assert b.link(c.peer_id) is None
            assert b.traversal is not None
            assert "relay" in b.record().open(b.host.wall()).services
            with trio.fail_after(5):
                while a.contact(b.peer_id) != b.record():
                    await trio.sleep(0.05)

    async def test_who_does_not_listen_is_reached_through_a_relay_or_by_its_own_dialling(self) -> None:
        async with nodes(self.world()) as n:
            relay = await n.add("relay", traversal=Traversal(relay=True))
            one, other = [await n.add(f"n{i}", listen=False, traversal=Traversal()) for i in range(2)]
            open_one = await n.add("open", traversal=Traversal())
            for endpoint in (one, other, open_one):
                await endpoint.connect(relay.peer_id, relay.addresses())
            await until(open_one, Reach.REACHABLE)
            with trio.fail_after(20):
                while not all(e.traversal and e.traversal.relays for e in (one, other)):
                    await trio.sleep(0.05)
            one.learn(other.record())
            link = await one.connect(other.peer_id)
            assert link.way == "relay"
            open_one.learn(one.record())
            link = await open_one.connect(one.peer_id)
            assert (link.way, link.initiator) == ("reversal", False)


class TestVirtual(Worlds):
    def world(self) -> World:
        return Virtual()


@pytest.mark.real
class TestReal(Worlds):
    def world(self) -> World:
        return Real()


@pytest.mark.parametrize("kind", ["cone", "symmetric", "blocked"])
async def test_nats_and_firewalls_are_recognized(kind: str) -> None:
    world = Virtual()
    async with nodes(world) as n:
        a, c = [await n.add(name, traversal=Traversal(ways=("direct",))) for name in "ac"]
        b = await n.add("b", traversal=Traversal(ways=("direct",)))
        world.memory.set_nat("b", kind)  # type: ignore[arg-type]
        for endpoint in (b, c):
            await endpoint.connect(a.peer_id, a.addresses())
        reason = await until(b, Reach.UNREACHABLE)
        assert "timed out" in reason or "no answer" in reason
        assert ("NAT" in reason) is (kind != "blocked")
        # nobody is told to dial b where it cannot be dialled
        assert b.addresses() == b.own_addresses()
        # and when the router is gone, that is found out too
        world.memory.set_nat("b", "none")
        await b.connect(c.peer_id, c.addresses())
        await until(b, Reach.REACHABLE, 2 * defaults.UNREACH_LIFETIME)


async def test_dial_back_is_no_tool_against_others() -> None:
    world = Virtual()
    dials: list[tuple[str, str]] = []
    async with nodes(world) as n:
        a, b, c = [await n.add(name, traversal=Traversal(dial_back=False)) for name in "abc"]
        victim = await n.add("victim")
        await b.connect(a.peer_id, a.addresses())
        await c.connect(a.peer_id, a.addresses())
        world.memory.trace = lambda time, what, source, target, size: (
            dials.append((source, target)) if what == "dial" else None
        )
        answer = await b.call(a.peer_id, DIAL_BACK, DialBack(victim.addresses()))
        assert [d.outcome for d in answer.dialled] == ["not_tried"]
        with pytest.raises(RemoteRefused):
            await b.call(a.peer_id, DIAL_BACK, DialBack(b.addresses() * 5))
        assert not dials
        # as often as one likes is not
        refused = 0
        for _ in range(40):
            try:
                await b.call(a.peer_id, DIAL_BACK, DialBack(b.addresses()))
            except RemoteRefused as error:
                assert error.code == "rate"
                refused += 1
        assert refused >= 40 - defaults.DIAL_BACK_BURST - 1
        # who lies to a third peer about a victim gets one connection for each of few calls
        dials.clear()
        refused = 0
        for _ in range(40):
            try:
                answer = await b.call(a.peer_id, DIAL_FOR, DialFor(c.peer_id, victim.addresses()))
                assert [d.outcome for d in answer.dialled] == ["failed"]
            except RemoteRefused:
                refused += 1
        assert len(dials) <= defaults.DIAL_BACK_BURST + 1
        assert refused >= 40 - len(dials)


async def test_a_port_that_the_router_forwards_is_tried_and_published() -> None:
    world = Virtual()
    async with nodes(world) as n:
        a, b, c = [await n.add(name, traversal=Traversal(ways=("direct",))) for name in "abc"]
        for endpoint in (b, c):
            await endpoint.connect(a.peer_id, a.addresses())
        await until(b, Reach.REACHABLE)
        assert b.traversal is not None
        mapped = Address("mem", "router", 7)
        b.traversal.reachability.map([mapped])
        assert mapped in b.addresses()
        b.traversal.reachability.map([])
        assert mapped not in b.addresses()


async def test_nodes_without_traversal_say_and_ask_nothing() -> None:
    world = Virtual()
    async with nodes(world) as n:
        a, b = await n.add("a"), await n.add("b")
        await a.connect(b.peer_id, b.addresses())
        before = world.memory.traffic()
        await trio.sleep(4)
        assert world.memory.traffic() == before
        assert a.traversal is None


def test_everybody_is_asked_at_most_a_bounded_number_of_addresses() -> None:
    own = tuple(at(f"192.168.1.{i}:4001") for i in range(1, 30))
    assert len(candidates(own, (), own[0])) == defaults.MAX_DIAL_BACK


async def test_an_address_that_one_peer_claims_is_not_published() -> None:
    async with nodes(Virtual()) as n:
        a, b, c = [await n.add(name, traversal=Traversal(ways=("direct",), dial_back=False)) for name in "abc"]
        for endpoint in (b, c):
            await endpoint.connect(a.peer_id, a.addresses())
        victim = Address("mem", "victim", 1)
        liar = a.link(b.peer_id)
        assert liar is not None
        liar.observed = victim
        await trio.sleep(3 * defaults.REACH_POLL)
        assert reach(a) is Reach.REACHABLE
        assert victim not in a.addresses()
