"""What was signed in one round, as one peer has it: hash trees of parts and of combined slices, with signatures."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
from torch import Tensor

from ...transport.identity import Identity, PeerId
from ..reduce.buffers import Part
from ..reduce.codecs import FP32, Codec
from ..reduce.leaves import Tree, build, leaf_elements
from ..state import bytes_view
from .messages import Plan
from .statements import Combined, Mark, combined_bytes, combined_fault, inputs_of, mark_fault, sign_part

#: (start, stop, codec) of a part.
Range = tuple[int, int, str]


@attrs.frozen
class Marked:
    """A part of a slice, the tree over its bytes, and what its contributor signed."""

    part: Part
    tree: Tree
    mark: Mark


class Ledger:
    """Trees are made off the event loop, where the slice is large: what says "blocking" belongs there."""

    def __init__(self, identity: Identity, key: bytes, voters: int) -> None:
        self._identity, self.key, self._voters = identity, key, voters
        self.me = identity.peer_id
        #: Parts that we have sent, as sent.
        self.sent: dict[Range, Marked] = {}
        #: Parts of the slices that we own, by contributor.
        self.given: dict[tuple[PeerId, *Range], Marked] = {}
        self._combined: dict[tuple[int, int, int, int, PeerId], tuple[Combined, Tree]] = {}
        #: Inner products of the members, part by part of our slices, of the generation that they are of.
        self.products: tuple[tuple[int, int], bytes] = (-1, -1), b""

    def leaf(self, elements: int, codec: Codec) -> int:
        """Elements of a leaf of a slice."""
        return leaf_elements(elements, self._voters, codec)

    def tree(self, part: Part, elements: int) -> Tree:
        """Over a part's code. Blocking."""
        return build(part.data, elements, self.leaf(elements, part.codec), part.codec)

    def result_tree(self, result: Tensor, codec: Codec) -> Tree:
        """Over a combined slice as float32, whatever ``codec`` it travels in: leaves are as long as those of parts.
        Blocking."""
        return build(bytes_view(result), len(result), self.leaf(len(result), codec), FP32)

    def mark(self, start: int, stop: int, part: Part) -> Marked:
        """Sign a part of ours. Blocking."""
        key = start, stop, part.codec.name
        found = self.sent.get(key)
        if found is None:
            tree = self.tree(part, stop - start)
            mark = sign_part(self._identity, self.key, start, stop, part.codec.name, tree.root)
            found = self.sent[key] = Marked(part, tree, mark)
        return found

    def take(self, contributor: PeerId, start: int, stop: int, part: Part, mark: Mark) -> str | None:
        """Keep a part with its contributor's mark; what is wrong with that. Blocking."""
        wrong = mark_fault(mark, contributor, self.key, start, stop, part.codec.name)
        if wrong is None and (tree := self.tree(part, stop - start)).root != mark.root:
            wrong = "what was signed is another one"
        if wrong is None:
            # The first one stands: an owner that has combined it would else sign for another one, and be convicted.
            first = self.given.setdefault((contributor, start, stop, part.codec.name), Marked(part, tree, mark))
            wrong = None if first.mark.root == mark.root else "it has signed another one before"
        return wrong

    def sign(self, plan: Plan, index: int, context: bytes, roots: Sequence[bytes], result: Tensor, codec: Codec,
             products: bytes) -> None:  # fmt: skip
        """Sign the combined slice ``index`` of ours, which ``result`` is. Blocking."""
        start, stop = plan.slices[index].range
        tree, inputs = self.result_tree(result, codec), inputs_of(roots)
        data = combined_bytes(
            self.key, plan.attempt, plan.epoch, start, stop, codec.name, context, inputs, tree.root, products
        )
        signed = Combined(context, inputs, tree.root, products, self._identity.sign(data))
        self.keep(plan.attempt, plan.epoch, start, stop, self.me, signed, tree)

    def check(
        self, attempt: int, epoch: int, start: int, stop: int, owner: PeerId, result: Tensor, codec: Codec,
        signed: Combined | None,
    ) -> str | None:  # fmt: skip
        """Keep what ``owner`` has signed of a combined slice; what is wrong with it. Blocking.

        The first one stands, as the first slice does in the result: with the statement of another one, what is accused
        would not be what is proven.
        """
        if signed is None:
            return "its owner has not signed it"
        tree = self.result_tree(result, codec)
        wrong = combined_fault(signed, owner, self.key, attempt, epoch, start, stop, codec.name, tree.root)
        if wrong is not None:
            return wrong
        first = self._combined.get((attempt, epoch, start, stop, owner))
        if first is not None and first[1].root != tree.root:
            return "its owner has signed another one before"
        if first is None:
            self.keep(attempt, epoch, start, stop, owner, signed, tree)
        return None

    def keep(
        self, attempt: int, epoch: int, start: int, stop: int, owner: PeerId, signed: Combined, tree: Tree
    ) -> None:
        """A statement that is checked."""
        self._combined[attempt, epoch, start, stop, owner] = signed, tree

    def statement(self, plan: Plan, index: int) -> tuple[Combined, Tree] | None:
        """What the owner of slice ``index`` of ``plan`` has signed, and the tree over what came with it."""
        piece = plan.slices[index]
        return self._combined.get((plan.attempt, plan.epoch, piece.start, piece.stop, piece.owner))

    def signed(self, plan: Plan, index: int) -> Combined | None:
        found = self.statement(plan, index)
        return None if found is None else found[0]

    def drop(self) -> None:
        """The round is over: the parts are free."""
        self.sent.clear()
        self.given.clear()
        self._combined.clear()
        self.products = (-1, -1), b""
