"""The native helper for runs of records against the Python that does the same: no other bytes, nothing unverified."""

from __future__ import annotations

import errno
import os
import random
import select
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import attrs
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.transport import defaults, pump, records
from shoal.transport.aead import SUITES, Aead
from shoal.transport.errors import RecordError, StreamReset
from shoal.transport.frames import Frame, Priority
from shoal.transport.intake import Landing, TakesRecords
from shoal.transport.outgoing import Lent, Outgoing
from shoal.transport.records import HEADER, Record, RecordOpener, RecordSealer
from shoal.transport.session import Outbox
from shoal.transport.stream import LinkStream, StreamBroken

from .harness import LinkPair, Real, link_pair
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


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "PUMP_LINGER", 0.002)


@contextmanager
def pump_thread() -> Iterator[pump.Pump]:
    """A pump without a run of trio."""
    mover = pump.Pump(pump.active.Pump())
    try:
        yield mover
    finally:
        mover._native.close()


def settle(mover: pump.Pump, transfer: pump.Transfer, patience: float) -> None:
    """Until the thread is done with it, or was idle with it for ``patience`` seconds and it is taken back."""
    while not transfer.over and select.select([mover._native.bell], [], [], patience)[0]:
        for done in mover._native.finished():
            done.finished()
    transfer.recall()


@attrs.define
class Line:
    """A socket, and the opener that reads it: by :meth:`RecordOpener.land` where it may, else as the intake does."""

    out: socket.socket
    into: socket.socket
    opener: RecordOpener
    sink: memoryview
    mover: pump.Pump
    number: int = 0
    stream: int = 6
    landed: int = 0  # bytes in the sink
    runs: list[pump.Run] = attrs.Factory(list)
    others: list[tuple[int, bytes]] = attrs.Factory(list)  # what went to the layers above, and after how many bytes

    def read(self) -> None:
        """Take in what is there."""
        while True:
            room = self.opener.room()
            if self.opener.at_lane and self.landed < len(self.sink):
                lane = pump.Lane(self.number, self.stream, self.sink[self.landed :])
                transfer = self.opener.land(self.into.fileno(), lane, self.mover)
                settle(self.mover, transfer, 0.005)
                run, left = self.opener.landed(transfer)
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
    with out, into, pump_thread() as mover:
        for end in (out, into):
            end.setblocking(False)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
        opener = RecordOpener(name, SECRET, rekey_after=rekey_after)
        opener._largest = defaults.MAX_RECORD + 40  # it has sent large ones before
        yield Line(out, into, opener, memoryview(bytearray(sink)), mover)


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
        last = [run for run in it.runs if run.records][-1]
        assert last.control == 1 and last.bulk == 2
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
        assert it.landed == SIZE and it.opener.lane_begun and it.runs[-1].drained and not it.runs[-1].ended
        it.out.close()
        it.read()
        assert it.runs[-1] == pump.Run(0, 0, 0, False, True, 0, 0, 0)
        with pytest.raises(RecordError, match="inside record 2"):
            it.opener.eof()
    with line(NAMES[0], 2 * SIZE) as it:
        carry(it, wires[0] + wires[1][:1000], [])
        lane = pump.Lane(1, 6, it.sink[SIZE:])
        transfer = it.opener.land(-1, lane, it.mover)
        settle(it.mover, transfer, 1.0)
        run, left = it.opener.landed(transfer)
        assert (run.error, run.records, run.ended, left) == (errno.EBADF, 0, False, [])


@native
def test_arguments_that_do_not_fit_each_other_are_refused() -> None:
    suite = SUITES[NAMES[0]]
    word = 1 << 31 | HEAD.size << 22 | SIZE + HEAD.size + 2 * suite.tag
    room, sink = bytearray(SIZE + 200), bytearray(SIZE)
    arguments = [
        None, False, -1, suite.addresses[1], suite.nonce, suite.counter_at, suite.tag, bytes(suite.key), 0, room,
        word, 0, 0, 1 << 20, 0, 6, sink, 1, 1 << 20, 0.01,
    ]  # fmt: skip
    with pump_thread() as mover:
        for place, wrong in (
            (3, 0), (4, 99), (5, 13), (5, -1), (6, 0), (6, 99), (7, b"short"), (7, bytes(65)), (9, bytearray(SIZE)),
            (10, word & ~(1 << 31)), (10, 1 << 31 | HEAD.size << 22 | 40), (11, SIZE + 5000), (17, 0),
        ):  # fmt: skip
            with pytest.raises(ValueError, match="not "):
                mover._native.receive(*arguments[:place], wrong, *arguments[place + 1 :])
        for place in (9, 16):
            with pytest.raises((TypeError, BufferError)):
                mover._native.receive(*arguments[:place], bytes(SIZE + 200), *arguments[place + 1 :])
        between = list(arguments)
        between[11], between[13] = -1, SIZE + 500  # the largest does not fit into the room
        with pytest.raises(ValueError, match="not "):
            mover._native.receive(*between)
        start = [None, False, -1, suite.addresses[0], suite.nonce, suite.counter_at, suite.tag, bytes(suite.key)]
        for bad in ((None, b"", b"x"), (bytearray(30), bytes(9), bytes(9), 0), (bytearray(90), b"abc", b"x", 0)):
            with pytest.raises((TypeError, ValueError)):
                mover._native.send(*start, [bad])
        for bad in ((bytes(900), bytes(26), b"x", 0), (None, b"", "text", 0), "text"):
            with pytest.raises((TypeError, BufferError)):
                mover._native.send(*start, [(None, b"", b"good", 0), bad])
        native = mover._native
    with pytest.raises(RuntimeError, match="closed"):
        native.receive(*arguments)
    with pytest.raises(TypeError, match="0 arguments"):
        pump.active.Pump(1)


