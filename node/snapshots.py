"""Keeps on disk what a node's DHT knows, so that a node that was killed finds back without an address."""

from __future__ import annotations

import logging

import trio

from ..dht.kademlia.node import Dht
from ..transport.errors import ConfigError
from . import defaults
from .datadir import DataDir

log = logging.getLogger(__name__)


class SnapshotKeeper:
    """Writes ``DIR/dht``: every SNAPSHOT_INTERVAL, and soon after there is more to lose than was written."""

    def __init__(self, data: DataDir, dht: Dht) -> None:
        self._data, self._dht = data, dht
        self._written_at = dht.host.now()
        self._contacts = 0
        self._own: tuple[bytes, ...] = ()

    async def run(self) -> None:
        """Until cancelled. What cannot be written is logged, and tried again."""
        while True:
            await trio.sleep(defaults.SNAPSHOT_LOOK)
            due, _ = self.due()
            if due:
                await self.write()

    def due(self) -> tuple[bool, str]:
        """Is it time to write? Returns (decision, reason)."""
        if self._owned() != self._own:
            return True, "a record of our own has changed"
        if len(self._dht.table) and len(self._dht.table) >= 2 * self._contacts:
            return True, "twice as many contacts as were written"
        if self._dht.host.now() - self._written_at >= defaults.SNAPSHOT_INTERVAL:
            return True, "its time has come"
        return False, "nothing to lose"

    def _owned(self) -> tuple[bytes, ...]:
        return tuple(record.signature for record, _ in self._dht.values.own())

    async def write(self) -> None:
        """Write now. The disk is waited for in a thread; a cancelled write leaves the old file or the new one."""
        self._written_at = self._dht.host.now()
        contacts, own, snapshot = len(self._dht.table), self._owned(), self._dht.snapshot()
        try:
            await self._dht.host.run_blocking(lambda: self._data.write_dht(snapshot))
        except ConfigError as error:
            log.warning("%s", error)
        else:
            self._contacts, self._own = contacts, own
