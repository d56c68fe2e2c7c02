"""The commands that talk to a running node: status, peers, stop, export. None of them needs torch or trio."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import attrs

from ..learning.events import Standing
from ..transport.errors import ConfigError
from . import defaults
from .control import ControlClient, NodeStatus, PeerList
from .datadir import DataDir

#: Said wherever the ticket of a private swarm is shown, and where only its key is.
SECRET = "the ticket below is a secret: whoever has it can join and see who is there; hand it on with care"
SECRET_KEY = "a private swarm: only who has its key gets in"


def status(options: argparse.Namespace) -> int:
    found = ControlClient(DataDir(options.data_dir)).status()
    if options.json:
        _say(json.dumps(attrs.asdict(found), indent=2))
    else:
        _say(render_status(found))
    return 0


def peers(options: argparse.Namespace) -> int:
    found = ControlClient(DataDir(options.data_dir)).peers()
    if options.json:
        _say(json.dumps(attrs.asdict(found), indent=2))
    else:
        _say(render_peers(found))
    return 0


def stop(options: argparse.Namespace) -> int:
    data = DataDir(options.data_dir)
    client = ControlClient(data)
    pid = data.holder()
    again = "`shoal relay`" if client.status().role == "relay" else "`shoal start`"
    client.stop()
    give_up = time.monotonic() + defaults.SHUTDOWN + defaults.CONTROL_TIMEOUT
    while data.holder() is not None:
        if time.monotonic() > give_up:
            raise ConfigError(f"the node (pid {pid}) said it would stop but is still there; end it with: kill {pid}")
        time.sleep(0.02)
    _say(f"stopped the node in {data.path}; {again} there goes on where it was")
    return 0


def export(options: argparse.Namespace) -> int:
    data = DataDir(options.data_dir)
    target = Path(options.file).expanduser().absolute()
    if target.is_dir():
        raise ConfigError(
            f"cannot write {target}: it is a folder; name a file in it, for instance {target}/model.safetensors"
        )
    if not target.parent.is_dir():
        raise ConfigError(f"cannot write {target}: there is no folder {target.parent}")
    if data.holder() is not None:
        detail = ControlClient(data, timeout=60.0).export(str(target)).detail
    else:
        from .saved import export_saved

        detail = export_saved(data, target)
    _say(f"wrote {target}: {detail}" if detail else f"wrote {target}")
    return 0


def render_status(found: NodeStatus) -> str:
    rows = [
        ("node", f"{found.peer[:8]}  pid {found.pid}, up {duration(found.t)}"),
        ("data directory", found.data_dir),
        ("listening on", ", ".join(found.addresses) or "nothing yet"),
        ("reach", found.reach),
        ("links", f"{found.links}, sent {size(found.bytes_sent)}, received {size(found.bytes_received)}"),
    ]
    run = found.run
    if found.role == "relay":
        rows[0] = ("relay", rows[0][1])
    elif run is None and not found.notes:
        rows.append(("run", "none yet: still looking for it"))
    if run is not None:
        rows += [
            ("run", f"{run.run[:8]}  {run.task}, {run.strategy}, {run.mode} mode"),
            ("round", f"{run.round}  {run.phase}" + (f": {run.reason}" if run.reason else "")),
            ("members", f"{len(run.members)}: {' '.join(member[:8] for member in run.members)}"),
        ]
        if run.trial:
            rows.append(("on trial", ", ".join(f"{peer[:8]} for {_rounds_left(left)}" for peer, left in run.trial)))
        if run.leader:
            rows.append(("leader", run.leader[:8]))
        rows.append(("samples", f"{run.samples:,} here in this round, {run.total_samples:,} in the swarm so far"))
        if run.loss is not None:
            rows.append(("training loss", f"{run.loss:.4f}"))
        if run.metric is not None:
            rows.append((run.metric_name or "metric", f"{run.metric:.4f}"))
        rows.append(("state", run.digest[:16] + (f"  branch {run.branch}" if run.branch else "")))
    rows += found.notes
    if found.private:
        rows.append(("private", SECRET if found.ticket else SECRET_KEY))
    if found.ticket:
        rows.append(("join with", f"shoal join {found.ticket}"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def _rounds_left(left: int) -> str:
    return f"{left} round{'' if left == 1 else 's'} more"


def render_peers(found: PeerList) -> str:
    """The live links; then whom this node has seen in the run and has no link to, the last ones and who was caught."""
    left = dict(found.trial)
    known = {standing.peer: standing for standing in found.standings}
    linked = {peer.peer for peer in found.peers}
    text = "no links: this node is alone so far (`shoal status` shows its ticket)"
    if found.peers:
        heads, seen = _seen([known.get(peer.peer) for peer in found.peers])
        rows = [("PEER", "ADDRESS", "WAY", "LINK", "CIPHER", "RTT", "SENT", "RECEIVED", "ROUND", *heads)]
        rows += [
            (
                peer.peer[:8], peer.address, peer.way, peer.direction, peer.cipher, f"{peer.rtt_ms:.1f} ms",
                size(peer.bytes_sent), size(peer.bytes_received),
                f"on trial, {left[peer.peer]} left" if peer.peer in left else "member" if peer.member else "-", *cells,
            )
            for peer, cells in zip(found.peers, seen, strict=True)
        ]  # fmt: skip
        text = table(rows)
    gone = [standing for standing in found.standings if standing.peer not in linked]
    shown = [s for at, s in enumerate(gone) if at < defaults.SHOWN_WITHOUT_LINK or s.lied or s.false_accusations]
    if shown:
        heads, seen = _seen(shown)
        last = (str(standing.round) if standing.round else "-" for standing in shown)
        rows = [("PEER", "LAST ROUND", *heads)]
        rows += [(s.peer[:8], round, *cells) for s, round, cells in zip(shown, last, seen, strict=True)]
        more = f"\nand {len(gone) - len(shown)} more: --json names them all" if len(gone) > len(shown) else ""
        text += f"\n\nseen in this run, no link now:\n{table(rows)}{more}"
    return text


def _seen(standings: Sequence[Standing | None]) -> tuple[list[str], list[list[str]]]:
    """Heads of columns, and a row for each standing: the columns in which there is anything."""
    rows = [("", "", "") if s is None else (_rounds(s), _quality(s), _audits(s)) for s in standings]
    used = [at for at in range(3) if any(row[at] for row in rows)]
    heads = ("CONTRIBUTED", "QUALITY", "AUDITS")
    return [heads[at] for at in used], [[row[at] or "-" for at in used] for row in rows]


def _rounds(seen: Standing) -> str:
    if not seen.rounds:
        return ""
    lately = "" if seen.lately is None else f"{100 * seen.lately:.0f} %"
    return _and_lately(f"{seen.contributed}/{seen.rounds}", seen.contributed / seen.rounds, seen.lately, lately)


def _quality(seen: Standing) -> str:
    if seen.quality is None:
        return ""
    return _and_lately(f"{seen.quality:.2f}", seen.quality, seen.quality_lately, f"{seen.quality_lately or 0:.2f}")


def _and_lately(text: str, mean: float, lately: float | None, words: str) -> str:
    return text if lately is None or abs(lately - mean) < defaults.CHANGED_LATELY else f"{text}, lately {words}"


def _audits(seen: Standing) -> str:
    false = "false accusation" if seen.false_accusations == 1 else "false accusations"
    counts = (
        (seen.passed, "ok"), (seen.lied, "lied"), (seen.unanswered, "unanswered"), (seen.false_accusations, false),
    )  # fmt: skip
    return ", ".join(f"{count} {word}" for count, word in counts if count)


def table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def size(count: float) -> str:
    """``1.4 MB``: decimal units, as networks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
