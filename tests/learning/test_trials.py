"""Newcomers on trial: what a record may say of them, and rounds with them under every fault, without a network."""

from __future__ import annotations

import itertools
import random

import attrs
import numpy as np
import pytest
import torch

from shoal.learning import defaults
from shoal.learning.aggregate import resolve
from shoal.learning.reduce.robust import fits
from shoal.learning.rounds.actions import Send
from shoal.learning.rounds.messages import (
    Accept,
    Certificate,
    Commit,
    CommitRecord,
    Convene,
    Held,
    OnTrial,
    Plan,
    Progress,
    Ready,
    Reject,
    Signed,
)
from shoal.learning.rounds.planning import plan_fault
from shoal.learning.rounds.trials import MAX_TRIAL, Opinion, gathered, next_trial, passed, served, trial_fault
from shoal.learning.store import Head
from shoal.learning.trust import TrustPage, page_of
from shoal.transport.identity import Identity, PeerId
from shoal.transport.wire import pack, unpack

from .round_table import Seat, Table
from .test_round_machine import check_done, check_safe

KEY = bytes(range(32))
ME = sorted((Identity(bytes([i]) * 32) for i in range(9)), key=lambda one: one.peer_id)
PEERS = tuple(one.peer_id for one in ME)
MEMBERS, GUESTS = PEERS[:5], PEERS[5:8]


def record(**fields: object) -> CommitRecord:
    plain = CommitRecord(
        b"r" * 32, 1, "reduce", b"p" * 32, MEMBERS, (1,) * 5, (1,) * 5, MEMBERS, 5, 0, b"", (), "", b"", "why",
    )  # fmt: skip
    return attrs.evolve(plain, **fields)


def says(index: int, *fit: int, owns: bool = True, key: bytes = KEY, members: tuple[PeerId, ...] = MEMBERS) -> bytes:
    bits = sum(1 << at for at in fit)
    return Opinion.sign(ME[index], key, members, bits if owns else None).data


def on_trial(*left: int) -> tuple[OnTrial, ...]:
    return tuple(OnTrial(peer, each) for peer, each in zip(GUESTS, left, strict=False))


# --- records ----------------------------------------------------------------------------------------------------------


def test_a_record_without_anybody_on_trial_has_the_bytes_that_it_always_had() -> None:
    data = pack(record())
    assert b"trial" not in data
    assert b"opinions" not in data
    assert record().digest.hex() == "6d5c93401917a78cd14e1fb640561afbd4d867311247d0c07d27fbfbd9567fe5"
    assert unpack(CommitRecord, data) == record()


def test_a_record_with_somebody_on_trial_comes_back_as_it_was() -> None:
    full = record(trial=on_trial(2, 1), opinions=(says(0, 1), says(3, owns=False)))
    assert unpack(CommitRecord, pack(full)) == full
    assert full.digest != record().digest


def test_a_page_of_a_proof_with_the_largest_records_fits_into_a_message() -> None:
    voters = tuple(PeerId(i.to_bytes(32, "big")) for i in range(defaults.MAX_ROSTER))
    opinion = Opinion(0, True, (1 << MAX_TRIAL) - 1, bytes(64))
    opinions = tuple(attrs.evolve(opinion, index=i).data for i in range(len(voters)))
    trial = tuple(OnTrial(PeerId((1000 + i).to_bytes(32, "big")), 1000) for i in range(MAX_TRIAL))
    largest = record(
        members=voters, samples=(1 << 40,) * 256, weights=(1,) * 256, roster=voters, nonces=(bytes(16),) * 256,
        trial=trial, opinions=opinions, reason="x" * 400,
    )  # fmt: skip
    accepts = tuple(Signed(peer, bytes(64)) for peer in voters)
    links = (Head(largest, Certificate(KEY, 0, accepts), voters),) * 40
    at, pages = 0, 0
    while at < len(links):
        page = page_of(links, at)
        assert page.links
        assert page.total == 40
        assert unpack(TrustPage, pack(page)) == page  # within the bounds of messages
        at, pages = at + len(page.links), pages + 1
    assert pages <= 5
    small = (Head(record(), Certificate(KEY, 0, accepts[:3]), voters[:5]),) * 40
    assert len(page_of(small, 3).links) == defaults.TRUST_PAGE
    assert page_of(small, 40).links == ()


