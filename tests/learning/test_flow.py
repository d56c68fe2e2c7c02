"""Micro-batches at one replica: what comes twice, late or too much, what counts, and when a step is over."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.learning.pipeline import defaults
from shoal.learning.pipeline.flow import Flow, Load
from shoal.learning.pipeline.messages import Hop, Key, StepDone, Won
from shoal.learning.pipeline.schedule import Kind
from shoal.transport.identity import PeerId

ME, FEEDER, OTHER, BEFORE, BESIDE, AFTER = (PeerId(bytes([n]) * 32) for n in range(1, 7))
FEEDERS = [FEEDER, OTHER]
ORDER = (0, 1, 2, 3)


def load(
    index: int = 0,
    *,
    step: int = 0,
    token: int = 1,
    sender: PeerId | None = BEFORE,
    feeder: PeerId = FEEDER,
    at: int = 2,
) -> Load:
    key = Key(feeder, step, index)
    return Load(key, token, sender, ORDER, at, 1, torch.ones(2), [], "0")


def own(index: int, *, step: int = 0, token: int = 1) -> Load:
    return load(index, step=step, token=token, sender=None, feeder=ME, at=0)


def passed(flow: Flow, *, back: PeerId = AFTER, token: int = 50) -> Load:
    """Compute the next micro-batch forward, have it computed on, and compute it backward."""
    work = flow.next()
    assert work is not None and work[0] is Kind.FORWARD
    found = work[1]
    found.output = torch.ones(2)
    flow.schedule.done()
    found.attempts[token] = back
    hops = (Hop(back, token), *(Hop(OTHER, 9) for _ in range(len(ORDER) - 2 - found.at)))
    assert flow.returned(back, found.key, token, torch.ones(2), hops) is found
    assert flow.next() == (Kind.BACKWARD, found)
    found.counted = True
    flow.schedule.done()
    return found


def done(step: int = 0, *paths: tuple[Hop, ...]) -> StepDone:
    return StepDone(b"\0" * 32, step, tuple(Won(index, path) for index, path in enumerate(paths)))


def way(token: int, *, through: PeerId = BEFORE, before: int = 30) -> tuple[Hop, ...]:
    """Of a micro-batch that came to us from ``through`` under ``token``."""
    return (Hop(through, before), Hop(ME, token), Hop(AFTER, 50))


# --- what comes -------------------------------------------------------------------------------------------------------


def test_what_comes_twice_is_taken_once() -> None:
    flow = Flow(ME, 2, 4)
    assert [flow.arrive(load()), flow.arrive(load())] == ["taken", "taken"]
    passed(flow)
    assert flow.arrive(load()) == "taken"
    assert flow.next() is None
    assert len(flow.loads) == 1


def test_what_comes_for_a_step_that_is_over_is_late() -> None:
    flow = Flow(ME, 2, 4, step=3)
    assert flow.arrive(load(step=2)) == "late"
    assert not flow.loads
    assert not flow.ended(FEEDERS)


def test_what_comes_for_a_later_step_waits_for_it() -> None:
    flow = Flow(ME, 2, 4)
    assert flow.arrive(load(step=1)) == "taken"
    assert flow.next() is None
    flow.close()
    assert passed(flow).key.step == 1


def test_more_than_can_wait_is_refused_but_not_what_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "MAX_WAITING", 2)
    flow = Flow(ME, 2, 4)
    assert [flow.arrive(load(n)) for n in range(3)] == ["taken", "taken", "full"]
    assert flow.arrive(load(1)) == "taken"
    assert flow.arrive(load(2, step=5)) == "full"
    assert flow.arrive(load(2, sender=OTHER)) == "taken"  # each has a place of its own
    assert flow.arrive(load(0, step=1 + defaults.MAX_AHEAD, sender=OTHER)) == "full"
    assert not flow.ended(FEEDERS)


def test_two_senders_may_have_the_same_number_for_one_micro_batch() -> None:
    """The feeder sent it to two replicas of the stage before, which both sent it here."""
    flow = Flow(ME, 2, 4)
    first, second = load(token=7, sender=BEFORE), load(token=7, sender=BESIDE)
    assert [flow.arrive(first), flow.arrive(second)] == ["taken", "taken"]
    assert {id(passed(flow, token=50)), id(passed(flow, token=51))} == {id(first), id(second)}
    flow.finish(FEEDER, done(0, way(7, through=BESIDE)))
    assert flow.counting() == ([second], [first])


# --- gradients --------------------------------------------------------------------------------------------------------


def test_only_the_gradient_that_is_waited_for_is_taken() -> None:
    flow = Flow(ME, 1, 4)
    flow.arrive(load(at=1, sender=FEEDER))
    work = flow.next()
    assert work is not None
    found = work[1]
    key, gradient, path = found.key, torch.ones(2), (Hop(AFTER, 50), Hop(OTHER, 9))
    found.attempts[50] = AFTER
    assert flow.returned(AFTER, key, 50, gradient, path) is None  # not computed yet
    found.output = torch.ones(2)
    flow.schedule.done()
    assert flow.returned(OTHER, key, 50, gradient, (Hop(OTHER, 50), Hop(AFTER, 9))) is None
    assert flow.returned(AFTER, key, 51, gradient, path) is None
    assert flow.returned(AFTER, Key(FEEDER, 0, 1), 50, gradient, path) is None
    assert flow.returned(AFTER, key, 50, torch.ones(3), path) is None
    assert flow.returned(AFTER, key, 50, gradient, (Hop(OTHER, 50), Hop(OTHER, 9))) is None
    assert flow.returned(AFTER, key, 50, gradient, path[:1]) is None
    assert flow.returned(AFTER, key, 50, gradient, (*path, Hop(OTHER, 1))) is None
    assert flow.returned(AFTER, key, 50, gradient, ()) is None
    assert flow.returned(AFTER, key, 50, gradient, path) is found
    assert flow.returned(AFTER, key, 50, gradient, path) is None  # a second time


def test_of_two_attempts_the_first_gradient_counts() -> None:
    flow = Flow(ME, 2, 4)
    flow.arrive(load())
    work = flow.next()
    assert work is not None
    found = work[1]
    found.output = torch.ones(2)
    flow.schedule.done()
    found.attempts = {50: AFTER, 51: OTHER}
    assert flow.returned(OTHER, found.key, 51, torch.ones(2), (Hop(OTHER, 51),)) is found
    assert flow.returned(AFTER, found.key, 50, torch.zeros(2), (Hop(AFTER, 50),)) is None
    assert found.path == (Hop(OTHER, 51),)
    assert found.gradient is not None and torch.equal(found.gradient, torch.ones(2))


# --- what counts ------------------------------------------------------------------------------------------------------


def test_of_a_micro_batch_sent_twice_the_way_that_won_counts() -> None:
    """Here under two numbers, both computed to the end; and one that won elsewhere."""
    flow = Flow(ME, 2, 4)
    loads = [load(0, token=1), load(0, token=2), load(1, token=3)]
    for n, each in enumerate(loads):
        flow.arrive(each)
        passed(flow, token=50 + n)
    flow.finish(FEEDER, done(0, way(2), way(8, through=BESIDE)))
    assert flow.counting() == ([loads[1]], [loads[0], loads[2]])


def test_what_is_not_in_the_sum_neither_counts_nor_has_to_be_taken_out() -> None:
    flow = Flow(ME, 2, 4)
    flow.arrive(load())
    flow.finish(FEEDER, done(0, way(1)))
    assert flow.counting() == ([], [])


def test_our_number_at_another_place_of_the_way_is_another_attempt() -> None:
    """A way that swaps stages can lead through a peer's stage earlier or later."""
    flow = Flow(ME, 2, 4)
    flow.arrive(load())
    found = passed(flow)
    flow.finish(FEEDER, done(0, (Hop(ME, 1), Hop(BEFORE, 30), Hop(AFTER, 50))))
    assert flow.counting() == ([], [found])


