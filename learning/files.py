"""A model's state on disk: safetensors files that are whole or not there, and checked when read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from ..dht.blobs.tree import Buffer, build_tree
from ..dht.durable import sync_folder
from ..transport.errors import ConfigError
from .state import bytes_view

#: Metadata key that holds the digest of the tensors, in hex.
_DIGEST = "shoal.digest"
_CHECKED = "shoal.checked"

#: What safetensors calls them.
_KINDS = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def save_state(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write named tensors (any device) and text to ``path``, replacing what was there in one step. Blocking.

    Written beside ``path``, flushed to the disk, then renamed: after a crash ``path`` is the old file or the new one.
    Raises :class:`ConfigError` naming the file when the disk refuses.
    """
    # Where they stand: a copy would be the model once more, in memory.
    # The largest items first, so that all of them are aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    whole = {name: tensors[name].detach().cpu().contiguous() for name in order}
    notes = {**metadata, _DIGEST: _digest(whole, metadata)}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(_header(whole, notes))
                for name in whole:
                    file.write(bytes_view(whole[name]))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)
    except (OSError, KeyError) as error:
        raise ConfigError(f"cannot write {path}: {error}") from error


def _header(tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> bytes:
    """The beginning of a safetensors file, behind which the tensors' bytes stand, in this order."""
    entries: dict[str, object] = {"__metadata__": dict(notes)}
    at = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": _KINDS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what :func:`save_state` wrote: CPU tensors by name, and the metadata. Blocking.

    Raises :class:`ConfigError` naming the file when it is missing, truncated, altered or of another kind.
    """
    tensors, notes = load_tensors(path)
    if notes.pop(_CHECKED, None) is None:
        raise ConfigError(f"{path} was not written by Shoal: it carries no digest")
    return tensors, notes


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read any safetensors file: CPU tensors by name, and the metadata. Blocking. Raises as :func:`load_state`.

    The content is checked where the file carries a digest; :data:`_CHECKED` stands in the metadata then.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            notes = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path}") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    except (safetensors.SafetensorError, ValueError) as error:
        raise ConfigError(f"{path} is damaged or no safetensors file ({error}); restore or delete it") from error
    expected = notes.pop(_DIGEST, None)
    if expected is not None and _digest(tensors, notes) != expected:
        raise ConfigError(f"{path} is damaged: its content does not match its digest; restore or delete it")
    return tensors, notes if expected is None else {**notes, _CHECKED: ""}


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    header = repr((sorted(metadata.items()), [(n, tuple(t.shape), str(t.dtype)) for n, t in sorted(tensors.items())]))
    # Names are in the header: labels only count, as there may be longer ones than a label.
    parts: list[tuple[str, str, Buffer]] = [("header", "U8", header.encode())]
    parts += [(str(n), "U8", bytes_view(tensors[name])) for n, name in enumerate(sorted(tensors))]
    return build_tree(parts).id.hex()
