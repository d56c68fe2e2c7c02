"""Rounds under every fault we can think of, message by message: real voters and leaders, no network.

What must hold whatever happens: all commits of a round have one digest, no second value is ever chosen, everybody who
ends the round holds the same bits, and they are the mean over the members of the record, in its order. What must hold
while a majority lives: the round ends in time.
"""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch

from shoal.learning.aggregate import aggregate
from shoal.learning.rounds import remembering
from shoal.learning.rounds.actions import Action, Circulate, Send
from shoal.learning.rounds.messages import (
    Accept,
    Commit,
    CommitRecord,
    Freeze,
    Held,
    Plan,
    Progress,
    Propose,
    Ready,
    quorum,
)
from shoal.learning.rounds.weighing import seed_of
from shoal.transport.identity import PeerId

from .rings import rings  # noqa: F401
from .round_table import Seat, Table


def expected(table: Table, members: tuple[PeerId, ...], weights: tuple[int, ...]) -> np.ndarray:
    """The weighted mean over ``members`` in their order, in float32."""
    total = np.zeros(table.length, np.float32)
    for member, weight in zip(members, weights, strict=True):
        total += table.seats[member].vector * np.float32(weight)
    return total / np.float32(sum(weights)) if members else total


def check_safe(table: Table) -> None:
    commits = table.commits()
    assert len({commit.record.digest for commit in commits}) <= 1, "two values were committed"
    assert len(table.chosen()) <= 1, "two values were chosen"
    for commit in commits:
        record = commit.record
        assert record.digest in table.chosen()
        assert list(record.members) == sorted(record.members)
        if not table.rule.is_mean:
            check_rule(table, record)
            continue
        mean = expected(table, record.members, record.weights)
        for seat in (*table.seats.values(), *table.dead):
            if seat.commit is not None and seat.final is not None:
                assert seat.final.tobytes() == mean.tobytes(), (record.reason, record.members)


def check_rule(table: Table, record: CommitRecord) -> None:
    """Everybody who ends the round holds the same bits, and they are what the rule makes of the record's members. What
    the record remembers of them is what their vectors say, and of others what was known."""
    wanted, remembered = torch.zeros(table.length), dict(table.scores)
    if record.members:
        vectors = [torch.from_numpy(table.seats[member].vector) for member in record.members]
        scores = remembering.read(remembering.of(record.members, table.scores))
        found = aggregate(vectors, table.rule, seed=seed_of(table.key), scores=scores)
        wanted = found.vector
        remembered.update(zip(record.members, remembering.written(found.scores), strict=False))
    wrote = remembering.of(record.roster, remembering.known(record))
    expected = remembering.of(record.roster, remembered)
    assert all(abs(a - b) <= remembering.APART for a, b in zip(wrote, expected, strict=True)), (wrote, expected)
    ends = [seat for seat in (*table.seats.values(), *table.dead) if seat.commit is not None and seat.final is not None]
    for seat in ends:
        assert seat.final is not None and ends[0].final is not None
        assert seat.final.tobytes() == ends[0].final.tobytes(), record.reason
        assert np.linalg.norm(seat.final - wanted.numpy()) <= 1e-5 * float(wanted.norm()), record.reason


def check_done(table: Table, within: float) -> None:
    check_safe(table)
    for seat in table.live():
        assert seat.commit is not None, (table.now, seat.voter.phase, seat.voter.attempt, seat.voter.reason)
        assert seat.final is not None, (table.now, seat.voter.reason)
    assert table.now <= within


def actions_of(n: int, seed: int, **options: Any) -> int:
    """How many actions a round without faults has."""
    count = itertools.count()
    table = Table(n, seed=seed, **options)
    table.hook = lambda seat, action: next(count) and None
    table.run()
    check_done(table, within=5.0)
    return next(count)


def run_with_kills(n: int, seed: int, kills: tuple[int, ...], limit: float = 120.0, **options: Any) -> Table:
    """A round in which whoever is about to carry out action number k is killed, for every k in ``kills``."""
    table, count = Table(n, seed=seed, **options), itertools.count()

    def hook(seat: Seat, action: Action) -> None:
        if next(count) in kills:
            table.kill(seat)

    table.hook = hook
    table.run(limit=limit)
    return table


# -- kills ----------------------------------------------------------------------------------------------


def test_a_round_without_faults_commits_the_mean_of_all() -> None:
    for n in (1, 2, 3, 5, 8):
        table = Table(n, seed=n, weighted=True)
        table.run()
        check_done(table, within=5.0)
        assert table.commits()[0].record.members == table.voters


