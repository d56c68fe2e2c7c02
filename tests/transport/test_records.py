"""The record layer: chunking, order, limits, keys that step, and every way to break a record."""

from __future__ import annotations

import itertools
import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.transport import defaults
from shoal.transport.aead import SUITES
from shoal.transport.errors import ProtocolMisuse, RecordError
from shoal.transport.records import HEADER, MAX_HEAD, RecordOpener, RecordSealer

SECRET = bytes(range(32))
NAMES = list(SUITES)


def _pair(name: str = "chacha20-poly1305", rekey_after: int = 3) -> tuple[RecordSealer, RecordOpener]:
    return RecordSealer(name, SECRET, rekey_after=rekey_after), RecordOpener(name, SECRET, rekey_after=rekey_after)


def _chunks(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.lists(st.binary(max_size=300), max_size=4), min_size=1, max_size=8),
    cuts=st.lists(st.integers(0, 10_000), max_size=30),
    rekey_after=st.integers(1, 4),
)
def test_any_chunking_of_the_bytes_gives_the_same_records(
    name: str, texts: list[list[bytes]], cuts: list[int], rekey_after: int
) -> None:
    sealer, opener = _pair(name, rekey_after)
    wire = b"".join(sealer.seal(parts) for parts in texts)
    assert len(wire) == sum(len(part) for parts in texts for part in parts) + len(texts) * sealer.overhead
    records = [record for chunk in _chunks(wire, cuts) for record in opener.feed(chunk)]
    assert [bytes(record) for record in records] == [b"".join(parts) for parts in texts]
    opener.eof()


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    where=st.integers(0, 10_000),
    flip=st.integers(1, 255),
    cuts=st.lists(st.integers(0, 10_000), max_size=5),
)
def test_one_altered_byte_ends_the_link_and_no_altered_text_comes_out(
    name: str, sizes: list[int], where: int, flip: int, cuts: list[int]
) -> None:
    sealer, opener = _pair(name)
    texts = [bytes([n]) * size for n, size in enumerate(sizes)]
    wire = bytearray().join(sealer.seal([text]) for text in texts)
    wire[where % len(wire)] ^= flip
    out: list[bytes] = []

    def feed() -> None:
        for chunk in _chunks(bytes(wire), cuts):
            out.extend(map(bytes, opener.feed(chunk)))
        opener.eof()

    with pytest.raises(RecordError):
        feed()
    assert out == texts[: len(out)]
    assert len(out) < len(texts)


def test_a_replayed_record_ends_the_link() -> None:
    sealer, opener = _pair()
    wire = sealer.seal([b"pay 5"])
    assert bytes(opener.feed(wire)[0]) == b"pay 5"
    with pytest.raises(RecordError, match="record 1 was altered, replayed or reordered"):
        opener.feed(wire)


def test_records_in_another_order_or_with_one_missing_end_the_link() -> None:
    for first in (1, 2):
        sealer, opener = _pair()
        wires = [sealer.seal([b"%d" % n]) for n in range(3)]
        with pytest.raises(RecordError, match="record 0 was altered"):
            opener.feed(wires[first])


def test_an_end_of_the_pipe_inside_a_record_is_told_from_one_between_records() -> None:
    sealer, opener = _pair()
    wire = sealer.seal([b"abc"])
    opener.eof()
    opener.feed(wire)
    opener.eof()
    wire = sealer.seal([b"abc"])
    for cut in (1, HEADER, HEADER + 1, len(wire) - 1):
        _, opener = _pair()
        opener.feed(wire[:cut])
        with pytest.raises(RecordError, match="ended inside record 0"):
            opener.eof()


@pytest.mark.parametrize("name", NAMES)
def test_a_record_that_announces_4_gb_is_refused_before_anything_is_allocated(name: str) -> None:
    _, opener = _pair(name)
    with pytest.raises(RecordError, match="record 0 announces 4194303 bytes, expected"):
        opener.feed(b"\xff\xff\xff\xff")
    for length in (0, SUITES[name].tag - 1, defaults.MAX_RECORD + SUITES[name].tag + 1):
        _, opener = _pair(name)
        with pytest.raises(RecordError, match=f"announces {length} bytes"):
            opener.feed(struct.pack(">I", length))


def test_after_an_error_the_opener_stays_dead() -> None:
    sealer, opener = _pair()
    with pytest.raises(RecordError) as first:
        opener.feed(bytes(4))
    for again in (lambda: opener.feed(sealer.seal([b"good"])), opener.eof):
        with pytest.raises(RecordError) as second:
            again()
        assert second.value is first.value


