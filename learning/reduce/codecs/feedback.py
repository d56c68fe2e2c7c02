"""What a contributor keeps of what its codec dropped, so that it is sent later: error feedback and EControl.

Both belong to one contributor, and count a contribution only once it is part of a result: ``encode`` may be called for
a slice as often as it must be sent, in a later attempt or cut anew; ``commit`` after a round that this contributor
was a member of, ``rollback`` after one that it was not.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ....transport.errors import ProtocolMisuse
from ... import defaults, exact
from .base import Buffer, Codec, encode_compensated


class ErrorFeedback:
    """Plain error feedback for any codec: ``y = x + e``, ``C(y)`` is sent, ``e' = y - C(y)``.

    (Seide et al. 2014; Karimireddy et al. 2019, arXiv 1901.09847, Algorithm 2 without the step size.) Holds two float32
    vectors of the tensor's size, the second from the first ``encode`` on. For codecs without bias it is optional; with
    top-k it stalls where the contributors' data differ: ``EControl`` does not.
    """

    def __init__(self, codec: Codec, length: int) -> None:
        self.codec = codec
        self.residual = torch.zeros(length)
        self._pending: Tensor | None = None
        self._coded: list[tuple[int, int]] = []

    def encode(self, part: Tensor, start: int, out: Buffer) -> None:
        """Code elements ``start …`` of the contribution, of shape ``(n,)``, to ``out`` of ``codec.wire_size(n)`` bytes.

        Until the round is settled the same part gives the same bytes. Raises ``ProtocolMisuse`` for values that are not
        finite (nothing is kept of them) and for parts outside of the vector.
        """
        stop = _stop(len(self.residual), start, len(part))
        if self._pending is None:
            self._pending = torch.empty_like(self.residual)
        encode_compensated(self.codec, part, self.residual[start:stop], self._pending[start:stop], out)
        self._coded.append((start, stop))

    def commit(self) -> None:
        """What was coded became part of the result: from now on its error is owed."""
        if self._pending is not None and self._coded == [(0, len(self.residual))]:
            self.residual, self._pending = self._pending, self.residual
        elif self._pending is not None:
            for start, stop in self._coded:
                self.residual[start:stop] = self._pending[start:stop]
        self._coded.clear()

    def rollback(self) -> None:
        """What was coded became part of nothing: the residual stays as it was."""
        self._coded.clear()

    def state(self) -> dict[str, Tensor]:
        """Copies of the vectors to save, by name; what is not settled is not part of them."""
        return {"residual": self.residual.clone()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take up what ``state`` gave; raises ``ProtocolMisuse`` for other names or sizes, or values not finite."""
        _check(state, ("residual",), len(self.residual))
        self.residual.copy_(state["residual"])
        self.rollback()

    def reset(self) -> None:
        """Owe nothing."""
        self.residual.zero_()
        self.rollback()


class EControl:
    """EControl (Gao, Islamov, Stich, ICLR 2024, arXiv 2311.05645): error feedback for top-k that does not stall.

    ::

        D_i = C(eta e_i + g_i - h_i);   e_i += g_i - h_i - D_i;   h_i += D_i

    and everyone applies ``h + mean_i D_i`` and keeps it as ``h``: see ``Control``. Holds two float32 vectors of the
    tensor's size, ``g - h`` of what is not settled, and its codes. The step ``eta`` must be small: 0.5 diverges.
    """

    def __init__(self, codec: Codec, length: int, eta: float = defaults.ECONTROL_ETA) -> None:
        if not 0 < eta <= 1:
            raise ProtocolMisuse(f"EControl with eta {eta}: it must be above 0 and at most 1")
        self.codec = codec
        self.eta = eta
        self.error = torch.zeros(length)
        self.control = torch.zeros(length)
        self._coded: dict[tuple[int, int], tuple[Tensor, bytes]] = {}

    def encode(self, part: Tensor, start: int, out: Buffer) -> None:
        """Code elements ``start …`` of the gradient ``g_i``, shape ``(n,)``, to ``out``; as ``ErrorFeedback.encode``.

        A part replaces all those coded in this round that it overlaps.
        """
        stop = _stop(len(self.error), start, len(part))
        new = exact.sub(part, self.control[start:stop])
        self.codec.encode(exact.add_(exact.scale(self.error[start:stop], self.eta), new), out)
        for other in [other for other in self._coded if other[0] < stop and start < other[1]]:
            del self._coded[other]
        self._coded[start, stop] = (new, bytes(out))

    def commit(self) -> None:
        """What was coded became part of the result."""
        for (start, stop), (new, code) in self._coded.items():
            sent = torch.empty_like(new)
            self.codec.decode(code, sent)
            exact.add_(self.error[start:stop], exact.sub_(new, sent))
            exact.add_(self.control[start:stop], sent)
        self._coded.clear()

    def rollback(self) -> None:
        """What was coded became part of nothing."""
        self._coded.clear()

    def state(self) -> dict[str, Tensor]:
        """Copies of the vectors to save, by name."""
        return {"error": self.error.clone(), "control": self.control.clone()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take up what ``state`` gave; raises ``ProtocolMisuse`` for other names or sizes, or values not finite."""
        _check(state, ("error", "control"), len(self.error))
        self.error.copy_(state["error"])
        self.control.copy_(state["control"])
        self.rollback()

    def reset(self) -> None:
        """Begin anew: together with all others, see ``Control``."""
        self.error.zero_()
        self.control.zero_()
        self.rollback()


class Control:
    """The replicated side of EControl: ``h``, the mean of all ``h_i``, held by every member with identical bits.

    ``h`` is that mean only as long as the same members take part with the same weights. Whoever changes either makes
    all contributors and this ``reset`` in the same round (the commit record names the members), or ``h`` keeps an error
    that nothing corrects.
    """

    def __init__(self, length: int) -> None:
        self.value = torch.zeros(length)

    def step(self, mean: Tensor) -> Tensor:
        """``h += mean`` of the committed ``D_i``; returns a copy of ``h``, the gradient to apply."""
        return exact.add_(self.value, mean).clone()

    def state(self) -> dict[str, Tensor]:
        """A copy of the vector to save."""
        return {"control": self.value.clone()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take up what ``state`` gave; raises ``ProtocolMisuse`` for other names or sizes, or values not finite."""
        _check(state, ("control",), len(self.value))
        self.value.copy_(state["control"])

    def reset(self) -> None:
        """Begin anew: together with all contributors."""
        self.value.zero_()


def _stop(length: int, start: int, n: int) -> int:
    if not 0 <= start <= start + n <= length:
        raise ProtocolMisuse(f"elements {start} to {start + n} of a vector of {length}")
    return start + n


def _check(state: Mapping[str, Tensor], names: tuple[str, ...], length: int) -> None:
    if set(state) != set(names):
        raise ProtocolMisuse(f"a state of {', '.join(sorted(state)) or 'nothing'}, expected {', '.join(names)}")
    for name in names:
        if state[name].shape != (length,) or state[name].dtype != torch.float32:
            shape = tuple(state[name].shape)
            raise ProtocolMisuse(f"{name} of {shape} {state[name].dtype}, expected ({length},) float32")
        if wrong := exact.check_finite(state[name].contiguous()):
            raise ProtocolMisuse(f"{name} is not finite: {wrong}")
