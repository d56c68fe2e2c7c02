"""Links through a relay: reservations, circuits, limits, and relays that are not what they should be."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import attrs
import pytest
import trio

from shoal.transport.address import Address
from shoal.transport.endpoint import Endpoint
from shoal.transport.errors import PeerUnreachable, RemoteRefused
from shoal.transport.identity import Identity
from shoal.transport.memory import Route
from shoal.transport.planner import Reach
from shoal.transport.relay import (
    CIRCUIT_PROTOCOL,
    RESERVE_PROTOCOL,
    Circuit,
    RelayLimits,
    Reserve,
    admit,
    request,
)
from shoal.transport.rpc import Call, Method
from shoal.transport.traversal import Traversal

from .harness import Nodes, Virtual, nodes

RELAY_ONLY = Traversal(ways=("direct", "relay"))


@attrs.frozen
class Text:
    text: str


ECHO = Method("echo", Text, Text)


async def echo(call: Call[Text]) -> Text:
    return call.request


@asynccontextmanager
async def hidden_pair(
    *, limits: RelayLimits | None = None, route: Route | None = None, kind: str = "symmetric"
) -> AsyncIterator[tuple[Nodes, Endpoint, Endpoint, Endpoint]]:
    """(nodes, a, relay, b): ``a`` and ``b`` behind NATs, linked with the relay, where both hold reservations."""
    world = Virtual(route)
    async with nodes(world) as n:
        relay = await n.add("relay", traversal=Traversal(relay=True, limits=limits or RelayLimits()))
        found = []
        for name in ("a", "b"):
            endpoint = await n.add(name, traversal=RELAY_ONLY)
            world.memory.set_nat(name, kind)  # type: ignore[arg-type]
            endpoint.serve(ECHO, echo)
            await endpoint.connect(relay.peer_id, relay.addresses())
            found.append(endpoint)
        a, b = found
        with trio.fail_after(60):
            while not all(e.traversal and e.traversal.relays for e in found):
                await trio.sleep(0.1)
        yield n, a, relay, b


async def test_two_peers_behind_symmetric_nats_meet_through_a_relay() -> None:
    async with hidden_pair() as (_, a, relay, b):
        for endpoint in (a, b):
            assert endpoint.traversal is not None
            assert endpoint.traversal.reach().state is Reach.UNREACHABLE
            assert [found.peer for found in endpoint.traversal.relays] == [relay.peer_id]
        a.learn(b.record())
        began = trio.current_time()
        assert await a.call(b.peer_id, ECHO, Text("hi")) == Text("hi")
        # six hops of 10 ms and three round trips of them, beside the head starts
        assert trio.current_time() - began < 0.8
        link = a.link(b.peer_id)
        assert link is not None
        assert link.way == "relay"
        assert link.remote == relay.addresses()[0]
        assert await b.call(a.peer_id, ECHO, Text("back")) == Text("back")
        assert [c.way for c in a.connections() if c.peer == b.peer_id] == ["relay"]
        assert relay.traversal is not None
        assert relay.traversal.relay.circuits == 1