@pytest.mark.parametrize("seed", range(4))
def test_three_peers_survive_a_kill_at_every_single_action(seed: int) -> None:
    for kill in range(actions_of(3, seed)):
        check_done(run_with_kills(3, seed, (kill,)), within=40.0)


def test_five_peers_survive_a_kill_at_every_single_action() -> None:
    for kill in range(actions_of(5, 11, weighted=True)):
        check_done(run_with_kills(5, 11, (kill,), weighted=True), within=40.0)


def test_eight_peers_survive_a_kill_at_any_action() -> None:
    for kill in range(0, actions_of(8, 3), 7):
        check_done(run_with_kills(8, 3, (kill,)), within=40.0)


@pytest.mark.parametrize("n", [5, 7])
def test_two_kills_at_any_two_actions_leave_a_majority_that_finishes(n: int) -> None:
    total, chance = actions_of(n, 5), random.Random(f"pairs {n}")
    for _ in range(150):
        kills = chance.randrange(total), chance.randrange(total)
        check_done(run_with_kills(n, 5, kills), within=90.0)


def test_a_second_peer_may_die_at_any_moment_of_the_recovery_from_the_first() -> None:
    total, chance = actions_of(5, 7), random.Random("recovery")
    for first in range(0, total, 9):
        for after in (1, 2, 5, 12, 30, 60, chance.randrange(3, 90)):
            check_done(run_with_kills(5, 7, (first, first + after)), within=90.0)


# -- states that differ ---------------------------------------------------------------------------------


def with_another_state(n: int, seed: int, kill: int = -1) -> Table:
    """A round whose first leader holds another state than all others."""
    table, count = Table(n, seed=seed), itertools.count()
    first = table.seats[table.voters[0]].voter.leader(0)
    table.states[first] = b"another"

    def hook(seat: Seat, action: Action) -> None:
        if next(count) == kill:
            table.kill(seat)

    table.hook = hook
    table.run(limit=120.0)
    return table


@pytest.mark.parametrize("n", [3, 4, 5, 8])
def test_a_leader_whose_state_differs_is_followed_by_one_whose_state_is_that_of_most(n: int) -> None:
    for seed in range(5):
        table = with_another_state(n, seed)
        check_done(table, within=10.0)
        commit = table.commits()[0]
        assert commit.record.state == b""
        # It had accepted its own proposal, which binds nobody once most have promised without an accept.
        assert commit.certificate.attempt == 1
        assert commit.record.members == table.voters, "what it contributes is as good as ever"


def test_no_kill_at_any_moment_makes_two_values_of_two_states() -> None:
    for kill in range(0, 200, 3):
        table = with_another_state(5, 3, kill)
        check_done(table, within=60.0)
    for kill in range(0, 90, 2):
        check_safe(with_another_state(3, 4, kill))


# -- majorities -----------------------------------------------------------------------------------------


