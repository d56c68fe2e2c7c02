"""The native helper for runs of records against the Python that does the same: no other bytes, nothing unverified."""

from __future__ import annotations

import errno
import random
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import attrs
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.transport import defaults, pump
from shoal.transport.aead import SUITES, Aead
from shoal.transport.errors import RecordError
from shoal.transport.frames import Frame, Priority
from shoal.transport.intake import TakesRecords
from shoal.transport.network import remaining
from shoal.transport.records import HEADER, Record, RecordOpener, RecordSealer
from shoal.transport.session import Session
from shoal.transport.stream import LinkStream

from .harness import Real, link_pair
from .link_conformance import pattern

SECRET = bytes(range(32))
NAMES = list(SUITES)
HEAD = struct.Struct(">BIIIBII")
SIZE = 300_000  # of a record that is received in its place
GRANT = struct.pack(">BII", Frame.CREDIT, 6, 1000)

native = pytest.mark.skipif(pump.active is None, reason=f"no native helper: {pump.which()}")


def head(number: int, size: int, stream: int = 6, control: int = 1, bulk: int = 2) -> bytes:
    return HEAD.pack(Priority.BULK, number, control, bulk, Frame.DATA, stream, size)


@contextmanager
def pure() -> Iterator[None]:
    before, pump.active = pump.active, None
    try:
        yield
    finally:
        pump.active = before


# --- sending -----------------------------------------------------------------------------------------------------


def stretch(size: int, piece: int, grants: int = 0, stream: int = 6) -> pump.Stretch:
    body = memoryview(random.Random(size).randbytes(size))
    first = piece - len(GRANT) * grants
    return pump.Stretch(stream, GRANT * grants, body, piece, 1 + -(-max(0, size - first) // piece))


def parts(it: pump.Stretch, number: int, control: int, bulk: int) -> list[tuple[bytes, memoryview]]:
    """The head and the body of each record of a stretch, made one by one."""
    made, at, credits = [], 0, it.credits
    for n in range(it.records):
        body = it.body[at : at + it.piece - len(credits)]
        session = struct.pack(">BIII", Priority.BULK, number + n & 0xFFFFFFFF, control, bulk)
        made.append((session + credits + struct.pack(">BII", Frame.DATA, it.stream, len(body)), body))
        at, credits = at + len(body), b""
    assert at == len(it.body)
    return made


@native
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 90_000), min_size=1, max_size=4),
    piece=st.integers(400, 30_000),
    grants=st.integers(0, 32),
    number=st.integers(0xFFFFFFF0, 0xFFFFFFFF) | st.integers(0, 99),
    dropped=st.integers(0, 3),
    rekey_after=st.integers(2, 400),
)
def test_a_run_is_the_same_bytes_as_its_records_one_by_one(
    name: str, sizes: list[int], piece: int, grants: int, number: int, dropped: int, rekey_after: int
) -> None:
    sealer, other = (RecordSealer(name, SECRET, rekey_after=rekey_after) for _ in range(2))
    for size in sizes:
        it = stretch(size, piece, grants)
        if it.records > sealer.room:
            for one in (sealer, other):
                one.seal([b"to the next key"])
            continue
        made = parts(it, number, 7, 9)
        run, sent, error = sealer.launch(-1, (number, 7, 9), it)
        assert (sent, error, run.count) == (0, 0, it.records)
        assert [bytes(wire) for wire in run.wires] == [bytes(other._seal_split(*each).wire) for each in made]
        assert run.size == sum(map(len, run.wires))
        less = min(dropped, run.count - 1)
        lost = sum(map(len, run.wires[:less]))
        assert run.drop(less) == lost and run.size == sum(map(len, run.wires))
        assert [bytes(sealed.plain()) for sealed in run.singly()] == [head + body for head, body in made[less:]]


