"""1F1B: the canonical order where times are equal, and nothing lost, done twice or too far ahead where they are not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.learning.pipeline.schedule import Kind, Schedule

Work = tuple[str, int]


def canonical(stage: int, stages: int, count: int) -> list[Work]:
    """Of Megatron-LM and PipeDream-flush: so many forwards as stages follow, one of each kind in turn, what is left."""
    warm = min(stages - 1 - stage, count)
    order: list[Work] = [("F", n) for n in range(warm)]
    for n in range(count - warm):
        order += [("F", warm + n), ("B", n)]
    return order + [("B", n) for n in range(count - warm, count)]


def simulated(stages: int, count: int, forward: int, backward: int) -> list[list[Work]]:
    """What one replica of each stage computes, when passes take so many ticks and messages none."""
    line = [Schedule(stage, stages) for stage in range(stages)]
    for n in range(count):
        line[0].forward(b"%d" % n)
    orders: list[list[Work]] = [[] for _ in line]
    busy: list[tuple[int, Kind, bytes] | None] = [None] * stages
    for now in range((forward + backward) * stages * (count + 2)):
        for stage, schedule in enumerate(line):
            work = busy[stage]
            if work is None or work[0] != now:
                continue
            _, kind, key = work
            busy[stage] = None
            schedule.done()
            if kind is Kind.FORWARD and not schedule.last:
                line[stage + 1].forward(key)
            elif stage:
                line[stage - 1].backward(key)
        for stage, schedule in enumerate(line):
            found = schedule.next() if busy[stage] is None else None
            if found is None:
                continue
            kind, key = found
            orders[stage].append((kind.name[0], int(key)))
            if schedule.last:
                orders[stage].append(("B", int(key)))
            takes = forward + backward if schedule.last else forward if kind is Kind.FORWARD else backward
            busy[stage] = (now + takes, kind, key)
    return orders


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 8, 17])
@pytest.mark.parametrize(("forward", "backward"), [(1, 1), (1, 2)])
def test_with_equal_times_every_stage_has_the_canonical_order(
    stages: int, count: int, forward: int, backward: int
) -> None:
    found = simulated(stages, count, forward, backward)
    assert found == [canonical(stage, stages, count) for stage in range(stages)]


KEYS = [b"a", b"b", b"c", b"d", b"e"]
doings = st.lists(
    st.tuples(st.sampled_from(["forward", "backward", "next", "done", "drop"]), st.sampled_from(KEYS)), max_size=60
)


@given(doings, st.integers(0, 3), st.sampled_from([None, 1, 2]))
def test_nothing_is_lost_or_done_twice_or_too_far_ahead_whatever_comes_when(
    does: list[tuple[str, bytes]], stage: int, limit: int | None
) -> None:
    """Against a model that keeps one word on each micro-batch."""
    schedule = Schedule(stage, 4, limit)
    most = limit or 4 - stage
    state = dict.fromkeys(KEYS, "away")
    running: tuple[Kind, bytes] | None = None
    again: set[bytes] = set()
    for what, key in does:
        if what == "forward":
            schedule.forward(key)
            if state[key] == "away":
                state[key] = "input"
            elif state[key] == "given up":
                again.add(key)
        elif what == "backward":
            schedule.backward(key)
            if state[key] == "ahead":
                state[key] = "gradient"
        elif what == "next":
            found = schedule.next()
            if running is not None:
                assert found is None
                continue
            flying = sum(word in ("ahead", "gradient") for word in state.values())
            if found is None:
                assert "gradient" not in state.values()
                assert "input" not in state.values() or flying >= most
                continue
            kind, which = running = found
            assert state[which] == ("input" if kind is Kind.FORWARD else "gradient")
            assert kind is Kind.BACKWARD or "gradient" not in state.values()
            state[which] = "runs"
        elif what == "done" and running is not None:
            schedule.done()
            kind, which = running
            ahead = kind is Kind.FORWARD and not schedule.last
            if state[which] == "given up":
                state[which] = "input" if which in again else "away"
            else:
                state[which] = "ahead" if ahead else "away"
            again.discard(which)
            running = None
        elif what == "drop":
            schedule.drop(key)
            again.discard(key)
            state[key] = "given up" if state[key] in ("runs", "given up") else "away"
        assert schedule.in_flight() == sum(w in ("ahead", "gradient", "runs", "given up") for w in state.values())
        assert schedule.in_flight() <= most
        assert schedule.reason


def test_what_cannot_be_a_stage_is_refused() -> None:
    for stage, stages, limit in ((-1, 2, None), (2, 2, None), (0, 2, 0)):
        with pytest.raises(ValueError, match="stage"):
            Schedule(stage, stages, limit)
    with pytest.raises(ValueError, match="nothing is running"):
        Schedule(0, 2).done()


def test_a_gradient_of_what_was_given_up_meanwhile_is_ignored() -> None:
    schedule = Schedule(0, 2)
    schedule.forward(b"a")
    assert schedule.next() == (Kind.FORWARD, b"a")
    schedule.drop(b"a")
    schedule.backward(b"a")
    schedule.done()
    assert schedule.next() is None
    assert schedule.reason == "no micro-batch is here"
