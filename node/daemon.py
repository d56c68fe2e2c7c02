"""A node as a process: data directory, signals, control socket and terminal around :class:`.node.Node`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import trio

from ..learning.events import Event, RoundReport
from ..learning.run import Run
from ..transport.errors import ConfigError, RemoteError, ShoalError
from ..transport.host import Host
from ..transport.identity import Identity
from . import defaults
from .boundary import first_error
from .checkpoint_commands import pinned_words
from .checkpoints import list_checkpoints, pin_checkpoint, restore_checkpoint
from .console import Console
from .control import (
    CheckpointList,
    ControlServer,
    Done,
    Ended,
    EventFrame,
    EventLog,
    Export,
    GetCheckpoints,
    GetHealth,
    GetPeers,
    GetStatus,
    NodeStatus,
    PeerList,
    PinCheckpoint,
    RestoreCheckpoint,
    RoundFrame,
    Stop,
    finite,
)
from .datadir import DataDir, NodeRecord
from .dht_inspect import answer_dht
from .dht_messages import DHT_REQUESTS
from .doc_answers import answer as answer_documents
from .doc_messages import GetDocument, GetDocuments
from .health import health_of
from .lifetime import Lifetime
from .node import Node, NodeConfig
from .reach import reach_of
from .snapshots import SnapshotKeeper


@attrs.frozen
class DaemonOptions:
    """What a process adds to a node. ``task`` and ``hosts``: remembered for a restart. ``export``: written at the end.
    ``leash``: end with standard input.
    """

    task: str
    hosts: tuple[str, ...] = ()
    export: Path | None = None
    leash: bool = False


class Daemon:
    """One node process; the caller holds the lock of ``data``."""

    def __init__(
        self,
        host: Host,
        identity: Identity,
        data: DataDir,
        config: NodeConfig,
        options: DaemonOptions,
        console: Console,
    ) -> None:
        self._data, self._options, self._console = data, options, console
        self._events = EventLog()
        self.node = Node(
            host, identity, config, on_event=self._event, on_round=self._round, on_note=console.note
        )  # fmt: skip
        self._snapshots = SnapshotKeeper(data, self.node.dht)
        self._life = Lifetime(self.node.stop, console.note, console.flush)

    async def run(self) -> int:
        """Run the node to its end. Returns the exit code; raises what :meth:`Node.run` raises, ungrouped."""
        error: BaseException | None = None
        async with trio.open_nursery() as nursery:
            server = ControlServer(self._data, self._answer, self._events)
            await nursery.start(_run_server, server)
            await nursery.start(self._life.watch_signals)
            if self._options.leash:
                nursery.start_soon(self._life.hold_leash)
            nursery.start_soon(self._snapshots.run)
            nursery.start_soon(self._watch_reach)
            try:
                async with trio.open_nursery() as inner:
                    inner.start_soon(self._ready)
                    # May end before it takes part: somebody lost patience with a join.
                    await self.node.run()
                    inner.cancel_scope.cancel()
            except BaseExceptionGroup as group:
                error = first_error(group)
                if not isinstance(error, ShoalError):
                    raise
            with trio.CancelScope(shield=True):
                await self._finish(error)
            nursery.cancel_scope.cancel()
        if error is not None:
            raise error
        return 0

    # -- beginning and end ---------------------------------------------------------------------------------------------

    async def _ready(self) -> None:
        await self.node.taking_part.wait()
        ticket = self.node.ticket()
        assert ticket is not None
        spec = self.node.signed.open() if self.node.signed is not None else None
        founder = spec is not None and spec.founder == self.node.identity.peer_id
        addresses = self.node.endpoint.addresses()
        port = next((address.port for address in addresses), 0)
        via = tuple(map(str, self.node.config.via))
        hosts = ",".join(self._options.hosts)
        self._data.write_record(NodeRecord(ticket.encode(), self._options.task, hosts, port, founder, via))
        if spec is not None:
            self._console.ready(self.node, spec, ticket, self.node.reach())

    async def _finish(self, error: BaseException | None) -> None:
        reason = (
            str(error) if error is not None else "all rounds are done" if self.node.outcome == "finished" else "stopped"
        )
        run = self.node.run_here
        if run is not None and self._options.export is not None and error is None:
            try:
                await self.node.export(self._options.export)
            except ConfigError as problem:
                reason = f"{reason}; no export: {problem}"
                self._console.note(reason)
        await self._snapshots.write()
        outcome = "failed" if error is not None else self.node.outcome
        self._events.append(Ended(outcome, reason, self.status()))
        with trio.move_on_after(defaults.GOODBYE / 2):
            await self._events.drained()
        self._console.ended(outcome, reason)

    async def _watch_reach(self) -> None:
        """Say who can connect when that becomes known, or changes: nobody looks at `status` all the time."""
        await self.node.taking_part.wait()
        said = reach_of(self.node.endpoint)
        while True:
            await trio.sleep(defaults.REACH_LOOK)
            now = reach_of(self.node.endpoint)
            if now[0] != said[0]:
                said = now
                self._console.note(f"reach      {now[1]}")

    # -- telling -------------------------------------------------------------------------------------------------------

    def _event(self, event: Event) -> None:
        self._events.append(EventFrame(event))
        self._console.event(event)

    def _round(self, report: RoundReport, samples: int) -> None:
        report = attrs.evolve(report, loss=finite(report.loss), metric=finite(report.metric))
        sent, received = self.node.traffic()
        self._events.append(RoundFrame(report, samples, sent, received))
        status = self.node.status()
        self._console.round(report, sent, status.metric_name if status is not None else "")

    def status(self) -> NodeStatus:
        run = self.node.status()
        if run is not None:
            run = attrs.evolve(run, loss=finite(run.loss), metric=finite(run.metric))
        ticket = self.node.ticket()
        sent, received = self.node.traffic()
        return NodeStatus(
            pid=os.getpid(),
            data_dir=str(self._data.path),
            peer=self.node.identity.peer_id.text,
            ticket=ticket.encode() if ticket is not None else "",
            t=self.node.uptime(),
            addresses=tuple(map(str, self.node.endpoint.addresses())),
            reach=self.node.reach(),
            links=len(self.node.endpoint.links()),
            bytes_sent=sent,
            bytes_received=received,
            rounds=self.node.run_here.reported if self.node.run_here is not None else 0,
            run=run,
            private=self.node.psk is not None,
            notes=() if self.node.staged is None else self.node.staged.notes(),
        )

    def _run_here(self) -> Run:
        if self.node.run_here is None:
            raise ConfigError("this node takes part in no run yet; it has no state")
        return self.node.run_here

    async def _answer(self, request: Any) -> Any:
        match request:
            case GetStatus():
                return self.status()
            case GetPeers():
                run = self.node.status()
                return PeerList(self.node.peers(), self.node.standings(), () if run is None else run.trial)
            case GetHealth():
                return health_of(self.node.endpoint, self.node.port)
            case Stop():
                self._life.begin_stop("shoal stop")
                return Done()
            case Export(path):
                return Done(await self.node.export(Path(path)))
            case GetCheckpoints():
                return CheckpointList(await list_checkpoints(self._run_here()))
            case RestoreCheckpoint(ref, path):
                return Done(await restore_checkpoint(self._run_here(), ref, Path(path)))
            case PinCheckpoint(ref, pinned):
                return Done(pinned_words(await pin_checkpoint(self._run_here(), ref, pinned)))
            case _ if isinstance(request, DHT_REQUESTS):
                return await answer_dht(self.node.dht, request)
            case GetDocuments() | GetDocument():
                return await answer_documents(self.node.documents, request)
            case _:
                raise RemoteError(f"unknown request {type(request).__name__}")


async def _run_server(server: ControlServer, *, task_status: trio.TaskStatus[None]) -> None:
    await server.run(task_status=task_status)


def run_daemon(make: Callable[[], Daemon]) -> int:
    """Run a daemon in this thread's own event loop; ``make`` is called inside it."""

    async def main() -> int:
        return await make().run()

    # With Python's 5 ms a training thread makes every message wait; see defaults.
    sys.setswitchinterval(defaults.SWITCH_INTERVAL)
    try:
        return trio.run(main)
    except BaseExceptionGroup as group:
        raise first_error(group) from None
