"""Lines measured before the first round: by bulk for members, bounded on both sides."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

import pytest
import trio

from shoal.learning import defaults
from shoal.learning.reduce.probes import PROBE, Probe, Probes
from shoal.sim.determinism import run_virtual
from shoal.sim.reduce_world import ReduceScenario, ReduceWorld, optimum, reduce_rounds
from shoal.transport.address import Address
from shoal.transport.endpoint import Endpoint
from shoal.transport.errors import RemoteRefused
from shoal.transport.host import RealHost
from shoal.transport.identity import Identity

LINE, SIZE = 3.125e6, 16 << 20


def within(scenario: ReduceScenario, act: Callable[[ReduceWorld], Awaitable[None]]) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            world = ReduceWorld(scenario)
            await world.connect(nursery)
            await act(world)
            nursery.cancel_scope.cancel()

    run_virtual(main, seed=scenario.seed)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_first_round_over_unequal_lines_comes_within_a_tenth_of_the_optimum(seed: int) -> None:
    lines = tuple(LINE * factor for factor in (0.5, 1, 2, 4) * 2)
    scenario = ReduceScenario(lines, SIZE, rounds=1, seed=seed, probes=True)
    (first,) = reduce_rounds(scenario)
    assert first.seconds <= 1.1 * optimum(scenario)
    assert "slices sized for" in first.reason


@pytest.mark.parametrize("factor", [0.1, 1.0, 16.0])
def test_a_line_is_measured_within_two_seconds_and_a_tenth(factor: float) -> None:
    told: list[str] = []

    async def act(world: ReduceWorld) -> None:
        peer = world.peers[1]
        peer.probes._tell = told.append
        for each in world.peers:
            each.probes._members = frozenset(world.voters)
        before = sum(link.bytes_sent for link in peer.endpoint.links())
        assert peer.probes.consider(world.voters, SIZE, lambda: True) == (True, "nothing has been sent yet")
        await trio.sleep(defaults.PROBE_TIME + 0.5)
        rate = peer.endpoint.line.up.rate(peer.host.now())
        assert rate == pytest.approx(LINE * factor, rel=0.1)
        sent = sum(link.bytes_sent for link in peer.endpoint.links()) - before
        assert sent <= defaults.PROBE_TIME * LINE * factor * 1.1
        assert peer.probes.consider(world.voters, SIZE, lambda: True) == (False, "it is measured already")

    within(ReduceScenario((LINE * factor,) * 5, SIZE), act)
    assert [float(text.split()[3]) for text in told] == [pytest.approx(8e-6 * LINE * factor, rel=0.1)]


def test_nothing_is_sent_where_it_would_change_nothing_or_the_line_is_needed() -> None:
    async def act(world: ReduceWorld) -> None:
        peer, other = world.peers[0], world.peers[1].endpoint.peer_id
        consider = peer.probes.consider
        equal = (False, "slices would be equal all the same")
        assert consider(world.voters, 1000, lambda: True) == equal
        assert consider([peer.endpoint.peer_id, other], SIZE, lambda: True) == equal
        before = sum(link.bytes_sent for link in peer.endpoint.links())
        assert consider(world.voters, SIZE, lambda: False)[0]
        await trio.sleep(1.0)
        assert sum(link.bytes_sent for link in peer.endpoint.links()) - before < 5000
        # It did not have its turn, so it may try again; once it has, not for a while.
        assert consider(world.voters, SIZE, lambda: True)[0]
        assert consider(world.voters, SIZE, lambda: True) == (False, "it was tried a while ago")

    within(ReduceScenario((LINE,) * 4, SIZE), act)


def test_who_needs_the_line_ends_it_at_once() -> None:
    free = True

    async def act(world: ReduceWorld) -> None:
        nonlocal free
        peer = world.peers[0]
        for each in world.peers:
            each.probes._members = frozenset(world.voters)
        peer.probes.consider(world.voters, SIZE, lambda: free)
        await trio.sleep(0.2)
        free = False
        await trio.sleep(1.0)  # what was under way
        before = sum(link.bytes_sent for link in peer.endpoint.links())
        assert before > defaults.PROBE_FIRST
        await trio.sleep(2.0)
        assert sum(link.bytes_sent for link in peer.endpoint.links()) - before < 5000

    within(ReduceScenario((LINE,) * 4, SIZE), act)


def test_strangers_and_those_who_send_too_much_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def act(world: ReduceWorld) -> None:
        taker, sender = world.peers[0], world.peers[1]
        call = partial(sender.endpoint.call, taker.endpoint.peer_id, PROBE, Probe())
        with pytest.raises(RemoteRefused, match="only members") as caught:
            await call(body=[bytes(1000)])
        assert caught.value.code == "stranger"
        taker.probes._members = frozenset(world.voters)
        await call(body=[bytes(defaults.PROBE_BODY)])
        with pytest.raises(RemoteRefused) as caught:
            await call(body=[bytes(defaults.PROBE_BODY + 1)])
        assert caught.value.code == "quota"
        monkeypatch.setattr(defaults, "PROBE_BYTES", 3 * defaults.PROBE_BODY)
        with pytest.raises(RemoteRefused) as caught:
            await call(body=[bytes(defaults.PROBE_BODY)])
        assert caught.value.code == "quota"
        await trio.sleep(defaults.PROBE_EVERY)
        await call(body=[bytes(defaults.PROBE_BODY)])

    within(ReduceScenario((LINE * 100,) * 3, SIZE), act)


def test_a_peer_that_freezes_meanwhile_costs_nothing_and_others_go_on() -> None:
    async def act(world: ReduceWorld) -> None:
        for each in world.peers:
            each.probes._members = frozenset(world.voters)
        peer = world.peers[0]
        peer.probes.consider(world.voters, SIZE, lambda: True)
        await trio.sleep(0.2)
        me = peer.endpoint.peer_id
        behind = [*(p for p in world.voters if p > me), *(p for p in world.voters if p < me)]
        world.network.freeze(world.by_id[behind[0]].name)
        await trio.sleep(2.5)
        assert peer.endpoint.line.up.rate(peer.host.now()) == pytest.approx(LINE, rel=0.15)

    within(ReduceScenario((LINE,) * 5, SIZE), act)


@pytest.mark.real
async def test_on_one_machine_nothing_is_measured() -> None:
    async with trio.open_nursery() as nursery:
        endpoints, probes = [], []
        for _ in range(3):
            host = RealHost()
            endpoint = Endpoint(host, Identity(host.entropy(32)))
            await nursery.start(endpoint.run, [Address("tcp", "127.0.0.1", 0)])
            endpoints.append(endpoint)
            probes.append(Probes(endpoint, nursery))
        for endpoint in endpoints[1:]:
            await endpoints[0].connect(endpoint.peer_id, endpoint.addresses())
        members = [endpoint.peer_id for endpoint in endpoints]
        assert probes[0].consider(members, SIZE, lambda: True)[0]
        await trio.sleep(0.5)
        assert endpoints[0].line.up.rate(endpoints[0].host.now()) is None
        assert sum(link.bytes_sent for link in endpoints[0].links()) < 20_000
        probes[1]._members = frozenset(members)  # what others send is taken all the same
        await endpoints[0].call(members[1], PROBE, Probe(), body=[bytes(defaults.PROBE_BODY)])
        nursery.cancel_scope.cancel()
