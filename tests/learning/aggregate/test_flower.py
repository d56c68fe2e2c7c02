"""Rules against those of flwr, where it is installed: `pip install --no-deps flwr==1.42.0` (seen to pass with that)."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shoal.learning.aggregate import aggregate, resolve
from tests.learning.aggregate.cases import Example, Floats, examples


def load() -> Any:
    """The module with its rules; the rest of flwr, and what that needs, is not wanted: types stand in for it."""
    found = importlib.util.find_spec("flwr")
    if found is None or found.submodule_search_locations is None:
        return None
    path = Path(next(iter(found.submodule_search_locations))) / "server" / "strategy" / "aggregate.py"
    names = ("flwr", "flwr.common", "flwr.server", "flwr.server.client_proxy")
    before = {name: sys.modules.get(name) for name in names}
    try:
        for name in names:
            sys.modules[name] = types.ModuleType(name)
        common: Any = sys.modules["flwr.common"]
        common.FitRes = common.NDArray = common.NDArrays = common.parameters_to_ndarrays = object
        sys.modules["flwr.server.client_proxy"].ClientProxy = object  # type: ignore[attr-defined]
        spec = importlib.util.spec_from_file_location("flwr_aggregate", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # Its annotations are evaluated where it is defined: list[NDArrays] of a plain object is no type.
        common.NDArrays = list
        common.NDArray = np.ndarray
        spec.loader.exec_module(module)
        return module
    finally:
        for name, old in before.items():
            if old is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = old


flower = load()
pytestmark = pytest.mark.skipif(flower is None, reason="flwr is not installed: pip install --no-deps flwr==1.42.0")

CASES = 1000


def ours(text: str, example: Example) -> Floats:
    found = aggregate(list(torch.from_numpy(example.x)), resolve(text)).vector
    return found.numpy().astype(np.float64)


def theirs(example: Example) -> list[tuple[list[Floats], int]]:
    return [([row], 1) for row in example.wide]


def close(one: Floats, other: Floats, example: Example) -> None:
    assert np.abs(one - other).max() <= 1e-6 * max(1.0, np.abs(example.wide).max()), (
        example.kind,
        example.n,
        example.f,
    )


def test_median() -> None:
    for example in examples(CASES):
        close(ours("median", example), flower.aggregate_median(theirs(example))[0], example)


def test_trimmed_mean() -> None:
    for example in examples(CASES):
        share = (example.f + 0.5) / example.n  # int(share * n) is f, whatever the rounding
        wanted = flower.aggregate_trimmed_avg(theirs(example), share)[0]
        close(ours(f"trimmed_mean:f={example.f}", example), wanted, example)


def scores(example: Example) -> Floats:
    """As flwr's, from squared distances of all pairs."""
    apart = np.square(example.wide[:, None] - example.wide[None]).sum(axis=2)
    return np.sort(apart, axis=1)[:, 1 : max(1, example.n - example.f - 2) + 1].sum(axis=1)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_krum_and_multi_krum(keep: int) -> None:
    compared = 0
    for example in examples(CASES):
        ordered = np.sort(scores(example))
        if example.n < max(2 * example.f + 3, keep + 1):
            continue
        if ordered[keep] - ordered[keep - 1] <= 1e-5 * max(ordered[keep], 1e-30):
            continue  # of equal scores each takes another
        compared += 1
        wanted = flower.aggregate_krum(theirs(example), example.f, 0 if keep == 1 else keep)[0]
        text = f"krum:f={example.f}" if keep == 1 else f"multikrum:f={example.f},keep={keep}"
        close(ours(text, example), wanted, example)
    assert compared > CASES / 3
