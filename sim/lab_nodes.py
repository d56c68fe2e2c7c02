"""The lab's side of its node processes: start them on hosts, tell them what to do, hear their answers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import trio

from ..transport.errors import ShoalError
from . import defaults
from .lab_messages import Account, Answer, Attach, Command, Describe, Failed, Learn, Linked, read_answer, write_command
from .netlab import LabHost, NetLab

A = TypeVar("A", bound=Answer)
T = TypeVar("T")


class LabFailed(ShoalError):
    """A process of the lab did not do what it was told, or died; the text names it and its log."""


class LabNode:
    """One node process on a host. Commands go one after the other."""

    def __init__(self, host: LabHost, process: trio.Process, log: Path) -> None:
        self.host, self.log = host, log
        self.process = process
        #: What it last said about itself.
        self.account: Account
        self._rest = b""

    @property
    def name(self) -> str:
        return f"{self.host.name} ({self.host.kind.name})"

    async def tell(self, command: Command) -> None:
        assert self.process.stdin is not None
        try:
            await self.process.stdin.send_all(write_command(command))
        except trio.BrokenResourceError:
            raise LabFailed(f"{self.name} is dead; log: {self.tail()}") from None

    async def hear(self, kind: type[A], seconds: float) -> A:
        """The next answer, which must be a ``kind``. Raises :class:`LabFailed`, also when it says that it failed."""
        answer = await self.next(seconds)
        if isinstance(answer, kind):
            return answer
        if isinstance(answer, Failed):
            raise LabFailed(f"{self.name}: {answer.reason}")
        raise LabFailed(f"{self.name} answers {answer}, {kind.__name__} expected")

    async def next(self, seconds: float) -> Answer:
        assert self.process.stdout is not None
        with trio.move_on_after(seconds):
            while b"\n" not in self._rest:
                data = await self.process.stdout.receive_some()
                if not data:
                    raise LabFailed(f"{self.name} died; log: {self.tail()}")
                self._rest += data
            line, _, self._rest = self._rest.partition(b"\n")
            return read_answer(line)
        raise LabFailed(f"{self.name} says nothing for {seconds:g} s; log: {self.tail()}")

    async def ask(self, command: Command, kind: type[A], seconds: float = defaults.LAB_ANSWER) -> A:
        await self.tell(command)
        return await self.hear(kind, seconds)

    async def attach(self, common: LabNode) -> Linked:
        """Connect it to the common peer."""
        return await self.ask(Attach(common.account.peer, common.account.addresses), Linked)

    async def describe(self) -> Account:
        self.account = await self.ask(Describe(), Account)
        return self.account

    async def learn(self, other: LabNode) -> None:
        """Let it know the other's record, as it stands now."""
        account = await other.describe()
        self.account = await self.ask(Learn(account.record, account.signature), Account)

    def tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(["", *(f"    {line}" for line in lines[-defaults.TAIL :])]) if lines else "(empty)"


@asynccontextmanager
async def started(lab: NetLab, host: LabHost, folder: Path) -> AsyncIterator[LabNode]:
    """A node process on ``host``, listening; killed at the end of the block. Raises :class:`LabFailed`."""
    log = folder / f"{host.name}.log"
    command = lab.command(host, sys.executable, "-m", "shoal.sim.lab_child", str(defaults.LAB_PORT))
    with log.open("wb") as output:
        process = await trio.lowlevel.open_process(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output, start_new_session=True
        )
    try:
        node = LabNode(host, process, log)
        node.account = await node.hear(Account, defaults.LAB_BOOT)
        yield node
    finally:
        with trio.CancelScope(shield=True):
            if process.returncode is None:
                process.kill()
            await process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    await trio.aclose_forcefully(stream)


class Builder:
    """Changes a lab from trio tasks: each change in a worker thread, one at a time. ``delay``: of its hosts, s."""

    def __init__(self, lab: NetLab, delay: float = 0.0) -> None:
        self.lab, self.delay = lab, delay
        self._one = trio.Lock()

    async def __call__(self, change: Callable[[], T]) -> T:
        async with self._one:
            return await trio.to_thread.run_sync(change)

    @asynccontextmanager
    async def host(self, name: str, kind: str) -> AsyncIterator[LabHost]:
        """A host for the time of a block."""
        host = await self(lambda: self.lab.add(name, kind, delay=self.delay))
        try:
            yield host
        finally:
            with trio.CancelScope(shield=True):
                await self(lambda: self.lab.remove(host))


def environment() -> dict[str, str]:
    """Of node processes that train: one thread each, as two cores are shared by all."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
