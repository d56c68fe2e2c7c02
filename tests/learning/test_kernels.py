"""The native and the pure kernels give the same bits, whatever the input."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shoal.learning import defaults, exact
from shoal.learning.aggregate.order import network
from shoal.learning.reduce import kernels, pure_kernels
from shoal.transport.errors import ProtocolMisuse

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

native, which = kernels.load(pure=False)
if not which.native and shutil.which("cc") is not None and Path(sysconfig.get_path("include"), "Python.h").exists():
    pytest.fail(f"there is a compiler, but {which.reason}", pytrace=False)
#: What `use` takes, where there are native kernels.
LEVELS: tuple[str, ...] = native.levels() if which.native else ()  # type: ignore[attr-defined]
needs_native = pytest.mark.skipif(not which.native, reason=f"no native kernels: {which.reason}")


@pytest.fixture(params=LEVELS or ["none"])
def fast(request: pytest.FixtureRequest) -> Iterator[kernels.Kernels]:
    """The native kernels, once with every set of instructions that this machine can run."""
    if not LEVELS:
        pytest.skip(f"no native kernels: {which.reason}")
    module: Any = native
    before = module.level()
    module.use(request.param)
    yield native
    module.use(before)


#: Block bounds on both sides, no elements, one, odd and even rests, several steps of the pure path.
LENGTHS = [0, 1, 2, 3, 7, 8, 31, 511, 1023, 1024, 1025, 1027, 2047, 2048, 5000, 65536, 65537, 70_001]


def inputs(n: int, seed: int = 0) -> Iterator[Floats]:
    """Random numbers of many sizes and the nasty ones; all finite."""
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal(n, dtype=np.float32)
    yield normal
    yield -np.abs(normal)
    yield np.zeros(n, np.float32)
    yield np.full(n, -0.0, np.float32)
    with np.errstate(all="ignore"):
        yield (normal * np.float32(2.0**-126)).astype(np.float32)  # denormals among the smallest normal numbers
        yield (normal * np.float32(2.0**-100)).astype(np.float32)  # around the blocks that are coded as zeros
    yield np.full(n, np.finfo(np.float32).max, np.float32)
    yield np.where(normal > 0, np.float32(3.4e38), np.float32(-1e-45)).astype(np.float32)
    # Ties: codes halfway between two, below a largest value of 127 (int8) or 1 (e3m0).
    ties = (rng.integers(-254, 255, n) / 2).astype(np.float32)
    ties[::97] = 127.0
    yield ties
    powers = (rng.choice([-1.0, 1.0], n) * rng.choice([1.0, 1.5, 0.75], n) * 2.0 ** rng.integers(-9, 0, n)).astype("f4")
    powers[::101] = 1.0
    yield powers
    # Any bits at all, without what is not finite.
    anything = rng.integers(0, 2**32, n, dtype=np.uint64).astype(np.uint32).view(np.float32)
    yield np.where(np.isfinite(anything), anything, np.float32(1.0)).astype(np.float32)


def same(one: Floats | Bytes, other: Floats | Bytes) -> bool:
    return one.tobytes() == other.tobytes()


def size_of(kind: int, n: int) -> int:
    blocks = [1024] * (n // 1024) + [n % 1024] * (n % 1024 > 0)
    return sum(4 + (m if kind == kernels.INT8 else (m + 1) // 2) for m in blocks)


@pytest.fixture(autouse=True)
def flushed() -> None:
    exact.flush_denormals()


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("kind", [kernels.INT8, kernels.E3M0])
def test_blocks_are_coded_and_read_alike(fast: kernels.Kernels, kind: int, n: int) -> None:
    residual = np.random.default_rng(1).standard_normal(n, dtype=np.float32)
    for vector in inputs(n):
        with np.errstate(all="ignore"):
            owed = residual * np.float32(min(np.abs(vector).max(initial=0.0), 1e30))
        for old in (None, owed):
            codes = [np.zeros(size_of(kind, n), np.uint8) for _ in range(2)]
            rests = [np.zeros(n, np.float32) for _ in range(2)]
            results = [
                implementation.block_encode(kind, vector, code, old, rest)
                for implementation, code, rest in zip((fast, pure_kernels), codes, rests, strict=True)
            ]
            assert results[0] == results[1]
            if results[0] >= 0:
                continue  # a sum that overflowed
            assert same(*codes) and same(*rests)
            without = np.zeros_like(codes[0])
            fast.block_encode(kind, vector, without, old, None)
            assert same(without, codes[0])
            for how in (kernels.DECODE, kernels.FIRST, kernels.FURTHER):
                outs = [residual.copy() for _ in range(2)]
                fast.block_put(kind, codes[0], 0.3, outs[0], how)
                pure_kernels.block_put(kind, codes[1], 0.3, outs[1], how)
                assert same(*outs)


@pytest.mark.parametrize("kind", [kernels.INT8, kernels.E3M0])
def test_any_bytes_are_read_alike_at_any_address(fast: kernels.Kernels, kind: int) -> None:
    rng = np.random.default_rng(3)
    for n in (1, 5, 1024, 3001):
        size = size_of(kind, n)
        for offset in range(4):
            data = rng.integers(0, 256, size + offset, dtype=np.uint8)[offset:]
            for block in range(-(-n // 1024)):  # a NaN has many bits, which need not agree
                data[block * size_of(kind, 1024) + 3] = 0x3F
            outs = [np.ones(n, np.float32) for _ in range(2)]
            fast.block_put(kind, data, 0.7, outs[0], kernels.FURTHER)
            pure_kernels.block_put(kind, data, 0.7, outs[1], kernels.FURTHER)
            assert same(*outs)
            if kind == kernels.INT8:
                assert fast.int8_wrong(data, n) == pure_kernels.int8_wrong(data, n)


@pytest.mark.parametrize("n", LENGTHS)
def test_floats_and_their_upper_halves_are_read_and_written_alike(fast: kernels.Kernels, n: int) -> None:
    start = np.random.default_rng(5).standard_normal(n, dtype=np.float32)
    for vector in inputs(n):
        halves = [np.zeros(2 * n, np.uint8) for _ in range(2)]
        fast.bf16_encode(vector, halves[0])
        pure_kernels.bf16_encode(vector, halves[1])
        assert same(*halves)
        for how in (kernels.DECODE, kernels.FIRST, kernels.FURTHER):
            outs = [start.copy() for _ in range(4)]
            fast.bf16_put(halves[0], 0.3, outs[0], how)
            pure_kernels.bf16_put(halves[0], 0.3, outs[1], how)
            fast.fp32_put(vector.view(np.uint8), 0.3, outs[2], how)
            pure_kernels.fp32_put(vector.view(np.uint8), 0.3, outs[3], how)
            assert same(outs[0], outs[1]) and same(outs[2], outs[3])


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8])
def test_means_have_the_same_bits(fast: kernels.Kernels, n: int, count: int) -> None:
    rng = np.random.default_rng(count)
    all_vectors = list(inputs(n))
    vectors = tuple(all_vectors[i] for i in rng.permutation(len(all_vectors))[:count])
    factors = (rng.random(count) / count).astype(np.float32)
    outs = [np.zeros(n, np.float32) for _ in range(2)]
    fast.mean(vectors, factors, outs[0])
    pure_kernels.mean(vectors, factors, outs[1])
    assert same(*outs)
    first = vectors[0].copy()
    fast.mean((first, *vectors[1:]), factors, first)
    assert same(first, outs[0])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -np.nan])
def test_what_is_not_finite_is_found_wherever_it_stands(fast: kernels.Kernels, value: float) -> None:
    for implementation in (fast, pure_kernels):
        for n in (1, 1023, 1024, 1025, 200_000):
            vector = np.full(n, np.finfo(np.float32).max, np.float32)
            assert implementation.finite(vector)
            for at in {0, n // 2, n - 1}:
                wrong = vector.copy()
                wrong[at] = value
                assert not implementation.finite(wrong)
                for kind in (kernels.INT8, kernels.E3M0):
                    out = np.zeros(size_of(kind, n), np.uint8)
                    assert implementation.block_encode(kind, wrong, out, None, None) == at // 1024
        assert implementation.finite(np.zeros(0, np.float32))


@pytest.mark.parametrize("n", [n for n in LENGTHS if n])
def test_the_largest_magnitudes_are_found_alike(fast: kernels.Kernels, n: int) -> None:
    for vector in inputs(n):
        for k in {1, n // 100 + 1, n // 2, n}:
            found = [np.zeros(k, np.uint32) for _ in range(2)]
            fast.topk(vector, found[0])
            pure_kernels.topk(vector, found[1])
            assert found[0].tolist() == found[1].tolist()
            order = sorted(range(n), key=lambda i: (-abs(float(vector[i])), i)) if n < 3000 else None
            if order is not None:
                assert found[0].tolist() == sorted(order[:k])


@pytest.mark.parametrize("n", [n for n in LENGTHS if n < 6000] + [127, 128, 129])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 16, 33])
def test_the_middle_of_columns_has_the_same_bits(fast: kernels.Kernels, n: int, count: int) -> None:
    rng = np.random.default_rng(count)
    all_vectors = list(inputs(n)) * 4
    vectors = tuple(all_vectors[i] for i in rng.permutation(len(all_vectors))[:count])
    pairs = network(count, range(count))
    for kind in (kernels.MEDIAN, kernels.TRIMMED, kernels.AROUND):
        for f in {0, (count - 1) // 4, (count - 1) // 2}:
            outs = [np.zeros(n, np.float32) for _ in range(2)]
            assert fast.middle(vectors, pairs, kind, f, 1.0 / (count - f), outs[0])
            assert pure_kernels.middle(vectors, pairs, kind, f, 1.0 / (count - f), outs[1])
            assert same(*outs)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_middle_of_columns_says_when_a_value_is_not_finite(fast: kernels.Kernels, value: float) -> None:
    for implementation in (fast, pure_kernels):
        for n in (1, 127, 128, 129, 1000):
            for at in {0, n // 2, n - 1}:
                vectors = [np.ones(n, np.float32) for _ in range(5)]
                vectors[at % 5][at] = value
                out = np.zeros(n, np.float32)
                assert not implementation.middle(tuple(vectors), network(5, range(5)), kernels.TRIMMED, 2, 1.0, out)


@pytest.mark.parametrize("n", [1, 127, 128, 129, 8191, 8192, 8193, 20_000])
@pytest.mark.parametrize("count", [1, 3, 4, 5, 16, 33])
def test_inner_products_agree_to_rounding(fast: kernels.Kernels, n: int, count: int) -> None:
    vectors = tuple(np.random.default_rng(n).standard_normal((count, n), dtype=np.float32))
    outs = [np.full((count, count), np.nan) for _ in range(2)]
    fast.gram(vectors, n, outs[0])
    pure_kernels.gram(vectors, n, outs[1])
    size = np.abs(np.stack(vectors).astype(np.float64))
    for out in outs:
        assert (out == out.T).all() and (np.abs(out - outs[1]) <= 1e-14 * (size @ size.T)).all()


@pytest.mark.parametrize("n", [0, 1, 127, 128, 129, 8191, 8192, 8193, 20_000])
@pytest.mark.parametrize("count", [1, 3, 4, 5, 16, 33])
def test_one_row_of_inner_products_and_the_squares_have_the_bits_of_all(
    fast: kernels.Kernels, n: int, count: int
) -> None:
    vectors = tuple(np.random.default_rng(n).standard_normal((count, n), dtype=np.float32))
    for implementation in (fast, pure_kernels):
        whole, some = np.full((count, count), np.nan), np.full((2, count), np.nan)
        implementation.gram(vectors, n, whole)
        for pivot in {0, count // 2, count - 1}:
            implementation.gram_row(vectors, pivot, n, some)
            assert same(some, np.stack((whole[pivot], np.diag(whole))))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_squares_beside_one_row_of_inner_products_show_what_is_not_finite(fast: kernels.Kernels, value: float) -> None:
    for implementation in (fast, pure_kernels):
        for n in (1, 127, 128, 129, 1000):
            for at in {0, n // 2, n - 1}:
                vectors = [np.zeros(n, np.float32) for _ in range(6)]
                vectors[5][at] = value
                for pivot in (0, 5):
                    some = np.zeros((2, 6))
                    implementation.gram_row(tuple(vectors), pivot, n, some)
                    assert np.isfinite(some[1]).tolist() == [True] * 5 + [False]


@needs_native
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    # As bits: hypothesis cannot draw denormals on a thread that flushes them.
    patterns=st.lists(
        st.integers(0, 2**32 - 1).filter(lambda bits: bits >> 23 & 255 != 255), min_size=1, max_size=1100
    ),
    kind=st.sampled_from([kernels.INT8, kernels.E3M0]),
)
def test_lists_of_any_floats_are_coded_alike(patterns: list[int], kind: int) -> None:
    vector = np.array(patterns, np.uint32).view(np.float32)
    codes = [np.zeros(size_of(kind, len(vector)), np.uint8) for _ in range(2)]
    rests = [np.zeros_like(vector) for _ in range(2)]
    for implementation, code, rest in zip((native, pure_kernels), codes, rests, strict=True):
        assert implementation.block_encode(kind, vector, code, None, rest) == -1
    assert same(*codes) and same(*rests)


@needs_native
def test_native_kernels_refuse_sizes_that_do_not_fit() -> None:
    ten, out = np.zeros(10, np.float32), np.zeros(14, np.uint8)
    wrong: list[tuple[str, tuple[Any, ...]]] = [
        ("finite", (np.zeros(41, np.uint8)[1:],)),
        ("mean", ((), np.zeros(0, np.float32), ten)),
        ("mean", ((ten,), np.zeros(2, np.float32), ten)),
        ("mean", ((ten, np.zeros(9, np.float32)), np.zeros(2, np.float32), ten)),
        ("fp32_put", (np.zeros(39, np.uint8), 1.0, ten, 0)),
        ("bf16_put", (np.zeros(22, np.uint8), 1.0, ten, 0)),
        ("bf16_put", (np.zeros(20, np.uint8), 1.0, ten, 3)),
        ("bf16_encode", (ten, np.zeros(19, np.uint8))),
        ("block_encode", (0, ten, out[1:], None, None)),
        ("block_encode", (2, ten, out, None, None)),
        ("block_encode", (0, ten, out, np.zeros(9, np.float32), None)),
        ("block_encode", (0, ten, out, None, np.zeros(11, np.float32))),
        ("block_put", (0, out, 1.0, np.zeros(11, np.float32), 0)),
        ("block_put", (1, out, 1.0, ten, 0)),
        ("block_put", (-1, out, 1.0, ten, 0)),
        ("int8_wrong", (out, 11)),
        ("int8_wrong", (out, -1)),
        ("topk", (ten, np.zeros(11, np.uint32))),
        ("middle", ((), np.zeros((0, 2), np.uint16), 0, 0, 1.0, ten)),
        ("middle", ((ten, np.zeros(9, np.float32)), np.zeros((0, 2), np.uint16), 0, 0, 1.0, ten)),
        ("middle", ((ten, ten), np.array([[0, 2]], np.uint16), 0, 0, 1.0, ten)),
        ("middle", ((ten, ten), np.array([[1, 0]], np.uint16), 0, 0, 1.0, ten)),
        ("middle", ((ten, ten), np.array([[1, 1]], np.uint16), 0, 0, 1.0, ten)),
        ("middle", ((ten, ten), np.array([0], np.uint16), 0, 0, 1.0, ten)),
        ("middle", ((ten, ten), np.zeros((0, 2), np.uint16), 3, 0, 1.0, ten)),
        ("middle", ((ten, ten), np.zeros((0, 2), np.uint16), 0, 1, 1.0, ten)),
        ("middle", ((ten, ten), np.zeros((0, 2), np.uint16), 0, -1, 1.0, ten)),
        ("gram", ((ten, ten), 9, np.zeros((2, 2)))),
        ("gram", ((ten, ten), -1, np.zeros((2, 2)))),
        ("gram", ((ten, ten), 10, np.zeros((2, 1)))),
        ("gram", ((), 10, np.zeros((0, 0)))),
        ("gram", ((ten, ten), 10, np.zeros(33, np.uint8)[1:])),
        ("gram_row", ((ten, ten), 0, 9, np.zeros((2, 2)))),
        ("gram_row", ((ten, ten), 0, -1, np.zeros((2, 2)))),
        ("gram_row", ((ten, ten), 0, 10, np.zeros((2, 1)))),
        ("gram_row", ((ten, ten), 0, 10, np.zeros(33, np.uint8)[1:])),
        ("gram_row", ((ten, ten), 2, 10, np.zeros((2, 2)))),
        ("gram_row", ((ten, ten), -1, 10, np.zeros((2, 2)))),
        ("gram_row", ((), 0, 10, np.zeros((2, 0)))),
    ]
    for name, arguments in wrong:
        with pytest.raises(ValueError):
            getattr(native, name)(*arguments)
    with pytest.raises((TypeError, BufferError, ValueError)):
        native.fp32_put(np.zeros(40, np.uint8), 1.0, memoryview(bytes(40)), 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no instructions named vax"):
        native.use("vax")  # type: ignore[attr-defined]


@needs_native
def test_other_threads_run_while_a_kernel_does() -> None:
    # In turns of the interpreter of 1000 s nobody else runs unless the kernel lets go.
    vector, out = np.ones(8 << 20, np.float32), np.zeros(8 << 20, np.float32)
    before = sys.getswitchinterval()
    ran = threading.Event()
    started = threading.Event()

    def other() -> None:
        started.wait()
        ran.set()

    thread = threading.Thread(target=other)
    thread.start()
    sys.setswitchinterval(1000.0)
    try:
        started.set()
        for _ in range(200):
            native.mean((vector,) * 4, np.ones(4, np.float32), out)
            if ran.is_set():
                break
        assert ran.is_set()
    finally:
        sys.setswitchinterval(before)
        thread.join()


def test_the_pure_path_is_taken_on_request_and_the_reason_is_said() -> None:
    code = "from shoal.learning.reduce import kernels; print(kernels.active.__name__, '|', kernels.which())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"SHOAL_PURE": "1", "PATH": ""}
    )
    assert done.stdout.strip() == "shoal.learning.reduce.pure_kernels | pure numpy (SHOAL_PURE is set)"


def test_without_a_native_helper_the_pure_path_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shoal.learning.reduce._kernels", None)
    chosen, why = kernels.load(pure=False)
    assert chosen is pure_kernels
    assert not why.native and "not installed" in why.reason


@needs_native
def test_a_native_helper_of_another_revision_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("shoal.learning.reduce._kernels"), "REVISION", 0)
    chosen, why = kernels.load(pure=False)
    assert chosen is pure_kernels
    assert why.reason == f"the native helper is of revision 0, not {kernels.REVISION}: install Shoal again"


def test_the_mean_and_the_check_of_exact_agree_on_both_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    generator = torch.Generator().manual_seed(1)
    vectors = [torch.randn(100_003, generator=generator) for _ in range(5)]
    results = []
    for implementation in (native, pure_kernels):
        monkeypatch.setattr(kernels, "active", implementation)
        results.append(exact.weighted_mean(vectors, [3, 1, 4, 1, 5]))
        assert exact.check_finite(vectors[0]) is None
        assert exact.check_finite(torch.tensor([1.0, float("nan")])) == "NaN at 1; 1 of 2 values are not finite"
    assert torch.equal(*results)
    monkeypatch.setattr(defaults, "EXACT_CHUNK", 97)
    assert torch.equal(exact.weighted_mean(vectors, [3, 1, 4, 1, 5]), results[0])
    with pytest.raises(ProtocolMisuse, match="have no mean"):
        exact.factors([0.0])
