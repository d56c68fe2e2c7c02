"""Small messages between two peers that share a linked peer: it forwards them, and the answer.

They arrange how two peers behind NATs meet (who dials whom, when to punch, WebRTC's offers), so they are small, few and
answered at once. Nobody is authenticated by being forwarded: what a signal claims must be signed inside, or harmless.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import attrs

from . import defaults
from .errors import ProtocolMisuse, RemoteError, RemoteRefused
from .identity import PeerId
from .rpc import Call, Method, exchange
from .throttle import TokenBucket, source_of

if TYPE_CHECKING:
    from .address import Address
    from .endpoint import Endpoint

log = logging.getLogger(__name__)


@attrs.frozen
class Signal:
    """To a common peer: pass this on."""

    to: PeerId
    kind: str
    body: bytes


@attrs.frozen
class Forwarded:
    """From a common peer, which says that ``origin`` sent it; or from ``origin`` itself."""

    origin: PeerId
    kind: str
    body: bytes


@attrs.frozen
class SignalAnswer:
    body: bytes


SIGNAL = Method("transport.signal", Signal, SignalAnswer)
SIGNALLED = Method("transport.signalled", Forwarded, SignalAnswer)

#: ``handler(origin, via, body)`` → the answer's body. Raises RemoteRefused to refuse. ``origin`` is who ``via`` says.
SignalHandler: TypeAlias = Callable[[PeerId, PeerId, bytes], Awaitable[bytes]]


class PeerRates:
    """A token bucket per peer (or per source address), for the ``peers`` heard last."""

    def __init__(self, rate: float, burst: float, peers: int = defaults.MAX_RATED_PEERS) -> None:
        self._rate, self._burst, self._peers = rate, burst, peers
        self._buckets: dict[PeerId | str, TokenBucket] = {}  # least recently used first

    def __len__(self) -> int:
        return len(self._buckets)

    def bucket(self, peer: PeerId | str, now: float) -> TokenBucket:
        bucket = self._buckets.pop(peer, None)
        if bucket is None:
            bucket = TokenBucket(self._rate, self._burst, now)
            if len(self._buckets) >= self._peers:
                del self._buckets[next(iter(self._buckets))]
        self._buckets[peer] = bucket
        return bucket

    def take(self, peer: PeerId | str, now: float) -> bool:
        """Use one token of ``peer``'s; False when there is none."""
        return self.bucket(peer, now).take(now)


class Askers:
    """What a node does for whoever asks by a signal: so much for one origin, for one common peer, and in all.

    The origin is only what the common peer says, so a common peer that invents origins must not get more. Each argument
    is a (rate per second, burst).
    """

    def __init__(
        self, origin: tuple[float, float], via: tuple[float, float], total: tuple[float, float], now: float
    ) -> None:
        self._origins, self._vias = PeerRates(*origin), PeerRates(*via)
        self._total = TokenBucket(*total, now)

    def admit(self, origin: PeerId, via: PeerId, now: float) -> None:
        """Count one request. Raises :class:`RemoteRefused` when it is one too many."""
        one, passed_on = self._origins.bucket(origin, now), self._vias.bucket(via, now)
        if not one.holds(now):
            raise RemoteRefused("rate", "asked for that too often")
        if not passed_on.holds(now):
            raise RemoteRefused("rate", f"{via.short} passes on too many such requests")
        if not self._total.take(now):
            raise RemoteRefused("rate", "too many peers ask for that")
        one.take(now)
        passed_on.take(now)