@native
def test_what_the_socket_takes_is_sent_in_order_and_the_rest_is_left() -> None:
    out, into = socket.socketpair()
    with out, into:
        for end in (out, into):
            end.setblocking(False)
        sealer = RecordSealer(NAMES[0], SECRET)
        it = stretch(4 << 20, 300_000)
        run, sent, error = sealer.launch(out.fileno(), (0, 0, 0), it)
        assert error == 0 and 0 < sent < run.size
        came = b""
        while len(came) < sent:
            came += into.recv(1 << 20)
        assert came == b"".join(map(bytes, run.wires))[:sent]
        left = remaining(run.wires, sent)
        assert came + b"".join(map(bytes, left)) == b"".join(map(bytes, run.wires))
        into.close()
        run, sent, error = sealer.launch(out.fileno(), (14, 0, 0), it)
        assert (sent, error) == (0, errno.EPIPE)
        assert [bytes(sealed.plain()) for sealed in run.singly()] == [a + b for a, b in parts(it, 14, 0, 0)]
    run, sent, error = sealer.launch(out.fileno(), (28, 0, 0), it)  # closed: as if nobody were to send to
    assert (sent, error) == (0, 0)


@native
def test_a_run_that_does_not_fit_is_refused_and_nothing_is_written() -> None:
    aead = Aead(SUITES[NAMES[0]], bytes(SUITES[NAMES[0]].key))
    good, small = (memoryview(bytearray(b"." * size)) for size in (1000, 200))
    for buffers, body, piece, credits in (
        ([good, small], 900, 500, b""),
        ([good], 900, 500, b""),
        ([good, good, good], 900, 500, b""),
        ([], 900, 500, b""),
        ([good], 0, 500, b""),
        ([good, good], 900, 500, GRANT[:-1]),
        ([good, good], 900, 500, GRANT * 60),
        ([good, good], 30, 18, GRANT * 2),
        ([good], 900, 0, b""),
        ([good], 900, -5, b""),
        ([good], 900, 1 << 40, b""),
        ([good] * (pump.MOST_RUN + 1), 500 * (pump.MOST_RUN + 1), 500, b""),
    ):
        with pytest.raises(ValueError, match="not the buffers"):
            pump.launch(aead, 0, -1, buffers, (0, 0, 0), pump.Stretch(6, credits, memoryview(bytes(body)), piece, 1))
        assert set(bytes(good)) == set(bytes(small)) == {ord(".")}
    for bad in (memoryview(bytes(1000)), "text", None):
        with pytest.raises((TypeError, BufferError)):
            pump.launch(
                aead,
                0,
                -1,
                [good, bad],
                (0, 0, 0),
                pump.Stretch(6, b"", memoryview(bytes(900)), 500, 2),  # type: ignore[list-item]
            )
    assert set(bytes(good)) == {ord(".")}


def test_what_is_left_of_records_begins_where_sending_stopped() -> None:
    wires = [b"abc", b"de", b"f"]
    for sent in range(7):
        assert b"".join(map(bytes, remaining(wires, sent))) == b"abcdef"[sent:]
        assert all(map(len, remaining(wires, sent)))


# --- receiving ---------------------------------------------------------------------------------------------------


@attrs.define
class Line:
    """A socket, and the opener that reads it: by :meth:`RecordOpener.land` where it may, else as the intake does."""

    out: socket.socket
    into: socket.socket
    opener: RecordOpener
    sink: memoryview
    number: int = 0
    stream: int = 6
    landed: int = 0  # bytes in the sink
    runs: list[pump.Run] = attrs.Factory(list)
    others: list[tuple[int, bytes]] = attrs.Factory(list)  # what went to the layers above, and after how many bytes

    def read(self) -> None:
        """Take in what is there."""
        while True:
            room = self.opener.room()
            if self.opener.at_lane:
                lane = pump.Lane(self.number, self.stream, self.sink[self.landed :])
                run, left = self.opener.land(self.into.fileno(), lane, 1 << 20)
                self.number += run.records
                self.landed += run.size
                self.runs.append(run)
                self._take(left)
                if run.drained or not run.came:
                    return
                continue
            try:
                if room is not None:
                    self._take(self.opener.fill(self.into.recv_into(room)))
                elif come := self.into.recv(16384):
                    self._take(self.opener.feed(come))
                else:
                    return
            except BlockingIOError:
                return

    def _take(self, left: list[Record]) -> None:
        for record in left:
            whole = bytes(record.whole())
            self.others.append((self.landed, whole))
            if len(whole) >= HEAD.size and whole[0] == Priority.BULK:
                self.number += 1


