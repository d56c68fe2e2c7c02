"""Strict messages: what was packed comes back exactly; everything else is a DecodeError, cheap and printable."""

from __future__ import annotations

import enum
import math
import struct
import sys
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import attrs
import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.transport import defaults
from shoal.transport.errors import DecodeError, ProtocolMisuse
from shoal.transport.identity import PeerId
from shoal.transport.wire import pack, unpack


class Level(enum.IntEnum):
    LOW = 0
    HIGH = 1


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@attrs.frozen
class Point:
    x: int
    y: float = 0.5


@attrs.frozen
class Nothing:
    pass


@attrs.frozen
class Left:
    left: int


@attrs.frozen
class Right:
    right: str


@attrs.frozen
class Tree:
    value: int
    children: tuple[Tree, ...] = ()


@attrs.frozen
class Everything:
    number: int
    real: float
    flag: bool
    text: str
    blob: bytes
    peer: PeerId
    level: Level
    colour: Colour
    mode: Literal["strict", "available", 3]
    point: Point
    maybe: Point | None
    maybe_real: float | None
    either: Left | Right
    numbers: tuple[int, ...]
    pair: tuple[int, str]
    points: list[Point]
    table: dict[str, float]
    peers: dict[PeerId, tuple[Point, ...]]
    _private: int
    empty: Nothing = Nothing()


integers = st.integers(-(2**63), 2**64 - 1)
reals = st.floats(allow_nan=False, allow_infinity=False)
peers = st.binary(min_size=32, max_size=32).map(PeerId)
points = st.builds(Point, integers, reals)
messages = st.builds(
    Everything,
    number=integers,
    real=reals,
    flag=st.booleans(),
    text=st.text(),
    blob=st.binary(),
    peer=peers,
    level=st.sampled_from(Level),
    colour=st.sampled_from(Colour),
    mode=st.sampled_from(["strict", "available", 3]),
    point=points,
    maybe=st.none() | points,
    maybe_real=st.none() | reals,
    either=st.builds(Left, integers) | st.builds(Right, st.text()),
    numbers=st.lists(integers).map(tuple),
    pair=st.tuples(integers, st.text()),
    points=st.lists(points),
    table=st.dictionaries(st.text(), reals),
    peers=st.dictionaries(peers, st.lists(points, max_size=3).map(tuple), max_size=3),
    private=integers,
)

A_MESSAGE = Everything(
    number=1,
    real=2.0,
    flag=True,
    text="t",
    blob=b"b",
    peer=PeerId(bytes(32)),
    level=Level.HIGH,
    colour=Colour.RED,
    mode="strict",
    point=Point(1),
    maybe=None,
    maybe_real=None,
    either=Left(1),
    numbers=(1,),
    pair=(1, "x"),
    points=[],
    table={},
    peers={},
    private=7,
)


def as_map(message: Any) -> dict[str, Any]:
    content = msgpack.unpackb(pack(message))
    assert isinstance(content, dict)
    return content


def decode(content: Any, kind: Any = Everything) -> Any:
    return unpack(kind, msgpack.packb(content))


@given(messages)
def test_a_message_comes_back_exactly(message: Everything) -> None:
    data = pack(message)
    again = unpack(Everything, data)
    assert again == message
    assert pack(again) == data  # one encoding only: what is signed can be checked
    assert type(again.level) is Level
    assert unpack(Everything, bytearray(data)) == unpack(Everything, memoryview(data)) == message


def test_a_message_travels_as_a_map_of_its_field_names() -> None:
    assert list(as_map(A_MESSAGE)) == [field.name for field in attrs.fields(Everything)]


def test_a_recursive_message_comes_back() -> None:
    tree = Tree(1, (Tree(2), Tree(3, (Tree(4),))))
    assert unpack(Tree, pack(tree)) == tree


def test_fields_with_a_default_may_be_left_out() -> None:
    assert decode({"x": 3}, Point) == Point(3)


# One value of every kind that msgpack knows. A field takes those listed for it and no other.
VALUES: dict[str, Any] = {
    "nil": None,
    "false": False,
    "true": True,
    "zero": 0,
    "one": 1,
    "negative": -1,
    "big": 2**64 - 1,
    "float one": 1.0,
    "float": 0.5,
    "nan": math.nan,
    "inf": math.inf,
    "minus inf": -math.inf,
    "empty text": "",
    "text": "red",
    "digits": "1",
    "empty bytes": b"",
    "bytes": b"red",
    "32 bytes": bytes(32),
    "33 bytes": bytes(33),
    "32 letters": "a" * 32,
    "empty array": [],
    "array": [1],
    "array of bool": [True],
    "array of float": [1.0],
    "pair": [1, "x"],
    "triple": [1, "x", 1],
    "points": [{"x": 1, "y": 1.0}],
    "empty map": {},
    "point": {"x": 1, "y": 1.0},
    "left": {"left": 1},
    "right": {"right": "r"},
    "both": {"left": 1, "right": "r"},
    "floats by name": {"a": 1.0},
    "ints by name": {"a": 1},
    "by bytes": {b"x": 1},
    "by peer": {bytes(32): []},
    "by int": {1: 1.0},
    "mode": "strict",
    "three": 3,
    "float three": 3.0,
}

