"""What a peer keeps of a run: the spec, its votes, its last commit, the state after it, what it saw of others."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

import attrs
from torch import Tensor

from ..dht.blobs import defaults as blob_defaults
from ..dht.blobs.store import Store
from ..dht.durable import sync_folder
from ..transport.errors import ConfigError, DecodeError
from ..transport.identity import PeerId
from ..transport.wire import pack, unpack
from .events import Standing
from .files import load_state, save_state
from .rounds.messages import Accepted, Certificate, CommitRecord
from .spec import SignedSpec

T = TypeVar("T")

#: Before the names of vectors that are this peer's alone.
_OWN = "own/"


@attrs.frozen
class Vote:
    """What we promised and accepted in the instance ``key``: stored before it is said."""

    key: bytes
    promised: int
    accepted: Accepted | None


@attrs.frozen
class Head:
    """The last commit we know of, the voters who agreed on it, and their certificate."""

    record: CommitRecord
    certificate: Certificate
    voters: tuple[PeerId, ...]


@attrs.frozen
class Witness:
    """What was seen of other peers, the one seen last first."""

    peers: tuple[Standing, ...]


class RunStore:
    """Keeps a run in ``folder``, every file written whole or not at all; without a folder only in memory.

    ``quota``: bytes that its blobs may take. ``whole``: the store of the run whose stage this one is of.
    """

    def __init__(self, folder: Path | None, quota: int = blob_defaults.QUOTA, whole: RunStore | None = None) -> None:
        self.folder, self.quota, self._whole = folder, quota, whole
        self._files: dict[str, bytes] = {}
        self._state: tuple[dict[str, Tensor], Head] | None = None
        self._own: dict[str, Tensor] = {}
        self._blobs: Store | None = None
        self._stages: dict[str, RunStore] = {}

    def stage(self, name: str) -> RunStore:
        """Of what this peer does with one stage of a model that is cut: the same one for the same name.

        Its blobs are those of the whole: all stages share the quota, and what was kept while one of them was held is
        there, and served, when another one is.
        """
        if name not in self._stages:
            kept = None if self.folder is None else self.folder / "stages" / name
            self._stages[name] = RunStore(kept, self.quota, self)
        return self._stages[name]

    @property
    def blobs(self) -> Store:
        """The blobs of this run: checkpoints, and what was fetched. Opened when first asked for, which blocks."""
        if self._whole is not None:
            return self._whole.blobs
        if self._blobs is None:
            self._blobs = Store(None if self.folder is None else self.folder / "blobs", self.quota)
        return self._blobs

    def close(self) -> None:
        """Let go of the files. Blocking."""
        if self._blobs is not None and self.folder is not None:
            self._blobs.close()
            self._blobs = None

    def copy(self, whole: RunStore | None = None) -> RunStore:
        """What is stored now; of a store in memory what is saved later does not show in the copy."""
        made = RunStore(self.folder, self.quota, whole)
        made._blobs = None if self._blobs is None or self.folder is not None else self._blobs.copy()
        made._files, made._state, made._own = dict(self._files), self._state, self._own
        made._stages = {name: store.copy(made) for name, store in self._stages.items()}
        return made

    def save_spec(self, spec: SignedSpec) -> None:
        self._write("spec", pack(spec))

    def load_spec(self) -> SignedSpec | None:
        data = self._read("spec")
        return None if data is None else self._unpack(SignedSpec, "spec", data)

    def save_vote(self, vote: Vote) -> None:
        """Blocking; on return the vote survives a crash."""
        self._write("vote", pack(vote))

    def load_vote(self, key: bytes) -> Vote | None:
        """The vote in instance ``key``, None when there was none."""
        data = self._read("vote")
        vote = None if data is None else self._unpack(Vote, "vote", data)
        return vote if vote is not None and vote.key == key else None

    def save_trust(self, links: tuple[Head, ...]) -> None:
        """What leads from the founder to our roster (:mod:`.trust`). Blocking."""
        packed = [pack(link) for link in links]
        self._write("trust", b"".join(part for data in packed for part in (len(data).to_bytes(4, "big"), data)))

    def load_trust(self) -> tuple[Head, ...]:
        """What :meth:`save_trust` wrote. Raises :class:`ConfigError` naming a damaged file."""
        data, links = self._read("trust") or b"", []
        while data:
            size = 4 + int.from_bytes(data[:4], "big")
            if size > len(data):
                raise ConfigError(f"{self.folder}/trust is damaged (it ends early); delete it to join the run anew")
            links.append(self._unpack(Head, "trust", data[4:size]))
            data = data[size:]
        return tuple(links)

    def save_standings(self, peers: tuple[Standing, ...]) -> None:
        """What is known of other peers (:mod:`.standing`). Blocking."""
        self._write("standings", pack(Witness(peers)))

    def load_standings(self) -> tuple[Standing, ...]:
        """What :meth:`save_standings` wrote; nothing has been checked but types. Raises :class:`ConfigError` naming a
        damaged file."""
        data = self._read("standings")
        return () if data is None else self._unpack(Witness, "standings", data).peers

    def save_state(self, vectors: dict[str, Tensor], head: Head, own: dict[str, Tensor] | None = None) -> None:
        """The state after ``head.record.round``: fp32 vectors by name; and what is ours alone. Blocking."""
        own = own or {}
        if self.folder is None:
            self._state = ({name: vector.clone() for name, vector in vectors.items()}, head)
            self._own = {name: vector.clone() for name, vector in own.items()}
            return
        both = {**vectors, **{_OWN + name: vector for name, vector in own.items()}}
        save_state(self.folder / "state.safetensors", both, {"head": pack(head).hex()})

    def load_state(self) -> tuple[dict[str, Tensor], Head] | None:
        """What was saved last. Raises :class:`ConfigError` naming a damaged file."""
        if self.folder is None:
            return self._state
        path = self.folder / "state.safetensors"
        if not path.exists():
            return None
        vectors, notes = load_state(path)
        try:
            vectors = {name: vector for name, vector in vectors.items() if not name.startswith(_OWN)}
            return vectors, unpack(Head, bytes.fromhex(notes.get("head", "")))
        except (ValueError, DecodeError) as error:
            raise ConfigError(f"{path} is damaged ({error}); delete it to load the state from other peers") from None

    def keeps_state(self) -> bool:
        """Whether :meth:`load_state` has something to load. Blocking."""
        return self._state is not None if self.folder is None else (self.folder / "state.safetensors").exists()

    def load_own(self) -> dict[str, Tensor]:
        """What was ours alone when the state was saved last. Raises as :meth:`load_state`."""
        if self.folder is None:
            return self._own
        path = self.folder / "state.safetensors"
        if not path.exists():
            return {}
        vectors, _ = load_state(path)
        return {name.removeprefix(_OWN): vector for name, vector in vectors.items() if name.startswith(_OWN)}

    def _unpack(self, kind: type[T], name: str, data: bytes) -> T:
        try:
            return unpack(kind, data)
        except DecodeError as error:
            raise ConfigError(f"{self.folder}/{name} is damaged ({error}); delete it to join the run anew") from None

    def _read(self, name: str) -> bytes | None:
        if self.folder is None:
            return self._files.get(name)
        try:
            return (self.folder / name).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(f"cannot read {self.folder / name}: {error.strerror}") from error

    def _write(self, name: str, data: bytes) -> None:
        if self.folder is None:
            self._files[name] = data
            return
        path, temporary = self.folder / name, self.folder / f".{name}.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(self.folder)
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}") from error
