"""Small calls as frames: numbers, parts, cancellation, limits, and whatever a peer may send."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.transport import defaults
from shoal.transport.callmux import CallAnswered, CallCancelled, CallMux, CallReceived
from shoal.transport.errors import Overloaded, ProtocolMisuse, RemoteProtocolError
from shoal.transport.frames import HEADER, HEADER_BYTES, Buffer, Frame


def _mux() -> CallMux:
    return CallMux(RemoteProtocolError)


def _carry(sender: CallMux, receiver: CallMux, room: int = 1 << 20) -> list[Any]:
    """All that ``sender`` has to say, in records of ``room`` bytes; the events it makes."""
    events = []
    while sender.has_output:
        out: list[Buffer] = []
        taken = sender.take(out, room)
        assert 0 < taken <= room
        assert taken == sum(len(frame) for frame in out)
        for frame in out:
            kind, number, value = HEADER.unpack_from(frame)
            payload = memoryview(frame)[HEADER_BYTES:]
            assert kind == Frame.CANCEL or len(payload) == value
            if (event := receiver.receive(kind, number, payload)) is not None:
                events.append(event)
    return events


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 8192, 8193, 1 << 20])
def test_an_answer_of_any_size_arrives_whole(size: int) -> None:
    ours, theirs = _mux(), _mux()
    call = ours.call(b"question")
    (received,) = _carry(ours, theirs)
    assert isinstance(received, CallReceived)
    assert bytes(received.request) == b"question"
    data = bytes(n % 251 for n in range(size))
    theirs.answer(received.call, data)
    assert _carry(theirs, ours, 8000) == [CallAnswered(call)]
    assert call.answer == data
    assert (ours.open, theirs.open, theirs._queued) == (0, 0, 0)


def test_calls_go_both_ways_and_are_answered_in_any_order() -> None:
    ours, theirs = _mux(), _mux()
    calls = [ours.call(bytes([n])) for n in range(5)]
    back = theirs.call(b"back")
    received = _carry(ours, theirs)
    (other,) = _carry(theirs, ours)
    for event in reversed(received):
        theirs.answer(event.call, bytes(event.request) * 2)
    ours.answer(other.call, b"and forth")
    _carry(theirs, ours)
    _carry(ours, theirs)
    assert [call.answer for call in calls] == [bytes([n, n]) for n in range(5)]
    assert back.answer == b"and forth"


def test_a_cancelled_call_is_forgotten_by_both_sides_whatever_crosses() -> None:
    ours, theirs = _mux(), _mux()
    first, second = ours.call(b"1"), ours.call(b"2")
    received = _carry(ours, theirs)
    theirs.answer(received[0].call, bytes(10_000))
    ours.cancel(first)
    ours.cancel(second)
    ours.cancel(second)
    assert _carry(ours, theirs) == [CallCancelled(received[1].call)]
    assert not received[1].call.open
    theirs.answer(received[1].call, b"too late")
    assert _carry(theirs, ours) == []
    assert (ours.open, theirs.open, first.answer) == (0, 0, None)


def test_no_more_calls_are_made_than_may_wait() -> None:
    ours = _mux()
    calls = [ours.call(b"") for _ in range(defaults.MAX_LINK_CALLS)]
    assert not ours.can_call
    with pytest.raises(Overloaded):
        ours.call(b"")
    ours.cancel(calls[3])
    assert ours.can_call
    with pytest.raises(ProtocolMisuse, match="in one frame"):
        ours.call(bytes(defaults.CALL_PIECE + 1))


def test_numbers_go_on_after_the_last_of_them() -> None:
    ours, theirs = _mux(), _mux()
    ours._number = theirs._seen = 0xFFFFFFFE
    for number in (0xFFFFFFFF, 0, 1):
        call = ours.call(b"?")
        assert call.number == number
        (received,) = _carry(ours, theirs)
        theirs.answer(received.call, b"!")
        assert _carry(theirs, ours) == [CallAnswered(call)]


def test_answers_that_nobody_reads_are_bounded() -> None:
    theirs = _mux()
    calls = 4 * defaults.ANSWER_WINDOW // (4096 + HEADER_BYTES) + 1
    for number in range(1, calls + 1):
        event = theirs.receive(Frame.CALL, number, memoryview(b""))
        assert isinstance(event, CallReceived)
        theirs.answer(event.call, bytes(4096))
    assert theirs.full
    with pytest.raises(RemoteProtocolError, match="without reading our answers"):
        theirs.receive(Frame.CALL, calls + 1, memoryview(b""))


@pytest.mark.parametrize(
    ("frame", "what"),
    [
        ((Frame.CALL, 3, b""), "call 3 after call 1"),
        ((Frame.CALL, 1, b""), "call 1 after call 1"),
        ((Frame.CALL, 2, bytes(4097)), "4097 bytes"),
        ((Frame.ANSWER, 2, b"x"), "never made"),
        ((Frame.ANSWER, 1, b""), "0 in a frame"),
        ((Frame.PART, 1, b""), "0 in a frame"),
        ((Frame.PART, 9, b"x"), "never made"),
        ((Frame.CANCEL, 2, b""), "never made"),
    ],
)
def test_nonsense_breaks_the_protocol(frame: tuple[int, int, bytes], what: str) -> None:
    mux = _mux()
    mux.call(b"")
    mux.receive(Frame.CALL, 1, memoryview(b""))
    with pytest.raises(RemoteProtocolError, match=what):
        mux.receive(frame[0], frame[1], memoryview(frame[2]))


def test_more_calls_at_once_than_allowed_break_the_protocol() -> None:
    mux = _mux()
    for number in range(1, defaults.MAX_LINK_CALLS + 1):
        mux.receive(Frame.CALL, number, memoryview(b""))
    with pytest.raises(RemoteProtocolError, match="at once"):
        mux.receive(Frame.CALL, defaults.MAX_LINK_CALLS + 1, memoryview(b""))


def test_an_answer_larger_than_any_message_breaks_the_protocol() -> None:
    mux = _mux()
    call = mux.call(b"")
    part = memoryview(bytes(defaults.CALL_PIECE))
    for _ in range(defaults.MAX_ANSWER // defaults.CALL_PIECE):
        mux.receive(Frame.PART, call.number, part)
    with pytest.raises(RemoteProtocolError, match="an answer of"):
        mux.receive(Frame.PART, call.number, part)


@given(
    st.lists(
        st.tuples(
            st.sampled_from((Frame.CALL, Frame.ANSWER, Frame.PART, Frame.CANCEL)),
            st.integers(0, 5) | st.integers(0, 0xFFFFFFFF),
            st.binary(max_size=20),
        )
    )
)
def test_any_frames_are_taken_or_refused_and_memory_is_bounded(frames: list[tuple[int, int, bytes]]) -> None:
    mux = _mux()
    calls = [mux.call(b"") for _ in range(3)]
    for kind, number, payload in frames:
        try:
            event = mux.receive(kind, number, memoryview(payload))
        except RemoteProtocolError:
            break
        if isinstance(event, CallReceived) and number % 2:
            mux.answer(event.call, b"answer")
        if isinstance(event, CallAnswered):
            assert event.call in calls
    assert mux.open <= 3 + len(frames)


def test_a_link_that_ends_gives_back_what_was_open() -> None:
    mux = _mux()
    ours = mux.call(b"")
    event = mux.receive(Frame.CALL, 1, memoryview(b""))
    assert isinstance(event, CallReceived)
    assert mux.drop() == ([ours], [event.call])
    assert not event.call.open
    assert not mux.has_output
    mux.answer(event.call, b"nobody hears it")
    mux.cancel(ours)
    assert not mux.has_output
