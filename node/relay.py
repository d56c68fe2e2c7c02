"""`shoal relay`: a relay node as a process, with data directory, signals, control socket and terminal; no torch."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import trio

from ..transport.address import Address, scope_of
from ..transport.errors import ConfigError, RemoteError
from ..transport.host import Host, RealHost
from ..transport.identity import Identity
from . import defaults
from .boundary import first_error
from .control import (
    ControlServer,
    Done,
    Ended,
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
    Stop,
)
from .datadir import DataDir
from .dht_inspect import answer_dht
from .dht_messages import DHT_REQUESTS
from .doc_messages import GetDocument, GetDocuments
from .health import health_of
from .lifetime import Lifetime
from .linkinfo import peer_infos
from .listening import parse_hosts, parse_via
from .relay_node import RelayNode
from .snapshots import SnapshotKeeper
from .terminal import Lines, configure_logging, read_line
from .ticket import Ticket

OPEN, PRIVATE = "relay", "relay of a private swarm"


def relay(options: argparse.Namespace) -> int:
    """Run a relay until it is stopped."""
    ticket = None
    if options.ticket is not None:
        ticket = Ticket.parse(read_line() if options.ticket == "-" else options.ticket)
    bind = parse_hosts(options.host, defaults.RELAY_PORT if options.port is None else options.port)
    via = parse_via(options.via)
    data = DataDir(options.data_dir)
    data.create()
    with data.locked():
        configure_logging(options.log_level)
        psk = _key(options, data, ticket)
        known = dict.fromkeys((*via, *(ticket.addresses if ticket is not None else ())))
        identity = data.identity(RealHost().entropy)

        async def main() -> int:
            return await RelayDaemon(
                RealHost(),
                identity,
                data,
                bind=bind,
                psk=psk,
                via=tuple(known),
                leash=options.leash,
                map_port=not options.no_port_mapping,
            ).run()

        try:
            return trio.run(main)
        except BaseExceptionGroup as group:
            raise first_error(group) from None


def _key(options: argparse.Namespace, data: DataDir, ticket: Ticket | None) -> bytes | None:
    """The key of the private swarm to serve: the ticket's, that of ``--private``, or what the data directory keeps."""
    given = None
    if options.private is not None:
        given = data.make_private(Path(options.private) if options.private else None, RealHost().entropy)
    if ticket is None:
        return given or data.swarm_key()
    if given is not None and given != ticket.psk:
        raise ConfigError("the ticket belongs to another swarm than the key of --private; give one of them")
    return ticket.psk


class RelayDaemon:
    """One relay process; the caller holds the lock of ``data``."""

    def __init__(
        self,
        host: Host,
        identity: Identity,
        data: DataDir,
        *,
        bind: tuple[Address, ...],
        psk: bytes | None = None,
        via: tuple[Address, ...] = (),
        leash: bool = False,
        map_port: bool = False,
    ) -> None:
        self._data, self._leash = data, leash
        self._lines = Lines(sys.stdout)
        self._events = EventLog()
        self.node = RelayNode(
            host,
            identity,
            bind=bind,
            psk=psk,
            via=via,
            snapshot=data.read_dht(),
            map_port=map_port,
            on_note=self._lines.line,
        )
        self._snapshots = SnapshotKeeper(data, self.node.dht)
        self._life = Lifetime(self.node.stop, self._lines.line, self._lines.flush)

    async def run(self) -> int:
        """Run to the end. Returns the exit code; raises :class:`ConfigError`, in groups."""
        async with trio.open_nursery() as nursery:
            server = ControlServer(self._data, self._answer, self._events)

            async def serve(*, task_status: trio.TaskStatus[None]) -> None:
                await server.run(task_status=task_status)

            await nursery.start(serve)
            await nursery.start(self._life.watch_signals)
            if self._leash:
                nursery.start_soon(self._life.hold_leash)
            nursery.start_soon(self._snapshots.run)
            await nursery.start(self._run_node, nursery.cancel_scope)
            self._say_where()
        return 0

    async def _run_node(self, all_of_it: trio.CancelScope, *, task_status: trio.TaskStatus[None]) -> None:
        await self.node.run(task_status=task_status)
        await self._snapshots.write()
        self._events.append(Ended("left", "stopped", self.status()))
        with trio.move_on_after(defaults.GOODBYE / 2):
            await self._events.drained()
        self._lines.line("stopped")
        all_of_it.cancel()

    def _say_where(self) -> None:
        node = self.node
        say = self._lines.line
        say(f"{PRIVATE if node.psk else OPEN}  {node.identity.peer_id.short}, data in {self._data.path}")
        say(f"reach  {node.reach()[1]}")
        say("others begin with it:")
        addresses = node.addresses()
        for address in [a for a in addresses if scope_of(a) != "loopback"] or addresses:
            say(f"  shoal start TASK --via {address}")
        if node.psk is not None:
            say(f"it answers only who has its key, which is in {self._data.swarm_key_path} or in the swarm's tickets")

    def status(self) -> NodeStatus:
        sent, received = self.node.traffic.total()
        return NodeStatus(
            pid=os.getpid(),
            data_dir=str(self._data.path),
            peer=self.node.identity.peer_id.text,
            ticket="",
            t=self.node.uptime(),
            addresses=tuple(map(str, self.node.addresses())),
            reach=self.node.reach()[1],
            links=len(self.node.endpoint.links()),
            bytes_sent=sent,
            bytes_received=received,
            rounds=0,
            run=None,
            role="relay",
            private=self.node.psk is not None,
            notes=(
                ("router", self.node.port.outcome),
                ("relaying", self._relaying()),
                ("contacts", f"{len(self.node.dht.table)} peers in the table, others ask for them"),
            ),
        )

    def _relaying(self) -> str:
        traversal = self.node.endpoint.traversal
        if traversal is None:
            return "no"
        return f"{len(traversal.relay.reservations)} peers have a place here, {traversal.relay.circuits} circuits"

    async def _answer(self, request: Any) -> Any:
        match request:
            case GetStatus():
                return self.status()
            case GetPeers():
                return PeerList(peer_infos(self.node.endpoint))
            case GetHealth():
                return health_of(self.node.endpoint, self.node.port)
            case Stop():
                self._life.begin_stop("shoal stop")
                return Done()
            case Export():
                raise ConfigError("this node is a relay: it trains nothing and has no weights to export")
            case _ if isinstance(request, DHT_REQUESTS):
                return await answer_dht(self.node.dht, request)
            case GetDocuments() | GetDocument():
                raise ConfigError("this node is a relay: it takes part in no run and holds no documents")
            case GetCheckpoints() | RestoreCheckpoint() | PinCheckpoint():
                raise ConfigError("this node is a relay: it takes part in no run and keeps no checkpoints")
            case _:
                raise RemoteError(f"unknown request {type(request).__name__}")