@pytest.mark.parametrize("name", NAMES)
def test_the_largest_record_passes_and_one_byte_more_is_our_bug(name: str) -> None:
    sealer, opener = _pair(name)
    text = random.Random(1).randbytes(defaults.MAX_RECORD)
    wire = sealer.seal([text[:5], bytearray(text[5:90]), memoryview(text)[90:]])
    assert bytes(opener.feed(wire)[0]) == text
    with pytest.raises(ProtocolMisuse, match="at most"):
        sealer.seal([text, b"x"])
    assert bytes(opener.feed(sealer.seal([b"the refused one has used no counter"]))[0]).startswith(b"the refused")


def test_records_are_independent_buffers_that_the_opener_never_touches_again() -> None:
    sealer, opener = _pair()
    wire = bytearray(sealer.seal([b"first"]) + sealer.seal([b"second"]))
    first, second = opener.feed(wire)
    wire[:] = bytes(len(wire))
    opener.feed(sealer.seal([b"third"]))
    assert (bytes(first), bytes(second)) == (b"first", b"second")


@pytest.mark.parametrize("name", NAMES)
def test_keys_step_after_the_same_record_on_both_sides(name: str) -> None:
    sealer, opener = _pair(name, rekey_after=2)
    other = RecordSealer(name, SECRET, rekey_after=1000)
    same = []
    for n in range(6):
        wire, unstepped = sealer.seal([b"text"]), other.seal([b"text"])
        same.append(wire == unstepped)
        assert bytes(opener.feed(wire)[0]) == b"text", n
    assert same == [True, True, False, False, False, False]
    assert opener.opened == 6


def test_a_side_that_steps_elsewhere_is_noticed() -> None:
    sealer, opener = RecordSealer(NAMES[0], SECRET, rekey_after=2), RecordOpener(NAMES[0], SECRET, rekey_after=3)
    opener.feed(sealer.seal([b"a"]) + sealer.seal([b"b"]))
    with pytest.raises(RecordError, match="record 2"):
        opener.feed(sealer.seal([b"c"]))


def test_the_current_secrets_do_not_lead_back_to_earlier_keys() -> None:
    sealer, _ = _pair(rekey_after=1)
    before = {sealer._keys._chain, sealer._keys.aead._key}
    sealer.seal([b""])
    assert before.isdisjoint({sealer._keys._chain, sealer._keys.aead._key, SECRET})
    assert sealer._keys._chain != sealer._keys.aead._key


def test_the_same_secret_under_another_cipher_gives_another_key() -> None:
    keys = {RecordSealer(name, SECRET)._keys.aead._key[:16] for name in NAMES}
    assert len(keys) == len(NAMES)


def test_a_record_byte_by_byte_costs_linear_time_and_memory_grows_with_what_came() -> None:
    sealer, opener = _pair()
    wire = sealer.seal([bytes(100_000)])
    opener.feed(wire[:HEADER])
    assert opener._body.__sizeof__() < 200
    copies = 0
    size = 0
    for at in range(HEADER, len(wire)):
        opener.feed(wire[at : at + 1])
        if opener._body.__sizeof__() != size:
            size = opener._body.__sizeof__()
            copies += 1
    assert copies < 120
    assert opener.opened == 1


def test_bad_secrets_and_limits_are_our_bug() -> None:
    with pytest.raises(ProtocolMisuse):
        RecordSealer(NAMES[0], b"short")
    with pytest.raises(ProtocolMisuse):
        RecordOpener(NAMES[0], SECRET, rekey_after=0)


def test_large_records_may_be_received_straight_into_their_place() -> None:
    sealer, opener = _pair()
    texts = [bytes([n]) * size for n, size in enumerate((300_000, 300_000, 50, 90_000, 200_000, 300_000))]
    wire = b"".join(sealer.seal([text]) for text in texts)
    got, at, direct = [], 0, 0
    while at < len(wire):
        room = opener.room()
        if room is None:
            step = min(30_000, len(wire) - at)
            got += opener.feed(wire[at : at + step])
        else:
            step = min(30_000, len(wire) - at, len(room))
            room[:step] = wire[at : at + step]
            got += opener.fill(step)
            direct += step
        at += step
    assert [bytes(record) for record in got] == texts
    assert direct > 150_000
    opener.eof()


def test_room_is_made_only_for_what_the_peer_has_shown_to_send() -> None:
    sealer, opener = _pair()
    opener.feed(sealer.seal([bytes(300_000)]))
    opener.feed(sealer.seal([bytes(300_001)])[:10])
    assert opener.room() is None


