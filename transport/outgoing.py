"""Records on their way to the wire: what leaves in one turn, and data that are not copied for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TypeAlias

import trio

from . import pool, pump
from .aead import Aead

Buffer: TypeAlias = bytes | bytearray | memoryview


class Lent:
    """A record of data that stay where they are, and as they are, until the peer has them: it is sealed as it leaves,
    and what is kept of it is the data themselves. ``owner``: whoever promised that."""

    __slots__ = ("_aead", "_head", "body", "counter", "owner", "prefix", "size")

    def __init__(self, aead: Aead, counter: int, header: bytes, head: bytes, body: Buffer, owner: object) -> None:
        self._aead, self.counter, self._head, self.body, self.owner = aead, counter, head, body, owner
        #: The length before the record, and its head, in clear.
        self.prefix = header + head
        #: Bytes on the wire.
        self.size = len(self.prefix) + len(body) + 2 * aead.suite.tag

    def plain(self) -> memoryview:
        """The plaintext, in a new buffer."""
        return memoryview(b"".join((self._head, self.body)))

    def keep(self) -> None:
        """From here on the data may change: what they are now is copied."""
        self.body, self.owner = bytes(self.body), None

    def seal(self) -> memoryview:
        """The bytes for the wire, in a buffer of their own."""
        wire = pool.take()[: self.size]
        wire[: len(self.prefix)] = self.prefix
        pump.seal(self._aead, self.counter, [(wire, len(self._head), self.body)])
        return wire


class Outgoing:
    """Records that leave one after the other on one pipe, in one turn; ``aead`` seals those that are lent."""

    def __init__(self, aead: Aead, *records: bytearray | memoryview) -> None:
        self.aead = aead
        self._records: list[bytearray | memoryview | Lent] = list(records)
        #: Bytes on the wire.
        self.size = sum(map(len, records))
        #: Some are lent.
        self.lent = False
        self._transfer: pump.Transfer | None = None

    def __bool__(self) -> bool:
        return bool(self._records)

    def add(self, record: bytearray | memoryview | Lent) -> None:
        """``record`` leaves after the others."""
        self._records.append(record)
        if isinstance(record, Lent):
            self.lent = True
            self.size += record.size
        else:
            self.size += len(record)

    def wires(self) -> Iterator[bytearray | memoryview]:
        """The bytes for the wire, sealed as they are asked for."""
        for record in self._records:
            yield record.seal() if isinstance(record, Lent) else record

    async def pump(self, mover: pump.Pump, descriptor: Callable[[], int]) -> None:
        """Send all of them on a socket, whose descriptor is asked for again after each recall. Raises OSError.

        Cancelled, a part of a record may be gone.
        """
        room: memoryview | None = None
        rest: bytes | None = None  # of a record that is gone in part
        while self._records:
            items: list[pump.Item] = []
            for record in self._records[: pump.MOST_JOBS]:
                if isinstance(record, Lent):
                    room = room or pool.take()
                    items.append((room, record.prefix, record.body, record.counter))
                else:
                    items.append((None, b"", record, 0))
            if rest is not None:
                items[0] = (None, b"", rest, 0)
            transfer = self._transfer = mover.send(descriptor(), self.aead, items, self.size)
            try:
                await transfer.wait()
            finally:
                self._transfer = None
                gone, part, error = transfer.result()
            if error:
                raise OSError(error, os.strerror(error))
            del self._records[:gone]
            if gone:
                rest = None
            if part:
                # It was recalled. What is sealed already must not be sealed again from data that may be others by now.
                wire, prefix, body, _ = items[gone]
                size = len(prefix) + len(body) + 2 * self.aead.suite.tag
                rest = bytes(memoryview(body)[part:] if wire is None else wire[part:size])

    def take_back(self, owner: object) -> None:
        """What ``owner`` has lent, and has not left, may change from here on, whoever has acknowledged what of it."""
        mine = [each for each in self._records if isinstance(each, Lent) and each.owner is owner]
        if mine:
            self.recall()
            for lent in mine:
                lent.keep()

    def recall(self) -> None:
        """What is lent will change: whoever looks at it from another thread stops first."""
        if self._transfer is not None:
            self._transfer.recall()
