"""The key of a private swarm: 32 secret bytes in a file that only its owner can read."""

from __future__ import annotations

import base64
import binascii
import os
import stat
from collections.abc import Callable
from pathlib import Path

from ..transport.errors import ConfigError

#: Bytes of the key.
SIZE = 32

_HEADER = "shoal-swarm-key-v1 "
#: A key file has 77 characters; what is longer is some other file, and is not read whole.
_MAX_FILE = 4096


def load_or_create(path: Path, entropy: Callable[[int], bytes]) -> bytes:
    """The key in ``path``, made there with mode 0600 when there is no such file.

    Raises :class:`ConfigError` naming the file: not a key, readable by others, or not to be read or written.
    """
    if not path.exists():
        save(path, entropy(SIZE))
    return load(path)


def load(path: Path) -> bytes:
    """The key in ``path``. Raises :class:`ConfigError`."""
    try:
        if path.is_dir():
            raise ConfigError(f"{path} is a folder; --private takes a file with the swarm's key")
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read(_MAX_FILE).decode("ascii", "replace")
    except OSError as error:
        raise ConfigError(f"cannot read the swarm's key {path}: {error.strerror}") from error
    try:
        if not text.startswith(_HEADER):
            raise ValueError
        key = base64.b32decode(text[len(_HEADER) :].strip())
        if len(key) != SIZE:
            raise ValueError
    except (binascii.Error, ValueError):
        raise ConfigError(
            f"{path} is not the key of a private swarm: expected one line that begins with {_HEADER.strip()!r}; "
            "copy the file again, or name one that does not exist yet to make a new key"
        ) from None
    # Last: of a file that is no key at all, nobody should change the mode.
    if os.name == "posix" and mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(
            f"the swarm's key {path} can be read by others (mode {stat.S_IMODE(mode):04o}), and who has it is a "
            f"member; run: chmod 600 {path}"
        )
    return key


def save(path: Path, key: bytes) -> None:
    """Write a new key file. One that exists is not touched: whoever was faster made the key."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        draft.unlink(missing_ok=True)
        try:
            # Complete before it has its name: a crash must not leave half a key.
            with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(_HEADER + base64.b32encode(key).decode() + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.link(draft, path)
        except FileExistsError:
            return
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write the swarm's key {path}: {error.strerror}") from error
