"""Runs ``async def test_…`` under trio: in virtual time by default, on the real clock where the test says so.

Virtual time is ``MockClock(autojump_threshold=0)``: a wait takes no time as soon as nothing else can happen. Threads,
sockets and processes need the real clock: mark such tests ``real`` (or ``process`` or ``netns``, which imply it);
``@pytest.mark.real(timeout=120)`` gives one another limit. A test that can never go on fails in both worlds instead
of hanging: it is cancelled, so what it waited for stands in its traceback.

``slow`` tests run with ``--slow`` or ``SHOAL_SLOW=1``.
"""

from __future__ import annotations

import functools
import gc
import inspect
import os
import re
import resource
import signal
import sys
from collections.abc import Awaitable, Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

#: Virtual seconds after which a test counts as stuck. Longer than any record lives, short enough for tests with timers.
VIRTUAL_LIMIT = 86_400.0
#: Real seconds after which a test on the real clock counts as stuck. Generous: the machine may be busy.
REAL_LIMIT = 120.0

REAL_MARKS = ("real", "process", "netns")

# Two cores are shared by node processes and tests: more threads per process are slower, and change the bits.
for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        # Started in the background of a script: what the tests start would be deaf to Ctrl-C too.
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow (or set SHOAL_SLOW=1)")


#: What marks a test that waits for real time, in the text of its file. A process whose clock is virtual only computes.
_IN_REAL_TIME = re.compile(r"mark\.(?:real|netns|process(?!\(computes))\b")


@functools.cache
def _lane(path: str) -> str:
    """What one worker does in one go: a file, as its tests may share what is costly to set up; and all files with tests
    in real time, so that no swarm of processes starves a lab of namespaces. Beside them run tests that only compute."""
    return "real time" if _IN_REAL_TIME.search(Path(path).read_text(encoding="utf-8")) else path


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class Lanes(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _lane(str(config.rootpath / nodeid.partition("::")[0]))

    return Lanes(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.pluginmanager.hasplugin("xdist"):
        # They take longest, so they begin first.
        items.sort(key=lambda item: _lane(str(item.path)) != "real time")
    if config.getoption("--slow") or os.environ.get("SHOAL_SLOW", "0") not in ("", "0"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: runs with --slow or SHOAL_SLOW=1"))


def pytest_runtest_call(item: pytest.Item) -> None:
    """One torch thread for every test that has torch, and arithmetic as it was before any test; torch is never imported
    for this.

    What flushes denormals does so itself, on its own thread; hypothesis draws no floats where a test left that on.
    """
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "set_flush_denormal"):
        torch.set_num_threads(1)
        torch.set_flush_denormal(False)
        exact = sys.modules.get("shoal.learning.exact")
        if exact is not None:
            exact._thread.flushed = False


_collected_at = [0]


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """What a test leaves behind in cycles (whole swarms) goes before the machine runs out of memory."""
    size = _resident()
    if size > _collected_at[0] + (128 << 20):
        gc.collect()
        _collected_at[0] = _resident()


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    test = pyfuncitem.obj
    hypothesis = getattr(test, "hypothesis", None)
    if hypothesis is not None and inspect.iscoroutinefunction(hypothesis.inner_test):
        # hypothesis calls the inner test once per example: each one gets a fresh trio.run
        hypothesis.inner_test = _synchronous(hypothesis.inner_test, pyfuncitem)
        return None
    if not inspect.iscoroutinefunction(test):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    _synchronous(test, pyfuncitem)(**arguments)
    return True


def _synchronous(test: Callable[..., Awaitable[None]], item: pytest.Item) -> Callable[..., None]:
    marker = next((found for name in REAL_MARKS if (found := item.get_closest_marker(name))), None)
    limit = VIRTUAL_LIMIT if marker is None else float(marker.kwargs.get("timeout", REAL_LIMIT))

    @wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        clock = trio.testing.MockClock(autojump_threshold=0) if marker is None else None
        trio.run(partial(_limited, test, args, kwargs, limit, clock is not None), clock=clock)

    return run


async def _limited(
    test: Callable[..., Awaitable[None]], args: tuple[Any, ...], kwargs: dict[str, Any], limit: float, virtual: bool
) -> None:
    where: BaseException | None = None
    with trio.move_on_after(limit) as scope:
        try:
            await test(*args, **kwargs)
        except BaseException as error:
            where = error
            raise
    if scope.cancelled_caught:
        seconds = f"{limit:g} virtual s (threads, sockets: mark it real)" if virtual else f"{limit:g} s"
        raise AssertionError(f"stuck: cancelled after {seconds}; what it waited for stands above") from where
