"""Branches in available mode: what is one within a branch, and that branches that meet end in one state."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.learning.chain import Chain
from shoal.learning.rounds.messages import CommitRecord
from shoal.node.node import Founding
from shoal.sim.world import Member, Scenario, World, simulate
from shoal.transport.memory import Route

from ..sim.tiny import PLAIN, Pull
from .model.seats import RUN

# -- which of two histories wins ------------------------------------------------------------------------

heads = st.builds(
    partial(
        CommitRecord, run=RUN, members=(), samples=(), weights=(), roster=(), state=b"", nonces=(), algorithm="",
        fingerprint=b"", reason="",
    ),
    round=st.integers(1, 3),
    kind=st.sampled_from(["enrol", "reduce", "branch"]),
    prev=st.sampled_from([b"a" * 32, b"b" * 32, b"c" * 32]),
    total=st.integers(0, 2),
    branch=st.integers(0, 2),
)  # fmt: skip


@given(heads, heads)
def test_of_two_different_heads_exactly_one_wins(a: CommitRecord, b: CommitRecord) -> None:
    assert Chain._beats(a, b) + Chain._beats(b, a) == (a != b)


@given(st.lists(heads, min_size=3, max_size=6))
def test_in_whatever_order_peers_meet_all_end_with_the_same_head(found: list[CommitRecord]) -> None:
    ends = set()
    for order in itertools.islice(itertools.permutations(found), 120):
        best = order[0]
        for head in order[1:]:
            best = head if Chain._beats(head, best) else best
        ends.add(best.digest)
    assert len(ends) == 1


# -- whole nodes in virtual time ------------------------------------------------------------------------


class Slow(Pull):
    """Rounds of about three seconds."""

    step_seconds = 1.5


def meet(nodes: int, groups: tuple[tuple[int, ...], ...], seed: int, rounds: int, *, kill: int | None = None) -> World:
    """Nodes that are parted into ``groups`` until each has gone on for some rounds, and then meet again.

    ``kill``: a node that dies just as the ways are cut, and comes back when they are mended.
    """
    seen: dict[tuple[int, bytes, int], bytes] = {}
    twice: list[str] = []

    def event(member: Member, event: object) -> None:
        if (event.phase, event.what) != ("commit", "done"):  # type: ignore[attr-defined]
            return
        record = member.run.membership.head.record
        place = (record.round, record.prev, record.branch)
        if seen.setdefault(place, record.digest) != record.digest:
            twice.append(record.reason)

    async def script(world: World) -> None:
        world.hooks.append(event)
        live = [n for group in groups for n in group if n != kill]

        def there(round: int) -> bool:
            return all(world.members[n].run.round >= round for n in live)

        await world.until(
            lambda: all(m.node.run_here is not None and m.run.round >= 2 for m in world.live()), "2 rounds"
        )
        world.partition(*groups)
        if kill is not None:
            world.kill(kill)
        at = max(world.members[n].run.round for n in live)
        await world.until(lambda: there(at + 2), "branches", 400.0)
        digests = {world.members[group[0]].run.digest() for group in groups if group[0] != kill}
        assert len(digests) > 1, "they did not go apart"
        world.heal()
        if kill is not None:
            world.restart(kill)

    founding = Founding(strategy="diloco", strategy_args=PLAIN, mode="available", min_peers=nodes, rounds=rounds)
    world = simulate(Scenario(nodes, founding, make_task=Slow, route=Route(latency=0.02), late=(), seed=seed), script)
    live = world.live()
    assert [member.run.round for member in live] == [rounds] * nodes
    assert len({member.run.digest() for member in live}) == 1
    assert len({member.run.weights().numpy().tobytes() for member in live}) == 1
    assert seen
    assert not twice, "two results within a branch"
    return world


@pytest.mark.parametrize(
    ("nodes", "groups", "seed"),
    [
        (3, ((0,), (1, 2)), 1),
        (4, ((0, 1), (2, 3)), 2),
        (4, ((0,), (1,), (2, 3)), 3),
    ],
)
def test_branches_that_meet_end_in_one_state(nodes: int, groups: tuple[tuple[int, ...], ...], seed: int) -> None:
    meet(nodes, groups, seed, 40)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 16))
@pytest.mark.parametrize(
    ("nodes", "groups", "kill"),
    [
        (3, ((0,), (1,), (2,)), None),
        (4, ((0, 1), (2, 3)), 3),
        (5, ((0, 1), (2,), (3, 4)), None),
        (5, ((0, 1, 2), (3, 4)), 2),
    ],
)
def test_branches_of_any_shape_that_meet_end_in_one_state(
    nodes: int, groups: tuple[tuple[int, ...], ...], kill: int | None, seed: int
) -> None:
    meet(nodes, groups, seed, 60, kill=kill)
