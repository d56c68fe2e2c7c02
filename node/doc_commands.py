"""`shoal doc show|watch`: what the swarm wrote down about the run. Needs neither torch nor trio while a node runs."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import attrs

from ..learning.rundocs_content import (
    NAMES,
    BanReader,
    Content,
    read_commits,
    read_metrics,
    read_roster,
    read_spec,
)
from ..transport.errors import ConfigError
from .commands import size, table
from .control import ControlClient
from .datadir import DataDir
from .doc_messages import DocumentList, DocumentRow, DocumentState, GetDocument, GetDocuments, from_json

#: Rows of a table that grows without end.
LAST = 20
_BARS = "▁▂▃▄▅▆▇█"


def show(options: argparse.Namespace) -> int:
    """``shoal doc show [NAME]``: from the running node, or from the file of one that does not run."""
    data = DataDir(options.data_dir)
    name = _known(options.name)
    found: DocumentList | DocumentState
    if data.holder() is None:
        from .doc_answers import stored

        found = stored(data, name, time.time())
        note = "no node is running: this is what the last one left\n"
    else:
        client = ControlClient(data)
        found = client.ask(GetDocument(name), DocumentState) if name else client.ask(GetDocuments(), DocumentList)
        note = ""
    if options.json:
        _say(json.dumps(_for_programs(found), indent=2))
    elif isinstance(found, DocumentList):
        _say(note + render_list(found))
    else:
        _say(note + render(found, options.last))
    return 0


def watch(options: argparse.Namespace) -> int:
    """``shoal doc watch [NAME]``: changes as they come, until Ctrl-C or the end of the node."""
    name = _known(options.name)
    client = ControlClient(DataDir(options.data_dir))
    try:
        if name:
            _watch_one(client, name, options.last)
        else:
            _watch_all(client)
    except KeyboardInterrupt:
        _say("")
    return 0


def _watch_one(client: ControlClient, name: str, last: int) -> None:
    """The table anew whenever it changes: in place on a terminal, one after the other elsewhere."""
    in_place = sys.stdout.isatty()
    for found in _follow(client, lambda after: client.ask(GetDocument(name, after), DocumentState)):
        assert isinstance(found, DocumentState)
        head = f"{_clock(found.wall)}  {name}, run {found.run[:8]}  (Ctrl-C ends this)"
        _say(("\x1b[2J\x1b[H" if in_place else "") + head + "\n" + render(found, last) + "\n")


def _watch_all(client: ControlClient) -> None:
    """A line for every document that has changed, with what is new in it."""
    known: dict[str, str] = {}
    lines: dict[str, dict[str, None]] = {}
    for found in _follow(client, lambda after: client.ask(GetDocuments(after), DocumentList)):
        assert isinstance(found, DocumentList)
        for row in found.documents:
            if known.get(row.name) == row.digest:
                continue
            state = client.ask(GetDocument(row.name), DocumentState)
            now = dict.fromkeys(render(state, LAST, clock=True).splitlines()[1:])
            if row.name in known:
                for line in now:
                    if line not in lines[row.name]:
                        _say(f"{_clock(state.wall)}  {row.name:<8} {line}")
            else:
                _say(f"{_clock(state.wall)}  {row.name:<8} {_summary(row)}")
            known[row.name], lines[row.name] = state.row.digest, now


def _follow(
    client: ControlClient, ask: Callable[[str], DocumentList | DocumentState]
) -> Iterator[DocumentList | DocumentState]:
    """Answers that differ from the one before, until the node ends."""
    after = ""
    while True:
        try:
            found = ask(after)
        except ConfigError:
            if after and client.data.holder() is None:
                _say("the node has ended")
                return
            raise
        digest = found.digest if isinstance(found, DocumentList) else found.row.digest
        if digest != after:
            yield found
        after = digest


def _known(name: str | None) -> str:
    if name and name not in NAMES:
        raise ConfigError(f"a run has no document {name!r}; it has {', '.join(NAMES)}")
    return name or ""


# --- for people -------------------------------------------------------------------------------------------------------


def render_list(found: DocumentList) -> str:
    rows = [("DOCUMENT", "AUTHORS", "ENVELOPES", "SIZE", "ID")]
    rows += [(row.name, str(row.authors), str(row.envelopes), size(row.size), row.id[:16]) for row in found.documents]
    broken = [
        f"{author[:8]} contradicted itself in {row.name}: nothing it wrote there counts"
        for row in found.documents
        for author in row.frozen
    ]
    return "\n".join([f"run {found.run[:8]}", table(rows), *broken, "`shoal doc show NAME` shows one of them"])


def render(found: DocumentState, last: int, *, clock: bool = False) -> str:
    """One document as a table. ``clock``: times of the day instead of how long ago."""

    def when(at: float) -> str:
        return _clock(at) if clock else _ago(found.wall - at)

    content = from_json(found.content)
    run = bytes.fromhex(found.run)
    match found.row.name:
        case "spec":
            text = _render_spec(content, run)
        case "roster":
            text = _render_roster(content, found.wall, found.me, when)
        case "commits":
            text = _render_commits(content, last, when)
        case "metrics":
            text = _render_metrics(content)
        case _:
            text = _render_bans(content, found)
    return text + (f"\n{found.omitted} authors are left out: they wrote too much" if found.omitted else "")


def _render_spec(content: Content, run: bytes) -> str:
    signed = read_spec(content, run)
    if signed is None:
        return "the founder has not written it down yet, or it has not arrived"
    spec = signed.open()
    rows = [
        ("run", run.hex()),
        ("task", spec.task),
        ("strategy", " ".join([spec.strategy, *(f"{name}={value:g}" for name, value in spec.strategy_args)])),
        ("mode", spec.mode),
        ("rounds", str(spec.rounds or "until stopped")),
        ("peers", f"at least {spec.min_peers}" + (f", in groups of {spec.group}" if spec.group else "")),
        ("topology", spec.topology or "as the strategy has it"),
        ("codec", spec.codec),
        ("aggregator", spec.aggregator),
        ("audits", f"each peer looks at {spec.audit:g} slices a round" if spec.audit else "none"),
        ("admission", f"newcomers are on trial for {spec.admission} rounds" if spec.admission else "at once"),
        ("seed", str(spec.seed)),
        ("founder", spec.founder.text),
        ("founded", time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(spec.created))),
        ("signature", "good: it is the founder's"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def _render_roster(content: Content, wall: float, me: str, when: Callable[[float], str]) -> str:
    rows = [("PEER", "ALIVE", "ROUND", "STATE", "SEEN", "JOINED", "VERSION")]
    present = read_roster(content)
    for one in sorted(present, key=lambda one: (one.joined, one.peer)):
        alive, reason = one.alive(wall)
        rows.append(
            (
                one.peer.short + (" (here)" if one.peer.text == me else ""),
                "yes" if alive else f"no: {reason}",
                str(one.round),
                one.state,
                when(one.seen),
                when(one.joined),
                one.version or "-",
            )
        )
    return table(rows) if present else "nobody has said yet that it takes part"


def _render_commits(content: Content, last: int, when: Callable[[float], str]) -> str:
    notes = read_commits(content)
    if not notes:
        return "no round has been written down yet"
    rows = [("ROUND", "WHEN", "MEMBERS", "SAMPLES", "TOTAL", "COMMIT", "CERTIFICATE", "WRITTEN BY")]
    for note in notes[-last:]:
        named = " ".join(member.short for member in note.members[:4]) + (" …" if note.count > 4 else "")
        branch = f" branch {note.branch}" if note.branch else ""
        rows.append(
            (
                f"{note.round}{branch}", when(note.at), f"{note.count}: {named}", f"{note.samples:,}",
                f"{note.total:,}", note.digest, note.certificate, note.writer.short,
            )
        )  # fmt: skip
    earlier = len(notes) - len(rows) + 1
    return table(rows) + (f"\n({earlier} earlier ones: --last {len(notes)})" if earlier else "")


def _render_metrics(content: Content) -> str:
    histories = read_metrics(content)
    if not histories:
        return "nobody has measured anything yet"
    metric = next((history.metric_name for history in histories if history.metric_name), "") or "metric"
    rows = [("PEER", "ROUNDS", "POINTS", "LOSS", metric.upper(), "LOSS SO FAR")]
    for history in histories:
        points = history.points
        losses = [point.loss for point in points if point.loss is not None]
        metrics = [point.metric for point in points if point.metric is not None]
        rows.append(
            (
                history.peer.short,
                f"{points[0].round}-{points[-1].round}",
                str(len(points)),
                f"{losses[-1]:.4f}" if losses else "-",
                f"{metrics[-1]:.4f}" if metrics else "-",
                bars(losses),
            )
        )
    return table(rows)


def bars(values: Sequence[float], width: int = 32) -> str:
    """``values`` as a row of bars, the lowest one low; averaged where there are more than ``width``."""
    if not values:
        return "-"
    count = min(width, len(values))
    edges = [round(index * len(values) / count) for index in range(count + 1)]
    means = [sum(values[low:high]) / (high - low) for low, high in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    steps = len(_BARS) - 1
    return "".join(_BARS[round((mean - low) / (high - low) * steps) if high > low else 0] for mean in means)


def _render_bans(content: Content, found: DocumentState) -> str:
    ids = [bytes.fromhex(id) for id in found.ids]
    bans = BanReader(ids, bytes.fromhex(found.run), found.aggregator).read(content)
    if not bans:
        return "nobody is banned"
    rows = [("PEER", "PROOF (checked here)", "WRITTEN DOWN BY")]
    rows += [(ban.peer.text[:16], ban.reason, " ".join(peer.short for peer in ban.by)) for ban in bans]
    return table(rows)


def _summary(row: DocumentRow) -> str:
    return f"{row.authors} authors, {row.envelopes} envelopes, {size(row.size)}"


def _ago(seconds: float) -> str:
    if seconds < 0:
        return "just now"
    if seconds < 120:
        return f"{seconds:.0f} s ago"
    return f"{seconds / 60:.0f} min ago" if seconds < 7200 else f"{seconds / 3600:.0f} h ago"


def _clock(wall: float) -> str:
    try:
        return time.strftime("%H:%M:%S", time.localtime(wall))
    except (ValueError, OverflowError, OSError):  # others write these times
        return "--:--:--"


# --- for programs -----------------------------------------------------------------------------------------------------


def _for_programs(found: DocumentList | DocumentState) -> dict[str, object]:
    if isinstance(found, DocumentList):
        return attrs.asdict(found)
    row: dict[str, object] = attrs.asdict(found.row)
    head: dict[str, object] = {"run": found.run, "me": found.me, "wall": found.wall}
    return head | row | {"omitted": found.omitted, "content": json.loads(found.content)}


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
