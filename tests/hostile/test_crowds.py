"""Crowds of strangers that hold all slots, or make the node hold their bytes: who is let in, and what is held."""

from __future__ import annotations

import attrs
import pytest
import trio

from shoal.transport import defaults
from shoal.transport.endpoint import Endpoint
from shoal.transport.errors import PeerUnreachable, RemoteError
from shoal.transport.frames import Priority
from shoal.transport.rpc import Call, Method
from shoal.transport.stream import LinkStream

from ..transport.harness import Nodes, Virtual, nodes


@attrs.frozen
class Text:
    text: str


HOLD = Method("hostile.hold", Text, Text)
ECHO = Method("hostile.echo", Text, Text)
MAX_LINKS = 8


async def hold(call: Call[Text]) -> Text:
    await trio.sleep_forever()
    raise AssertionError


async def echo(call: Call[Text]) -> Text:
    return call.request


async def hub(n: Nodes) -> Endpoint:
    endpoint = await n.add("hub", max_links=MAX_LINKS)
    endpoint.serve(HOLD, hold)
    endpoint.serve(ECHO, echo)
    return endpoint


async def crowd(n: Nodes, target: Endpoint, nursery: trio.Nursery, count: int, *, one_host: bool) -> list[Endpoint]:
    """Strangers, each with an identity of its own and a call that never ends; ``one_host``: all at one address."""
    made = []
    for number in range(count):
        endpoint = n.make("crowd" if one_host else f"crowd{number}", seed=bytes([200, number]) * 16)
        await nursery.start(endpoint.run)
        made.append(endpoint)

        async def busy(endpoint: Endpoint = endpoint) -> None:
            try:
                await endpoint.connect(target.peer_id, target.own_addresses(), timeout=5.0)
                await endpoint.call(target.peer_id, HOLD, Text(""), timeout=86_000.0)
            except RemoteError:
                pass

        nursery.start_soon(busy)
        await trio.sleep(0.1)
    return made


async def joins(n: Nodes, target: Endpoint, name: str) -> float:
    """A newcomer at an address of its own gets in and is answered; virtual seconds that took, trying every second."""
    newcomer = await n.add(name)
    began = trio.current_time()
    while True:
        try:
            await newcomer.connect(target.peer_id, target.own_addresses(), timeout=5.0)
            await newcomer.call(target.peer_id, ECHO, Text("hello"), timeout=5.0)
            return trio.current_time() - began
        except PeerUnreachable:
            await trio.sleep(1.0)


async def test_a_newcomer_gets_a_slot_at_once_from_a_crowd_at_one_address() -> None:
    async with nodes(Virtual()) as n, trio.open_nursery() as nursery:
        target = await hub(n)
        await crowd(n, target, nursery, 2 * MAX_LINKS, one_host=True)
        assert [link.remote.host for link in target.links()] == ["crowd"] * 2 * MAX_LINKS
        assert await joins(n, target, "honest") < 0.5
        assert target.counters["links_evicted"] == 1
        # The crowd's next one gets none: it would only push out its own.
        before = target.counters.get("links_refused", 0)
        await crowd(n, target, nursery, 2, one_host=True)
        assert target.counters["links_refused"] >= before
        assert len(target.links()) <= 2 * MAX_LINKS + 1
        nursery.cancel_scope.cancel()


async def test_a_newcomer_waits_a_minute_at_most_for_a_crowd_with_an_address_each() -> None:
    async with nodes(Virtual()) as n, trio.open_nursery() as nursery:
        target = await hub(n)
        await crowd(n, target, nursery, 2 * MAX_LINKS, one_host=False)
        assert len(target.links()) == 2 * MAX_LINKS
        took = await joins(n, target, "honest")
        assert 10.0 < took < defaults.STRANGER_STAY + 2.0
        nursery.cancel_scope.cancel()


async def test_peers_the_node_has_called_keep_their_links_whatever_crowd_comes() -> None:
    async with nodes(Virtual()) as n, trio.open_nursery() as nursery:
        target = await hub(n)
        members = []
        for number in range(MAX_LINKS):
            member = await n.add(f"member{number}")
            member.serve(ECHO, echo)
            await member.connect(target.peer_id, target.own_addresses())
            assert (await target.call(member.peer_id, ECHO, Text("hi"))).text == "hi"
            members.append(member)
        kept = {member.peer_id: target.link(member.peer_id) for member in members}
        # Nobody idles away: each has a call open.
        for member in members:
            nursery.start_soon(_held, member, target)
        await trio.sleep(0.5)
        for wave in range(3):
            await crowd(n, target, nursery, 2 * MAX_LINKS, one_host=wave == 0)
            await trio.sleep(defaults.STRANGER_STAY + 1)
        assert target.counters["links_evicted"] + target.counters["links_refused"] > MAX_LINKS
        for member in members:
            assert target.link(member.peer_id) is kept[member.peer_id]
        nursery.cancel_scope.cancel()


async def _held(member: Endpoint, target: Endpoint) -> None:
    try:
        await member.call(target.peer_id, HOLD, Text(""), timeout=86_000.0)
    except RemoteError:
        pass


async def test_all_links_together_hold_no_more_than_the_bound_and_strangers_pay_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Twelve strangers send 8 MiB each that nobody reads; 32 MiB are allowed. A member that uses its share stays."""
    monkeypatch.setattr(defaults, "MAX_HELD", 32 << 20)
    monkeypatch.setattr(defaults, "HELD_CHECK", 1 << 20)
    async with nodes(Virtual()) as n, trio.open_nursery() as nursery:
        target = await n.add("hub")
        target.serve(ECHO, echo)
        opened: list[LinkStream] = []

        async def ignore(stream: LinkStream) -> None:
            opened.append(stream)
            await trio.sleep_forever()

        target.serve_streams("hostile-unread", ignore)
        member = await n.add("member")
        member.serve(ECHO, echo)
        await member.connect(target.peer_id, target.own_addresses())
        await target.call(member.peer_id, ECHO, Text("hi"))
        most = 0

        async def pour(endpoint: Endpoint, size: int) -> None:
            try:
                link = await endpoint.connect(target.peer_id, target.own_addresses())
                stream = await link.open_stream("hostile-unread", Priority.BULK)
                for _ in range(size >> 18):
                    await stream.send_all(bytes(1 << 18))
            except RemoteError:
                pass

        nursery.start_soon(pour, member, 7 << 20)
        await trio.sleep(1.0)
        for number in range(12):
            nursery.start_soon(pour, await n.add(f"stranger{number}"), 8 << 20)
        for _ in range(100):
            await trio.sleep(0.1)
            most = max(most, sum(link.held for link in target.links()))
        assert most < (32 << 20) + 12 * (1 << 20)
        assert target.counters["links_held_too_much"] >= 8
        assert target.link(member.peer_id) is not None
        assert (await target.call(member.peer_id, ECHO, Text("still"))).text == "still"
        nursery.cancel_scope.cancel()
