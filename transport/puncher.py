"""Hole punching over the host's network: knocks at all addresses at once, one byte stream per side.

The signals are carried by whoever has a common peer: an ``ask`` function on the offerer's side, two handlers on the
answerer's. :mod:`shoal.transport.punch` decides, this module dials.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TypeAlias

import trio

from . import deadlines, defaults
from .address import Address
from .errors import ConfigError, PeerUnreachable, ProtocolMisuse, RemoteError, RemoteRefused
from .host import Host
from .identity import PeerId
from .network import ByteStream
from .punch import NONCE_SIZE, Answers, Attempts, Going, Offer
from .signals import Askers

#: ``await ask(kind, body)`` → the answer's body; raises RemoteError. Has a deadline of its own.
Ask: TypeAlias = Callable[[str, bytes], Awaitable[bytes]]
#: Is told of a stream, and owns it.
Found: TypeAlias = Callable[[ByteStream], None]

_BUSY = "another hole is punched to there"


class Claims:
    """Streams that the listener accepts while a punch waits for them.

    Between two attempts a request of the other side meets no socket that knocks, but our listener at the same port.
    """

    def __init__(self) -> None:
        self._wanted: dict[Address, Found] = {}

    @contextmanager
    def claim(self, remote: Address, found: Found) -> Iterator[None]:
        """While open, ``found`` is called with accepted streams from ``remote``. One claim per address at a time."""
        if remote in self._wanted:
            raise ProtocolMisuse(f"{remote} is claimed already")
        self._wanted[remote] = found
        try:
            yield
        finally:
            del self._wanted[remote]

    def wanted(self, remote: Address) -> bool:
        return remote in self._wanted

    def take(self, stream: ByteStream) -> bool:
        """For the acceptor, with a stream that came to a listener: True if a punch waited for it and now owns it."""
        found = self._wanted.get(stream.remote)
        if found is None:
            return False
        found(stream)
        return True


class Puncher:
    """Both roles, for one node.

    ``addresses``: where our listening port may be seen now, observed addresses first. ``incoming(stream, "punch")``
    takes what the answerer gets; several may come of one punch, all but one end without a byte. :attr:`nursery` is
    where the answerer knocks, while the endpoint runs.
    """

    def __init__(
        self,
        host: Host,
        peer_id: PeerId,
        addresses: Callable[[], Sequence[Address]],
        incoming: Callable[[ByteStream, str], Awaitable[object]],
        lag: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.claims = Claims()
        self.nursery: trio.Nursery | None = None
        self._host, self._peer_id, self._addresses, self._incoming, self._lag = host, peer_id, addresses, incoming, lag
        self._answers = Answers()
        self._askers = Askers(defaults.PUNCH_ASKED, defaults.PUNCH_ASKED_VIA, defaults.PUNCH_ASKED_TOTAL, host.now())
        self._offering: dict[PeerId, None] = {}
        self._answering: dict[PeerId, None] = {}

    # the offerer

    async def punch(self, peer: PeerId, ask: Ask) -> ByteStream | None:
        """A byte stream to ``peer``, on which we begin the handshake; None: it makes the same offer, and comes to us.

        Raises :class:`PeerUnreachable` with what each address answered, and what ``ask`` raises. Takes a bit more than
        two round trips to the peer by way of the common peer, at most :func:`deadlines.punch` longer. Cancellation
        closes everything.
        """
        if peer in self._offering:
            raise ProtocolMisuse("this peer is offered hole punching already")
        if peer in self._answering or self._answers.waiting(peer, self._host.now()):
            await trio.lowlevel.checkpoint()
            return None
        self._offering[peer] = None
        try:
            offer = Offer(self._host.entropy(NONCE_SIZE), self._addresses(), lag=self._lag())
            body = await ask("punch", offer.ask(self._host.now()))
            go, _ = offer.answered(body, self._host.now())
            return await self._go(ask, go, offer)
        except RemoteRefused as error:
            if error.code == "glare":
                return None
            raise
        except PeerUnreachable as error:
            raise PeerUnreachable(error.summary, peer=peer.short, attempts=error.attempts) from error
        finally:
            del self._offering[peer]

    async def _go(self, ask: Ask, go: bytes, offer: Offer) -> ByteStream:
        streams: list[ByteStream] = []
        refusals: list[RemoteError] = []
        reasons: dict[Address, str] = {}
        going = offer.gone(self._host.now())

        async def say_go() -> None:
            try:
                await ask("punch-go", go)
            except RemoteError as error:
                refusals.append(error)
                nursery.cancel_scope.cancel()

        def found(stream: ByteStream) -> None:
            streams.append(stream)
            nursery.cancel_scope.cancel()

        async def knock_everywhere() -> None:
            await self._sleep_until(going.start)
            async with trio.open_nursery() as knocking:
                for address in targets:
                    knocking.start_soon(self._knock, address, going, found, reasons)
            nursery.cancel_scope.cancel()

        try:
            async with trio.open_nursery() as nursery:
                with ExitStack() as claims:  # from now on: the peer may be quicker than we think
                    targets = [address for address in going.targets if not self.claims.wanted(address)]
                    for address in targets:
                        claims.enter_context(self.claims.claim(address, found))
                    nursery.start_soon(say_go)
                    await knock_everywhere()
        except BaseException:
            await _close(streams)
            raise
        await _close(streams[1:])
        if streams:
            return streams[0]
        if refusals:
            raise refusals[0]
        attempts = tuple((str(address), reasons.get(address, _BUSY)) for address in going.targets)
        raise PeerUnreachable("hole punching failed", attempts=attempts)

    # the answerer: handlers of signals

    async def handle_offer(self, origin: PeerId, via: PeerId, body: bytes) -> bytes:
        """The signal "punch"."""
        await trio.lowlevel.checkpoint()
        if self.nursery is None:
            raise RemoteRefused("stopped", "this node does not run")
        if origin in self._offering and self._peer_id < origin:
            raise RemoteRefused("glare", "both have offered hole punching, and the other offer counts")
        if origin in self._answering or len(self._answering) >= defaults.MAX_PUNCHES:
            raise RemoteRefused("busy", "holes are punched already")
        self._askers.admit(origin, via, self._host.now())
        return self._answers.offered(origin, body, self._addresses(), self._host.now())

    async def handle_go(self, origin: PeerId, via: PeerId, body: bytes) -> bytes:
        """The signal "punch-go": begins to knock, and answers at once."""
        await trio.lowlevel.checkpoint()
        if self.nursery is None or origin in self._answering or len(self._answering) >= defaults.MAX_PUNCHES:
            raise RemoteRefused("busy", "holes are punched already")
        going = self._answers.go(origin, body, self._host.now(), self._lag())
        self._answering[origin] = None
        self.nursery.start_soon(self._answer, origin, going)
        return b""

    async def _answer(self, origin: PeerId, going: Going) -> None:
        """Knock until the end, or a little longer than the first stream: the offerer may choose another."""
        first = trio.Event()

        async def knock(address: Address) -> None:
            with trio.CancelScope() as scope:

                def found(stream: ByteStream) -> None:
                    nursery.start_soon(self._incoming, stream, "punch")
                    scope.cancel()
                    first.set()

                with self.claims.claim(address, found):
                    await self._knock(address, going, found, {})

        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._end, first, going, nursery.cancel_scope)
                async with trio.open_nursery() as knocking:
                    for address in going.targets:
                        if not self.claims.wanted(address):
                            knocking.start_soon(knock, address)
                nursery.cancel_scope.cancel()
        finally:
            del self._answering[origin]

    async def _end(self, first: trio.Event, going: Going, scope: trio.CancelScope) -> None:
        await first.wait()
        await trio.sleep(deadlines.punch_rest(going.rtt))
        scope.cancel()

    # both

    async def _knock(self, address: Address, going: Going, found: Found, reasons: dict[Address, str]) -> None:
        """Dial ``address`` again and again, until the end or until a stream was found; else says why there is none."""
        attempts = Attempts(going, self._host.random)
        while (until := attempts.next(self._host.now())) is not None:
            refusal = ""
            with trio.move_on_after(until - self._host.now()):
                try:
                    found(await self._host.network.dial(address, shared_port=True))
                    return
                except PeerUnreachable as error:
                    refusal = error.reason
                except ConfigError as error:
                    refusal = str(error)
            if refusal:
                await trio.sleep(min(attempts.failed(refusal), max(0.0, going.end - self._host.now())))
            else:
                attempts.silent()
            reasons[address] = attempts.summary

    async def _sleep_until(self, time: float) -> None:
        await trio.sleep(max(0.0, time - self._host.now()))


async def _close(streams: Sequence[ByteStream]) -> None:
    for stream in streams:
        await trio.aclose_forcefully(stream)