def test_without_a_majority_nobody_commits_anything_new() -> None:
    for seed, n in ((1, 2), (2, 2), (3, 3), (4, 5)):
        total, chance = actions_of(n, seed), random.Random(f"minority {n} {seed}")
        for _ in range(30):
            first = chance.randrange(total)
            kills = tuple(first + i for i in range(n // 2 + n % 2))
            table = run_with_kills(n, seed, kills, limit=60.0)
            check_safe(table)
            if len(table.live()) < quorum(n) and not table.chosen():
                assert not table.commits()


def test_a_killed_peer_that_comes_back_with_its_votes_never_makes_two_values() -> None:
    total = actions_of(3, 9)
    for n, seed, kill, wait in itertools.product((2, 3), (9,), range(0, total, 2), (1.0, 8.0)):
        table, count = Table(n, seed=seed), itertools.count()

        def hook(seat: Seat, action: Action, table: Table = table, kill: int = kill, wait: float = wait) -> None:
            if next(count) == kill:  # noqa: B023
                table.kill(seat)
                table.at(table.now + wait, other_than(table, seat), lambda _: table.restart(seat))

        table.hook = hook
        table.run(limit=150.0)
        check_done(table, within=120.0)


def other_than(table: Table, seat: Seat) -> PeerId:
    return next(peer for peer in table.voters if peer != seat.me)


def test_a_leader_that_restarts_after_its_proposal_does_not_use_its_ballot_again() -> None:
    table = Table(3, seed=4)
    leader = table.seats[table.voters[0]].voter.leader(0)
    proposals: list[tuple[PeerId, int, bytes]] = []

    def hook(seat: Seat, action: Action) -> None:
        if isinstance(action, Send) and isinstance(action.message, Propose):
            value = (seat.me, action.message.attempt, action.message.record.digest)
            if value not in proposals:
                proposals.append(value)
            if seat.me == leader and seat is table.seats[leader] and not table.dead and action.to != seat.me:
                table.kill(seat)  # after it has told itself at most
                table.at(table.now + 0.6, other_than(table, seat), lambda _: table.restart(seat))

    table.hook = hook
    table.run(limit=150.0)
    check_done(table, within=120.0)
    assert len({(peer, attempt) for peer, attempt, _ in proposals}) == len(proposals)


def test_a_committer_that_dies_after_telling_one_member_has_committed_for_all() -> None:
    for seed in range(20):
        table, told = Table(5, seed=seed), []

        def hook(seat: Seat, action: Action, table: Table = table, told: list[Commit] = told) -> None:
            if isinstance(action, Send) and isinstance(action.message, Commit) and action.to != seat.me:
                if len(told) == 1 and seat.voter.leader() == seat.me:
                    told.append(action.message)
                    table.kill(seat)
                elif not told:
                    told.append(action.message)

        table.hook = hook
        table.run()
        check_done(table, within=60.0)
        assert len(table.live()) == 4
        assert {commit.record.digest for commit in table.commits()} == {told[0].record.digest}


# -- silence, loss, suspicion ---------------------------------------------------------------------------


def test_a_peer_frozen_for_a_minute_at_any_action_holds_nobody_up_and_learns_the_commit() -> None:
    for frozen in range(0, actions_of(4, 2), 3):
        table, count, victim = Table(4, seed=2), itertools.count(), []

        def hook(
            seat: Seat, action: Action, table: Table = table, frozen: int = frozen, victim: list[Seat] = victim
        ) -> None:
            if next(count) == frozen:  # noqa: B023
                table.freeze(seat, 60.0)
                victim.append(seat)
            elif victim and seat is not victim[0] and seat.commit is not None and seat.final is not None:
                assert table.now < 62.0

        table.hook = hook
        table.run(limit=200.0)
        check_done(table, within=130.0)


def test_lost_messages_delay_a_round_but_never_split_or_stop_it() -> None:
    for seed in range(60):
        table, chance = Table(4, seed=seed), random.Random(f"loss {seed}")
        share = (0.05, 0.2, 0.4)[seed % 3]
        table.drops = lambda sender, to, message, table=table, chance=chance, share=share: (
            message is not None and table.now < 40.0 and chance.random() < share
        )
        table.run(limit=300.0)
        check_done(table, within=200.0)


@pytest.mark.parametrize("kind", [Ready, Plan, Held, Freeze, Progress, Propose, Accept, Commit])
def test_any_one_kind_of_message_may_be_lost_to_all_for_ten_seconds(kind: type) -> None:
    for seed in range(3):
        table = Table(4, seed=seed)
        table.drops = lambda sender, to, message, table=table: isinstance(message, kind) and table.now < 10.0
        table.run(limit=200.0)
        check_done(table, within=90.0)


def test_a_broken_way_between_any_two_peers_does_not_stop_the_round() -> None:
    for seed in range(6):
        for one, other in itertools.combinations(range(4), 2):
            table = Table(4, seed=seed)
            pair = table.voters[one], table.voters[other]
            table.at(0.9, pair[0], lambda seat, table=table, pair=pair: table.sever(*pair))
            table.run(limit=300.0)
            check_safe(table)
            # Whoever cannot reach a holder of the result may have to wait for another way to it, nobody else.
            assert sum(seat.commit is not None for seat in table.live()) >= 3


def test_two_leaders_at_once_never_commit_two_values() -> None:
    """Half of the voters are told that leaders are lost while they are not, again and again, at random moments."""
    for seed in range(60):
        table, chance = Table(5, seed=seed), random.Random(f"split {seed}")
        for _ in range(6):
            when = chance.uniform(0.5, 8.0)
            for peer in chance.sample(table.voters, 2):
                table.at(when, peer, lambda seat: seat.lose(seat.voter.leader()))
                table.at(when + chance.uniform(0.1, 4.0), peer, find_all)
        table.run(limit=300.0)
        check_done(table, within=150.0)


def find_all(seat: Seat) -> None:
    for peer in seat.table.voters:
        seat.find(peer)


def test_slow_voters_are_left_out_of_the_mean_and_still_end_with_its_bits() -> None:
    table = Table(4, seed=1)
    slow = next(v for v in table.voters if v != table.seats[v].voter.leader(0))
    table.run(begin={slow: 30.0})
    check_done(table, within=10.0)
    assert slow not in table.commits()[0].record.members
    assert slow in table.commits()[0].record.roster


def test_a_slow_leader_leads_while_it_trains() -> None:
    table = Table(4, seed=1)
    leader = table.seats[table.voters[0]].voter.leader(0)
    table.run(begin={leader: 30.0})
    check_done(table, within=10.0)
    assert leader not in table.commits()[0].record.members


# -- contributions --------------------------------------------------------------------------------------


def test_when_nobody_contributes_the_round_commits_zeros_of_nobody() -> None:
    table = Table(4, seed=2)
    for seat in table.seats.values():
        seat.contributes = False
    table.run()
    check_done(table, within=10.0)
    record = table.commits()[0].record
    assert record.members == () and record.total == 0
    assert all(seat.final is not None and not seat.final.any() for seat in table.live())


def test_whoever_refuses_to_contribute_is_named_in_the_reason() -> None:
    table = Table(3, seed=2)
    table.seats[table.voters[1]].contributes = False
    table.run()
    check_done(table, within=10.0)
    record = table.commits()[0].record
    assert record.members == (table.voters[0], table.voters[2])
    assert f"without a contribution: {table.voters[1].short}" in record.reason


def test_weights_are_those_of_the_members() -> None:
    for kill in range(0, actions_of(4, 6, weighted=True), 5):
        table = run_with_kills(4, 6, (kill,), weighted=True)
        check_done(table, within=40.0)
        record = table.commits()[0].record
        assert record.weights == tuple(table.weight(member) for member in record.members)


# -- gossip ---------------------------------------------------------------------------------------------


def test_a_gossip_pair_survives_the_death_of_either_at_every_action() -> None:
    for seed in range(4):
        for kill in range(actions_of(2, seed, gossip=True)):
            table = run_with_kills(2, seed, (kill,), gossip=True)
            check_gossip(table)
            assert table.now < 60.0


def test_a_gossip_pair_whose_way_breaks_goes_on_separately() -> None:
    for seed, when in itertools.product(range(4), (0.1, 0.5, 0.9, 1.0, 1.1, 1.2, 1.3, 1.5)):
        table = Table(2, seed=seed, gossip=True)
        table.at(when, table.voters[0], lambda seat, table=table: table.sever(*table.voters))
        table.run(limit=120.0)
        check_gossip(table)


def check_gossip(table: Table) -> None:
    """Groups may split when a way breaks; but everybody ends, and equal digests have equal bits."""
    for seat in table.live():
        assert seat.commit is not None, (table.now, seat.voter.phase, seat.voter.attempt, seat.voter.reason)
        assert seat.final is not None
    for seat in (*table.seats.values(), *table.dead):
        if seat.commit is not None and seat.final is not None:
            record = seat.commit.record
            assert seat.final.tobytes() == expected(table, record.members, record.weights).tobytes()


def test_the_same_seed_gives_the_same_round() -> None:
    traces = []
    for _ in range(2):
        trace: list[str] = []
        table = Table(4, seed=8)
        table.hook = lambda seat, action, trace=trace: trace.append(f"{seat.me.short} {action!r}"[:200])
        table.run()
        traces.append(trace)
    assert traces[0] == traces[1]


@pytest.mark.parametrize("n", [3, 4, 5])
def test_any_mixture_of_faults_is_safe_and_ends_when_they_do(n: int) -> None:
    """Kills with restarts, freezes, losses, false alarms, slow voters; a majority's memory survives."""
    for seed in (*range(60), 221):  # 221: a leader once spun in the time for stragglers
        table, chance = Table(n, seed=seed, weighted=True), random.Random(f"mixture {n} {seed}")
        down: list[Seat] = []
        share = chance.choice((0.0, 0.1, 0.3))

        def fault(_: Seat, table: Table = table, chance: random.Random = chance, down: list[Seat] = down) -> None:
            seat = chance.choice(list(table.seats.values()))
            match chance.choice(("kill", "restart", "freeze", "alarm", "calm")):
                case "kill" if seat.alive and len(down) < (n - 1) // 2:
                    table.kill(seat)
                    down.append(seat)
                case "restart" if down and down[0].commit is None:
                    table.restart(down.pop(0))
                case "freeze" if seat.alive:
                    table.freeze(seat, chance.uniform(1.0, 30.0))
                case "alarm" if seat.alive:
                    seat.lose(chance.choice([v for v in table.voters if v != seat.me]))
                case "calm" if seat.alive:
                    find_all(seat)

        def calm(seat: Seat, table: Table = table) -> None:
            for other in table.voters:
                if table.seats[other].alive:
                    seat.find(other)
                elif other != seat.me:
                    seat.lose(other)

        table.drops = lambda sender, to, message, table=table, chance=chance, share=share: (
            message is not None and table.now < 40.0 and chance.random() < share
        )
        for _ in range(10):
            table.at(chance.uniform(0.3, 25.0), chance.choice(table.voters), fault)
        for voter in table.voters:
            table.at(60.0, voter, calm)
        table.run(begin={voter: chance.uniform(0.0, 4.0) for voter in table.voters}, limit=400.0)
        check_safe(table)
        assert all(seat.commit is not None for seat in table.live()), (
            seed,
            [(s.me.short, s.voter.attempt, s.voter.phase, s.voter.reason) for s in table.live() if s.commit is None],
        )


# -- rings ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("rings")
def test_a_ring_without_faults_commits_the_mean_of_all_in_one_epoch() -> None:
    for n in (3, 4, 5, 8):
        table, passed = Table(n, seed=n, weighted=True), list[Circulate]()
        table.hook = lambda seat, action, passed=passed: isinstance(action, Circulate) and passed.append(action)
        table.run()
        check_done(table, within=5.0)
        assert table.commits()[0].record.members == table.voters
        plans = [seat.voter.plan for seat in table.live()]
        assert all(plan is not None and plan.ring and plan.epoch == 0 for plan in plans)
        slices = plans[0].slices if plans[0] is not None else ()
        assert len(passed) == n * len(slices) and not any(seat.parts for seat in table.live())


@pytest.mark.usefixtures("rings")
@pytest.mark.parametrize("n", [3, 5])
def test_a_kill_at_every_single_action_of_a_ring_costs_an_epoch_at_most(n: int) -> None:
    for kill in range(actions_of(n, 11, weighted=True)):
        table = run_with_kills(n, 11, (kill,), weighted=True)
        check_done(table, within=40.0)


@pytest.mark.usefixtures("rings")
@pytest.mark.parametrize("n", [4, 5])
def test_two_kills_at_any_two_actions_of_a_ring_leave_a_majority_that_finishes(n: int) -> None:
    count = actions_of(5, 2)
    for first, second in itertools.combinations(range(0, count, 11), 2):
        check_done(run_with_kills(5, 2, (first, second)), within=60.0)


@pytest.mark.usefixtures("rings")
def test_a_way_that_breaks_in_a_ring_costs_its_deadline_and_then_a_butterfly() -> None:
    test_a_broken_way_between_any_two_peers_does_not_stop_the_round()


@pytest.mark.usefixtures("rings")
def test_a_peer_frozen_in_a_ring_holds_nobody_up_for_longer_than_in_a_butterfly() -> None:
    for freeze in range(0, actions_of(4, 5), 3):
        table, count = Table(4, seed=5), itertools.count()

        def hook(seat: Seat, action: Action, table: Table = table, count: Any = count, freeze: int = freeze) -> None:
            if next(count) == freeze:
                table.freeze(seat, 60.0)

        table.hook = hook
        table.run(limit=200.0)
        check_done(table, within=100.0)
        assert all(seat.commit is not None for seat in table.live())


@pytest.mark.usefixtures("rings")
def test_what_is_refused_in_a_ring_is_sent_to_owners_who_can_tell_whose_it_is() -> None:
    table = Table(4, seed=3)

    def hook(seat: Seat, action: Action) -> None:
        if isinstance(action, Circulate) and action.epoch == 0 and seat.me == table.voters[2]:
            table.at(table.now, seat.me, lambda s: s.do(s.voter.sum_refused(0, 0, "what came is not finite")))

    table.hook = hook
    table.run()
    check_done(table, within=10.0)
    record = table.commits()[0].record
    assert record.members == table.voters and f"does not close at {table.voters[2].short}" in record.reason
    assert all(seat.voter.ring_broken for seat in table.live())


@pytest.mark.usefixtures("rings")
@pytest.mark.parametrize("n", [3, 4])
def test_any_mixture_of_faults_is_safe_with_rings(n: int) -> None:
    test_any_mixture_of_faults_is_safe_and_ends_when_they_do(n)
