"""What a round is about on this peer, from where the run stands."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..transport.errors import ConfigError
from . import defaults
from .aggregate.aggregator import Aggregator
from .aggregate.names import resolve
from .reduce import codecs
from .rounds.messages import Accepted
from .rounds.pace import pace
from .rounds.setting import Setting
from .rounds.weighing import unfit
from .spec import MAX_AUDIT, RunSpec
from .store import Vote
from .strategies.base import Strategy

if TYPE_CHECKING:
    from .run import Run


def rule_of(spec: RunSpec, strategy: Strategy) -> Aggregator:
    """The aggregator of a run. Raises :class:`ConfigError` for a text that names none, and for one that can never stand
    in rounds of this run: too few peers, a strategy whose groups have whom they happen to have."""
    rule = resolve(spec.aggregator)
    if rule.is_mean:
        return rule
    if strategy.ledger:
        raise ConfigError(
            f"strategy {spec.strategy} combines nothing that a rule could look at: its aggregator is mean, not "
            f"{spec.aggregator}"
        )
    if not strategy.replicated:
        raise ConfigError(
            f"strategy {spec.strategy} exchanges weights in groups of whoever is there, of which a rule tolerates no "
            f"liar: its aggregator is mean, not {spec.aggregator}"
        )
    wrong = unfit(rule, spec.min_peers)
    if wrong is not None:
        raise ConfigError(f"aggregator {spec.aggregator}: {wrong}")
    return rule


def audit_of(asked: float | None, aggregator: str, codec: str) -> float:
    """Looks of each peer in a round of a run to be founded. Raises :class:`ConfigError` for a number that cannot be."""
    possible = codecs.resolve(codec).elementwise
    if asked is None:
        # With the mean a liar need not own a slice: its contribution alone moves the result wherever it likes.
        return defaults.AUDIT_RATE if possible and not resolve(aggregator).is_mean else 0.0
    if not 0 <= asked <= MAX_AUDIT:
        raise ConfigError(f"{asked:g} looks of each peer in a round; it is 0 to {MAX_AUDIT:g}")
    if asked and not possible:
        raise ConfigError(f"codec {codec} codes whole slices, so that no part of one can be looked at: audit must be 0")
    return asked


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
        rule=run.rule,
        run=run.run_id,
        audit=run.spec.audit,
        audited=run.liars.audited,
        slandered=run.standings.accused_falsely,
        proven=run.liars.proven,
        expelled=lambda: run.liars.reasons,
        heeded=run.liars.heeds,
        distort=run.faults.distort,
        trial=place.trial,
        scores=place.scores,
    )
