"""STUN over a network's datagrams: a server with limits, and a client that asks several observers from one socket."""

from __future__ import annotations

import ipaddress
import logging
from collections import OrderedDict

import attrs
import trio

from . import deadlines, defaults, stun
from .address import Address
from .errors import PeerUnreachable
from .host import Host
from .network import Datagrams
from .stun import Observation

log = logging.getLogger(__name__)


class SourceLimit:
    """Token buckets per source, sans-IO: ``rate`` a second after ``burst`` at once, for ``sources`` sources at most.

    A source is an IPv4 address or an IPv6 /64 (what one customer has). When the table is
    full the source unheard longest is forgotten; it starts anew with a full bucket. All sources together are bounded by
    a bucket of their own, as the source of a datagram can be forged.
    """

    def __init__(self, rate: float, burst: float, sources: int, total_rate: float) -> None:
        self._rate = rate
        self._burst = burst
        self._sources = sources
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._total_rate = total_rate
        self._total: tuple[float, float] = (total_rate, 0.0)

    def __len__(self) -> int:
        return len(self._buckets)

    def admit(self, source: Address, now: float) -> bool:
        """Whether one more datagram of ``source`` is served at ``now``."""
        key = _source_key(source)
        tokens, since = self._buckets.pop(key, (self._burst, now))
        tokens = min(self._burst, tokens + (now - since) * self._rate)
        total = min(self._total_rate, self._total[0] + (now - self._total[1]) * self._total_rate)
        admitted = tokens >= 1.0 and total >= 1.0
        self._buckets[key] = (tokens - admitted, now)
        self._total = (total - admitted, now)
        if len(self._buckets) > self._sources:
            self._buckets.popitem(last=False)
        return admitted


def _source_key(source: Address) -> str:
    if ":" not in source.host:
        return source.host
    return ipaddress.ip_address(source.host.partition("%")[0]).packed[:8].hex()


@attrs.define
class StunServer:
    """Answers Binding requests that arrive at ``datagrams``; counts what it did, for metrics."""

    host: Host
    datagrams: Datagrams
    answered: int = 0
    dropped: int = 0
    limit: SourceLimit = attrs.Factory(
        lambda: SourceLimit(defaults.STUN_RATE, defaults.STUN_BURST, defaults.STUN_SOURCES, defaults.STUN_TOTAL_RATE)
    )

    async def run(self) -> None:
        """Serve until cancelled. No request can end it, and none makes it wait longer than its answer takes to leave.

        Raises :class:`trio.ClosedResourceError` when the socket was closed. The socket stays open: its owner closes it.
        """
        while True:
            data, source = await self.datagrams.receive()
            if not self.limit.admit(source, self.host.now()):
                self.dropped += 1
                continue
            reply = stun.answer(data, source)
            if reply is None:
                self.dropped += 1
                continue
            try:
                await self.datagrams.send(reply, source)
            except PeerUnreachable as error:  # no route back, or the kernel has no buffer: theirs to repeat
                self.dropped += 1
                log.debug("STUN answer: %s", error)
                continue
            self.answered += 1


async def observe(host: Host, datagrams: Datagrams, observers: tuple[Address, ...]) -> tuple[Observation, ...]:
    """Ask ``observers`` at once, all from the socket ``datagrams``, under what address they see it.

    Answers in the order of ``observers``, each with a mapped address or the trouble in words; never raises for what
    observers do. A request is repeated as RFC 8489 6.2.1 says, until an answer or ``deadlines.stun()``. It reads the
    socket: nobody else may meanwhile. What is not for us is dropped. Cancellation leaves nothing behind.
    """
    asked = {address: host.entropy(12) for address in observers}
    found: dict[Address, Observation] = {}

    async def ask(address: Address) -> None:
        try:
            for wait in deadlines.stun_repeats():
                await datagrams.send(stun.request(asked[address]), address)
                await trio.sleep(wait)
        except PeerUnreachable as error:
            settle(address, Observation(address, None, error.attempts[0][1] if error.attempts else error.message))
            return
        seconds = deadlines.stun()
        settle(
            address,
            Observation(address, None, f"no answer to {len(deadlines.stun_repeats())} requests in {seconds:.1f} s"),
        )

    scopes: dict[Address, trio.CancelScope] = {address: trio.CancelScope() for address in observers}

    def settle(address: Address, observation: Observation) -> None:
        found.setdefault(address, observation)
        scopes[address].cancel()
        if len(found) == len(asked):
            nursery.cancel_scope.cancel()

    async def scoped(address: Address) -> None:
        with scopes[address]:
            await ask(address)

    async with trio.open_nursery() as nursery:
        for address in asked:
            nursery.start_soon(scoped, address)
        while asked:
            data, source = await datagrams.receive()
            transaction = asked.get(source)
            if transaction is None or source in found:
                continue
            result = stun.read_answer(data, transaction)
            if isinstance(result, Address):
                settle(source, Observation(source, result))
            elif result is not None:
                settle(source, Observation(source, None, result))
    return tuple(found[address] for address in observers)
