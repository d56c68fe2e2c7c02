"""The ways by which a byte stream to a peer comes about; each behind the same small interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import attrs
import trio

from . import deadlines, defaults
from .address import Address, SignedPeerRecord, scope_of
from .errors import PeerUnreachable, RemoteRefused, WaitExpired
from .identity import PeerId
from .network import ByteStream
from .planner import Step
from .relay import CIRCUIT_PROTOCOL, Circuit, RelayedStream, request
from .signals import Askers, Signals
from .wire import pack, unpack

if TYPE_CHECKING:
    from .endpoint import Endpoint
    from .host import Host
    from .link import Link


class Way(ABC):
    """Turns what a step says into a byte stream, which whoever asked then shakes or greets."""

    #: As in :data:`planner.QUALITY`.
    name: str

    @abstractmethod
    async def open(self, peer: PeerId, step: Step) -> ByteStream | None:
        """A fresh stream to ``peer``, or None when the peer has agreed to come to us.

        Ends within deadlines of its own. Raises :class:`RemoteError` or :class:`ConfigError` with a reason for people.
        Cancellation leaves nothing behind.
        """


class Direct(Way):
    """TCP to one of the peer's addresses."""

    name = "direct"

    def __init__(self, host: Host, lag: deadlines.LoopLag) -> None:
        #: Dial from the port of our listener, see :meth:`Network.dial`.
        self.shared_port = False
        self._host, self._lag = host, lag

    async def open(self, peer: PeerId, step: Step) -> ByteStream:
        assert step.address is not None
        return await self.dial(step.address)

    async def dial(self, address: Address) -> ByteStream:
        """Connect within :func:`deadlines.dial`."""
        seconds = deadlines.dial(self._lag.value(self._host.now()))
        # The NAT should map our listening port: then what others see of us is what can be dialled or punched.
        shared = self.shared_port and scope_of(address) == "public"
        stream: ByteStream | None = None
        with trio.move_on_after(seconds):
            stream = await self._host.network.dial(address, shared_port=shared)
        if stream is None:
            raise WaitExpired("answer to a dial", seconds)
        return stream


@attrs.frozen
class ComeHere:
    """The signal "reverse": dial me. The record is signed, so nobody else's addresses are dialled for a liar."""

    record: SignedPeerRecord


#: What the answer to "reverse" says.
COMING = b"coming"


class Reversal(Way):
    """Asks the peer, through a common one, to dial us; and dials others when they ask.

    ``call_back(peer, addresses)`` begins to connect to a peer, without waiting.
    """

    name = "reversal"

    def __init__(
        self, endpoint: Endpoint, signals: Signals, call_back: Callable[[PeerId, Sequence[Address]], None]
    ) -> None:
        self._endpoint, self._signals, self._call_back = endpoint, signals, call_back
        self._askers = Askers(
            defaults.REVERSAL_ASKED, defaults.REVERSAL_ASKED_VIA, defaults.REVERSAL_ASKED_TOTAL, endpoint.host.now()
        )
        signals.handle("reverse", self._asked)

    async def open(self, peer: PeerId, step: Step) -> None:
        assert step.via is not None
        body = pack(ComeHere(self._endpoint.record()))
        answer = await self._signals.ask(
            step.via.peer, peer, "reverse", body, deadlines.signal(), addresses=step.via.addresses
        )
        if answer != COMING:
            raise RemoteRefused("reverse", "an answer that makes no sense", peer=peer.short)

    async def _asked(self, origin: PeerId, via: PeerId, body: bytes) -> bytes:
        now = self._endpoint.host.now()
        signed = unpack(ComeHere, body).record
        record = signed.open(self._endpoint.host.wall())
        if record.peer != origin:
            raise RemoteRefused("bad_record", "the record is somebody else's")
        if not record.addresses:
            raise RemoteRefused("no_address", "your record names no address")
        # A signed record may still name a stranger's addresses. What can be made of it is a few SYNs a minute.
        self._askers.admit(origin, via, now)
        self._endpoint.learn(signed)
        self._call_back(origin, record.addresses)
        return COMING


class Relay(Way):
    """A circuit through a peer that the target holds a reservation with."""

    name = "relay"

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    async def open(self, peer: PeerId, step: Step) -> ByteStream:
        assert step.via is not None
        link: Link | None = self._endpoint.link(step.via.peer)
        if link is None:
            link = await self._endpoint.connect(step.via.peer, step.via.addresses)
        if link.way == "relay":
            raise PeerUnreachable("the relay itself can only be reached through another")
        return RelayedStream(await request(link, CIRCUIT_PROTOCOL, Circuit(peer)))
