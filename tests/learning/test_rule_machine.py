"""Rounds with rules other than the mean under every fault, message by message: real voters and leaders, no network."""

from __future__ import annotations

import itertools
import random

import attrs
import numpy as np
import pytest

from shoal.learning.aggregate import resolve
from shoal.learning.aggregate.products import pack_triangle, triangle_size, unpack_triangle
from shoal.learning.rounds.actions import Action, Measure, Send, Weigh
from shoal.learning.rounds.messages import Decided, Products
from shoal.learning.rounds.weighing import Weighed, decide, decided_fault, parts_to_tell, too_few, unfit
from shoal.transport.defaults import MAX_MESSAGE
from shoal.transport.identity import PeerId
from shoal.transport.wire import pack

from .round_table import Seat, Table
from .test_round_machine import actions_of, check_done, check_safe, run_with_kills

RULES = ("multikrum:f=1,definition=byzfl", "geometric_median", "nnm+median:f=1", "median", "descent:f=1+mean")


@pytest.mark.parametrize("rule", RULES)
def test_a_round_without_faults_ends_with_what_the_rule_makes_of_all(rule: str) -> None:
    for n in (3, 5, 8):
        table = Table(n, seed=n, rule=resolve(rule))
        table.run()
        check_done(table, within=5.0)
        record = table.commits()[0].record
        assert record.members == table.voters
        assert table.commits()[0].certificate.attempt == 0


@pytest.mark.parametrize("rule", RULES)
def test_four_peers_survive_a_kill_at_every_single_action(rule: str) -> None:
    chosen = resolve(rule)
    for kill in range(actions_of(4, 2, rule=chosen)):
        table = run_with_kills(4, 2, (kill,), rule=chosen)
        check_done(table, within=40.0)
        assert len(table.commits()[0].record.members) >= 3


def test_where_all_are_needed_a_kill_ends_the_round_with_the_reason_instead_of_a_result() -> None:
    rule, ends = resolve("nnm+trimmed_mean:f=1"), []
    for kill in range(actions_of(3, 4, rule=rule)):
        table = run_with_kills(3, 4, (kill,), rule=rule)
        check_done(table, within=60.0)
        record = table.commits()[0].record
        assert len(record.members) in (0, 3)
        if not record.members:
            assert "f = 1 of 2 vectors cannot be tolerated" in record.reason
            assert not any(seat.final.any() for seat in table.live() if seat.final is not None)
        ends.append(len(record.members))
    assert 0 in ends and 3 in ends


def test_two_kills_at_any_two_actions_leave_a_majority_that_finishes() -> None:
    rule = resolve("nnm+multikrum:f=1,definition=byzfl")
    total, chance = actions_of(6, 5, rule=rule), random.Random("pairs")
    for _ in range(120):
        kills = chance.randrange(total), chance.randrange(total)
        check_done(run_with_kills(6, 5, kills, rule=rule), within=90.0)


@pytest.mark.parametrize("kind", [Products, Decided])
@pytest.mark.parametrize("rule", ["geometric_median", "nnm+median:f=1"])
def test_lost_products_and_decisions_are_told_again(kind: type, rule: str) -> None:
    for seed, count in itertools.product(range(6), (1, 2, 3)):
        table, lost = Table(4, seed=seed, rule=resolve(rule)), []

        def drop(sender: PeerId, to: PeerId, message: object, lost: list[object] = lost, count: int = count) -> bool:
            if isinstance(message, kind) and len(lost) < count:
                lost.append(message)
                return True
            return False

        table.drops = drop
        table.run()
        check_done(table, within=30.0)
        assert len(lost) == count
        # Nobody is taken for lost because a message is.
        assert table.commits()[0].record.members == table.voters


@pytest.mark.parametrize("n", [4, 5])
def test_any_mixture_of_kills_losses_and_false_alarms_is_safe_and_ends(n: int) -> None:
    for seed in range(60):
        chance = random.Random(f"rules {n} {seed}")
        rule = resolve(chance.choice(RULES))
        table, share = Table(n, seed=seed, rule=rule), chance.choice((0.0, 0.1, 0.3))
        killed: list[Seat] = []

        def fault(_: Seat, table: Table = table, chance: random.Random = chance, killed: list[Seat] = killed) -> None:
            seat = chance.choice(table.live())
            match chance.choice(("kill", "freeze", "alarm")):
                case "kill" if not killed:
                    killed.append(seat)
                    table.kill(seat)
                    table.at(table.now + 3.0, next(v for v in table.voters if v != seat.me), lambda _: None)
                case "freeze":
                    table.freeze(seat, chance.uniform(1.0, 20.0))
                case "alarm":
                    seat.lose(chance.choice([v for v in table.voters if v != seat.me]))

        def calm(seat: Seat, table: Table = table) -> None:
            for other in table.voters:
                if other != seat.me:
                    (seat.find if table.seats[other].alive else seat.lose)(other)

        table.drops = lambda sender, to, message, table=table, chance=chance, share=share: (
            message is not None and table.now < 30.0 and chance.random() < share
        )
        for _ in range(6):
            table.at(chance.uniform(0.3, 15.0), chance.choice(table.voters), fault)
        for voter in table.voters:
            table.at(45.0, voter, calm)
        table.run(begin={voter: chance.uniform(0.0, 2.0) for voter in table.voters}, limit=400.0)
        check_safe(table)
        assert all(seat.commit is not None for seat in table.live()), (
            seed,
            [(s.me.short, s.voter.attempt, s.voter.phase, s.voter.reason) for s in table.live() if s.commit is None],
        )