@contextmanager
def line(name: str, sink: int, rekey_after: int = defaults.REKEY_RECORDS) -> Iterator[Line]:
    out, into = socket.socketpair()
    with out, into:
        for end in (out, into):
            end.setblocking(False)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
        opener = RecordOpener(name, SECRET, rekey_after=rekey_after)
        opener._largest = 1 << 20  # it has sent large ones before
        yield Line(out, into, opener, memoryview(bytearray(sink)))


def carry(line: Line, wire: bytes, cuts: list[int]) -> None:
    """Send ``wire`` in the pieces that end at ``cuts``, reading what there is after each."""
    at = 0
    for stop in [*sorted({cut for cut in cuts if 0 < cut < len(wire)}), len(wire)]:
        while at < stop:
            try:
                at += line.out.send(wire[at:stop])
            except BlockingIOError:
                pass
            line.read()


def sealed(name: str, plain: list[tuple[bytes, bytes]], rekey_after: int = defaults.REKEY_RECORDS) -> list[bytes]:
    sealer = RecordSealer(name, SECRET, rekey_after=rekey_after)
    return [bytes(sealer.seal_to_keep(each, split=True).wire) for each in plain]


def data(count: int, size: int = SIZE, first: int = 0) -> list[tuple[bytes, bytes]]:
    return [(head(first + n, size), random.Random(n).randbytes(size)) for n in range(count)]


@native
@pytest.mark.parametrize("name", NAMES)
def test_records_land_where_their_data_belong(name: str) -> None:
    plain = data(7)
    with line(name, 7 * SIZE) as it:
        carry(it, b"".join(sealed(name, plain)), [])
        assert bytes(it.sink) == b"".join(body for _, body in plain)
        assert it.landed == 7 * SIZE and it.others == []
        assert it.runs[-1].control == 1 and it.runs[-1].bulk == 2
        assert it.opener.opened == 14
        it.opener.eof()


@native
@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(-60, 60), max_size=12), at=st.lists(st.integers(0, 3), min_size=12, max_size=12))
def test_a_cut_at_any_boundary_changes_nothing(cuts: list[int], at: list[int]) -> None:
    plain = data(3)
    wires = sealed(NAMES[0], plain)
    starts = [0, len(wires[0]), len(wires[0] + wires[1]), sum(map(len, wires))]
    with line(NAMES[0], 3 * SIZE) as it:
        carry(it, b"".join(wires), [starts[place] + cut for cut, place in zip(cuts, at, strict=False)])
        assert bytes(it.sink) == b"".join(body for _, body in plain)
        assert it.others == []


def _mixed(draw: random.Random) -> list[tuple[bytes, bytes]]:
    """Data of the stream, and everything else that may come between."""
    plain, number = [], 0
    for _ in range(draw.randrange(3, 9)):
        size = draw.choice([SIZE, SIZE + draw.randrange(1000), 262_200, 20_000, 100])
        match draw.choice("dddddosepxk"):
            case "d":
                first = head(number, size)
            case "o":
                first = head(number, size, stream=10)
            case "s":
                first = head(number, size)[:13] + b"\x06" + head(number, size)[14:]  # credit, as it were
            case "e":
                first = head(number + 3, size)
            case "p":
                first, size = b"\x02" + bytes(12), 40
            case "x":
                first = head(number, size) + b"more"
            case _:
                first = head(number, size + 1)
        number += first[0] == Priority.BULK
        plain.append((first, draw.randbytes(size)))
    return plain


