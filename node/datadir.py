"""The folder in which a node keeps its key, its place in a run and its contacts; one node at a time may use it.

::

    DIR/key        the identity, mode 0600
    DIR/swarm-key  the key of the private swarm that the node belongs to, mode 0600; none in an open one
    DIR/lock       held while a node runs; holds its pid
    DIR/control    where the control socket of the running node is
    DIR/node       what the node was doing: ticket, task, port (msgpack)
    DIR/dht        what it knew of the swarm (msgpack); helps it back in when the founder is gone
    DIR/documents.sqlite   the documents of the run: roster, commits, metrics, bans (written by dht)
    DIR/run/       the run's last commit, weights and outer state (written by learning)
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import attrs

from ..transport.errors import ConfigError, DecodeError
from ..transport.identity import Identity
from ..transport.wire import pack, unpack
from . import swarm_key

T = TypeVar("T")


@attrs.frozen
class NodeRecord:
    """What a node was doing when it last ran, so that it resumes without being told again.

    ``ticket``: text form. ``task``: as named on the command line here (a name or ``module:Class``).
    ``host``: the IP addresses it was told to listen on, with commas, empty for all: a node that was kept off the
    network stays off.
    ``port``: the one it listened on; taken again if it is free, so old tickets keep working.
    ``founder``: whether this node founded the run. ``via``: text of the addresses it was told to begin with.
    """

    ticket: str
    task: str
    host: str
    port: int
    founder: bool
    via: tuple[str, ...] = ()


def default_path() -> Path:
    """``$SHOAL_HOME``, or ``~/.local/share/shoal`` (``$XDG_DATA_HOME/shoal`` where that is set)."""
    home = os.environ.get("SHOAL_HOME")
    if home:
        return Path(home).expanduser()
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "shoal"


class DataDir:
    """Paths and files of one data directory. Nothing is created before :meth:`create`."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = (default_path() if path is None else path).expanduser().absolute()
        self.key_path = self.path / "key"
        self.swarm_key_path = self.path / "swarm-key"
        self.lock_path = self.path / "lock"
        self.node_path = self.path / "node"
        self.dht_path = self.path / "dht"
        self.run_path = self.path / "run"
        self.documents_path = self.path / "documents.sqlite"
        self.control_path = self.path / "control"

    def create(self) -> None:
        """Make the folder (mode 0700). Raises :class:`ConfigError` naming what is in the way."""
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ConfigError(
                f"cannot make the data directory {self.path}: {error.strerror}; choose another with --data-dir"
            ) from error
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise ConfigError(f"the data directory {self.path} is not writable; choose another with --data-dir")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory for this process, however the process ends.

        Raises :class:`ConfigError` with the pid of the node that holds it already, or when the disk is full.
        """
        try:
            fd = os.open(self.lock_path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600)
        except OSError as error:
            raise ConfigError(f"cannot write {self.lock_path}: {error.strerror}") from error
        try:
            if not _try_lock(fd):
                pid = os.read(fd, 32).decode("ascii", "replace").strip()
                raise ConfigError(
                    f"a node (pid {pid or 'unknown'}) already runs in {self.path}; "
                    "stop it with `shoal stop`, or give this one a directory of its own with --data-dir"
                )
            try:
                os.ftruncate(fd, 0)
                os.write(fd, f"{os.getpid()}\n".encode())
            except OSError as error:
                raise ConfigError(f"cannot write {self.lock_path}: {error.strerror}") from error
            yield
            os.ftruncate(fd, 0)
        finally:
            os.close(fd)

    def holder(self) -> int | None:
        """The pid of the node that runs here, or None."""
        try:
            fd = os.open(self.lock_path, os.O_RDWR)
        except OSError:
            return None
        try:
            if _try_lock(fd):
                return None
            text = os.read(fd, 32).decode("ascii", "replace").strip()
            return int(text) if text.isdigit() else 0
        finally:
            os.close(fd)

    def identity(self, entropy: Callable[[int], bytes]) -> Identity:
        """The node's key, made on first use. Raises :class:`ConfigError` (readable by others, damaged)."""
        return Identity.load_or_create(self.key_path, entropy)

    def swarm_key(self) -> bytes | None:
        """The key of the private swarm that this directory is for, None in an open one. Raises :class:`ConfigError`."""
        return swarm_key.load(self.swarm_key_path) if self.swarm_key_path.exists() else None

    def make_private(self, file: Path | None, entropy: Callable[[int], bytes]) -> bytes:
        """Belong to a private swarm, with the key in ``file`` (made if there is none) or a fresh one; it is kept here.

        Raises :class:`ConfigError`, also when the directory belongs to a swarm with another key already.
        """
        if file is None:
            return swarm_key.load_or_create(self.swarm_key_path, entropy)
        key, own = swarm_key.load_or_create(file, entropy), self.swarm_key()
        if own is None:
            swarm_key.save(self.swarm_key_path, key)
        elif own != key:
            raise ConfigError(
                f"the data directory {self.path} belongs to a private swarm with another key than {file}; "
                "leave out the key file to resume that one, or found another with another --data-dir"
            )
        return key

    def read_record(self) -> NodeRecord | None:
        """What ran here before, or None. Raises :class:`ConfigError` when the file is damaged."""
        return self._read(self.node_path, NodeRecord)

    def write_record(self, record: NodeRecord) -> None:
        self._write(self.node_path, pack(record))

    def read_dht(self) -> bytes | None:
        """The DHT's snapshot as it was written, or None."""
        try:
            return self.dht_path.read_bytes()
        except OSError:
            # Only a shortcut back into the swarm: the ticket's addresses do without.
            return None

    def write_dht(self, snapshot: bytes) -> None:
        self._write(self.dht_path, snapshot)

    def _read(self, path: Path, kind: type[T]) -> T | None:
        try:
            return unpack(kind, path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from error
        except DecodeError as error:
            raise ConfigError(
                f"{path} is damaged ({error.message}); delete it to begin anew in this directory"
            ) from None

    def _write(self, path: Path, data: bytes) -> None:
        """Replace ``path`` whole: a reader, or a restart after a crash, sees the old file or the new one."""
        name = None
        try:
            fd, name = tempfile.mkstemp(dir=self.path, prefix=f".{path.name}-")
            with os.fdopen(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except OSError as error:
            if name is not None:
                Path(name).unlink(missing_ok=True)
            raise ConfigError(f"cannot write {path}: {error.strerror}") from error


if sys.platform == "win32":
    import msvcrt

    def _try_lock(fd: int) -> bool:
        # Byte 1 GiB is locked, not byte 0: Windows locks are mandatory and the pid must stay readable.
        os.lseek(fd, 1 << 30, os.SEEK_SET)
        try:
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        finally:
            os.lseek(fd, 0, os.SEEK_SET)
        return True

else:
    import fcntl

    def _try_lock(fd: int) -> bool:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True
