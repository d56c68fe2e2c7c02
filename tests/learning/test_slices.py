"""Planning of slices: they always cover, follow speeds, and move only where an owner was lost."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.learning.reduce.slices import ALIGN, Slice, covers, reassign, split
from shoal.transport.identity import Identity, PeerId

PEERS = tuple(sorted(Identity(bytes([n]) * 32).peer_id for n in range(1, 21)))

owner_lists = st.lists(st.sampled_from(PEERS), min_size=1, max_size=12, unique=True)


@given(st.integers(1, 100_000), owner_lists, st.data())
def test_a_split_covers_every_coordinate_once_whatever_the_speeds(
    length: int, owners: list[PeerId], data: st.DataObject
) -> None:
    speeds = data.draw(
        st.none() | st.lists(st.integers(-4, 4000).map(lambda n: n / 4), min_size=len(owners), max_size=len(owners))
    )
    slices = split(0, length, owners, speeds)
    assert covers(slices, length)
    assert all(piece.owner in owners for piece in slices)
    assert all(piece.start % ALIGN == 0 for piece in slices)
    assert slices == split(0, length, owners, speeds)


def test_slices_are_in_proportion_to_speeds() -> None:
    slices = split(0, 16_000, PEERS[:3], [1.0, 2.0, 5.0])
    assert [piece.stop - piece.start for piece in slices] == [2000, 4000, 10_000]


def test_an_owner_without_speed_gets_nothing() -> None:
    slices = split(0, 1600, PEERS[:3], [1.0, 0.0, 1.0])
    assert [piece.owner for piece in slices] == [PEERS[0], PEERS[2]]


def test_when_the_last_owner_is_too_slow_for_a_share_the_rest_is_still_owned() -> None:
    slices = split(0, 1600, PEERS[:2], [1.0, 0.0])
    assert covers(slices, 1600)


def test_without_any_speed_all_own_equally() -> None:
    assert split(0, 160, PEERS[:2], [0.0, 0.0]) == split(0, 160, PEERS[:2])


def test_a_split_without_owners_is_refused() -> None:
    with pytest.raises(ValueError, match="no owner"):
        split(0, 10, [])


@given(st.integers(1, 50_000), owner_lists, st.data())
def test_reassigning_keeps_what_survivors_own_and_covers_the_rest(
    length: int, owners: list[PeerId], data: st.DataObject
) -> None:
    lost = data.draw(st.lists(st.sampled_from(owners), unique=True, max_size=len(owners) - 1))
    heirs = [owner for owner in owners if owner not in lost]
    before = split(0, length, owners)
    after = reassign(before, lost, heirs)
    assert covers(after, length)
    assert all(piece.owner in heirs for piece in after)
    assert [piece for piece in before if piece.owner in heirs] == [piece for piece in after if piece in before]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(0, 2), st.integers(-3, 3))
def test_gaps_overlaps_and_wrong_lengths_do_not_cover(widths: list[int], which: int, shift: int) -> None:
    bounds = [0]
    for width in widths:
        bounds.append(bounds[-1] + width)
    slices = [Slice(start, stop, PEERS[0]) for start, stop in pairwise(bounds)]
    assert covers(slices, bounds[-1])
    assert not covers(slices, bounds[-1] + 1)
    assert not covers(slices[1:], bounds[-1])
    assert not covers([*slices, slices[-1]], bounds[-1])
    assert not covers([*slices, Slice(bounds[-1], bounds[-1], PEERS[0])], bounds[-1])
    if shift and which < len(slices):
        moved = list(slices)
        moved[which] = Slice(slices[which].start + shift, slices[which].stop, PEERS[0])
        assert not covers(moved, bounds[-1])


def test_nothing_covers_nothing() -> None:
    assert covers((), 0)
    assert not covers((), 1)
