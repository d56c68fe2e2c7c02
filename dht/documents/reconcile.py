"""Anti-entropy: two members find out, in few small messages, what each lacks, and ship original envelopes; sans-IO.

What a member holds of a document is its replica's summary, a :class:`Range` for each author: incarnation, counters from
… to, the hash of the last envelope (which commits to all before it, as each names its predecessor), and whether there
is proof that the author contradicted itself. The summary is hashed as a tree by the half bytes of each author's hash:
equal documents cost one digest of 16 bytes; one author who differs among 1,000 costs three exchanges of about a
kilobyte. The asking side (:class:`Comparison`) holds the state, the answering side (:func:`answer`) none, so nobody can
make a member remember half-finished exchanges.

Merkle trees for anti-entropy: Demers et al., "Epidemic Algorithms for Replicated Database Maintenance", PODC 1987, and
DeCandia et al., "Dynamo", SOSP 2007, section 4.7. Sketches (IBLT, minisketch) would save bytes where many differ, but
need a guess of how many, and what is shipped then is far larger than what they save.
"""

from __future__ import annotations

import functools
import hashlib
import struct
from bisect import bisect_left
from collections.abc import Mapping, Sequence

import attrs

from ...transport.errors import RemoteProtocolError
from ...transport.identity import PeerId
from . import defaults
from .messages import Accused, Branches, Compared, Leaves, Node, Want
from .replica import Range

_LEAF = struct.Struct(">32sQQ32s?")
_EMPTY = b""