def test_a_round_counts_when_more_than_half_of_the_owners_find_the_work_fit() -> None:
    opinions = [says(0, 0), says(1, 0, 1), says(2, 0)]
    assert passed(opinions, 5, GUESTS) == GUESTS[:1]
    assert passed(opinions[:2], 5, GUESTS) == ()
    # Of four members two own nothing: one of the other two is not more than half.
    two = [says(2, owns=False), says(3, owns=False), says(0, 2)]
    assert passed(two, 4, GUESTS) == ()
    assert passed([*two, says(1, 2)], 4, GUESTS) == (GUESTS[2],)
    assert passed([], 5, GUESTS) == ()


def test_opinions_that_are_none_do_not_reach_a_record() -> None:
    good = says(1, 0)

    def progress(data: bytes) -> Progress:
        return Progress(KEY, 0, 0, (0,), b"n", (), data)

    said = {
        PEERS[0]: progress(says(0)),  # found nobody fit: the same as nothing
        PEERS[1]: progress(good),
        PEERS[2]: progress(says(1, 0)),  # another's
        PEERS[3]: progress(says(3, 0, key=bytes(32))),  # of another round
        PEERS[4]: progress(says(4, 3)),  # of somebody who is not on trial
        PEERS[5]: progress(b"nothing"),
    }
    assert gathered(said, KEY, MEMBERS, 3) == (good,)
    idle = {PEERS[2]: progress(says(2, owns=False))}
    assert gathered(idle, KEY, MEMBERS, 3) == (says(2, owns=False),)


def test_a_record_that_follows_from_its_opinions_is_accepted_and_no_other() -> None:
    before = on_trial(1, 2, 2)
    newcomer = PEERS[8]
    opinions = tuple(says(i, 0, 1) for i in (0, 1, 4))
    after = record(
        roster=tuple(sorted((*MEMBERS, GUESTS[0]))),
        trial=tuple(sorted((*on_trial(9, 1, 2)[1:], OnTrial(newcomer, 3)), key=lambda each: each.peer)),
        opinions=opinions,
    )

    def fault(**fields: object) -> str | None:
        return trial_fault(attrs.evolve(after, **fields), before, MEMBERS, KEY, 3)

    assert fault() is None
    # Whoever is left out begins anew; whoever is done may wait for a seat.
    assert fault(trial=()) is None
    assert fault(roster=MEMBERS, trial=(OnTrial(GUESTS[0], 1), *after.trial)) is None
    # A leader's friends: at once, earlier than they may, by what nobody said.
    assert "is not admitted" in str(fault(roster=tuple(sorted((*after.roster, newcomer))), trial=()))
    assert "is not admitted" in str(fault(roster=tuple(sorted((*after.roster, GUESTS[1]))), trial=()))
    assert "rounds of its trial left" in str(fault(trial=(OnTrial(GUESTS[1], 2),)))
    assert "rounds of its trial left" in str(fault(trial=(OnTrial(GUESTS[2], 1),)))
    assert "rounds of its trial left" in str(fault(trial=(OnTrial(newcomer, 1),)))
    assert "is not admitted" in str(fault(opinions=opinions[:2]))
    forged = Opinion.read(opinions[0])
    assert "wrong signature" in str(fault(opinions=(opinions[0], attrs.evolve(forged, index=3).data, opinions[2])))
    assert "wrong signature" in str(fault(opinions=(attrs.evolve(forged, fit=7).data, *opinions[1:])))
    assert "cannot know" in str(fault(opinions=(says(0, 3), *opinions[1:])))
    assert "not in order" in str(fault(opinions=(opinions[0], *opinions)))
    assert "not in order" in str(fault(opinions=opinions[::-1]))
    assert "of nobody" in str(fault(opinions=(*opinions, attrs.evolve(forged, index=9).data)))
    assert "no opinion" in str(fault(opinions=(b"x",)))
    # Votes and trials do not mix.
    assert "not in order, or votes" in str(fault(trial=(OnTrial(MEMBERS[0], 3),)))
    assert "not in order, or votes" in str(fault(trial=after.trial[::-1]))
    assert "not in order, or votes" in str(fault(trial=(OnTrial(GUESTS[0], 1),)))
    many = tuple(OnTrial(PeerId(i.to_bytes(32, "big")), 3) for i in range(MAX_TRIAL + 1))
    assert "than there may be" in str(fault(trial=many))


