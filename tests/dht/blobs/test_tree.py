"""The id of a blob stands for every byte of it, and pages and chunks are checked one by one."""

from __future__ import annotations

import attrs
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from shoal.dht.blobs import defaults
from shoal.dht.blobs.bits import Bits
from shoal.dht.blobs.tree import (
    Outline,
    Part,
    Tree,
    build_tree,
    check_outline,
    outline_fault,
    page_count,
    page_fault,
    page_hash,
)
from shoal.transport.errors import DecodeError, ProtocolMisuse, RemoteProtocolError

LABELS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=3)
PARTS = st.lists(
    st.tuples(LABELS, st.sampled_from(["U8", "I8"]), st.binary(max_size=40)),
    max_size=4,
    unique_by=lambda part: part[0],
)


@given(one=PARTS, two=PARTS)
def test_ids_are_equal_exactly_when_the_parts_are(
    one: list[tuple[str, str, bytes]], two: list[tuple[str, str, bytes]]
) -> None:
    assert (build_tree(one, chunk=8).id == build_tree(two, chunk=8).id) == (one == two)


def test_an_id_covers_labels_kinds_sizes_the_chunk_size_and_every_byte() -> None:
    base = [("layout", "U8", b"a"), ("weights", "U8", bytes(100))]
    changed = bytearray(100)
    changed[99] = 1
    ids = [
        build_tree(base, chunk=16).id,
        build_tree(base, chunk=32).id,
        build_tree([base[0], ("weight", "U8", bytes(100))], chunk=16).id,
        build_tree([base[0], ("weights", "I8", bytes(100))], chunk=16).id,
        build_tree([base[0], ("weights", "U8", bytes(101))], chunk=16).id,
        build_tree([base[0], ("weights", "U8", changed)], chunk=16).id,
        build_tree(base[::-1], chunk=16).id,
    ]
    assert len(set(ids)) == len(ids)


def test_a_known_id_stays_what_it_is() -> None:
    tree = build_tree([("x", "U8", b"abc")])
    assert tree.leaves == blake3(b"abc", derive_key_context="shoal 2026 blob leaf v1").digest()
    assert tree.outline == Outline(1 << 20, (Part("x", "U8", 3),), page_hash(tree.leaves))
    assert tree.id.hex() == "02bbec07c15ba6be3543687e7d26e8ff178bef5548e4a38af7c81e309842dc62"


@given(sizes=st.lists(st.integers(0, 100), max_size=5), chunk=st.sampled_from([16, 32]))
def test_chunks_cover_every_byte_of_every_part_once_and_are_checked_by_themselves(sizes: list[int], chunk: int) -> None:
    parts = [(f"p{n}", "U8", bytes((n + i) % 256 for i in range(size))) for n, size in enumerate(sizes)]
    tree = build_tree(parts, chunk=chunk)
    joined = b"".join(data for _, _, data in parts)
    got = bytearray()
    for index in range(len(tree)):
        place = tree.place(index)
        data = parts[place.part][2][place.offset : place.offset + place.size]
        assert 0 < place.size == len(data) <= chunk
        assert place.start == len(got)
        assert index in tree.chunks_of(place.part)
        assert tree.verify(index, data)
        assert not tree.verify(index, data + b"\0")
        assert not tree.verify(index, data[:-1])
        assert not tree.verify(index, bytes([data[0] ^ 1]) + data[1:])
        got += data
    assert bytes(got) == joined
    assert not tree.verify(len(tree), b"")
    assert not tree.verify(-1, b"")


def test_pages_of_leaves_are_checked_before_any_leaf_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "PAGE", 8)
    tree = build_tree([("data", "U8", bytes(range(200)))], chunk=10)
    assert page_count(tree.outline) == 3
    pages = [tree.page(n) for n in range(3)]
    assert b"".join(pages) == tree.leaves
    assert tree.page(3) == tree.page(-1) == b""
    for number, page in enumerate(pages):
        assert page_fault(tree.outline, number, page) is None
        assert page_fault(tree.outline, number, bytes([page[0] ^ 1]) + page[1:]) is not None
        assert page_fault(tree.outline, number, page + bytes(32)) is not None
    assert page_fault(tree.outline, 0, pages[1]) is not None


@pytest.mark.parametrize(
    "change",
    [
        {"chunk": 0},
        {"chunk": defaults.MAX_CHUNK + 1},
        {"pages": b""},
        {"pages": bytes(64)},
        {"parts": (Part("data", "U8", -1),)},
        {"parts": (Part("data", "Q7", 100),)},
        {"parts": (Part("data", "F32", 99),)},
        {"parts": (Part("", "U8", 100),)},
        {"parts": (Part("x" * 161, "U8", 100),)},
        {"parts": (Part("__metadata__", "U8", 100),)},
        {"parts": (Part("a", "U8", 50), Part("a", "U8", 50))},
        {"parts": (Part("data", "U8", 1 << 62),)},
        {"parts": tuple(Part(str(n), "U8", 0) for n in range(defaults.MAX_PARTS + 1))},
    ],
)
def test_an_outline_that_makes_no_sense_is_refused_whatever_its_root(change: dict[str, object]) -> None:
    outline = attrs.evolve(build_tree([("data", "U8", bytes(100))], chunk=32).outline, **change)
    assert outline_fault(outline) is not None
    with pytest.raises(RemoteProtocolError, match="an outline with"):
        check_outline(outline, bytes(32))


def test_what_is_needed_to_check_64_gib_is_small() -> None:
    pages = 64
    outline = Outline(1 << 20, (Part("weights", "F32", 64 << 30),), bytes(32 * pages))
    assert outline_fault(outline) is None
    assert len(outline.pages) == 2048


def test_buffers_of_other_items_than_bytes_and_leaves_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ProtocolMisuse):
        build_tree([("x", "U8", memoryview(bytes(8)).cast("I"))])
    with pytest.raises(ProtocolMisuse, match="no blob can have"):
        build_tree([("x", "U8", b""), ("x", "U8", b"")])
    with pytest.raises(ProtocolMisuse):
        Tree(build_tree([("x", "U8", b"1")]).outline, b"")


@given(size=st.integers(0, 40), changes=st.lists(st.tuples(st.booleans(), st.integers(0, 39)), max_size=40))
def test_a_bitmap_is_a_set_that_counts(size: int, changes: list[tuple[bool, int]]) -> None:
    bits, model = Bits(size), set()
    for put, index in changes:
        if index >= size:
            assert index not in bits
            continue
        (bits.add if put else bits.discard)(index)
        (model.add if put else model.discard)(index)
    assert list(bits) == sorted(model)
    assert list(bits.missing()) == [i for i in range(size) if i not in model]
    assert bits.count == len(model)
    assert bits.complete == (len(model) == size)
    assert Bits.decode(bits.encode(), size).encode() == bits.encode()
    assert list(Bits.full(size)) == list(range(size))


def test_a_bitmap_of_another_size_is_refused() -> None:
    for data, size in ((b"", 1), (b"\xff", 7), (b"\0\0", 8)):
        with pytest.raises(DecodeError):
            Bits.decode(data, size)
