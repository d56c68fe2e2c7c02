"""What a run tells those who watch it: events, one report per round, and the status of the moment."""

from __future__ import annotations

import attrs

#: The steps of a round in the order in which they happen.
PHASES = ("train", "convene", "scatter", "combine", "gather", "commit")


@attrs.frozen
class Event:
    """One thing that happened. ``t``: seconds on the host's monotonic clock since the run began here.

    ``phase`` is one of :data:`PHASES`, or ``run`` for what concerns no round (join, branch, leave, state).
    ``what`` is one word or two for machines (``begin``, ``kill``, ``joined``, ``dropped``, ``late``,
    ``loss`` …), ``detail`` is for people. ``peer``: text form of the peer concerned, or empty.
    """

    t: float
    round: int
    phase: str
    what: str
    peer: str = ""
    detail: str = ""


@attrs.frozen
class RoundReport:
    """What one committed round was, as this peer saw it.

    ``members``: text ids whose contributions the mean holds, in canonical order. ``dropped``: voters of
    the round that are not in the next roster. ``joined``: peers of the next roster that were not voters.
    ``retries``: attempts and epochs beyond the first. ``reason``: why members were chosen or dropped.
    ``t``: seconds since the run began here; ``wall_s``: from the end of training to the commit.
    ``loss``: mean training loss of this peer in this round; ``metric``: of the task's main metric on
    held-out data, evaluated after this round, or None when this round was not evaluated. ``quality``: of the
    ``members``, how far the run's aggregator took each seriously, 0 … 1; empty where it does not say. ``payload``:
    bytes that all of them gave together, in a round in which nothing was combined.
    """

    round: int
    t: float
    wall_s: float
    members: tuple[str, ...]
    retries: int
    dropped: tuple[str, ...]
    joined: tuple[str, ...]
    reason: str
    samples: int
    loss: float | None
    metric: float | None
    digest: str
    quality: tuple[float, ...] = ()
    payload: int = 0


@attrs.frozen
class Checkpoint:
    """A state of a past round on this machine's disk. ``digest``: hex, whole. ``round``: -1 where it is not known.

    ``size`` in bytes. ``when``: Unix seconds at which it was kept here, 0 when it was fetched from others.
    ``complete``: all chunks are there. ``path``: the file.
    """

    digest: str
    round: int
    size: int
    when: float
    pinned: bool
    complete: bool
    path: str


@attrs.frozen
class Standing:
    """What one peer has itself seen of another in a run (:mod:`.standing`).

    ``peer``: text id. ``round``: the last one of which it was a voter, 0 before any. Of the ``rounds`` that it was a
    voter of and that combined something, ``contributed`` hold its contribution: a share of ``lately`` in the last ones.
    ``quality``: how far the run's aggregator took its contributions seriously, 0 … 1: mean of the ``measured`` ones,
    and lately; None where the aggregator does not say. Audits of slices it owned: ``passed``, ``lied`` (proven),
    ``unanswered``. ``false_accusations``: that it made. *Lately*: the mean of the first
    :data:`defaults.STANDING_WINDOW` values; from then on each new one counts 1 / STANDING_WINDOW, older ones less.
    """

    peer: str
    round: int = 0
    rounds: int = 0
    contributed: int = 0
    lately: float | None = None
    measured: int = 0
    quality: float | None = None
    quality_lately: float | None = None
    passed: int = 0
    lied: int = 0
    unanswered: int = 0
    false_accusations: int = 0


@attrs.frozen
class RunStatus:
    """The moment, for ``shoal status``. ``reason``: why the run is in this phase (a pure decision's reason).

    ``trial``: which of the members are on trial, and for how many rounds still.
    """

    run: str
    task: str
    strategy: str
    mode: str
    round: int
    phase: str
    reason: str
    leader: str
    members: tuple[str, ...]
    samples: int
    total_samples: int
    loss: float | None
    metric_name: str
    metric: float | None
    digest: str
    branch: int
    finished: bool
    trial: tuple[tuple[str, int], ...] = ()
