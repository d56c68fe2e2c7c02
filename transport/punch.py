"""TCP hole punching, told the time: who offers which addresses, when both sides knock, how often, and why it failed.

As DCUtR of libp2p, for TCP from the listening port. Through a common peer ::

    offerer                           answerer
      │── punch: nonce, addresses ───────▶│
      │◀─ nonce, addresses ───────────────│      the offerer measures this round trip
      │── punch-go: nonce, round trip ───▶│      knocks at once
      │  … half a round trip …            │
      │  knocks                           │

Each request to connect opens the sender's NAT for the other's, so one that comes too early is lost while the later one
gets through, and TCP's simultaneous open makes one connection of the two. Kernels repeat a lost request after 1 s;
an attempt here lasts only about two round trips, and then the next begins. A router that answers an early request with
a reset closes the hole of its sender at once (Linux): then the next follows almost immediately, so that the hole is
open nearly always and the other's request, sooner or later, meets it.

The offerer begins the handshake; it takes the first stream and drops the rest. Where both offer at the same time, the
offer of the smaller key counts.
"""

from __future__ import annotations

import ipaddress
import random
from collections.abc import Iterable, Sequence

import attrs

from . import deadlines, defaults
from .address import Address
from .errors import PeerUnreachable, RemoteProtocolError, RemoteRefused
from .identity import PeerId
from .wire import pack, unpack

NONCE_SIZE = 16


@attrs.frozen
class PunchOffer:
    """Signal "punch": where the offerer's listening port may be seen, the likeliest first."""

    nonce: bytes
    addresses: tuple[Address, ...]


@attrs.frozen
class PunchAnswer:
    """To an offer: the same of the answerer."""

    nonce: bytes
    addresses: tuple[Address, ...]


@attrs.frozen
class PunchGo:
    """Signal "punch-go": knock now. ``rtt``: seconds that offer and answer took. Answered with an empty body."""

    nonce: bytes
    rtt: float


def _family(address: Address) -> str:
    return f"IPv{ipaddress.ip_address(address.host).version}" if address.kind == "tcp" else address.kind


def _usable(address: Address) -> bool:
    if not address.port:
        return False
    if address.kind != "tcp":
        return True
    ip = ipaddress.ip_address(address.host)
    return not (ip.is_loopback or ip.is_unspecified or ip.is_multicast or ip.is_link_local)


def candidates(addresses: Iterable[Address]) -> tuple[Address, ...]:
    """What of our own addresses is worth offering."""
    return tuple(dict.fromkeys(a for a in addresses if _usable(a)))[: defaults.MAX_PUNCH_ADDRESSES]


def targets(theirs: Sequence[Address], ours: Sequence[Address]) -> tuple[tuple[Address, ...], str]:
    """Where to knock of what the peer offers, and why nowhere if that is empty.

    Never at loopback, at our own addresses, or over an IP version we have no address of.
    """
    own = candidates(ours)
    families = {_family(address): None for address in own}
    usable = candidates(theirs)
    chosen = tuple(a for a in usable if _family(a) in families and a not in own)
    if chosen:
        return chosen, ""
    if not own:
        return (), "we know no address of our own under which others may see us"
    if not usable:
        return (), "the peer offers no address"
    if any(a in own for a in usable):
        return (), "the peer offers our own addresses"
    return (), f"the peer offers {', '.join(dict.fromkeys(map(_family, usable)))} and we have {', '.join(families)}"


@attrs.frozen
class Going:
    """Both sides agree: knock at ``targets``, from the time ``start`` until ``end``."""

    targets: tuple[Address, ...]
    rtt: float
    start: float
    end: float


