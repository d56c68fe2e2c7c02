"""The round agreement, model-checked: every order, loss and crash within a budget, and long ways at random.

The voters, leaders and decisions are the real ones (see :mod:`.model.seats`). docs/agreement.md says what this shows
and what it does not. Every test prints how many states it saw (``pytest -s``).
"""

from __future__ import annotations

from typing import Any

import pytest

from shoal.learning.aggregate import resolve
from shoal.learning.rounds import leader as leader_module
from shoal.learning.rounds import proposer as proposer_module
from shoal.learning.rounds import terms as terms_module
from shoal.learning.rounds import voter as voter_module
from shoal.learning.rounds.messages import Propose, quorum

from .model import seats as seats_module
from .model.explore import Found, ends, explore, failing, round_of, shorten, walk
from .model.seats import Shape
from .model.table import Table
from .model.words import Budget, Step
from .rings import rings  # noqa: F401

#: A bit of everything, for ways at random: what a bad hour on the internet has for one round.
ANYTHING = Budget(timer=6, drop=3, twice=2, crash=3, alarm=3, cut=2, skip=2, hold=2, total=9)


def check(name: str, found: Found, *, whole: bool = True) -> None:
    assert not found.broken, found.story()
    print(f"\n{name}: {found.line()}")
    assert found.committed
    assert found.whole or not whole


def walks(name: str, start: Table, seeds: range, budget: Budget = ANYTHING) -> None:
    steps = commits = 0
    for seed in seeds:
        found = walk(start, budget, seed)
        assert not found.broken, f"seed {seed}: {found.story()}"
        steps, commits = steps + found.steps, commits + found.committed
    print(f"\n{name}: {len(seeds)} ways, {steps} steps, {commits} with a commit before faults ended")
    assert commits > len(seeds) // 4


# -- everything within a budget -------------------------------------------------------------------------


def test_in_any_order_of_messages_three_members_end_a_round_with_one_result() -> None:
    check("any order", explore(round_of(3), Budget(), every=1))


@pytest.mark.parametrize("kind", ["timer", "crash", "alarm", "drop"])
def test_in_any_order_one_fault_at_any_moment_neither_splits_nor_stops_a_round(kind: str) -> None:
    check(f"any order, one {kind}", explore(round_of(3), Budget(**{kind: 1}), every=20 if kind == "drop" else 400))


@pytest.mark.parametrize(
    "budget",
    [
        Budget(timer=2),
        Budget(alarm=2),
        Budget(timer=1, drop=1, hold=1, alarm=1, twice=1, total=2),
        Budget(crash=1),
    ],
    ids=["two timers", "two false alarms", "any two faults of the network", "a crash within any step"],
)
@pytest.mark.parametrize("mode", ["strict", "available"])
def test_in_the_order_of_sending_two_faults_at_any_moments_neither_split_nor_stop_a_round(
    budget: Budget, mode: str
) -> None:
    check(f"{mode}, {budget}", explore(round_of(3, strict=mode == "strict"), budget, ordered=True, every=500))


def test_members_with_different_rosters_never_take_part_in_one_round() -> None:
    """Peers 0, 1 and 2 believe in a roster of three, peer 3 in one of all four: it hears and is heard, and alone."""
    start = Table(Shape(4, rosters=((0, 1, 2), (0, 1, 2), (0, 1, 2), (0, 1, 2, 3))))
    found = explore(start, Budget(timer=1), ordered=True)
    check("a member with another roster", found)
    start = Table(Shape(4, rosters=((0, 1, 2), (0, 1, 2), (1, 2, 3), (1, 2, 3))))
    check("two rosters that overlap, each with a majority of its own", explore(start, Budget(timer=1), ordered=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "budget", "ordered"),
    [
        (3, Budget(timer=3), True),
        (3, Budget(crash=1, timer=1), True),
        (3, Budget(crash=1, drop=1, hold=1, alarm=1, total=2), True),
        (4, Budget(timer=2), True),
        (4, Budget(crash=1), True),
    ],
)
def test_everything_within_larger_budgets(count: int, budget: Budget, ordered: bool) -> None:
    check(f"{count} members, {budget}", explore(round_of(count), budget, ordered=ordered, every=1000))


# -- long ways at random --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["strict", "available"])
@pytest.mark.parametrize(("count", "length"), [(3, 1), (3, 48), (4, 33), (5, 1)])
def test_on_ways_with_many_faults_no_round_splits_and_every_round_ends(mode: str, count: int, length: int) -> None:
    start = round_of(count, strict=mode == "strict", length=length)
    walks(f"{mode}, {count} members, {length} elements", start, range(120))


