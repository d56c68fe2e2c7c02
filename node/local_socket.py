"""A private byte pipe between processes of one user on one machine: a Unix socket of mode 0600.

The only module that knows what such a pipe is made of. Another kind (a named pipe on Windows) takes the
same three functions; what they exchange is a *locator*, the text in the data directory's ``control`` file.
"""

from __future__ import annotations

import hashlib
import os
import socket
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ..transport.errors import ConfigError
from . import defaults

if TYPE_CHECKING:
    import trio

_SCHEME = "unix:"


def locator_for(folder: Path) -> str:
    """Where the pipe of a node with data directory ``folder`` is to be.

    A Unix socket's path is limited to about 100 bytes; for a deeper ``folder`` the socket stands in a
    folder of mode 0700 below ``$XDG_RUNTIME_DIR`` or the temporary directory, named by a hash. Raises
    :class:`ConfigError` when somebody else owns that one.
    """
    path = folder / "control.sock"
    if len(os.fsencode(path)) < defaults.MAX_SOCKET_PATH:
        return f"{_SCHEME}{path}"
    base = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()) / f"shoal-{os.getuid()}"
    base.mkdir(mode=0o700, exist_ok=True)
    found = base.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise ConfigError(
            f"the path of the data directory {folder} is too long for a control socket, and {base}, where the socket "
            "would stand instead, is not a folder of yours with mode 0700; choose a shorter --data-dir"
        )
    name = hashlib.blake2b(os.fsencode(folder), digest_size=12).hexdigest()
    return f"{_SCHEME}{base / name}.sock"


def listen(locator: str) -> trio.SocketListener:
    """Listen at ``locator``, which the caller holds the data directory's lock for: a stale socket is replaced."""
    import trio

    path = _path(locator)
    Path(path).unlink(missing_ok=True)
    raw = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        raw.bind(path)
        # Between bind and listen nobody can connect, so there is no moment in which others may.
        os.chmod(path, 0o600)
        raw.listen(16)
        raw.setblocking(False)
    except OSError as error:
        raw.close()
        raise ConfigError(f"cannot make the control socket {path}: {error.strerror}") from error
    return trio.SocketListener(trio.socket.from_stdlib_socket(raw))


def connect(locator: str, timeout: float) -> socket.socket:
    """A blocking socket to the node. Raises OSError (nobody there) or TimeoutError."""
    raw = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    raw.settimeout(timeout)
    try:
        raw.connect(_path(locator))
    except OSError:
        raw.close()
        raise
    return raw


async def open_stream(locator: str, first: bytes = b"") -> trio.SocketStream:
    """The same for trio, and ``first`` is sent. Raises OSError when nobody is there, or not any more."""
    import trio

    stream = await trio.open_unix_socket(_path(locator))
    try:
        await stream.send_all(first)
    except trio.BrokenResourceError as error:
        await trio.aclose_forcefully(stream)
        raise ConnectionError("the node hung up") from error
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise
    return stream


def remove(locator: str) -> None:
    Path(_path(locator)).unlink(missing_ok=True)


def _path(locator: str) -> str:
    if not locator.startswith(_SCHEME):
        raise ConfigError(f"unknown kind of control socket {locator!r}: was the node started by another Shoal?")
    return locator.removeprefix(_SCHEME)
