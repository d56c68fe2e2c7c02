"""Relaying for others: reservations, circuits between two peers, and limits on both.

A peer that strangers cannot dial opens a *reservation* stream on its link to a relay; the reservation lives as long as
that stream, so it needs no renewal and ends with the link. Another peer opens a *circuit* stream and names the target;
the relay opens a *relayed* stream on its link to the target and passes bytes both ways, each way with the backpressure
of the slower side. The two ends run their own handshake inside: the relay sees only ciphertext.

On the reservation and circuit streams, lengths big-endian: u16 length, request · u16 length, :class:`RelayAnswer`. On a
circuit, raw bytes follow; a relayed stream is raw from its first byte. All bytes are of low priority on the links that
carry them.
"""

from __future__ import annotations

import logging
import struct
from enum import IntEnum
from typing import TYPE_CHECKING, TypeVar

import attrs
import trio

from . import deadlines, defaults
from .errors import DecodeError, RemoteError, RemoteRefused, WaitExpired
from .frames import Priority, ResetCode
from .identity import PeerId
from .network import ByteStream
from .signals import PeerRates
from .stream import LinkStream, StreamBroken
from .throttle import TokenBucket, source_of
from .wire import pack, printable, unpack

if TYPE_CHECKING:
    from .endpoint import Endpoint
    from .link import Link

log = logging.getLogger(__name__)

T = TypeVar("T")

RESERVE_PROTOCOL = "shoal-reserve/1"
CIRCUIT_PROTOCOL = "shoal-circuit/1"
RELAYED_PROTOCOL = "shoal-relayed/1"

_LENGTH = struct.Struct(">H")


class RelayReset(IntEnum):
    """Why a relay ended a stream. Application codes, above those of the mux."""

    QUOTA = 0x100  #: this circuit has carried as many bytes as one may
    IDLE = 0x101  #: nothing passed for longer than a live link is ever silent
    LOST = 0x102  #: the link to the other end is gone
    STOPPED = 0x103  #: the relay no longer relays


_RESETS = {
    RelayReset.QUOTA: "this circuit has carried as many bytes as one may",
    RelayReset.IDLE: "nothing passed for too long",
    RelayReset.LOST: "its connection to the other end is gone",
    RelayReset.STOPPED: "it no longer relays",
}


@attrs.frozen
class RelayLimits:
    """What a relay gives. ``rate`` and ``burst``: bytes per second, and at once, for each peer at either end of its
    circuits; ``total_rate``, ``total_burst``: for all; ``circuit_bytes``: that one circuit may carry; ``idle``: seconds
    that one may be silent; ``…_per_source``: for all peers that come from one address."""

    reservations: int = defaults.RELAY_RESERVATIONS
    circuits: int = defaults.RELAY_CIRCUITS
    circuits_per_peer: int = defaults.RELAY_CIRCUITS_PER_PEER
    reservations_per_source: int = defaults.RELAY_RESERVATIONS_PER_SOURCE
    circuits_per_source: int = defaults.RELAY_CIRCUITS_PER_SOURCE
    rate: float = defaults.RELAY_RATE
    burst: float = defaults.RELAY_BURST
    total_rate: float = defaults.RELAY_TOTAL_RATE
    total_burst: float = defaults.RELAY_TOTAL_BURST
    circuit_bytes: int = defaults.RELAY_CIRCUIT_BYTES
    idle: float = defaults.RELAY_IDLE


@attrs.frozen
class Reserve:
    """Wanted: to be reachable through you."""


@attrs.frozen
class Circuit:
    """Wanted: bytes to and from ``target``."""

    target: PeerId


@attrs.frozen
class RelayAnswer:
    """An empty ``code``: granted. Else ``reason`` is for people."""

    code: str
    reason: str = ""