# -- liars ----------------------------------------------------------------------------------------------


def off(found: Weighed) -> Weighed:
    matrix = np.frombuffer(found.data, "<f8").copy()
    matrix[np.flatnonzero(matrix)[0]] *= 1 + 1e-3
    return attrs.evolve(found, data=matrix.tobytes())


@pytest.mark.parametrize("rule", ["geometric_median", "multikrum:f=1,definition=byzfl", "nnm+median:f=1"])
def test_a_leader_that_decides_otherwise_is_refused_by_all_whoever_dies_meanwhile(rule: str) -> None:
    chosen = resolve(rule)
    for kill in (-1, *range(0, 160, 3)):
        table, count = Table(5, seed=3, rule=chosen), itertools.count()
        liar = table.seats[table.voters[0]].voter.leader(0)
        table.decides = lambda seat, found, liar=liar: off(found) if seat.me == liar else found  # type: ignore[misc]

        def hook(seat: Seat, action: Action, table: Table = table, kill: int = kill) -> None:
            if next(count) == kill:  # noqa: B023
                table.kill(seat)

        table.hook = hook
        table.run()
        check_done(table, within=60.0)
        if kill < 0:
            assert table.commits()[0].certificate.attempt == 1
            assert table.now < 5.0
            # The others may have heard of the next attempt first.
            told = [n for seat in table.live() for n in seat.notes if (n.phase, n.what) == ("combine", "refused")]
            assert len(told) >= 3
            assert all(n.peer == liar and "is refused: row 0 is off by" in n.detail for n in told)


def test_coefficients_that_are_off_by_less_than_is_promised_are_taken_and_are_the_same_for_all() -> None:
    table = Table(5, seed=3, rule=resolve("geometric_median"))
    liar = table.seats[table.voters[0]].voter.leader(0)

    def slightly(seat: Seat, found: Weighed) -> Weighed:
        if seat.me != liar:
            return found
        return attrs.evolve(found, data=(np.frombuffer(found.data, "<f8") * (1 + 3e-7)).tobytes())

    table.decides = slightly
    table.run()
    check_done(table, within=5.0)
    assert table.commits()[0].certificate.attempt == 0


@pytest.mark.parametrize("always", [False, True])
def test_an_owner_with_the_largest_products_pays_when_nothing_can_be_decided_from_the_sum(always: bool) -> None:
    table, times = Table(5, seed=3, rule=resolve("geometric_median")), []

    def undecided(seat: Seat, found: Weighed) -> Weighed:
        times.append(seat.me)
        return Weighed(wrong="it does not converge") if always or len(times) == 1 else found

    table.decides = undecided
    table.run()
    check_done(table, within=60.0)
    record = table.commits()[0].record
    assert ("decides nothing" if always else "are refused: in the sum, it does not converge") in record.reason
    assert len(record.members) == (0 if always else 4), record.reason
    assert len(times) < 20


def test_sixty_four_members_decide_together() -> None:
    table = Table(64, seed=1, length=3000, rule=resolve("multikrum:f=3"))
    table.run()
    check_done(table, within=5.0)
    assert table.commits()[0].record.members == table.voters


def weighing_round() -> tuple[Table, Seat, Seat]:
    """A round that waits for the products of one owner: (table, its leader's seat, that owner's)."""
    table = Table(4, seed=1, rule=resolve("geometric_median"))
    leader = table.seats[table.seats[table.voters[0]].voter.leader(0)]
    late = next(seat for seat in table.seats.values() if seat is not leader)
    table.drops = lambda sender, to, message: isinstance(message, Products) and sender == late.me
    table.run(limit=1.5)
    assert leader.leader is not None and leader.leader.phase == "weigh"
    return table, leader, late


def products_of_late(late: Seat) -> Products:
    message = late.voter._tell_products(late.voter.plan, late.voter.frozen)[0]  # type: ignore[arg-type]
    assert isinstance(message, Send) and isinstance(message.message, Products)
    return message.message


def test_products_that_nobody_asked_for_change_nothing() -> None:
    table, seat, late = weighing_round()
    leader, good = seat.leader, products_of_late(late)
    assert leader is not None
    other = next(s for s in table.seats.values() if s not in (seat, late))
    known = dict(leader._products)
    for sender, message in (
        (late.me, attrs.evolve(good, epoch=1)),
        (late.me, attrs.evolve(good, attempt=3)),
        (late.me, attrs.evolve(good, members=b"m" * 16)),
        (other.me, attrs.evolve(good, data=good.data[::-1])),  # it has spoken already
    ):
        assert leader.receive(table.now, sender, message) == []
        assert leader._products == known and leader.phase == "weigh"
    (action,) = leader.receive(table.now, late.me, good)
    assert isinstance(action, Weigh) and len(action.parts) == 4


