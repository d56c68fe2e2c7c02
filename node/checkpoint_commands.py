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
