"""Random directions z that all peers draw alike from a seed, and models moved along them.

``signs`` (the default): every coordinate is -1 or +1, the perturbation of Spall's SPSA (1992). The bits come from
Philox4x64, a counter on integers, and moving a number by ±c is one IEEE addition: the same bits on every machine, in
an eighth of the time of a Gaussian. ``normal``: the Gaussian of MeZO and Just One Byte, from torch's CPU generator,
float32; libm and the width of the vector unit are in its bits, so that only like machines draw alike.

Each tensor has a stream of its own, keyed by (seed, name of the tensor): neither the order of parameters nor frozen
ones matter. A model is never moved in place for a look along z (θ + εz - εz is not θ in floating point): whatever uses
a parameter within :class:`Moved` gets a moved copy of it, which is gone when the operation is done. θ itself stays
untouched, bit for bit, and what it costs is the largest parameter once more; of a linear layer a block of its rows.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import attrs
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import defaults, exact

Kind: TypeAlias = Literal["signs", "normal"]
Floats: TypeAlias = NDArray[np.float32]

#: Eight coordinates for each byte of random bits, the lowest bit first: 0 is -1, 1 is +1.
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
_SIGNS: Floats = 2 * _BITS.astype(np.float32) - 1


def seed_of(run: bytes, round: int, peer: bytes, sample: int) -> bytes:
    """16 bytes that name the direction of gradient ``sample`` of ``peer`` in ``round`` of ``run``."""
    h = hashlib.blake2b(digest_size=16, person=b"shoal spsa v1")
    for part in (run, round.to_bytes(8, "big"), peer, sample.to_bytes(4, "big")):
        h.update(len(part).to_bytes(4, "big") + part)
    return h.digest()


@attrs.frozen
class Direction:
    """z, for all tensors of a model. ``seed``: 16 bytes."""

    seed: bytes
    kind: Kind = "signs"

    def steps(self, name: str, size: int, step: float) -> _Steps:
        """``step`` · z of the tensor ``name`` of ``size`` elements, to be taken piece by piece, from the front."""
        digest = hashlib.blake2b(name.encode(), key=self.seed, digest_size=16, person=b"shoal spsa z").digest()
        return _Signs(digest, step) if self.kind == "signs" else _Normal(digest, size, step)


class _Steps:
    def take(self, out: Floats) -> Floats:
        """The next ``len(out)`` elements; written to ``out``, or given as they are."""
        raise NotImplementedError


class _Signs(_Steps):
    def __init__(self, digest: bytes, step: float) -> None:
        key = np.frombuffer(digest, dtype="<u8").astype(np.uint64)
        self._bits, self._table = np.random.Philox(key=key), _SIGNS * np.float32(step)

    def take(self, out: Floats) -> Floats:
        # Pieces are multiples of 64 elements but for the last one, so that no bit is lost between two.
        words = self._bits.random_raw(-(-len(out) // 64)).astype("<u8", copy=False).view(np.uint8)
        if len(out) % 8 == 0:
            np.take(self._table, words[: len(out) // 8], axis=0, out=out.reshape(-1, 8), mode="clip")
        else:
            out[:] = self._table[words].reshape(-1)[: len(out)]
        return out


class _Normal(_Steps):
    def __init__(self, digest: bytes, size: int, step: float) -> None:
        # In one piece: a draw of n numbers is not the beginning of one of more.
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % (1 << 63))
        self._all: Floats = torch.randn(size, generator=generator).numpy()
        self._all *= np.float32(step)
        self._at = 0

    def take(self, out: Floats) -> Floats:
        self._at += len(out)
        return self._all[self._at - len(out) : self._at]


def trainable_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are moved, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad and p.is_floating_point()}


# -- for a look ------------------------------------------------------------------------------------------------------


def moved(name: str, tensor: Tensor, direction: Direction, step: float) -> Tensor:
    """``tensor`` + ``step`` · z, rounded once to its dtype, on its device."""
    return _moved(tensor, direction.steps(name, tensor.numel(), step))


def moved_rows(name: str, tensor: Tensor, direction: Direction, step: float) -> Iterator[Tensor]:
    """:func:`moved` of a matrix, in stretches of rows, about ``defaults.LOOK_BLOCK`` elements each, from the first."""
    steps = direction.steps(name, tensor.numel(), step)
    rows = max(64, defaults.LOOK_BLOCK // tensor.shape[1] // 64 * 64)
    for start in range(0, len(tensor), rows):
        yield _moved(tensor[start : start + rows], steps)


def _moved(tensor: Tensor, steps: _Steps) -> Tensor:
    found = _room(tensor.numel())
    out = found.numpy()
    source: Floats | None = None
    if tensor.device.type == "cpu" and tensor.dtype == torch.float32 and tensor.is_contiguous():
        source = tensor.detach().view(-1).numpy()
    for start in range(0, len(out), defaults.EXACT_CHUNK):
        piece = out[start : start + defaults.EXACT_CHUNK]
        taken = steps.take(piece)
        if source is not None:
            np.add(source[start : start + len(piece)], taken, out=piece)
        elif taken is not piece:
            piece[:] = taken
    if source is not None:
        return found.view(tensor.shape)
    return (tensor.detach().float() + found.to(tensor.device).view(tensor.shape)).to(tensor.dtype)


def _room(size: int) -> Tensor:
    """A vector whose memory goes back to the system with it: an allocator keeps a few large ones that were given back,
    and three layers instead of one would be in memory."""
    if 4 * size < defaults.BUCKET // 8:
        return torch.empty(size, dtype=torch.float32)
    return torch.frombuffer(mmap.mmap(-1, 4 * size), dtype=torch.float32)


class Moved(TorchFunctionMode):
    """Within it, every operation that uses one of ``parameters`` uses it moved by ``step`` · z instead.

    Under inference mode, and for whatever is called through torch's functions and methods. What reads the memory of a
    parameter by itself (a compiled model, a kernel of one's own) sees it unmoved: the losses on both sides are then
    equal, and the gradient 0.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], direction: Direction, step: float) -> None:
        super().__init__()
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._direction, self._step = direction, step

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _ABOUT and func not in _VIEWS:
            return func(*args, **kwargs)
        if func is F.linear and not kwargs and len(args) == 3 and args[1].numel() > defaults.LOOK_BLOCK:
            name = self._names.get(id(args[1]))
            if name is not None:
                return self._linear(self._use(args[0]), name, args[1], self._use(args[2]))
        return func(*map(self._use, args), **{key: self._use(value) for key, value in kwargs.items()})

    def _linear(self, x: Tensor, name: str, weight: Tensor, bias: Tensor | None) -> Tensor:
        """A linear layer whose moved weights are never in memory as a whole."""
        found, at = x.new_empty(*x.shape[:-1], len(weight)), 0
        for rows in moved_rows(name, weight, self._direction, self._step):
            part = slice(at, at + len(rows))
            found[..., part] = F.linear(x, rows, None if bias is None else bias[part])
            at += len(rows)
        return found

    def _use(self, value: Any) -> Any:
        if isinstance(value, nn.Parameter):
            name = self._names.get(id(value))
            return value if name is None else moved(name, value, self._direction, self._step)
        if type(value) in (list, tuple):
            return type(value)(map(self._use, value))
        return value


