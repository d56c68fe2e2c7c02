"""A node on the network: connecting, contacts, the LRU of links, bad clients, lost peers, goodbye."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import attrs
import pytest
import trio
import trio.testing

from shoal.transport import defaults
from shoal.transport.address import Address, SignedPeerRecord
from shoal.transport.contacts import Contacts
from shoal.transport.endpoint import HELLO, Endpoint, Hello
from shoal.transport.errors import (
    ConfigError,
    DecodeError,
    LinkClosed,
    PeerUnreachable,
    ProtocolMisuse,
    RemoteRefused,
    WaitExpired,
)
from shoal.transport.identity import Identity, PeerId
from shoal.transport.link import Link, Priority
from shoal.transport.memory import Route
from shoal.transport.rpc import Call, Method

from .harness import Nodes, Real, Virtual, World, nodes


@attrs.frozen
class Text:
    text: str


ECHO = Method("echo", Text, Text)
DOWNLOAD = Method("download", Text, Text, Priority.BULK)


async def echo(call: Call[Text]) -> Text:
    return call.request


async def two(n: Nodes) -> tuple[Endpoint, Endpoint]:
    a, b = await n.add("a"), await n.add("b")
    for endpoint in (a, b):
        endpoint.serve(ECHO, echo)
    return a, b


class Worlds:
    """The same behaviour in virtual time and over TCP."""

    def world(self) -> World:
        raise NotImplementedError

    async def test_a_call_connects_by_the_contact_and_both_sides_learn_each_other(self) -> None:
        async with nodes(self.world()) as n:
            a, b = await two(n)
            a.learn(b.record())
            assert a.link(b.peer_id) is None
            assert await a.call(b.peer_id, ECHO, Text("hi")) == Text("hi")
            link = a.link(b.peer_id)
            assert link is not None
            assert a.links() == [link]
            assert b.contact(a.peer_id) == a.record()
            assert link.observed is not None
            # and back over the same link
            assert await b.call(a.peer_id, ECHO, Text("back")) == Text("back")
            assert len(b.links()) == 1
            assert not a.counters
            assert not b.counters

    async def test_identify_finds_out_who_is_at_an_address(self) -> None:
        async with nodes(self.world()) as n:
            a, b = await two(n)
            link = await a.identify(b.addresses()[0])
            assert link.peer == b.peer_id
            assert a.contact(b.peer_id) == b.record()

    async def test_another_peer_at_the_address_is_named(self) -> None:
        async with nodes(self.world()) as n:
            a, b = await two(n)
            other = Identity(b"x" * 32).peer_id
            with pytest.raises(PeerUnreachable) as caught:
                await a.connect(other, b.addresses())
            assert other.short in str(caught.value)
            assert f"{b.peer_id.short} answered" in caught.value.attempts[0][1]
            assert caught.value.attempts[0][0] == str(b.addresses()[0])

    async def test_a_node_does_not_connect_to_itself(self) -> None:
        async with nodes(self.world()) as n:
            a = await n.add("a")
            with pytest.raises(ProtocolMisuse):
                await a.call(a.peer_id, ECHO, Text("?"))
            with pytest.raises(PeerUnreachable, match="ourselves|itself"):
                await a.identify(a.addresses()[0])

    async def test_an_address_where_nobody_listens_is_reported_with_its_reason(self) -> None:
        async with nodes(self.world()) as n:
            a, b = await two(n)
            address = b.addresses()[0]
            await n.stop("b")
            with pytest.raises(PeerUnreachable) as caught:
                await a.connect(b.peer_id, [address])
            assert caught.value.attempts[0][0] == str(address)
            assert "refused" in caught.value.attempts[0][1]
            with pytest.raises(PeerUnreachable, match="no address of it is known"):
                await a.connect(b.peer_id)

    async def test_both_dial_at_once_and_no_call_is_lost(self) -> None:
        async with nodes(self.world()) as n:
            a, b = await two(n)
            a.learn(b.record())
            b.learn(a.record())
            answers: list[Text] = []

            async def ask(one: Endpoint, other: PeerId, text: str) -> None:
                answers.append(await one.call(other, ECHO, Text(text)))

            async with trio.open_nursery() as nursery:
                for i in range(20):
                    nursery.start_soon(ask, a, b.peer_id, f"a{i}")
                    nursery.start_soon(ask, b, a.peer_id, f"b{i}")
            assert len(answers) == 40
            assert 1 <= len(a.links()) <= 2
            for _ in range(10):
                await a.call(b.peer_id, ECHO, Text("x"))
                await b.call(a.peer_id, ECHO, Text("x"))
            # both sides mean the same link, the one that the smaller PeerId dialled
            mine, theirs = a.link(b.peer_id), b.link(a.peer_id)
            assert mine is not None
            assert theirs is not None
            assert mine.exporter == theirs.exporter

    async def test_concurrent_callers_share_one_attempt_and_one_may_give_up(self) -> None:
        async with nodes(self.world()) as n:
            a, b = await two(n)
            links: list[Link] = []

            async def connect() -> None:
                links.append(await a.connect(b.peer_id, b.addresses()))

            async with trio.open_nursery() as nursery:
                impatient = trio.CancelScope()

                async def give_up() -> None:
                    with impatient:
                        await connect()

                nursery.start_soon(give_up)
                for _ in range(5):
                    nursery.start_soon(connect)
                await trio.lowlevel.checkpoint()
                impatient.cancel()
            assert len(links) == 5
            assert all(link is links[0] for link in links)
            assert len(b.links()) == 1

    async def test_goodbye_takes_less_than_a_second_and_reaches_the_others(self) -> None:
        async with nodes(self.world()) as n:
            a, b = await two(n)
            lost: list[Link] = []
            a.on_link_lost.append(lost.append)
            link = await a.connect(b.peer_id, b.addresses())
            with trio.fail_after(1):
                await n.stop("b")
            await link.closed.wait()
            assert isinstance(link.close_reason, LinkClosed)
            assert link.close_reason.goodbye
            assert "the node stops" in str(link.close_reason)
            assert a.links() == []
            await trio.sleep(0.01)
            assert lost == [link]

    async def test_a_private_swarm_refuses_strangers(self) -> None:
        async with nodes(self.world()) as n:
            a = await n.add("a", psk=b"k" * 32)
            b = await n.add("b")
            c = await n.add("c", psk=b"other" + bytes(27))
            for stranger in (b, c):
                with pytest.raises(PeerUnreachable):
                    await stranger.connect(a.peer_id, a.addresses())
            assert a.links() == []

    async def test_a_garbage_client_is_counted_and_others_are_served(self) -> None:
        async with nodes(self.world()) as n:
            a, b = await two(n)
            for garbage in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 5000, b"\xf5shoal\r\n\x00\x63" + bytes(50)):
                stream = await a.host.network.dial(b.addresses()[0])
                await stream.send_all(garbage)
                with trio.move_on_after(2):
                    try:
                        while await stream.receive_some():
                            pass
                    except trio.BrokenResourceError:
                        pass
                await stream.aclose()
            while b.counters.get("handshakes_refused", 0) < 3:  # a client may see the end before it is counted
                await trio.sleep(0.01)
            await a.connect(b.peer_id, b.addresses())
            assert await a.call(b.peer_id, ECHO, Text("hi")) == Text("hi")

    async def test_a_download_and_an_upload_through_the_endpoint(self) -> None:
        async def download(call: Call[Text]) -> Text:
            got = bytearray(call.body_left)
            await call.read_into(memoryview(got))
            await call.write(b"data" * 250_000)
            return Text(str(len(got)))

        async with nodes(self.world()) as n:
            a, b = await two(n)
            b.serve(DOWNLOAD, download)
            a.learn(b.record())
            async with a.stream(b.peer_id, DOWNLOAD, Text("")) as reply:
                buffer = bytearray(1_000_000)
                await reply.read_into(memoryview(buffer))
                assert await reply.result() == Text("0")
            assert buffer == b"data" * 250_000
            with pytest.raises(RemoteRefused):
                async with a.stream(b.peer_id, Method("nothing", Text, Text), Text("")) as reply:
                    raise AssertionError("the refusal comes before the block")


class TestInVirtualTime(Worlds):
    def world(self) -> World:
        return Virtual()


@pytest.mark.real
class TestOverTcp(Worlds):
    def world(self) -> World:
        return Real()


# Connecting


async def test_addresses_are_raced_with_small_head_starts() -> None:
    world = Virtual()
    async with nodes(world) as n:
        a, b = await two(n)
        world.memory.freeze("b")  # its kernel connects, its process says nothing
        c = await n.add("c", seed=b"c" * 32)
        began = trio.current_time()
        link = await a.connect(c.peer_id, [*b.addresses(), *c.addresses()])
        assert trio.current_time() - began < 1
        assert link.remote == c.addresses()[0]


async def test_every_address_is_named_with_its_own_reason() -> None:
    world = Virtual()
    async with nodes(world) as n:
        a, b = await two(n)
        silent = await n.add("silent")
        gone = await n.add("gone")
        addresses = [*b.addresses(), *silent.addresses(), *gone.addresses()]
        await n.stop("gone")
        world.memory.freeze("silent")
        with pytest.raises(PeerUnreachable) as caught:
            await a.connect(Identity(b"?" * 32).peer_id, addresses)
        reasons = dict(caught.value.attempts)
        assert list(reasons) == [str(address) for address in addresses]
        assert "answered" in reasons["mem://b:1"]
        assert "says nothing" in reasons["mem://silent:1"] or "no answer" in reasons["mem://silent:1"]
        assert "refused" in reasons["mem://gone:1"]
        for reason in reasons.values():
            assert reason in str(caught.value)


async def test_connecting_has_a_deadline_with_a_name() -> None:
    world = Virtual()
    async with nodes(world) as n:
        a, b = await two(n)
        world.memory.partition(["a"], ["b"])
        began = trio.current_time()
        with pytest.raises(WaitExpired, match=r"no link within 3.0 s"):
            await a.connect(b.peer_id, [Address("mem", "b", 1)], timeout=3)
        assert trio.current_time() - began == pytest.approx(3)
        with pytest.raises(PeerUnreachable, match="no answer to a dial"):
            await a.connect(b.peer_id, [Address("mem", "b", 1)])
        with pytest.raises((WaitExpired, PeerUnreachable)):
            await a.call(b.peer_id, ECHO, Text("?"), timeout=1)


async def test_when_all_who_wait_give_up_the_attempt_ends() -> None:
    world = Virtual()
    async with nodes(world) as n:
        a, b = await two(n)
        world.memory.partition(["a"], ["b"])
        with trio.move_on_after(1):
            await a.connect(b.peer_id, [Address("mem", "b", 1)])
        world.memory.heal()
        assert not a._connector._attempts
        assert await a.connect(b.peer_id, [Address("mem", "b", 1)])


async def test_a_caller_with_more_addresses_is_not_let_down_by_an_attempt_without_them() -> None:
    async with nodes(Virtual()) as n:
        a, b = await two(n)
        outcomes: list[str] = []

        async def connect(addresses: tuple[Address, ...]) -> None:
            try:
                await a.connect(b.peer_id, addresses)
                outcomes.append("connected")
            except PeerUnreachable:
                outcomes.append("unreachable")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(connect, (Address("mem", "b", 9),))
            await trio.sleep(0.001)
            nursery.start_soon(connect, b.addresses())
        assert sorted(outcomes) == ["connected", "unreachable"]


async def test_the_spare_link_of_a_simultaneous_dial_is_closed_when_it_idles() -> None:
    async with nodes(Virtual(Route(latency=0.05))) as n:
        a, b = await two(n)
        a.learn(b.record())
        b.learn(a.record())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.connect, b.peer_id)
            nursery.start_soon(b.connect, a.peer_id)
        assert len(a.links()) == len(b.links()) == 2
        await trio.sleep(30)
        assert len(a.links()) == len(b.links()) == 1
        mine = a.link(b.peer_id)
        assert mine is not None
        assert mine.initiator == (a.peer_id < b.peer_id)


async def test_port_in_use_is_a_configuration_error() -> None:
    async with nodes(Virtual()) as n:
        a = await n.add("a")
        again = n.make("a2")
        again.host.network = a.host.network
        with pytest.raises(ConfigError):
            await again.run(a.addresses())


# Links


async def test_links_beyond_the_limit_close_the_least_recently_used_idle_one() -> None:
    async with nodes(Virtual()) as n:
        hub = await n.add("hub", max_links=3)
        release = trio.Event()

        async def wait(call: Call[Text]) -> Text:
            await release.wait()
            return call.request

        others = []
        for i in range(5):
            other = await n.add(f"n{i}")
            other.serve(ECHO, wait if i == 0 else echo)
            hub.learn(other.record())
            others.append(other)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hub.call, others[0].peer_id, ECHO, Text("busy"))
            await trio.sleep(3)
            for i in (1, 2, 1, 3, 4):
                await hub.call(others[i].peer_id, ECHO, Text("x"))
                await trio.sleep(3)
            # n0 is the oldest but busy; n2 went for n3, and n1, used before n3, for n4
            assert [i for i in range(5) if hub.link(others[i].peer_id) is not None] == [0, 3, 4]
            assert hub.counters == {"links_closed_idle": 2}
            release.set()
        # A contact is not a link: the peer is called again all the same.
        assert await hub.call(others[2].peer_id, ECHO, Text("again")) == Text("again")
        await trio.sleep(10)
        assert len(hub.links()) == 3


async def test_a_call_that_crosses_the_closing_of_an_idle_link_is_made_again() -> None:
    async with nodes(Virtual(Route(latency=0.1))) as n:
        a, b = await two(n)
        link = await a.connect(b.peer_id, b.addresses())
        far = b.link(a.peer_id)
        assert far is not None
        b._table._close_idle(far, "test")
        assert link.alive  # the goodbye is on its way
        assert await a.call(b.peer_id, ECHO, Text("hi")) == Text("hi")
        assert a.link(b.peer_id) is not link


async def test_more_links_than_a_node_can_take_are_refused_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    async with nodes(Virtual()) as n:
        hub = await n.add("hub", max_links=1)

        async def wait(call: Call[Text]) -> Text:
            await trio.sleep_forever()
            raise AssertionError

        hub.serve(ECHO, wait)
        async with trio.open_nursery() as nursery:
            for i in range(2):
                other = await n.add(f"n{i}")
                other.learn(hub.record())
                nursery.start_soon(other.call, hub.peer_id, ECHO, Text("hold"))
            await trio.sleep(1)
            third = await n.add("third")
            with pytest.raises(PeerUnreachable, match="no slot for another link"):
                await third.connect(hub.peer_id, hub.addresses())
            assert hub.counters["links_refused"] == 1
            nursery.cancel_scope.cancel()


async def test_a_killed_peer_ends_calls_at_once() -> None:
    world = Virtual()
    async with nodes(world) as n:
        a, b = await two(n)

        async def never(call: Call[Text]) -> Text:
            await trio.sleep_forever()
            raise AssertionError

        b.serve(ECHO, never)
        a.learn(b.record())
        async with trio.open_nursery() as nursery:

            async def ask() -> None:
                with pytest.raises(LinkClosed):
                    await a.call(b.peer_id, ECHO, Text("?"), timeout=1000)

            nursery.start_soon(ask)
            await trio.sleep(1)
            world.memory.kill("b")
            killed = trio.current_time()
        assert trio.current_time() - killed < 0.1
        n.scopes["b"].cancel()


async def test_hooks_see_links_come_and_go() -> None:
    async with nodes(Virtual()) as n:
        a, b = await two(n)
        seen: list[tuple[str, PeerId]] = []
        b.on_link.append(lambda link: seen.append(("come", link.peer)))
        b.on_link_lost.append(lambda link: seen.append(("gone", link.peer)))
        await a.connect(b.peer_id, b.addresses())
        await n.stop("a")
        await trio.sleep(1)
        assert seen == [("come", a.peer_id), ("gone", a.peer_id)]


# Bad clients


async def test_silent_clients_are_shut_out_and_counted() -> None:
    async with nodes(Virtual()) as n:
        a, b = await two(n)
        stream = await a.host.network.dial(b.addresses()[0])
        began = trio.current_time()
        with trio.fail_after(20):
            while await stream.receive_some():
                pass
        assert trio.current_time() - began == pytest.approx(defaults.HANDSHAKE_FLOOR, abs=0.1)
        assert b.counters == {"handshakes_expired": 1}


async def test_a_crowd_of_silent_clients_does_not_shut_others_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "MAX_HALF_OPEN", 10)
    async with nodes(Virtual()) as n:
        a, b = await two(n)
        silent = [await a.host.network.dial(b.addresses()[0]) for _ in range(30)]
        await trio.sleep(0.1)
        assert len(b._acceptor._half_open) == 10
        assert b.counters["half_open_dropped"] == 20
        await a.connect(b.peer_id, b.addresses())
        for stream in silent:
            await stream.aclose()


async def test_a_hello_with_somebody_elses_record_is_refused() -> None:
    async with nodes(Virtual()) as n:
        a, b = await two(n)
        c = await n.add("c")
        await a.connect(b.peer_id, b.addresses())
        with pytest.raises(RemoteRefused, match="somebody else's record"):
            await a.call(b.peer_id, HELLO, Hello(c.record(), "mem://b:1"))
        assert b.contact(c.peer_id) is None


# Contacts


def sign(identity: Identity, seq: int, expires: float = 2000.0) -> SignedPeerRecord:
    return SignedPeerRecord.sign(identity, (Address("mem", "x", seq),), seq=seq, expires=expires)


def test_the_newest_record_wins_and_the_oldest_contact_leaves() -> None:
    contacts = Contacts(limit=2)
    one, two, three = (Identity(bytes([i]) * 32) for i in (1, 2, 3))
    new = sign(one, 5)
    contacts.learn(new, 1000.0)
    contacts.learn(sign(one, 4), 1000.0)
    known = contacts.get(one.peer_id, 1000.0)
    assert known is not None
    assert known[0] == new
    contacts.learn(sign(two, 1), 1000.0)
    assert contacts.get(one.peer_id, 1000.0) is not None  # used: now two is the oldest
    contacts.learn(sign(three, 1), 1000.0)
    assert contacts.peers() == [one.peer_id, three.peer_id]
    assert len(contacts) == 2


def test_an_expired_or_forged_record_is_no_contact() -> None:
    contacts = Contacts()
    one = Identity(b"1" * 32)
    with pytest.raises(DecodeError, match="expired"):
        contacts.learn(sign(one, 1), 10_000.0)
    good = sign(one, 1)
    with pytest.raises(DecodeError, match="signature"):
        contacts.learn(SignedPeerRecord(good.record, bytes(64)), 1000.0)
    contacts.learn(good, 1000.0)
    assert contacts.get(one.peer_id, 2000.0 + defaults.CLOCK_SKEW + 1) is None
    assert contacts.get(one.peer_id, 1000.0) is None  # dropped


async def test_our_own_record_is_signed_again_only_when_it_must_be() -> None:
    async with nodes(Virtual()) as n:
        a = await n.add("a")
        first = a.record()
        assert a.record() is first
        assert first.open(a.host.wall()).addresses == (Address("mem", "a", 1),)
        await trio.sleep(defaults.PEER_RECORD_LIFETIME * 0.6)
        second = a.record()
        assert second.open(a.host.wall()).seq > first.open(a.host.wall()).seq


def test_the_same_seed_gives_the_same_bytes_at_the_same_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trio._core._run, "_ALLOW_DETERMINISTIC_SCHEDULING", True)

    async def play() -> list[tuple[float, int]]:
        marks = []
        async with nodes(Virtual(Route(latency=0.02, bandwidth=1e6, jitter=0.01, loss=0.001))) as n:
            a, b = await two(n)
            a.learn(b.record())
            start = trio.current_time()
            for i in range(20):
                await a.call(b.peer_id, ECHO, Text("x" * 1000 * i))
                await trio.sleep(1)
                link = a.link(b.peer_id)
                assert link is not None
                marks.append((trio.current_time() - start, link.bytes_sent))
        return marks

    def run() -> list[tuple[float, int]]:
        trio._core._run._r.seed(7)
        return trio.run(play, clock=trio.testing.MockClock(autojump_threshold=0))

    assert run() == run()


# Real processes

CHILD = """
import sys, trio
from shoal.transport.address import Address
from shoal.transport.endpoint import Endpoint
from shoal.transport.host import RealHost
from shoal.transport.identity import Identity
sys.path.insert(0, sys.argv[1])
from test_endpoint_methods import ECHO

