"""What a simulation shows on a terminal: a live table while it runs, and the closing comparison."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ..node.commands import size
from .recorder import PeerTrace, Recorder
from .report import Report

_COLOURS = {
    "starting": "dim", "waiting": "dim", "training": "cyan", "finished": "green", "killed": "red", "expelled": "red",
    "failed": "bold red", "left": "yellow",
}  # fmt: skip


class LiveView:
    """A rich live display of a :class:`Recorder`. Without a terminal: a line per round. Use as a context manager."""

    def __init__(
        self, console: Console, recorder: Recorder, *, rounds: int, title: str, clock: Callable[[], float], live: bool
    ) -> None:
        self._recorder = recorder
        self._rounds = rounds
        self._title = title
        self._clock = clock
        self._console = console
        self._live = Live(self, console=console, refresh_per_second=5, transient=True) if live else None
        self._said = 0

    def __enter__(self) -> LiveView:
        if self._live is not None:
            self._live.start()
        else:
            self._console.print(self._title, highlight=False)
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """One line that stays."""
        self._console.print(f"{self._clock():6.1f} s  {text}", highlight=False, markup=False, soft_wrap=True)

    def round_committed(self, number: int) -> None:
        """A node has committed round ``number``; without a live table, say so once."""
        if self._live is not None or number <= self._said:
            return
        self._said = number
        traces = [trace for trace in self._recorder.traces.values() if trace.round >= number]
        metric = next((trace.metric for trace in traces if trace.metric is not None), None)
        losses = [trace.loss for trace in traces if trace.loss is not None]
        text = f"round {number}/{self._rounds}"
        if losses:
            text += f"  loss {sum(losses) / len(losses):.4f}"
        if metric is not None:
            text += f"  metric {metric:.4f}"
        self.say(text)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._render()

    def _render(self) -> RenderableType:
        done = self._recorder.last_round
        head = Table.grid(padding=(0, 2))
        head.add_row(
            Text(self._title, style="bold"),
            ProgressBar(total=self._rounds, completed=done, width=30),
            f"round {done}/{self._rounds}",
            f"{self._clock():.0f} s",
        )
        table = Table(box=None, header_style="dim", pad_edge=False)
        for name in ("peer", "state", "round", "phase", "loss", "metric", "sent", "received"):
            table.add_column(name, justify="left" if name in ("peer", "state", "phase") else "right", min_width=8)
        for trace in self._recorder.traces.values():
            table.add_row(*_row(trace))
        recent = [
            Text(f"{e.t:6.1f} s  {e.peer[:8]} {e.what}" + (f" ({e.phase}, round {e.round})" if e.round > 0 else ""))
            for e in itertools.islice(reversed(self._recorder.events), 4)
        ]
        return Group(head, table, *reversed(recent))


def _row(trace: PeerTrace) -> tuple[RenderableType, ...]:
    state = trace.status or trace.state
    return (
        trace.label + (" (late)" if trace.late else ""),
        Text(state, style=_COLOURS.get(state, "")),
        str(trace.reports[-1].round) if trace.reports else "-",
        "" if trace.status else trace.phase,
        _number(trace.loss),
        _number(trace.metric),
        size(trace.bytes_sent),
        size(trace.bytes_received),
    )


def closing(report: Report) -> RenderableType:
    """The tables at the end: peers, comparison, claims."""
    peers = Table(title="peers", title_justify="left", title_style="bold", header_style="dim")
    for name in ("peer", "status", "rounds", "samples", report.metric or "metric", "sent", "received", "digest"):
        peers.add_column(name, justify="left" if name in ("peer", "status", "digest") else "right")
    for peer in report.peers:
        peers.add_row(
            peer.peer[:8] + (" (late)" if peer.late else ""),
            Text(peer.status, style=_COLOURS.get(peer.status, "")),
            str(peer.rounds), f"{peer.samples:,}", _number(peer.metric), size(peer.bytes_sent),
            size(peer.bytes_received), peer.digest[:16] or "-",
        )  # fmt: skip
    baseline = report.baseline
    samples = sum(peer.samples for peer in report.peers)
    comparison = Table(title="comparison", title_justify="left", title_style="bold", header_style="dim")
    comparison.add_column("trained by")
    comparison.add_column(report.metric or "metric", justify="right")
    comparison.add_row("nobody (untrained)", _number(baseline.start))
    comparison.add_row("the peers, each alone (mean)", _number(baseline.isolated))
    if baseline.reference is not None:
        comparison.add_row(baseline.reference_name, _number(baseline.reference))
    comparison.add_row(f"one machine with all the data, {samples:,} samples", _number(baseline.single))
    comparison.add_row(Text("the swarm", style="bold"), Text(_number(report.swarm), style="bold"))
    claims = Table.grid(padding=(0, 1))
    for claim in report.claims:
        mark = Text("✓", style="green") if claim.ok else Text("✗", style="bold red")
        claims.add_row(mark, claim.claim, Text(claim.found, style="dim"))
    sent = [peer.bytes_sent for peer in report.peers if peer.status == "finished"]
    retries = sum(r.retries for r in report.rounds)
    summary = f"{len(report.rounds)} rounds ({retries} retries) in {report.wall_s:.1f} s"
    if sent:
        summary += f", {size(sum(sent) / len(sent))} sent per peer"
    if payload := sum(r.payload for r in report.rounds):
        summary += f"; {payload:,} bytes of gradients in all, {payload / len(report.rounds):.0f} a round"
    return Group(peers, comparison, claims, Text(summary))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
