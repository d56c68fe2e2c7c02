"""Crowds of strangers at one node in virtual time: its own run keeps its links."""

from __future__ import annotations

import trio

from shoal.learning.rounds.methods import WANT, Want
from shoal.sim.world import World, simulate
from shoal.transport import defaults
from shoal.transport.address import Address
from shoal.transport.errors import RemoteError

from .test_hostile_run import Stranger, events, known_round, scenario


def test_strangers_that_take_all_links_do_not_cut_a_member_off_its_run() -> None:
    most: list[int] = []

    async def script(world: World) -> None:
        await known_round(world, 2)
        target = world.members[0].node
        me, address = target.identity.peer_id, target.endpoint.addresses()[0]

        async def crowd(number: int) -> None:
            stranger = Stranger(world, f"evil{number}")
            await world.nursery.start(stranger.endpoint.run, [Address("mem", stranger.name, 1)])
            while True:
                try:
                    await stranger.endpoint.connect(me, [address])
                    # Something is always open on its link, so it is never idle.
                    await stranger.endpoint.call(me, WANT, Want(b"?" * 32, 0, 0, 0, 1, b""), timeout=1000.0)
                except RemoteError:
                    await trio.sleep(0.5)

        async with trio.open_nursery() as nursery:
            for number in range(2 * defaults.MAX_LINKS + 10):
                nursery.start_soon(crowd, number)
            await trio.sleep(5.0)
            most.append(len(target.endpoint.links()))
            # Even when its path breaks for a moment, a member comes back in.
            for link in target.endpoint.links():
                if link.peer == world.members[1].node.identity.peer_id:
                    await link.aclose("the path breaks")
            await known_round(world, world.members[0].run.round + 3)
            nursery.cancel_scope.cancel()

    world = simulate(scenario(3, 9), script)
    assert most[0] >= 2 * defaults.MAX_LINKS
    assert len({member.run.digest() for member in world.live()}) == 1
    for member in world.live():
        assert not any(events(member, what) for what in ("step-aside", "branch", "out-of-step"))
        assert all(len(report.members) == 3 for report in member.run.reports), member.run.reports
