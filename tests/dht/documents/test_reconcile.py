"""Anti-entropy: little is said where little differs, both sides end with the same, and nonsense is bounded."""

from __future__ import annotations

import hashlib
import random

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.dht.documents import defaults
from shoal.dht.documents.messages import Branches, Compare, Compared, Leaves, Node, Want
from shoal.dht.documents.reconcile import Comparison, Tree, answer, place_of
from shoal.dht.documents.replica import Range
from shoal.transport.errors import RemoteProtocolError
from shoal.transport.identity import PeerId
from shoal.transport.wire import pack

from .epidemic import peer

DOCUMENT = hashlib.blake2b(b"document", digest_size=32).digest()
Holding = dict[PeerId, Range]


def held(
    author: int, next: int, *, incarnation: int = 1, first: int = 0, branch: int = 0, frozen: bool = False
) -> Range:
    head = hashlib.blake2b(b"%d %d %d %d" % (author, incarnation, next, branch), digest_size=32).digest()
    return Range(peer(author), incarnation, first, next, head, False)


def holding(*ranges: Range) -> Holding:
    return {item.author: item for item in ranges}


def compare(mine: Holding, theirs: Holding) -> tuple[Comparison, int, int]:
    """(what came out, questions, bytes both ways) of an exchange about one document."""
    return compare_many({DOCUMENT: mine}, {DOCUMENT: theirs})


def compare_many(mine: dict[bytes, Holding], theirs: dict[bytes, Holding]) -> tuple[Comparison, int, int]:
    comparison = Comparison({id: Tree(list(held.values())) for id, held in mine.items()})
    trees = {id: Tree(list(held.values())) for id, held in theirs.items()}
    questions = size = 0
    while nodes := comparison.ask():
        assert len(nodes) <= defaults.MAX_NODES
        compared = answer(trees, nodes)
        questions += 1
        size += len(pack(Compare(b"scope", nodes))) + len(pack(compared))
        comparison.take(nodes, compared)
    return comparison, questions, size


def thousand(next: int = 5) -> Holding:
    return holding(*(held(number, next) for number in range(1000)))


def test_equal_documents_cost_one_digest_each() -> None:
    comparison, questions, size = compare(thousand(), thousand())
    assert len(comparison.found) == 0
    assert questions == 1
    assert size < 200


def test_one_author_who_differs_among_a_thousand_costs_three_questions_of_a_kilobyte() -> None:
    comparison, questions, size = compare(thousand(), thousand() | holding(held(77, 8)))
    assert comparison.found.wants == [Want(DOCUMENT, peer(77), 1, 5, 8)]
    assert comparison.found.offers == []
    assert questions <= 3
    assert size < 4000


def test_documents_that_differ_everywhere_are_compared_in_bounded_messages() -> None:
    comparison, questions, size = compare(thousand(5), thousand(9))
    assert len(comparison.found.wants) == 1000
    assert not comparison.unfinished
    assert questions <= 20
    assert size < 400_000


def test_several_documents_share_one_exchange() -> None:
    ids = [bytes([number]) * 32 for number in range(40)]
    mine = {id: holding(*(held(number, 3) for number in range(50))) for id in ids}
    theirs = {id: dict(each) for id, each in mine.items()}
    theirs[ids[7]] |= holding(held(8, 4))
    theirs[ids[9]].pop(peer(3))
    comparison, questions, _ = compare_many(mine, theirs)
    assert comparison.found.wants == [Want(ids[7], peer(8), 1, 3, 4)]
    assert comparison.found.offers == [Want(ids[9], peer(3), 1, 0, 3)]
    assert questions <= 3


def test_a_document_that_only_one_side_has_open_is_left_out() -> None:
    comparison, questions, _ = compare_many({DOCUMENT: thousand(), bytes(32): thousand()}, {DOCUMENT: thousand()})
    assert len(comparison.found) == 0
    assert questions == 1


def test_what_was_compacted_away_is_no_difference() -> None:
    comparison, _, _ = compare(holding(held(1, 9)), holding(held(1, 9, first=7)))
    assert len(comparison.found) == 0