def test_nothing_counts_of_a_feeder_that_has_not_said_what_does() -> None:
    flow = Flow(ME, 2, 4)
    flow.arrive(load(0))
    flow.arrive(load(0, feeder=OTHER))
    mine, theirs = passed(flow, token=50), passed(flow, token=51)
    flow.finish(FEEDER, done(0, way(1)))
    assert flow.counting() == ([mine], [theirs])
    flow.finish(OTHER, done(0, way(1)))
    assert flow.counting() == ([mine, theirs], [])


def test_a_feeder_says_what_counts_once_all_of_its_own_is_back() -> None:
    flow = Flow(ME, 0, 4)
    assert flow.own_done() is None
    loads = [own(1, token=2), own(0, token=1)]
    for each in loads:
        flow.feed(each)
    passed(flow, token=50)
    assert flow.own_done() is None
    passed(flow, token=51)
    said = flow.own_done()
    assert said is not None
    assert [(won.index, won.path[0]) for won in said.won] == [(0, Hop(AFTER, 51)), (1, Hop(AFTER, 50))]
    assert flow.counting() == (loads, [])


# --- the end of a step ------------------------------------------------------------------------------------------------


def test_a_step_waits_for_every_feeder_that_is_in_it() -> None:
    flow = Flow(ME, 2, 4, step=5)
    at = [(FEEDER, 5), (OTHER, 4)]
    feeders = [FEEDER, OTHER]
    assert flow.awaited(feeders, at) == feeders
    assert not flow.ended(FEEDERS)
    flow.finish(FEEDER, done(5))
    assert flow.ended(FEEDERS)
    assert flow.awaited(feeders, at) == [OTHER]
    flow.finish(OTHER, done(4))  # of a step that is over
    assert flow.awaited(feeders, at) == [OTHER]
    assert flow.awaited(feeders, [(FEEDER, 5), (OTHER, 6)]) == []  # it is past it


