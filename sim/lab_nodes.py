"""The lab's side of its node processes: start them on hosts, tell them what to do, hear their answers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import TypeVar

import trio

from ..learning.events import RoundReport
from ..node.control import ControlClient, NodeStatus, RoundFrame, Watcher
from ..node.datadir import DataDir
from ..transport.errors import ConfigError, ShoalError
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
            raise LabFailed(f"{self.name} is dead; log: {_tail(self.log)}") from None

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
                    raise LabFailed(f"{self.name} died; log: {_tail(self.log)}")
                self._rest += data
            line, _, self._rest = self._rest.partition(b"\n")
            return read_answer(line)
        raise LabFailed(f"{self.name} says nothing for {seconds:g} s; log: {_tail(self.log)}")

    async def ask(self, command: Command, kind: type[A], seconds: float = defaults.LAB_ANSWER) -> A:
        await self.tell(command)
        return await self.hear(kind, seconds)

    async def attach(self, common: ShoalProcess) -> Linked:
        """Connect it to the common peer."""
        return await self.ask(Attach(common.peer, common.addresses), Linked)

    async def describe(self) -> Account:
        self.account = await self.ask(Describe(), Account)
        return self.account

    async def settle(self) -> Account:
        """Wait until it knows whether it can be dialled, and has a place at a relay for those who cannot dial it.

        Behind a router that maps ports it can be dialled, once the router has done so. Who has one IP version needs a
        relay for those with the other.
        """
        kind = self.host.kind
        with trio.move_on_after(defaults.LAB_SETTLE):
            while True:
                account = await self.describe()
                dialled = account.reach == "reachable"
                if (
                    dialled
                    if kind.four and kind.six and not kind.nat
                    else account.relays and (dialled or not kind.upnp)
                ):
                    return account
                await trio.sleep(defaults.POLL)
        found = f"{self.account.reach}, {self.account.reason}"
        raise LabFailed(f"{self.name} has no place after {defaults.LAB_SETTLE:g} s: it is {found}")

    async def learn(self, other: LabNode) -> None:
        """Let it know the other's record, as it stands now."""
        account = await other.describe()
        self.account = await self.ask(Learn(account.record, account.signature), Account)


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


class ShoalProcess:
    """A real `shoal` process on a host, followed through its control socket."""

    def __init__(self, lab: NetLab, host: LabHost, folder: Path) -> None:
        self.lab, self.host = lab, host
        self.data = DataDir(folder / f"{host.name}-data")
        self.log = folder / f"{host.name}.log"
        self.reports: list[RoundReport] = []
        #: Of a relay that is up.
        self.peer = ""
        self.addresses: tuple[str, ...] = ()
        self._process: trio.Process | None = None

    @asynccontextmanager
    async def running(self, *arguments: str) -> AsyncIterator[None]:
        """Runs `shoal` with ``arguments``; killed at the end of the block."""
        command = [sys.executable, "-m", "shoal.node.process", *arguments, "--data-dir", str(self.data.path)]
        with self.log.open("wb") as output:
            self._process = await trio.lowlevel.open_process(
                self.lab.command(self.host, *command, "--log-level", "info"),
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            )  # fmt: skip
        try:
            yield
        finally:
            with trio.CancelScope(shield=True):
                self.kill()
                await self._process.wait()

    @asynccontextmanager
    async def relaying(self) -> AsyncIterator[None]:
        """Runs `shoal relay`, and knows its peer id and addresses once it is up. Raises :class:`LabFailed`."""
        async with self.running("relay", "--port", str(defaults.LAB_PORT)):
            status = await self.status(lambda status: bool(status.addresses))
            self.peer, self.addresses = status.peer, status.addresses
            yield

    def check(self) -> None:
        """Raises :class:`LabFailed` if it has ended."""
        if self._process is None or self._process.returncode is not None:
            raise LabFailed(f"`shoal` on {self.host.name} has ended; log: {_tail(self.log)}")

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    async def status(self, ready: Callable[[NodeStatus], bool]) -> NodeStatus:
        """What its control socket says, once that is ``ready``. Raises :class:`LabFailed`."""
        with trio.move_on_after(defaults.BOOT):
            while self._process is not None and self._process.returncode is None:
                if self.data.control_path.exists():
                    try:
                        found = await trio.to_thread.run_sync(ControlClient(self.data).status, abandon_on_cancel=True)
                    except ConfigError:
                        pass
                    else:
                        if ready(found):
                            return found
                await trio.sleep(defaults.POLL)
        raise LabFailed(f"{self.host.name} is not up; log: {_tail(self.log)}")

    async def follow(self, rounds: int) -> None:
        """Note its rounds until ``rounds`` of them are committed, or it ends."""
        async with aclosing(await Watcher.open(self.data)) as watcher:
            while len(self.reports) < rounds and (frame := await watcher.receive()) is not None:
                if isinstance(frame, RoundFrame):
                    self.reports.append(frame.report)


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
        async with self._while(lambda: self.lab.add(name, kind, delay=self.delay)) as host:
            yield host

    @asynccontextmanager
    async def beside(self, name: str, host: LabHost) -> AsyncIterator[LabHost]:
        """One more host on a LAN, for the time of a block within that of ``host``."""
        async with self._while(lambda: self.lab.add_neighbour(name, host)) as neighbour:
            yield neighbour

    @asynccontextmanager
    async def _while(self, build: Callable[[], LabHost]) -> AsyncIterator[LabHost]:
        host = await self(build)
        try:
            yield host
        finally:
            with trio.CancelScope(shield=True):
                await self(lambda: self.lab.remove(host))


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    return "\n".join(["", *(f"    {line}" for line in lines[-defaults.TAIL :])]) if lines else "(empty)"
