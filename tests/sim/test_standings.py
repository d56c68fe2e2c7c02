"""Whole nodes in virtual time remember who missed rounds and whose work the rule did not take, also over restarts."""

from __future__ import annotations

import attrs
import torch
import trio
from torch import Tensor

from shoal.learning import defaults
from shoal.learning.events import Standing
from shoal.learning.faults import Faults
from shoal.node.commands import render_peers
from shoal.node.control import PeerList
from shoal.node.node import Founding
from shoal.sim.world import World, simulate

from . import tiny

PEERS, LIAR = 5, 2


class Opposite:
    """Sends the opposite of its work, ten times as large. See :class:`shoal.learning.faults.Disguise`."""

    def __call__(self, round: int, work: Tensor) -> Tensor:
        return -10 * work

    def saw(self, result: Tensor) -> None:
        pass


def seen(world: World, by: int, of: int) -> Standing:
    found = {standing.peer: standing for standing in world.members[by].node.standings()}
    return found[world.members[of].peer]


def shown(world: World, by: int) -> dict[str, list[str]]:
    """What ``shoal peers`` says there, by the first letters of a peer, in cells."""
    node = world.members[by].node
    lines = render_peers(PeerList(node.peers(), node.standings())).splitlines()
    return {
        cells[0]: cells for cells in ([c.strip() for c in line.split("  ") if c.strip()] for line in lines) if cells
    }


def test_a_liar_has_a_low_quality_at_every_honest_peer_and_shoal_peers_shows_it() -> None:
    founding = Founding(
        strategy_args=tiny.PLAIN, aggregator="multikrum:f=1,definition=byzfl", audit=0.0, min_peers=PEERS, rounds=12
    )
    tables: list[dict[str, list[str]]] = []

    async def script(world: World) -> None:
        first = world.members[0]
        await world.until(lambda: first.node.run_here is not None and first.run.round >= 10, "ten rounds")
        tables.append(shown(world, 0))

    scenario = tiny.scenario(PEERS, 12, faults={LIAR: Faults(disguise=Opposite())})
    world = simulate(attrs.evolve(scenario, founding=founding), script)
    for by in range(PEERS):
        reports = world.members[by].run.reports
        for of in range(PEERS):
            if of == by:
                assert world.members[by].peer not in {standing.peer for standing in world.members[by].node.standings()}
                continue
            found, peer = seen(world, by, of), world.members[of].peer
            qualities = [report.quality[report.members.index(peer)] for report in reports]
            assert found.measured == found.contributed == found.rounds == len(reports) == 12
            assert found.quality is not None and abs(found.quality - sum(qualities) / 12) < 1e-9
            assert found.round == 12
            assert found.quality == (0.0 if of == LIAR else 1.0), "four of five are taken"
    (table,) = tables
    head = table["PEER"]
    assert head[-2:] == ["CONTRIBUTED", "QUALITY"], "no audits, no such column"
    row = table[world.members[LIAR].peer[:8]]
    assert row[-1] == "0.00" and row[-2] in ("10/10", "11/11")


def test_a_peer_that_cannot_be_reached_is_seen_to_miss_a_round_and_is_shown_while_it_has_no_link() -> None:
    tables: list[dict[str, list[str]]] = []

    async def script(world: World) -> None:
        first = world.members[0]
        await world.until(lambda: first.node.run_here is not None and first.run.round >= 4, "four rounds")
        world.partition((3,))
        gone = world.members[3].peer
        await world.until(lambda: first.run.reports[-1].dropped == (gone,), "a round without it")
        await world.until(
            lambda: gone not in {link.peer.text for link in first.node.endpoint.links()}, "the link's end"
        )
        tables.append(shown(world, 0))
        world.heal()
        again = len(first.run.reports)
        await world.until(lambda: any(gone in report.members for report in first.run.reports[again:]), "its return")

    scenario = tiny.scenario(4, 60, slowness=10.0)
    world = simulate(attrs.evolve(scenario, founding=attrs.evolve(scenario.founding, mode="strict")), script)
    for by in (0, 1, 2):
        missed = seen(world, by, 3)
        assert missed.contributed < missed.rounds < seen(world, by, 1 if by != 1 else 2).rounds
        assert missed.quality is None, "the mean takes all alike"
        for of in {0, 1, 2} - {by}:
            assert seen(world, by, of).contributed == seen(world, by, of).rounds
    (table,) = tables
    row = table[world.members[3].peer[:8]]
    contributed, rounds = map(int, row[-1].split(",")[0].split("/"))
    # As long as its link is not known to be dead it is waited for, as one that is slow.
    assert len(row) == 3 and 4 <= contributed < rounds == int(row[1])


def test_a_node_that_is_killed_or_stopped_remembers_in_its_next_life() -> None:
    lives: list[tuple[Standing, int]] = []  # what it knew of node 2 at its end, and the rounds of this life

    async def live_for(world: World, rounds: int) -> None:
        member = world.members[1]
        await world.until(lambda: member.node.run_here is not None and len(member.run.reports) >= rounds, "rounds")

    def end(world: World) -> None:
        lives.append((seen(world, 1, 2), len(world.members[1].run.reports)))

    async def script(world: World) -> None:
        await live_for(world, 4)
        world.members[1].run.standings.audited(world.members[2].node.identity.peer_id, "unanswered")
        await trio.sleep(defaults.STANDINGS_EVERY + 1.0)
        world.kill(1)
        end(world)
        world.restart(1)
        await live_for(world, 4)
        world.stop(1)
        await world.until(lambda: world.members[1].ended, "its end")
        end(world)
        world.restart(1)
        await live_for(world, 4)

    world = simulate(tiny.scenario(4, 60, slowness=20.0), script)
    end(world)
    (killed, first), (stopped, second), (last, third) = lives
    assert killed.rounds == first
    # Being killed costs what was not written down yet, a goodbye nothing.
    round_takes = world.members[0].run.reports[-1].t / len(world.members[0].run.reports)
    assert 2 < first - defaults.STANDINGS_EVERY / round_takes - 1 <= stopped.rounds - second <= first
    assert last.rounds - third == stopped.rounds
    assert last.unanswered == stopped.unanswered == killed.unanswered == 1


def test_in_gossip_runs_a_peer_counts_the_rounds_of_its_own_groups() -> None:
    base = tiny.scenario(9, 10, slowness=5.0)
    founding = attrs.evolve(base.founding, strategy="noloco", strategy_args=(("inner_steps", 2.0),), group=4)
    world = simulate(attrs.evolve(base, founding=founding))
    for member in world.live():
        met: dict[str, int] = {}
        for report in member.run.reports:
            for peer in report.members:
                met[peer] = met.get(peer, 0) + 1
        del met[member.peer]
        assert {each.peer: each.contributed for each in member.node.standings()} == met
        assert torch.isfinite(member.run.weights()).all()
