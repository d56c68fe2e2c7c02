"""Dozens of nodes in virtual time: everything stays findable through deaths, partitions of knowledge and liars."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest
import trio
import trio.testing

from shoal.dht.kademlia import defaults
from shoal.dht.kademlia.keys import digest, node_key
from shoal.dht.kademlia.messages import FIND, Closer, Find
from shoal.dht.kademlia.records import SignedRecord
from shoal.transport.address import Address, SignedPeerRecord
from shoal.transport.identity import Identity
from shoal.transport.rpc import Call

OpenSwarm = Callable[..., AbstractAsyncContextManager[Any]]


def spec_of(node: Any, text: bytes) -> SignedRecord:
    return SignedRecord.sign(node.identity, "run", digest(text), text, seq=0, expires=node.host.wall() + 7200)


async def test_every_node_finds_every_value_after_30_percent_were_killed(open_swarm: OpenSwarm) -> None:
    async with open_swarm(seed=1, latency=0.02) as swarm:
        nodes = await swarm.grow(50)
        await trio.sleep(20)
        specs = [spec_of(node, b"spec %d" % number) for number, node in enumerate(nodes[::5])]
        for node, spec in zip(nodes[::5], specs, strict=True):
            assert await node.dht.put(spec) >= defaults.K  # those asked on the way may be a few more
        for name in random.Random(2).sample(sorted(swarm.nodes), 15):
            swarm.kill(name)
        missing = []
        for node in swarm.nodes.values():
            for spec in specs:
                if await node.dht.get("run", spec.key) != spec:
                    missing.append((node.name, spec.value))
        assert missing == []


async def test_lookups_find_the_true_closest_peers(open_swarm: OpenSwarm) -> None:
    async with open_swarm(seed=3) as swarm:
        nodes = await swarm.grow(32)
        await trio.sleep(20)
        rng = random.Random(4)
        for _ in range(30):
            asker, target = rng.choice(nodes), rng.getrandbits(256)
            peers = [node.identity.peer_id for node in nodes if node is not asker]
            truth = sorted(peers, key=lambda peer: node_key(peer) ^ target)[: defaults.K]
            assert list((await asker.dht.find(target)).closest) == truth


async def test_a_write_among_few_asks_hardly_more_peers_than_store_it(open_swarm: OpenSwarm) -> None:
    async with open_swarm(seed=3) as swarm:
        nodes = await swarm.grow(32)
        await trio.sleep(20)
        asked = []
        for number, node in enumerate(nodes):
            spec = spec_of(node, b"spec %d" % number)
            before = node.dht.counters.queries
            assert await node.dht.put(spec) >= defaults.K
            asked.append(node.dht.counters.queries - before)
            others = [other for other in nodes if other is not node]
            truth = sorted(others, key=lambda other: node_key(other.identity.peer_id) ^ spec.place)[: defaults.K]
            wall = node.host.wall()
            stored = sum(other.dht.store.get("run", spec.key, wall) is not None for other in truth)
            assert stored >= defaults.K - 2  # where it was not known who is near: one beside the closest
        assert sum(asked) / len(asked) < defaults.K + 4


async def test_run_providers_are_found_through_any_member_after_the_founder_left(open_swarm: OpenSwarm) -> None:
    async with open_swarm(seed=5) as swarm:
        nodes = await swarm.grow(40)
        founder, members = nodes[0], nodes[1:9]
        for node in (founder, *members):
            await node.dht.provide(b"the run")
        await trio.sleep(20)
        await swarm.leave(founder.name)
        for number in range(10):
            via = nodes[10 + 3 * number]
            newcomer = await swarm.add(f"new{number}", via)
            found = await newcomer.dht.providers(b"the run")
            peers = [record.open(newcomer.host.wall()).peer for record in found]
            assert {member.identity.peer_id for member in members} <= set(peers)


@pytest.mark.parametrize(
    "lie", ["garbage", "too many", *(pytest.param(lie, marks=pytest.mark.slow) for lie in ("foreign", "nobody"))]
)
async def test_a_fifth_of_liars_does_not_hide_what_the_others_hold(open_swarm: OpenSwarm, lie: str) -> None:
    async with open_swarm(seed=6) as swarm:
        nodes = await swarm.grow(40)
        await trio.sleep(20)
        rng = random.Random(7)
        liars = rng.sample(nodes, 8)
        strangers = [Identity(rng.randbytes(32)) for _ in range(40)]
        wall = nodes[0].host.wall()
        foreign = tuple(
            SignedPeerRecord.sign(who, (Address("mem", f"nowhere{n}", 1),), seq=1, expires=wall + 3600)
            for n, who in enumerate(strangers)
        )
        answers = {
            "garbage": (SignedPeerRecord(b"\x81\xa4peer\xc0", bytes(64)),) * 3,
            "too many": foreign,
            "foreign": foreign[: defaults.K],
            "nobody": (),
        }

        async def find(call: Call[Find]) -> Closer:
            return Closer(answers[lie])

        for liar in liars:
            liar.endpoint.serve(FIND, find)
        honest = [node for node in nodes if node not in liars]
        specs = [spec_of(node, b"spec %d" % number) for number, node in enumerate(honest[:10])]
        for node, spec in zip(honest, specs, strict=False):
            assert await node.dht.put(spec) > 0
        for node in honest[20:]:
            for spec in specs:
                assert await node.dht.get("run", spec.key) == spec


def test_the_same_seed_gives_the_same_messages(open_swarm: OpenSwarm, monkeypatch: pytest.MonkeyPatch) -> None:
    async def swarm_life() -> list[object]:
        async with open_swarm(seed=8) as swarm:
            nodes = await swarm.grow(20)
            spec = spec_of(nodes[3], b"spec")
            await nodes[3].dht.put(spec)
            await nodes[9].dht.get("run", spec.key)
            await nodes[5].dht.provide(b"run")
            await trio.sleep(60)
            return [(node.dht.counters, node.dht.snapshot(), trio.current_time()) for node in nodes]

    def run() -> list[object]:
        monkeypatch.setattr(trio._core._run, "_r", random.Random(9))
        return trio.run(swarm_life, clock=trio.testing.MockClock(autojump_threshold=0))

    monkeypatch.setattr(trio._core._run, "_ALLOW_DETERMINISTIC_SCHEDULING", True)
    assert run() == run()
