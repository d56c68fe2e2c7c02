"""The stream mux: order and completeness against a model, credits, priorities, bounds, peers that break the rules."""

from __future__ import annotations

import struct
import tracemalloc

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.transport import defaults
from shoal.transport.errors import Overloaded, ProtocolMisuse, RemoteProtocolError
from shoal.transport.frames import (
    HEADER_BYTES,
    DataReceived,
    Event,
    Frame,
    GoodbyeCode,
    GoodbyeReceived,
    MuxLimits,
    MuxStream,
    Priority,
    Receiving,
    ResetCode,
    Sending,
    StreamOpened,
    StreamStopped,
    StreamWasReset,
)
from shoal.transport.mux import Mux
from shoal.transport.pump import Stretch
from shoal.transport.records import Record, RecordOpener, RecordSealer, SealedBody

TINY = MuxLimits(stream_window=(64, 256), link_window=(128, 512), max_outgoing=8, max_incoming=8)


class Pair:
    """Two muxes and the record pipe between them."""

    def __init__(
        self,
        limits: MuxLimits | None = None,
        record: int = defaults.MAX_RECORD,
        order: tuple[Priority, ...] = (Priority.CONTROL, Priority.BULK),
    ) -> None:
        self.order = order
        self.a = Mux(initiator=True, limits=limits, peer="b")
        self.b = Mux(initiator=False, limits=limits, peer="a")
        self.record = record

    def move(self, source: Mux) -> list[Event] | None:
        """One record from ``source`` to the other; None when it has nothing to send."""
        for channel in self.order:
            buffers = source.next_record(channel, self.record)
            if buffers is not None:
                plain = b"".join(buffers)
                assert 0 < len(plain) <= self.record
                source.take_drained()
                return (self.b if source is self.a else self.a).receive(Record(memoryview(plain)), channel)
        return None

    def settle(self) -> list[Event]:
        """Move records both ways until nothing is left to send; what ``b`` and ``a`` saw, in order."""
        seen: list[Event] = []
        while True:
            moved = [events for events in (self.move(self.a), self.move(self.b)) if events is not None]
            if not moved:
                assert not self.a.has_output
                assert not self.b.has_output
                return seen
            seen.extend(event for events in moved for event in events)

    def open(self, priority: Priority = Priority.CONTROL) -> tuple[MuxStream, MuxStream]:
        ours = self.a.open("test", priority)
        opened = [event.stream for event in self.settle() if isinstance(event, StreamOpened)]
        return ours, opened[-1]


def drain(mux: Mux, stream: MuxStream) -> bytes:
    got = b""
    while chunk := mux.read(stream, 1 << 30):
        got += bytes(chunk)
    return got


def frame(kind: int, id: int, value: int, payload: bytes = b"") -> bytes:
    return struct.pack(">BII", kind, id, value) + payload


def feed(mux: Mux, *frames: bytes) -> list[Event]:
    """``frames`` as one record of the channel in which the first of them belongs."""
    first = b"".join(frames)[:5]
    bulk = len(first) == 5 and first[0] <= Frame.RESET and first[4] >> 1 & 1
    return mux.receive(Record(memoryview(b"".join(frames))), Priority.BULK if bulk else Priority.CONTROL)


# Against a model


@attrs.frozen
class Op:
    what: str
    side: int
    stream: int
    amount: int


OPS = st.lists(
    st.builds(
        Op,
        st.sampled_from(["open", "open_bulk", "send", "send", "send", "end", "read", "read", "move", "move", "move"]),
        st.integers(0, 1),
        st.integers(0, 7),
        st.integers(1, 700),
    ),
    max_size=120,
)