def test_a_run_without_admission_has_nobody_on_trial() -> None:
    assert trial_fault(record(roster=PEERS), (), MEMBERS, KEY, 0) is None
    assert trial_fault(record(trial=on_trial(1)), (), MEMBERS, KEY, 0) is not None
    assert trial_fault(record(opinions=(says(0, 0),)), (), MEMBERS, KEY, 0) is not None


@pytest.mark.parametrize("seed", range(200))
def test_what_a_leader_puts_together_is_what_voters_accept(seed: int) -> None:
    rng = random.Random(seed)
    before = tuple(OnTrial(peer, rng.randint(1, 3)) for peer in GUESTS[: rng.randint(0, 3)])
    guests = [each.peer for each in before]
    progress = {}
    for index in rng.sample(range(5), rng.randint(0, 5)):
        fit = [at for at in range(len(guests)) if rng.random() < 0.7]
        data = says(index, *fit, owns=True) if rng.random() < 0.8 else says(index, owns=False)
        progress[PEERS[index]] = Progress(KEY, 0, 0, (0,), b"n", (), data)
    opinions = gathered(progress, KEY, MEMBERS, len(guests))
    now = served(before, passed(opinions, 5, guests))
    present = {peer: None for peer in PEERS if rng.random() < 0.8}
    roster = tuple(
        sorted([p for p in MEMBERS if p in present] + [e.peer for e in now if e.left == 0 and e.peer in present])
    )
    roster = roster[: rng.randint(1, 8)] or MEMBERS[:1]
    wishes = tuple(rng.sample(PEERS, rng.randint(0, 9)))
    gone = {peer: None for peer in PEERS if rng.random() < 0.1}
    trial, _ = next_trial(now, roster, MEMBERS, present, gone, wishes, rng.randint(-1, 9), 3)
    found = record(roster=roster, trial=trial, opinions=opinions)
    assert trial_fault(found, before, MEMBERS, KEY, 3) is None
    assert not any(each.peer in gone for each in trial)


def test_the_number_on_trial_is_bounded_and_those_who_are_stay() -> None:
    wishes = tuple(PeerId(i.to_bytes(32, "big")) for i in range(1, 100))
    found, _ = next_trial((), MEMBERS, MEMBERS, PEERS, (), wishes, 1000, 3)
    assert len(found) == MAX_TRIAL
    found, why = next_trial(on_trial(2, 1), MEMBERS, MEMBERS, PEERS, (), wishes, 1, 3)
    assert [each.peer for each in found] == list(GUESTS[:2]), why


# --- what is fit ------------------------------------------------------------------------------------------------------


def test_fit_is_what_goes_where_the_result_goes_in_all_slices_together() -> None:
    result = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(1000, generator=torch.Generator().manual_seed(1))

    def fit(work: torch.Tensor) -> bool:
        return fits([(work[:300], result[:300]), (work[300:], result[300:])])

    assert fit(result)
    assert fit(1e-20 * result)
    assert fit(1e15 * result + noise)
    assert fit(result + 3.0 * noise)
    assert not fit(-result)
    assert not fit(torch.zeros(1000))
    assert not fits([(result[:300], torch.zeros(300))])
    lopsided = torch.cat([result[:300], -result[300:]])
    assert not fit(lopsided), "what is wrong in most numbers is not fit because it is right in one slice"
    assert fit(torch.cat([3.0 * result[:300], 0.0 * result[300:]]))


# --- rounds -----------------------------------------------------------------------------------------------------------


def table_of(voters: int, guests: int, *, seed: int = 0, rule: str = "median", unfit: tuple[int, ...] = ()) -> Table:
    """Those on trial send what lies near the voters' common part; the ``unfit`` its opposite."""
    table = Table(voters, guests=guests, admission=3, seed=seed, rule=resolve(rule))
    rng = np.random.default_rng(seed)
    common = rng.normal(size=table.length).astype(np.float32)
    for seat in table.seats.values():
        seat.vector = common + rng.normal(scale=0.3, size=table.length).astype(np.float32)
    for at in unfit:
        table.seats[table.guests[at]].vector *= -1
    return table


