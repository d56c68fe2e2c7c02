"""What a user reduces (a tensor, or a list, tuple or dict of them) as one flat float32 vector on the host, and back."""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Iterable
from itertools import accumulate
from typing import Any, TypeAlias

import attrs
import numpy as np
import torch
from torch import Tensor

from ...transport.errors import ConfigError
from ...transport.wire import printable
from .staging import Copy, LaneFor, lane

#: One tensor of any shape; a list, a tuple (a named one, too) or a dict of tensors.
Tensors: TypeAlias = Tensor | list[Tensor] | tuple[Tensor, ...] | dict[str, Tensor]

#: Reduced in float32 and rounded to their own dtype afterwards.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


#: Characters of :attr:`Bundle.layout`.
LAYOUT = 80


@attrs.frozen(eq=False)
class Bundle:
    """Tensors and where each of them stands in a flat vector of ``size`` float32 elements, without gaps.

    ``given``: what they came in. ``tensors``: detached views of them, in the order of the vector: that of a list or
    tuple, of a dict that of its sorted keys, so that peers agree however their dicts were built. ``labels``: what
    to call them. ``offsets``: of their first elements.
    """

    given: Tensors
    tensors: tuple[Tensor, ...]
    labels: tuple[str, ...]
    offsets: tuple[int, ...]
    size: int

    @classmethod
    def of(cls, given: Tensors) -> Bundle:
        """Raises :class:`ConfigError` naming the first thing that cannot be reduced, by its place, and its dtype."""
        named = list(_named(given))
        for label, tensor in named:
            wrong = _unfit(tensor)
            if wrong is not None:
                raise ConfigError(f"{label} cannot be reduced: {wrong}")
        sizes = [tensor.numel() for _, tensor in named]
        if not sum(sizes):
            raise ConfigError(f"nothing to reduce: {len(named)} tensors without a single element")
        return cls(
            given,
            tuple(tensor.detach() for _, tensor in named),
            tuple(label for label, _ in named),
            (0, *accumulate(sizes))[:-1],
            sum(sizes),
        )

    def whole(self) -> Tensor | None:
        """The vector itself, if a single contiguous float32 CPU tensor is all there is: then nothing is copied."""
        held = [tensor for tensor in self.tensors if tensor.numel()]
        if len(held) == 1 and _is_vector(held[0]):
            return held[0].view(-1)
        return None

    @property
    def layout(self) -> str:
        """The shapes in order, with the keys of a dict, in words: equal where these are.

        All of them where they are few (``3x5, 7``), else the first ones, their number, and a digest of all: at most
        :data:`LAYOUT` characters.
        """
        keys = [f"{key!r} " for key in sorted(self.given)] if isinstance(self.given, dict) else [""] * len(self.tensors)
        shapes = [key + ("x".join(map(str, t.shape)) or "scalar") for key, t in zip(keys, self.tensors, strict=True)]
        text = ", ".join(shapes)
        if len(text) <= LAYOUT:
            return text
        digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"shoal layout").hexdigest()
        end = f" … {len(shapes)} tensors #{digest}"
        return printable(text[: LAYOUT - len(end)].rpartition(",")[0] + end)

    def name_at(self, index: int) -> str:
        """The label of the tensor that element ``index`` belongs to."""
        return self.labels[bisect.bisect_right(self.offsets, index) - 1]

    def gather(self, vector: Tensor, lane_for: LaneFor = lane) -> Copy:
        """Copy the tensors into ``vector`` (float32, CPU, ``(size,)``), as a :class:`Copy` that yields how much of it
        is there. They must not change until it has ended."""
        pairs = zip(self.tensors, self._cut(vector), strict=True)
        return Copy("fetch", [(tensor, part) for tensor, part in pairs if tensor.numel()], lane_for)

    def blank(self) -> Tensors:
        """Tensors like those given, with nothing in them yet: same structure, shapes, dtypes and devices."""
        return self._rebuild([torch.empty_like(t, memory_format=torch.contiguous_format) for t in self.tensors])

    def views(self, vector: Tensor) -> Tensors | None:
        """``vector`` as what was given, if its own memory will do: when all tensors are float32 on the CPU."""
        if any(tensor.dtype != torch.float32 or tensor.device.type != "cpu" for tensor in self.tensors):
            return None
        parts = zip(self._cut(vector), self.tensors, strict=True)
        return self._rebuild([part.view(tensor.shape) for part, tensor in parts])

    def scatter(self, vector: Tensor, target: Bundle, lane_for: LaneFor = lane) -> Copy:
        """Write ``vector`` into the tensors of ``target``, which has our shapes, rounded to their dtypes."""
        pairs = zip(target.tensors, self._cut(vector), strict=True)
        return Copy("deliver", [(tensor, part) for tensor, part in pairs if tensor.numel()], lane_for)

    def target(self, out: Tensors) -> Bundle:
        """``out`` as where a result goes. Raises :class:`ConfigError` when it does not fit what is reduced."""
        target = Bundle.of(out)
        if target.labels != self.labels:
            raise ConfigError(f"out holds {_count(target)}, the tensors to reduce are {_count(self)}")
        for label, ours, theirs in zip(self.labels, self.tensors, target.tensors, strict=True):
            if ours.shape != theirs.shape:
                raise ConfigError(f"{label} of out has shape {tuple(theirs.shape)}, not {tuple(ours.shape)}")
            if _overlaps_itself(theirs):
                raise ConfigError(f"{label} of out has several elements in one place (it was expanded)")
        return target

    def _cut(self, vector: Tensor) -> tuple[Tensor, ...]:
        return torch.split(vector, [tensor.numel() for tensor in self.tensors])

    def _rebuild(self, tensors: list[Tensor]) -> Tensors:
        given: Any = self.given
        if isinstance(given, Tensor):
            return tensors[0]
        if isinstance(given, dict):
            by_key = dict(zip(sorted(given), tensors, strict=True))
            return {key: by_key[key] for key in given}
        if isinstance(given, list):
            return tensors
        return type(given)(*tensors) if hasattr(given, "_fields") else tuple(tensors)