def test_a_snapshot_is_fetched_from_where_it_begins() -> None:
    comparison, _, _ = compare(holding(held(1, 3)), holding(held(1, 9, first=7)))
    assert comparison.found.wants == [Want(DOCUMENT, peer(1), 1, 7, 9)]
    comparison, _, _ = compare(holding(held(1, 9, first=7)), holding(held(1, 3)))
    assert comparison.found.offers == [Want(DOCUMENT, peer(1), 1, 7, 9)]


def test_a_newer_incarnation_is_fetched_whole_and_an_older_one_never() -> None:
    comparison, _, _ = compare(holding(held(1, 30)), holding(held(1, 2, incarnation=2)))
    assert comparison.found.wants == [Want(DOCUMENT, peer(1), 2, 0, 2)]
    assert comparison.found.offers == []


def test_a_fork_shows_where_two_ends_differ() -> None:
    comparison, _, _ = compare(holding(held(1, 6)), holding(held(1, 6, branch=1)))
    assert comparison.found.wants == [Want(DOCUMENT, peer(1), 1, 5, 6)]
    assert comparison.found.offers == [Want(DOCUMENT, peer(1), 1, 5, 6)]


def frozen(author: int, incarnation: int = 1) -> Range:
    return Range(peer(author), incarnation, 0, 0, bytes(32), True)


def test_a_proof_is_sent_and_nothing_else_of_an_author_who_contradicted_itself() -> None:
    for without in (holding(held(1, 6)), holding(), holding(held(1, 2, incarnation=0))):
        comparison, _, _ = compare(without, holding(frozen(1)))
        assert [doubt.author for doubt in comparison.found.doubts] == [peer(1)]
        assert len(comparison.found) == 1
        comparison, _, _ = compare(holding(frozen(1)), without)
        assert [proof.author for proof in comparison.found.proofs] == [peer(1)]
        assert len(comparison.found) == 1
    assert len(compare(holding(frozen(1)), holding(frozen(1)))[0].found) == 0


def test_a_newer_incarnation_replaces_a_frozen_one() -> None:
    comparison, _, _ = compare(holding(frozen(1)), holding(held(1, 3, incarnation=2)))
    assert comparison.found.wants == [Want(DOCUMENT, peer(1), 2, 0, 3)]
    assert len(comparison.found) == 1


ranges = st.builds(
    held,
    st.integers(0, 40),
    st.integers(1, 4),
    incarnation=st.integers(1, 2),
    branch=st.just(0),
)


@settings(max_examples=80, deadline=None)
@given(st.lists(ranges, max_size=40), st.lists(ranges, max_size=40))
def test_what_both_sides_fetch_and_send_makes_them_equal(one: list[Range], other: list[Range]) -> None:
    mine, theirs = holding(*one), holding(*other)
    comparison, _, _ = compare(mine, theirs)
    best = {
        author: max(
            (side[author] for side in (mine, theirs) if author in side), key=lambda item: (item.incarnation, item.next)
        )
        for author in {**mine, **theirs}
    }
    wants = {want.author: want for want in comparison.found.wants}
    offers = {want.author: want for want in comparison.found.offers}
    for author, newest in best.items():
        for side, transfers in ((mine, wants), (theirs, offers)):
            have = side.get(author)
            if have == newest:
                assert author not in transfers
            else:
                moved = transfers[author]
                assert moved.next == newest.next
                assert moved.incarnation == newest.incarnation
                assert moved.first == (have.next if have is not None and have.incarnation == newest.incarnation else 0)


def test_an_author_stands_below_its_own_hash_only() -> None:
    tree = Tree(list(thousand().values()))
    for number in (0, 17, 999):
        place = place_of(peer(number))
        assert tree.held(place) == (held(number, 5),)
        assert all(place_of(item.author)[:2] == place[:2] for item in tree.held(place[:2]))
    assert sum(tree.count(bytes([half])) for half in range(16)) == 1000 == tree.count(b"")


# --- answers of liars ------------------------------------------------------------------------------------------------


def asked() -> tuple[Comparison, tuple[Node, ...]]:
    comparison = Comparison({DOCUMENT: Tree(list(thousand().values()))})
    return comparison, comparison.ask()


