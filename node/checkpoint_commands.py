"""`shoal checkpoint list | restore | pin | unpin`: states of past rounds, from the running node or from its disk."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs

from ..dht.blobs.store import Store
from ..learning.checkpoint_index import CheckpointIndex
from ..learning.events import Checkpoint
from ..transport.errors import ConfigError
from . import defaults
from .commands import size, table
from .control import ControlClient
from .datadir import DataDir

DESCRIPTION = """\
A node keeps the state after every 10th round (every 20th, 40th … where that takes less than 30 s; and after 5 minutes
in any case) in its data directory: the last 3, and those that are pinned, for ever. `shoal start --checkpoint-every N`
sets another number. REF is a round, or the beginning of a digest (6 digits or more).
"""

EPILOG = """\
examples:
  shoal checkpoint list                            what is kept here
  shoal checkpoint pin 280                         keep the state after round 280 for ever
  shoal checkpoint restore 280                     write it as a model file, ./checkpoint-280.safetensors
  shoal checkpoint restore 5f0c…  old.safetensors  by its whole digest: while the node runs, others that have it help

To go on from an earlier round, found another run with that state; its members join with the new ticket:
  shoal start TASK --from checkpoint-280.safetensors --data-dir NEW
A run itself never goes back: what its members have signed as round 281 stays round 281.
"""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "checkpoint",
        help="states of past rounds: list them, write one to a file, keep one for ever",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)

    def action(name: str, summary: str, run: object) -> argparse.ArgumentParser:
        made = actions.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        made.add_argument(
            "--data-dir", type=Path, metavar="DIR",
            help="the node's key and state (default: $SHOAL_HOME or ~/.local/share/shoal)",
        )  # fmt: skip
        made.set_defaults(run=run)
        return made

    listing = action("list", "the checkpoints on this machine", list_command)
    listing.add_argument("--json", action="store_true", help="for programs: one JSON object")
    restoring = action(
        "restore", "write a checkpoint as a safetensors file, to be used or to begin a run with", restore
    )
    restoring.add_argument("ref", metavar="REF", help="a round, or the beginning of a digest")
    restoring.add_argument(
        "file", metavar="FILE", nargs="?", type=Path, help="replaced if it exists (default: checkpoint-REF.safetensors)"
    )
    for name, summary in (("pin", "keep a checkpoint for ever"), ("unpin", "let a checkpoint go when it is its turn")):
        action(name, summary, pin if name == "pin" else unpin).add_argument(
            "ref", metavar="REF", help="a round, or the beginning of a digest"
        )


@contextmanager
def _stopped(data: DataDir) -> Iterator[CheckpointIndex]:
    """The checkpoints of a node that does not run. Raises :class:`ConfigError` when there is no run."""
    if not data.run_path.is_dir():
        raise ConfigError(f"the data directory {data.path} holds no run; name another one with --data-dir")
    with data.locked():
        store = Store(data.run_path / "blobs")
        try:
            yield CheckpointIndex(store)
        finally:
            store.close()


def list_command(options: argparse.Namespace) -> int:
    data = DataDir(options.data_dir)
    if data.holder() is not None:
        found = ControlClient(data).checkpoints()
    else:
        with _stopped(data) as checkpoints:
            found = checkpoints.known()
    if options.json:
        _say(json.dumps({"checkpoints": [attrs.asdict(each) for each in found]}, indent=2))
    elif not found:
        _say("no checkpoints yet: see `shoal checkpoint --help` for when one is kept")
    else:
        rows = [("ROUND", "DIGEST", "SIZE", "KEPT", "PINNED", "COMPLETE", "FILE")]
        _say(table([*rows, *map(_row, found)]))
    return 0


def _row(found: Checkpoint) -> tuple[str, ...]:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found.when)) if found.when else "fetched"
    yes = {True: "yes", False: "no"}
    round = str(found.round) if found.round >= 0 else "?"
    return (round, found.digest[:16], size(found.size), when, yes[found.pinned], yes[found.complete], found.path)


def restore(options: argparse.Namespace) -> int:
    data = DataDir(options.data_dir)
    given = options.file or Path(f"checkpoint-{options.ref}.safetensors")
    target = Path(given).expanduser().absolute()
    if target.is_dir() or not target.parent.is_dir():
        what = "it is a folder" if target.is_dir() else f"there is no folder {target.parent}"
        raise ConfigError(f"cannot write {target}: {what}")
    if data.holder() is not None:
        detail = ControlClient(data, timeout=defaults.FETCH_TIMEOUT).restore_checkpoint(options.ref, str(target)).detail
    else:
        detail = _restore_stopped(data, options.ref, target)
    _say(f"wrote {target}: {detail}")
    _say(f"a run goes on from it with: shoal start TASK --from {shlex.quote(str(given))} --data-dir NEW")
    return 0


def _restore_stopped(data: DataDir, ref: str, target: Path) -> str:
    from ..learning.checkpoints import Checkpoints, write_model
    from ..learning.store import RunStore

    with _stopped(data) as index:
        signed = RunStore(data.run_path).load_spec()
        if signed is None:
            raise ConfigError(f"the data directory {data.path} holds no run; name another one with --data-dir")
        blob, spec = bytes.fromhex(index.find(ref).digest), signed.open()
        round, vectors = Checkpoints(index.store).load(blob, spec)
        return write_model(target, spec, signed.run_id, round, vectors, blob)


def pin(options: argparse.Namespace) -> int:
    return _pin(options, True)


def unpin(options: argparse.Namespace) -> int:
    return _pin(options, False)


def _pin(options: argparse.Namespace, pinned: bool) -> int:
    data = DataDir(options.data_dir)
    if data.holder() is not None:
        detail = ControlClient(data).pin_checkpoint(options.ref, pinned).detail
    else:
        with _stopped(data) as checkpoints:
            detail = pinned_words(checkpoints.pin(options.ref, pinned))
    _say(detail)
    return 0


def pinned_words(found: Checkpoint) -> str:
    """What became of a checkpoint, for people."""
    fate = "stays for ever" if found.pinned else "goes when it is its turn"
    return f"the state after round {found.round} ({found.digest[:16]}) {fate}"


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
