"""Strict messages: attrs classes to msgpack and back; no coercion, no unknown fields, bounded size, depth and counts.

Rules beyond msgpack:

- a class travels as a map of its field names, so a missing or an unknown field is refused by name;
- a value has exactly the declared type: no int for a float, no text or bytes for a tuple, no 1.0 for an enum's 1;
- floats are finite; keys are unique; extension types do not exist.

Field types: int, float, bool, str, bytes, None, Any (unchecked), :class:`PeerId`, enums, ``Literal``, ``X | None``,
``tuple[X, ...]``, ``tuple[X, Y]``, ``list[X]``, ``dict[K, V]``, attrs classes, and unions of attrs classes
that each have a required field of their own.
"""

from __future__ import annotations

import enum
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, TypeVar, cast, get_args, get_origin

import attrs
import cattrs
import msgpack

from . import defaults
from .errors import DecodeError, ProtocolMisuse
from .identity import PeerId

T = TypeVar("T")
Hook = Callable[[Any, Any], Any]

converter = cattrs.Converter(forbid_extra_keys=True, detailed_validation=False)


def pack(message: Any) -> bytes:
    """Encode an attrs instance. Raises :class:`ProtocolMisuse` for a float that is not finite: no peer takes it."""
    return cast(bytes, msgpack.packb(converter.unstructure(message, unstructure_as=type(message)), use_bin_type=True))


def unpack(kind: type[T], data: bytes | bytearray | memoryview, *, limit: int = defaults.MAX_MESSAGE) -> T:
    """Decode ``data`` strictly into ``kind``.

    Raises :class:`DecodeError` that names the message and what is wrong, and nothing else whatever the bytes. Allocates
    in proportion to ``len(data)``, which is refused above ``limit`` bytes before anything is decoded.
    """
    name = getattr(kind, "__name__", str(kind))
    if len(data) > limit:
        raise DecodeError(f"{name} of {len(data)} bytes, at most {limit} allowed")
    data = bytes(data)  # quicker to read than a view, even with the copy
    try:
        _survey(data)
        raw = msgpack.unpackb(data, raw=False, strict_map_key=False, use_list=True, object_pairs_hook=_unique)
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
        raise DecodeError(f"{name} is not a valid message: {_printable(error)}") from None
    try:
        return converter.structure(raw, kind)
    except (ValueError, TypeError, KeyError, AttributeError, cattrs.errors.StructureHandlerNotFoundError) as error:
        raise DecodeError(f"{name} does not decode: {_printable(error)}") from None


def _printable(error: Exception) -> str:
    return printable(str(error) or type(error).__name__)


def printable(text: str, limit: int = defaults.MAX_ERROR_TEXT) -> str:
    """A text that may quote a peer, for logs and terminals: of bounded length, without control characters."""
    return "".join(c if c.isprintable() else "?" for c in text[:limit])


# --- before decoding: what the headers announce ------------------------------------------------------------------


def _step(first: int) -> int:
    """Of the type with this first byte: how many bytes follow, of those that hold no length; else one of the below."""
    if first < 0x80 or first >= 0xE0 or first in (0xC0, 0xC2, 0xC3):  # small integers; nil, false, true
        return 0
    if 0xA0 <= first < 0xC0:  # short text
        return first & 0x1F
    for width, firsts in ((1, (0xCC, 0xD0)), (2, (0xCD, 0xD1)), (4, (0xCA, 0xCE, 0xD2)), (8, (0xCB, 0xCF, 0xD3))):
        if first in firsts:
            return width
    return _CONTAINER if first < 0xA0 or 0xDC <= first <= 0xDF else _SIZED if first in _WIDTHS else _REFUSED


_SIZED, _CONTAINER, _REFUSED = -1, -2, -3
#: First byte → width of the length in bytes, of binary and text.
_WIDTHS = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
#: First byte → width of the count and values per item, of arrays and maps that are not short.
_COUNTED = {0xDC: (2, 1), 0xDD: (4, 1), 0xDE: (2, 2), 0xDF: (4, 2)}
_STEPS = tuple(map(_step, range(256)))


def _survey(data: bytes) -> None:
    """Walk the headers and refuse what would make the decoder allocate or recurse out of proportion.

    msgpack allocates an announced array before its items arrive, nested ones one inside the other: some kB of headers
    could otherwise take gigabytes. Raises ValueError. Every message comes through here: a step is a look at a table.
    """
    end, at, items, steps = len(data), 0, 1, _STEPS
    left, around = 1, list[int]()  # values still to come: in the innermost container, in those around it
    while True:
        if not left:
            if not around:
                break
            left = around.pop()
            continue
        left -= 1
        if at >= end:
            raise ValueError("ends early")
        first = data[at]
        at += 1
        step = steps[first]
        if step >= 0:
            at += step
            continue
        if step == _SIZED:
            width = _WIDTHS[first]
            at += width + int.from_bytes(data[at : at + width], "big")
            continue
        if step == _REFUSED:
            raise ValueError(f"type byte 0x{first:02x} (extension or unused) is not allowed")
        if first < 0xA0:
            count = (first & 0x0F) * (2 if first < 0x90 else 1)
        else:
            width, each = _COUNTED[first]
            count = int.from_bytes(data[at : at + width], "big") * each
            at += width
        if count > end - at:
            raise ValueError(f"announces {count} values with {max(end - at, 0)} bytes left")
        items += count
        if items > defaults.MAX_ITEMS:
            raise ValueError(f"more than {defaults.MAX_ITEMS} values")
        if len(around) + 1 >= defaults.MAX_DEPTH:
            raise ValueError(f"nested deeper than {defaults.MAX_DEPTH}")
        around.append(left)
        left = count
    if at != end:
        raise ValueError("ends early" if at > end else f"{end - at} bytes too many")


