"""The pure choices of a round."""

from __future__ import annotations

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.learning.rounds.decisions import (
    better,
    candidates,
    contributors,
    group_of,
    may_abandon,
    may_begin,
    may_branch,
    next_roster,
    proposal_of,
    resume_at,
    short,
)
from shoal.learning.rounds.messages import Ready, quorum
from shoal.transport.identity import Identity, PeerId

PEERS = tuple(sorted(Identity(bytes([n]) * 32).peer_id for n in range(1, 41)))

rosters = st.lists(st.sampled_from(PEERS), min_size=1, max_size=12, unique=True).map(lambda p: tuple(sorted(p)))
digests = st.binary(min_size=32, max_size=32)
#: Seconds; whole quarters, because torch flushes denormals to zero in this process and hypothesis wants them.
moments = st.integers(0, 200).map(lambda quarters: quarters / 4)


# -- who leads ------------------------------------------------------------------------------------------


@given(rosters, digests, st.integers(0, 2**40))
def test_candidates_are_all_voters_in_an_order_that_does_not_depend_on_theirs(
    voters: tuple[PeerId, ...], prev: bytes, round: int
) -> None:
    order = candidates(prev, round, voters)
    assert sorted(order) == list(voters)
    assert candidates(prev, round, tuple(reversed(voters))) == order


@given(rosters, digests, st.integers(0, 2**40))
def test_a_voter_that_leaves_does_not_change_the_order_of_the_others(
    voters: tuple[PeerId, ...], prev: bytes, round: int
) -> None:
    order = candidates(prev, round, voters)
    assert candidates(prev, round, voters[1:]) == tuple(peer for peer in order if peer != voters[0])


def test_everybody_leads_about_equally_often() -> None:
    voters = PEERS[:5]
    firsts = [candidates(b"d" * 32, round, voters)[0] for round in range(1000)]
    assert all(140 < firsts.count(peer) < 260 for peer in voters)


def test_the_commit_before_decides_who_leads_so_that_nobody_can_grind_an_id() -> None:
    orders = [candidates(bytes([n]) * 32, 7, PEERS[:6]) for n in range(20)]
    assert len(set(orders)) > 15


# -- who contributes -------------------------------------------------------------------------------------


def ready(length: int = 8, codec: str = "fp32", layout: str = "3, 5", weight: int = 1, why: str = "") -> Ready:
    return Ready(b"k" * 32, 1, 0, not why, 1, weight, length, None, False, why, codec=codec, layout=layout)


def test_whose_contribution_is_of_another_kind_than_most_is_left_out_and_told_in_which_respect() -> None:
    odd = {
        PEERS[1]: (ready(length=9), "another length: 9 instead of 8"),
        PEERS[2]: (ready(codec="int8"), "another codec: int8 instead of fp32"),
        PEERS[3]: (ready(layout="5, 3"), "other tensors: 5, 3 instead of 3, 5"),
        PEERS[4]: (ready(layout=""), "other tensors: not named instead of 3, 5"),
        PEERS[5]: (ready(weight=0), "without weight"),
        PEERS[6]: (ready(why="no samples"), "no samples"),
    }
    usual = {peer: ready() for peer in PEERS[7:10]}
    for peer, (message, words) in odd.items():
        members, kind, without = contributors({peer: message, **usual})
        assert members == PEERS[7:10]
        assert kind == (8, "fp32", "3, 5")
        assert without == f"; without a contribution: {peer.short} ({words})"
    assert contributors(usual)[2] == ""


def test_of_two_kinds_that_are_equally_common_everybody_names_the_same_one() -> None:
    voices = [(PEERS[number], ready(layout=("3, 5", "5, 3")[number % 2])) for number in range(4)]
    found = {contributors(dict(order))[:2] for order in (voices, voices[::-1])}
    assert found == {((PEERS[1], PEERS[3]), (8, "fp32", "5, 3"))}


# -- when a round begins --------------------------------------------------------------------------------


@given(rosters, st.data(), moments, st.none() | moments)
def test_a_round_never_begins_without_a_quorum(
    voters: tuple[PeerId, ...], data: st.DataObject, now: float, grace_until: float | None
) -> None:
    ready = dict.fromkeys(data.draw(st.lists(st.sampled_from(voters), unique=True)))
    lost = dict.fromkeys(data.draw(st.lists(st.sampled_from(voters), unique=True)))
    needed = quorum(len(voters))
    go, reason = may_begin(voters, ready, lost, needed, now, grace_until)
    assert reason
    if go:
        assert len(ready) >= needed
    elif len(ready) >= needed:
        # It waits only for voters that may still come, and never beyond the time for them.
        assert any(voter not in ready and voter not in lost for voter in voters)
        assert grace_until is None or now < grace_until


def test_the_reason_names_whom_a_round_waits_for_and_whom_it_left_behind() -> None:
    voters = PEERS[:4]
    ready, name = dict.fromkeys(voters[:3]), voters[3].short
    assert may_begin(voters, ready, {}, 3, 0.0, 5.0) == (False, f"waiting for {name}")
    assert may_begin(voters, ready, {voters[3]: None}, 3, 0.0, 5.0) == (
        True,
        f"all but lost voters are ready; lost: {name}",
    )
    assert may_begin(voters, ready, {}, 3, 5.0, 5.0) == (
        True,
        f"a quorum is ready and the time for stragglers is over; missing: {name}",
    )
    assert may_begin(voters, dict.fromkeys(voters), {}, 3, 0.0, None) == (True, "all voters are ready")
    assert may_begin(voters, dict.fromkeys(voters[:2]), {}, 3, 0.0, None) == (False, "2 of 4 ready, 3 needed")


