"""Digests and fingerprints tell any two states apart, and chunks can be checked one by one."""

from __future__ import annotations

import attrs
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from shoal.learning import defaults
from shoal.learning.digest import (
    AEGIS,
    BLAKE3,
    Tree,
    TreePart,
    choose_fingerprint,
    fingerprint,
    hash_tree,
    local_fingerprints,
    tree_digest,
)
from shoal.transport.errors import ProtocolMisuse

KEY = bytes(range(32))
ALGORITHMS = [AEGIS, BLAKE3]
PARTS = st.lists(st.tuples(st.text(max_size=3), st.binary(max_size=40)), max_size=4)


@given(one=PARTS, two=PARTS)
def test_digests_are_equal_exactly_when_the_parts_are(
    one: list[tuple[str, bytes]], two: list[tuple[str, bytes]]
) -> None:
    assert (tree_digest(one, chunk=8) == tree_digest(two, chunk=8)) == (one == two)


def test_a_digest_covers_labels_sizes_chunk_size_and_every_byte() -> None:
    base = [("layout", b"a"), ("weights", bytes(100))]
    changed = bytearray(100)
    changed[99] = 1
    digests = [
        tree_digest(base, chunk=16),
        tree_digest(base, chunk=32),
        tree_digest([("layout", b"a"), ("weight", bytes(100))], chunk=16),
        tree_digest([("layout", b"a"), ("weights", bytes(101))], chunk=16),
        tree_digest([("layout", b"a"), ("weights", changed)], chunk=16),
        tree_digest(base[::-1], chunk=16),
    ]
    assert len(set(digests)) == len(digests)


def test_a_known_digest_stays_what_it_is() -> None:
    leaf = blake3(b"abc", derive_key_context="shoal 2026 state leaf v1").digest()
    part = TreePart("x", 3, leaf)
    assert hash_tree([("x", b"abc")]) == Tree(chunk=1 << 20, parts=(part,))
    assert tree_digest([("x", b"abc")]).hex() == "c9b7430219e578e073f993ae663c92a5d90a1128156cda3ab42b7a151888d3d2"


def test_each_chunk_is_checked_by_itself() -> None:
    data = bytes(range(100))
    tree = hash_tree([("head", b""), ("data", data)], chunk=32)
    assert tree.sound()
    assert all(tree.verify(1, i, data[32 * i : 32 * (i + 1)]) for i in range(4))
    assert not tree.verify(1, 0, data[32:64])
    assert not tree.verify(1, 3, data[96:] + b"x")
    assert not tree.verify(1, 4, b"")
    assert not tree.verify(1, -1, data[96:])
    assert not tree.verify(2, 0, b"")
    assert not tree.verify(0, 0, b"")


def test_a_tree_whose_leaves_do_not_fit_its_size_is_not_sound() -> None:
    tree = hash_tree([("data", bytes(100))], chunk=32)
    assert not attrs.evolve(tree, chunk=0).sound()
    assert not attrs.evolve(tree, parts=(attrs.evolve(tree.parts[0], size=200),)).sound()
    assert not attrs.evolve(tree, parts=(attrs.evolve(tree.parts[0], size=-1, leaves=b""),)).sound()


def test_buffers_of_other_items_than_bytes_are_refused() -> None:
    with pytest.raises(ProtocolMisuse):
        tree_digest([("x", memoryview(bytes(8)).cast("I"))])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_fingerprint_depends_on_key_and_every_byte(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "FINGERPRINT_PIECE", 64)
    data = bytes(range(200))
    seen = {fingerprint(algorithm, KEY, data), fingerprint(algorithm, bytes(32), data)}
    for position in (0, 63, 64, 127, 199):
        changed = bytearray(data)
        changed[position] ^= 1
        seen.add(fingerprint(algorithm, KEY, changed))
    swapped = data[64:128] + data[:64] + data[128:]
    seen |= {fingerprint(algorithm, KEY, d) for d in (data + b"\0", data[:-1], data[:128], b"", swapped)}
    assert len(seen) == 12
    assert all(len(tag) == 32 for tag in seen)
    assert fingerprint(algorithm, KEY, memoryview(data)) == fingerprint(algorithm, KEY, data)


def test_algorithms_differ_and_unknown_ones_are_refused() -> None:
    assert fingerprint(AEGIS, KEY, b"data") != fingerprint(BLAKE3, KEY, b"data")
    with pytest.raises(ProtocolMisuse, match="crc32"):
        fingerprint("crc32", KEY, b"data")
    with pytest.raises(ProtocolMisuse, match="32 bytes"):
        fingerprint(BLAKE3, b"short", b"data")


def test_known_fingerprints_stay_what_they_are() -> None:
    aegis = "a5f4b784882abf3cf16898ac9f0693747b01be237ea6a9aefbf58bdaf18e0d10"
    assert fingerprint(AEGIS, KEY, b"shoal").hex() == aegis
    assert (
        fingerprint(BLAKE3, KEY, b"shoal").hex() == "f8d0fd708ac6a8caf62c416035aef5b86ce48dda4a579f68d03c9c4b92d1ee0a"
    )


def test_the_round_uses_what_all_members_offer_and_says_why() -> None:
    assert choose_fingerprint([(AEGIS, BLAKE3), (AEGIS, BLAKE3)]) == (AEGIS, "every member has AES in hardware")
    assert choose_fingerprint([(AEGIS, BLAKE3), (BLAKE3,)]) == (BLAKE3, "1 of 2 members have no AES in hardware")
    assert choose_fingerprint([])[0] == BLAKE3
    assert local_fingerprints()[-1] == BLAKE3