def check_trial(table: Table) -> CommitRecord:
    """What holds of every record: nobody on trial is in it, signed it, or votes next unless it is done."""
    check_safe(table)
    (commit, *_) = table.commits()
    found = commit.record
    assert trial_fault(found, table.trial, table.voters, table.key, 3) is None
    assert not set(table.guests) & set(found.members)
    assert not set(table.guests) & {accept.peer for accept in commit.certificate.accepts}
    assert set(table.guests) & set(found.roster) <= set(table.guests[:1])
    return found


@pytest.mark.parametrize("rule", ["mean", "median", "multikrum:f=1,definition=byzfl", "nnm+trimmed_mean:f=1"])
@pytest.mark.parametrize("seed", range(5))
def test_fit_work_counts_unfit_does_not_and_neither_has_weight(rule: str, seed: int) -> None:
    table = table_of(5, 3, seed=seed, rule=rule, unfit=(2,))
    table.wishes = (Identity(b"w" * 32).peer_id,)
    table.run()
    check_done(table, 20.0)
    found = check_trial(table)
    assert found.members == table.voters
    assert found.roster == tuple(sorted((*table.voters, table.guests[0]))), "it had one round left"
    left = {each.peer: each.left for each in found.trial}
    assert left == {table.guests[1]: 1, table.guests[2]: 3, table.wishes[0]: 3}
    for seat in table.seats.values():
        assert seat.final is not None


def test_one_voter_alone_judges_a_newcomer() -> None:
    table = table_of(1, 1)
    table.run()
    check_done(table, 20.0)
    assert table.guests[0] in check_trial(table).roster


def test_owners_that_lie_neither_admit_a_friend_nor_keep_anybody_out() -> None:
    table = table_of(5, 2, unfit=(1,))
    table.trial = tuple(OnTrial(peer, 1) for peer in table.guests)
    for seat in (table.seats[peer] for peer in table.voters[:2]):
        real = seat.voter.assessed

        def assessed(now, attempt, epoch, fit, real=real):  # type: ignore[no-untyped-def]
            return real(now, attempt, epoch, (table.guests[1],))

        seat.voter.assessed = assessed  # type: ignore[method-assign]
    table.run()
    check_done(table, 20.0)
    (commit, *_) = table.commits()
    assert table.guests[0] in commit.record.roster
    assert table.guests[1] not in commit.record.roster


def test_a_leader_that_admits_a_friend_is_refused_and_left() -> None:
    table = table_of(5, 2, unfit=(1,))
    first = table.seats[table.seats[table.voters[0]].voter.leader(0)]

    def hook(seat: Seat, action: object) -> None:
        leader = first.leader
        if seat is first and leader is not None and leader.record is not None and leader.phase == "seal":
            friend = table.guests[1]
            record = leader.record
            leader.record = attrs.evolve(
                record,
                roster=tuple(sorted({*record.roster, friend})),
                trial=tuple(each for each in record.trial if each.peer != friend),
            )

    table.hook = hook
    table.run()
    check_done(table, 60.0)
    found = check_trial(table)
    assert table.guests[1] not in found.roster
    assert any(seat.voter.attempt > 0 for seat in table.seats.values())


def test_where_voters_are_too_few_for_the_rule_newcomers_come_in_without_being_measured() -> None:
    """They could not be, and without them nothing would ever be combined again."""
    table = table_of(2, 2, rule="trimmed_mean:f=1")
    table.run()
    assert {seat.commit is not None for seat in table.seats.values()} == {True}
    record = table.commits()[0].record
    assert record.members == ()
    assert table.guests[0] in record.roster
    assert [each.left for each in record.trial] == [1]
    # Not so where enough vote, and a leader only says that nothing was combined.
    assert trial_fault(record, table.trial, table.voters, table.key, 3, few=False) is not None


def test_late_work_does_not_count_and_holds_nobody_up_beyond_the_grace_of_stragglers() -> None:
    table = table_of(4, 2)
    table.run(begin={table.guests[1]: 30.0})
    check_done(table, 60.0)
    found = check_trial(table)
    assert table.guests[0] in found.roster
    assert [each.left for each in found.trial] == [2], "as before: the round did not count"
    commits = [seat for seat in table.seats.values() if seat.me in table.voters]
    assert all(seat.commit is not None for seat in commits)


