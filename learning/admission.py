"""Newcomers on trial, as the chain of commits sees them: who belongs to a record, their place, what to tell of them.

Theory of operation. The voters of a round are the roster of the commit before; beside them that commit names who is on
trial (:mod:`.rounds.trials`). Those do the round too, and count nowhere: not in the name of the instance, not among
candidates and quorums, not in proofs that a head is the run's, not in branches. So a run whose newcomers are on trial
is decided exactly as one that has none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..transport.errors import ConfigError
from ..transport.identity import PeerId
from . import defaults
from .aggregate.names import resolve
from .membership import Placement
from .rounds.messages import CommitRecord, instance_key
from .rounds.remembering import known
from .rounds.trials import trial_fault
from .rounds.weighing import too_few
from .spec import MAX_ADMISSION

if TYPE_CHECKING:
    from .run import Run


def admission_of(asked: int | None, aggregator: str, replicated: bool) -> int:
    """Rounds of a trial in a run to be founded. ``replicated``: whether its strategy has rounds that all agree on.
    Raises :class:`ConfigError` for a number that cannot be."""
    if asked is None:
        # With the mean nobody needs to be let in twice: one contribution moves the result wherever it likes.
        return 0 if resolve(aggregator).is_mean else defaults.ADMISSION
    if not 0 <= asked <= MAX_ADMISSION:
        raise ConfigError(f"{asked} rounds on trial; it is 0 to {MAX_ADMISSION}")
    if asked and not replicated:
        raise ConfigError("a strategy whose groups are small and change all the time has no trial: admission must be 0")
    return asked


def on_trial(record: CommitRecord) -> tuple[PeerId, ...]:
    """Who is on trial in the round after ``record``, in PeerId order."""
    return tuple(each.peer for each in record.trial)


def everybody(record: CommitRecord) -> tuple[PeerId, ...]:
    """Who does the round after ``record``: its voters, then those on trial."""
    return (*record.roster, *on_trial(record)) if record.trial else record.roster


def belongs(record: CommitRecord, peer: PeerId) -> bool:
    """Whether ``peer`` does the round after ``record``."""
    return peer in record.roster or any(each.peer == peer for each in record.trial)


def placement(run: Run, record: CommitRecord) -> Placement:
    """Our place in the round of ``run`` after ``record``, to which we belong.

    Those on trial share a part of the data with a voter: what they learn from it has no weight, and nobody's data are
    to be missing because of them.
    """
    round, voters, prev = record.round + 1, record.roster, record.digest
    seat = voters.index(run.me) if run.me in voters else on_trial(record).index(run.me) % len(voters)
    return Placement(
        round=round,
        key=instance_key(run.run_id, round, prev, voters),
        prev=prev,
        voters=voters,
        index=seat,
        count=len(voters),
        watch=everybody(record),
        trial=record.trial,
        admission=run.spec.admission,
        few=too_few(run.rule, len(voters)) is not None,
        scores=known(record),
    )


def fault(record: CommitRecord, placed: Placement) -> str | None:
    """Why those on trial after ``record`` do not follow from the ``placed`` round and the opinions in it."""
    assert placed.key is not None
    return trial_fault(record, placed.trial, placed.voters, placed.key, placed.admission, placed.few)


def tell(run: Run, before: CommitRecord, after: CommitRecord) -> None:
    """Tell whoever watches what became of those on trial in a round."""
    was, now = {each.peer: each.left for each in before.trial}, {each.peer: each.left for each in after.trial}
    for peer, left in now.items():
        if peer not in was:
            run.emit("commit", "on-trial", peer, f"a newcomer: on trial for {left} rounds")
        elif left < was[peer]:
            run.emit("commit", "on-trial", peer, f"its work was fit: {left} rounds of its trial left")
        else:
            run.emit("commit", "unfit", peer, f"its work was late, or not fit: still {left} rounds of its trial left")
    for peer in was:
        if peer in after.roster:
            run.emit("commit", "admitted", peer, "its trial is over: it votes, and its work has weight")
        elif peer not in now:
            run.emit("commit", "trial-ended", peer, "it left, or was lost, while on trial")
