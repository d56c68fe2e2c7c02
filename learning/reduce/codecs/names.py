"""Codecs by name, as settings and messages write them: ``int8``, ``topk:0.01``, ``topk:0.01:fp16``."""

from __future__ import annotations

import re
from fractions import Fraction

from ....transport.errors import ConfigError
from .base import Codec
from .blocks import E3M0, INT8
from .plain import BF16, FP16, FP32
from .topk import TopK

#: What ``resolve`` knows; the last one with a share of its own.
NAMES = ("fp32", "fp16", "bf16", "int8", "e3m0", "topk:0.01", "topk:0.01:fp16")

_PLAIN: dict[str, Codec] = {codec.name: codec for codec in (FP32, FP16, BF16, INT8, E3M0)}

#: A decimal number of few digits: names come over the network too, and Fraction("1e999999999") takes all memory.
_SHARE = re.compile(r"[0-9]{0,3}(?:\.[0-9]{0,12})?(?:e-0?[0-9])?")


def resolve(name: str) -> Codec:
    """The codec called ``name``; raises ``ConfigError`` that says what is wrong and what there is."""
    if name in _PLAIN:
        return _PLAIN[name]
    kind, *parameters = name.split(":") if len(name) <= 64 else [name[:61] + "..."]
    if kind in _PLAIN:
        raise ConfigError(f"the codec {kind} takes no parameters, got {name!r}")
    if kind != "topk":
        raise ConfigError(f"there is no codec {kind!r}; there are {', '.join(NAMES)} (any share of the elements)")
    if not 1 <= len(parameters) <= 2 or parameters[1:] not in ([], ["fp16"], ["fp32"]):
        raise ConfigError(f"{name!r} is not topk:SHARE or topk:SHARE:fp16, such as topk:0.01")
    share = parameters[0]
    if not _SHARE.fullmatch(share) or not re.search(r"^\.?[0-9]", share) or not 0 < Fraction(share) <= 1:
        raise ConfigError(f"{name!r}: the share of the elements must be a number above 0 and at most 1, got {share!r}")
    return TopK(Fraction(share), parameters[1:] == ["fp16"])