@native
@pytest.mark.parametrize("rekey_after", [2, 3, 7, defaults.REKEY_RECORDS])
@pytest.mark.parametrize("seed", range(6))
def test_what_it_does_not_know_goes_to_the_layers_above_in_order(seed: int, rekey_after: int) -> None:
    draw = random.Random(seed)
    plain = _mixed(draw)
    name = draw.choice(NAMES)
    wire = b"".join(sealed(name, plain, rekey_after))
    with line(name, sum(len(body) for _, body in plain), rekey_after) as it:
        carry(it, wire, [draw.randrange(len(wire)) for _ in range(draw.randrange(6))])
        told = iter(it.others)
        at, number, following = 0, 0, next(told, None)
        for first, body in plain:
            if following is not None and following == (at, first + body):
                following = next(told, None)
            else:  # it landed: then it was exactly what was expected
                assert first == head(number, len(body))
                assert it.sink[at : at + len(body)] == body
                at += len(body)
            number += first[0] == Priority.BULK
        assert following is None and at == it.landed
        it.opener.eof()


@native
@pytest.mark.parametrize("begun", [0, 1, 3, 4, 30])
def test_a_run_begins_between_two_records_and_finds_a_small_one_first(begun: int) -> None:
    """Whatever of the next record is there when it begins, and whichever record it is."""
    plain = data(3)
    small = (b"\x00" + bytes(12), b"control")
    wires = sealed(NAMES[0], [plain[0], small, plain[1], plain[2]])
    with line(NAMES[0], 3 * SIZE) as it:
        carry(it, wires[0], [])
        assert it.opener.at_lane  # with nothing there
        run, left = it.opener.land(it.into.fileno(), pump.Lane(1, 6, it.sink[SIZE:]), 1 << 20)
        assert run == pump.Run(0, 0, 0, True, 0, 0, 0) and left == []
        carry(it, wires[1] + wires[2][:begun], [])
        assert it.others == [(SIZE, b"".join(small))]
        carry(it, wires[2][begun:] + wires[3], [])
        assert it.landed == 3 * SIZE and len(it.others) == 1
        assert bytes(it.sink) == b"".join(body for _, body in plain)
        it.opener.eof()


@native
def test_a_length_out_of_bounds_between_two_records_is_refused() -> None:
    for word in (1 << 31 | HEAD.size << 22 | 5, 1 << 31 | 31 << 22 | 60, 1 << 31 | 511 << 22 | 540, 0xFFFFFFFF, 7):
        with line(NAMES[0], 3 * SIZE) as it:
            carry(it, sealed(NAMES[0], data(1))[0], [])
            with pytest.raises(RecordError, match="announces"):
                carry(it, struct.pack(">I", word) + bytes(600), [])
            assert it.landed == SIZE


@native
def test_credit_in_the_heads_lands_too_and_anything_else_there_is_left_to_the_layers_above() -> None:
    draw = random.Random(3)
    plain, told = [], b""
    for number in range(40):
        body = draw.randbytes(262_200)
        grants = b"".join(
            struct.pack(
                ">BII", draw.choice([Frame.CREDIT, Frame.LINK_CREDIT]), draw.randrange(99), draw.randrange(1, 99)
            )
            for _ in range(draw.choice([0, 0, 1, 2, 31]))
        )
        told += grants
        whole = head(number, len(body))
        plain.append((whole[:13] + grants + whole[13:], body))
    with line(NAMES[0], 40 * 262_200) as it:
        carry(it, b"".join(sealed(NAMES[0], plain)), [])
        assert it.others == [] and bytes(it.sink) == b"".join(body for _, body in plain)
        assert b"".join(run.credits for run in it.runs) == told
    for odd in (Frame.OPEN, Frame.DATA, Frame.EOF, Frame.STOP, Frame.RESET, 0, 13, 255):
        with line(NAMES[0], 2 * SIZE) as it:
            whole = head(1, SIZE)
            other = whole[:13] + struct.pack(">BII", odd, 6, 0) + whole[13:]
            body = bytes(SIZE)
            carry(it, b"".join(sealed(NAMES[0], [*data(1), (other, body)])), [])
            assert it.landed == SIZE and it.others == [(SIZE, other + body)]


