"""Exports the weights of a run from a data directory in which no node runs."""

from __future__ import annotations

from pathlib import Path

from ..learning.checkpoints import write_model
from ..learning.store import RunStore
from ..learning.sync import state_digest
from ..transport.errors import ConfigError
from .datadir import DataDir


def export_saved(data: DataDir, target: Path) -> str:
    """Write the last saved state to ``target``, as a running node would; returns a sentence about it.

    Raises :class:`ConfigError` when there is no run, no state, or a damaged file.
    """
    store = RunStore(data.run_path)
    signed = store.load_spec()
    saved = store.load_state()
    if signed is None or saved is None:
        raise ConfigError(
            f"there is nothing to export: {data.path} holds no saved state of a run, and no node is running there"
        )
    vectors, head = saved
    spec = signed.open()
    round = head.record.round
    said = write_model(target, spec, signed.run_id, round, vectors, state_digest(round, vectors))
    return f"{said} (saved; no node is running)"