@settings(max_examples=150, deadline=None)
@given(ops=OPS, record=st.integers(HEADER_BYTES + 80, 400), bulk_first=st.booleans())
def test_every_stream_delivers_what_was_sent_in_order_and_once_however_it_is_cut_up(
    ops: list[Op], record: int, bulk_first: bool
) -> None:
    order = (Priority.BULK, Priority.CONTROL) if bulk_first else (Priority.CONTROL, Priority.BULK)
    pair = Pair(TINY, record, order)
    muxes = (pair.a, pair.b)
    # per direction: the stream at the sender, the one at the receiver (once opened there), bytes sent and read
    sent: dict[tuple[int, int], bytearray] = {}
    read: dict[tuple[int, int], bytearray] = {}
    ends: tuple[dict[int, MuxStream], dict[int, MuxStream]] = ({}, {})
    ended: dict[tuple[int, int], bool] = {}

    def note(side: int, events: list[Event] | None) -> None:
        for event in events or ():
            if isinstance(event, StreamOpened):
                ends[side][event.stream.id] = event.stream

    def take(side: int, id: int, limit: int) -> None:
        stream = ends[side][id]
        chunk = muxes[side].read(stream, limit)
        if chunk is not None:
            read.setdefault((1 - side, id), bytearray()).extend(chunk)

    counter = 0
    for op in ops:
        mux = muxes[op.side]
        mine = list(ends[op.side].values())
        if op.what in ("open", "open_bulk"):
            if mux.can_open:
                stream = mux.open("x", Priority.BULK if op.what == "open_bulk" else Priority.CONTROL)
                ends[op.side][stream.id] = stream
        elif op.what == "move":
            note(1 - op.side, pair.move(mux))
        elif mine:
            stream = mine[op.stream % len(mine)]
            if op.what == "read":
                take(op.side, stream.id, op.amount)
            elif stream.sending is Sending.OPEN:
                if op.what == "send":
                    data = bytes((counter + i) % 251 for i in range(op.amount))
                    counter += op.amount
                    sent.setdefault((op.side, stream.id), bytearray()).extend(data)
                    mux.send(stream, data)
                else:
                    mux.end(stream)
                    ended[op.side, stream.id] = True
        for side in (0, 1):
            # what a peer holds unread never exceeds the windows
            for each in ends[side].values():
                assert each.unread <= TINY.stream_window[each.priority]
            for priority in Priority:
                held = sum(each.unread for each in ends[side].values() if each.priority is priority)
                assert held <= TINY.link_window[priority]
    # Everybody ends and reads on: then everything arrives and nothing is remembered.
    for side in (0, 1):
        for stream in list(ends[side].values()):
            muxes[side].end(stream)
    for _ in range(100_000):
        before = {key: len(value) for key, value in read.items()}
        moved = [pair.move(mux) for mux in muxes]
        note(1, moved[0])
        note(0, moved[1])
        for side in (0, 1):
            for stream in list(ends[side].values()):
                if stream.sending is Sending.OPEN:
                    muxes[side].end(stream)
                take(side, stream.id, 1000)
        if moved == [None, None] and before == {key: len(value) for key, value in read.items()}:
            break
    for key, data in sent.items():
        assert bytes(read.get(key, b"")) == bytes(data)
    assert pair.a.streams == pair.b.streams == 0


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(Priority))
def test_bytes_of_any_kind_end_in_events_or_in_one_typed_error(garbage: bytes, channel: Priority) -> None:
    mux = Mux(initiator=True)
    try:
        mux.receive(Record(memoryview(garbage)), channel)
    except RemoteProtocolError:
        pass


# Sending


def test_data_are_not_copied_on_the_way_into_a_record() -> None:
    pair = Pair()
    ours, _ = pair.open(Priority.BULK)
    data = bytearray(100_000)
    pair.a.send(ours, data)
    buffers = pair.a.next_record(Priority.BULK, defaults.MAX_RECORD)
    assert buffers is not None
    (view,) = [buffer for buffer in buffers if isinstance(buffer, memoryview)]
    assert view.obj is data
    assert pair.a.take_drained() == [ours]
    assert pair.a.take_drained() == []


def test_many_small_frames_share_one_record() -> None:
    pair = Pair()
    streams = [pair.a.open("s") for _ in range(50)]
    for stream in streams:
        pair.a.send(stream, b"hello")
        pair.a.end(stream)
    assert pair.move(pair.a) is not None
    assert pair.a.next_record(Priority.CONTROL, defaults.MAX_RECORD) is None
    assert [drain(pair.b, stream) for stream in pair.b.live_streams()] == [b"hello"] * 50


def test_control_goes_before_bulk_that_was_queued_earlier() -> None:
    pair = Pair(record=10_000)
    bulk, _ = pair.open(Priority.BULK)
    control, far_control = pair.open()
    pair.a.send(bulk, bytes(1_000_000))
    pair.move(pair.a)
    pair.a.send(control, b"urgent")
    events = pair.move(pair.a)
    assert events is not None
    assert [event.stream for event in events if isinstance(event, DataReceived)] == [far_control]