def test_a_feeder_that_brings_the_next_step_is_done_with_this_one() -> None:
    flow = Flow(ME, 2, 4)
    flow.arrive(load(step=1))
    assert flow.ended(FEEDERS)
    assert flow.awaited([FEEDER, OTHER], []) == [OTHER]
    flow.close()
    assert not flow.ended(FEEDERS)
    assert flow.awaited([FEEDER, OTHER], []) == [FEEDER, OTHER]


def test_word_on_a_later_step_is_kept_until_then() -> None:
    flow = Flow(ME, 2, 4)
    flow.finish(FEEDER, done(1, way(1)))
    assert flow.ended(FEEDERS)
    flow.arrive(load(step=1))
    flow.close()
    found = passed(flow)
    assert flow.ended(FEEDERS)
    assert flow.counting() == ([found], [])
    flow.close()
    assert not flow.ended(FEEDERS)


# --- from step to step ------------------------------------------------------------------------------------------------


def test_going_forward_drops_what_is_over_and_begins_what_waited() -> None:
    flow = Flow(ME, 2, 4)
    for step in (0, 1, 3):
        flow.arrive(load(step=step))
    passed(flow)
    flow.go_to(3)
    assert [each.key.step for each in flow.loads.values()] == [3]
    assert flow.counting() == ([], [])
    assert passed(flow).key.step == 3


def test_going_back_keeps_what_came_for_later_steps_and_computes_it_then() -> None:
    flow = Flow(ME, 2, 4, step=3)
    flow.arrive(load(step=3))
    found = passed(flow)
    flow.go_to(2)
    assert flow.next() is None
    assert flow.counting() == ([], [])
    flow.restart()
    assert flow.arrive(load(1, step=2)) == "taken"
    assert passed(flow).key.step == 2
    flow.close()
    flow.restart()
    assert passed(flow) is found


def test_going_to_where_it_is_changes_nothing() -> None:
    flow = Flow(ME, 2, 4, step=3)
    flow.arrive(load(step=3))
    work = flow.next()
    flow.go_to(3)
    assert flow.next() is None  # it runs
    flow.schedule.done()
    assert work is not None


def test_a_step_begun_anew_forgets_our_own_and_recomputes_what_others_sent() -> None:
    flow = Flow(ME, 0, 4)
    flow.feed(own(0))
    passed(flow)
    flow.restart()
    assert not flow.loads
    assert flow.own_done() is None
    flow = Flow(ME, 2, 4)
    flow.arrive(load(0))
    flow.arrive(load(0, step=1))
    found = passed(flow)
    flow.restart()
    assert (found.counted, found.attempts, found.gradient, found.output, found.path) == (False, {}, None, None, ())
    assert flow.returned(AFTER, found.key, 50, torch.ones(2), (Hop(AFTER, 50),)) is None
    assert passed(flow) is found
    assert flow.next() is None


def test_what_runs_while_a_step_is_begun_anew_does_not_hold_up_the_rest() -> None:
    flow = Flow(ME, 2, 4)
    flow.arrive(load(0))
    assert flow.next() is not None
    flow.restart()
    assert passed(flow).key.index == 0


sends = st.lists(
    st.tuples(st.integers(0, 2), st.integers(1, 3), st.sampled_from([BEFORE, BESIDE]), st.integers(0, 2)), max_size=30
)


@given(sends, st.lists(st.tuples(st.integers(1, 3), st.sampled_from([BEFORE, BESIDE])), min_size=3, max_size=3))
def test_each_micro_batch_counts_at_most_once_whatever_was_sent_how_often(
    sent: list[tuple[int, int, PeerId, int]], won: list[tuple[int, PeerId]]
) -> None:
    flow, fresh = Flow(ME, 2, 4), itertools.count(100)
    for index, token, sender, computes in sent:
        assert flow.arrive(load(index, token=token, sender=sender)) == "taken"
        for _ in range(computes):
            if any(not each.counted for each in flow.loads.values()):
                passed(flow, token=next(fresh))
    flow.finish(FEEDER, done(0, *(way(token, through=through) for token, through in won)))
    right, wrong = flow.counting()
    counted = [each for each in flow.loads.values() if each.counted]
    assert sorted(map(id, right + wrong)) == sorted(map(id, counted))
    assert len({each.key for each in right}) == len(right)
    for each in counted:
        assert (each in right) == ((each.token, each.sender) == won[each.key.index])
