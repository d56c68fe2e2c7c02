"""Codecs: how a contribution or a combined slice travels, with exact sizes and the same bits on every machine."""

from .base import Buffer, Codec, combine, encode_compensated
from .blocks import E3M0, INT8, BlockCodec
from .feedback import Control, EControl, ErrorFeedback
from .names import NAMES, resolve
from .plain import BF16, FP16, FP32
from .topk import TopK

__all__ = [
    "BF16",
    "E3M0",
    "FP16",
    "FP32",
    "INT8",
    "NAMES",
    "BlockCodec",
    "Buffer",
    "Codec",
    "Control",
    "EControl",
    "ErrorFeedback",
    "TopK",
    "combine",
    "encode_compensated",
    "resolve",
]
