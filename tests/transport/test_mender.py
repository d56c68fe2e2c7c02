"""Links that outlive their pipes, and links that become better, in a network with NATs."""

from __future__ import annotations

import attrs
import pytest
import trio

from shoal.transport.address import Address
from shoal.transport.endpoint import Endpoint
from shoal.transport.errors import LinkClosed, PeerUnreachable
from shoal.transport.link import Link
from shoal.transport.mender import is_gone
from shoal.transport.pipehello import UNKNOWN_SESSION, PipeRefused
from shoal.transport.planner import Reach, Step
from shoal.transport.rpc import Call, Method
from shoal.transport.traversal import Traversal

from .harness import Nodes, Virtual, nodes


@attrs.frozen
class Text:
    text: str


ECHO = Method("echo", Text, Text)
WAIT = Method("wait", Text, Text)


async def echo(call: Call[Text]) -> Text:
    return call.request


async def wait(call: Call[Text]) -> Text:
    await trio.sleep(float(call.request.text))
    return call.request


async def settled(*endpoints: Endpoint) -> None:
    """Until all of them know whether they can be dialled, and have reservations if they cannot."""
    with trio.fail_after(60):
        while not all(e.traversal and (e.traversal.relays or e.traversal.relay.active) for e in endpoints):
            await trio.sleep(0.1)


async def node(n: Nodes, name: str, kind: str = "none", **options: object) -> Endpoint:
    endpoint = await n.add(name, traversal=Traversal(**options))  # type: ignore[arg-type]
    assert isinstance(n.world, Virtual)
    if kind != "none":
        n.world.memory.set_nat(name, kind)  # type: ignore[arg-type]
    endpoint.serve(ECHO, echo)
    endpoint.serve(WAIT, wait)
    return endpoint


def reach(endpoint: Endpoint) -> Reach:
    assert endpoint.traversal is not None
    return endpoint.traversal.reach().state


async def test_a_reachable_peer_has_one_behind_nat_dial_it() -> None:
    async with nodes(Virtual()) as n:
        relay = await node(n, "relay", relay=True)
        open_one = await node(n, "open")
        hidden = await node(n, "hidden", "symmetric")
        for endpoint in (open_one, hidden):
            await endpoint.connect(relay.peer_id, relay.addresses())
        await settled(relay, open_one, hidden)
        assert (reach(open_one), reach(hidden)) == (Reach.REACHABLE, Reach.UNREACHABLE)
        open_one.learn(hidden.record())
        began = trio.current_time()
        link = await open_one.connect(hidden.peer_id)
        assert trio.current_time() - began < 0.5
        assert (link.way, link.initiator) == ("reversal", False)
        assert await open_one.call(hidden.peer_id, ECHO, Text("hi")) == Text("hi")
        back = hidden.link(open_one.peer_id)
        assert back is not None
        assert back.way == "reversal"
        assert [c.reason for c in hidden.connections() if c.peer == open_one.peer_id] == ["it asked us to dial it"]


async def test_a_relayed_link_becomes_a_direct_one_and_its_calls_notice_nothing() -> None:
    async with nodes(Virtual()) as n:
        assert isinstance(n.world, Virtual)
        relay = await node(n, "relay", relay=True)
        a = await node(n, "a", "symmetric", ways=("direct", "relay"))
        b = await node(n, "b", "symmetric", ways=("direct", "relay"))
        for endpoint in (a, b):
            await endpoint.connect(relay.peer_id, relay.addresses())
        await settled(relay, a, b)
        a.learn(b.record())
        link = await a.connect(b.peer_id)
        assert link.way == "relay"
        answers: list[Text] = []

        async def ask() -> None:
            answers.append(await a.call(b.peer_id, WAIT, Text("20")))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await trio.sleep(2)
            # the router in front of b is taken away: its published address can be dialled from now on
            n.world.memory.nats.place("b", "none", "b", resets=False)
            with trio.fail_after(15):
                while link.way != "direct":
                    await trio.sleep(0.1)
            assert a.link(b.peer_id) is link
        assert answers == [Text("20")]
        assert [c.way for c in b.connections() if c.peer == a.peer_id] == ["direct"]
        assert relay.traversal is not None
        with trio.fail_after(10):
            while relay.traversal.relay.circuits:
                await trio.sleep(0.1)
        # and the relay is no longer needed
        n.world.memory.kill("relay")
        assert await a.call(b.peer_id, ECHO, Text("hi")) == Text("hi")
        assert link.alive


async def test_a_link_whose_address_changes_goes_on() -> None:
    async with nodes(Virtual()) as n:
        assert isinstance(n.world, Virtual)
        a, b = await node(n, "a"), await node(n, "b")
        link = await a.connect(b.peer_id, b.addresses())
        await a.call(b.peer_id, ECHO, Text("hi"))
        answers: list[Text] = []

        async def ask(one: Endpoint, other: Endpoint) -> None:
            answers.append(await one.call(other.peer_id, WAIT, Text("10")))

        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, a, b)
            nursery.start_soon(ask, b, a)
            await trio.sleep(1)
            n.world.memory.readdress("a", "elsewhere")
        assert answers == [Text("10")] * 2
        assert trio.current_time() - began < 15
        assert a.link(b.peer_id) is link
        assert link.pipes_lost <= 1
        elsewhere = Address("mem", "elsewhere", 1)
        with trio.fail_after(20):
            while (record := b.contact(a.peer_id)) is None or elsewhere not in record.open(b.host.wall()).addresses:
                await trio.sleep(0.5)


