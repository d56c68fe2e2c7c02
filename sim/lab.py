"""`shoal lab nat`: every pair of kinds of hosts connects with real node processes, and the matrix of how."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import attrs
import trio
import trio.lowlevel
from rich.console import Console
from rich.progress import Progress

from ..node.boundary import first_error
from ..node.cli import FAILED, INTERRUPTED, OK
from ..transport.errors import ConfigError, ShoalError
from . import defaults
from .lab_messages import Meet, Met, Pull, Pulled, Watched
from .lab_nodes import Builder, ShoalProcess, started
from .lab_report import NEIGHBOUR, Matrix, PairResult, legend, required
from .lab_scenarios import check_names, run_scenarios
from .netlab import KINDS, NetLab, NetLabUnavailable, unavailable
from .outputs import check_outputs, write_text

#: The kinds that the matrix has unless told otherwise.
MATRIX = ("public", "public4", "cone", "symmetric", "cgnat", "udp_blocked", "upnp", "ipv6")


def choose_kinds(wanted: Sequence[str]) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """``(kinds to run, (kind, why not) of the others)``. Raises :class:`ConfigError` for a kind nobody knows."""
    for kind in wanted:
        if kind not in KINDS:
            raise ConfigError(f"no kind of host is called {kind!r}; there are {', '.join(KINDS)}")
    chosen = [kind for kind in KINDS if kind in (wanted or MATRIX)]
    reasons = [(kind, unavailable(kind)) for kind in chosen]
    missing = tuple((kind, reason) for kind, reason in reasons if reason is not None)
    return tuple(kind for kind, reason in reasons if reason is None), missing


async def run_matrix(
    lab: NetLab,
    kinds: Sequence[str],
    folder: Path,
    *,
    delay: float = 0.0,
    on_result: Callable[[PairResult], None] = lambda result: None,
) -> tuple[PairResult, ...]:
    """Every kind dials every kind, and a neighbour behind its own NAT. Logs go to ``folder``.

    All know one public peer. ``delay``: seconds, either way, at each host: a round trip between two takes four of them.
    Ten pairs are under way at once. One that did not get what it must then tries once more with nobody beside it, as
    holes are punched within tens of milliseconds and a busy machine is late by more; its result says so.
    """
    builder = Builder(lab, delay)
    turn = trio.CapacityLimiter(defaults.LAB_PAIRS)
    measuring = trio.Lock()
    pairs = all_pairs(kinds)
    results: dict[tuple[str, str], PairResult] = {}
    async with AsyncExitStack() as stack:
        common_host = await stack.enter_async_context(builder.host("common", "public"))
        common = ShoalProcess(lab, common_host, folder)
        await stack.enter_async_context(common.relaying())

        async def run(number: int, pair: tuple[str, str]) -> None:
            async with turn:
                results[pair] = await _pair(builder, common, folder, number, pair, measuring)
            on_result(results[pair])

        async with trio.open_nursery() as nursery:
            for number, pair in enumerate(pairs):
                nursery.start_soon(run, number, pair)
                # In this order: a limiter serves tasks as they come.
                await trio.lowlevel.checkpoint()
        for number, pair in enumerate(pairs, len(pairs)):
            if not (earlier := results[pair]).ok:
                result = await _pair(builder, common, folder, number, pair, measuring)
                results[pair] = attrs.evolve(result, earlier=earlier.got())
    return tuple(results[pair] for pair in pairs)


def all_pairs(kinds: Sequence[str]) -> list[tuple[str, str]]:
    """(dialler, answerer), row by row of the matrix."""
    return [
        (dialler, answerer) for dialler in kinds for answerer in (*kinds, *([NEIGHBOUR] if KINDS[dialler].nat else []))
    ]


async def _pair(
    builder: Builder, common: ShoalProcess, folder: Path, number: int, pair: tuple[str, str], measuring: trio.Lock
) -> PairResult:
    result = PairResult(*pair)
    enough = required(*pair).enough
    watch = defaults.LAB_WATCH if enough else defaults.LAB_WATCH_RELAY
    common.check()
    try:
        async with AsyncExitStack() as stack:
            hosts = [await stack.enter_async_context(builder.host(f"p{number}a", pair[0]))]
            beside = pair[1] == NEIGHBOUR
            second = builder.beside(f"p{number}b", hosts[0]) if beside else builder.host(f"p{number}b", pair[1])
            hosts.append(await stack.enter_async_context(second))
            one, other = [await stack.enter_async_context(started(builder.lab, host, folder)) for host in hosts]
            for node in (one, other):
                await node.attach(common)
            for node in (one, other):
                await node.settle()
            await one.learn(other)
            async with measuring:  # nobody else connects meanwhile: the two cores are this pair's
                await one.tell(Meet(other.account.peer, watch, enough))
                met = await one.hear(Met, defaults.LAB_MEET + defaults.LAB_ANSWER)
            result = attrs.evolve(result, first=met.seconds, first_way=met.way)
            watched = await one.hear(Watched, defaults.LAB_WATCH + defaults.LAB_ANSWER)
            best, way = watched.changes[-1]
            result = attrs.evolve(result, best=best, way=way, changes=watched.changes)
            async with measuring:
                pull = Pull(other.account.peer, defaults.LAB_BULK)
                pulled = await one.ask(pull, Pulled, defaults.LAB_PULL + defaults.LAB_ANSWER)
            return attrs.evolve(result, rate=pulled.bytes / pulled.seconds)
    except ShoalError as error:
        return attrs.evolve(result, error=str(error))


def nat(options: argparse.Namespace) -> int:
    """The command."""
    # The matrix is wide, and a log or pipe has no width of its own.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else defaults.LAB_WIDTH)
    choose_kinds(options.kinds)
    check_names(options.scenario or ())
    check_outputs(options.json, options.plot)
    if (reason := unavailable()) is not None:
        raise NetLabUnavailable(f"no NAT lab on this machine: {reason}")
    folder = Path(tempfile.mkdtemp(prefix="shoal-lab-logs-"))
    work = _scenarios if options.scenario else _matrix
    code = until_signalled(lambda: work(options, folder, console))
    if code == FAILED:
        console.print(f"logs of the nodes: {folder}", soft_wrap=True)
    else:
        shutil.rmtree(folder)
    return code


def until_signalled(work: Callable[[], Awaitable[bool]]) -> int:
    """Run ``work`` to its end, or until Ctrl-C or SIGTERM, which let it clear up; the exit code."""

    async def main() -> int:
        code = INTERRUPTED
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_on_signal, nursery.cancel_scope)
            code = OK if await work() else FAILED
            nursery.cancel_scope.cancel()
        return code

    try:
        return trio.run(main)
    except BaseExceptionGroup as group:
        raise first_error(group) from None


async def _cancel_on_signal(scope: trio.CancelScope) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for _ in signals:
            scope.cancel()


async def _scenarios(options: argparse.Namespace, folder: Path, console: Console) -> bool:
    results = await run_scenarios(options.scenario, folder, console)
    if options.json is not None:
        write_text(options.json, json.dumps([attrs.asdict(result) for result in results], indent=1))
    return all(result.ok for result in results)


async def _matrix(options: argparse.Namespace, folder: Path, console: Console) -> bool:
    kinds, skipped = choose_kinds(options.kinds)
    began = trio.current_time()
    console.print(legend(kinds))
    for kind, reason in skipped:
        console.print(f"  {kind} is left out: {reason}", soft_wrap=True)
    with NetLab() as lab:
        how = f"{options.delay * 1e3:g} ms each way at every host: {lab.delays[1]}"
        notes = (how,) if options.delay else ()
        with Progress(console=console, transient=True) as progress:
            bar = progress.add_task("pairs", total=len(all_pairs(kinds)))
            results = await run_matrix(
                lab, kinds, folder, delay=options.delay, on_result=lambda _: progress.advance(bar)
            )
    matrix = Matrix(tuple(kinds), results, trio.current_time() - began, skipped, notes)
    console.print(matrix.table())
    for line in (*matrix.summary(), *notes):
        console.print(line, soft_wrap=True)
    for again in [result for result in results if result.ok and result.earlier]:
        console.print(f"at the second try, alone: {again.second_try()}", soft_wrap=True, markup=False)
    failures = [result.complaint() for result in results if not result.ok]
    for failure in failures:
        console.print(f"not as required: {failure}", soft_wrap=True, markup=False)
    verdict = "every pair is connected as required" if matrix.ok else f"{len(failures)} pairs are not as required"
    console.print(f"{len(results)} pairs in {matrix.seconds:.0f} s: {verdict}")
    if options.json is not None:
        write_text(options.json, matrix.to_json())
    if options.plot is not None:
        matrix.plot(options.plot)
    return matrix.ok
