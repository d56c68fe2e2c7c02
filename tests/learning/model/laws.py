"""What must hold at every step of the model, whatever happens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shoal.learning.rounds import messages as messages_module
from shoal.learning.rounds.actions import Combine, Measure
from shoal.learning.rounds.messages import Accept, Commit, CommitRecord, Propose, Ready

from .seats import Seat, View
from .words import Broken, brief

if TYPE_CHECKING:
    from .table import Table


def check_said(table: Table, seat: Seat, message: Any) -> None:
    """Nobody promises, proposes or accepts before it has stored that. Keeps who accepted what."""
    # A voter that promised nothing yet (attempt 0) comes back as it was; one that proposes must know of it.
    promised, accepted = seat.stored or (0 if isinstance(message, Ready) else -1, None)
    if isinstance(message, Ready | Propose | Accept) and table.persists and promised < message.attempt:
        raise Broken(f"{seat.place} sends a {type(message).__name__} of {message.attempt} and has not stored that")
    if isinstance(message, Ready) and table.persists and accepted != message.accepted:
        raise Broken(f"{seat.place} says that it accepted something else than it has stored")
    if not isinstance(message, Accept):
        return
    stored = None if accepted is None else (accepted.attempt, accepted.record.digest)
    if table.persists and stored != (message.attempt, message.digest):
        raise Broken(f"{seat.place} accepts another value than it has stored")
    at = message.key, message.attempt, message.digest
    who = table.accepts.get(at, ())
    if seat.place in who:
        return
    for (key, attempt, digest), others in table.accepts.items():
        if (key, attempt) == at[:2] and digest != message.digest and seat.place in others:
            raise Broken(f"{seat.place} accepts two values at attempt {attempt}")
    table.accepts = {**table.accepts, at: tuple(sorted((*who, seat.place)))}


def check_held(seat: Seat, action: Combine | Measure) -> None:
    """Nobody combines or compares what it does not hold, or combines without the decision that its rule needs."""
    plan, rule = seat.voter.plan, seat.shape.rule
    assert plan is not None
    for index in action.indices:
        start, stop = plan.slices[index].range
        if plan.ring:
            summed = (*seat.sums.get((action.attempt, action.epoch, index), ()), seat.me)
            if tuple(sorted(summed)) != action.members:
                raise Broken(f"{seat.place} combines a sum of {len(summed)} for {len(action.members)} members")
        elif any((member, start, stop) not in seat.parts for member in action.members):
            raise Broken(f"{seat.place} takes a contribution that it does not hold")
    if isinstance(action, Combine) and bool(action.decision) != (rule.needs_gram and bool(action.members)):
        raise Broken(f"{seat.place} combines {'with' if action.decision else 'without'} a decision")


def check_commit(table: Table, seat: Seat, commit: Commit) -> None:
    """A certificate is of a majority that accepted, and excludes every other record. Keeps the records."""
    record, certificate, view = commit.record, commit.certificate, seat.view
    digest = record.digest
    signed = [table.shape.index[accept.peer] for accept in certificate.accepts]
    said = table.accepts.get((view.key, certificate.attempt, digest), ())
    if any(place not in said for place in signed) or len(signed) < messages_module.quorum(len(view.voters)):
        raise Broken(f"a certificate of {signed}, but only {said} accepted")
    for (key, other_digest), other in table.records.items():
        if key == view.key and other_digest != digest and _excludes(table, view, record, other):
            raise Broken(f"two values are committed: {brief(record)} and {brief(other)}")
    if (view.key, digest) not in table.records:
        table.records = {**table.records, (view.key, digest): record}


def _excludes(table: Table, view: View, record: CommitRecord, other: CommitRecord) -> bool:
    """Whether ``record`` may not be committed beside ``other``, of which there has been a certificate.

    In available mode never, unless the records themselves say that they are of two branches. In strict mode never while
    a majority has kept its memory in this round: beyond that a round may be done again (``table.beyond`` forbids even
    that, to show it).
    """
    if not table.shape.strict:
        return other.branch == record.branch
    lost = sum(seat.life > 0 and seat.view is view for seat in table.seats)
    return table.beyond or lost <= len(view.voters) - messages_module.quorum(len(view.voters))