DIGESTS = tuple(bytes(16) for _ in range(16))


@pytest.mark.parametrize(
    "compared",
    [
        Compared((), (Leaves(bytes(32), b"", ()),), False),
        Compared((), (Leaves(DOCUMENT, b"\1", ()),), False),
        Compared((Branches(DOCUMENT, b"\1", DIGESTS),), (), False),
        Compared((Branches(DOCUMENT, b"", DIGESTS[:5]),), (), False),
        Compared((Branches(DOCUMENT, b"", DIGESTS),), (Leaves(DOCUMENT, b"", ()),), False),
        Compared((), (Leaves(DOCUMENT, b"", tuple(held(n, 1) for n in range(defaults.MAX_COMPARED + 1))),), False),
        Compared((), (), True),
    ],
    ids=["document", "prefix", "branches", "few", "twice", "many", "more"],
)
def test_an_answer_to_something_else_is_refused(compared: Compared) -> None:
    comparison, nodes = asked()
    with pytest.raises(RemoteProtocolError):
        comparison.take(nodes, compared)


def test_authors_are_refused_where_they_do_not_belong() -> None:
    comparison, nodes = asked()
    comparison.take(nodes, Compared((Branches(DOCUMENT, b"", DIGESTS),), (), False))
    nodes = comparison.ask()
    stranger = next(number for number in range(100) if place_of(peer(number))[:1] != nodes[0].prefix)
    with pytest.raises(RemoteProtocolError):
        comparison.take(nodes, Compared((), (Leaves(DOCUMENT, nodes[0].prefix, (held(stranger, 1),)),), False))


def test_a_liar_that_always_differs_is_asked_a_bounded_number_of_questions() -> None:
    rng = random.Random(1)
    comparison, nodes = asked()
    questions = 1
    while nodes:
        branches = tuple(
            Branches(node.document, node.prefix, tuple(rng.randbytes(16) for _ in range(16)))
            for node in nodes
            if len(node.prefix) < defaults.TREE_DEPTH
        )
        comparison.take(nodes, Compared(branches, (), False))
        nodes = comparison.ask()
        questions += bool(nodes)
    assert questions <= defaults.MAX_COMPARES
    assert comparison.unfinished
    assert len(comparison._pending) <= defaults.MAX_PENDING


def test_ranges_without_sense_are_not_asked_for() -> None:
    lies = [
        attrs.evolve(held(1, 9), next=1 << 70),
        attrs.evolve(held(2, 9), first=-5),
        attrs.evolve(held(3, 9), incarnation=-1),
        attrs.evolve(held(4, 9), first=9, next=3),
    ]
    comparison, nodes = asked()
    comparison.trees = {DOCUMENT: Tree([])}
    comparison.take(nodes, Compared((), (Leaves(DOCUMENT, b"", tuple(lies)),), False))
    assert comparison.found.wants == []


def test_a_question_full_of_nonsense_is_answered_in_bounds() -> None:
    trees = {DOCUMENT: Tree(list(thousand().values()))}
    nodes = [Node(DOCUMENT, b"\xff" * 300, b"x"), Node(bytes(32), b"", b"")] + [Node(DOCUMENT, b"", b"?")] * 1000
    compared = answer(trees, nodes)
    assert compared.more
    assert len(compared.branches) * 16 + sum(len(item.held) for item in compared.leaves) <= defaults.MAX_COMPARED


def test_questions_about_every_place_leave_nothing_behind() -> None:
    """An answer remembers no more than the tree has nodes to divide, whatever prefixes others make up."""
    tree = Tree(list(thousand().values()))
    for first in range(64):
        prefixes = [bytes((first >> 4, first & 15, n >> 4, n & 15, 7, 7, 7)) for n in range(defaults.MAX_NODES)]
        answer({DOCUMENT: tree}, [Node(DOCUMENT, prefix, bytes(16)) for prefix in prefixes])
        answer({DOCUMENT: tree}, [Node(DOCUMENT, place_of(peer(first)), bytes(16))])
    assert len(tree._digests) < 100