def test_an_accepted_value_is_given_up_in_strict_mode_only_when_every_voter_says_it_is_gone() -> None:
    voters = PEERS[:3]
    some, every = dict.fromkeys(voters[:2]), dict.fromkeys(voters)
    assert may_abandon(voters, every, {}, True, 0.0, None)[0]
    assert not may_abandon(voters, some, {voters[2]: None}, True, 100.0, 1.0)[0]
    assert may_abandon(voters, some, {voters[2]: None}, False, 100.0, 1.0)[0]
    assert not may_abandon(voters, some, {}, False, 100.0, 1.0)[0]
    assert not may_abandon(voters, some, {voters[2]: None}, False, 0.5, 1.0)[0]


# -- the next roster ------------------------------------------------------------------------------------


@given(rosters, rosters, rosters, rosters, st.integers(1, 20))
def test_the_next_roster_is_who_is_present_and_stays_and_then_who_wishes(
    voters: tuple[PeerId, ...],
    present: tuple[PeerId, ...],
    leaving: tuple[PeerId, ...],
    wishes: tuple[PeerId, ...],
    limit: int,
) -> None:
    roster, reason = next_roster(voters, present, leaving, wishes, limit)
    assert list(roster) == sorted(set(roster))
    assert reason
    for peer in voters:
        assert (peer in roster) >= (peer in present and peer not in leaving)
    for peer in roster:
        assert peer not in leaving
        assert (peer in voters and peer in present) or peer in wishes
    assert len(roster) <= max(limit, len(voters))


def test_the_reason_of_a_roster_tells_who_left_who_was_lost_and_who_joined() -> None:
    a, b, c, d = PEERS[:4]
    roster, reason = next_roster((a, b, c), {a: None, b: None}, {b: None}, (d,), 8)
    assert roster == (a, d)
    assert reason == f"left: {b.short}; lost: {c.short}; joined: {d.short}"
    assert next_roster((a, b), {a: None, b: None}, (), (), 8)[1] == "unchanged"


# -- lost majorities ------------------------------------------------------------------------------------


@given(st.sampled_from(["strict", "available"]), st.integers(1, 50), st.integers(0, 50), moments)
def test_survivors_go_on_as_a_branch_only_without_a_majority_in_available_mode_after_the_lease(
    mode: str, voters: int, alive: int, stalled: float
) -> None:
    alive = min(alive, voters)
    go, reason = may_branch(mode, voters, alive, stalled, 15.0)
    assert go == (mode == "available" and alive < quorum(voters) and stalled >= 15.0)
    assert f"{alive} of {voters}" in reason


@given(st.integers(0, 9), digests, st.integers(0, 9), digests)
def test_of_two_different_branches_exactly_one_is_better(a: int, one: bytes, b: int, other: bytes) -> None:
    assert better(a, one, b, other) + better(b, other, a, one) == ((a, one) != (b, other))
    if a > b:
        assert better(a, one, b, other)


# -- gossip groups --------------------------------------------------------------------------------------


@given(
    st.integers(-(2**62), 2**62),
    st.integers(0, 2**40),
    st.lists(st.sampled_from(PEERS), min_size=1, unique=True),
    st.integers(1, 12),
)
def test_groups_partition_the_view_evenly_and_all_members_see_the_same_group(
    seed: int, round: int, view: list[PeerId], size: int
) -> None:
    groups = {peer: group_of(seed, round, peer, view, size)[0] for peer in view}
    for peer, group in groups.items():
        assert peer in group
        assert list(group) == sorted(group)
        assert len(group) <= size
        assert all(groups[other] == group for other in group)
        assert group_of(seed, round, peer, list(reversed(view)), size)[0] == group
    widths = {len(group) for group in groups.values()}
    assert max(widths) - min(widths) <= 1


def test_pairs_change_from_round_to_round() -> None:
    partners = {group_of(1, round, PEERS[0], PEERS[:8], 2)[0] for round in range(60)}
    assert len(partners) == 7


# -- small ones -----------------------------------------------------------------------------------------


@attrs.frozen
class At:
    attempt: int


@given(st.dictionaries(st.sampled_from(PEERS), st.none() | st.builds(At, st.integers(0, 9))))
def test_the_value_to_propose_again_is_the_one_of_the_highest_ballot(promises: dict[PeerId, At | None]) -> None:
    found = proposal_of(promises)
    ballots = [promise.attempt for promise in promises.values() if promise is not None]
    assert (found.attempt if isinstance(found, At) else None) == max(ballots, default=None)


def test_a_voter_that_led_an_attempt_before_it_restarted_begins_after_it() -> None:
    order = PEERS[:3]
    assert resume_at(None, order, order[0]) == (0, None)
    assert resume_at((0, None), order, order[0]) == (1, None)
    assert resume_at((0, None), order, order[1]) == (0, None)
    assert resume_at((5, None), order, order[2]) == (6, None)


@pytest.mark.parametrize(("count", "needed"), [(1, 1), (2, 2), (3, 2), (4, 3), (5, 3), (8, 5)])
def test_a_quorum_is_a_majority(count: int, needed: int) -> None:
    assert quorum(count) == needed


def test_long_lists_of_peers_are_cut_for_people() -> None:
    assert short(PEERS[:2]) == f"{PEERS[0].short}, {PEERS[1].short}"
    assert short(PEERS[:9]).endswith(" and 5 more")