ACCEPTED: dict[str, set[str]] = {
    "number": {"zero", "one", "negative", "big", "three"},
    "real": {"float one", "float", "float three"},
    "flag": {"true", "false"},
    "text": {"empty text", "text", "digits", "32 letters", "mode"},
    "blob": {"empty bytes", "bytes", "32 bytes", "33 bytes"},
    "peer": {"32 bytes"},
    "level": {"zero", "one"},
    "colour": {"text"},
    "mode": {"mode", "three"},
    "point": {"point"},
    "maybe": {"nil", "point"},
    "maybe_real": {"nil", "float one", "float", "float three"},
    "either": {"left", "right"},
    "numbers": {"empty array", "array"},
    "pair": {"pair"},
    "points": {"empty array", "points"},
    "table": {"empty map", "floats by name"},
    "peers": {"empty map", "by peer"},
    "empty": {"empty map"},
    "_private": {"zero", "one", "negative", "big", "three"},
}


@pytest.mark.parametrize("field", ACCEPTED)
def test_a_field_takes_exactly_its_type_and_nothing_is_coerced(field: str) -> None:
    content = as_map(A_MESSAGE)
    taken = set()
    for name, value in VALUES.items():
        try:
            message = decode({**content, field: value})
        except DecodeError as error:
            assert str(error).startswith(f"Everything does not decode: {field}: ")
            continue
        taken.add(name)
        assert as_map(message)[field] == value
        assert type(as_map(message)[field]) is type(value)
    assert taken == ACCEPTED[field]


def test_the_table_of_accepted_values_names_every_field() -> None:
    assert set(ACCEPTED) == {field.name for field in attrs.fields(Everything)}


def test_a_missing_field_is_named() -> None:
    content = as_map(A_MESSAGE)
    del content["real"]
    with pytest.raises(DecodeError, match="missing field 'real'"):
        decode(content)


@pytest.mark.parametrize("key", ["extra", b"x", 5, "line\nbreak", "x" * 10_000])
def test_an_unknown_field_is_named_whatever_its_key(key: Any) -> None:
    with pytest.raises(DecodeError, match="unknown field") as caught:
        decode({"x": 1, key: 2}, Point)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 200


def test_an_unknown_field_of_an_inner_message_is_refused() -> None:
    with pytest.raises(DecodeError, match="point: unknown field 'z'"):
        decode({**as_map(A_MESSAGE), "point": {"x": 1, "z": 1}})


def test_a_key_that_stands_twice_is_refused() -> None:
    with pytest.raises(DecodeError, match="twice"):
        unpack(Point, b"\x82\xa1x\x01\xa1x\x02")


@pytest.mark.parametrize("content", [None, 5, "x", b"x", [], [1, 2], True, 1.0])
def test_a_message_that_is_no_map_is_refused(content: Any) -> None:
    for kind in (Point, Nothing):
        with pytest.raises(DecodeError, match=kind.__name__):
            decode(content, kind)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",  # the unused type byte
        b"\x81",
        b"\x81\xa1x",
        b"\x81\xa1x\x01\x00",  # one byte too many
        b"\x81\xa1\xff\x01",  # not UTF-8
        b"\xd4\x00\x00",  # extension
        b"\xd6\xff\x00\x00\x00\x00",  # timestamp
        b"\xc7\x00\x05",
        b"\x81\xa1x\xcf\xff",
        b"\x81\xa1x\xcb\x00",
        b"\x81\xc0\x01",  # nil as a key
        b"\x81\x90\x01",  # an array as a key
        b"\x81\x80\x01",  # a map as a key
    ],
)
def test_broken_encodings_are_refused(data: bytes) -> None:
    with pytest.raises(DecodeError):
        unpack(Point, data)


@given(st.binary(max_size=300))
def test_arbitrary_bytes_raise_nothing_but_decode_errors(data: bytes) -> None:
    for kind in (Everything, Point, Nothing, Tree, Left | Right):
        try:
            unpack(kind, data)  # type: ignore[arg-type]
        except DecodeError as error:
            assert str(error).isprintable()
            assert len(str(error)) < 400