class Offer:
    """The offerer's side of one exchange."""

    def __init__(self, nonce: bytes, addresses: Sequence[Address], *, lag: float = 0.0) -> None:
        self._nonce, self._addresses, self._lag = nonce, candidates(addresses), lag
        self._asked = 0.0
        self._rtt = 0.0

    def ask(self, now: float) -> bytes:
        """The body of the signal "punch", sent now. Raises :class:`PeerUnreachable` where we have no address."""
        if not self._addresses:
            raise PeerUnreachable("hole punching is not possible: " + targets((), ())[1])
        self._asked = now
        return pack(PunchOffer(self._nonce, self._addresses))

    def answered(self, body: bytes, now: float) -> tuple[bytes, tuple[Address, ...]]:
        """The body of "punch-go", to be sent now, and where to knock.

        Raises :class:`RemoteProtocolError` for an answer to something else, :class:`PeerUnreachable` for no target.
        """
        answer = unpack(PunchAnswer, body)
        if answer.nonce != self._nonce:
            raise RemoteProtocolError("the answer to an offer of hole punching names another one")
        chosen, reason = targets(answer.addresses, self._addresses)
        if not chosen:
            raise PeerUnreachable(f"hole punching is not possible: {reason}")
        self._rtt = min(now - self._asked, defaults.MAX_PUNCH_RTT)
        self._targets = chosen
        return pack(PunchGo(self._nonce, self._rtt)), chosen

    def gone(self, now: float) -> Going:
        """ "punch-go" is sent now: when it arrives there, we knock too."""
        start = now + deadlines.punch_start(self._rtt)
        return Going(self._targets, self._rtt, start, start + deadlines.punch(self._rtt, self._lag))


@attrs.frozen
class _Answered:
    targets: tuple[Address, ...]
    until: float


class Answers:
    """The answerer's side of all exchanges: offers answered, waiting for their go. One per peer, bounded in all."""

    def __init__(self) -> None:
        self._waiting: dict[tuple[PeerId, bytes], _Answered] = {}

    def waiting(self, origin: PeerId, now: float) -> bool:
        """Whether an offer of ``origin`` was answered and its go is due."""
        return any(key[0] == origin and waiting.until > now for key, waiting in self._waiting.items())

    def offered(self, origin: PeerId, body: bytes, addresses: Sequence[Address], now: float) -> bytes:
        """The answer to an offer. Raises :class:`RemoteRefused` with the reason, or :class:`RemoteProtocolError`."""
        offer = unpack(PunchOffer, body)
        if len(offer.nonce) != NONCE_SIZE:
            raise RemoteProtocolError(f"an offer of hole punching with {len(offer.nonce)} bytes of nonce")
        for key, waiting in list(self._waiting.items()):
            if waiting.until <= now or key[0] == origin:
                del self._waiting[key]
        if len(self._waiting) >= defaults.MAX_PUNCHES:
            raise RemoteRefused("busy", f"{defaults.MAX_PUNCHES} peers punch holes to here already")
        chosen, reason = targets(offer.addresses, addresses)
        if not chosen:
            raise RemoteRefused("no_address", f"hole punching is not possible, as the peer sees it: {reason}")
        self._waiting[origin, offer.nonce] = _Answered(chosen, now + deadlines.punch_go())
        return pack(PunchAnswer(offer.nonce, candidates(addresses)))

    def go(self, origin: PeerId, body: bytes, now: float, lag: float = 0.0) -> Going:
        """What a "punch-go" that arrived now starts. Raises as :meth:`offered`."""
        go = unpack(PunchGo, body)
        waiting = self._waiting.pop((origin, go.nonce), None)
        if waiting is None or waiting.until <= now:
            raise RemoteRefused("no_offer", "no such offer of hole punching is open")
        rtt = min(max(go.rtt, 0.0), defaults.MAX_PUNCH_RTT)
        return Going(waiting.targets, rtt, now, now + deadlines.punch(rtt, lag))


class Attempts:
    """When to knock at one address, for how long, and what came of it."""

    def __init__(self, going: Going, draw: random.Random) -> None:
        self._going, self._draw = going, draw
        self._silent = self._failed = 0
        self._reason = ""

    def next(self, now: float) -> float | None:
        """Until when the attempt that begins now may take; None: it is enough."""
        if now >= self._going.end or self._failed >= defaults.MAX_PUNCH_REFUSALS:
            return None
        seconds = deadlines.punch_attempt(self._going.rtt, self._silent, self._draw.random())
        return min(now + seconds, self._going.end)

    def silent(self) -> None:
        """The attempt that :meth:`next` allowed ran out."""
        self._silent += 1

    def failed(self, reason: str) -> float:
        """It was answered with a refusal: seconds until the next."""
        self._failed += 1
        self._reason = reason
        return deadlines.punch_pause(self._failed, self._draw.random())

    @property
    def summary(self) -> str:
        """For people."""
        parts = []
        if self._silent:
            parts.append(f"no answer to {self._silent} requests (a NAT or firewall on the way drops them)")
        if self._failed:
            parts.append(f"{self._failed} times {self._reason}")
        return ", ".join(parts) or "not tried"