def test_the_same_holds_with_real_signatures_and_peers_that_still_train() -> None:
    walks("real signatures", round_of(3, real=True, idle=(1,), length=33), range(60))
    walks("a leader that still trains", round_of(3, idle=(2,)), range(100))


@pytest.mark.parametrize(
    ("count", "length", "rule"), [(3, 1, "geometric_median"), (4, 33, "nnm+median:f=1"), (3, 1, "descent:f=1+mean")]
)
def test_the_same_holds_where_a_decision_comes_before_the_result(count: int, length: int, rule: str) -> None:
    """The second rule can spare one of its members, not two, so that many a round has too few. The third writes what it
    has learnt into the record, so that voters refuse a record after another decision."""
    start = Table(Shape(count, length=length, rule=resolve(rule)))
    walks(f"{rule}, {count} members", start, range(80))
    check(f"{rule}, one timer", explore(start, Budget(timer=1), ordered=True, every=200))
    check(f"{rule}, one crash", explore(start, Budget(crash=1), ordered=True, every=500, limit=3000), whole=False)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["strict", "available"])
@pytest.mark.parametrize("count", [3, 4, 5])
def test_on_very_many_ways(mode: str, count: int) -> None:
    for length in (1, 33):
        start = round_of(count, strict=mode == "strict", length=length)
        walks(f"{mode}, {count} members, {length} elements", start, range(1000, 6000))


# -- rings ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("rings")
def test_the_same_holds_where_contributions_go_round_a_ring() -> None:
    check("a ring, any order", explore(round_of(3, length=48), Budget(), every=1))
    for kind in ("timer", "crash", "alarm", "drop"):
        found = explore(round_of(3, length=48), Budget(**{kind: 1}), ordered=True, every=100)
        check(f"a ring, one {kind}", found)
    check("a ring, two timers", explore(round_of(3, length=48), Budget(timer=2), ordered=True, every=500))
    for count, length in ((3, 1), (4, 64), (5, 33)):
        walks(f"a ring of {count}, {length} elements", round_of(count, length=length), range(120))


# -- what the model found -------------------------------------------------------------------------------


def way(text: str) -> tuple[Step, ...]:
    """Steps, separated by commas: words and indices."""
    return tuple(
        tuple(int(word) if word.isdigit() else word for word in step.split())
        for step in text.split(",")
        if step.split()
    )


