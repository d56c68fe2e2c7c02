"""What a node may ask of the world: two clocks, one random source, one network, and a place for blocking work.

Node code never calls ``time.time()``, opens a socket or uses a global random generator; it asks its
:class:`Host`. The same node code therefore runs on real sockets (:class:`RealHost`) and in virtual
time (``shoal.sim.world``), deterministically.
"""

from __future__ import annotations

import os
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import trio

if TYPE_CHECKING:
    from .aead import CipherOffer
    from .network import Network
    from .webrtc import WebRtcEngine

T = TypeVar("T")


class Host(ABC):
    """The injected world of one node."""

    network: Network
    #: Protocol jitter and choices that need no secrecy. Seeded in simulation.
    random: random.Random
    #: Ciphers to offer; None: what this machine measures. Virtual time fixes them (``aead.NOMINAL_CIPHERS``).
    ciphers: tuple[CipherOffer, ...] | None = None
    #: Engines for WebRTC connections; None: that way to a peer does not exist (virtual time).
    webrtc: WebRtcEngine | None = None

    @abstractmethod
    def now(self) -> float:
        """Monotonic seconds, for deadlines. The zero is arbitrary."""

    @abstractmethod
    def wall(self) -> float:
        """Seconds since the Unix epoch, for signatures and expiry. May be skewed; never used for deadlines."""

    @abstractmethod
    def entropy(self, n: int) -> bytes:
        """``n`` unpredictable bytes (in simulation: from the node's seed). All keys and nonces come from here."""

    @abstractmethod
    async def run_blocking(self, fn: Callable[..., T], *args: object) -> T:
        """Run ``fn(*args)`` (training step, SQLite, hashing of bulk data) off the event loop.

        On real hosts a worker thread; in virtual time inline, because an autojump clock would run on.
        Not cancellable once begun: cancellation is delivered after ``fn`` returns.
        """

    async def compute(self, modelled: float, fn: Callable[..., T], *args: object) -> T:
        """:meth:`run_blocking` for work that is modelled to take ``modelled`` seconds.

        Real hosts take the time it takes. A host in virtual time runs ``fn`` inline and then sleeps for
        ``modelled`` seconds, or what that is on the machine it plays.
        """
        return await self.run_blocking(fn, *args)


class RealHost(Host):
    """The machine we run on: trio's clock, the system's random generator, kernel TCP, worker threads."""

    def __init__(self, network: Network | None = None) -> None:
        if network is None:
            from .tcp import TcpNetwork

            network = TcpNetwork()
        from .webrtc_process import ChildEngine

        self.network = network
        self.webrtc = ChildEngine()
        self.random = random.Random(os.urandom(16))

    def now(self) -> float:
        return trio.current_time()

    def wall(self) -> float:
        return time.time()

    def entropy(self, n: int) -> bytes:
        return os.urandom(n)

    async def run_blocking(self, fn: Callable[..., T], *args: object) -> T:
        return await trio.to_thread.run_sync(fn, *args)