def test_credit_goes_along_with_data_and_alone_where_there_is_none() -> None:
    pair, size = Pair(), defaults.BULK_WINDOW // 4
    asked, answered = pair.a.open("x", Priority.BULK), None
    pair.move(pair.a)
    answered = pair.b.live_streams()[0]
    for both_ways in (False, True):
        pair.a.send(asked, bytes(size))
        if both_ways:
            pair.b.send(answered, bytes(100))
        while pair.a.has(Priority.BULK):
            pair.move(pair.a)
        drain(pair.b, answered)
        # What was read is worth a grant: with data due it needs no record of control.
        assert pair.b.has(Priority.CONTROL) is not both_ways
        record = pair.b.next_record(Priority.BULK if both_ways else Priority.CONTROL, defaults.MAX_RECORD)
        assert record is not None
        assert record[0][0] in (Frame.CREDIT, Frame.LINK_CREDIT)
        pair.a.receive(Record(memoryview(b"".join(record))), Priority.BULK if both_ways else Priority.CONTROL)
        assert asked._credit == defaults.BULK_WINDOW


def test_streams_of_one_priority_take_turns() -> None:
    pair = Pair(record=1000)
    ends = [pair.open(Priority.BULK) for _ in range(3)]
    for ours, _ in ends:
        pair.a.send(ours, bytes(5000))
    order = []
    for _ in range(9):
        events = pair.move(pair.a)
        assert events is not None
        order += [event.stream.id for event in events if isinstance(event, DataReceived)]
    ids = [theirs.id for _, theirs in ends]
    assert order == ids * 3


def test_a_slow_reader_holds_back_its_own_stream_only() -> None:
    pair = Pair(TINY, record=200)
    slow, far_slow = pair.open(Priority.BULK)
    quick, far_quick = pair.open(Priority.BULK)
    pair.a.send(slow, bytes(10_000))
    pair.a.send(quick, bytes(2000))
    pair.settle()
    assert far_slow.unread == 256
    assert slow.queued == 10_000 - 256
    total = 0
    for _ in range(100):
        total += len(drain(pair.b, far_quick))
        pair.settle()
    assert total == 2000
    assert far_slow.unread == 256


def test_bulk_that_nobody_reads_never_starves_control() -> None:
    pair = Pair(TINY)
    for _ in range(3):
        ours, _theirs = pair.open(Priority.BULK)
        pair.a.send(ours, bytes(10_000))
    pair.settle()
    assert pair.b.live_streams()[2].unread == 0  # the link's bulk credit is used up by the first two
    control, far_control = pair.open()
    pair.a.send(control, b"still here")
    pair.settle()
    assert drain(pair.b, far_control) == b"still here"


def test_credit_of_the_link_comes_back_from_streams_that_were_dropped_unread() -> None:
    pair = Pair(TINY)
    for round in range(50):
        ours, theirs = pair.open(Priority.BULK)
        pair.a.send(ours, bytes(10_000))
        pair.settle()
        assert theirs.unread >= 100, f"no credit is left in round {round}"
        if round % 3 == 0:
            pair.b.reset(theirs)
        elif round % 3 == 1:
            pair.a.reset(ours)
        else:
            pair.b.stop(theirs)
            pair.b.end(theirs)
        pair.settle()
    assert pair.a.streams == pair.b.streams == 0


# Ends


def test_one_half_closes_and_the_other_goes_on() -> None:
    pair = Pair()
    ours, theirs = pair.open()
    pair.a.send(ours, b"question")
    pair.a.end(ours)
    pair.settle()
    assert drain(pair.b, theirs) == b"question"
    assert pair.b.read(theirs, 10) == b""
    assert pair.a.read(ours, 10) is None
    pair.b.send(theirs, b"answer")
    pair.b.end(theirs)
    pair.settle()
    assert drain(pair.a, ours) == b"answer"
    assert pair.a.streams == pair.b.streams == 0
    with pytest.raises(ProtocolMisuse):
        pair.a.send(ours, b"more")