def empty_vector(size: int) -> Tensor:
    """Memory for a vector: float32, CPU, not initialised. From numpy, which asks for huge pages."""
    return torch.from_numpy(np.empty(size, dtype=np.float32))


def _named(given: object) -> Iterable[tuple[str, Tensor]]:
    match given:
        case Tensor():
            return [("the tensor", given)]
        case dict():
            for key in given:
                if not isinstance(key, str):
                    raise ConfigError(f"keys of a dict of tensors are strings, not {type(key).__name__} ({key!r})")
            named: list[tuple[str, object]] = [(f"tensor {key!r}", given[key]) for key in sorted(given)]
        case list() | tuple():
            named = [(f"tensor {index}", value) for index, value in enumerate(given)]
        case _:
            raise ConfigError(f"reduce takes a tensor, or a list, tuple or dict of tensors, not {_kind(given)}")
    found = []
    for label, value in named:
        if not isinstance(value, Tensor):
            raise ConfigError(f"{label} cannot be reduced: it is {_kind(value)}, not a torch tensor")
        found.append((label, value))
    return found


def _kind(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def _unfit(tensor: Tensor) -> str | None:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.layout != torch.strided:
        return f"it is sparse ({str(tensor.layout).removeprefix('torch.')}, {dtype}); make it dense with .to_dense()"
    if tensor.is_complex():
        return f"its dtype is {dtype}; reduce torch.view_as_real(tensor)"
    if tensor.dtype not in DTYPES:
        return f"its dtype is {dtype}; float32, float16 and bfloat16 can be (tensor.float() makes one)"
    if tensor.device.type == "meta":
        return "it is on the meta device and has no values"
    return None


def _is_vector(tensor: Tensor) -> bool:
    return (
        tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.is_contiguous() and not tensor.is_neg()
    )


def _overlaps_itself(tensor: Tensor) -> bool:
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.numel() > 0 and any(size > 1 and stride == 0 for size, stride in steps)


def _count(bundle: Bundle) -> str:
    return f"{len(bundle.labels)} ({', '.join(bundle.labels[:3])}{' …' if len(bundle.labels) > 3 else ''})"
