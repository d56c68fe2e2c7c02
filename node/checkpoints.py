"""What `shoal checkpoint` asks of a running node: its checkpoints, and those of other members by their digest."""

from __future__ import annotations

from pathlib import Path

from ..learning.checkpoint_index import FETCHED, is_digest
from ..learning.checkpoints import Checkpoints, write_model
from ..learning.events import Checkpoint
from ..learning.run import Run
from ..learning.sync import state_fault
from ..transport.errors import ConfigError
from ..transport.identity import PeerId
from . import defaults


async def list_checkpoints(run: Run) -> tuple[Checkpoint, ...]:
    """The checkpoints on this machine's disk."""
    return await run.host.run_blocking(Checkpoints(run.store.blobs).known)


async def pin_checkpoint(run: Run, ref: str, pinned: bool) -> Checkpoint:
    """See :meth:`Checkpoints.pin`."""
    return await run.host.run_blocking(Checkpoints(run.store.blobs).pin, ref, pinned)


async def restore_checkpoint(run: Run, ref: str, path: Path) -> str:
    """Write a checkpoint as a model file; one that is not here whole is fetched from the members, and stays here.

    Returns a sentence. Raises :class:`ConfigError` for a ``ref`` that names none here and is no whole digest,
    :class:`shoal.transport.errors.RemoteError` when no member has it.
    """
    blocking, checkpoints = run.host.run_blocking, Checkpoints(run.store.blobs)
    came = ""
    try:
        found = await blocking(checkpoints.find, ref)
        blob, complete = bytes.fromhex(found.digest), found.complete
    except ConfigError:
        if not (len(ref) == 64 and is_digest(ref)):
            raise
        blob, complete = bytes.fromhex(ref), False
    if not complete:
        came = await _fetch(run, blob)
    try:
        round, vectors = await blocking(checkpoints.load, blob, run.spec)
    except ConfigError:
        if not complete:
            raise
        # A chunk had gone bad on disk; it is dropped now, and others may have it.
        came = await _fetch(run, blob)
        round, vectors = await blocking(checkpoints.load, blob, run.spec)
    said = await blocking(lambda: write_model(path, run.spec, run.run_id, round, vectors, blob))
    return f"{said}{came}"


async def _fetch(run: Run, blob: bytes) -> str:
    """Fetch what is missing of a checkpoint; how it came, for people."""
    liars: list[str] = []

    def tell(what: str, peer: PeerId, detail: str) -> None:
        if what == "liar":
            liars.append(peer.short)
            run.emit("run", "liar", peer, detail)

    done = await run.blobs.fetch_to_store(
        blob,
        peers=run.membership.members(),
        tag=FETCHED,
        accept=lambda outline: state_fault(outline, run.layout.size),
        tell=tell,
        patience=defaults.FETCH_PATIENCE,
    )
    lied = f"; dropped for sending something else: {' '.join(liars)}" if liars else ""
    return f", fetched from {len(done.received)} of the members in {done.seconds:.1f} s{lied}"