@native
def test_no_more_lands_than_the_reader_wants() -> None:
    plain = data(3)
    with line(NAMES[0], SIZE + 1000) as it:
        carry(it, b"".join(sealed(NAMES[0], plain)), [])
        assert it.landed == SIZE
        assert bytes(it.sink[SIZE:]) == bytes(1000)
        assert [whole[HEAD.size :] for _, whole in it.others] == [plain[1][1], plain[2][1]]


@native
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", ["header", "head", "head's tag", "body", "body's tag"])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_an_altered_record_is_refused_and_not_counted(name: str, where: str, which: int) -> None:
    plain = data(3)
    wires = [bytearray(wire) for wire in sealed(name, plain)]
    tag = SUITES[name].tag
    at = {"header": 3, "head": 10, "head's tag": HEADER + HEAD.size + 3, "body": HEADER + HEAD.size + tag + 999}
    wires[which][at.get(where, len(wires[which]) - 1)] ^= 1
    with line(name, 3 * SIZE) as it:
        with pytest.raises(RecordError, match="altered"):
            carry(it, b"".join(wires) + bytes(64), [len(wires[0]), len(wires[0] + wires[1])])
        assert it.landed <= which * SIZE
        assert it.sink[: it.landed] == b"".join(body for _, body in plain)[: it.landed]
        with pytest.raises(RecordError, match="altered"):
            it.opener.feed(b"")
        assert not it.opener.at_lane


@native
@pytest.mark.parametrize("length", [0, 5, 21 + 33, 1 << 21, (1 << 22) - 1, 262_143])
def test_a_length_out_of_bounds_after_a_run_is_left_to_the_opener(length: int) -> None:
    plain = data(2)
    wrong = struct.pack(">I", 1 << 31 | HEAD.size << 22 | length)
    with line(NAMES[0], 9 * SIZE) as it:
        wire = b"".join(sealed(NAMES[0], plain)) + wrong
        if length in (262_143,):
            carry(it, wire + bytes(100), [])  # in bounds, and smaller than what is received in place
            assert it.landed == 2 * SIZE and not it.opener.at_lane
        else:
            with pytest.raises(RecordError, match="announces"):
                carry(it, wire, [])


@native
def test_the_end_of_the_connection_and_its_failure_are_told_apart() -> None:
    wires = sealed(NAMES[0], data(2))
    with line(NAMES[0], 2 * SIZE) as it:
        carry(it, wires[0] + wires[1][:1000], [])
        assert it.landed == SIZE and it.opener.at_lane and it.runs[-1].drained
        it.out.close()
        it.read()
        assert it.runs[-1] == pump.Run(0, 0, 0, False, 0, 0, 0)
        with pytest.raises(RecordError, match="inside record 2"):
            it.opener.eof()
    with line(NAMES[0], 2 * SIZE) as it:
        carry(it, wires[0] + wires[1][:1000], [])
        lane = pump.Lane(1, 6, it.sink[SIZE:])
        run, left = it.opener.land(-1, lane, 1 << 20)
        assert (run.error, run.records, left) == (errno.EBADF, 0, [])


@native
def test_arguments_that_do_not_fit_each_other_are_refused() -> None:
    suite = SUITES[NAMES[0]]
    word = 1 << 31 | HEAD.size << 22 | SIZE + HEAD.size + 2 * suite.tag
    room, sink = bytearray(SIZE + 200), bytearray(SIZE)
    arguments = [
        0, suite.addresses[1], suite.nonce, suite.counter_at, suite.tag, bytes(suite.key), 0, room, word, 0, 0,
        1 << 20, 0, 6, sink, 1,
    ]  # fmt: skip
    for place, wrong in (
        (1, 0), (2, 99), (3, 13), (3, -1), (4, 0), (4, 99), (5, b"short"), (7, bytearray(SIZE)), (8, word & ~(1 << 31)),
        (8, 1 << 31 | HEAD.size << 22 | 40), (9, -1), (9, SIZE + 5000), (15, 0),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="not "):
            pump.active.receive(*arguments[:place], wrong, *arguments[place + 1 :])
    for place in (7, 14):
        with pytest.raises((TypeError, BufferError)):
            pump.active.receive(*arguments[:place], bytes(SIZE + 200), *arguments[place + 1 :])


