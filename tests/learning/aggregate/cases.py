"""Random inputs for rules, and byzfl 0.0.11 where it is installed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from typing import Any

import attrs
import numpy as np
import pytest
from numpy.typing import NDArray

Floats = NDArray[np.float64]

SIZES = (5, 9, 15, 16)
KINDS = ("normal", "ties", "duplicates", "outliers", "shifted")


@attrs.frozen(eq=False)
class Example:
    """``x`` (n, d), float32; the same as float64; f with n > 2 f + 2 unless n is too small for it."""

    x: NDArray[np.float32]
    f: int
    kind: str

    @property
    def n(self) -> int:
        return len(self.x)

    @property
    def wide(self) -> Floats:
        return self.x.astype(np.float64)


def examples(
    count: int,
    *,
    seed: int = 0,
    sizes: tuple[int, ...] = SIZES,
    kinds: tuple[str, ...] = KINDS,
    most_f: int = 3,
    d: int | None = None,
) -> Iterator[Example]:
    """``count`` of them, of all sizes and kinds in turn."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        n, kind = sizes[number % len(sizes)], kinds[number // len(sizes) % len(kinds)]
        f = int(rng.integers(0, min(most_f, (n - 3) // 2) + 1))
        x = rng.standard_normal((n, d or int(rng.integers(1, 30))))
        if kind == "ties":
            x = rng.integers(-2, 3, x.shape).astype(np.float64)
        elif kind == "duplicates":
            x = x[rng.integers(0, n // 2 + 1, n)]
        elif kind == "outliers":
            for row in rng.permutation(n)[:f]:
                x[row] *= 10.0 ** rng.uniform(0, 6)
        elif kind == "shifted":
            x += 30.0
        yield Example(x.astype(np.float32), f, kind)


def load_byzfl() -> types.SimpleNamespace | None:
    """Its ``__init__`` wants torchvision; the modules with the rules do not, so an empty package stands in for it."""
    if "byzfl" not in sys.modules:
        spec = importlib.util.find_spec("byzfl")
        if spec is None or spec.submodule_search_locations is None:
            return None
        package = types.ModuleType("byzfl")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["byzfl"] = package
    classes: dict[str, Any] = {}
    for name in ("aggregators", "preaggregators"):
        module = importlib.import_module(f"byzfl.aggregators.{name}")
        classes |= {key: value for key, value in vars(module).items() if isinstance(value, type)}
    return types.SimpleNamespace(**classes)


byzfl: Any = load_byzfl()
needs_byzfl = pytest.mark.skipif(byzfl is None, reason="byzfl is not installed: pip install --no-deps byzfl==0.0.11")