def test_a_reset_arrives_with_its_code_and_frees_both_sides() -> None:
    pair = Pair()
    ours, theirs = pair.open()
    pair.a.send(ours, bytes(100_000))
    pair.a.reset(ours, 777)
    events = pair.settle()
    assert events == [StreamWasReset(theirs)]
    assert theirs.reset_code == 777
    assert pair.a.streams == pair.b.streams == 0
    assert pair.a.read(ours, 10) == b""


def test_data_that_cross_a_reset_are_dropped_without_harm() -> None:
    pair = Pair()
    ours, theirs = pair.open()
    pair.a.send(ours, b"on its way")
    pair.b.reset(theirs)
    assert pair.move(pair.a) == []
    assert pair.move(pair.b) == [StreamWasReset(ours)]
    again, far_again = pair.open()
    pair.a.send(again, b"fine")
    pair.settle()
    assert drain(pair.b, far_again) == b"fine"


def test_a_reader_that_stops_silences_the_sender_but_still_answers() -> None:
    pair = Pair()
    ours, theirs = pair.open(Priority.BULK)
    pair.a.send(ours, bytes(20 << 20))
    pair.move(pair.a)
    pair.b.stop(theirs, ResetCode.NOT_READING)
    pair.b.send(theirs, b"enough")
    pair.b.end(theirs)
    events = pair.settle()
    assert StreamStopped(ours) in events
    assert ours.stop_code == ResetCode.NOT_READING
    assert ours.queued == 0
    assert drain(pair.a, ours) == b"enough"
    assert pair.a.streams == pair.b.streams == 0


def test_what_waits_to_be_sent_when_we_say_goodbye_can_be_dropped_when_the_link_then_ends() -> None:
    pair = Pair()
    stream = pair.a.open("test", Priority.BULK)
    pair.a.send(stream, bytes(1000))
    pair.a.goodbye()
    pair.a.drop_queue(stream)
    assert stream.queued == 0
    assert sum(len(part) for part in pair.a.next_record(Priority.BULK, pair.record) or ()) < 100  # its opening alone


def test_goodbye_carries_a_code_and_a_bounded_reason() -> None:
    pair = Pair()
    stream = pair.a.open("x")
    pair.a.send(stream, bytes(1000))
    pair.a.goodbye(GoodbyeCode.IDLE, "ü" * 1000)
    events = pair.settle()
    (goodbye,) = [event for event in events if isinstance(event, GoodbyeReceived)]
    assert goodbye.code == GoodbyeCode.IDLE
    assert goodbye.reason.startswith("üüü")
    assert not any(isinstance(event, DataReceived) for event in events)


def test_nothing_is_remembered_of_a_hundred_thousand_streams() -> None:
    pair = Pair()

    def some(n: int) -> None:
        for i in range(n):
            ours = pair.a.open("x", Priority(i % 2))
            pair.a.send(ours, b"request")
            if i % 5:
                pair.a.end(ours)
            else:
                pair.a.reset(ours)
            pair.move(pair.a)
            for theirs in pair.b.live_streams():
                drain(pair.b, theirs)
                pair.b.send(theirs, b"answer")
                pair.b.end(theirs)
            pair.move(pair.b)
            drain(pair.a, ours)
            assert pair.a.streams == pair.b.streams == 0

    some(1000)
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    some(5000)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before < 50_000
    some(94_000)
    for mux in (pair.a, pair.b):
        assert not mux._streams
        assert not any(mux._frames)
        assert not mux._ready[0]
        assert not mux._ready[1]


def test_too_many_streams_are_refused_one_by_one_and_the_link_lives() -> None:
    wide = MuxLimits(max_outgoing=20, max_incoming=5)
    pair = Pair(wide)
    streams = [pair.a.open("x") for _ in range(8)]
    events = pair.settle()
    assert len([event for event in events if isinstance(event, StreamOpened)]) == 5
    refused = [event.stream for event in events if isinstance(event, StreamWasReset)]
    assert refused == streams[5:]
    assert [stream.reset_code for stream in refused] == [ResetCode.TOO_MANY_STREAMS] * 3
    pair.a.reset(streams[0])
    ours, theirs = pair.open()
    pair.a.send(ours, b"room again")
    pair.settle()
    assert drain(pair.b, theirs) == b"room again"