@given(messages, st.data())
def test_a_message_with_changed_bytes_decodes_to_its_type_or_not_at_all(
    message: Everything, data: st.DataObject
) -> None:
    changed = bytearray(pack(message))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(changed) - 1))
        changed[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
        changed = changed or bytearray(1)
    try:
        again = unpack(Everything, changed)
    except DecodeError:
        return
    assert pack(again)  # whatever came through can travel on
    attrs.validate(again)


@given(
    st.recursive(
        st.none() | st.booleans() | integers | st.floats() | st.text() | st.binary(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.binary() | integers, inner),
        max_leaves=30,
    )
)
def test_any_valid_msgpack_is_surveyed_without_complaint(content: Any) -> None:
    # Any takes everything, so a refusal here could only come from the survey of the headers
    box = attrs.make_class("Box", {"content": attrs.field(type=Any)}, frozen=True)
    again = decode({"content": content}, box).content
    assert msgpack.packb(again) == msgpack.packb(content)


# --- bytes that announce more than they hold ---------------------------------------------------------------------

ANNOUNCEMENTS = [
    b"\xdd\xff\xff\xff\xff",  # an array of 4 G values
    b"\xdf\xff\xff\xff\xff",  # a map of 4 G pairs
    b"\xdc\xff\xff",
    b"\xde\xff\xff",
    b"\xdb\xff\xff\xff\xff",  # a text of 4 GB
    b"\xc6\xff\xff\xff\xff",  # 4 GB of bytes
    b"\xc9\xff\xff\xff\xff\x05",  # an extension of 4 GB
]


@pytest.mark.parametrize("header", ANNOUNCEMENTS)
@pytest.mark.parametrize("prefix", [b"", b"\x81\xa1x", b"\x91"])
@pytest.mark.parametrize("tail", [b"", b"\x00\x00\x00\x00\x00"])
def test_four_announced_gigabytes_in_ten_bytes_allocate_nothing(header: bytes, prefix: bytes, tail: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(DecodeError):
            unpack(Point, prefix + header + tail)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("one", [b"\x91", b"\x81\xa1x", b"\xdc\x00\x01", b"\xdd\x00\x00\x00\x01"])
@pytest.mark.parametrize("depth", [defaults.MAX_DEPTH + 1, 1000, 100_000])
def test_a_bomb_of_nested_containers_is_refused(one: bytes, depth: int) -> None:
    with pytest.raises(DecodeError, match="nested deeper"):
        unpack(Point, one * depth + b"\x01")


def test_nesting_up_to_the_bound_passes() -> None:
    deep: Any = 1
    for _ in range(defaults.MAX_DEPTH - 1):
        deep = [deep]
    with pytest.raises(DecodeError, match="expected dict, got list"):  # the survey let it through
        decode(deep, Point)


def test_nested_announcements_do_not_multiply() -> None:
    # each array announces as many values as bytes remain; a decoder that trusts them allocates size × depth × 8 bytes
    size = 200_000
    bomb = b"".join(b"\xdd" + struct.pack(">I", size - 5 * (level + 1)) for level in range(defaults.MAX_DEPTH * 2))
    bomb += b"\xc0" * (size - len(bomb))
    tracemalloc.start()
    try:
        with pytest.raises(DecodeError):
            unpack(Point, bomb)
        assert tracemalloc.get_traced_memory()[1] < 4 * size
    finally:
        tracemalloc.stop()


def test_more_values_than_allowed_are_refused() -> None:
    data = msgpack.packb([0] * (defaults.MAX_ITEMS + 1))
    with pytest.raises(DecodeError, match=f"more than {defaults.MAX_ITEMS} values"):
        unpack(Point, data)


def test_a_message_over_the_limit_is_refused_unread() -> None:
    with pytest.raises(DecodeError, match=f"{defaults.MAX_MESSAGE + 1} bytes, at most {defaults.MAX_MESSAGE}"):
        unpack(Point, bytes(defaults.MAX_MESSAGE + 1))
    data = pack(Point(1))
    assert unpack(Point, data, limit=len(data)) == Point(1)
    with pytest.raises(DecodeError, match="at most"):
        unpack(Point, data, limit=len(data) - 1)


# --- our own side ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_float_that_no_peer_would_take_is_not_sent(value: float) -> None:
    with pytest.raises(ProtocolMisuse, match="finite"):
        pack(Point(1, value))


def test_an_int_in_a_float_field_travels_as_a_float() -> None:
    assert unpack(Point, pack(Point(1, 2))) == Point(1, 2.0)
    assert type(unpack(Point, pack(Point(1, 2))).y) is float


@pytest.mark.parametrize("kind", [set[int], frozenset[int], list, tuple, dict, int | str])
def test_types_without_order_or_elements_are_not_for_fields(kind: Any) -> None:
    box = attrs.make_class("Box", {"content": attrs.field(type=kind)})
    with pytest.raises(DecodeError):
        decode({"content": [1]}, box)


def test_a_value_that_its_class_refuses_does_not_decode() -> None:
    with pytest.raises(DecodeError, match="32 bytes"):
        decode(bytes(31), PeerId)


def test_threads_decode_the_first_message_of_a_kind_at_once() -> None:
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as threads:
            for turn in range(200):
                names = [f"f{n}" for n in range(20)]
                kind = attrs.make_class(f"Wide{turn}", {name: attrs.field(type=int) for name in names}, frozen=True)
                packed = pack(kind(**dict.fromkeys(names, turn)))
                start = threading.Barrier(8)

                def decode_once(kind: Any = kind, packed: bytes = packed, start: threading.Barrier = start) -> Any:
                    start.wait()
                    return unpack(kind, packed, limit=1000)

                decoded = [each.result() for each in [threads.submit(decode_once) for _ in range(8)]]
                assert len(set(decoded)) == 1
    finally:
        sys.setswitchinterval(switch)
