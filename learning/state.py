"""A model's whole state as one flat float32 vector, and back."""

from __future__ import annotations

import bisect
from collections.abc import Collection, Sequence

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..transport.errors import ConfigError, ProtocolMisuse
from .reduce.staging import Copy
from .spec import ParameterSpec
from .task import Signature, state_tensors

#: Integers up to here are exact in float32.
_EXACT_INTEGER = 1 << 24


@attrs.frozen
class Layout:
    """Where each parameter and persistent buffer stands in the flat vector (:func:`task.state_tensors` order).

    Integer and boolean buffers (BatchNorm's step counter) travel as float32 too, so that a joiner receives the whole
    state in one vector. They are exact up to 2^24 and rounded to the nearest integer, ties to even, when loaded, which
    gives a mean of counters a meaning. float64 parameters are rounded to float32 on the way out; float16 and bfloat16
    are rounded on the way in.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    offsets: tuple[int, ...]
    size: int

    @classmethod
    def of(cls, model: nn.Module) -> Layout:
        """The layout of ``model``. Raises :class:`ConfigError` for a dtype that has no place in a float32 vector."""
        return cls.of_signature(
            tuple(
                ParameterSpec(n, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in state_tensors(model)
            )
        )

    @classmethod
    def of_signature(cls, signature: Signature) -> Layout:
        """The layout of a model with this signature."""
        offsets: list[int] = []
        size = 0
        for spec in signature:
            if spec.dtype not in _DTYPES:
                raise ConfigError(f"parameter {spec} cannot be trained in a swarm: its dtype has no float32 form")
            offsets.append(size)
            size += int(np.prod(spec.shape, dtype=np.int64))
        return cls(
            names=tuple(s.name for s in signature),
            shapes=tuple(s.shape for s in signature),
            dtypes=tuple(s.dtype for s in signature),
            offsets=tuple(offsets),
            size=size,
        )

    @property
    def signature(self) -> Signature:
        return tuple(map(ParameterSpec, self.names, self.shapes, self.dtypes))

    def name_at(self, index: int) -> str:
        """The name of the parameter that holds element ``index``."""
        if not 0 <= index < self.size:
            raise ProtocolMisuse(f"element {index} lies outside a state of {self.size}")
        # Of several offsets that are equal the last one belongs to a parameter that is not empty.
        return self.names[bisect.bisect_right(self.offsets, index) - 1]

    def parts(self, vector: Tensor, names: Collection[str]) -> list[tuple[str, Tensor]]:
        """The tensors called ``names``, each as its stretch of ``vector``, 1-D and not copied."""
        _check_vector(self, vector)
        wanted, sizes = dict.fromkeys(names), (int(np.prod(shape, dtype=np.int64)) for shape in self.shapes)
        return [
            (name, vector[offset : offset + size])
            for name, offset, size in zip(self.names, self.offsets, sizes, strict=True)
            if name in wanted
        ]

    def encode(self) -> bytes:
        """Canonical bytes of the layout, for digests: distinct layouts have distinct bytes."""
        return repr([(s.name, s.shape, s.dtype) for s in self.signature]).encode()


_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32, torch.float16, torch.bfloat16, torch.float64,
        torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool,
    )
}  # fmt: skip


def flatten(layout: Layout, tensors: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
    """Copy ``tensors`` (any device, in the layout's order) into one float32 CPU vector ``(layout.size,)``.

    Raises :class:`ConfigError` naming an integer buffer whose values float32 cannot hold.
    """
    if out is None:
        out = torch.empty(layout.size, dtype=torch.float32)
    _check_vector(layout, out)
    if tuple(tuple(t.shape) for t in tensors) != layout.shapes:
        raise ProtocolMisuse("the tensors do not have the layout's shapes")
    pairs = []
    for name, offset, tensor in zip(layout.names, layout.offsets, tensors, strict=True):
        source = tensor.detach()
        if not source.is_floating_point() and source.dtype != torch.bool and source.numel():
            low, high = (int(v) for v in source.aminmax())
            if max(-low, high) > _EXACT_INTEGER:
                raise ConfigError(f"buffer {name} holds integers beyond 2^24 ({low}..{high}); make it not persistent")
        pairs.append((source, out[offset : offset + source.numel()]))
    Copy("fetch", pairs).run()
    return out


def flatten_model(layout: Layout, model: nn.Module, out: Tensor | None = None) -> Tensor:
    """:func:`flatten` of the model's state: a copy that later training does not touch."""
    return flatten(layout, [tensor for _, tensor in state_tensors(model)], out)


def unflatten(layout: Layout, vector: Tensor) -> dict[str, Tensor]:
    """The vector as named CPU tensors with the layout's shapes and dtypes. float32 ones are views of ``vector``."""
    _check_vector(layout, vector)
    state: dict[str, Tensor] = {}
    for spec, offset in zip(layout.signature, layout.offsets, strict=True):
        size = int(np.prod(spec.shape, dtype=np.int64))
        state[spec.name] = _cast(vector[offset : offset + size].view(spec.shape), _DTYPES[spec.dtype])
    return state


def unflatten_into(layout: Layout, vector: Tensor, model: nn.Module) -> None:
    """Load ``vector`` into the model's parameters and buffers, on whatever devices they are."""
    state = unflatten(layout, vector)
    own = state_tensors(model)
    if [name for name, _ in own] != list(layout.names):
        raise ProtocolMisuse("the model does not have the layout's parameters")
    Copy("deliver", [(tensor, state[name]) for name, tensor in own]).run()


def unite(layout: Layout, model: nn.Module) -> Tensor | None:
    """Make the model's parameters and buffers stretches of one vector, its state, and return that. None, and the model
    stays as it is, where one of them is not float32 on the CPU. Before there is an optimiser's state."""
    own = state_tensors(model)
    if any(tensor.dtype != torch.float32 or tensor.device.type != "cpu" for _, tensor in own):
        return None
    # Memory is taken page by page as it is written to, and that of each tensor given back before the next one.
    vector, homes = torch.empty(layout.size, dtype=torch.float32), dict(model.named_parameters())
    homes |= dict(model.named_buffers())  # type: ignore[arg-type]
    for name, tensor in layout.parts(vector, layout.names):
        home = homes[name]
        tensor.copy_(home.detach().reshape(-1))
        home.data = tensor.view(home.shape)
    return vector


def numpy_view(tensor: Tensor) -> NDArray[np.generic]:
    """The memory of a contiguous CPU tensor as an array, not copied."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ProtocolMisuse("only a contiguous CPU tensor can be viewed")
    array: NDArray[np.generic] = tensor.detach().numpy()
    return array


def bytes_view(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor of any dtype as writable bytes, not copied."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ProtocolMisuse("only a contiguous CPU tensor can be viewed")
    if not tensor.numel():
        return memoryview(bytearray())
    return tensor.detach().view(-1).view(torch.uint8).numpy().data


def _check_vector(layout: Layout, vector: Tensor) -> None:
    if vector.dtype != torch.float32 or tuple(vector.shape) != (layout.size,) or vector.device.type != "cpu":
        raise ProtocolMisuse(
            f"the state is a float32 CPU vector of {layout.size}, got {tuple(vector.shape)} {vector.dtype} on "
            f"{vector.device}"
        )


def _cast(values: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.bool:
        return values >= 0.5
    if not dtype.is_floating_point:
        info = torch.iinfo(dtype)
        # Clamped within float32's exact integers: a hostile or overflowed value must not wrap around.
        return values.round().clamp(max(info.min, -_EXACT_INTEGER), min(info.max, _EXACT_INTEGER)).to(dtype)
    return values.to(dtype)