def test_our_own_limit_of_streams_is_a_local_error() -> None:
    mux = Mux(initiator=True, limits=TINY)
    for _ in range(8):
        mux.open("x")
    assert not mux.can_open
    with pytest.raises(Overloaded):
        mux.open("x")


def test_one_byte_frames_cost_memory_in_proportion_to_their_bytes() -> None:
    pair = Pair()
    _, theirs = pair.open()
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for _ in range(200):
        # a byte of data in a record full of other frames must not keep that record alive, nor cost an object each
        feed(pair.b, *([frame(Frame.STOP, theirs.id, 1)] * 1000), *([frame(Frame.DATA, theirs.id, 1, b"x")] * 100))
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert theirs.unread == 20_000
    assert after - before < 100_000
    assert drain(pair.b, theirs) == b"x" * 20_000


def test_a_peer_that_makes_us_answer_without_listening_is_cut_off() -> None:
    mux = Mux(initiator=False, limits=TINY, peer="mallory")
    flood = [frame(Frame.OPEN, number << 2 | 1, 1, b"x") for number in range(1, 10_000)]
    with pytest.raises(RemoteProtocolError, match=r"mallory: it keeps opening streams"):
        feed(mux, *flood)


# Peers that break the rules


def opened(number: int = 1, bulk: bool = False) -> bytes:
    return frame(Frame.OPEN, number << 2 | bulk << 1 | 1, 1, b"x")


FIRST = 1 << 2 | 1

BREACHES = {
    "a header cut short": (b"\x02\x00\x00", "within a frame's header"),
    "an unknown kind": (frame(99, 0, 0), "unknown kind of frame, 99"),
    "a frame that announces 4 GB": (frame(Frame.DATA, FIRST, 0xFFFFFFFF, b"x"), "announces 4294967295 bytes"),
    "an open that announces 4 GB": (frame(Frame.OPEN, FIRST, 0xFFFFFFFF), "announces 4294967295 bytes"),
    "an id of ours": (frame(Frame.OPEN, 1 << 2, 1, b"x"), "whose number is ours"),
    "an id again": (opened() + opened(), "again"),
    "an id below the last": (opened(5) + opened(4), "again"),
    "number zero": (frame(Frame.OPEN, 1, 1, b"x"), "again"),
    "a name too long": (frame(Frame.OPEN, FIRST, 65, b"x" * 65), "protocol name of 65 bytes"),
    "no name": (frame(Frame.OPEN, FIRST, 0), "protocol name of 0 bytes"),
    "a name that is no text": (frame(Frame.OPEN, FIRST, 1, b"\xff"), "not UTF-8"),
    "data on a stream nobody opened": (frame(Frame.DATA, FIRST, 1, b"x"), "never opened"),
    "data on our stream never opened": (frame(Frame.DATA, 7 << 2, 1, b"x"), "never opened"),
    "a reset of a stream nobody opened": (frame(Frame.RESET, FIRST, 0), "never opened"),
    "empty data": (opened() + frame(Frame.DATA, FIRST, 0), "empty DATA"),
    "data beyond the stream's credit": (opened() + frame(Frame.DATA, FIRST, 65, bytes(65)), "its credit is 64"),
    "data beyond the link's credit": (
        opened() + opened(2) + opened(3) + b"".join(frame(Frame.DATA, n << 2 | 1, 64, bytes(64)) for n in (1, 2, 3)),
        "the link's credit is 0",
    ),
    "data after the end": (
        opened() + frame(Frame.EOF, FIRST, 0) + frame(Frame.DATA, FIRST, 1, b"x"),
        "",
    ),
    "data after an end that is unread": (
        opened() + frame(Frame.DATA, FIRST, 1, b"x") + frame(Frame.EOF, FIRST, 0) + frame(Frame.DATA, FIRST, 1, b"x"),
        "after the end",
    ),
    "two ends": (
        opened() + frame(Frame.DATA, FIRST, 1, b"x") + frame(Frame.EOF, FIRST, 0) + frame(Frame.EOF, FIRST, 0),
        "second end",
    ),
    "credit never spent": (opened() + frame(Frame.CREDIT, FIRST, 1), "more than it was sent"),
    "credit that would overflow": (opened() + frame(Frame.CREDIT, FIRST, 0xFFFFFFFF), "more than it was sent"),
    "no credit at all": (frame(Frame.LINK_CREDIT, 0, 0), "granted 0 bytes"),
    "link credit never spent": (frame(Frame.LINK_CREDIT, 1, 1), "more than it was sent"),
    "credit for a third priority": (frame(Frame.LINK_CREDIT, 2, 1), "priority 2"),
    "a frame of bulk in a record of control": (
        opened() + frame(Frame.OPEN, 1 << 2 | 2 | 1, 1, b"x"),
        "in the wrong channel",
    ),
    "a goodbye in a record of bulk": (opened(bulk=True) + frame(Frame.GOODBYE, 0, 0), "among bulk"),
    "credit for nothing in a record of bulk": (opened(bulk=True) + frame(Frame.LINK_CREDIT, 1, 1), "more than it was"),
    "a long goodbye": (frame(Frame.GOODBYE, 0, 300, bytes(300)), "goodbye of 300 bytes"),
}


