"""``bench.py codecs``: what coding costs per element, native, pure and beside plain torch; sizes, errors and bias."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from shoal.learning import exact
from shoal.learning.reduce import kernels, pure_kernels
from shoal.learning.reduce.codecs import FP32, NAMES, BlockCodec, Codec, combine, encode_compensated, resolve

from .report import Row, machine, show, write

SYSTEMS = ("native", "pure", "torch")

#: Elements of the vectors whose errors are measured.
_SAMPLE = 1 << 20


async def run(options: argparse.Namespace) -> None:
    exact.prepare_torch()
    native, which = kernels.load(pure=False)
    print(f"kernels: {which}; {options.elements} elements")
    paths: dict[str, kernels.Kernels] = {"native": native} if which.native else {}
    paths["pure"] = pure_kernels
    rows: list[Row] = []
    for (codec, what), acts in _cases(options.elements):
        rows += _measure(codec, what, acts, paths, options)
    _times(rows)
    _errors()
    write(rows, options.json)


def _measure(
    codec: str,
    what: str,
    acts: dict[str, Callable[[], object]],
    paths: dict[str, kernels.Kernels],
    options: argparse.Namespace,
) -> list[Row]:
    """Turns among native, pure and torch; the first of each is not counted."""
    case = {"codec": codec, "what": what, "elements": options.elements}
    turns = [(system, acts["shoal"]) for system in paths] + ([("torch", acts["torch"])] if "torch" in acts else [])
    found = {system: Row("codecs", case, system, "median_s") for system, _ in turns}
    for number in range(-1, options.runs):
        for system, act in turns:
            kernels.active = paths.get(system, pure_kernels)
            began = time.process_time_ns()
            act()
            took = time.process_time_ns() - began
            if number >= 0:
                found[system].runs.append(max(took, 1) * 1e-9)
    for row in found.values():
        row.extra |= {"ns_per_element": min(row.runs) * 1e9 / options.elements, **machine()}
    return list(found.values())


def _cases(n: int) -> Iterator[tuple[tuple[str, str], dict[str, Callable[[], object]]]]:
    generator = torch.Generator().manual_seed(1)
    vector = torch.randn(n, generator=generator)
    residual, rest, out = torch.randn(n, generator=generator) * 0.01, torch.empty(n), torch.zeros(n)
    for name in NAMES:
        codec = resolve(name)
        code = bytearray(codec.wire_size(n))
        codec.encode(vector, code)
        plain = _plain(codec, vector, out)
        torchs = dict(zip(("encode", "decode", "accumulate"), plain, strict=False))
        acts: dict[str, Callable[[], object]] = {
            "encode": lambda codec=codec, code=code: codec.encode(vector, code),  # type: ignore[misc]
            "encode+EF": lambda codec=codec, code=code: encode_compensated(codec, vector, residual, rest, code),  # type: ignore[misc]
            "decode": lambda codec=codec, code=code: codec.decode(code, out),  # type: ignore[misc]
            "accumulate": lambda codec=codec, code=code: codec.accumulate(code, 0.25, out, False),  # type: ignore[misc]
            "fault": lambda codec=codec, code=code: codec.fault(code, n),  # type: ignore[misc]
        }
        for what, act in acts.items():
            yield (name, what), {"shoal": act} | ({"torch": torchs[what]} if what in torchs else {})
    vectors = [torch.randn(n, generator=generator) for _ in range(4)]
    stacked = torch.stack(vectors)

    def mean() -> None:
        out.copy_(stacked[0] * 0.25)
        for row in stacked[1:]:
            out.add_(row * 0.25)

    int8 = resolve("int8")
    codes = []
    for one in vectors[:3]:
        codes.append(bytearray(int8.wire_size(n)))
        int8.encode(one, codes[-1])
    own: tuple[Codec, memoryview] = (FP32, memoryview(vectors[3].numpy().tobytes()))
    yield (
        ("fp32", "mean of 4"),
        {"shoal": lambda: exact.weighted_mean(vectors, [1.0] * 4, out=out), "torch": mean},
    )
    yield ("int8", "mean of 3, own"), {"shoal": lambda: combine([*((int8, c) for c in codes), own], [1.0] * 4, out)}
    yield (
        ("fp32", "check finite"),
        {"shoal": lambda: exact.check_finite(vector), "torch": lambda: bool(torch.isfinite(vector).all())},
    )


def _plain(codec: Codec, vector: Tensor, out: Tensor) -> tuple[Callable[[], object], ...]:
    """Encoding, decoding and accumulating with whole-tensor operations of torch, as one would write it down."""
    n = len(vector)
    if codec.name in ("fp16", "bf16"):
        kind = torch.float16 if codec.name == "fp16" else torch.bfloat16
        half = vector.to(kind)
        return lambda: vector.to(kind), lambda: out.copy_(half), lambda: out.add_(half.float() * 0.25)
    if codec.name == "int8" and n % 1024 == 0:
        blocks = vector.view(-1, 1024)

        def encode() -> tuple[Tensor, Tensor]:
            scale = blocks.abs().amax(1, keepdim=True) / 127.0
            return scale, torch.round(blocks / scale).to(torch.int8)

        scale, codes = encode()
        return (
            encode,
            lambda: torch.mul(codes.float(), scale, out=out.view(-1, 1024)),
            lambda: out.view(-1, 1024).add_(codes.float() * scale * 0.25),
        )
    if codec.name.startswith("topk"):
        kept = codec.wire_size(n) // codec.wire_size(1)
        return (lambda: torch.topk(vector.abs(), kept, sorted=False),)
    return ()


def _times(rows: list[Row]) -> None:
    lines: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        lines.setdefault((row.case["codec"], row.case["what"]), {})[row.system] = row.extra["ns_per_element"]
    show(
        "ns per element: CPU time of one core, the best run (other work on the machine only ever adds)",
        ("codec", "what", *SYSTEMS),
        [
            (codec, what, *(f"{found[system]:.3f}" if system in found else "" for system in SYSTEMS))
            for (codec, what), found in lines.items()
        ],
    )


def samples() -> dict[str, Tensor]:
    """Gaussian values, heavy tails as gradients have them, and values of one sign."""
    rng = np.random.default_rng(1)
    normal = rng.standard_normal(_SAMPLE, dtype=np.float32)
    heavy = rng.standard_t(3, _SAMPLE).astype(np.float32)
    return {
        "N(0,1)": torch.from_numpy(normal),
        "Student t, 3": torch.from_numpy(heavy),
        "-|N(0,1)|": torch.from_numpy(-np.abs(normal)),
    }


def _errors() -> None:
    lines = []
    for name in NAMES:
        codec = resolve(name)
        size = codec.wire_size(_SAMPLE)
        cells = []
        for vector in samples().values():
            code, back = bytearray(size), torch.empty(_SAMPLE)
            codec.encode(vector, code)
            codec.decode(code, back)
            error, exactly = (back - vector).double(), vector.double()
            rms = exactly.square().mean().sqrt()
            cells.append(f"{(error.square().mean().sqrt() / rms).item():.2e} {(error.mean() / rms).item():+.1e}")
        block = f"{codec.block}" if isinstance(codec, BlockCodec) else ""
        lines.append((name, block, f"{8 * size / _SAMPLE:.4f}", *cells))
    show(
        f"relative RMS error and bias (mean error ÷ RMS of the values), {_SAMPLE} values",
        ("codec", "block", "bits", *samples()),
        lines,
        ["chance alone gives a bias of about the error ÷ 1024."],
    )
