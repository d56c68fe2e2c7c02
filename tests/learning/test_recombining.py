"""What an owner combines as a whole slice, others combine leaf by leaf: the same bits, or an honest owner is framed."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from shoal.learning import exact
from shoal.learning.aggregate import resolve
from shoal.learning.aggregate.aggregator import Aggregator, Decision
from shoal.learning.reduce import kernels, pure_kernels
from shoal.learning.reduce.codecs import FP32, Codec
from shoal.learning.reduce.codecs import resolve as codec_of
from shoal.learning.reduce.leaves import bounds, leaf_count, leaf_elements
from shoal.learning.reduce.robust import Given, combine_by, products_of
from shoal.learning.rounds.lies import recombine
from shoal.transport.errors import ConfigError, ProtocolMisuse
from tests.learning.test_rule_rounds import CHAINS, ONE_EACH

MEMBERS = 7

#: Numbers that processors treat in ways of their own: both zeros, denormals, the edges of what is normal, huge ones.
BITS = np.array(
    [
        *(0x00000000, 0x80000000, 0x00000001, 0x80000001, 0x007FFFFF, 0x807FFFFF, 0x00800000, 0x80800000, 0x00800001),
        *(0x3F800000, 0xBF800000, 0x3F800001, 0x34000000, 0xB4000000, 0x00C00000, 0x7E000000, 0xFE000000, 0x7DFFFFFF),
    ],
    dtype=np.uint32,
)
RULES = (*ONE_EACH, *CHAINS, "descent:f=1+median", "normalise:to=median+trimmed_mean:f=2")


def contributions(rng: np.random.Generator, kind: str, elements: int) -> list[Tensor]:
    rows = []
    for _ in range(MEMBERS):
        match kind:
            case "bits":
                row = rng.choice(BITS, elements).view(np.float32)
            case "tiny":
                row = (rng.integers(0, 1 << 24, elements, dtype=np.uint32) | rng.choice(BITS[:2], elements)).view(
                    np.float32
                )
            case "ties":
                row = rng.integers(-1, 2, elements).astype(np.float32) * np.float32(-1.0)
            case _:
                row = rng.standard_normal(elements).astype(np.float32)
                at = rng.integers(0, elements, elements // 4)
                row[at] = rng.choice(BITS[:-3], len(at)).view(np.float32)
        rows.append(torch.from_numpy(row.copy()))
    return rows


def given(rows: list[Tensor], codec: Codec) -> list[Given]:
    if codec is FP32:
        return list(rows)
    found: list[Given] = []
    for row in rows:
        code = bytearray(codec.wire_size(len(row)))
        codec.encode(row, code)
        found.append((codec, bytes(code)))
    return found


def whole(rule: Aggregator, codec: Codec, rows: list[Tensor]) -> tuple[bytes, list[bytes], Tensor] | None:
    """(the decision, the members' bytes, the combined slice as its owner signs it); None where there is none."""
    parts, decision = given(rows, codec), None
    if rule.needs_gram:
        try:
            decision = rule.decide(products_of([(parts, len(rows[0]))]), MEMBERS)
            decision = Decision.read(decision.data, MEMBERS)
        except (ConfigError, ValueError):
            return None
    out = torch.empty(len(rows[0]))
    try:
        combine_by(rule, parts, decision, [1.0] * MEMBERS, out)
    except ProtocolMisuse:
        return None
    if codec is not FP32:
        code = bytearray(codec.wire_size(len(out)))
        codec.encode(out, code)
        codec.decode(code, out)
    data = [part.numpy().tobytes() if isinstance(part, Tensor) else bytes(part[1]) for part in parts]
    return decision.data if decision is not None else b"", data, out


def denormal_thread(work: Callable[[], None]) -> None:
    """On a thread on which nobody has set flush-to-zero, or somebody has set it off."""
    failed: list[BaseException] = []

    def run() -> None:
        torch.set_flush_denormal(False)
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


@pytest.mark.parametrize(
    ("codec", "implementation"),
    [*((codec, "native") for codec in ("fp32", "fp16", "bf16", "int8", "e3m0")), ("fp32", "pure"), ("int8", "pure")],
)
@pytest.mark.parametrize("rule", RULES)
def test_a_leaf_has_the_bits_that_it_has_in_the_whole(
    rule: str, codec: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if implementation == "pure":
        if kernels.active is pure_kernels:
            pytest.skip("there is no native helper here: the other case is this one")
        monkeypatch.setattr(kernels, "active", pure_kernels)
    chosen, coded, tried = resolve(rule), codec_of(codec), 0
    for number, kind in enumerate(("bits", "tiny", "ties", "mixed")):
        rng = np.random.default_rng(number)
        elements = 3 * leaf_elements(1, MEMBERS, coded) + 777 + number
        rows = contributions(rng, kind, elements)
        exact.flush_denormals()
        found = whole(chosen, coded, rows)
        if found is None:
            continue
        decision, data, result = found
        leaf = leaf_elements(elements, MEMBERS, coded)
        assert leaf_count(elements, leaf) >= 3

        def look(
            leaf: int = leaf, elements: int = elements, data: list[bytes] = data, decision: bytes = decision,
            result: Tensor = result, kind: str = kind,
        ) -> None:  # fmt: skip
            for at in range(leaf_count(elements, leaf)):
                first, last = bounds(elements, leaf, at)
                cut = tuple(each[coded.wire_size(first) : coded.wire_size(last)] for each in data)
                own = recombine(chosen, coded, cut, (1,) * MEMBERS, decision, last - first)
                assert own == result[first:last].numpy().tobytes(), (kind, at)

        look()
        denormal_thread(look)
        tried += 1
    assert tried >= 2
