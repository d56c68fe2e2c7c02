"""Where the bytes of blobs stand: a file per blob, which is a safetensors file; or memory, for virtual time."""

from __future__ import annotations

import json
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

from ...transport.errors import ConfigError, DecodeError
from ..durable import sync_folder
from .tree import KINDS, Outline

#: Names of blobs' files: whole and partial ones.
WHOLE, PARTIAL = ".safetensors", ".partial"
_NAME = re.compile(r"([0-9a-f]{64})(\.safetensors|\.partial)")

#: Bytes of a header that is read back: 4096 parts and a note.
MAX_HEADER = 4 << 20


def header(outline: Outline, notes: Mapping[str, str]) -> bytes:
    """The beginning of the safetensors file of a blob: each part is a flat tensor. Behind it stand the parts' bytes."""
    entries: dict[str, object] = {"__metadata__": dict(notes)}
    at = 0
    for part in outline.parts:
        entries[part.label] = {
            "dtype": part.kind,
            "shape": [part.size // KINDS[part.kind]],
            "data_offsets": [at, at + part.size],
        }
        at += part.size
    text = json.dumps(entries, separators=(",", ":")).encode()
    # Tensors begin at a multiple of 8, so that they can be mapped.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_header(path: Path) -> tuple[list[tuple[str, str, int]], dict[str, str], int]:
    """``(label, kind, size)`` of the parts, notes, and where the parts begin, of a file that :func:`header` began.

    Raises :class:`DecodeError` when it is none.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_HEADER:
                raise ValueError("a header of unlikely length")
            text = file.read(length)
        if len(text) != length:
            raise ValueError("a header that ends early")
        entries = json.loads(text)
        notes = {str(name): str(text) for name, text in entries.pop("__metadata__", {}).items()}
        parts, at = [], 0
        for label, entry in entries.items():
            begin, end = entry["data_offsets"]
            if begin != at or not isinstance(end, int) or end < begin:
                raise ValueError("tensors that do not follow each other")
            parts.append((str(label), str(entry["dtype"]), end - begin))
            at = end
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DecodeError(f"{path} is not the file of a blob ({error})") from None
    return parts, notes, 8 + length


class Files(ABC):
    """Bytes of blobs by id. Everything blocks. Raises :class:`ConfigError` naming the file when the disk refuses."""

    @abstractmethod
    def create(self, blob: bytes, head: bytes, size: int) -> None:
        """An empty partial one of ``size`` bytes that begins with ``head``; replaces what is there."""

    @abstractmethod
    def write(self, blob: bytes, at: int, data: bytes | bytearray | memoryview) -> None: ...

    @abstractmethod
    def read(self, blob: bytes, at: int, size: int) -> bytearray:
        """Up to ``size`` bytes: fewer where the file is too short, gone or unreadable."""

    @abstractmethod
    def sync(self, blob: bytes) -> None:
        """On return what was written survives a power cut."""

    @abstractmethod
    def rename(self, blob: bytes, whole: bool) -> None:
        """Show by its name whether it is whole."""

    @abstractmethod
    def remove(self, blob: bytes) -> None: ...

    @abstractmethod
    def found(self) -> tuple[bytes, ...]:
        """All that are there, in order."""

    @abstractmethod
    def free(self) -> int:
        """Bytes of room for more."""

    @abstractmethod
    def where(self, blob: bytes) -> str:
        """For messages to people."""


class MemoryFiles(Files):
    """In memory."""

    def __init__(self) -> None:
        self.data: dict[bytes, bytearray] = {}

    def create(self, blob: bytes, head: bytes, size: int) -> None:
        self.data[blob] = bytearray(size)
        self.data[blob][: len(head)] = head

    def write(self, blob: bytes, at: int, data: bytes | bytearray | memoryview) -> None:
        self.data[blob][at : at + len(data)] = data

    def read(self, blob: bytes, at: int, size: int) -> bytearray:
        return self.data.get(blob, bytearray())[at : at + size]

    def sync(self, blob: bytes) -> None:
        return

    def rename(self, blob: bytes, whole: bool) -> None:
        return

    def remove(self, blob: bytes) -> None:
        self.data.pop(blob, None)

    def found(self) -> tuple[bytes, ...]:
        return tuple(sorted(self.data))

    def free(self) -> int:
        return 1 << 62

    def where(self, blob: bytes) -> str:
        return f"blob {blob.hex()[:16]} in memory"


class DiskFiles(Files):
    """A file per blob in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, blob: bytes) -> Path:
        """Its file, whole or partial; where it would be when there is none."""
        whole = self.folder / f"{blob.hex()}{WHOLE}"
        return whole if whole.exists() else whole.with_suffix(PARTIAL)

    def create(self, blob: bytes, head: bytes, size: int) -> None:
        self.remove(blob)
        path = self.path(blob)
        try:
            with path.open("wb") as file:
                file.write(head)
                file.truncate(size)
                file.flush()
                os.fsync(file.fileno())
            sync_folder(self.folder)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise _refused(path, error) from error

    def write(self, blob: bytes, at: int, data: bytes | bytearray | memoryview) -> None:
        path = self.path(blob)
        try:
            with path.open("r+b", buffering=0) as file:
                file.seek(at)
                view = memoryview(data)
                while view:
                    view = view[file.write(view) :]
        except OSError as error:
            raise _refused(path, error) from error

    def read(self, blob: bytes, at: int, size: int) -> bytearray:
        data = bytearray(size)
        view, got = memoryview(data), 0
        try:
            with self.path(blob).open("rb", buffering=0) as file:
                file.seek(at)
                while got < size and (n := file.readinto(view[got:])):
                    got += n
        except OSError:
            got = 0
        return data if got == size else bytearray(view[:got])

    def sync(self, blob: bytes) -> None:
        path = self.path(blob)
        try:
            with path.open("r+b") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise _refused(path, error) from error

    def rename(self, blob: bytes, whole: bool) -> None:
        now = self.path(blob)
        name = now.with_suffix(WHOLE if whole else PARTIAL)
        try:
            os.replace(now, name)
            sync_folder(self.folder)
        except FileNotFoundError:
            return
        except OSError as error:
            raise _refused(now, error) from error

    def remove(self, blob: bytes) -> None:
        for suffix in (WHOLE, PARTIAL):
            path = self.folder / f"{blob.hex()}{suffix}"
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise _refused(path, error) from error

    def found(self) -> tuple[bytes, ...]:
        names = [_NAME.fullmatch(path.name) for path in self.folder.iterdir()]
        return tuple(sorted({bytes.fromhex(name[1]): None for name in names if name is not None}))

    def free(self) -> int:
        return shutil.disk_usage(self.folder).free

    def where(self, blob: bytes) -> str:
        return str(self.path(blob))


def _refused(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"cannot write {path}: {error.strerror or error}")