def test_decisions_of_anybody_but_the_leader_or_of_other_members_change_nothing() -> None:
    table, seat, late = weighing_round()
    voter, leader = late.voter, seat.leader
    assert leader is not None
    (weigh,) = leader.receive(table.now, late.me, products_of_late(late))
    assert isinstance(weigh, Weigh)
    (sent, *_) = leader.weighed(table.now, weigh, decide(table.rule, table.key, weigh.parts, weigh.members))
    assert isinstance(sent, Send) and isinstance(sent.message, Decided)
    good = sent.message
    for sender, message in (
        (late.me, good),
        (seat.me, attrs.evolve(good, epoch=2)),
        (seat.me, attrs.evolve(good, members=b"")),
    ):
        assert voter.receive(table.now, sender, message) == []
        assert voter._decision is None
    plan, count, own = voter.plan, 4, voter._products
    assert plan is not None and own
    assert decided_fault(good, plan, late.me, own, count) is None
    for message, words in (
        (attrs.evolve(good, parts=()), "the inner products of 0 of 4 owners"),
        (attrs.evolve(good, parts=good.parts[:1]), "the inner products of 1 of 4 owners"),
        (attrs.evolve(good, parts=(bytes(len(own)),) * 4), "our inner products are not among"),
    ):
        found = decided_fault(message, plan, late.me, own, count)
        assert found is not None and words in found
    assert decided_fault(good, plan, late.me, b"", count) == "it was decided without our inner products"
    for parts, data in (
        (good.parts, good.data[:-1]),
        (good.parts, b""),
        (good.parts, np.full(4, np.nan).tobytes()),
        (good.parts, np.full(4, 1e300).tobytes()),
        ((*good.parts[:3], b"x"), good.data),
        ((*good.parts[:3], bytes(len(good.parts[0]))[:-8] + np.float64(-1e9).tobytes()), good.data),
    ):
        assert decide(table.rule, table.key, parts, count, said=data).wrong is not None
    assert decide(table.rule, table.key, good.parts, count, said=good.data).wrong is None


def test_nothing_is_measured_for_the_mean_and_for_rules_on_coordinates() -> None:
    for rule in ("mean", "median", "trimmed_mean:f=1"):
        table, seen = Table(4, seed=1, rule=resolve(rule)), []
        table.hook = lambda seat, action, seen=seen: (
            seen.append(type(action))
            or (  # type: ignore[func-returns-value]
                isinstance(action, Send) and seen.append(type(action.message))
            )
        )
        table.run()
        check_done(table, within=5.0)
        assert not {Measure, Weigh, Products, Decided} & set(seen)


# -- sizes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 16, 64, 256])
def test_what_travels_for_many_members_fits_into_a_message(count: int) -> None:
    chance = np.random.default_rng(count)
    vectors = chance.standard_normal((count, 40))
    gram = vectors @ vectors.T
    gram = (gram + gram.T) / 2
    part = pack_triangle(gram / count)
    assert len(part) == triangle_size(count)
    assert np.array_equal(unpack_triangle(part, count), gram / count)
    parts = parts_to_tell([part] * count, count)
    assert len(parts) == (count if count <= 16 else 1)
    data = np.eye(count).tobytes()  # of a rule on coordinates, after another one: the largest there is
    assert len(pack(Decided(bytes(32), 1 << 40, 1 << 40, bytes(16), parts, data))) < MAX_MESSAGE
    assert len(pack(Products(bytes(32), 1 << 40, 1 << 40, bytes(16), part))) < MAX_MESSAGE
    rule = resolve("geometric_median")
    made = decide(rule, b"k", parts, count)
    assert made.wrong is None and decide(rule, b"k", parts, count, said=made.data).wrong is None


def test_reasons_say_which_rule_needs_how_many() -> None:
    assert too_few(resolve("trimmed_mean:f=3"), 5) == (
        "trimmed_mean: f = 3 of 5 vectors cannot be tolerated: n > 2 f, so at least 7 vectors"
    )
    assert too_few(resolve("trimmed_mean:f=3"), 0) is None
    assert too_few(resolve("trimmed_mean:f=3"), 7) is None
    assert "rounds begin with 4 (min_peers): --min-peers 5 is enough" in (unfit(resolve("multikrum:f=1"), 4) or "")
    assert "no number of peers is enough" in (unfit(resolve("mda:f=30"), 4) or "")
    assert unfit(resolve("multikrum:f=1"), 5) is None
    assert "in rounds it is start=zero" in (unfit(resolve("centered_clipping"), 9) or "")
    assert unfit(resolve("centered_clipping:start=zero,iterations=3"), 9) is None