# --- sending -----------------------------------------------------------------------------------------------------


def outgoing(name: str, count: int, rekey_after: int = defaults.REKEY_RECORDS) -> tuple[Outgoing, list[Lent], bytes]:
    """A run in which lent records and sealed ones alternate, and its bytes when each is sealed at once."""
    sealer, other = (RecordSealer(name, SECRET, rekey_after=rekey_after) for _ in range(2))
    run, lent, wire = sealer.run(), [], b""
    for n in range(count):
        first, body = head(n, SIZE), bytearray(random.Random(n).randbytes(SIZE))
        if n % 3 < 2:
            lent.append(sealer.lend(first, body, "owner"))
            run.add(lent[-1])
        else:
            run.add(sealer._seal_split(first, body).wire)
        wire += other._seal_split(first, body).wire
    return run, lent, wire


@native
@pytest.mark.real(timeout=60)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("recalls", [0, 1, 7])
async def test_a_run_leaves_as_it_would_record_by_record_whoever_takes_it_back(name: str, recalls: int) -> None:
    run, lent, wire = outgoing(name, 9)
    out, into = (trio.socket.from_stdlib_socket(end) for end in socket.socketpair())
    got = bytearray()
    draw = random.Random(recalls)
    mover = pump.current()
    assert mover is not None and run.size == len(wire)

    async def read() -> None:
        while len(got) < len(wire):
            got.extend(await into.recv(draw.choice((1000, 70_000, 400_000))))

    async def recall() -> None:
        for _ in range(recalls):
            while len(got) < draw.randrange(len(wire)):
                await trio.lowlevel.checkpoint()
            run.recall()
            for each in lent:  # what was lent is others' from here on
                before = each.body
                each.keep()
                assert isinstance(before, bytearray | bytes)
                if isinstance(before, bytearray):
                    before[:] = bytes(len(before))

    with out, into:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            nursery.start_soon(recall)
            await run.pump(mover, out.fileno)
    assert not run
    assert bytes(got) == wire


@native
@pytest.mark.real(timeout=60)
async def test_a_send_that_is_cancelled_or_fails_ends_at_once_and_lets_go_of_its_memory() -> None:
    mover = pump.current()
    assert mover is not None
    for fails in (False, True):
        run, lent, wire = outgoing(NAMES[0], 9)
        out, into = socket.socketpair()
        with out, into:
            out.setblocking(False)
            if fails:
                into.close()
                with pytest.raises(BrokenPipeError):
                    await run.pump(mover, out.fileno)
            else:
                with trio.move_on_after(0.05) as scope:
                    await run.pump(mover, out.fileno)
                assert scope.cancelled_caught
                into.setblocking(False)
                assert len(into.recv(len(wire))) < len(wire)
        for each in lent:
            assert isinstance(each.body, bytearray)
            each.body.append(0)  # a buffer that somebody looks at cannot change its size


@native
@pytest.mark.parametrize("rekey_after", [2, 3, 5, 8])
def test_nothing_is_lent_across_the_step_of_a_key(rekey_after: int) -> None:
    sealer, wires = RecordSealer(NAMES[0], SECRET, rekey_after=rekey_after), []
    for n in range(9):
        run = sealer.run()
        while sealer.lends(run) and run.size < 3 * SIZE:
            run.add(sealer.lend(head(n, SIZE), bytes(SIZE), "owner"))
        wires += [bytes(wire) for wire in run.wires()]
        wires.append(bytes(sealer.seal((b"small",))))
    opener = RecordOpener(NAMES[0], SECRET, rekey_after=rekey_after)
    bodies = [bytes(record) for wire in wires for record in opener.feed(wire)]
    assert len(bodies) == len(wires) and sum(len(body) > 5 for body in bodies) >= 4


