"""Which checkpoints are on this machine's disk. Loads no torch: `shoal checkpoint list` answers at once."""

from __future__ import annotations

import re

import attrs

from ..dht.blobs.store import Entry, Store
from ..transport.errors import ConfigError, DecodeError
from ..transport.wire import unpack
from .events import Checkpoint

#: What the store's entries of checkpoints are tagged with: made here, fetched from others, or of a stage that others
#: hold, for whoever takes it over (:mod:`.pipeline.copies`).
MADE, FETCHED, COPY = "checkpoint", "fetched", "copy"


@attrs.frozen
class CheckpointNote:
    """What stands beside a checkpoint. ``when``: Unix seconds. ``proof``: of a copy, what shows whose state it is."""

    run: bytes
    round: int
    when: float
    proof: bytes = b""


class CheckpointIndex:
    """The checkpoints in a store. Everything blocks."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def known(self) -> tuple[Checkpoint, ...]:
        """All of them, by round."""
        return tuple(sorted((found for found, _ in self.entries()), key=lambda found: (found.round, found.digest)))

    def entries(self) -> list[tuple[Checkpoint, Entry]]:
        """All of them, with what the store says."""
        found = []
        for entry in self.store.entries():
            if entry.tag not in (MADE, FETCHED, COPY):
                continue
            note = self.note_of(entry)
            round, when = note.round, note.when
            if round < 0:
                # Fetched by its digest: the round stands in the blob itself.
                data = self.store.read(entry.id, 0)
                if data is not None and len(data) == 8:
                    round = int.from_bytes(data, "big")
            shown = Checkpoint(
                entry.id.hex(), round, entry.size, when, entry.pinned, entry.complete, self.store.path(entry.id)
            )
            found.append((shown, entry))
        return found

    @staticmethod
    def note_of(entry: Entry) -> CheckpointNote:
        """What stands beside it; where nothing does, of round -1."""
        try:
            return unpack(CheckpointNote, entry.note)
        except DecodeError:
            return CheckpointNote(b"", -1, 0.0)

    def find(self, ref: str) -> Checkpoint:
        """The checkpoint of round ``ref``, or whose digest begins so. Raises :class:`ConfigError`."""
        known = self.known()
        matches = [found for found in known if ref.isdigit() and found.round == int(ref)]
        if not matches and is_digest(ref):
            matches = [found for found in known if found.digest.startswith(ref.lower())]
        if len(matches) == 1:
            return matches[0]
        if matches:
            names = ", ".join(f"{found.digest[:16]} (round {found.round})" for found in matches)
            raise ConfigError(f"{ref} names {len(matches)} checkpoints: {names}; give more of the digest")
        if not ref.isdigit() and not is_digest(ref):
            raise ConfigError(f"{ref!r} is no checkpoint: expected a round, or 6 or more hex digits of a digest")
        rounds = ", ".join(str(found.round) for found in known) or "none"
        raise ConfigError(f"there is no checkpoint {ref} here (rounds kept: {rounds}); see `shoal checkpoint list`")

    def pin(self, ref: str, pinned: bool) -> Checkpoint:
        """See :meth:`find`. A pinned one stays for ever."""
        found = self.find(ref)
        self.store.pin(bytes.fromhex(found.digest), pinned)
        return attrs.evolve(found, pinned=pinned)


def is_digest(ref: str) -> bool:
    """Whether ``ref`` may be the beginning of a digest."""
    return re.fullmatch(r"[0-9a-fA-F]{6,64}", ref) is not None
