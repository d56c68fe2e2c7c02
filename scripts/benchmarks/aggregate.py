"""``bench.py aggregate``: aggregators over vectors in one place, beside byzfl in turns, one thread each."""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
from numpy.typing import NDArray

from shoal.learning import exact
from shoal.learning.aggregate import aggregate, resolve
from shoal.learning.reduce import kernels
from shoal.transport.errors import ConfigError

from .report import Row, machine, show, write

#: Elements of all vectors above which byzfl makes copies too large, or takes too long, for some rules.
_LARGE = 100_000_000

#: How much faster than byzfl's faster form each family is to be.
TARGETS = {"coordinate": 2.0, "gram": 5.0}


@attrs.frozen
class Case:
    """Our text (``{f}`` is f) and byzfl's classes, the last one applied last, with their arguments."""

    ours: str
    family: str
    theirs: tuple[tuple[str, dict[str, Any]], ...] = ()
    large: bool = True


CASES = (
    Case("median", "coordinate", (("Median", {}),)),
    Case("trimmed_mean:f={f}", "coordinate", (("TrMean", {"f": "{f}"}),)),
    Case("meamed:f={f}", "coordinate", (("Meamed", {"f": "{f}"}),), large=False),
    Case("krum:f={f},definition=byzfl", "gram", (("Krum", {"f": "{f}"}),)),
    Case("multikrum:f={f},definition=byzfl", "gram", (("MultiKrum", {"f": "{f}"}),)),
    Case("geometric_median:nu=0.1,unit=length,iterations=3,tolerance=0", "gram", (("GeometricMedian", {}),)),
    Case("geometric_median", "gram"),
    Case("centered_clipping:tau=100,unit=length", "gram", (("CenteredClipping", {}),)),
    Case("monna:f={f}", "gram", (("MoNNA", {"f": "{f}"}),)),
    Case("caf:f={f}", "gram", (("CAF", {"f": "{f}"}),), large=False),
    Case("mda:f={f}", "gram", (("MDA", {"f": "{f}"}),), large=False),
    Case("smea:f={f}", "gram", (("SMEA", {"f": "{f}"}),), large=False),
    Case("arc+multikrum:f={f},definition=byzfl", "gram", (("ARC", {"f": "{f}"}), ("MultiKrum", {"f": "{f}"}))),
    Case("nnm+trimmed_mean:f={f}", "coordinate", (("NNM", {"f": "{f}"}), ("TrMean", {"f": "{f}"})), large=False),
    Case("flag", "gram"),
    Case("flag:iterations=100", "gram"),
    Case("normalise+mean", "gram"),
    Case("mean", "coordinate", (("Average", {}),)),
)


async def run(options: argparse.Namespace) -> None:
    exact.prepare_torch()
    byzfl, why = load_byzfl(options.peer_python)
    print(f"kernels: {kernels.which()}; byzfl: {why}")
    rows: list[Row] = []
    faster: dict[str, str] = {}
    for n, d in options.shapes:
        vectors = np.random.default_rng(1).standard_normal((n, d), dtype=np.float32)
        for case in CASES:
            if options.only in case.ours:
                try:
                    measured = _measure(case, vectors, byzfl, faster, options)
                except ConfigError as error:  # too many sets to look at all of them
                    print(f"left out at {n} x {d}: {error}")
                    continue
                rows += measured
                medians = ", ".join(f"{row.system} {row.median * 1e3:.1f}" for row in measured)
                print(f"{n} x {d} {measured[0].case['rule']}: ms {medians}", flush=True)
        del vectors
        gc.collect()
    _table(rows)
    write(rows, options.json)


def load_byzfl(python: str) -> tuple[types.SimpleNamespace | None, str]:
    """byzfl's aggregators from where ``python`` finds the package, and its version or why it is not there.

    Its ``__init__`` imports torchvision, which has no build for every torch; the modules used here need only numpy,
    scipy and torch. So an empty package stands in for it.
    """
    code = (
        "import importlib.util as u, importlib.metadata as m; s = u.find_spec('byzfl');"
        "print('' if s is None else s.submodule_search_locations[0]); print('' if s is None else m.version('byzfl'))"
    )
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split("\n")
    if not found[0]:
        return None, f"not installed for {Path(python).name} (pip install --no-deps byzfl==0.0.11)"
    package = types.ModuleType("byzfl")
    package.__path__ = [found[0]]
    sys.modules["byzfl"] = package
    classes: dict[str, Any] = {}
    for name in ("aggregators", "preaggregators"):
        module = importlib.import_module(f"byzfl.aggregators.{name}")
        classes |= {key: value for key, value in vars(module).items() if isinstance(value, type)}
    return types.SimpleNamespace(**classes), found[1]


