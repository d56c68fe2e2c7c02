"""Child processes of a benchmark: started fresh, ordered about by JSON lines, always ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, BinaryIO

import trio

from .children import HEAD_START

SCRIPT = Path(__file__).resolve().parents[1] / "bench.py"
#: Seconds for one order, unless its sender says otherwise: importing torch eight times on a busy machine takes a while.
PATIENCE = 180.0
#: Lines of a failed child's errors that are shown.
SHOWN_LINES = 30


class ChildFailed(Exception):
    """A child ended, or was silent for too long. The text names it and shows its last words."""


class Child:
    """One process. ``ask`` sends an order and returns its answer."""

    def __init__(self, name: str, process: trio.Process, errors: BinaryIO) -> None:
        self.name = name
        self._process = process
        self._errors = errors
        self._buffer = bytearray()
        #: Answers to come that nobody waits for: their orders were given up.
        self._owed = 0

    async def ask(self, order: str, *, patience: float = PATIENCE, **arguments: Any) -> dict[str, Any]:
        """Send an order, wait for its answer. Raises :class:`ChildFailed`.

        Cancelled: the order is carried out, and its answer is dropped when it comes. One order at a time.
        """
        assert self._process.stdin is not None
        answer: bytes | None = None
        with trio.move_on_after(patience):
            try:
                await self._process.stdin.send_all(json.dumps({"order": order, **arguments}).encode() + b"\n")
            except trio.BrokenResourceError:
                pass  # it has ended: its end of the other pipe says so too
            answer = await self._answer()
        if answer is None:
            raise self._failure(f"did not answer {order!r} within {patience:.0f} s")
        if not answer:
            with trio.move_on_after(5):
                await self._process.wait()
            raise self._failure(f"ended during {order!r} with exit code {self._process.returncode}")
        result: dict[str, Any] = json.loads(answer)
        return result

    def signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self._process.returncode is None:
            self._process.send_signal(number)

    async def wait(self) -> None:
        """Until it has ended, however."""
        await self._process.wait()

    async def missing(self, *, patience: float = PATIENCE) -> str:
        """Of a child that may lack a package: what it lacks, or nothing. Asked once, before the first order."""
        line = b""
        with trio.move_on_after(patience):
            line = await self._line()
        if not line:
            raise self._failure("did not start")
        return str(json.loads(line).get("missing", ""))

    async def _answer(self) -> bytes:
        self._owed += 1
        while True:
            line = await self._line()
            self._owed -= 1
            if not line or not self._owed:
                return line

    async def _line(self) -> bytes:
        assert self._process.stdout is not None
        while (at := self._buffer.find(b"\n")) < 0:
            data = await self._process.stdout.receive_some(65536)
            if not data:
                return b""
            self._buffer += data
        line = bytes(self._buffer[:at])
        del self._buffer[: at + 1]
        return line

    def _failure(self, what: str) -> ChildFailed:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").splitlines()
        shown = "\n".join(f"    {line}" for line in lines[-SHOWN_LINES:])
        return ChildFailed(f"process {self.name} {what}\n{shown or '    (it said nothing)'}")

    async def close(self) -> None:
        """End the process, if it has not ended by itself."""
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()
        self._errors.close()


class Children:
    """The processes of one benchmark; see :func:`children`."""

    def __init__(self) -> None:
        self._all: list[Child] = []

    async def start(self, kind: str, count: int, python: str = sys.executable) -> list[Child]:
        """Start ``count`` processes of one kind (see :mod:`.children`) under the interpreter ``python``."""
        started = []
        for number in range(count):
            errors = tempfile.TemporaryFile()  # noqa: SIM115  closed with the child
            process = await trio.lowlevel.open_process(
                [python, str(SCRIPT), "child", kind],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                # Ctrl-C reaches the parent alone, which then ends its children one by one.
                start_new_session=True,
                env={**os.environ, "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo")},
            )
            child = Child(f"{kind} {number}", process, errors)
            self._all.append(child)
            started.append(child)
        return started

    async def end(self, child: Child) -> None:
        """End one of them."""
        self._all.remove(child)
        await child.close()

    async def close(self) -> None:
        with trio.CancelScope(shield=True):
            for child in self._all:
                await child.close()
        self._all.clear()


@asynccontextmanager
async def children() -> AsyncIterator[Children]:
    """A set of processes, none of which outlives the block."""
    group = Children()
    try:
        yield group
    finally:
        await group.close()


async def act_all(group: Sequence[Child], patience: float = PATIENCE) -> list[dict[str, Any]]:
    """All reduce at the same moment. What they hold is looked at when the last one is done: that takes long, and they
    share the cores."""
    done = await ask_all(group, "go", at=time.monotonic() + HEAD_START, patience=patience)
    return await checked(group, done)


async def checked(group: Sequence[Child], done: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What ``group`` said of a reduce, with what is wrong with their results (None: nothing), and their digests."""
    checks = await ask_all(group, "check")
    return [{**check, **answer} for check, answer in zip(checks, done, strict=True)]


async def ask_all(
    group: Sequence[Child], order: str, each: Sequence[dict[str, Any]] | None = None, **arguments: Any
) -> list[dict[str, Any]]:
    """Give all the same order at once (``each``: what differs); returns their answers in order."""
    answers: list[dict[str, Any]] = [{} for _ in group]

    async def one(number: int, child: Child) -> None:
        answers[number] = await child.ask(order, **arguments, **(each[number] if each else {}))

    async with trio.open_nursery() as nursery:
        for number, child in enumerate(group):
            nursery.start_soon(one, number, child)
    return answers