async def test_a_process_that_was_killed_is_found_at_once_by_both_roles() -> None:
    for dials in (True, False):
        async with nodes(Virtual()) as n:
            assert isinstance(n.world, Virtual)
            a, b = await node(n, "a"), await node(n, "b")
            one, other = (a, b) if dials else (b, a)
            await one.connect(other.peer_id, other.addresses())
            await a.call(b.peer_id, ECHO, Text("hi"))
            await b.call(a.peer_id, ECHO, Text("hi"))
            lost: list[Link] = []
            a.on_link_lost.append(lost.append)
            began = trio.current_time()
            n.world.memory.kill("b")
            with pytest.raises((LinkClosed, PeerUnreachable)):
                await a.call(b.peer_id, WAIT, Text("100"))
            assert trio.current_time() - began < 0.5
            assert lost


ME, OTHER_PORT = Address.parse("198.51.100.7:4001"), Address.parse("198.51.100.7:40000")
HERE, HERE_TOO = Address.parse("127.0.0.1:40000"), Address.parse("127.0.0.1:4001")


def refused(address: Address) -> PeerUnreachable:
    return PeerUnreachable("x", attempts=((str(address), "connection refused (nobody listens there)"),))


@pytest.mark.parametrize(
    ("last", "dialled", "address", "relays", "error", "gone"),
    [
        (OTHER_PORT, False, ME, False, refused(ME), True),
        (OTHER_PORT, False, ME, True, refused(ME), False),  # its NAT may have said so
        (ME, True, ME, True, refused(ME), True),  # it did listen there
        (HERE, False, HERE_TOO, True, refused(HERE_TOO), True),  # no NAT on this machine
        (ME, False, Address.parse("192.168.1.7:4001"), False, refused(ME), False),  # another machine's address here
        (OTHER_PORT, False, ME, False, PipeRefused("x", code=UNKNOWN_SESSION), True),
        (OTHER_PORT, False, ME, True, PipeRefused("x", code=UNKNOWN_SESSION), True),
        (ME, True, ME, False, PeerUnreachable("x", attempts=((str(ME), "timed out"),)), False),
    ],
)
def test_what_shows_that_a_process_has_ended(
    last: Address, dialled: bool, address: Address, relays: bool, error: Exception, gone: bool
) -> None:
    step = Step("direct", 0.0, "why", address=address)
    decision, reason = is_gone(last, dialled, relays, step, error)
    assert decision is gone
    assert reason


@pytest.mark.parametrize("relayed_first", [False, True])
async def test_two_peers_behind_cone_nats_punch_through(relayed_first: bool) -> None:
    ways = ("direct", "relay") if relayed_first else Traversal().ways
    async with nodes(Virtual()) as n:
        relay = await node(n, "relay", relay=True)
        a, b = await node(n, "a", "cone"), await node(n, "b", "cone")
        for endpoint in (a, b):
            await endpoint.connect(relay.peer_id, relay.addresses())
        await settled(relay, a, b)
        assert a.traversal is not None
        everything, a.traversal.options = a.traversal.options, attrs.evolve(a.traversal.options, ways=ways)
        a.learn(b.record())
        began = trio.current_time()
        link = await a.connect(b.peer_id)
        assert trio.current_time() - began < 0.8
        assert (link.way == "relay") is relayed_first or not relayed_first
        a.traversal.options = everything
        with trio.fail_after(10):
            while link.way != "punch":
                await trio.sleep(0.1)
        assert await a.call(b.peer_id, ECHO, Text("hi")) == Text("hi")
        back = b.link(a.peer_id)
        assert back is not None
        assert back.way == "punch"


async def test_a_punched_link_survives_another_address_of_the_router() -> None:
    async with nodes(Virtual()) as n:
        assert isinstance(n.world, Virtual)
        relay = await node(n, "relay", relay=True)
        a, b = await node(n, "a", "cone"), await node(n, "b", "cone")
        for endpoint in (a, b):
            await endpoint.connect(relay.peer_id, relay.addresses())
        await settled(relay, a, b)
        a.learn(b.record())
        link = await a.connect(b.peer_id)
        with trio.fail_after(10):
            while link.way != "punch":
                await trio.sleep(0.1)
        n.world.memory.readdress("a", "elsewhere")
        began = trio.current_time()
        for _ in range(100):
            assert await a.call(b.peer_id, ECHO, Text("hi"), timeout=20) == Text("hi")
            await trio.sleep(0.2)
        assert trio.current_time() - began < 35
        assert a.link(b.peer_id) is link
        with trio.fail_after(300):
            while link.way != "punch":
                await trio.sleep(0.1)
