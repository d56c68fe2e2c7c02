"""Well-formed nonsense: every method of a running swarm, asked and answered with values that make no sense.

What decodes still comes from an enemy. No handler may fail for a reason of its own, and the swarm goes on.
"""

from __future__ import annotations

import logging
import random
from typing import Any, ClassVar

import attrs
import pytest
import trio

from shoal.dht.kademlia.node import Dht
from shoal.node.node import Founding
from shoal.sim.virtual import VirtualHost
from shoal.sim.world import Scenario, World, simulate
from shoal.transport.address import Address
from shoal.transport.aead import NOMINAL_CIPHERS
from shoal.transport.endpoint import Endpoint
from shoal.transport.errors import RemoteError, RemoteRefused
from shoal.transport.identity import Identity, PeerId
from shoal.transport.memory_flow import Route
from shoal.transport.rpc import Call, Method

from ..sim import tiny
from . import registry
from .samples import Known, sample

CALLS = 250
#: Other nonsense with each seed.
SEEDS = pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])


class Slow(tiny.Pull):
    """Rounds of two virtual seconds, so that there is time for nonsense in each."""

    step_seconds: ClassVar[float] = 1.0


def known(world: World) -> Known:
    """What somebody who has been listening knows of the run."""
    run = world.members[0].run
    head = run.membership.head
    record = head.record
    return {
        bytes: [run.run_id, record.digest, record.prev, head.certificate.key, record.fingerprint, record.state],
        int: [0, 1, 2, record.round - 1, record.round, record.round + 1, record.total],
        PeerId: list(record.roster),
        type(record): [record, attrs.evolve(record, round=record.round + 1, prev=record.digest)],
        type(head.certificate): [head.certificate],
        type(run.signed): [run.signed],
    }


async def stranger(world: World, name: str, seed: int) -> Endpoint:
    """An endpoint of somebody who is in no run, linked with all members."""
    host = VirtualHost(name, world.network, seed=seed)
    host.ciphers = NOMINAL_CIPHERS
    endpoint = Endpoint(host, Identity(host.entropy(32)))
    await world.nursery.start(endpoint.run, [Address("mem", name, 1)])
    for member in world.live():
        for address in member.node.endpoint.addresses():
            await endpoint.identify(address)
    return endpoint


async def ask_nonsense(endpoint: Endpoint, world: World, rng: random.Random, calls: int) -> dict[str, int]:
    """Call random methods with random requests and bodies; returns how often which code came back."""
    codes: dict[str, int] = {}
    methods = list(registry.methods().values())
    for _ in range(calls):
        member = rng.choice([member for member in world.live() if member.node.identity.peer_id != endpoint.peer_id])
        method = rng.choice(methods)
        request = sample(method.request, rng, known=known(world))
        body = [rng.randbytes(rng.choice((1, 4, 100, 4096)))] if rng.random() < 0.3 else None
        code = "ok"
        try:
            await endpoint.call(member.node.identity.peer_id, method, request, body=body, timeout=0.5)
        except RemoteRefused as error:
            code = error.code
        except RemoteError as error:
            code = type(error).__name__
        codes[code] = codes.get(code, 0) + 1
        if rng.random() < 0.1:
            await trio.sleep(0.1)
    return codes


async def known_round(world: World, round: int) -> None:
    await world.until(
        lambda: all(m.node.run_here is not None and m.run.round >= round for m in world.live()), f"round {round}"
    )


def trouble(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [f"{record.getMessage()}: {record.exc_info}" for record in caplog.records if record.levelno >= logging.ERROR]


async def nonsense_then_peace(world: World, endpoint: Endpoint, seed: int) -> dict[str, int]:
    """Ask nonsense, and see that rounds go on afterwards; then the swarm ends."""
    codes = await ask_nonsense(endpoint, world, random.Random(seed), CALLS)
    before = max(member.run.round for member in world.live())
    await known_round(world, before + 5)
    for number in sorted(world.members):
        world.stop(number)
    return codes


@SEEDS
@pytest.mark.parametrize("strategy", ["exchange", "gossip"])
def test_no_request_of_a_stranger_makes_a_handler_fail(
    seed: int, strategy: str, caplog: pytest.LogCaptureFixture
) -> None:
    codes: dict[str, int] = {}

    async def script(world: World) -> None:
        await known_round(world, 2)
        codes.update(await nonsense_then_peace(world, await stranger(world, "evil", seed), seed))

    simulate(_scenario(strategy, 3, 100_000), script)
    _all_refused_in_words(codes, caplog)


@SEEDS
def test_no_request_of_a_member_makes_a_handler_fail(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    codes: dict[str, int] = {}

    async def script(world: World) -> None:
        await known_round(world, 2)
        codes.update(await nonsense_then_peace(world, world.members[2].node.endpoint, seed))

    simulate(_scenario("exchange", 3, 100_000), script)
    _all_refused_in_words(codes, caplog)


def _all_refused_in_words(codes: dict[str, int], caplog: pytest.LogCaptureFixture) -> None:
    assert "internal" not in codes, codes
    assert trouble(caplog) == []
    assert sum(codes.values()) == CALLS
    assert len(codes) >= 8, f"hardly anything was tried: {codes}"
    assert codes.get("PeerUnreachable", 0) < CALLS / 10, codes


@SEEDS
def test_no_answer_of_a_liar_makes_an_asker_fail(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    """A stranger that is well known in the DHT answers everything with nonsense of the right type."""
    asked: dict[str, int] = {}

    async def script(world: World) -> None:
        await known_round(world, 2)
        endpoint = await stranger(world, "evil", seed)
        dht = Dht(endpoint)
        world.nursery.start_soon(dht.run)
        await dht.bootstrap([a for member in world.live() for a in member.node.endpoint.addresses()])
        await dht.provide(world.members[0].run.run_id)
        rng = random.Random(seed)
        for method in registry.methods().values():
            if method.name not in ("transport.hello",):
                endpoint.serve(method, _liar(method, rng, world, asked))
        world.start(3)
        await trio.sleep(60)

    world = simulate(_scenario("exchange", 3, 60), script)
    assert sum(asked.values()) >= 10, asked
    assert trouble(caplog) == []
    assert len(world.live()) == 4
    assert all(member.run.round >= 60 for member in world.live())


def _liar(method: Method[Any, Any], rng: random.Random, world: World, asked: dict[str, int]) -> Any:
    async def answer(call: Call[Any]) -> Any:
        asked[method.name] = asked.get(method.name, 0) + 1
        for _ in range(rng.choice((0, 0, 1, 3))):
            await call.write(rng.randbytes(rng.choice((1, 100, 5000))))
        return sample(method.response, rng, known=known(world))

    return answer


def _scenario(strategy: str, nodes: int, rounds: int) -> Scenario:
    if strategy == "exchange":
        return attrs.evolve(tiny.scenario(nodes, rounds), make_task=Slow, limit=7200.0)
    founding = Founding(strategy="noloco", min_peers=nodes, rounds=rounds)
    return Scenario(nodes, founding, make_task=Slow, route=Route(latency=tiny.LATENCY), limit=36_000.0)
