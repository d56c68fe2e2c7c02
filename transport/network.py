"""The interface between Shoal and a network: listen and dial, both yielding byte streams.

Implementations: :mod:`shoal.transport.tcp` (kernel sockets) and :mod:`shoal.transport.memory`
(virtual time, with latency, bandwidth and loss). One conformance suite runs against both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import trio

from .address import Address


class ByteStream(trio.abc.HalfCloseableStream):
    """An ordered, reliable byte pipe between two hosts.

    ``send_all`` and ``receive_some`` follow :class:`trio.abc.Stream`, including what happens on
    cancellation: a cancelled ``send_all`` may have sent a part and the stream is then unusable.
    """

    #: Where the bytes come from, as observed here (what a NAT shows us).
    remote: Address
    #: Our own end of the pipe.
    local: Address

    async def receive_into(self, buffer: memoryview) -> int:
        """As ``receive_some(len(buffer))``, into ``buffer`` (writable bytes, not empty): how many, 0 at the end.

        Cancellation loses nothing: the bytes are still to be received.
        """
        data = await self.receive_some(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def allow_unsent(self, size: int) -> None:
        """A hint: about ``size`` bytes may wait in the operating system. More is faster, but what comes later waits."""
        return  # what has no such buffer has nothing to do


class Listener(trio.abc.Listener[ByteStream]):
    """Accepts byte streams; ``address`` is where it really listens (port 0 resolved)."""

    address: Address


class Network(ABC):
    """One host's access to a network."""

    @abstractmethod
    async def listen(self, bind: Address) -> Listener:
        """Listen at ``bind`` (port 0 picks one). Raises :class:`ConfigError` naming a port in use."""

    @abstractmethod
    async def dial(self, address: Address) -> ByteStream:
        """Open a byte stream to ``address``.

        Raises :class:`PeerUnreachable` with the reason. Waits as long as the network lets it: the
        caller owns the deadline. Cancellation closes a half-open attempt.
        """

    @abstractmethod
    def reachable_addresses(self, listener: Listener) -> tuple[Address, ...]:
        """The addresses under which others may reach ``listener``: every interface's for a wildcard bind."""
