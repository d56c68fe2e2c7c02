"""What a round is about on this peer, from where the run stands."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import defaults
from .rounds.messages import Accepted
from .rounds.pace import pace
from .rounds.setting import Setting
from .store import Vote

if TYPE_CHECKING:
    from .run import Run


def setting_of(run: Run, worked: float, state: int) -> Setting:
    """The placed round of ``run``; ``worked``: seconds that training took lately; ``state``: bytes of a final state."""
    membership, store = run.membership, run.store
    place = membership.placed
    assert place.key is not None
    key = place.key
    vote = store.load_vote(key)

    def save(promised: int, accepted: Accepted | None) -> None:
        store.save_vote(Vote(key, promised, accepted))

    return Setting(
        key=key,
        round=place.round,
        prev=place.prev,
        voters=place.voters,
        terms=membership.terms(),
        pace=pace(run.endpoint, place.voters, 4 * run.layout.size, worked, membership.loading(), state),
        check=membership.check,
        max_length=defaults.VECTORS_PER_ROUND * run.layout.size,
        save=save,
        stored=(vote.promised, vote.accepted) if vote is not None else None,
        note=run.note,
        hold=lambda phase: (place.round, phase) in run.faults.hold,
    )