def test_an_altered_record_received_in_place_ends_the_link() -> None:
    sealer, opener = _pair()
    opener.feed(sealer.seal([bytes(300_000)]))
    wire = sealer.seal([bytes(300_000)])
    wire[-1] ^= 1
    opener.feed(wire[:100])
    room = opener.room()
    assert room is not None
    room[: len(wire) - 100] = wire[100:]
    with pytest.raises(RecordError, match="altered"):
        opener.fill(len(wire) - 100)
    assert opener.room() is None
    with pytest.raises(RecordError, match="altered"):
        opener.feed(b"x")


# Split records


def _split(sealer: RecordSealer, head: bytes, body: bytes) -> bytes:
    wire = sealer.seal_to_keep([head, body], split=True).wire
    assert len(wire) == len(head) + len(body) + sealer.overhead + len(sealer._tail)
    return bytes(wire)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(0, MAX_HEAD), st.integers(defaults.DIRECT_BODY, 300_000)), max_size=4),
    cuts=st.lists(st.integers(0, 1_000_000), max_size=10),
    rekey_after=st.integers(1, 4),
    into=st.booleans(),
)
def test_split_records_come_out_whole_however_they_arrive_and_whenever_they_are_opened(
    name: str, sizes: list[tuple[int, int]], cuts: list[int], rekey_after: int, into: bool
) -> None:
    sealer, opener = _pair(name, rekey_after)
    texts = [(bytes([n]) * head, random.Random(n).randbytes(body)) for n, (head, body) in enumerate(sizes)]
    wire = b"".join(_split(sealer, *text) + sealer.seal([b"between"]) for text in texts)
    records = [record for chunk in _chunks(wire, cuts) for record in opener.feed(chunk)]
    assert [bytes(record) for record in records[1::2]] == [b"between"] * len(texts)
    for (head, body), record in reversed(list(zip(texts, records[::2], strict=True))):
        assert record.body is not None
        assert len(record) == len(head) + len(body)
        if into:
            target = bytearray(len(body))
            record.body.open_into(memoryview(target))
            assert (bytes(record.data), bytes(target)) == (head, body)
        else:
            assert bytes(record) == head + body
    opener.eof()


def test_an_altered_head_ends_the_link_at_once_and_an_altered_body_when_it_is_opened() -> None:
    for name in NAMES:
        sealer, opener = _pair(name)
        wire = bytearray(_split(sealer, b"head", bytes(20_000)))
        wire[HEADER] ^= 1
        with pytest.raises(RecordError, match="record 0 was altered"):
            opener.feed(wire)
        for place in (HEADER + 4 + len(sealer._tail), len(wire) - 1, 0):
            sealer, opener = _pair(name)
            wire = bytearray(_split(sealer, b"head", bytes(20_000)))
            if place:
                wire[place] ^= 1
            else:
                wire[3] ^= 1  # the length is authenticated
                wire += b"x"
            with pytest.raises(RecordError, match=r"record \d was altered"):
                list(map(bytes, opener.feed(wire)))


def test_a_body_does_not_pass_for_that_of_another_record() -> None:
    sealer, opener = _pair(rekey_after=100)
    one, other = _split(sealer, b"head", bytes(20_000)), _split(sealer, b"head", bytes(20_000))
    cut = HEADER + 4 + len(sealer._tail)
    (record,) = opener.feed(one[:cut] + other[cut:])
    assert record.body is not None
    with pytest.raises(RecordError, match="record 1 was altered"):
        record.body.open_into(memoryview(bytearray(20_000)))


def test_a_split_record_can_be_opened_again_by_who_sealed_it() -> None:
    for name in NAMES:
        sealer, _ = _pair(name, rekey_after=1)
        sealed = sealer.seal_to_keep([b"the ", b"head", bytes(40_000)], split=True)
        sealer.seal([b"another"])
        assert bytes(sealed.plain()) == b"the head" + bytes(40_000)
        sealed.wire[-1] ^= 1
        with pytest.raises(ProtocolMisuse, match="changed in memory"):
            sealed.plain()


def test_what_is_small_or_has_a_long_head_is_not_split() -> None:
    sealer, opener = _pair()
    for parts in ([b"head", bytes(100)], [bytes(MAX_HEAD + 1), bytes(40_000)]):
        (record,) = opener.feed(sealer.seal_to_keep(parts, split=True).wire)
        assert record.body is None
        assert bytes(record) == b"".join(parts)