class RelayedStream(ByteStream):
    """One end of a circuit, as a byte stream. ``remote`` is the relay's address: the other end's is not known."""

    def __init__(self, stream: LinkStream) -> None:
        self.remote = stream.link.remote
        self.local = stream.link.observed or stream.link.remote
        self.relay = stream.peer
        self._stream = stream

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """As :class:`trio.abc.SendStream`: cancelled while data is partly sent, the stream is unusable."""
        try:
            await self._stream.send_all(data)
        except RemoteError as error:
            raise self._broken(error) from error

    async def wait_send_all_might_not_block(self) -> None:
        try:
            await self._stream.wait_send_all_might_not_block()
        except RemoteError as error:
            raise self._broken(error) from error

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        try:
            return await self._stream.receive_some(max_bytes)
        except RemoteError as error:
            raise self._broken(error) from error

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def aclose(self) -> None:
        await self._stream.aclose()

    def _broken(self, error: RemoteError) -> trio.BrokenResourceError:
        why = _RESETS.get(RelayReset(error.code)) if isinstance(error, StreamBroken) and _is_reset(error.code) else None
        return trio.BrokenResourceError(f"the circuit through {self.relay.short} broke: {why or error.message}")


def _is_reset(code: int) -> bool:
    return code in tuple(RelayReset)


async def send_message(stream: LinkStream, message: object) -> None:
    """One message, with its length before it."""
    packed = pack(message)
    await stream.send_all(_LENGTH.pack(len(packed)) + packed)


async def receive_message(stream: LinkStream, kind: type[T], seconds: float) -> T:
    """The next message. Raises :class:`DecodeError`, :class:`WaitExpired` and what the stream raises."""
    with trio.move_on_after(seconds):
        (length,) = _LENGTH.unpack(await stream.read_exactly(_LENGTH.size))
        if length > defaults.MAX_RELAY_MESSAGE:
            raise DecodeError(f"{kind.__name__} of {length} bytes", peer=stream.peer.short)
        return unpack(kind, await stream.read_exactly(length))
    raise WaitExpired(kind.__name__, seconds, peer=stream.peer.short)


async def request(link: Link, protocol: str, message: object) -> LinkStream:
    """Open a reservation or circuit stream on ``link`` and ask with ``message``.

    Raises :class:`RemoteRefused` with the relay's code ("unknown_protocol": it is no relay), :class:`WaitExpired`,
    :class:`LinkClosed`, :class:`RemoteProtocolError`.
    """
    seconds = deadlines.request_header(link.rtt, link.lag)
    stream: LinkStream | None = None
    granted = False
    try:
        with trio.move_on_after(seconds):
            stream = await link.open_stream(protocol, Priority.BULK)
            await send_message(stream, message)
        if stream is None:
            raise WaitExpired("stream to the relay", seconds, peer=link.peer.short)
        answer = await receive_message(stream, RelayAnswer, seconds)
        if answer.code:
            raise RemoteRefused(printable(answer.code, 64), printable(answer.reason), peer=link.peer.short)
        granted = True
        return stream
    except StreamBroken as error:
        if error.code == ResetCode.UNKNOWN_PROTOCOL:
            raise RemoteRefused("unknown_protocol", "it does not relay", peer=link.peer.short) from None
        if error.code == ResetCode.TOO_MANY_STREAMS:
            raise RemoteRefused("busy", "too many streams to this relay", peer=link.peer.short) from None
        raise
    finally:
        if stream is not None and not granted:
            stream.reset(ResetCode.CANCELLED)


def admit(
    limits: RelayLimits,
    *,
    reserved: bool,
    linked: bool,
    circuits: int,
    of_initiator: int,
    of_target: int,
    of_source: int,
    of_both: int = 0,
) -> tuple[str, str]:
    """(code, reason) for a circuit; an empty code grants it. Counts are of circuits open now.

    ``of_source``: of those that were asked for from the initiator's address; ``of_both``: of these, to that target.
    """
    if not reserved:
        return "no_reservation", "that peer holds no reservation here"
    if not linked:
        return "not_linked", "the link with that peer is interrupted"
    if circuits >= limits.circuits:
        return "busy", f"all {limits.circuits} circuits are in use"
    if of_initiator >= limits.circuits_per_peer:
        return "busy", f"your {limits.circuits_per_peer} circuits are in use"
    if of_target >= limits.circuits_per_peer:
        return "busy", f"that peer's {limits.circuits_per_peer} circuits are in use"
    if of_both >= (limits.circuits_per_peer + 1) // 2:
        return "busy", f"half of that peer's {limits.circuits_per_peer} circuits go to your address"
    if of_source >= limits.circuits_per_source:
        return "busy", f"{limits.circuits_per_source} circuits to your address are in use"
    return "", ""