@pytest.mark.parametrize("name", list(BREACHES))
def test_a_breach_of_the_protocol_is_named(name: str) -> None:
    record, words = BREACHES[name]
    mux = Mux(initiator=False, limits=TINY, peer="mallory")
    if not words:
        # The stream had ended and was read: only its id is left, and what comes for it is dropped at the link's cost.
        feed(mux, record)
        assert mux.live_streams()[0].receiving is Receiving.CLOSED
        return
    with pytest.raises(RemoteProtocolError, match="mallory: ") as caught:
        feed(mux, record)
    assert words in str(caught.value)


# Split records


def sealed_body(data: bytes) -> SealedBody:
    sealed = RecordSealer("aegis-128l", bytes(32)).seal_to_keep([b"", data], split=True)
    (record,) = RecordOpener("aegis-128l", bytes(32)).feed(sealed.wire)
    assert record.body is not None
    return record.body


def test_the_body_of_a_split_record_goes_where_the_reader_wants_it() -> None:
    pair = Pair()
    ours, theirs = pair.open(Priority.BULK)
    data = bytes(range(256)) * 200
    target = bytearray(60_000)
    theirs.sink = memoryview(target)
    first = Record(memoryview(frame(Frame.DATA, ours.id, len(data))), sealed_body(data))
    assert pair.b.receive(first, Priority.BULK) == []  # there is room left: nobody need wake up
    assert theirs.unread == 0
    assert len(theirs.sink) == len(target) - len(data)
    assert target[: len(data)] == data
    assert pair.b.receive(Record(memoryview(frame(Frame.DATA, ours.id, 8_800, bytes(8_800)))), Priority.BULK)
    assert len(theirs.sink) == 0
    # What does not fit waits to be read, as anything does.
    theirs.sink = memoryview(target)[:100]
    more = Record(memoryview(frame(Frame.DATA, ours.id, len(data))), sealed_body(data))
    assert pair.b.receive(more, Priority.BULK)
    assert theirs.unread == len(data)
    assert drain(pair.b, theirs) == data


def test_a_body_that_no_frame_announces_breaks_the_protocol() -> None:
    pair = Pair()
    ours, _ = pair.open(Priority.BULK)
    body = sealed_body(bytes(20_000))
    for frames in (b"", frame(Frame.DATA, ours.id, 19_999), frame(Frame.EOF, ours.id, 20_000)):
        with pytest.raises(RemoteProtocolError):
            pair.b.receive(Record(memoryview(frames), body), Priority.BULK)


def test_what_was_queued_when_the_link_said_goodbye_can_still_be_dropped() -> None:
    mux = Mux(initiator=True)
    stream = mux.open("test", Priority.BULK)
    mux.send(stream, b"x" * 100)
    mux.goodbye(GoodbyeCode.LEAVING, "")
    mux.drop_queue(stream)
    assert stream.queued == 0


# Stretches


def _as_records(stretch: Stretch) -> list[bytes]:
    made, at, credits = [], 0, stretch.credits
    for _ in range(stretch.records):
        body = stretch.body[at : at + stretch.piece - len(credits)]
        made.append(credits + frame(Frame.DATA, stretch.stream, len(body), bytes(body)))
        at, credits = at + len(body), b""
    assert at == len(stretch.body)
    return made


