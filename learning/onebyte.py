"""A projected gradient in one byte: its sign and 7 bits of logarithmic magnitude.

``byte = sign << 7 | p``; p 0 is zero, p 1 … 127 is e^((p - 73) / 8): 1.2e-4 to 854, within 6.5 % of what was meant.
Beyond these, what is larger becomes the largest and what is smaller than half a step below the smallest becomes zero.
The published code of Just One Byte has 255 powers beside the sign, 9 bits, and never sends them.
"""

from __future__ import annotations

import math
import struct
from decimal import Context, Decimal
from functools import cache

#: Steps of ln |g| per unit, and the power that stands for 1.
PER_UNIT, ONE = 8, 73
LARGEST = 127


@cache
def _table() -> tuple[float, ...]:
    """What each byte means, as float32. In decimal arithmetic, whose exp is rounded correctly on every machine."""
    context = Context(prec=30)
    powers = [0.0] + [
        struct.unpack("<f", struct.pack("<f", context.exp(Decimal(p - ONE) / PER_UNIT)))[0]
        for p in range(1, LARGEST + 1)
    ]
    return (*powers, *(-power for power in powers))


def encode(gradient: float) -> int:
    """The byte of ``gradient``; of NaN that of zero."""
    if math.isnan(gradient) or gradient == 0:
        return 0
    if math.isinf(gradient):
        power = LARGEST
    else:
        power = max(0, min(LARGEST, round(math.log(abs(gradient)) * PER_UNIT) + ONE))
    return power and power | (gradient < 0) << 7


def decode(byte: int) -> float:
    """What ``byte`` means; 128 is zero as well."""
    return _table()[byte]
