"""Batches and activations as messages and bodies: tensors one after the other, nesting as a line of JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...transport.errors import ConfigError, DecodeError
from ..reduce.codecs import resolve
from ..task import Batch
from . import defaults
from .messages import Shape

_FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
_OTHERS = {
    "int64": torch.int64, "int32": torch.int32, "int16": torch.int16, "int8": torch.int8, "uint8": torch.uint8,
    "bool": torch.bool,
}  # fmt: skip
_DTYPES = {**_FLOATS, **_OTHERS}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def pack_tensor(tensor: Tensor, codec: str = "fp32") -> tuple[Shape, memoryview]:
    """A tensor on its way, and its bytes. ``codec``: of fp32 tensors, all others travel as they are.

    Raises :class:`ConfigError` for a dtype that does not travel.
    """
    name = name_of(tensor.dtype)
    if name not in _DTYPES:
        raise ConfigError(f"a tensor of dtype {name} cannot travel between stages")
    plain = tensor.detach().to("cpu").contiguous()
    if codec == "fp32" or name != "float32" or not plain.numel():
        data = bytes_of(plain)
        return Shape(tuple(plain.shape), name, "", len(data)), data
    if not bool(torch.isfinite(plain).all()):
        # No codec takes these: whoever gets them sees the same as we do.
        return pack_tensor(plain)
    coder = resolve(codec)
    out = bytearray(coder.wire_size(plain.numel()))
    coder.encode(plain.reshape(-1), out)
    return Shape(tuple(plain.shape), name, codec, len(out)), memoryview(out)


def size_fault(shape: Shape) -> str | None:
    """Why ``shape`` cannot be: an unknown dtype or codec, or bytes that do not fit."""
    if shape.dtype not in _DTYPES:
        return f"a tensor of dtype {shape.dtype!r}"
    count = 1
    for dim in shape.dims:
        count *= dim
    if not shape.codec:
        size = count * torch.empty(0, dtype=_DTYPES[shape.dtype]).element_size()
    else:
        try:
            size = resolve(shape.codec).wire_size(count)
        except ConfigError as error:
            return str(error)
        if shape.dtype != "float32":
            return f"a tensor of dtype {shape.dtype} in a codec"
    return None if size == shape.size else f"{shape.size} bytes for a tensor of {size}"


def unpack_tensor(shape: Shape, data: bytearray) -> Tensor:
    """Raises :class:`DecodeError` for what :func:`size_fault` finds."""
    wrong = size_fault(shape)
    if wrong is not None or len(data) != shape.size:
        raise DecodeError(wrong or f"{len(data)} bytes for a tensor of {shape.size}")
    if not shape.size:
        return torch.empty(shape.dims, dtype=_DTYPES[shape.dtype])
    if not shape.codec:
        if shape.dtype == "bool" and data.translate(None, b"\0\1"):
            raise DecodeError("a tensor of dtype bool with other bytes than 0 and 1")
        return torch.frombuffer(data, dtype=_DTYPES[shape.dtype]).reshape(shape.dims)
    coder, count = resolve(shape.codec), 1
    for dim in shape.dims:
        count *= dim
    if (wrong := coder.fault(data, count)) is not None:
        raise DecodeError(wrong)
    out = torch.empty(count, dtype=torch.float32)
    coder.decode(data, out)
    return out.reshape(shape.dims)


def pack_batch(batch: Batch, given: Tensor | None) -> tuple[list[Tensor], str]:
    """The tensors of ``batch`` in order, and how they are nested. ``given``: what the model is called with; where the
    batch holds that very tensor, only its shape travels: no stage after the first computes with it.

    Raises :class:`ConfigError` for a batch that holds anything but tensors, tuples, lists and dicts.
    """
    tensors: list[Tensor] = []

    def walk(value: Any, depth: int) -> Any:
        if depth > defaults.MAX_DEPTH:
            raise ConfigError(f"a batch nested deeper than {defaults.MAX_DEPTH} levels cannot travel between stages")
        match value:
            case Tensor() if value is given:
                if name_of(value.dtype) not in _DTYPES or not _are_dims(list(value.shape)):
                    raise ConfigError(
                        f"a tensor of dtype {name_of(value.dtype)} and {tuple(value.shape)} cannot travel"
                    )
                return {"gone": list(value.shape), "as": name_of(value.dtype)}
            case Tensor():
                tensors.append(value)
                return len(tensors) - 1
            case dict() if all(isinstance(key, str) for key in value):
                return {"dict": [[key, walk(item, depth + 1)] for key, item in value.items()]}
            case tuple() if not hasattr(value, "_fields"):
                return {"tuple": [walk(item, depth + 1) for item in value]}
            case list():
                return [walk(item, depth + 1) for item in value]
        raise ConfigError(
            f"a batch with a {type(value).__name__} in it cannot travel between stages: use tensors in plain tuples, "
            "lists and dicts"
        )

    nest = json.dumps(walk(batch, 0), separators=(",", ":"))
    if len(nest) > defaults.MAX_NEST or len(tensors) >= defaults.MAX_TENSORS:
        raise ConfigError(f"a batch of {len(tensors)} tensors cannot travel between stages")
    return tensors, nest


def unpack_batch(tensors: Sequence[Tensor], nest: str) -> Batch:
    """Raises :class:`DecodeError`."""
    if len(nest) > defaults.MAX_NEST:
        raise DecodeError(f"a nesting of {len(nest)} characters")

    def build(value: Any, depth: int) -> Batch:
        if depth > defaults.MAX_DEPTH:
            raise DecodeError("a batch that is nested too deeply")
        match value:
            case bool():
                pass
            case int() if 0 <= value < len(tensors):
                return tensors[value]
            case list():
                return [build(item, depth + 1) for item in value]
            case {"tuple": list(items), **rest} if not rest:
                return tuple(build(item, depth + 1) for item in items)
            case {"dict": list(items), **rest} if not rest and all(_is_item(item) for item in items):
                return {key: build(item, depth + 1) for key, item in items}
            case {"gone": list(dims), "as": str(dtype), **rest} if not rest and dtype in _DTYPES and _are_dims(dims):
                return torch.zeros((), dtype=_DTYPES[dtype]).expand(dims)
        raise DecodeError("a nesting that describes no batch")

    try:
        parsed = json.loads(nest)
    except (ValueError, RecursionError) as error:
        raise DecodeError(f"a nesting that is no JSON: {error}") from None
    return build(parsed, 0)


def _is_item(item: object) -> bool:
    return isinstance(item, list) and len(item) == 2 and isinstance(item[0], str)


def _are_dims(dims: list[Any]) -> bool:
    """Each by itself and all together: a product of great ones and a zero is nothing, but no tensor either."""
    whole = all(isinstance(d, int) and not isinstance(d, bool) and 0 <= d <= defaults.MAX_ELEMENTS for d in dims)
    return len(dims) <= defaults.MAX_DIMS and whole and math.prod(d or 1 for d in dims) <= defaults.MAX_ELEMENTS
