"""Dial-back: a peer, or a third one that it asks, tries whether we can be dialled.

No amplification: a peer asks only for addresses that it is seen at itself (or private ones, when it is seen at a
private one), each attempt costs a few packets, and rates are limited. The proof is a handshake in which the dialled
node shows who it is; it is broken off there, so that no link comes of it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import attrs
import trio

from . import deadlines, defaults
from .address import Address, family_of, scope_of
from .errors import ConfigError, HandshakeError, LinkClosed, RemoteError, RemoteRefused, WaitExpired
from .identity import PeerId
from .race import reason_of
from .rpc import Call, Method, exchange
from .signals import PeerRates
from .throttle import TokenBucket, source_of
from .wire import printable

if TYPE_CHECKING:
    from .endpoint import Endpoint
    from .link import Link
    from .network import ByteStream
    from .secure import SecureChannel

log = logging.getLogger(__name__)


@attrs.frozen
class DialBack:
    """Please have me dialled at these addresses, by somebody I do not talk with where you can."""

    addresses: tuple[Address, ...]


@attrs.frozen
class DialFor:
    """Please dial ``peer``: it has asked me, and these are its own addresses as far as I see."""

    peer: PeerId
    addresses: tuple[Address, ...]


@attrs.frozen
class Dialled:
    """What came of one address. ``by``: who dialled; ``reason``: for people, when it was not reached."""

    address: Address
    outcome: Literal["reached", "failed", "not_tried"]
    by: PeerId
    reason: str = ""


@attrs.frozen
class DialAnswer:
    dialled: tuple[Dialled, ...]


DIAL_BACK = Method("transport.dial_back", DialBack, DialAnswer)
DIAL_FOR = Method("transport.dial_for", DialFor, DialAnswer)


def permitted(address: Address, seen: Address) -> bool:
    """Whether who is seen at ``seen`` may ask for ``address``: its own, or a private one of the same network."""
    if address.kind != seen.kind or not address.port:
        return False
    if address.host == seen.host:
        return True
    if scope_of(address) == "loopback":
        return scope_of(seen) == "loopback"  # else it would be our own machine that is looked into
    return _local(address) and _local(seen)


def _local(address: Address) -> bool:
    return scope_of(address) in ("private", "link", "loopback")


def no_proof(own: Sequence[Address], address: Address) -> str:
    """Why a failure from a machine with ``own`` addresses would say nothing of ``address``; empty: it would."""
    outer = [family_of(other) for other in own if scope_of(other) != "loopback"]
    return f"there is no {family_of(address)} here" if outer and family_of(address) not in outer else ""


async def prove(stream: ByteStream, channel: SecureChannel, seconds: float) -> None:
    """Have the node behind ``stream`` show that it is the one ``channel`` expects, then hang up.

    Raises :class:`HandshakeError` when it is another, :class:`LinkClosed`, :class:`WaitExpired`.
    """
    try:
        with trio.fail_after(seconds):
            await stream.send_all(channel.start())
            while not channel.established:
                data = await stream.receive_some(defaults.MAX_HANDSHAKE)
                if not data:
                    raise LinkClosed("it hung up during the handshake")
                channel.receive(data)
    except trio.TooSlowError:
        raise WaitExpired("handshake", seconds) from None
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        raise LinkClosed("the connection broke during the handshake") from None
    finally:
        await trio.aclose_forcefully(stream)


class DialBackService:
    """Dials for peers of ``endpoint`` that ask, and asks them."""

    def __init__(self, endpoint: Endpoint) -> None:
        now = endpoint.host.now()
        self._endpoint = endpoint
        self._askers = PeerRates(defaults.DIAL_BACK_RATE, defaults.DIAL_BACK_BURST)
        self._sources = PeerRates(defaults.DIAL_BACK_SOURCE_RATE, defaults.DIAL_BACK_SOURCE_BURST)
        self._all = TokenBucket(defaults.DIAL_BACK_TOTAL_RATE, defaults.DIAL_BACK_TOTAL_BURST, now)
        endpoint.serve(DIAL_BACK, self._dial_back)
        endpoint.serve(DIAL_FOR, self._dial_for)

    async def ask(self, link: Link, addresses: Sequence[Address]) -> tuple[Dialled, ...]:
        """Have ``addresses`` of ours dialled by the peer of ``link`` or another. Raises :class:`RemoteError`."""
        seconds = deadlines.dial_back(link.rtt, link.lag)
        wanted = tuple(addresses)[: defaults.MAX_DIAL_BACK]
        async with exchange(link, DIAL_BACK, DialBack(wanted), timeout=seconds) as reply:
            answer = await reply.result()
        return tuple(
            attrs.evolve(dialled, reason=printable(dialled.reason, 120))
            for dialled in answer.dialled[: defaults.MAX_DIAL_BACK]
            if dialled.address in wanted
        )

    async def _dial_back(self, call: Call[DialBack]) -> DialAnswer:
        seen = call.link.remote
        self._admit(call.peer, seen, call.request.addresses)
        if call.link.way in ("relay", "webrtc"):
            raise RemoteRefused("not_seen", "your address cannot be seen from here")
        allowed = [address for address in call.request.addresses if permitted(address, seen)]
        refused = tuple(
            Dialled(address, "not_tried", self._endpoint.peer_id, f"you are seen at {seen.host}")
            for address in call.request.addresses
            if address not in allowed
        )
        if not allowed:
            return DialAnswer(refused)
        for third in self._thirds(call.peer, seen, allowed)[: defaults.DIAL_BACK_THIRDS]:
            # A hole in a NAT towards us would let us in where strangers stay outside.
            seconds = deadlines.dial_for(third.rtt, third.lag)
            try:
                async with exchange(third, DIAL_FOR, DialFor(call.peer, tuple(allowed)), timeout=seconds) as reply:
                    answer = await reply.result()
            except RemoteError as error:
                log.debug("%s did not dial %s for us: %s", third.peer.short, call.peer.short, error)
                continue
            found = tuple(d for d in answer.dialled if d.address in allowed)[: len(allowed)]
            if any(dialled.outcome != "not_tried" for dialled in found):
                return DialAnswer(tuple(attrs.evolve(d, by=third.peer) for d in found) + refused)
        return DialAnswer(await self._dial(call.peer, allowed) + refused)

    async def _dial_for(self, call: Call[DialFor]) -> DialAnswer:
        self._admit(call.peer, call.link.remote, call.request.addresses)
        if call.request.peer == self._endpoint.peer_id:
            raise RemoteRefused("bad_request", "that is this node itself")
        # Private addresses mean something here only when who asks is near.
        seen = call.link.remote
        allowed = [a for a in call.request.addresses if not _local(a) or permitted(a, seen)]
        return DialAnswer(await self._dial(call.request.peer, allowed))

    def _admit(self, peer: PeerId, seen: Address, addresses: Sequence[Address]) -> None:
        now = self._endpoint.host.now()
        if len(addresses) > defaults.MAX_DIAL_BACK:
            raise RemoteRefused("bad_request", f"at most {defaults.MAX_DIAL_BACK} addresses")
        # Names are free: many at one address must not use up what we do for others.
        source = source_of(seen.host)[0]
        if not self._askers.take(peer, now) or not self._sources.take(source, now) or not self._all.take(now):
            raise RemoteRefused("rate", "asked to dial too often")

    def _thirds(self, asker: PeerId, seen: Address, allowed: Sequence[Address]) -> list[Link]:
        """Links to peers elsewhere that could dial, in random order."""
        near = any(_local(address) for address in allowed)
        found = [
            link
            for link in self._endpoint.links()
            if link.peer != asker
            and link.way not in ("relay", "webrtc")
            and link.remote.host != seen.host
            and (not near or _local(link.remote))
        ]
        self._endpoint.host.random.shuffle(found)
        return found

    async def _dial(self, peer: PeerId, addresses: Sequence[Address]) -> tuple[Dialled, ...]:
        found: dict[Address, Dialled] = {}

        async def one(address: Address) -> None:
            endpoint = self._endpoint
            if reason := no_proof(endpoint.own_addresses(), address):
                found[address] = Dialled(address, "not_tried", endpoint.peer_id, reason)
                return
            try:
                lag = endpoint.lag.value(endpoint.host.now())
                seconds = deadlines.dial_once(lag)
                stream: ByteStream | None = None
                with trio.move_on_after(seconds):
                    stream = await endpoint.host.network.dial(address)
                if stream is None:
                    raise WaitExpired("answer to a dial", seconds)
                await prove(stream, endpoint.channel(initiator=True, expected=peer), seconds)
            except HandshakeError as error:
                # Not what was heard: it may be a service that only we can reach.
                log.debug("no proof of %s at %s: %s", peer.short, address, error)
                found[address] = Dialled(address, "failed", endpoint.peer_id, "somebody else answers there")
            except (RemoteError, ConfigError) as error:
                found[address] = Dialled(address, "failed", endpoint.peer_id, reason_of(error)[:120])
            else:
                found[address] = Dialled(address, "reached", endpoint.peer_id)

        async with trio.open_nursery() as nursery:
            for address in addresses:
                nursery.start_soon(one, address)
        return tuple(found[address] for address in addresses)
