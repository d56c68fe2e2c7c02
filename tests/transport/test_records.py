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
from shoal.transport.records import HEADER, RecordOpener, RecordSealer

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
    with pytest.raises(RecordError, match="record 0 announces 4294967295 bytes, expected"):
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