class Signals:
    """Sends, forwards and answers signals of ``endpoint``."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._handlers: dict[str, SignalHandler] = {}
        self._senders = PeerRates(defaults.SIGNAL_RATE, defaults.SIGNAL_BURST)
        self._sources = PeerRates(defaults.SIGNAL_SOURCE_RATE, defaults.SIGNAL_SOURCE_BURST)
        self._forwarders = PeerRates(defaults.SIGNALLED_RATE, defaults.SIGNALLED_BURST)
        #: Signals passed on for others; for status.
        self.forwarded = 0
        endpoint.serve(SIGNAL, self._forward)
        endpoint.serve(SIGNALLED, self._answer)

    def handle(self, kind: str, handler: SignalHandler) -> None:
        """Answer signals of ``kind`` with ``handler``, which replaces an earlier one."""
        self._handlers[kind] = handler

    async def ask(
        self, via: PeerId, to: PeerId, kind: str, body: bytes, timeout: float, *, addresses: Sequence[Address] = ()
    ) -> bytes:
        """Send a signal to ``to`` through ``via`` (``via`` = ``to``: over the link with it) and return its answer.

        ``addresses``: where to find ``via`` when there is no link with it. Raises :class:`RemoteRefused` ("not_linked",
        "rate", "no_answer", or a code of the target's own), :class:`WaitExpired` after ``timeout`` seconds and what
        :meth:`Endpoint.call` raises.
        """
        if len(body) > defaults.MAX_SIGNAL:
            raise ProtocolMisuse(f"a signal of {len(body)} bytes, at most {defaults.MAX_SIGNAL} allowed")
        endpoint = self._endpoint
        end = endpoint.host.now() + timeout
        if endpoint.link(via) is None:
            await endpoint.connect(via, addresses, timeout=timeout)
        left = max(0.0, end - endpoint.host.now())
        if via == to:
            own = Forwarded(endpoint.peer_id, kind, body)
            return (await endpoint.call(to, SIGNALLED, own, timeout=left)).body
        return (await endpoint.call(via, SIGNAL, Signal(to, kind, body), timeout=left)).body

    async def _forward(self, call: Call[Signal]) -> SignalAnswer:
        signal, endpoint = call.request, self._endpoint
        now = endpoint.host.now()
        if len(signal.body) > defaults.MAX_SIGNAL or len(signal.kind) > defaults.MAX_SIGNAL_KIND:
            raise RemoteRefused("too_large", f"a signal has at most {defaults.MAX_SIGNAL} bytes")
        if not self._senders.take(call.peer, now):
            raise RemoteRefused("rate", f"more than {defaults.SIGNAL_RATE:g} signals per second")
        # Names are free: many at one address must not use up what we may pass on to a peer.
        if not self._sources.take(source_of(call.link.remote.host)[0], now):
            raise RemoteRefused("rate", f"more than {defaults.SIGNAL_SOURCE_RATE:g} signals per second of your address")
        link = endpoint.link(signal.to)
        if link is None or signal.to == call.peer:
            raise RemoteRefused("not_linked", f"no link with {signal.to.short} here")
        self.forwarded += 1
        forwarded = Forwarded(call.peer, signal.kind, signal.body)
        seconds = min(call.deadline - now, defaults.SIGNAL_TIME)
        try:
            async with exchange(link, SIGNALLED, forwarded, timeout=seconds) as reply:
                answer = await reply.result()
        except RemoteRefused as error:
            raise RemoteRefused(error.code, error.reason) from None
        except RemoteError as error:
            raise RemoteRefused("no_answer", f"{signal.to.short} did not answer: {error.message}") from None
        if len(answer.body) > defaults.MAX_SIGNAL:
            raise RemoteRefused("too_large", f"the answer of {signal.to.short} is too large")
        return answer

    async def _answer(self, call: Call[Forwarded]) -> SignalAnswer:
        signal = call.request
        if len(signal.body) > defaults.MAX_SIGNAL:
            raise RemoteRefused("too_large", f"a signal has at most {defaults.MAX_SIGNAL} bytes")
        if signal.origin == self._endpoint.peer_id:
            raise RemoteRefused("bad_origin", "a signal of our own")
        if not self._forwarders.take(call.peer, self._endpoint.host.now()):
            raise RemoteRefused("rate", f"more than {defaults.SIGNALLED_RATE:g} signals per second")
        handler = self._handlers.get(signal.kind)
        if handler is None:
            raise RemoteRefused("unknown_kind", f"no signals of kind {signal.kind[: defaults.MAX_SIGNAL_KIND]!r} here")
        answer = await handler(signal.origin, call.peer, signal.body)
        if len(answer) > defaults.MAX_SIGNAL:
            raise ProtocolMisuse(f"an answer of {len(answer)} bytes to a signal")
        return SignalAnswer(answer)