def test_what_is_lent_is_copied_once_its_owner_wants_it_back() -> None:
    outbox, sealer = Outbox(1 << 20), RecordSealer(NAMES[0], SECRET)
    mine, others = bytearray(b"m" * 20_000), bytearray(b"o" * 20_000)
    for owner, body in (("me", mine), ("other", others), ("me", mine)):
        outbox.keep(0, sealer.lend(b"head", body, owner))
    assert outbox.lent == outbox.kept > 60_000
    outbox.copy("me")
    mine[:], others[:] = bytes(20_000), b"p" * 20_000
    outbox.lost(0)
    plain = []
    while (sent := outbox.repeat()) is not None:
        plain.append(bytes(sent.sealed.plain()))
        outbox.moved(sent, 1, sealer.seal_to_keep((sent.sealed.plain(),)))
    assert plain == [b"head" + b"m" * 20_000, b"head" + b"p" * 20_000, b"head" + b"m" * 20_000]
    assert outbox.lent == 0 and outbox.kept > 60_000
    outbox.acknowledge(3)
    assert outbox.kept == outbox.lent == 0


@native
def test_a_run_of_trio_leaves_no_thread_and_no_descriptor() -> None:
    async def main() -> tuple[int, int]:
        assert pump.current() is pump.current() is not None
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    if not os.path.exists("/proc/self/task"):
        pytest.skip("no /proc")
    trio.run(main)
    before = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
    during = {trio.run(main) for _ in range(5)}
    assert len(during) == 1
    assert (len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))) == before
    assert during.pop()[1] == before[1] + 1


@native
@pytest.mark.real(timeout=60)
async def test_where_no_thread_can_be_had_python_does_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Refused:
        seal = pump.active.seal

        @staticmethod
        def Pump() -> None:
            raise OSError(errno.EAGAIN, "out of threads")

    monkeypatch.setattr(pump, "active", Refused)
    async with link_pair(Real()) as pair:
        await _carry(pair, 3 << 20)
    assert "out of threads" in caplog.text and caplog.text.count("slower") == 1


# --- the links that use it ---------------------------------------------------------------------------------------


async def _carry(pair: LinkPair, size: int, *, lent: bool = True) -> None:
    """Bulk over a stream and a few bytes back."""
    out = await pair.a.open_stream("x", Priority.BULK)
    into = await pair.accept()
    for number in range(2):
        sent, got = pattern(size + number), bytearray(size + number)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(into.read_exactly_into, memoryview(got))
            nursery.start_soon(out.lend if lent else out.send_all, sent)
        assert got == sent
    back = bytearray(1000)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(out.read_exactly_into, memoryview(back))
        nursery.start_soon(into.send_all, pattern(1000))
    assert back == pattern(1000)
    assert pair.a.alive and pair.b.alive


@native
@pytest.mark.real(timeout=60)
@pytest.mark.parametrize("lent", [False, True])
@pytest.mark.parametrize("ours", ["native", "pure"])
async def test_links_carry_the_same_with_the_helper_and_without(
    ours: str, lent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    landed = []
    finish = TakesRecords._finish

    def watched(self: TakesRecords, landing: Landing) -> None:
        finish(self, landing)
        if landing.run is not None:
            landed.append(landing.run.size)

    monkeypatch.setattr(TakesRecords, "_finish", watched)
    if ours == "pure":
        monkeypatch.setattr(pump, "active", None)
    async with link_pair(Real()) as pair:
        await _carry(pair, 24 << 20, lent=lent)
    assert sum(landed) > 24 << 20 if ours == "native" else not landed


@native
@pytest.mark.real(timeout=60)
async def test_a_reader_that_gives_up_has_its_memory_back() -> None:
    async with link_pair(Real()) as pair:
        await _carry(pair, 4 << 20)
        out = await pair.a.open_stream("x", Priority.BULK)
        into = await pair.accept()
        size = 8 << 20
        got = bytearray(size)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(out.lend, pattern(3 << 20))
            with trio.move_on_after(0.5) as scope:
                await into.read_exactly_into(memoryview(got))
            assert scope.cancelled_caught
            before = bytes(got)
            into.reset()
            with suppress(StreamBroken):
                await out.lend(pattern(3 << 20))
            await trio.sleep(0.05)
            assert bytes(got) == before
        await _carry(pair, 4 << 20)


@native
@pytest.mark.real(timeout=60)
async def test_data_whose_sender_gives_up_arrive_as_they_were_or_not_at_all() -> None:
    async with link_pair(Real()) as pair:
        await _carry(pair, 4 << 20)
        for n in range(20):
            out = await pair.a.open_stream("x", Priority.BULK)
            into = await pair.accept()
            sent = bytearray(pattern(8 << 20))
            got = bytearray(len(sent))

            async def read(into: LinkStream, got: bytearray) -> None:
                with suppress(StreamReset, trio.BrokenResourceError):
                    await into.read_exactly_into(memoryview(got))

            with suppress(trio.ClosedResourceError):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(read, into, got)
                    with trio.move_on_after(0.0003 * n):
                        await out.lend(sent)
                    out.reset()
                    sent[:] = b"\xff" * len(sent)  # somebody else's by now
            into.reset()
            until = got.find(bytes(64)) if bytes(64) in got else len(got)
            assert got[:until] == pattern(8 << 20)[:until]
            assert b"\xff" * 64 not in got
        await _carry(pair, 4 << 20)


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
