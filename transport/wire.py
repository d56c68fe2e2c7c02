"""Strict messages: attrs classes to msgpack and back, with no coercion, no unknown fields, bounded depth.

Two rules beyond msgpack: a class travels as a map of its field names (so a missing or an unknown field
is refused by name), and an :class:`int` is never taken for a :class:`float` or the reverse.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar, cast

import cattrs
import msgpack
from cattrs.errors import ClassValidationError

from . import defaults
from .errors import DecodeError
from .identity import PeerId

T = TypeVar("T")

converter = cattrs.Converter(forbid_extra_keys=True, detailed_validation=False)


def _strict(kind: type) -> Any:
    def structure(value: Any, _: Any) -> Any:
        if type(value) is not kind:
            raise ValueError(f"expected {kind.__name__}, got {type(value).__name__}")
        return value

    return structure


for _kind in (int, str, bytes, bool):
    converter.register_structure_hook(_kind, _strict(_kind))


def _structure_float(value: Any, _: Any) -> float:
    if type(value) is not float:
        raise ValueError(f"expected float, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError("expected a finite float")
    return value


converter.register_structure_hook(float, _structure_float)
# msgpack tells bytes from text by itself; cattrs would otherwise base64 bytes.
converter.register_unstructure_hook(bytes, lambda value: value)
converter.register_structure_hook(PeerId, lambda value, _: PeerId(_strict(bytes)(value, bytes)))
converter.register_unstructure_hook(PeerId, lambda value: value.key)


def pack(message: Any) -> bytes:
    """Encode an attrs instance."""
    return cast(bytes, msgpack.packb(converter.unstructure(message, unstructure_as=type(message)), use_bin_type=True))


def unpack(kind: type[T], data: bytes | bytearray | memoryview, *, limit: int = defaults.MAX_MESSAGE) -> T:
    """Decode ``data`` strictly into ``kind``.

    Raises :class:`DecodeError` that names the message and what is wrong. Allocates at most in
    proportion to ``len(data)``, which is refused above ``limit`` bytes before anything is decoded.
    """
    name = getattr(kind, "__name__", str(kind))
    if len(data) > limit:
        raise DecodeError(f"{name} of {len(data)} bytes, at most {limit} allowed")
    try:
        raw = msgpack.unpackb(data, raw=False, strict_map_key=True, use_list=True)
    except (ValueError, msgpack.exceptions.UnpackException, RecursionError) as error:
        raise DecodeError(f"{name} is not valid msgpack: {error or type(error).__name__}") from None
    try:
        return converter.structure(raw, kind)
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        ClassValidationError,
        cattrs.errors.ForbiddenExtraKeysError,
        cattrs.errors.StructureHandlerNotFoundError,
        RecursionError,
    ) as error:
        reason = f"missing field {error}" if isinstance(error, KeyError) else str(error)
        raise DecodeError(f"{name} does not decode: {reason}") from None