@functools.lru_cache(maxsize=8192)
def place_of(author: PeerId) -> bytes:
    """Where an author stands in the tree: the half bytes of its hash, one per byte."""
    digest = hashlib.blake2b(author.key, digest_size=defaults.TREE_DEPTH // 2, person=b"shoal doc tree").digest()
    return bytes(half for byte in digest for half in (byte >> 4, byte & 15))


def _after(prefix: bytes) -> bytes:
    """The first place behind all that begin with ``prefix``. (Half bytes are below 16.)"""
    return prefix + b"\x10"


class Tree:
    """What one member holds of one document, hashed. Built anew when it changes; digests are made when asked for."""

    def __init__(self, held: Sequence[Range]) -> None:
        self._held = sorted(held, key=lambda item: (place_of(item.author), item.author))
        self._places = [place_of(item.author) for item in self._held]
        self._hashes: list[bytes] | None = None
        self._digests: dict[bytes, bytes] = {}

    def __len__(self) -> int:
        return len(self._held)

    def _range(self, prefix: bytes) -> tuple[int, int]:
        return bisect_left(self._places, prefix), bisect_left(self._places, _after(prefix))

    def count(self, prefix: bytes) -> int:
        """How many entries stand below ``prefix``."""
        first, last = self._range(prefix)
        return last - first

    def held(self, prefix: bytes) -> tuple[Range, ...]:
        """The entries below ``prefix``."""
        first, last = self._range(prefix)
        return tuple(self._held[first:last])

    def digest(self, prefix: bytes) -> bytes:
        """16 bytes over all entries below ``prefix``; no bytes for none."""
        found = self._digests.get(prefix)
        if found is None:
            first, last = self._range(prefix)
            if first == last:
                return _EMPTY
            if self._hashes is None:
                # Not `first`: what was compacted away is no difference.
                leaves = [
                    hashlib.blake2b(_LEAF.pack(h.author.key, h.incarnation, h.next, h.head, h.frozen), digest_size=16)
                    for h in self._held
                ]
                self._hashes = [leaf.digest() for leaf in leaves]
            found = hashlib.blake2b(b"".join(self._hashes[first:last]), digest_size=16).digest()
            if last - first > defaults.TREE_LEAF:
                # Others choose what is asked for, and nearly every prefix stands above few entries or none.
                self._digests[prefix] = found
        return found

    def branches(self, prefix: bytes) -> tuple[bytes, ...]:
        """The digests below ``prefix``, one for each half byte that follows it."""
        return tuple(self.digest(prefix + bytes((half,))) for half in range(16))


def answer(trees: Mapping[bytes, Tree], nodes: Sequence[Node]) -> Compared:
    """The answering side: which of ``nodes`` differ here, taken apart. Documents that are not held here count as
    equal.
    """
    branches: list[Branches] = []
    leaves: list[Leaves] = []
    room = defaults.MAX_COMPARED
    for node in nodes[: defaults.MAX_NODES]:
        tree = trees.get(node.document)
        prefix = bytes(half & 15 for half in node.prefix[: defaults.TREE_DEPTH])
        if tree is None or tree.digest(prefix) == node.digest:
            continue
        count = tree.count(prefix)
        if count <= defaults.TREE_LEAF or len(prefix) >= defaults.TREE_DEPTH:
            if count > room:
                return Compared(tuple(branches), tuple(leaves), more=True)
            room -= count + 1
            leaves.append(Leaves(node.document, prefix, tree.held(prefix)[: defaults.MAX_COMPARED]))
        else:
            if room < 16:
                return Compared(tuple(branches), tuple(leaves), more=True)
            room -= 16
            branches.append(Branches(node.document, prefix, tree.branches(prefix)))
    return Compared(tuple(branches), tuple(leaves), more=len(nodes) > defaults.MAX_NODES)


@attrs.define
class Differences:
    """What two members have to send each other, by document, author and counter.

    ``wants``: what we lack and they hold; ``offers``: the reverse. ``doubts``: authors against whom they hold a proof
    that we lack; ``proofs``: the reverse.
    """

    wants: list[Want] = attrs.field(factory=list)
    offers: list[Want] = attrs.field(factory=list)
    doubts: list[Accused] = attrs.field(factory=list)
    proofs: list[Accused] = attrs.field(factory=list)

    def __len__(self) -> int:
        return len(self.wants) + len(self.offers) + len(self.doubts) + len(self.proofs)

    def find(self, document: bytes, mine: Sequence[Range], theirs: Sequence[Range]) -> None:
        """Add what differs between what we hold and what they say that they hold, of the same authors."""
        ours, other = {held.author: held for held in mine}, {held.author: held for held in theirs}
        for author in sorted({**ours, **other}):
            self._compare(document, author, ours.get(author), other.get(author))

    def _compare(self, document: bytes, author: PeerId, have: Range | None, has: Range | None) -> None:
        if has is not None and (have is None or has.incarnation > have.incarnation):
            self._one_sided(self.wants, self.doubts, document, has)
        elif have is not None and (has is None or have.incarnation > has.incarnation):
            self._one_sided(self.offers, self.proofs, document, have)
        elif have is not None and has is not None:
            if have.frozen or has.frozen:
                # Nothing of this incarnation counts any more: only the proof has to travel.
                if has.frozen and not have.frozen:
                    self.doubts.append(Accused(document, author))
                elif have.frozen and not has.frozen:
                    self.proofs.append(Accused(document, author))
            elif has.next > have.next:
                # If it does not follow on what we hold, that is the proof of a fork.
                self._add(self.wants, document, has, max(has.first, have.next))
            elif have.next > has.next:
                self._add(self.offers, document, have, max(have.first, has.next))
            elif have.head != has.head:
                # Two envelopes at one counter: both sides shall have the proof.
                self._add(self.wants, document, has, has.next - 1)
                self._add(self.offers, document, have, have.next - 1)

    def _one_sided(self, where: list[Want], proofs: list[Accused], document: bytes, held: Range) -> None:
        if held.frozen:
            proofs.append(Accused(document, held.author))
        else:
            self._add(where, document, held, held.first)

    @staticmethod
    def _add(where: list[Want], document: bytes, held: Range, first: int) -> None:
        if 0 <= first < held.next < 1 << 63 and 0 <= held.incarnation < 1 << 63:
            where.append(Want(document, held.author, held.incarnation, first, held.next))


@attrs.define(eq=False)
class Comparison:
    """The asking side of one exchange about several documents.

    ``while (nodes := it.ask()): it.take(nodes, await the answer)``; then :attr:`found` says what to fetch and
    what to send. Ends after :data:`defaults.MAX_COMPARES` messages whatever the other side answers.
    """

    trees: Mapping[bytes, Tree]
    found: Differences = attrs.field(factory=Differences)
    #: Whether something was left for the next exchange.
    unfinished: bool = False
    _pending: list[Node] = attrs.field(init=False)
    _asked: int = 0

    def __attrs_post_init__(self) -> None:
        self._pending = [Node(document, b"", tree.digest(b"")) for document, tree in sorted(self.trees.items())]

    def ask(self) -> tuple[Node, ...]:
        """The nodes to send next; none when the comparison is over."""
        if self._asked >= defaults.MAX_COMPARES or len(self.found) >= defaults.MAX_WANTED:
            self.unfinished = self.unfinished or bool(self._pending)
            return ()
        self._asked += 1
        nodes, self._pending = self._pending[: defaults.MAX_NODES], self._pending[defaults.MAX_NODES :]
        return tuple(nodes)

    def take(self, nodes: Sequence[Node], compared: Compared) -> None:
        """The answer to ``nodes``. Raises :class:`RemoteProtocolError` when it is about something else."""
        open_ = {(node.document, node.prefix): node for node in nodes}
        for leaves in compared.leaves:
            self._expected(open_, leaves.document, leaves.prefix)
            if len(leaves.held) > defaults.MAX_COMPARED:
                raise RemoteProtocolError(f"{len(leaves.held)} entries in one answer")
            if any(not place_of(item.author).startswith(leaves.prefix) for item in leaves.held):
                raise RemoteProtocolError("it names an author where that one does not belong")
            self.found.find(leaves.document, self.trees[leaves.document].held(leaves.prefix), leaves.held)
        for branches in compared.branches:
            self._expected(open_, branches.document, branches.prefix)
            if len(branches.digests) != 16 or len(branches.prefix) >= defaults.TREE_DEPTH:
                raise RemoteProtocolError(f"a node with {len(branches.digests)} branches at {len(branches.prefix)}")
            tree = self.trees[branches.document]
            for half, digest in enumerate(branches.digests):
                prefix = branches.prefix + bytes((half,))
                own = tree.digest(prefix)
                if own == digest:
                    continue
                if len(self._pending) >= defaults.MAX_PENDING:
                    self.unfinished = True
                    return
                self._pending.append(Node(branches.document, prefix, own))
        if compared.more:
            # Cut short in the order of the nodes: whatever was not named may differ.
            if not compared.leaves and not compared.branches:
                raise RemoteProtocolError("it says that there is more, and nothing else")
            self._pending = list(open_.values()) + self._pending

    @staticmethod
    def _expected(open_: dict[tuple[bytes, bytes], Node], document: bytes, prefix: bytes) -> None:
        if open_.pop((document, prefix), None) is None:
            raise RemoteProtocolError("it answers what was not asked")
