"""What a node's process writes to its terminal: a head, one line per round, and what is worth knowing in between."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

from ..learning.events import Event, RoundReport
from .commands import SECRET, duration, size
from .terminal import Lines
from .ticket import Ticket

if TYPE_CHECKING:
    from ..learning.spec import RunSpec
    from .node import Node

#: Characters of a line that tells of a lost peer: two lines of a terminal.
MAX_EVENT = 160

GOODBYE = "said goodbye"  # as learning/rounds/presence.py says it; not imported, as that would load torch
#: Events of a run that a person wants to see between two rounds, and how they are said.
_SHOWN: dict[str, Callable[[Event], str]] = {
    "joined": lambda e: f"+ {e.peer[:8]} joins",
    "unwelcome": lambda e: f"! {e.peer[:8]} does not take this node in: {e.detail}",
    "expelled": lambda e: f"- {e.peer[:8]} lied and is expelled: {e.detail}",
    "dropped": lambda e: f"- {e.peer[:8]} is dropped: {e.detail}",
    "refused": lambda e: f"! contribution of {e.peer[:8]} refused: {e.detail}",
    "branch": lambda e: f"! going on as a branch: {e.detail}",
    "diverged": lambda e: f"! {e.detail}",
    "differs": lambda e: f"! {e.detail}",
    "healed": lambda e: e.detail,
    "step-aside": lambda e: f"! loading another state: {e.detail}",
    "out-of-step": lambda e: f"! out of step, loading the state again: {e.detail}",
    "restored": lambda e: f"resuming with {e.detail}",
    "waiting": lambda e: e.detail,
    "liar": lambda e: f"! {e.peer[:8]} is not believed: {e.detail}",
    "doubted": lambda e: f"! {e.peer[:8]}: {e.detail}",
    "unreachable": lambda e: f"! {e.detail}",
    "no-checkpoint": lambda e: f"! {e.detail}",
    "state-failed": lambda e: f"! the state could not be loaded{f' from {e.peer[:8]}' if e.peer else ''}: {e.detail}",
    "stalled": lambda e: f"! {e.detail}",
    "lost": lambda e: f"- {e.peer[:8]} {e.detail if e.detail == GOODBYE else f'cannot be reached: {e.detail}'}",
    "found": lambda e: f"+ {e.peer[:8]} can be reached again",
    "member": lambda e: f"member: {e.detail}",
    "line": lambda e: e.detail,
}


class Console(Lines):
    """Plain lines, for terminals and log files alike."""

    def __init__(self, out: TextIO | None = None) -> None:
        super().__init__(out or sys.stdout)
        self._metric = "metric"
        self._headed = False
        self._rounds = 0

    def note(self, text: str) -> None:
        self.line(text)

    def ready(self, node: Node, spec: RunSpec, ticket: Ticket, reach: str) -> None:
        rounds = f"{spec.rounds} rounds" if spec.rounds else "until stopped"
        self._rounds = spec.rounds
        self.line(
            f"node       {node.identity.peer_id.short}, data in {node.config.folder and node.config.folder.parent}"
        )
        cut = f" in {spec.pipeline.stages} stages" if spec.pipeline is not None else ""
        self.line(
            f"run        {ticket.run_id.hex()[:8]}: {spec.task}{cut}, {spec.strategy}, {spec.mode} mode, {rounds}"
        )
        self.line(f"listening  {', '.join(map(str, node.endpoint.addresses())) or 'nowhere'}")
        self.line(f"reach      {reach}")
        if ticket.psk is not None:
            self.line(f"private    {SECRET}")
        self.line(f"join with  shoal join {ticket}")
        self.line("")

    def event(self, event: Event) -> None:
        show = _SHOWN.get(event.what)
        if show is not None:
            text = show(event)
            if event.what == "lost" and len(text) > MAX_EVENT:  # every way to it and what came of that
                text = text[:MAX_EVENT].rpartition(" ")[0] + " …"
            self.line("           " + text)

    def round(self, report: RoundReport, sent: int, metric_name: str) -> None:
        """One line. ``sent``: bytes so far, on all links."""
        if metric_name and report.metric is not None:
            self._metric = metric_name
        if not self._headed:
            self._headed = True
            self.line(f"{'round':>9}  members  {'loss':>8}  {self._metric:>10}  {'exchange':>8}  {'sent':>9}  time")
        number = f"{report.round}/{self._rounds}" if self._rounds else str(report.round)
        loss = "-" if report.loss is None else f"{report.loss:.4f}"
        metric = "-" if report.metric is None else f"{report.metric:.4f}"
        retries = f"  {report.retries} retries" if report.retries else ""
        self.line(
            f"{number:>9}  {len(report.members):>7}  {loss:>8}  {metric:>{max(10, len(self._metric))}}  "
            f"{report.wall_s:>6.2f} s  {size(sent):>9}  {duration(report.t)}{retries}"
        )

    def ended(self, outcome: str, reason: str) -> None:
        if outcome == "finished":
            self.line("finished: all rounds are done")
        elif outcome == "left":
            self.line("stopped; start it again to go on")
