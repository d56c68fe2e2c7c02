"""The interface between Shoal and a network: listen and dial, both yielding byte streams.

Implementations: :mod:`shoal.transport.tcp` (kernel sockets) and :mod:`shoal.transport.memory`
(virtual time, with latency, bandwidth and loss). One conformance suite runs against both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

import trio

from .address import Address
from .errors import ConfigError

if TYPE_CHECKING:
    from .pump import Lane, Run, Stretch
    from .records import Record, RecordOpener, RecordSealer, SealedRun


class ByteStream(trio.abc.HalfCloseableStream):
    """An ordered, reliable byte pipe between two hosts.

    ``send_all`` and ``receive_some`` follow :class:`trio.abc.Stream`, including what happens on
    cancellation: a cancelled ``send_all`` may have sent a part and the stream is then unusable.
    """

    #: Where the bytes come from, as observed here (what a NAT shows us).
    remote: Address
    #: Our own end of the pipe.
    local: Address
    #: Bytes that go through it best in one turn of whoever reads or writes; 0: a record at a time.
    run = 0

    async def receive_into(self, buffer: memoryview) -> int:
        """As ``receive_some(len(buffer))``, into ``buffer`` (writable bytes, not empty): how many, 0 at the end.

        Cancellation loses nothing: the bytes are still to be received.
        """
        data = await self.receive_some(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def send_now(self, data: bytes | bytearray | memoryview) -> int:
        """Send what can go without waiting: how many of the first bytes (0 is always right). Not during a ``send_all``.

        Raises :class:`trio.BrokenResourceError`, :class:`trio.ClosedResourceError`.
        """
        return 0

    async def send_run(self, wires: Sequence[bytes | bytearray | memoryview]) -> bool:
        """As ``send_all`` of one after the other. False where other tasks had no turn meanwhile; it is cancelled as any
        checkpoint all the same."""
        for wire in wires:
            await self.send_all(wire)
        return True

    def launch(self, sealer: RecordSealer, head: tuple[int, int, int], stretch: Stretch) -> tuple[SealedRun, int, int]:
        """:meth:`RecordSealer.launch` to here: what can go without waiting. Not during a ``send_all``. An error is for
        :meth:`failed`."""
        raise NotImplementedError

    def receive_now(self, buffer: memoryview) -> int | None:
        """As :meth:`receive_into` of what is there: None when nothing is. Only where :attr:`run` is not 0.

        After None, or a turn's worth of bytes, the reader waits: :meth:`wait_receivable`.
        """
        raise NotImplementedError

    def land(self, opener: RecordOpener, lane: Lane, most: int) -> tuple[Run, list[Record]]:
        """:meth:`RecordOpener.land` from here, in the place of :meth:`receive_now`."""
        raise NotImplementedError

    def failed(self, error: int) -> NoReturn:
        """Raise what the ``error`` that :meth:`land` or :meth:`launch` has met means here."""
        raise NotImplementedError

    async def wait_receivable(self) -> None:
        """Wait until :meth:`receive_now` has something, or ask again; where it was not None last time, a checkpoint."""
        raise NotImplementedError

    def round_trip(self) -> float | None:
        """The least seconds that the operating system saw a packet's answer take; None where nobody knows."""
        return None

    def allow_unsent(self, size: int) -> None:
        """A hint: about ``size`` bytes may wait in the operating system. More is faster, but what comes later waits."""
        return  # what has no such buffer has nothing to do


def remaining(wires: Sequence[bytes | bytearray | memoryview], sent: int) -> Sequence[bytes | bytearray | memoryview]:
    """What is left of ``wires`` without their first ``sent`` bytes."""
    for place, wire in enumerate(wires):
        if sent < len(wire):
            return [memoryview(wire)[sent:], *wires[place + 1 :]]
        sent -= len(wire)
    return []


def everybody(host: str) -> bool:
    """Admits connections from anywhere."""
    return True


class Listener(trio.abc.Listener[ByteStream]):
    """Accepts byte streams; ``address`` is where it really listens (port 0 resolved)."""

    address: Address
    #: Asked with the source's host before anything is made of a connection; False: it is reset. Must not wait.
    admit: Callable[[str], bool] = staticmethod(everybody)


class Datagrams(ABC):
    """One UDP socket: unordered, unreliable, unauthenticated. Close it with ``async with`` or :meth:`aclose`.

    An :class:`Address` here means its host and port; it is written ``tcp://`` though UDP is spoken.
    """

    #: Where it really receives (port 0 resolved).
    local: Address

    @abstractmethod
    async def send(self, data: bytes, to: Address) -> None:
        """Send one datagram to the host and port of ``to``; whether it arrives nobody knows.

        Raises :class:`PeerUnreachable` with the reason where this machine already knows that it cannot be sent.
        """

    @abstractmethod
    async def receive(self) -> tuple[bytes, Address]:
        """The next datagram and where it says it comes from. Cancellation loses none.

        Raises :class:`trio.ClosedResourceError` once closed.
        """

    @abstractmethod
    async def aclose(self) -> None:
        """Close; a task that receives is told."""

    async def __aenter__(self) -> Datagrams:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


class Network(ABC):
    """One host's access to a network."""

    @abstractmethod
    async def listen(self, bind: Address) -> Listener:
        """Listen at ``bind`` (port 0 picks one). Raises :class:`ConfigError` naming a port in use."""

    @abstractmethod
    async def dial(self, address: Address, *, shared_port: bool = False) -> ByteStream:
        """Open a byte stream to ``address``.

        ``shared_port``: come from the port of our listener, so that a NAT on the way maps both alike; from any port
        where that cannot be (no listener, a connection between the same two ports is open). Two machines that dial
        each other's listening port from their own at the same time get *one* stream, which both of them dialled.

        Raises :class:`PeerUnreachable` with the reason. Waits as long as the network lets it: the
        caller owns the deadline. Cancellation closes a half-open attempt.
        """

    async def open_datagrams(self, bind: Address) -> Datagrams:
        """A UDP socket at the host and port of ``bind`` (port 0 picks one).

        Raises :class:`ConfigError` where the port is in use, or the network carries no datagrams.
        """
        await trio.lowlevel.checkpoint()
        raise ConfigError(f"{bind}: this network carries no datagrams")

    @abstractmethod
    def reachable_addresses(self, listener: Listener) -> tuple[Address, ...]:
        """The addresses under which others may reach ``listener``: every interface's for a wildcard bind."""