async def main():
    host = RealHost()
    endpoint = Endpoint(host, Identity(bytes(32)))
    async def never(call):
        await trio.sleep_forever()
    endpoint.serve(ECHO, never)
    async with trio.open_nursery() as nursery:
        await nursery.start(endpoint.run, [Address.parse("127.0.0.1:0")])
        print(endpoint.addresses()[0], flush=True)
        await trio.sleep(60)
trio.run(main)
"""


@pytest.mark.real(timeout=30)
async def test_a_node_that_is_cancelled_closes_all_its_listeners() -> None:
    async with nodes(Real()) as n, trio.open_nursery() as nursery:
        node = n.make("a")
        await nursery.start(node.run, [Address("tcp", "127.0.0.1", 0) for _ in range(3)])
        listeners = list(node._listeners)
        nursery.cancel_scope.cancel()
    assert len(listeners) == 3
    assert all(listener._socket.fileno() < 0 for listener in listeners)  # type: ignore[attr-defined]


METHODS = """
import attrs
from shoal.transport.rpc import Method
@attrs.frozen
class Text:
    text: str
ECHO = Method("echo", Text, Text)
"""


@pytest.mark.process
@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
async def test_a_process_that_is_killed_or_frozen_is_found(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(defaults, "KEEPALIVE_IDLE", 0.5)
    monkeypatch.setattr(defaults, "PING_FLOOR", 1.0)
    (tmp_path / "test_endpoint_methods.py").write_text(METHODS)
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        address = Address.parse((await trio.to_thread.run_sync(child.stdout.readline)).strip())
        async with nodes(Real()) as n:
            a = await n.add("a", listen=False)
            link = await a.identify(address)
            async with trio.open_nursery() as nursery:

                async def ask() -> None:
                    with pytest.raises(LinkClosed):
                        await a.call(link.peer, ECHO, Text("?"), timeout=60)

                nursery.start_soon(ask)
                await trio.sleep(0.5)
                began = trio.current_time()
                child.send_signal(getattr(signal, how))
            took = trio.current_time() - began
            assert took < (1.0 if how == "SIGKILL" else 6.0)
            if how == "SIGSTOP":
                assert isinstance(link.close_reason, WaitExpired)
    finally:
        child.kill()
        child.wait()
        if child.stdout is not None:
            child.stdout.close()
