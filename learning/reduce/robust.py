"""What owners compute of members' parts for rules other than the mean: what is coded is decoded piece by piece."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...transport.errors import ProtocolMisuse
from .. import defaults
from ..aggregate.aggregator import Aggregator, Decision
from ..aggregate.base import Floats
from ..aggregate.linear import partial_gram
from .codecs import Buffer, Codec

#: One member's part of a slice: fp32 as it is, or its code.
Given = Tensor | tuple[Codec, Buffer]


def pieces(parts: Sequence[Given], length: int) -> Iterator[tuple[slice, list[Tensor]]]:
    """The parts (each of ``length`` elements) as float32: (where, one tensor of each part). The next piece overwrites
    what was decoded for this one."""
    coded = [part for part in parts if not isinstance(part, Tensor)]
    step = length
    if coded and all(codec.elementwise for codec, _ in coded):
        step = max(defaults.AGGREGATE_CHUNK // len(parts) // defaults.CODEC_BLOCK, 1) * defaults.CODEC_BLOCK
    room = torch.empty(len(coded), min(step, length))
    for start in range(0, length, step):
        stop = min(start + step, length)
        rows, free = [], iter(room)
        for part in parts:
            if isinstance(part, Tensor):
                rows.append(part[start:stop])
                continue
            codec, data = part
            row = next(free)[: stop - start]
            view = memoryview(data).cast("B")
            whole = (start, stop) == (0, length)
            codec.decode(view if whole else view[codec.wire_size(start) : codec.wire_size(stop)], row)
            rows.append(row)
        yield slice(start, stop), rows


def products_of(slices: Sequence[tuple[Sequence[Given], int]]) -> Floats:
    """The inner products (p, p) of p members over all ``slices``: (their parts, elements). Blocking."""
    total: Floats | None = None
    for parts, length in slices:
        for _, rows in pieces(parts, length):
            found = partial_gram(rows)
            total = found if total is None else total + found
    if total is None:
        raise ProtocolMisuse("no slices have no inner products")
    return total


def fits(slices: Sequence[tuple[Given, Tensor]]) -> bool:
    """Whether a contribution goes where the result goes, over all ``slices``: (its part, the combined slice), both of
    the same elements. That its cosine with them is above :data:`defaults.TRIAL_COSINE`. Blocking.
    """
    dot = own = theirs = 0.0
    for part, result in slices:
        for where, rows in pieces([part], len(result)):
            given, combined = rows[0].double(), result[where].double()
            dot += float(given @ combined)
            own += float(given @ given)
            theirs += float(combined @ combined)
    return dot > defaults.TRIAL_COSINE * math.sqrt(own) * math.sqrt(theirs)


def combine_by(
    rule: Aggregator, parts: Sequence[Given], decision: Decision | None, weights: Sequence[float], out: Tensor
) -> None:
    """``rule`` over the members' ``parts`` of one slice into ``out``. The same bits on every machine. Blocking.

    Raises :class:`ProtocolMisuse` where a value is not finite.
    """
    for where, rows in pieces(parts, len(out)):
        if not rule.combine(rows, decision, out[where], weights):
            raise ProtocolMisuse(f"{rule} of numbers that are not finite")
