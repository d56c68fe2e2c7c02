"""A node that trains nothing: it can be reached, and helps others to meet (relay, STUN, DHT, dial-back, signals).

Needs neither torch nor numpy. What it carries for others is encrypted end to end: it reads nothing of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from ..dht.kademlia.node import Dht
from ..transport.address import Address
from ..transport.endpoint import Endpoint
from ..transport.errors import DecodeError, PeerUnreachable
from ..transport.host import Host
from ..transport.identity import Identity
from ..transport.traversal import Traversal
from . import defaults
from .helping import Helping
from .linkinfo import Traffic
from .listening import free_bind, in_order
from .mapping import PortKeeper
from .reach import RELAY_REMEDY, reach_of

log = logging.getLogger(__name__)


class RelayNode:
    """A relay from start to goodbye. Everything it asks of the world it asks ``host``.

    ``bind``: where to listen. ``psk``: the key of the private swarm it serves; None: an open one. ``via``: addresses of
    other relays and peers to know from the start. ``snapshot``: of an earlier life's DHT. ``map_port``: ask the router
    for its port. ``on_note``: takes a sentence for people, on the event loop.
    """

    def __init__(
        self,
        host: Host,
        identity: Identity,
        *,
        bind: tuple[Address, ...],
        psk: bytes | None = None,
        via: tuple[Address, ...] = (),
        snapshot: bytes | None = None,
        map_port: bool = False,
        on_note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.host, self.identity, self.psk, self.via = host, identity, psk, via
        self.endpoint = Endpoint(
            host, identity, psk=psk, max_links=defaults.RELAY_LINKS, traversal=Traversal(relay=True)
        )
        self.port = PortKeeper(self.endpoint, on_note)
        self.helping = Helping(self.endpoint)
        self.dht = Dht(self.endpoint)
        self.traffic = Traffic(self.endpoint)
        #: Set once it listens.
        self.ready = trio.Event()
        self._bind, self._snapshot, self._map_port, self._on_note = bind, snapshot, map_port, on_note
        self._started = 0.0
        self._stop = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until :meth:`stop` or cancellation, then say goodbye. Raises :class:`ConfigError` (port in use …)."""
        self._started = self.host.now()
        async with trio.open_nursery() as nursery:
            bind = await free_bind(self.host.network, self._bind)
            await nursery.start(self.endpoint.run, bind)
            self._restore()
            self.ready.set()
            task_status.started()
            nursery.start_soon(self.dht.run)
            nursery.start_soon(self.helping.run, bind)
            if self._map_port:
                nursery.start_soon(self.port.run)
            if self.via or self._snapshot is not None:
                nursery.start_soon(self._meet_others)
            await self._stop.wait()
            nursery.cancel_scope.cancel()

    def stop(self) -> None:
        """Say goodbye and end."""
        self._stop.set()

    def _restore(self) -> None:
        if self._snapshot is not None:
            try:
                self.dht.restore(self._snapshot)
            except DecodeError as error:
                # Only a shortcut: peers that know this relay come to it.
                log.warning("what was known of the swarm cannot be read and is left aside: %s", error)

    async def _meet_others(self) -> None:
        try:
            await self.dht.bootstrap([address for address in self.via if address not in self.endpoint.addresses()])
        except PeerUnreachable as error:
            # They are remembered and tried again; and whoever knows this relay's address needs none of them.
            self._on_note(f"none of the others answers yet ({error.message}); they are looked for all the time")

    def addresses(self) -> tuple[Address, ...]:
        """Where others reach it, the most useful first."""
        return in_order(self.endpoint.addresses())

    def reach(self) -> tuple[str, str]:
        """Who can connect: the scope and a sentence."""
        return reach_of(self.endpoint, RELAY_REMEDY)

    def uptime(self) -> float:
        """Seconds since :meth:`run` began."""
        return self.host.now() - self._started
