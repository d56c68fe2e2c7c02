"""Many independent runs on all cores: progress, results that outlive the sweep, and a Ctrl-C that ends all at once."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import attrs
import cattrs
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from ..transport.errors import ConfigError

C = TypeVar("C")
R = TypeVar("R")

#: Seconds between two words of progress where no terminal shows it.
TELL_EVERY = 60.0

#: Seconds between two looks whether Ctrl-C was pressed while nothing else happens.
LOOK_EVERY = 0.1


def stopwatch() -> Callable[[], float]:
    """A function that gives the seconds since now: how long a sweep takes, for who waits for it."""
    began = time.monotonic()
    return lambda: time.monotonic() - began


@attrs.frozen
class Kept(Generic[C, R]):
    """Results in ``folder``, a file each, written by whoever ran the case as soon as it is done. Picklable.

    ``kind``: the class of results, of attrs. ``version``: changes with everything that results follow from beside their
    case; those of another version are not found again.
    """

    folder: Path
    kind: type[R]
    version: str

    def _file(self, case: C) -> Path:
        return self.folder / f"{hashlib.blake2b(f'{self.version} {case!r}'.encode(), digest_size=12).hexdigest()}.json"

    def load(self, case: C) -> R | None:
        """What became of ``case``; None when it is not known, or its file is not whole."""
        try:
            known = json.loads(self._file(case).read_text())
            return cattrs.structure(known["result"], self.kind)
        except (OSError, ValueError, KeyError, TypeError, cattrs.BaseValidationError):
            return None

    def save(self, case: C, result: R) -> None:
        """All of it or nothing, also when the process is killed meanwhile."""
        file = self._file(case)
        scratch = file.with_suffix(f".{os.getpid()}")
        told: Any = {"case": repr(case), "result": cattrs.unstructure(result)}
        scratch.write_text(json.dumps(told))
        scratch.replace(file)

    @staticmethod
    def prepare(folder: Path) -> None:
        """Raises :class:`ConfigError` where no files can be written."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot make the folder {folder}: {error.strerror}") from error
        if not os.access(folder, os.W_OK):
            raise ConfigError(f"cannot write into the folder {folder}")


@attrs.frozen
class _Each(Generic[C, R]):
    """Picklable: a case with what became of it."""

    run: Callable[[C], R]
    kept: Kept[C, R] | None

    def __call__(self, case: C) -> tuple[C, R]:
        result = self.run(case)
        if self.kept is not None:
            self.kept.save(case, result)
        return case, result


def run_all(
    run: Callable[[C], R],
    cases: Sequence[C],
    processes: int | None = None,
    console: Console | None = None,
    *,
    kept: Kept[C, R] | None = None,
    cost: Callable[[C], float] = lambda case: 1.0,
    later: float = 0.0,
) -> dict[C, R]:
    """``run`` of every one of ``cases``, ``processes`` at a time (default: a core each), the dearest first.

    ``run``: deterministic in its case; it, cases and results can be pickled, and cases are hashable. What it raises
    ends the sweep. ``kept``: where results are looked for first, and kept. ``cost``: of a case, in any unit, for the
    time that is left; ``later``: what comes after this call, in that unit.
    """
    processes = processes or os.cpu_count() or 1
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    found: dict[C, R] = {}
    for case in cases if kept is not None else ():
        known = kept.load(case) if kept is not None else None
        if known is not None:
            found[case] = known
    todo = sorted((case for case in cases if case not in found), key=cost, reverse=True)
    if found and console is not None:
        console.print(f"{len(found)} of {len(cases)} runs were kept by an earlier sweep")
    each = _Each(run, kept)
    with Progress(*columns, console=console, disable=console is None or not console.is_terminal) as progress:
        task = progress.add_task("training", total=len(cases), completed=len(found))
        began = told = time.monotonic()
        paid, whole = 0.0, sum(map(cost, todo)) + later

        def note(case: C, result: R) -> None:
            nonlocal told, paid
            found[case] = result
            paid += cost(case)
            now = time.monotonic()
            left = (now - began) * (whole / paid - 1.0) / 60 if paid else 0.0
            progress.update(task, advance=1, description=f"training, about {left:.0f} minutes left")
            if console is not None and not console.is_terminal and now - told > TELL_EVERY:
                told = now
                console.print(f"{len(found)} of {len(cases)} runs; about {left:.0f} minutes left")

        alone = processes == 1 or not todo
        if _alone(each, todo, note) if alone else _spread(each, todo, max(1, min(processes, len(todo))), note):
            return found
    if console is not None:
        rest = "" if kept is None else "; the same command goes on from there"
        console.print(f"interrupted: {len(found)} of {len(cases)} runs are done{rest}")
    # The pool's semaphores go with it: at the end of a command nothing else would remove them, and Python complains.
    gc.collect()
    raise KeyboardInterrupt


def _alone(each: Callable[[C], tuple[C, R]], cases: Sequence[C], note: Callable[[C, R], None]) -> bool:
    """:func:`_spread` in this process."""
    try:
        for case in cases:
            note(*each(case))
    except KeyboardInterrupt:
        return False
    except BaseExceptionGroup as group:  # as trio's nurseries hand it on
        if group.split(KeyboardInterrupt)[1] is not None:
            raise
        return False
    return True


def _spread(each: Callable[[C], tuple[C, R]], cases: Sequence[C], processes: int, note: Callable[[C, R], None]) -> bool:
    """``note`` what became of ``cases``, as it comes; False after Ctrl-C. All processes are gone then."""
    # Not forked: torch's threads do not survive that. Leaving the block ends all of them, whatever they do.
    context = multiprocessing.get_context("spawn")
    with _interrupt() as interrupted, context.Pool(processes, _end_with_the_parent) as pool:
        coming = pool.imap_unordered(each, cases)
        for _ in cases:
            while True:
                # Not raised where the signal meets us: that may be between a lock of the pool's and its release.
                if interrupted.is_set():
                    return False
                try:
                    case, result = coming.next(timeout=LOOK_EVERY)
                except multiprocessing.TimeoutError:
                    continue
                note(case, result)
                break
    return True


@contextlib.contextmanager
def _interrupt() -> Iterator[threading.Event]:
    """Set by Ctrl-C, which does nothing else within; never, in a thread that gets no signals."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    before = signal.signal(signal.SIGINT, lambda number, frame: interrupted.set())
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def _end_with_the_parent() -> None:
    """In a process of the pool: Ctrl-C is for the parent alone, and when that is gone, nobody waits for us."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
