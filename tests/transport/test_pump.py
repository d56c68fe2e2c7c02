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

from shoal.transport import defaults, pump, records
from shoal.transport.aead import SUITES, Aead
from shoal.transport.errors import RecordError
from shoal.transport.frames import Frame, Priority
from shoal.transport.intake import TakesRecords
from shoal.transport.records import HEADER, Record, RecordOpener, RecordSealer

from .harness import Real, link_pair
from .link_conformance import pattern

SECRET = bytes(range(32))
NAMES = list(SUITES)
HEAD = struct.Struct(">BIIIBII")
SIZE = 300_000  # of a record that is received in its place

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


# --- sealing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30, deadline=None)
@given(
    heads=st.lists(st.binary(max_size=60), min_size=1, max_size=9),
    sizes=st.lists(st.integers(1, 40_000), min_size=9, max_size=9),
    rekey_after=st.integers(1, 9),
    runs=st.integers(1, 4),
)
def test_a_run_is_sealed_to_the_same_bytes_as_its_records_one_by_one(
    name: str, heads: list[bytes], sizes: list[int], rekey_after: int, runs: int
) -> None:
    bodies = [random.Random(size).randbytes(size) for size in sizes]
    wires = []
    for way in ("native", "pure", "one by one"):
        sealer = RecordSealer(name, SECRET, rekey_after=rekey_after)
        made = []
        for _ in range(runs):
            if way == "one by one":
                made += [sealer._seal_split(*each) for each in zip(heads, bodies, strict=False)]
            elif way == "native":
                made += [sealer.seal_later(*each) for each in zip(heads, bodies, strict=False)]
                sealer.seal_now()
            else:
                with pure():
                    made += [sealer.seal_later(*each) for each in zip(heads, bodies, strict=False)]
                    sealer.seal_now()
        wires.append([bytes(sealed.wire) for sealed in made])
        if rekey_after > 2:  # a record across two keys is kept with both of them as well
            plain = [bytes(sealed.plain()) for sealed in made]
            assert plain == [a + b for a, b in zip(heads, bodies, strict=False)] * runs
    assert wires[0] == wires[1] == wires[2]


def test_more_records_than_one_call_takes_are_sealed_in_several() -> None:
    count = 2 * pump.MOST_JOBS + 3
    sealer, other = RecordSealer(NAMES[0], SECRET), RecordSealer(NAMES[0], SECRET)
    made = [sealer.seal_later(b"head", bytes([n]) * 20_000) for n in range(count)]
    sealer.seal_now()
    assert [bytes(sealed.wire) for sealed in made] == [
        bytes(other._seal_split(b"head", bytes([n]) * 20_000).wire) for n in range(count)
    ]


@native
def test_jobs_that_do_not_fit_are_refused_and_nothing_is_written() -> None:
    aead = Aead(SUITES[NAMES[0]], bytes(SUITES[NAMES[0]].key))
    tag = aead.suite.tag
    good = memoryview(bytearray(HEADER + 10 + 50 + 2 * tag))
    for wire, size, body in (
        (good[:-1], 10, bytes(50)),
        (good, 11, bytes(50)),
        (good, -1, bytes(61)),
        (good, 1 << 40, bytes(50)),
        (good, 10, bytes(49)),
    ):
        before = bytes(good)
        with pytest.raises(ValueError, match="another size"):
            pump.seal(aead, 0, [(good, 10, bytes(50)), (wire, size, body)])
        assert bytes(good) == before
    for bad in ((memoryview(bytes(good)), 10, bytes(50)), (good, 10, "text"), (good, 10)):
        with pytest.raises((TypeError, BufferError)):
            pump.seal(aead, 0, [(good, 10, bytes(50)), bad])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="too many"):
        pump.seal(aead, 0, [(good, 10, bytes(50))] * (pump.MOST_JOBS + 1))


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
    assert records._LANE_SHAPE == (1 << 31 | pump.SPLIT_HEAD << 22) >> 22
