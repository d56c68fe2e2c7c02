"""Who abuses a relay: more circuits than allowed at once, all of one peer's, all of its bytes."""

from __future__ import annotations

import trio

from shoal.transport.errors import RemoteError, RemoteRefused
from shoal.transport.frames import Priority
from shoal.transport.identity import PeerId
from shoal.transport.link import Link
from shoal.transport.relay import CIRCUIT_PROTOCOL, RESERVE_PROTOCOL, Circuit, RelayLimits, request
from shoal.transport.signals import Signals

from ..transport.harness import Virtual, nodes
from ..transport.test_relay import RELAY_ONLY, hidden_pair


async def _ask(link: Link, message: Circuit, codes: list[str]) -> None:
    try:
        await request(link, CIRCUIT_PROTOCOL, message)
        codes.append("")
    except RemoteRefused as error:
        codes.append(error.code)


async def test_two_hundred_circuits_asked_for_in_one_moment_get_no_more_than_the_limit() -> None:
    """All requests travel in one record: none may be granted on a count that the others are not in yet."""
    limits = RelayLimits(circuits_per_peer=6, circuits=100)
    async with hidden_pair(limits=limits) as (_, a, relay, b):
        link = a.link(relay.peer_id)
        assert link is not None
        codes: list[str] = []
        async with trio.open_nursery() as nursery:
            for _ in range(200):
                nursery.start_soon(_ask, link, Circuit(b.peer_id), codes)
        assert codes.count("") == 6 // 2  # and no more than half of a peer's for one address
        assert codes.count("busy") == 200 - 6 // 2


async def test_one_address_takes_no_more_than_half_of_the_circuits_to_a_peer() -> None:
    limits = RelayLimits(circuits_per_peer=8)
    async with hidden_pair(limits=limits) as (n, a, relay, b):
        link = a.link(relay.peer_id)
        assert link is not None
        codes: list[str] = []
        for _ in range(20):
            await _ask(link, Circuit(b.peer_id), codes)
        assert codes == [""] * 4 + ["busy"] * 16
        other = await n.add("other", traversal=RELAY_ONLY)
        link = await other.connect(relay.peer_id, relay.addresses())
        codes = []
        await _ask(link, Circuit(b.peer_id), codes)
        assert codes == [""]


async def test_who_opens_hundreds_of_streams_to_a_relay_and_says_nothing_holds_few_tasks() -> None:
    async with hidden_pair() as (n, _, relay, __):
        evil = await n.add("evil", traversal=RELAY_ONLY)
        link = await evil.connect(relay.peer_id, relay.addresses())
        before = trio.lowlevel.current_statistics().tasks_living
        for number in range(250):
            stream = link.try_open_stream((CIRCUIT_PROTOCOL, RESERVE_PROTOCOL)[number % 2], Priority.CONTROL)
            assert stream is not None
        await trio.sleep(1.0)
        after = trio.lowlevel.current_statistics().tasks_living
        assert after - before < 100, f"{after - before} tasks"
        # Another peer is served meanwhile.
        other = await n.add("other", traversal=RELAY_ONLY)
        to_relay = await other.connect(relay.peer_id, relay.addresses())
        try:
            await request(to_relay, CIRCUIT_PROTOCOL, Circuit(other.peer_id))
        except RemoteError as error:
            assert isinstance(error, RemoteRefused)
            assert error.code == "no_reservation"


async def test_many_names_at_one_address_leave_others_half_of_what_a_common_peer_passes_on() -> None:
    """Twenty identities at one address signal as fast as they may for 10 s; a peer elsewhere signals once a second."""
    async with nodes(Virtual()) as n, trio.open_nursery() as nursery:
        common, target, honest = await n.add("common"), await n.add("target"), await n.add("honest")
        services = {endpoint.peer_id: Signals(endpoint) for endpoint in (common, target, honest)}
        heard: dict[bytes, int] = {}

        async def hear(origin: PeerId, via: PeerId, body: bytes) -> bytes:
            heard[body] = heard.get(body, 0) + 1
            return b""

        services[target.peer_id].handle("test", hear)
        for endpoint in (target, honest):
            await endpoint.connect(common.peer_id, common.own_addresses())

        async def pester(number: int) -> None:
            endpoint = n.make("crowd", seed=bytes([100, number]) * 16)
            await nursery.start(endpoint.run)
            signals = Signals(endpoint)
            await endpoint.connect(common.peer_id, common.own_addresses())
            while True:
                try:
                    await signals.ask(common.peer_id, target.peer_id, "test", b"evil", 5.0)
                except RemoteError:
                    await trio.sleep(0.05)

        for number in range(20):
            nursery.start_soon(pester, number)
        await trio.sleep(2.0)
        for _ in range(10):
            await services[honest.peer_id].ask(common.peer_id, target.peer_id, "test", b"honest", 5.0)
            await trio.sleep(1.0)
        assert heard[b"honest"] == 10
        assert heard[b"evil"] <= 64 + 8 * 14
        nursery.cancel_scope.cancel()