# --- the links that use it ---------------------------------------------------------------------------------------


@native
@pytest.mark.real(timeout=60)
@pytest.mark.parametrize("ours", ["native", "pure"])
async def test_links_carry_the_same_with_the_helper_and_without(ours: str, monkeypatch: pytest.MonkeyPatch) -> None:
    landed = []
    land = TakesRecords._land

    def watched(self: TakesRecords, pipe, opener, stream, lane, most):  # type: ignore[no-untyped-def]
        came = land(self, pipe, opener, stream, lane, most)
        landed.append(came)
        return came

    monkeypatch.setattr(TakesRecords, "_land", watched)
    if ours == "pure":
        monkeypatch.setattr(pump, "active", None)
    size = 24 << 20
    async with link_pair(Real()) as pair:
        out = await pair.a.open_stream("x", Priority.BULK)
        into = await pair.accept()
        for number in range(2):
            sent, got = pattern(size + number), bytearray(size + number)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(into.read_exactly_into, memoryview(got))
                nursery.start_soon(out.send_all, sent)
            assert got == sent
        back = bytearray(1000)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(out.read_exactly_into, memoryview(back))
            nursery.start_soon(into.send_all, pattern(1000))
        assert back == pattern(1000)
        assert pair.a.alive and pair.b.alive
        assert bool(landed) is (ours == "native")


@native
@pytest.mark.real(timeout=60)
async def test_nearly_all_of_a_transfer_goes_past_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways at the same time, so that grants of credit go along, in messages with a head: what a round does."""
    landed = 0
    seen = Session.landed

    def counted(self: Session, run: pump.Run) -> None:
        nonlocal landed
        landed += run.size
        seen(self, run)

    monkeypatch.setattr(Session, "landed", counted)
    size, heads = 16 << 20, pattern(300)
    async with link_pair(Real()) as pair:

        async def one(out: LinkStream, into: LinkStream) -> None:
            sent, got, first = pattern(size), bytearray(size), bytearray(len(heads))

            async def send() -> None:
                assert out.post(heads)
                await out.send_last(sent)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                await into.read_exactly_into(memoryview(first))
                await into.read_exactly_into(memoryview(got))
            assert first == heads and got == sent
            assert await into.receive_some() == b""

        for _ in range(2):  # in the first the line is not known yet
            out = await pair.a.open_stream("x", Priority.BULK)
            landed = 0
            async with trio.open_nursery() as nursery:
                nursery.start_soon(one, out, back := await pair.accept())
                nursery.start_soon(one, back, out)
        assert landed >= 2 * size * 0.75


def test_pure_python_is_taken_on_request_and_the_reason_is_said() -> None:
    code = "from shoal.transport import pump; print(pump.active, '|', pump.which())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"SHOAL_PURE": "1", "PATH": ""}
    )
    assert done.stdout.strip() == "None | pure Python (SHOAL_PURE is set)"


def test_without_a_helper_or_with_an_old_one_pure_python_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shoal.transport._pump", None)
    chosen, why = pump.load(pure=False)
    assert chosen is None and not why.native and "not installed" in why.reason
    monkeypatch.setitem(sys.modules, "shoal.transport._pump", type(sys)("old"))
    sys.modules["shoal.transport._pump"].REVISION = 0  # type: ignore[attr-defined]
    chosen, why = pump.load(pure=False)
    assert chosen is None and "revision 0" in why.reason


def test_the_shape_that_it_knows_is_that_of_the_layers() -> None:
    from shoal.transport.frames import HEADER_BYTES
    from shoal.transport.session import HEAD_BYTES

    assert pump.SPLIT_HEAD == HEAD_BYTES + HEADER_BYTES == HEAD.size
    assert pump.FRAME_HEAD == HEADER_BYTES