FOUND = {
    "a leader that was left and did not hear of the commit is told when it asks": (
        Shape(3),
        "lose 0 2 5, cut 0 2, deliver 0 2 1, drop 0 1, lose 1 2, deliver 1 0, deliver 0 1, deliver 1 0, deliver 0 1,"
        "deliver 1 0, deliver 0 1, deliver 1 0, deliver 0 2",
    ),
    "a value whose only holder came back without it is not proposed for ever": (
        Shape(3),
        "deliver 0 2, deliver 1 2, deliver 2 1, deliver 2 0, deliver 2 1, deliver 1 2, drop 2 0, timer 2 word,"
        "timer 2 word, timer 2 word 4, deliver 2 1, lose 1 2, crash 1",
    ),
    "a message from before its sender died does not bring it back to life": (
        Shape(3, strict=False),
        "deliver 0 2, deliver 1 2, deliver 2 1, deliver 2 0, deliver 2 1, deliver 2 0, deliver 0 2, deliver 1 2,"
        "deliver 2 1, crash 2, crash 0, crash 1, restart 2, lose 2 0, restart 0",
    ),
    "a round done again in available mode says that it is another branch": (
        Shape(3, strict=False),
        "deliver 1 2, lose 2 0, deliver 2 1, deliver 2 1, deliver 1 2, deliver 2 1, deliver 1 2, crash 1, deliver 2 1,"
        "deliver 2 0, crash 2, crash 0",
    ),
    "a receiver that came back with nothing does not hold up the gathering": (
        Shape(4, strict=False, length=33),
        "lose 3 1, deliver 3 0, deliver 0 2, deliver 0 1 4, deliver 0 1, deliver 2 0, deliver 1 0, deliver 0 3,"
        "deliver 0 2, deliver 3 0, deliver 0 1, deliver 2 0, cut 3 0, deliver 0 2, deliver 3 0, deliver 0 3,"
        "deliver 3 0, crash 2",
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_once_went_wrong(name: str) -> None:
    shape, steps = FOUND[name]
    wrong = failing(Table(shape), way(steps), ends)
    assert wrong is None, wrong


def test_beyond_its_assumption_a_strict_round_can_end_twice() -> None:
    """docs/agreement.md: what strict mode does not promise. Two of three lose their memory in one round, after a third
    member was told of the commit and before it can say so."""
    order = [Shape(3).index[peer] for peer in Shape(3).views[0].order]
    assert order == [2, 0, 1]
    steps = way(
        "deliver 0 2, deliver 1 2, deliver 2 0, deliver 2 1, deliver 2 1, deliver 1 2, deliver 2 0, deliver 0 2,"
        "drop 2 1, drop 2 1, deliver 2 0, deliver 2 0, deliver 0 2, timer 2 until, drop 2 0, crash 0, lose 1 2,"
        "restart 0, lose 0 2, deliver 1 0, deliver 2 1, crash 2, restart 2, lose 2 1, find 0 2, deliver 2 0,"
        "deliver 0 2, deliver 0 2, deliver 2 0, deliver 0 2, deliver 2 0, timer 0 until, deliver 0 2, deliver 0 2,"
        "deliver 2 0, timer 0 until"
    )
    wrong = failing(Table(Shape(3), beyond=True), steps, ends)
    assert wrong is not None
    assert "two values are committed" in wrong
    # In available mode the second one says that it is another branch. And the third member may speak in time.
    assert failing(Table(Shape(3, strict=False)), steps, ends) is None
    assert (
        failing(Table(Shape(3), beyond=True), (*steps[:-9], *way("deliver 0 1, deliver 1 0"), *steps[-9:]), ends)
        is None
    )


# -- the model finds what is broken ---------------------------------------------------------------------


class Fickle(voter_module.Voter):
    """Accepts a second value at a ballot."""

    def _on_propose(self, now: float, sender: Any, message: Propose) -> Any:
        kept = self.accepted
        if kept is not None and kept.attempt == message.attempt:
            self.accepted = None
        try:
            return super()._on_propose(now, sender, message)
        finally:
            self.accepted = kept


def broken_within(start: Table, ways: int, what: str = "two values") -> Found:
    for seed in range(ways):
        found = walk(start, ANYTHING, seed, to_end=False)
        if what in found.broken:
            print(f"\nfound on way {seed}, {len(found.trace)} steps:\n{found.story()}")
            return found
    raise AssertionError(f"nothing found on {ways} ways")


def test_a_majority_that_is_one_too_small_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (proposer_module, terms_module):
        monkeypatch.setattr(module, "accepts_needed", lambda voters, gossip: quorum(voters) - 1)
    found = broken_within(round_of(3), 200, "a certificate of")
    assert len(found.trace) <= 20


def test_votes_that_are_not_stored_are_found() -> None:
    found = broken_within(Table(Shape(3), persists=False), 2000)
    assert len(found.trace) <= 40


def test_a_ballot_that_is_used_twice_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """From where a leader has just proposed, died and come back."""
    monkeypatch.setattr(voter_module, "Voter", Fickle)
    monkeypatch.setattr(seats_module, "resume_at", lambda stored, order, me: stored or (0, None))
    table = round_of(3)
    for step in way(
        "deliver 0 2, lose 2 1, deliver 2 0, deliver 2 0, deliver 0 2 2, deliver 2 0, deliver 2 0, restart 2"
    ):
        assert table.can(step), step
        table = table.after(step)
    assert table.accepts
    found = explore(table, Budget(timer=1, alarm=1), limit=40_000, timers=("resend", "grace"))
    assert "two values" in found.broken, found.line()


def test_a_leader_that_does_not_propose_again_what_was_accepted_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(leader_module, "proposal_of", lambda promises: None)
    found = explore(round_of(3), Budget(hold=1, alarm=2, total=3), ordered=True, limit=60_000)
    assert "two values" in found.broken, found.line()


def test_a_shortened_way_still_fails_and_every_step_of_it_is_needed() -> None:
    found = broken_within(Table(Shape(3), persists=False), 2000)
    assert found.start is not None
    assert shorten(found.start, found.trace, lambda table: None) == found.trace
    for at in range(len(found.trace)):
        assert failing(found.start, found.trace[:at] + found.trace[at + 1 :], lambda table: None) is None