def _unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice in a map")
    return result


# --- after decoding: exactly the declared types ------------------------------------------------------------------


def expect(kind: type, value: Any) -> Any:
    """``value`` if it is exactly of type ``kind``; for structure hooks. Raises ValueError."""
    if type(value) is not kind:
        raise ValueError(f"expected {kind.__name__}, got {type(value).__name__}")
    return value


def _structure_float(value: Any, _: Any) -> float:
    if not math.isfinite(expect(float, value)):
        raise ValueError("expected a finite float")
    return cast(float, value)


def _unstructure_float(value: Any) -> float:
    number = float(value)  # an int is a float to the type checker, but not on the wire
    if not math.isfinite(number):
        raise ProtocolMisuse(f"{number} cannot travel in a message: floats are finite on the wire")
    return number


def _one_of(choices: dict[tuple[type, Any], Any]) -> Hook:
    def structure(value: Any, _: Any) -> Any:
        try:
            return choices[type(value), value]
        except (KeyError, TypeError):  # TypeError: an unhashable value
            allowed = ", ".join(repr(choice) for _, choice in choices)
            raise ValueError(f"expected one of {allowed}, got {value!r:.50}") from None

    return structure


@functools.cache
def _enum_hook(kind: Any) -> Hook:
    return _one_of({(type(member.value), member.value): member for member in kind})


def _literal_hook(kind: Any) -> Hook:
    return _one_of({(type(choice), choice): choice for choice in get_args(kind)})


def _sequence_hook(kind: Any) -> Hook:
    origin, inner = get_origin(kind), get_args(kind)

    def structure(value: Any, _: Any) -> Any:
        expect(list, value)
        if origin is tuple and inner[-1:] != (Ellipsis,):
            if len(value) != len(inner):
                raise ValueError(f"expected {len(inner)} values, got {len(value)}")
            return tuple(converter.structure(v, k) for v, k in zip(value, inner, strict=True))
        hook = converter.get_structure_hook(inner[0])
        return origin(hook(v, inner[0]) for v in value)

    return structure


def _dict_hook(kind: Any) -> Hook:
    keys, values = get_args(kind)

    def structure(value: Any, _: Any) -> Any:
        expect(dict, value)
        return {converter.structure(k, keys): converter.structure(v, values) for k, v in value.items()}

    return structure


def _class_hook(kind: Any) -> Hook:
    attrs.resolve_types(kind)
    fields = [field for field in attrs.fields(kind) if field.init]
    # Every message comes through here: plain types are looked at on the spot, other hooks are looked up once. Not
    # before the first message, as a class may hold itself. Threads decode too, so a table is put in place whole.
    table: tuple[tuple[str, str, Any, bool, Hook | None], ...] | None = None

    def structure(value: Any, _: Any) -> Any:
        nonlocal table
        expect(dict, value)
        if table is None:
            table = tuple((f.name, f.alias, f.type, f.default is attrs.NOTHING, _field_hook(f.type)) for f in fields)
        arguments = {}
        for name, alias, type_, required, hook in table:
            if name in value:
                try:
                    arguments[alias] = expect(type_, value[name]) if hook is None else hook(value[name], type_)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None
            elif required:
                raise ValueError(f"missing field {name!r}")
        if len(arguments) != len(value):
            unknown = next(key for key in value if key not in [field.name for field in fields])
            raise ValueError(f"unknown field {unknown!r:.50}")
        return kind(**arguments)

    return structure


def _field_hook(kind: Any) -> Hook | None:
    """None for the types that :func:`expect` checks."""
    return None if kind in (int, str, bytes, bool) else converter.get_structure_hook(kind)


def _refused_type(kind: Any) -> Hook:
    raise cattrs.errors.StructureHandlerNotFoundError(f"{kind} is not a type for a field", type_=kind)


def _structure_exact(value: Any, kind: Any) -> Any:
    # cattrs gives an IntEnum or StrEnum the hook of the type beneath
    return _enum_hook(kind)(value, kind) if isinstance(kind, enum.EnumMeta) else expect(kind, value)


def _origin_in(*origins: Any) -> Callable[[Any], bool]:
    return lambda kind: get_origin(kind) in origins


_VAGUE = (list, tuple, dict, set, frozenset)  # without element types, or without an order

# The last one registered that fits is taken.
converter.register_structure_hook_factory(lambda kind: kind in _VAGUE, _refused_type)
converter.register_structure_hook_factory(_origin_in(set, frozenset), _refused_type)
converter.register_structure_hook_factory(_origin_in(tuple, list), _sequence_hook)
converter.register_structure_hook_factory(_origin_in(dict), _dict_hook)
converter.register_structure_hook_factory(_origin_in(Literal), _literal_hook)
converter.register_structure_hook_factory(lambda kind: isinstance(kind, type) and attrs.has(kind), _class_hook)
converter.register_structure_hook_factory(lambda kind: isinstance(kind, enum.EnumMeta), _enum_hook)
converter.register_structure_hook_func(lambda kind: kind in (None, type(None)), lambda v, _: expect(type(None), v))
for _kind in (int, str, bytes, bool):
    converter.register_structure_hook(_kind, _structure_exact)
converter.register_structure_hook(float, _structure_float)
converter.register_structure_hook(PeerId, lambda value, _: PeerId(expect(bytes, value)))
converter.register_unstructure_hook(PeerId, lambda value: value.key)
converter.register_unstructure_hook(float, _unstructure_float)
# msgpack tells bytes from text by itself; cattrs would otherwise base64 bytes.
converter.register_unstructure_hook(bytes, lambda value: value)
