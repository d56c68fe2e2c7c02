"""Contributions that an owner denies, as the leader hears of it, sans-IO: who has to show what, and who is believed.

A member that most owners hold, and some do not, may be slow, or an owner keeps it out. The leader asks the member
(Missing), which shows the owners' receipts (Receipts); an owner that has signed for what it denies is gone without. A
member without a receipt has its part carried by two others; where both find that the owner does not take it (Denied),
the owner loses its slices too, and the sender keeps its place. Nobody is expelled for it: of three that lie together
an honest owner can lose its slices for a round, not more.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from ...transport.identity import PeerId
from .claims import Denied, Missing, Receipts
from .messages import Plan
from .statements import receipt_bytes

#: Members that have to find that an owner does not take a part, before it is believed.
WITNESSES = 2


class Challenges:
    """Of one plan. ``over``: nothing is waited for any more."""

    def __init__(self, key: bytes, plan: Plan) -> None:
        self._key, self._plan = key, plan
        self._asked: dict[tuple[PeerId, PeerId], bool] = {}  # (member, owner) → answered
        self._signed: dict[tuple[PeerId, PeerId], None] = {}
        self._witnesses: dict[tuple[PeerId, PeerId], dict[PeerId, None]] = {}
        self.over = False

    @property
    def waiting(self) -> bool:
        return not self.over and not all(self._asked.values())

    def due(self, held: Mapping[PeerId, Sequence[PeerId]], lost: Collection[PeerId]) -> list[tuple[PeerId, Missing]]:
        """Whom to ask, of members that most owners hold, now that all owners have said whom they hold."""
        plan, owners = self._plan, list(held)
        asks = []
        for member in plan.members:
            without = [owner for owner in owners if member not in held[owner] and owner != member]
            if member in lost or not without or 2 * len(without) >= len(owners):
                continue
            for owner in without:
                if (member, owner) not in self._asked:
                    self._asked[member, owner] = False
                    asks.append((member, Missing(self._key, plan.attempt, plan.epoch, owner)))
        return asks

    def shown(self, member: PeerId, message: Receipts) -> None:
        """What a member shows when it is asked."""
        pair = member, message.owner
        if self._asked.get(pair, True):
            return  # nobody asked, or it has answered
        self._asked[pair] = True
        pieces = [piece for piece in self._plan.slices if piece.owner == message.owner]
        signed = {
            (receipt.start, receipt.stop)
            for receipt in message.receipts[: len(pieces)]
            if receipt.codec == self._plan.codec
            and message.owner.verify(
                receipt_bytes(self._key, receipt.start, receipt.stop, receipt.codec, member, receipt.root),
                receipt.signature,
            )
        }
        if pieces and all(piece.range in signed for piece in pieces):
            self._signed[pair] = None

    def denied(self, witness: PeerId, message: Denied) -> None:
        """``witness`` could not hand a part on, either."""
        owns = any(piece.owner == message.owner for piece in self._plan.slices)
        known = owns and message.contributor in self._plan.members
        if known and witness not in (message.owner, message.contributor):
            self._witnesses.setdefault((message.contributor, message.owner), {})[witness] = None

    def guilty(self, held: Mapping[PeerId, Sequence[PeerId]]) -> tuple[PeerId, ...]:
        """Owners that deny what they have signed for, or what others have seen."""
        found = [
            owner
            for (member, owner), _ in (*self._signed.items(), *self._seen())
            if owner in held and member not in held[owner]
        ]
        return tuple(dict.fromkeys(found))

    def _seen(self) -> list[tuple[tuple[PeerId, PeerId], None]]:
        return [(pair, None) for pair, by in self._witnesses.items() if len(by) >= WITNESSES]