def _measure(
    case: Case,
    vectors: NDArray[np.float32],
    byzfl: types.SimpleNamespace | None,
    faster: dict[str, str],
    options: argparse.Namespace,
) -> list[Row]:
    """Turns of ours and byzfl's with arrays and with tensors; of larger vectors only the form that was faster
    before."""
    n, d = vectors.shape
    f = (n - 1) // 5
    text = case.ours.format(f=f)
    rule = resolve(text)
    acts: dict[str, Callable[[], Any]] = {"shoal": lambda: aggregate(vectors, rule).vector}
    if byzfl is not None and case.theirs and (case.large or n * d < _LARGE):
        for form, data in (("arrays", vectors), ("tensors", torch.from_numpy(vectors))):
            if faster.get(case.ours, form) == form or n * d < _LARGE:
                acts[f"byzfl, {form}"] = _theirs(case, byzfl, f, data)
    found = {system: Row("aggregate", {"rule": text, "n": n, "d": d}, system, "median_s") for system in acts}
    began, runs = time.monotonic(), 0
    while runs <= options.runs:  # the first is not counted
        for system, act in acts.items():
            clock = time.process_time_ns()
            act()
            took = time.process_time_ns() - clock
            if runs:
                found[system].runs.append(max(took, 1) * 1e-9)
        runs += 1
        if options.seconds is not None and runs > 3 and time.monotonic() - began > options.seconds / len(CASES):
            break
    theirs = {system: row.median for system, row in found.items() if system != "shoal"}
    if theirs:
        faster[case.ours] = min(theirs, key=theirs.__getitem__).removeprefix("byzfl, ")
        if "caf" not in text and "smea" not in text:  # their power methods begin at random, and end early
            _check(text, vectors, acts["shoal"](), acts[f"byzfl, {faster[case.ours]}"]())
    for row in found.values():
        row.extra |= {"family": case.family, "f": f, **machine()}
    return list(found.values())


def _theirs(
    case: Case, byzfl: types.SimpleNamespace, f: int, data: NDArray[np.float32] | torch.Tensor
) -> Callable[[], Any]:
    def act() -> Any:
        result: Any = data
        for name, arguments in case.theirs:
            if name == "ARC":
                result = result.copy() if isinstance(result, np.ndarray) else result.clone()  # it writes to its input
            made = getattr(byzfl, name)(**{key: f if value == "{f}" else value for key, value in arguments.items()})
            result = made(result)
        return result

    return act


def _check(text: str, vectors: NDArray[np.float32], ours: torch.Tensor, theirs: Any) -> None:
    other = theirs.numpy() if isinstance(theirs, torch.Tensor) else theirs
    off = float(np.abs(ours.numpy() - other).max())
    if off > 1e-4:
        raise AssertionError(f"{text} over {vectors.shape}: shoal and byzfl differ by {off}")


def _table(rows: list[Row]) -> None:
    groups: dict[tuple[int, int, str], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault((row.case["n"], row.case["d"], row.case["rule"]), {})[row.system] = row
    lines = []
    for (n, d, rule), found in groups.items():
        ours = found["shoal"]
        cells = [
            f"{found[system].median * 1e3:.1f}" if system in found else ""
            for system in ("shoal", "byzfl, arrays", "byzfl, tensors")
        ]
        others = [row.median for system, row in found.items() if system != "shoal"]
        ratio = min(others) / ours.median if others else None
        target = TARGETS[ours.extra["family"]]
        verdict = "" if ratio is None else f"{ratio:.1f}" + ("" if ratio >= target else f" (below {target:.0f})")
        lines.append((f"{n} × {d:.0e} {rule}".replace("e+0", "e"), *cells, verdict))
    show(
        "ms of CPU time on one thread, medians; how many times faster than byzfl's faster form",
        ("vectors, rule", "shoal", "byzfl, arrays", "byzfl, tensors", "ratio"),
        lines,
    )
