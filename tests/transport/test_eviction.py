"""Who gives way when slots or memory run out."""

from __future__ import annotations

import attrs
from hypothesis import given
from hypothesis import strategies as st

from shoal.transport import defaults
from shoal.transport.eviction import Candidate, make_room, relieve

NOW = 1000.0
STRANGER = Candidate("crowd", proven=False, idle=False, opened_at=NOW - 1, last_used=NOW)
MEMBER = attrs.evolve(STRANGER, source="home", proven=True)


def test_one_source_that_holds_most_slots_gives_way_to_any_other() -> None:
    links = [MEMBER, *[attrs.evolve(STRANGER, opened_at=NOW - 2 + n / 100) for n in range(100)]]
    assert make_room(links, "honest", NOW) == (1, "crowd holds 100 links, the newcomer's address fewer")


def test_a_source_does_not_push_out_others_with_more_of_its_own() -> None:
    links = [attrs.evolve(STRANGER, source="honest"), *[STRANGER] * 100]
    index, reason = make_room(links, "crowd", NOW)
    assert index is None
    assert reason == "no slot for another link: 101 strangers came less than 60 s ago"
    # Neither when each of its own has stayed long enough: then its own go.
    older = [attrs.evolve(link, opened_at=NOW - 100) for link in links]
    index, reason = make_room(older, "crowd", NOW)
    assert index is not None
    assert index >= 1
    assert reason == "a stranger's link that had its 100 s"


def test_idle_ones_go_first_and_at_once() -> None:
    idle = attrs.evolve(STRANGER, source="b", idle=True, last_used=NOW - defaults.IDLE_GRACE)
    links = [attrs.evolve(STRANGER, source="a", opened_at=0.0), idle]
    assert make_room(links, "c", NOW) == (1, "it was idle")


def test_what_the_node_has_a_use_for_never_gives_way() -> None:
    links = [attrs.evolve(MEMBER, opened_at=0.0, idle=True, last_used=0.0)] * 128
    assert make_room(links, "honest", NOW) == (None, "every link is one that this node has a use for")
    assert make_room([*links, attrs.evolve(STRANGER, opened_at=0.0)], "honest", NOW)[0] == 128


def test_with_one_link_per_source_the_oldest_gives_way_after_its_time() -> None:
    links = [attrs.evolve(STRANGER, source=f"s{n}", opened_at=NOW - 10 * n) for n in range(9)]
    assert make_room(links, "honest", NOW) == (8, "a stranger's link that had its 80 s")
    assert make_room(links[:6], "honest", NOW)[0] is None


@given(
    st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.booleans(), st.integers(0, 200)), max_size=40),
    st.integers(0, 5),
)
def test_room_is_only_ever_made_by_strangers_of_a_source_with_no_fewer_links(
    drawn: list[tuple[int, bool, bool, int]], newcomer: int
) -> None:
    links = [Candidate(f"s{source}", proven, idle, NOW - age, NOW - age / 2) for source, proven, idle, age in drawn]
    index, reason = make_room(links, f"s{newcomer}", NOW)
    assert reason
    if index is None:
        return
    assert not links[index].proven
    shares = [link.source for link in links if not link.proven]
    assert shares.count(links[index].source) == max(map(shares.count, shares))
    assert shares.count(links[index].source) >= shares.count(f"s{newcomer}")


def test_memory_within_the_limit_ends_nobody() -> None:
    assert relieve([attrs.evolve(STRANGER, held=100)] * 5, 500) == (None, "within limits")
    assert relieve([], 0)[0] is None


def test_the_stranger_that_holds_most_ends_before_a_member_that_holds_more() -> None:
    links = [attrs.evolve(MEMBER, held=60 << 20), attrs.evolve(STRANGER, held=40 << 20), attrs.evolve(STRANGER, held=9)]
    index, reason = relieve(links, 80 << 20)
    assert (index, reason[:22]) == (1, "all links hold 100 MiB")


def test_a_member_ends_only_when_strangers_could_not_make_up_for_it() -> None:
    links = [attrs.evolve(MEMBER, held=90 << 20), attrs.evolve(MEMBER, held=9 << 20), attrs.evolve(STRANGER, held=9)]
    assert relieve(links, 80 << 20)[0] == 0


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 100)), max_size=20), st.integers(0, 300))
def test_ending_one_after_the_other_comes_below_the_limit(drawn: list[tuple[bool, int]], limit: int) -> None:
    links = [attrs.evolve(STRANGER, proven=proven, held=held) for proven, held in drawn]
    while (index := relieve(links, limit)[0]) is not None:
        assert links[index].held > 0
        del links[index]
    assert sum(link.held for link in links) <= limit
