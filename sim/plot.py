"""Loss and metric over time per peer, with kills and late peers marked, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .outputs import save_figure
from .recorder import PeerTrace
from .report import Report, SimEvent

#: What is marked, and how: colour and word.
_MARKS = {
    "expelled": ("tab:red", "expelled"),
    "kill": ("tab:red", "killed"),
    "late": ("tab:green", "joins late"),
    "failed": ("tab:red", "failed"),
}


def plot(report: Report, traces: Sequence[PeerTrace], path: Path) -> None:
    """Write ``path`` (its ending picks the format). Raises :class:`ConfigError` naming the file."""
    import matplotlib

    # No window system is needed, or touched.
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(2, 1, sharex=True, figsize=(10, 7), layout="constrained")
    for trace in traces:
        style = "--" if trace.late else "-"
        label = trace.label + (" (late)" if trace.late else " (killed)" if trace.status == "killed" else "")
        losses = [(t, r.loss) for t, r in zip(trace.times, trace.reports, strict=True) if r.loss is not None]
        metrics = [(t, r.metric) for t, r in zip(trace.times, trace.reports, strict=True) if r.metric is not None]
        for axis, points in ((top, losses), (bottom, metrics)):
            axis.plot([t for t, _ in points], [value for _, value in points], style, marker=".", lw=1.2, label=label)
    for name, value, colour in (
        ("one machine, all data", report.baseline.single, "black"),
        ("isolated peers", report.baseline.isolated, "grey"),
        (report.baseline.reference_name, report.baseline.reference, "tab:brown"),
    ):
        if value is not None:
            bottom.axhline(value, ls=":", c=colour, label=name)
    for event in report.events:
        if event.what in _MARKS:
            _mark(top, bottom, event)
    top.set_ylabel("training loss")
    bottom.set_ylabel(report.metric or "metric")
    bottom.set_xlabel("seconds since the simulation began")
    top.set_title(f"{report.task}, {report.strategy}, {len(report.peers)} peers, seed {report.seed}")
    bottom.legend(fontsize="x-small", ncols=2)
    save_figure(figure, path)


def _mark(top: object, bottom: object, event: SimEvent) -> None:
    colour, word = _MARKS[event.what]
    for axis in (top, bottom):
        axis.axvline(event.t, c=colour, ls="-", alpha=0.35)  # type: ignore[attr-defined]
    text = f" {event.peer[:8]} {word}" + (f" ({event.phase})" if event.what == "kill" else "")
    top.annotate(  # type: ignore[attr-defined]
        text, (event.t, 1), xycoords=("data", "axes fraction"), rotation=90, va="top", fontsize="x-small", color=colour
    )