def test_nothing_that_a_newcomer_says_makes_anybody_lead_or_move() -> None:
    table = table_of(4, 1)
    guest = table.guests[0]
    said = [
        Ready(table.key, 1, 500, True, 10, 1, table.length, None, False, ""),
        Reject(table.key, 0, 500, "move on"),
        Convene(table.key, 1, 500),
        Held(table.key, 0, 0, table.voters, bytes(64)),
        Accept(table.key, 0, bytes(32), bytes(64)),
    ]
    for at, (to, message) in enumerate(itertools.product(table.voters, said)):
        when = 0.2 + 0.01 * at
        table.at(when, to, lambda seat, message=message: seat.hear(guest, message))  # type: ignore[misc]
    table.run()
    check_done(table, 20.0)
    assert all(table.seats[peer].voter.attempt == 0 for peer in table.voters)


@pytest.mark.parametrize("seed", range(150))
def test_whatever_happens_the_round_ends_and_those_on_trial_decide_nothing(seed: int) -> None:
    rng = random.Random(seed)
    voters, guests = rng.randint(1, 6), rng.randint(1, 3)
    rule = rng.choice(["mean", "median", "normalise+mean"])
    table = table_of(voters, guests, seed=seed, rule=rule, unfit=tuple(range(1, guests)) if rng.random() < 0.3 else ())
    minority = rng.sample(table.voters, (voters - 1) // 2)
    # Of those on trial all may die: nobody needs them.
    doomed = {peer: rng.uniform(0.0, 4.0) for peer in (*minority, *table.guests) if rng.random() < 0.5}
    frozen = [peer for peer in table.guests if peer not in doomed and rng.random() < 0.4]
    for peer, when in doomed.items():
        table.at(when, peer, lambda seat: table.kill(seat))
        if rng.random() < 0.5:
            back = table.voters[0] if table.voters[0] not in doomed else None
            if back is not None:
                table.at(when + rng.uniform(1.0, 15.0), back, lambda _, peer=peer: revive(table, peer))  # type: ignore[misc]
    for peer in frozen:
        seconds = rng.uniform(1.0, 30.0)
        table.at(rng.uniform(0.0, 4.0), peer, lambda seat, seconds=seconds: table.freeze(seat, seconds))  # type: ignore[misc]
    lossy = rng.random() < 0.3
    if lossy:
        # Whatever is said to those on trial, or by them, may be lost.
        table.drops = lambda sender, to, message: (
            message is not None
            and bool({sender, to} & set(table.guests))
            and not isinstance(message, Commit)
            and rng.random() < 0.3
        )
    begin = {peer: rng.uniform(0.0, 12.0) for peer in table.guests if rng.random() < 0.3}
    table.run(begin=begin)
    check_done(table, 300.0)
    check_trial(table)


def revive(table: Table, peer: PeerId) -> None:
    if not table.seats[peer].alive:
        table.restart(table.seats[peer])


def test_those_on_trial_own_nothing_and_a_plan_that_says_so_is_refused() -> None:
    table = table_of(4, 1)
    guest = table.guests[0]
    plans: list[Plan] = []

    def hook(seat: Seat, action: object) -> None:
        if isinstance(action, Send) and isinstance(action.message, Plan):
            plans.append(action.message)

    table.hook = hook
    table.run()
    check_done(table, 20.0)
    plan = plans[0]
    assert plan.trial == (guest,)
    assert guest in plan.receivers
    assert guest not in {piece.owner for piece in plan.slices}

    def fault(**fields: object) -> str | None:
        return plan_fault(attrs.evolve(plan, **fields), table.voters, 10_000, table.voters[0], None, table.guests)

    stolen = (attrs.evolve(plan.slices[0], owner=guest), *plan.slices[1:])
    assert fault(slices=stolen, members=(), samples=(), weights=()) == "an owner that is no receiver"
    both = tuple(sorted((*plan.members, guest)))
    assert "not voters" in str(fault(members=both, samples=(1,) * 5, weights=(1,) * 5))
    assert fault(trial=(table.voters[0],)) == "contributions of others than those on trial"
    assert fault(trial=(guest, guest)) == "contributions of others than those on trial"