def _source(stream: LinkStream) -> str:
    """Where the peer of ``stream`` comes from: an IPv6 customer's whole network is one."""
    return source_of(stream.link.remote.host)[0]


class RelayServer:
    """Relays for the peers that ``endpoint`` is linked with, while it is :attr:`active`."""

    def __init__(self, endpoint: Endpoint, limits: RelayLimits) -> None:
        self.limits = limits
        #: Bytes passed on since the start, and circuits opened; for status.
        self.relayed = self.opened = 0
        self._endpoint = endpoint
        self._active = False
        self._reserved: dict[PeerId, LinkStream] = {}
        self._circuits: dict[tuple[LinkStream, LinkStream], tuple[PeerId, PeerId]] = {}
        #: Who asked, and for whom, in the order of asking: circuits, and those that are only being opened. Counted
        #: from the moment they are granted, or many that ask at once would all be granted.
        self._asked: dict[LinkStream, tuple[PeerId, PeerId]] = {}
        self._rates = PeerRates(limits.rate, limits.burst)
        self._total = TokenBucket(limits.total_rate, limits.total_burst, endpoint.host.now())
        endpoint.serve_streams(RESERVE_PROTOCOL, self._serve_reservation)
        endpoint.serve_streams(CIRCUIT_PROTOCOL, self._serve_circuit)

    @property
    def active(self) -> bool:
        return self._active

    @active.setter
    def active(self, active: bool) -> None:
        """Begin or stop to relay. Stopping ends all reservations and circuits."""
        self._active = active
        if not active:
            for stream in list(self._reserved.values()):
                stream.reset(RelayReset.STOPPED)
            self._reserved.clear()
            for pair in list(self._circuits):
                for stream in pair:
                    stream.reset(RelayReset.STOPPED)

    @property
    def reservations(self) -> tuple[PeerId, ...]:
        """Peers that are reachable through us."""
        return tuple(self._reserved)

    @property
    def circuits(self) -> int:
        return len(self._circuits)

    async def _serve_reservation(self, stream: LinkStream) -> None:
        await receive_message(stream, Reserve, deadlines.request_header(stream.link.rtt, stream.link.lag))
        peer = stream.peer
        code, reason = "", ""
        if not self._active:
            code, reason = "no_relay", "this node does not relay"
        elif stream.link.way == "relay":
            code, reason = "no_relay", "relaying what comes through a relay would make chains"
        elif peer not in self._reserved and len(self._reserved) >= self.limits.reservations:
            code, reason = "busy", f"all {self.limits.reservations} reservations are taken"
        elif peer not in self._reserved and self._from_source(stream) >= self.limits.reservations_per_source:
            code, reason = "busy", f"your address holds {self.limits.reservations_per_source} reservations already"
        if code:
            await self._refuse(stream, code, reason)
            return
        self._reserved[peer] = stream
        log.info("%s is reachable through us", peer.short)
        try:
            await send_message(stream, RelayAnswer(""))
            while await stream.receive_some(64):
                pass  # nothing is said on it; its end is the reservation's
        finally:
            if self._reserved.get(peer) is stream:
                del self._reserved[peer]
                log.info("%s is no longer reachable through us", peer.short)

    def _from_source(self, stream: LinkStream) -> int:
        """Reservations of peers at the address where ``stream`` comes from."""
        source = _source(stream)
        return sum(_source(held) == source for held in self._reserved.values())

    async def _serve_circuit(self, stream: LinkStream) -> None:
        wanted = await receive_message(stream, Circuit, deadlines.request_header(stream.link.rtt, stream.link.lag))
        initiator, target = stream.peer, wanted.target
        held = self._reserved.get(target)
        ends = list(self._asked.values())
        near = [pair for asked, pair in self._asked.items() if _source(asked) == _source(stream)]
        code, reason = "no_relay", "this node does not relay"
        if self._active:
            code, reason = admit(
                self.limits,
                reserved=held is not None and target != initiator,
                linked=held is not None and held.link.alive,
                circuits=len(ends),
                of_initiator=sum(initiator in pair for pair in ends),
                of_target=sum(target in pair for pair in ends),
                of_source=len(near),
                of_both=sum(target == pair[1] for pair in near),
            )
        if code:
            await self._refuse(stream, code, reason)
            return
        self._asked[stream] = (initiator, target)
        try:
            assert held is not None
            await self._open_circuit(stream, held, (initiator, target))
        finally:
            del self._asked[stream]

    async def _open_circuit(self, stream: LinkStream, held: LinkStream, peers: tuple[PeerId, PeerId]) -> None:
        code, reason = "", ""
        onward: LinkStream | None = None
        seconds = deadlines.request_header(held.link.rtt, held.link.lag)
        try:
            with trio.move_on_after(seconds):
                onward = await held.link.open_stream(RELAYED_PROTOCOL, Priority.BULK)
        except RemoteError as error:
            code, reason = "not_linked", error.message
        if not code and onward is None:
            code, reason = "busy", f"no stream to that peer within {seconds:.0f} s"
        if onward is None:
            await self._refuse(stream, code, reason)
            return
        pair = (stream, onward)
        self._circuits[pair] = peers
        self.opened += 1
        try:
            await send_message(stream, RelayAnswer(""))
            await self._splice(stream, onward)
        finally:
            del self._circuits[pair]
            for end in pair:
                if not end.broken:
                    end.reset(RelayReset.LOST)

    async def _refuse(self, stream: LinkStream, code: str, reason: str) -> None:
        await send_message(stream, RelayAnswer(code, reason))
        await stream.aclose()

    # Passing bytes on

    async def _splice(self, one: LinkStream, other: LinkStream) -> None:
        carried = [0]
        broken = False
        with trio.move_on_after(self.limits.idle) as scope:
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._pump, one, other, carried, scope)
                    nursery.start_soon(self._pump, other, one, carried, scope)
            except* (RemoteError, trio.ClosedResourceError) as group:
                # One end is gone; the other hears of it when both streams are reset.
                broken = True
                log.debug("a circuit of %s and %s ended: %s", one.peer.short, other.peer.short, group.exceptions[0])
        if scope.cancelled_caught:
            self._end(RelayReset.IDLE, one, other)
        elif not broken:
            one.close()
            other.close()

    async def _pump(self, source: LinkStream, sink: LinkStream, carried: list[int], scope: trio.CancelScope) -> None:
        """Pass on what ``source`` sends until it ends. ``carried``: bytes of the circuit so far, in both directions."""
        while data := await source.receive_some(defaults.RELAY_CHUNK):
            scope.deadline = trio.current_time() + self.limits.idle
            carried[0] += len(data)
            if carried[0] > self.limits.circuit_bytes:
                self._end(RelayReset.QUOTA, source, sink)
                return
            pause = self._charge(len(data), source.peer, sink.peer)
            if pause > 0:
                scope.deadline += pause
                await trio.sleep(pause)
            await sink.send_all(data)
            self.relayed += len(data)
        await sink.send_eof()

    def _charge(self, size: int, *peers: PeerId) -> float:
        """Take ``size`` tokens everywhere they count; seconds to wait until all of it is paid."""
        now = self._endpoint.host.now()
        pause = 0.0
        for bucket in (self._total, *(self._rates.bucket(peer, now) for peer in peers)):
            bucket.holds(now)
            bucket.tokens -= size
            pause = max(pause, -bucket.tokens / bucket.rate)
        return pause

    @staticmethod
    def _end(code: RelayReset, *streams: LinkStream) -> None:
        for stream in streams:
            stream.reset(code)