@settings(max_examples=200, deadline=None)
@given(
    limit=st.sampled_from([defaults.DIRECT_BODY + 9, 20_000, 65_536]),
    most=st.integers(1, 400_000),
    room=st.integers(0, 9),
    sizes=st.lists(st.one_of(st.integers(1, 500), st.integers(1, 400_000)), min_size=1, max_size=5),
    window=st.integers(60_000, 300_000),
    reads=st.booleans(),
    others=st.integers(0, 2),
)
def test_stretches_carry_what_records_would_within_the_same_credit(
    limit: int, most: int, room: int, sizes: list[int], window: int, reads: bool, others: int
) -> None:
    """Whoever asks for stretches first, and for records where there is none, sends all in order, with its end."""
    pair = Pair(MuxLimits(stream_window=(window, window), link_window=(2 * window, 2 * window)), record=limit)
    ours, theirs = pair.open(Priority.BULK)
    more = [pair.open(Priority.BULK) for _ in range(others)]
    data = [bytes([n + 1]) * size for n, size in enumerate(sizes)]
    got, back = b"", b""
    for each in data:
        pair.a.send(ours, each)
    for stream, _ in more:
        pair.a.send(stream, bytes(1000))
    pair.a.end(ours)
    sent = 0
    for _ in range(10_000):
        stretch = pair.a.next_stretch(limit, most, room)
        if stretch is not None:
            assert 1 <= stretch.records <= min(room, -(-most // limit))
            records = _as_records(stretch)
            assert max(map(len, records)) <= limit
            assert all(len(record) == limit for record in records[:-1])
            sent += len(stretch.body)
            for record in records:
                pair.b.receive(Record(memoryview(record)), Priority.BULK)  # raises where the credit does not suffice
        elif pair.move(pair.a) is None and pair.move(pair.b) is None:
            break
        pair.a.take_drained()
        if reads:
            got += drain(pair.b, theirs)
            if ours.receiving is Receiving.OPEN and len(back) < 5000 and theirs.sending is Sending.OPEN:
                pair.b.send(theirs, b"back")
                back += b"back"
    if not reads:
        assert len(got) <= window
        got = drain(pair.b, theirs)
        assert got == b"".join(data)[: len(got)]
        assert len(got) == min(window, sum(sizes)) or len(got) > window - limit - 9 or others
    else:
        assert got == b"".join(data)
        assert theirs.receiving is Receiving.CLOSED and ours.sending is Sending.CLOSED
        assert not ours.queued


def test_small_data_before_bulk_go_ahead_in_a_record_of_their_own() -> None:
    pair = Pair()
    stream = pair.a.open("x", Priority.BULK)
    pair.a.send(stream, b"head")
    pair.a.send(stream, b"more")
    pair.a.send(stream, bytes(2 << 20))
    record = pair.a.next_record(Priority.BULK, defaults.MAX_RECORD)
    assert record is not None
    assert b"".join(record) == frame(Frame.OPEN, stream.id, 1, b"x") + frame(Frame.DATA, stream.id, 8, b"headmore")
    stretch = pair.a.next_stretch(defaults.MAX_RECORD, 2 << 20, 64)
    assert stretch is not None and stretch.records == 4 and not stretch.credits
    # What fits into one record with them does not wait.
    other = pair.a.open("x", Priority.CONTROL)
    pair.a.send(other, b"head")
    pair.a.send(other, bytes(100_000))
    record = pair.a.next_record(Priority.CONTROL, defaults.MAX_RECORD)
    assert record is not None and len(b"".join(record)) > 100_000


def test_a_grant_goes_along_with_a_stretch() -> None:
    pair = Pair()
    ours, theirs = pair.open(Priority.BULK)
    size = defaults.BULK_WINDOW // 4
    pair.b.send(theirs, bytes(size))
    pair.a.send(ours, bytes(4 << 20))
    while pair.move(pair.b) is not None:
        pass
    drain(pair.a, ours)
    stretch = pair.a.next_stretch(defaults.MAX_RECORD, 2 << 20, 64)
    assert stretch is not None
    assert stretch.credits == frame(Frame.CREDIT, ours.id, size)
    assert not pair.a.has(Priority.CONTROL)
    assert pair.a.next_stretch(defaults.MAX_RECORD, 2 << 20, 64).credits == b""  # type: ignore[union-attr]
