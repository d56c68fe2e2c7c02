"""Sessions: records survive their pipes, in order and once, whatever the pipes do; peers that lie about it."""

from __future__ import annotations

import struct

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.transport import defaults, pump
from shoal.transport.aead import NOMINAL_CIPHERS
from shoal.transport.errors import RemoteProtocolError
from shoal.transport.records import Record, RecordOpener, RecordSealer
from shoal.transport.session import BULK, HEAD_BYTES, PIPE, Inbox, Outbox, Session

CIPHER = NOMINAL_CIPHERS[-1].name


class Wire:
    """One pipe in one direction: sealed records in order; it may die with records on it."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.sealer = RecordSealer(CIPHER, bytes([index]) * 32)
        self.opener = RecordOpener(CIPHER, bytes([index]) * 32)
        self.records: list[bytearray] = []


@attrs.frozen
class Op:
    what: str
    pipe: int
    channel: int


OPS = st.lists(
    st.builds(
        Op,
        st.sampled_from(["send", "send", "send", "deliver", "deliver", "answer", "kill", "drop_half"]),
        st.integers(0, 2),
        st.integers(0, 1),
    ),
    max_size=80,
)


@settings(max_examples=300, deadline=None)
@given(ops=OPS)
def test_whatever_dies_every_record_arrives_once_and_in_order(ops: list[Op]) -> None:
    sender, receiver = Session((1 << 20, 1 << 20)), Session((1 << 20, 1 << 20))
    pipes = {i: Wire(i) for i in range(3)}
    serial = 3
    sent: tuple[list[bytes], list[bytes]] = ([], [])
    got: tuple[list[bytes], list[bytes]] = ([], [])
    counter = 0

    def send(pipe: Wire, channel: int, payload: bytes | None) -> bool:
        wire = sender.compose(channel, pipe.index, pipe.sealer, lambda: None if payload is None else (payload,))
        if wire is None:
            return False
        pipe.records.append(wire)
        return True

    def deliver(pipe: Wire) -> None:
        for plain in pipe.opener.feed(pipe.records.pop(0)):
            kind, payloads = receiver.receive(plain)
            got[kind].extend(bytes(payload) for payload in payloads)

    def answer() -> None:
        # acknowledgements come back out of band of what is tested here
        back = RecordOpener(CIPHER, b"b" * 32)
        for plain in back.feed(receiver.seal(RecordSealer(CIPHER, b"b" * 32), b"")):
            assert sender.receive(plain)[0] == PIPE

    for op in ops:
        pipe = list(pipes.values())[op.pipe]
        if op.what == "send":
            payload = counter.to_bytes(4, "big")
            before = sender.out[op.channel].next
            assert send(pipe, op.channel, payload)
            if sender.out[op.channel].next > before:  # else it was one that had to be repeated
                sent[op.channel].append(payload)
                counter += 1
        elif op.what == "deliver":
            if pipe.records:
                deliver(pipe)
        elif op.what == "answer":
            answer()
        else:
            while op.what == "drop_half" and len(pipe.records) > 1:
                deliver(pipe)  # the beginning arrived, the rest is lost with the pipe
                pipe.records.pop()
            del pipes[pipe.index]
            sender.lost(pipe.index)
            pipes[serial] = Wire(serial)
            serial += 1
    for pipe in list(pipes.values()):
        for channel in (0, 1):
            while send(pipe, channel, None):
                pass
    for pipe in pipes.values():
        while pipe.records:
            deliver(pipe)
    answer()
    assert got == sent
    assert sender.out[0].kept == sender.out[1].kept == 0
    assert not sender.out[0].kept_on and not sender.out[1].kept_on


def keep(outbox: Outbox, pipe: int = 0) -> None:
    outbox.keep(pipe, RecordSealer(CIPHER, bytes(32)).seal_to_keep((bytes(100),)))


def test_an_acknowledgement_of_what_was_never_sent_breaks_the_protocol() -> None:
    outbox = Outbox()
    keep(outbox)
    outbox.acknowledge(1)
    with pytest.raises(RemoteProtocolError, match="never sent"):
        outbox.acknowledge(2)


def test_an_acknowledgement_that_was_overtaken_changes_nothing() -> None:
    outbox = Outbox()
    for _ in range(3):
        keep(outbox)
    outbox.acknowledge(3)
    outbox.acknowledge(1)
    assert outbox.kept == 0


def test_numbers_go_on_beyond_four_thousand_million() -> None:
    outbox, inbox = Outbox(), Inbox(1 << 20)
    outbox._next = outbox._acknowledged = inbox._expected = (1 << 32) - 2
    for i in range(5):
        keep(outbox)
        came = inbox.take((outbox.next - 1) & 0xFFFFFFFF, Record(memoryview(bytes([i]))))
        assert [bytes(record) for record in came] == [bytes([i])]
        outbox.acknowledge(inbox.expected)
    assert inbox.expected == 3
    assert outbox.kept == 0


def test_a_peer_that_never_acknowledges_cannot_make_us_keep_everything() -> None:
    outbox = Outbox()
    sealed = RecordSealer(CIPHER, bytes(32)).seal_to_keep((bytes(1 << 18),))
    while outbox.kept + len(sealed.wire) <= defaults.MAX_UNACKNOWLEDGED:
        outbox.keep(0, sealed)
    with pytest.raises(RemoteProtocolError, match="never acknowledges"):
        outbox.keep(0, sealed)
    assert outbox.kept <= defaults.MAX_UNACKNOWLEDGED + (1 << 19)


def test_early_records_are_bounded_in_number_and_bytes() -> None:
    inbox = Inbox(10_000)
    for number in range(1, 11):
        inbox.take(number, Record(memoryview(bytes(1000))))
    with pytest.raises(RemoteProtocolError, match="too far ahead"):
        inbox.take(11, Record(memoryview(b"x")))
    with pytest.raises(RemoteProtocolError, match="too far ahead"):
        Inbox(1 << 20).take(defaults.MAX_EARLY_RECORDS + 1, memoryview(b""))


def test_a_duplicate_is_dropped_also_while_it_waits() -> None:
    inbox = Inbox(1 << 20)
    assert not inbox.take(1, Record(memoryview(b"b")))
    assert not inbox.take(1, Record(memoryview(b"x")))
    assert [bytes(p) for p in inbox.take(0, Record(memoryview(b"a")))] == [b"a", b"b"]
    assert not inbox.take(0, Record(memoryview(b"a")))


def test_nothing_is_acknowledged_for_its_own_sake_before_it_is_worth_it() -> None:
    inbox = Inbox(1 << 30)
    for number in range(defaults.ACKNOWLEDGE_RECORDS - 1):
        inbox.take(number, Record(memoryview(b"x")))
    assert not inbox.owes
    inbox.take(defaults.ACKNOWLEDGE_RECORDS - 1, Record(memoryview(b"x")))
    assert inbox.owes
    inbox.told()
    assert not inbox.owes
    inbox.take(defaults.ACKNOWLEDGE_RECORDS, Record(memoryview(bytes(defaults.ACKNOWLEDGE_BYTES))))
    assert inbox.owes


@pytest.mark.parametrize(
    ("record", "words"),
    [(b"", "shorter than its head"), (bytes(HEAD_BYTES - 1), "shorter"), (struct.pack(">BIII", 3, 0, 0, 0), "kind, 3")],
)
def test_a_head_that_makes_no_sense_breaks_the_protocol(record: bytes, words: str) -> None:
    with pytest.raises(RemoteProtocolError, match=words):
        Session((10, 10)).receive(Record(memoryview(record)))


# Runs of records


@pytest.mark.skipif(pump.active is None, reason=f"no native helper: {pump.which()}")
@settings(max_examples=200, deadline=None)
@given(
    runs=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    arrived=st.integers(0, 12),
    acknowledged=st.integers(0, 12),
    singles=st.integers(0, 2),
    died=st.booleans(),
)
def test_a_run_is_acknowledged_in_part_and_what_is_left_of_it_goes_out_again_record_by_record(
    runs: list[int], arrived: int, acknowledged: int, singles: int, died: bool
) -> None:
    sender, receiver = Session((1 << 20, 1 << 22)), Session((1 << 20, 1 << 22))
    first, second = Wire(0), Wire(1)
    piece, sent, wires = 20_000, [], []
    got: list[bytes] = []

    def deliver(pipe: Wire, wire: bytes) -> None:
        for plain in pipe.opener.feed(wire):
            kind, payloads = receiver.receive(plain)
            assert kind == BULK
            got.extend(bytes(payload) for payload in payloads)

    def tell() -> None:
        back = RecordSealer(CIPHER, b"b" * 32)
        for plain in RecordOpener(CIPHER, b"b" * 32).feed(receiver.seal(back, b"")):
            sender.receive(plain)

    for count in runs:
        body = bytes([len(sent) + 1]) * (piece * (count - 1) + 16_500)
        it = pump.Stretch(6, b"", memoryview(body), piece, count)
        made, gone, error = sender.launch(
            first.index,
            first.sealer,
            lambda most, room, it=it: it,  # type: ignore[misc]
            1 << 20,
            lambda sealer, head, it: sealer.launch(-1, head, it),
        )
        assert (gone, error) == (0, 0)
        wires += [bytes(wire) for wire in made]
        for n in range(count):
            data = body[n * piece : (n + 1) * piece]
            sent.append(struct.pack(">BII", 2, 6, len(data)) + data)
    for n in range(singles):
        wire = sender.compose(BULK, first.index, first.sealer, lambda n=n: (b"single %d" % n,))  # type: ignore[misc]
        assert wire is not None
        wires.append(bytes(wire))
        sent.append(b"single %d" % n)
    assert sender.out[BULK].kept == sum(map(len, wires))
    for n, wire in enumerate(wires[:arrived]):
        deliver(first, wire)
        if n + 1 == acknowledged:
            tell()
            assert sender.out[BULK].kept == sum(map(len, wires[n + 1 :]))
    assert sum(sender.out[BULK].kept_on.values()) == sender.out[BULK].kept
    if not died:
        for wire in wires[arrived:]:
            deliver(first, wire)
    else:
        sender.lost(first.index)
        while (again := sender.compose(BULK, second.index, second.sealer, lambda: None)) is not None:
            deliver(second, bytes(again))
    tell()
    assert got == sent
    assert sender.out[BULK].kept == 0 and not sender.out[BULK].kept_on


@pytest.mark.skipif(pump.active is None, reason=f"no native helper: {pump.which()}")
def test_a_run_ends_where_the_peer_could_not_hold_more_early_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "MAX_EARLY_RECORDS", 10)
    sender, receiver = Session((1 << 20, 1 << 22)), Session((1 << 20, 1 << 22))
    stalled, other = Wire(0), Wire(1)
    assert sender.compose(BULK, stalled.index, stalled.sealer, lambda: (b"never arrives",)) is not None
    for _ in range(7):
        wire = sender.compose(BULK, other.index, other.sealer, lambda: (b"small",))
        assert wire is not None
        for record in other.opener.feed(wire):
            receiver.receive(record)
    allowed = []

    def found(most: int, records: int) -> pump.Stretch | None:
        allowed.append(records)
        return None if records < 1 else pump.Stretch(6, b"", memoryview(bytes(20_000 * records)), 20_000, records)

    wires, _, _ = sender.launch(
        other.index, other.sealer, found, 1 << 20, lambda sealer, head, it: sealer.launch(-1, head, it)
    )
    assert len(wires) == allowed[0] == 3 and sender.out[BULK].full
    for wire in wires:
        for record in other.opener.feed(bytes(wire)):
            receiver.receive(record)  # raises where one is too far ahead
    assert sender.launch(other.index, other.sealer, found, 1 << 20, lambda *_: pytest.fail("full"))[0] == ()
