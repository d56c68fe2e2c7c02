"""States of past rounds that stay on disk, and model files written from states.

A checkpoint is a blob in the run's store: its id is the digest that commit records carry, so that members that did the
same round hold the same blob, and one can be fetched from any of them. Every so many rounds one is kept; of those that
nobody pinned, the last few stay.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import attrs
import torch
import trio
from torch import Tensor

from ..dht.blobs.tree import build_tree
from ..transport.errors import ConfigError, Overloaded
from ..transport.host import Host
from ..transport.identity import PeerId
from ..transport.wire import pack
from . import defaults
from .checkpoint_index import MADE, CheckpointIndex, CheckpointNote
from .files import load_tensors, save_state
from .snapshots import Snapshot
from .spec import ParameterSpec, RunSpec
from .state import Layout, bytes_view, flatten, unflatten
from .store import RunStore
from .sync import state_digest, state_fault, state_parts
from .task import compare_signatures


@attrs.frozen
class Keeping:
    """Which states stay. ``every``: rounds between two, 0 for none; ``apart``: seconds that this shall take at least,
    else twice as many rounds, and so on; ``keep``: how many that nobody pinned; ``quota``: bytes that all blobs of the
    run may take."""

    every: int = defaults.CHECKPOINT_ROUNDS
    apart: float = defaults.CHECKPOINT_APART
    keep: int = defaults.CHECKPOINTS
    quota: int = defaults.BLOB_QUOTA


def checkpoint_due(keeping: Keeping, round: int, last: int, since: float, now: float) -> tuple[bool, str]:
    """Whether the state after ``round`` is to be kept, and why; ``last``: the round kept last, at ``since``.

    Multiples of the same number on all members, or of that times a power of two where rounds are quick: so members hold
    the same states, and can help each other out.
    """
    if not keeping.every or round <= last:
        return False, "checkpoints are off" if not keeping.every else f"round {round} is not new"
    if now - since >= defaults.CHECKPOINT_SECONDS:
        return True, f"nothing was kept for {defaults.CHECKPOINT_SECONDS / 60:g} minutes"
    spacing, pace = keeping.every, (now - since) / (round - last)
    while spacing * pace < keeping.apart and spacing < defaults.MOST_ROUNDS_APART:
        spacing *= 2
    if round % spacing == 0:
        return True, f"every {spacing} rounds"
    return False, f"the next one is after round {round + spacing - round % spacing}"


class Checkpoints(CheckpointIndex):
    """The checkpoints in a store, with their content. Everything blocks."""

    def save(self, snapshot: Snapshot, note: CheckpointNote, keep: int) -> None:
        """Keep a state; then let go of all but the last ``keep`` that nobody pinned.

        Raises :class:`Overloaded` or :class:`ConfigError` when there is no room; nothing is lost then.
        """
        parts = state_parts(snapshot.round, snapshot.vectors)
        self.store.put(build_tree(parts), [data for _, _, data in parts], tag=MADE, note=pack(note))
        # Those of a run that was left (of another stage of the same model) go first.
        made = [
            (self.note_of(entry).run == note.run, found.round, found.when, entry)
            for found, entry in self.entries()
            if entry.tag == MADE
        ]
        unpinned = [entry for *_, entry in sorted(made, key=lambda item: item[:3]) if not entry.pinned]
        for entry in unpinned[: max(0, len(unpinned) - keep)]:
            self.store.remove(entry.id)

    def load(self, blob: bytes, spec: RunSpec) -> tuple[int, dict[str, Tensor]]:
        """The round and the vectors of a checkpoint, each chunk checked.

        Raises :class:`ConfigError` when it is not complete, damaged, or of another model.
        """
        tree = self.store.tree(blob)
        if tree is None:
            raise ConfigError(f"there is no checkpoint {blob.hex()[:16]} here")
        wrong = state_fault(tree.outline, Layout.of_signature(spec.parameters).size)
        if wrong is not None:
            raise ConfigError(f"checkpoint {blob.hex()[:16]} cannot be restored: {wrong}")
        round = bytearray(8)
        vectors = {part.label: torch.empty(part.size // 4) for part in tree.outline.parts[1:]}
        for number, view in enumerate([memoryview(round), *map(bytes_view, vectors.values())]):
            if not self.store.read_part(blob, number, view):
                raise ConfigError(
                    f"checkpoint {blob.hex()[:16]} ({self.store.path(blob)}) is damaged or not complete; while the "
                    f"node runs, `shoal checkpoint restore {blob.hex()} FILE` fetches what is missing from others"
                )
        return int.from_bytes(round, "big"), vectors


class Keeper:
    """Keeps the states of a run that goes on. ``emit``: tells people, ``(phase, what, peer, detail)``."""

    def __init__(
        self,
        host: Host,
        store: RunStore,
        run: bytes,
        keeping: Keeping,
        emit: Callable[[str, str, PeerId | None, str], None],
    ) -> None:
        self._host, self._store, self._run, self.keeping, self._emit = host, store, run, keeping, emit
        self._last, self._since = -1, 0.0
        self._pending, self._done = 0, trio.Event()

    def settled(self, snapshot: Snapshot, nursery: trio.Nursery, *, final: bool) -> None:
        """Keep ``snapshot`` on disk if it is time, in a task of ``nursery``. While the one before is still being
        written only the ``final`` one counts. A disk without room is told of, and costs nothing."""
        now = self._host.now()
        if self._last < 0:
            # Where we came in; time runs from here.
            self._last, self._since = snapshot.round, now
        due, _ = checkpoint_due(self.keeping, snapshot.round, self._last, self._since, now)
        if due and (final or not self._pending):
            self._last, self._since, self._pending = snapshot.round, now, self._pending + 1
            reading = contextlib.ExitStack()
            reading.enter_context(snapshot.read())
            nursery.start_soon(self._save, snapshot, reading)

    async def _save(self, snapshot: Snapshot, reading: contextlib.ExitStack) -> None:
        try:
            await snapshot.ready.wait()
            note = CheckpointNote(self._run, snapshot.round, self._host.wall())
            save = Checkpoints(self._store.blobs).save
            await self._host.run_blocking(save, snapshot, note, self.keeping.keep)
        except (Overloaded, ConfigError) as error:
            self._emit("run", "no-checkpoint", None, f"the state after round {snapshot.round} is not kept: {error}")
        finally:
            reading.close()
            self._pending -= 1
            self._done.set()

    async def idle(self) -> None:
        """Return when everything that is to be kept is on disk."""
        while self._pending:
            self._done = trio.Event()
            await self._done.wait()


# --- model files ------------------------------------------------------------------------------------------------------

_EXTRA = "shoal."


def write_model(path: Path, spec: RunSpec, run: bytes, round: int, vectors: Mapping[str, Tensor], digest: bytes) -> str:
    """Write a state as a model file: the weights with the model's names, shapes and dtypes, the other vectors under
    ``shoal.``. Returns a sentence about it. Blocking. Raises :class:`ConfigError` naming the file."""
    named = unflatten(Layout.of_signature(spec.parameters), vectors["weights"])
    extra = {f"{_EXTRA}{name}": vector for name, vector in vectors.items() if name != "weights"}
    notes = {"round": str(round), "run": run.hex(), "digest": digest.hex(), "strategy": spec.strategy}
    save_state(path, {**named, **extra}, notes)
    return f"round {round}, state {digest.hex()[:16]}"


def read_model(path: Path, parameters: Sequence[ParameterSpec], strategy: str) -> tuple[bytes, dict[str, Tensor]]:
    """The state to begin a run with from a model file (any safetensors file with the model's tensors), and its digest.

    What the strategy had kept beside the weights (momentum …) is taken over from a file of the same strategy. Blocking.
    Raises :class:`ConfigError` naming the file, also when it is damaged or of another model.
    """
    tensors, notes = load_tensors(path)
    layout = Layout.of_signature(tuple(parameters))
    extra = {name: tensor for name, tensor in tensors.items() if name.startswith(_EXTRA) and name not in layout.names}
    model = {name: tensor for name, tensor in tensors.items() if name not in extra}
    found = tuple(
        ParameterSpec(name, tuple(model[name].shape), str(model[name].dtype).removeprefix("torch."))
        for name in (*(n for n in layout.names if n in model), *(n for n in sorted(model) if n not in layout.names))
    )
    wrong = compare_signatures(found, tuple(parameters))
    if wrong is not None:
        wrong = wrong.removeprefix("the model differs from the run's: ")
        wrong = wrong.replace(" here", " in the file").replace("in the run", "in the task")
        raise ConfigError(f"{path} does not hold the task's model: {wrong}")
    vectors = {"weights": flatten(layout, [model[name] for name in layout.names])}
    if notes.get("strategy") == strategy:
        vectors |= {n.removeprefix(_EXTRA): t for n, t in sorted(extra.items()) if t.dtype == torch.float32}
    for name, vector in vectors.items():
        if not bool(torch.isfinite(vector).all()):
            raise ConfigError(f"{path} holds numbers that are not finite in {name}: no run can begin with it")
    vectors = {name: vector.reshape(-1).contiguous() for name, vector in vectors.items()}
    return state_digest(0, vectors), vectors
