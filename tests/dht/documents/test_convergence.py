"""Whatever comes in whatever order, however often, on whichever side of a partition: all replicas end in one state."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.dht.documents.envelope import Envelope
from shoal.dht.documents.replica import Code

from .swarm import IDS, Story, Writer, assert_equal, heal, put, replica, signed
from .updates import honest

RANDOM = st.randoms(use_true_random=False)


def told(rng: random.Random, writers: int, steps: int, evil: bool) -> Story:
    story = Story(rng, [Writer(identity) for identity in IDS[:writers]], evil)
    for _ in range(steps):
        story.step()
    return story


def check(story: Story) -> None:
    heal(story.writers, story.rng)
    assert_equal(story.writers)
    for held in story.writers[0].replica.summary():
        proof = story.writers[0].replica.evidence(held.author)
        assert (proof is not None) == held.frozen
        if proof is not None:
            proof.check()
    # Some of what was signed reached nobody: it may still come, until there is nothing that anybody does not know.
    for _ in range(50):
        before = story.writers[0].replica.digest()
        for envelope in story.rng.sample(story.envelopes, len(story.envelopes)):
            story.rng.choice(story.writers).offer(envelope)
        heal(story.writers, story.rng)
        assert_equal(story.writers)
        if story.writers[0].replica.digest() == before:
            return
    raise AssertionError("the replicas go on changing")


@settings(max_examples=60, deadline=None)
@given(rng=RANDOM, writers=st.integers(2, 5), steps=st.integers(1, 60))
def test_replicas_agree_after_writing_cheating_losing_and_partitions(
    rng: random.Random, writers: int, steps: int
) -> None:
    check(told(rng, writers, steps, evil=True))


@pytest.mark.slow
@settings(max_examples=3000, deadline=None)
@given(rng=RANDOM, writers=st.integers(2, 7), steps=st.integers(1, 150))
def test_replicas_agree_after_longer_stories(rng: random.Random, writers: int, steps: int) -> None:
    check(told(rng, writers, steps, evil=True))


@settings(max_examples=30, deadline=None)
@given(rng=RANDOM, writers=st.integers(2, 4), steps=st.integers(1, 60))
def test_among_honest_authors_nothing_is_lost_and_nobody_is_blamed(
    rng: random.Random, writers: int, steps: int
) -> None:
    story = told(rng, writers, steps, evil=False)
    wrote = {writer.peer: writer.replica.view(writer.peer) for writer in story.writers}
    heal(story.writers, story.rng)
    assert_equal(story.writers)
    assert {author: view for author, view in story.writers[0].replica.read().items() if view} == {
        author: view for author, view in wrote.items() if view
    }
    assert not any(held.frozen for held in story.writers[0].replica.summary())


@settings(max_examples=40, deadline=None)
@given(rng=RANDOM, steps=st.integers(1, 40))
def test_without_forks_the_state_depends_only_on_what_came_not_on_when(rng: random.Random, steps: int) -> None:
    story = told(rng, 3, steps, evil=False)
    for writer in story.writers:
        if rng.random() < 0.3:
            writer.lose_everything()
            story._keep(writer.write(put("again", 1)))
    ends = []
    for _ in range(3):
        reader = Writer(IDS[7])
        left = rng.sample(story.envelopes, len(story.envelopes))
        while left:  # those that came too early come again, in another order
            now = [envelope for envelope in left if reader.offer(envelope).code is Code.GAP]
            if len(now) == len(left):
                break
            left = rng.sample(now, len(now))
        ends.append(reader)
    assert_equal(ends)


@settings(max_examples=30, deadline=None)
@given(rng=RANDOM, split=st.integers(1, 20), sides=st.integers(2, 3))
def test_a_partition_in_which_a_copied_key_wrote_on_both_sides_heals_to_one_state(
    rng: random.Random, split: int, sides: int
) -> None:
    """A disk was copied: two machines go on with one chain. Both histories are void; one of them says it anew."""
    original = Writer(IDS[0])
    for number in range(split):
        original.must_write(put(f"k{number % 3}", number))
    readers = [Writer(IDS[number + 2]) for number in range(sides)]
    copies = []
    for _ in range(sides):
        copy = Writer(IDS[0])
        copy.replica.load(original.replica.envelopes(IDS[0].peer_id, 2, 0, 1 << 31), (), 1.7e9, IDS[0].peer_id)
        copies.append(copy)
    for number, (copy, reader) in enumerate(zip(copies, readers, strict=True)):
        for _ in range(rng.randrange(1, 4)):
            reader_view = copy.must_write(put("side", number))
            assert reader_view.incarnation == 2
        heal([copy, reader], rng)
    everybody = [*copies, *readers]
    heal(everybody, rng)
    assert_equal(everybody)
    assert readers[0].replica.evidence(IDS[0].peer_id) is not None
    assert copies[0].replica.must_begin(IDS[0].peer_id)
    copies[0].must_write(put("anew", True))
    heal(everybody, rng)
    assert_equal(everybody)
    view: dict[str, Any] = readers[-1].replica.view(IDS[0].peer_id)["m"]
    assert view["anew"] is True and view["side"] == 0  # with all that this copy had written


def test_three_histories_of_one_author_void_each_other_whoever_knew_which() -> None:
    rng = random.Random(5)
    first, *_ = honest(rng, 1, 0) or [b"\0\0"]
    chains: list[list[Envelope]] = []
    for mark in range(3):
        chain = [signed(IDS[0], first, 0, expires=1.7e9 + 100 + mark)]
        for counter in range(1, 4):
            chain.append(signed(IDS[0], b"\0\0", counter, chain[-1].id))
        chains.append(chain)
    writers = [Writer(IDS[number + 1]) for number in range(3)]
    for writer, chain in zip(writers, chains, strict=True):
        for envelope in chain:
            assert writer.offer(envelope).kept
    heal(writers, rng)
    assert_equal(writers)
    assert writers[0].replica.read() == {}
    late = replica()
    for envelope in chains[1]:
        late.offer(envelope, 1.7e9, 0.0)
    proof = writers[2].replica.evidence(IDS[0].peer_id)
    assert proof is not None and late.accuse(proof).kept
    assert late.digest() == writers[0].replica.digest()


def test_the_stories_hold_what_they_are_told_for() -> None:
    frozen = replaced = compacted = 0
    for seed in range(60):
        story = told(random.Random(seed), 4, 60, evil=True)
        heal(story.writers, story.rng)
        for held in story.writers[0].replica.summary():
            frozen += held.frozen
            replaced += held.incarnation > 2
            compacted += held.first > 0
    assert min(frozen, replaced, compacted) > 10
