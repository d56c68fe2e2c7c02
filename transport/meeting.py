"""The ways for which two peers behind NATs meet by appointment: hole punching and WebRTC, arranged by signals."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import trio

from . import deadlines, defaults, webrtc
from .address import Address, scope_of
from .errors import LinkClosed, PeerUnreachable
from .identity import PeerId
from .network import ByteStream
from .planner import Step
from .puncher import Puncher
from .signals import Askers, Signals
from .ways import Way
from .webrtc_signal import IceServers, TurnServer

if TYPE_CHECKING:
    from .endpoint import Endpoint

log = logging.getLogger(__name__)


def asker(signals: Signals, peer: PeerId, step: Step, lag: float) -> Callable[[str, bytes], Awaitable[bytes]]:
    """Sends signals to ``peer`` through the common peer of ``step``."""
    via = step.via
    assert via is not None

    async def ask(kind: str, body: bytes) -> bytes:
        return await signals.ask(via.peer, peer, kind, body, deadlines.signal(lag), addresses=via.addresses)

    return ask


async def hand_in(endpoint: Endpoint, stream: ByteStream, way: str) -> None:
    """Give ``stream`` to ``endpoint``; a node that stops takes none, and it is closed."""
    try:
        endpoint.incoming(stream, way)
    except LinkClosed as error:
        log.debug("a stream by %s came too late: %s", way, error)
        await trio.aclose_forcefully(stream)


def listening_port_seen(endpoint: Endpoint) -> tuple[tuple[Address, ...], bool]:
    """(where others see the port that we listen at, whether each of them sees another port there).

    Only connections that come from that port tell: see ``shared_port`` of :meth:`Network.dial`.
    """
    own = endpoint.own_addresses()
    ports = list(dict.fromkeys(address.port for address in own))
    links = [link for link in endpoint.links() if link.observed and link.way in ("direct", "reversal", "punch")]
    seen = [link.observed for link in links if link.observed and link.best.local.port in ports]
    outer = tuple(dict.fromkeys(address for address in seen if address not in own))
    hosts = [address.host for address in outer]
    if any(hosts.count(host) > 1 for host in hosts):
        return outer, True
    # Where no connection from that port is up (a dead one holds it for a while), most NATs still keep the port.
    known = [address.host for address in own]
    guesses = [
        Address(link.observed.kind, link.observed.host, port)
        for link in links
        for port in ports
        if link.observed and link.observed.host not in known and link.observed.host not in hosts
    ]
    return tuple(dict.fromkeys((*outer, *guesses))), False


class Punch(Way):
    """TCP simultaneous open, see :mod:`shoal.transport.punch`."""

    name = "punch"

    def __init__(self, endpoint: Endpoint, signals: Signals) -> None:
        self._endpoint, self._signals = endpoint, signals
        self._punching: dict[PeerId, None] = {}
        self.puncher = Puncher(endpoint.host, endpoint.peer_id, self._addresses, self._incoming, self._lag)
        endpoint.claim_accepted(self.puncher.claims.take)
        signals.handle("punch", self.puncher.handle_offer)
        signals.handle("punch-go", self.puncher.handle_go)

    async def open(self, peer: PeerId, step: Step) -> ByteStream | None:
        if peer in self._punching:
            raise PeerUnreachable("hole punching with it goes on already", peer=peer.short)
        self._punching[peer] = None
        try:
            return await self.puncher.punch(peer, asker(self._signals, peer, step, self._lag()))
        finally:
            del self._punching[peer]

    def _addresses(self) -> tuple[Address, ...]:
        outer, _ = listening_port_seen(self._endpoint)
        own = [address for address in self._endpoint.addresses() if scope_of(address) != "loopback"]
        return tuple(dict.fromkeys((*outer, *own)))

    def _lag(self) -> float:
        return self._endpoint.lag.value(self._endpoint.host.now())

    async def _incoming(self, stream: ByteStream, way: str) -> None:
        await hand_in(self._endpoint, stream, way)


class WebRtc(Way):
    """A data channel, see :mod:`shoal.transport.webrtc`. ``turn``: a configured TURN server."""

    name = "webrtc"

    def __init__(self, endpoint: Endpoint, signals: Signals, turn: TurnServer | None) -> None:
        self._endpoint, self._signals, self._turn = endpoint, signals, turn
        now = endpoint.host.now()
        self._askers = Askers(defaults.WEBRTC_ASKED, defaults.WEBRTC_ASKED_VIA, defaults.WEBRTC_ASKED_TOTAL, now)
        self.answerer = webrtc.WebRtcAnswerer(endpoint.host, self._incoming, self.servers)
        signals.handle(webrtc.KIND, self._answer)

    async def open(self, peer: PeerId, step: Step) -> ByteStream:
        ask = asker(self._signals, peer, step, self._lag())
        return await webrtc.offer(self._endpoint.host, ask, self.servers(), peer=peer.short, lag=self._lag())

    def servers(self) -> IceServers:
        """Public peers that answer STUN at their listening port."""
        found: list[Address] = []
        for record in self._endpoint.contacts_offering("stun"):
            ranked = sorted(record.addresses, key=lambda address: scope_of(address) != "public")
            found += [address for address in ranked[:1] if address.kind == "tcp"]
        return IceServers(tuple(found[: defaults.MAX_STUN_OBSERVERS]), self._turn)

    async def _answer(self, origin: PeerId, via: PeerId, body: bytes) -> bytes:
        # An engine is a process: who says who he is through a friend must not start many.
        self._askers.admit(origin, via, self._endpoint.host.now())
        return await self.answerer.answer(body, peer=origin.short, lag=self._lag())

    def _lag(self) -> float:
        return self._endpoint.lag.value(self._endpoint.host.now())

    async def _incoming(self, stream: ByteStream) -> None:
        await hand_in(self._endpoint, stream, "webrtc")
