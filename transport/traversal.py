"""Everything by which an endpoint is reached where plain dialling fails, put together: options, services, ways."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import attrs
import trio

from . import defaults
from .address import Address, RelayAddress, Service, SignedPeerRecord
from .errors import RemoteError, RemoteProtocolError
from .frames import ResetCode
from .identity import PeerId
from .meeting import Punch, WebRtc, listening_port_seen
from .mender import Mender
from .planner import OwnReach, Reach
from .reachability import Reachability
from .relay import RELAYED_PROTOCOL, RelayedStream, RelayLimits, RelayServer
from .reservations import Reservations, one_version_only, relay_address
from .rpc import Call, Method, exchange
from .signals import Signals
from .stun_serving import StunServing
from .ways import Relay, Reversal
from .webrtc_signal import TurnServer

if TYPE_CHECKING:
    from .connector import Connector
    from .endpoint import Endpoint
    from .stream import LinkStream

log = logging.getLogger(__name__)


@attrs.frozen
class Traversal:
    """What a node does to be reached, and for others. The default is right for a real node.

    ``ways``: those it may use beside direct dialling; ``relay``: relay for others, None: as soon as strangers can dial
    us; ``reservations``: places it keeps at relays while they cannot, or by one IP version only;
    ``dial_back``: ask others to dial us; ``limits``:
    of relaying; ``turn``: a TURN server for WebRTC; ``stun``: answer STUN at our listening port while strangers can
    dial us.
    """

    ways: tuple[str, ...] = ("direct", "reversal", "punch", "webrtc", "relay")
    relay: bool | None = None
    reservations: int = defaults.RESERVATIONS
    dial_back: bool = True
    stun: bool = True
    turn: TurnServer | None = None
    limits: RelayLimits = attrs.field(factory=RelayLimits)


@attrs.frozen
class News:
    """Our record has changed."""

    record: SignedPeerRecord


@attrs.frozen
class Noted:
    """An answer that says nothing."""


NEWS = Method("transport.news", News, Noted)


class Traversing:
    """The services of ``endpoint`` for its own reachability and others'."""

    def __init__(self, endpoint: Endpoint, connector: Connector, options: Traversal) -> None:
        self.options = options
        self.signals = Signals(endpoint)
        self.relay = RelayServer(endpoint, options.limits)
        self.reservations = Reservations(endpoint, self._changed)
        self.reachability = Reachability(endpoint, ask=options.dial_back, changed=self._changed)
        self._endpoint, self._connector = endpoint, connector
        self._news = trio.Event()
        self._told: tuple[object, ...] = ()
        connector.mender = Mender(endpoint.host, connector.table, connector)
        connector.ways["reversal"] = Reversal(endpoint, self.signals, connector.call_back)
        connector.ways["relay"] = Relay(endpoint)
        self.punch: Punch | None = None
        self.webrtc: WebRtc | None = None
        if "punch" in options.ways:
            self.punch = connector.ways["punch"] = Punch(endpoint, self.signals)
        if "webrtc" in options.ways and endpoint.host.webrtc is not None:
            self.webrtc = connector.ways["webrtc"] = WebRtc(endpoint, self.signals, options.turn)
        self.stun = StunServing(endpoint, self._changed)
        connector.direct.shared_port = True
        connector.reach = self.reach
        connector.helpers = self.helpers
        endpoint.serve_streams(RELAYED_PROTOCOL, self._on_relayed)
        endpoint.serve(NEWS, self._on_news)
        endpoint.on_link.append(lambda link: self.reservations.look_again())

    async def run(self) -> None:
        """Until cancelled."""
        self._changed()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.reachability.run)
            nursery.start_soon(self.reservations.run)
            nursery.start_soon(self._tell)
            if self.webrtc is not None:
                nursery.start_soon(self.webrtc.answerer.run)
            if self.punch is not None:
                self.punch.puncher.nursery = nursery
            try:
                await self.stun.run()
            finally:
                if self.punch is not None:
                    self.punch.puncher.nursery = None

    def reach(self) -> OwnReach:
        """What the planner should know of us."""
        verdict = self.reachability.verdict
        links = sorted(self._endpoint.links(), key=lambda link: link.rtt)
        return OwnReach(
            self._endpoint.peer_id,
            verdict.state,
            verdict.reason,
            addresses=self._endpoint.own_addresses(),
            external=verdict.external,
            varying=listening_port_seen(self._endpoint)[1],
            ways=tuple(way for way in self.options.ways if way in self._connector.ways),
            linked=tuple(dict.fromkeys(link.peer for link in links if link.way != "relay")),
        )

    def helpers(self, peer: PeerId) -> list[RelayAddress]:
        """Linked peers that offer to relay: where our peer's record names none, they may still know it."""
        linked = [link.peer for link in self._endpoint.links() if link.way != "relay"]
        offering = [record for record in self._endpoint.contacts_offering("relay") if record.peer in linked]
        return [relay_address(record, None) for record in offering[: defaults.MAX_HELPERS]]

    # Our record

    @property
    def relays(self) -> tuple[RelayAddress, ...]:
        """Where we hold reservations."""
        return tuple(self.reservations.held.values())

    @property
    def services(self) -> tuple[Service, ...]:
        """What we do for others."""
        offered: tuple[Service, ...] = ("relay",) if self.relay.active else ()
        return (*offered, "stun") if self.stun.serving else offered

    def addresses(self) -> tuple[Address, ...]:
        """Where strangers have reached us, beside the addresses of our own machine."""
        own = self._endpoint.own_addresses()
        known = (*self.reachability.verdict.confirmed, *self.reachability.mapped)
        return tuple(address for address in known if address not in own)

    def _changed(self) -> None:
        state = self.reachability.verdict.state
        relaying = state is Reach.REACHABLE if self.options.relay is None else self.options.relay
        if relaying != self.relay.active:
            self.relay.active = relaying
            log.info("relaying for others" if relaying else "no longer relaying for others")
        self.stun.wanted = self.options.stun and state is Reach.REACHABLE
        if state is not Reach.UNKNOWN:  # while that is found out anew, what we have may be what we are reached by
            unseen = state is Reach.UNREACHABLE or one_version_only(self._endpoint.addresses())
            self.reservations.wanted = self.options.reservations if unseen else 0
        self._news.set()

    async def _tell(self) -> None:
        """Give our record to linked peers when what stands in it has changed."""
        while True:
            await self._news.wait()
            self._news = trio.Event()
            endpoint = self._endpoint
            content = (endpoint.addresses(), self.relays, self.services)
            if content == self._told:
                continue
            first, self._told = not self._told, content
            if not first:
                async with trio.open_nursery() as nursery:
                    for link in endpoint.links():
                        nursery.start_soon(self._tell_one, link.peer)
            await trio.sleep(defaults.NEWS_PAUSE)

    async def _tell_one(self, peer: PeerId) -> None:
        link = self._endpoint.link(peer)
        if link is None:
            return
        try:
            async with exchange(link, NEWS, News(self._endpoint.record()), timeout=defaults.SIGNAL_TIME) as reply:
                await reply.result()
        except RemoteError as error:
            log.debug("%s did not take our new record: %s", peer.short, error)

    async def _on_news(self, call: Call[News]) -> Noted:
        if call.request.record.open(self._endpoint.host.wall()).peer != call.peer:
            raise RemoteProtocolError("its news carry somebody else's record", peer=call.peer.short)
        self._endpoint.learn(call.request.record)
        self.reservations.look_again()
        return Noted()

    async def _on_relayed(self, stream: LinkStream) -> None:
        if stream.peer not in self.reservations.held:
            stream.reset(ResetCode.UNKNOWN_PROTOCOL)  # we have no place there: nobody is sent to us by it
            return
        self._endpoint.incoming(RelayedStream(stream), "relay")
