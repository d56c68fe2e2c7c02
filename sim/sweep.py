"""Many independent runs on all cores: progress, and a Ctrl-C that ends all of them at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import attrs
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

C = TypeVar("C")
R = TypeVar("R")

#: Seconds between two words of progress where no terminal shows it.
TELL_EVERY = 60.0


def stopwatch() -> Callable[[], float]:
    """A function that gives the seconds since now: how long a sweep takes, for who waits for it."""
    began = time.monotonic()
    return lambda: time.monotonic() - began


@attrs.frozen
class _Each(Generic[C, R]):
    """Picklable: a case with what became of it."""

    run: Callable[[C], R]

    def __call__(self, case: C) -> tuple[C, R]:
        return case, self.run(case)


def run_all(
    run: Callable[[C], R], cases: Sequence[C], processes: int | None = None, console: Console | None = None
) -> dict[C, R]:
    """``run`` of every one of ``cases``, ``processes`` at a time (default: a core each), in whatever order.

    ``run``: a function of a module, deterministic in its case; cases are hashable, and both they and results can be
    pickled. What ``run`` raises ends the sweep.
    """
    processes = processes or os.cpu_count() or 1
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=console is None or not console.is_terminal) as progress:
        task = progress.add_task("training", total=len(cases))
        found: dict[C, R] = {}
        began = told = time.monotonic()

        def note(case: C, result: R) -> None:
            nonlocal told
            found[case] = result
            progress.advance(task)
            now = time.monotonic()
            if console is not None and not console.is_terminal and now - told > TELL_EVERY:
                told, left = now, (now - began) * (len(cases) / len(found) - 1.0)
                console.print(f"{len(found)} of {len(cases)} runs; about {left / 60:.0f} minutes left")

        if processes == 1:
            for case in cases:
                note(case, run(case))
            return found
        # Not forked: torch's threads do not survive that. Leaving the block ends all of them, whatever they do.
        context = multiprocessing.get_context("spawn")
        with context.Pool(max(1, min(processes, len(cases))), _end_with_the_parent) as pool:
            for case, result in pool.imap_unordered(_Each(run), cases):
                note(case, result)
        return found


def _end_with_the_parent() -> None:
    """In a process of the pool: Ctrl-C is for the parent alone, and when that is gone, nobody waits for us."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