#: What only asks about a tensor, so that none has to be moved for it; and attributes that are tensors again.
_ABOUT = frozenset(
    ("__get__", "__len__", "size", "dim", "numel", "stride", "is_floating_point", "is_complex", "is_contiguous",
     "element_size", "nelement", "get_device", "data_ptr", "__hash__")
)  # fmt: skip
_VIEWS = tuple(getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH", "data", "real"))


# -- for good --------------------------------------------------------------------------------------------------------


@attrs.frozen
class Move:
    """θ ← θ - ``step`` · z."""

    direction: Direction
    step: float


def descend(tensors: Iterable[tuple[str, Tensor]], moves: Sequence[Move]) -> None:
    """Move float32 tensors, in place, by all ``moves`` together: θ ← θ - Σ step · z, summed in the order given.

    One IEEE operation per kernel and element, on the CPU but for the last one, so that replicas stay bit for bit alike.
    """
    exact.flush_denormals()
    for name, tensor in tensors:
        with torch.no_grad():
            _descend(name, tensor, moves)


def _descend(name: str, tensor: Tensor, moves: Sequence[Move]) -> None:
    size = tensor.numel()
    streams = [(move.direction.steps, move.step) for move in moves]
    inside = tensor.device.type == "cpu" and tensor.is_contiguous()
    target: Floats | None = tensor.detach().view(-1).numpy() if inside else None
    normal = any(move.direction.kind == "normal" for move in moves)
    whole = torch.zeros(size if normal or not inside else 0)
    room: Floats
    if normal:
        # Whole tensors of normal numbers, of which only one at a time is in memory.
        for steps, step in streams:
            room = np.empty(size, dtype=np.float32)
            np.add(whole.numpy(), steps(name, size, step).take(room), out=whole.numpy())
        if target is not None:
            np.subtract(target, whole.numpy(), out=target)
    else:
        opened = [steps(name, size, step) for steps, step in streams]
        room = np.empty(min(size, defaults.EXACT_CHUNK), dtype=np.float32)
        total: Floats = np.empty_like(room)
        for start in range(0, size, defaults.EXACT_CHUNK):
            length = min(defaults.EXACT_CHUNK, size - start)
            into = total[:length]
            into[:] = 0
            for each in opened:
                np.add(into, each.take(room[:length]), out=into)
            if target is not None:
                np.subtract(target[start : start + length], into, out=target[start : start + length])
            else:
                whole.numpy()[start : start + length] = into
    if target is None:
        tensor.sub_(whole.view(tensor.shape).to(tensor.device))
