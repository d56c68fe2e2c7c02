"""The stdlib task: its text, its model, and the n-gram model it is compared with."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from shoal.learning.shard import Shard
from shoal.learning.tasks import stdlib
from shoal.learning.tasks.stdlib import ByteGPT, Stdlib, StdlibLarge, StdlibSmall, corpus, ngram_baseline


def test_the_text_is_source_code_of_this_python() -> None:
    text = corpus()
    assert len(text.train) > 300
    assert sum(map(len, text.train)) > 4_000_000
    assert b"import " in text.held_out.tobytes()


def test_peers_read_different_files_and_together_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    files = tuple(np.full(400, i, dtype=np.uint8) for i in range(20))
    monkeypatch.setattr(stdlib, "corpus", lambda: stdlib.Corpus(files, files[0]))
    task = Stdlib()
    streams = [task.batches(Shard(1, bytes([i]) * 32, 0, i, 3)) for i in range(3)]
    seen = [{int(byte) for batch in itertools.islice(s, 100) for byte in batch.flatten().tolist()} for s in streams]
    assert set.union(*seen) == set(range(20))
    assert sum(map(len, seen)) == 20


def test_batches_are_windows_of_text_and_the_same_for_the_same_shard() -> None:
    task = StdlibSmall()
    shard = Shard(1, bytes(32), 0, 0, 2)
    one, two = (list(itertools.islice(task.batches(shard), 3)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert one[0].shape == (task.batch, task.context + 1)
    assert one[0].dtype == torch.int64
    assert not torch.equal(one[0], one[1])


@pytest.mark.parametrize(("kind", "millions"), [(StdlibSmall, 0.3), (Stdlib, 1.1), (StdlibLarge, 11.0)])
def test_sizes_are_as_documented(kind: type[Stdlib], millions: float) -> None:
    count = sum(p.numel() for p in kind().model().parameters()) / 1e6
    assert 0.8 * millions < count < 1.2 * millions


def test_the_model_never_looks_ahead() -> None:
    torch.manual_seed(0)
    model = ByteGPT(32, 2, 2)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    tokens = torch.randint(256, (1, 24))
    changed = tokens.clone()
    changed[0, 15] = (changed[0, 15] + 1) % 256
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :15], after[:, :15])
    assert not torch.allclose(before[:, 15:], after[:, 15:])


def test_a_new_model_knows_nothing_and_says_eight_bits() -> None:
    task = StdlibSmall()
    with torch.no_grad():
        assert task.evaluate(task.model()) == {"bits_per_byte": pytest.approx(8.0, abs=1e-5)}


def test_training_lowers_the_bits() -> None:
    torch.manual_seed(0)
    task = StdlibSmall()
    model = task.model()
    optimizer = task.optimizer(model)
    for batch in itertools.islice(task.batches(Shard(0, bytes(32), 0, 0, 1)), 30):
        optimizer.zero_grad()
        task.loss(model, batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        assert task.evaluate(model)["bits_per_byte"] < 5.5


def test_the_learning_rate_warms_up() -> None:
    task = StdlibSmall()
    model = task.model()
    optimizer = task.optimizer(model)
    rates = []
    for _ in range(task.warmup + 1):
        optimizer.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(task.learning_rate / task.warmup)
    assert rates[-1] == rates[-2] == task.learning_rate


def naive_bits(order: int, train: bytes, windows: list[bytes], context: int) -> float:
    """The n-gram model of :func:`ngram_baseline`, counted in dictionaries."""
    tables: list[dict[bytes, dict[int, int]]] = []
    for n in range(order + 1):
        table: dict[bytes, dict[int, int]] = {}
        for i in range(n, len(train)):
            row = table.setdefault(train[i - n : i], {})
            row[train[i]] = row.get(train[i], 0) + 1
        tables.append(table)
    bits = []
    for window in windows:
        for i in range(len(window) - context, len(window)):
            chance = 1 / 256
            for n, table in enumerate(tables):
                counts = [c for row in table.values() for c in row.values()]
                once, twice = max(counts.count(1), 1), counts.count(2)
                discount = once / (once + 2 * twice)
                row = table.get(window[i - n : i], {})
                total = sum(row.values())
                if total:
                    seen = max(row.get(window[i], 0) - discount, 0) / total
                    chance = seen + discount * len(row) / total * chance
            bits.append(-math.log2(chance))
    return sum(bits) / len(bits)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_the_ngram_model_agrees_with_a_naive_one(order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    text = np.frombuffer(b"def f(x):\n    return x + 1\n\ndef g(y):\n    return f(y) * 2\n" * 3, dtype=np.uint8)
    held_out = np.frombuffer(b"def h(z):\n    return g(z) + f(z) - 7\n" * 4, dtype=np.uint8)
    monkeypatch.setattr(stdlib, "corpus", lambda: stdlib.Corpus((text,), held_out))
    monkeypatch.setattr(stdlib, "EVALUATION_WINDOWS", 5)
    stdlib.held_out_windows.cache_clear()
    ngram_baseline.cache_clear()
    try:
        windows = [bytes(window) for window in stdlib.held_out_windows(16, 1)]
        assert ngram_baseline(order, 16) == pytest.approx(naive_bits(order, text.tobytes(), windows, 16))
    finally:
        stdlib.held_out_windows.cache_clear()
        ngram_baseline.cache_clear()


def test_longer_contexts_make_the_ngram_model_better() -> None:
    bits = [ngram_baseline(order) for order in (0, 1, 2)]
    assert bits[0] > bits[1] + 0.5 > bits[2] + 1.0
    assert 2.0 < bits[2] < 3.0
    with pytest.raises(ValueError, match="order"):
        ngram_baseline(3)


@pytest.mark.slow
def test_the_default_size_falls_below_the_ngram_model_on_one_core_within_a_minute() -> None:
    torch.manual_seed(0)
    task = Stdlib()
    model = task.model()
    optimizer = task.optimizer(model)
    for batch in itertools.islice(task.batches(Shard(0, bytes(32), 0, 0, 1)), 700):
        optimizer.zero_grad()
        task.loss(model, batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    model.eval()
    with torch.no_grad():
        assert task.evaluate(model)["bits_per_byte"] < ngram_baseline() - 0.15
