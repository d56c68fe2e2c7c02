"""Gathers what the nodes of a simulation tell, and makes a report of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import attrs

from ..learning.events import Event, RoundReport
from .report import Baseline, PeerOutcome, Report, RoundOutcome, SimEvent

#: Events that every peer of a run tells alike: one of each is enough.
_SHARED = ("joined", "dropped", "lost", "found")
#: Events of every phase of every round: the report's rounds say the same in less space.
_ROUTINE = ("begin", "end", "loss", "metric")


@attrs.define
class PeerTrace:
    """What is known of one node. ``times``: when each report arrived, seconds since the simulation began.

    ``state``: what it does now, for the live view. ``status``: empty until its fate is known.
    """

    name: str
    late: bool = False
    peer: str = ""
    state: str = "starting"
    status: str = ""
    round: int = 0
    phase: str = ""
    loss: float | None = None
    metric: float | None = None
    bytes_sent: int = 0
    bytes_received: int = 0
    samples: int = 0
    reports: list[RoundReport] = attrs.Factory(list)
    times: list[float] = attrs.Factory(list)

    @property
    def label(self) -> str:
        return self.peer[:8] or self.name


class Recorder:
    """The simulation so far. Driven by the parent; read by the live view and, at the end, by :meth:`report`."""

    def __init__(self, names: Sequence[str], late: Iterable[str] = ()) -> None:
        waiting = set(late)
        self.traces = {name: PeerTrace(name, late=name in waiting) for name in names}
        self.events: list[SimEvent] = []
        self._shared: set[tuple[int, str, str]] = set()

    def event(self, name: str, t: float, event: Event) -> None:
        """A node's event, arrived at ``t``."""
        trace = self.traces[name]
        trace.round = max(trace.round, event.round)
        if event.phase != "run":
            trace.phase = event.phase
        if event.what in _ROUTINE:
            return
        key = (event.round, event.what, event.peer)
        if event.what in _SHARED:
            if key in self._shared:
                return
            self._shared.add(key)
        self.events.append(SimEvent(t, event.round, event.phase, event.what, event.peer or trace.peer))

    def note(self, t: float, what: str, peer: str, *, round: int = 0, phase: str = "run") -> None:
        """Something the simulation itself did or saw. ``peer``: an id, or a node's name while its id is not known."""
        self.events.append(SimEvent(t, round, phase, what, peer))

    def committed(
        self, name: str, t: float, report: RoundReport, samples: int, bytes_sent: int, bytes_received: int
    ) -> None:
        """A node has committed a round, into which it put ``samples`` of its own."""
        trace = self.traces[name]
        trace.state = "training"
        trace.round = report.round
        trace.samples += samples
        trace.reports.append(report)
        trace.times.append(t)
        trace.loss = report.loss if report.loss is not None else trace.loss
        trace.metric = report.metric if report.metric is not None else trace.metric
        trace.bytes_sent, trace.bytes_received = bytes_sent, bytes_received

    @property
    def last_round(self) -> int:
        """The newest round that somebody committed, or 0."""
        return max((trace.reports[-1].round for trace in self.traces.values() if trace.reports), default=0)

    def rounds(self) -> tuple[RoundOutcome, ...]:
        """One outcome per committed round, merged over what its members said."""
        by_round: dict[int, list[RoundReport]] = {}
        for trace in self.traces.values():
            for report in trace.reports:
                by_round.setdefault(report.round, []).append(report)
        return tuple(_merge(number, by_round[number]) for number in sorted(by_round))

    def report(
        self,
        *,
        task: str,
        strategy: str,
        mode: str,
        seed: int,
        wall_s: float,
        metric: str,
        baseline: Baseline,
        swarm: float | None,
        digests: dict[str, str],
    ) -> Report:
        """The report before its claims are judged. ``digests``: recomputed from exports, by name of the node."""
        peers = tuple(
            PeerOutcome(
                peer=trace.peer or trace.name,
                status=trace.status or "failed",
                rounds=len(trace.reports),
                samples=trace.samples,
                metric=trace.metric,
                digest=digests.get(trace.name, ""),
                bytes_sent=trace.bytes_sent,
                bytes_received=trace.bytes_received,
                late=trace.late,
            )
            for trace in self.traces.values()
        )
        ids = {trace.name: trace.peer or trace.name for trace in self.traces.values()}
        named = [attrs.evolve(event, peer=ids.get(event.peer, event.peer)) for event in self.events]
        events = tuple(sorted(named, key=lambda event: event.t))
        return Report(
            False, (), task, strategy, mode, seed, wall_s, metric, baseline, swarm, peers, self.rounds(), events, ()
        )


def _merge(number: int, reports: Sequence[RoundReport]) -> RoundOutcome:
    telling = max(reports, key=lambda report: (len(report.dropped), report.retries))
    return RoundOutcome(
        round=number,
        members=tuple(sorted({member for report in reports for member in report.members})),
        wall_s=max(report.wall_s for report in reports),
        retries=max(report.retries for report in reports),
        dropped=tuple(sorted({peer for report in reports for peer in report.dropped})),
        reason=telling.reason,
        payload=max(report.payload for report in reports),
    )
