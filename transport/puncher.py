"""Hole punching over the host's network: knocks at all addresses at once, one byte stream per side.

The signals are carried by whoever has a common peer: an ``ask`` function on the offerer's side, two handlers on the
answerer's. :mod:`shoal.transport.punch` decides, this module dials.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import TypeAlias

import trio

from . import deadlines, defaults
from .address import Address
from .errors import ConfigError, PeerUnreachable, ProtocolMisuse, RemoteError, RemoteRefused
from .host import Host
from .identity import PeerId
from .network import ByteStream
from .punch import NONCE_SIZE, Answers, Attempts, Going, Offer

#: ``await ask(kind, body)`` → the answer's body; raises RemoteError. Has a deadline of its own.
Ask: TypeAlias = Callable[[str, bytes], Awaitable[bytes]]
#: Where a claimed stream comes out.
Accepted: TypeAlias = trio.MemoryReceiveChannel[ByteStream]

_BUSY = "another hole is punched to there"


class Claims:
    """Streams that the listener accepts while a punch waits for them.

    Between two attempts a request of the other side meets no socket that knocks, but our listener at the same port.
    """

    def __init__(self) -> None:
        self._wanted: dict[Address, trio.MemorySendChannel[ByteStream]] = {}

    @contextmanager
    def claim(self, remote: Address) -> Iterator[Accepted]:
        """While open, an accepted stream from ``remote`` goes to the channel. An address is claimed by one at a time.

        What is not received from the channel is the caller's to close.
        """
        if remote in self._wanted:
            raise ProtocolMisuse(f"{remote} is claimed already")
        send, receive = trio.open_memory_channel[ByteStream](1)
        self._wanted[remote] = send
        with send, receive:
            try:
                yield receive
            finally:
                del self._wanted[remote]

    def wanted(self, remote: Address) -> bool:
        return remote in self._wanted

    def take(self, stream: ByteStream) -> bool:
        """For the acceptor, with a stream that came to a listener: True if a punch waits for it and now owns it."""
        channel = self._wanted.get(stream.remote)
        if channel is None:
            return False
        try:
            channel.send_nowait(stream)
        except trio.WouldBlock:
            return False
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

        async def knock(address: Address, accepted: Accepted) -> None:
            stream = await self._knock(address, going, accepted, reasons)
            if stream is not None:
                streams.append(stream)
                nursery.cancel_scope.cancel()

        try:
            # Claimed from now on: the peer may be quicker than we think.
            async with self._claimed(going.targets) as claimed, trio.open_nursery() as nursery:
                nursery.start_soon(say_go)
                await self._sleep_until(going.start)
                async with trio.open_nursery() as knocking:
                    for address, accepted in claimed.items():
                        knocking.start_soon(knock, address, accepted)
                nursery.cancel_scope.cancel()
        except BaseException:
            await _close(streams)
            raise
        await _close(streams[1:])
        if streams:
            return streams[0]
        if refusals:
            raise refusals[0]
        raise PeerUnreachable(
            "hole punching failed", attempts=tuple((str(a), reasons.get(a, _BUSY)) for a in going.targets)
        )

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
        assert self.nursery is not None

        async def knock(address: Address, accepted: Accepted) -> None:
            stream = await self._knock(address, going, accepted, {})
            if stream is not None:
                assert self.nursery is not None
                self.nursery.start_soon(self._incoming, stream, "punch")
                await trio.sleep(deadlines.punch_rest(going.rtt))
                nursery.cancel_scope.cancel()

        try:
            async with self._claimed(going.targets) as claimed, trio.open_nursery() as nursery:
                for address, accepted in claimed.items():
                    nursery.start_soon(knock, address, accepted)
        finally:
            del self._answering[origin]

    # both

    @asynccontextmanager
    async def _claimed(self, targets: Sequence[Address]) -> AsyncIterator[dict[Address, Accepted]]:
        """Claims of the targets that nobody else has claimed."""
        with ExitStack() as stack:
            free = [address for address in targets if not self.claims.wanted(address)]
            claimed = {address: stack.enter_context(self.claims.claim(address)) for address in free}
            try:
                yield claimed
            finally:
                await _close([stream for accepted in claimed.values() for stream in _left(accepted)])

    async def _knock(
        self, address: Address, going: Going, accepted: Accepted, reasons: dict[Address, str]
    ) -> ByteStream | None:
        """A stream from ``address``, dialled or accepted; None, with a reason, if none comes until the end."""
        attempts = Attempts(going, self._host.random)
        while (until := attempts.next(self._host.now())) is not None:
            stream, reason = await self._attempt(address, until, accepted)
            if stream is not None:
                return stream
            if reason:
                await trio.sleep(min(attempts.failed(reason), max(0.0, going.end - self._host.now())))
            else:
                attempts.silent()
            reasons[address] = attempts.summary
        return None

    async def _attempt(self, address: Address, until: float, accepted: Accepted) -> tuple[ByteStream | None, str]:
        streams: list[ByteStream] = []
        reason = ""

        async def dial() -> None:
            nonlocal reason
            try:
                streams.append(await self._host.network.dial(address, shared_port=True))
            except PeerUnreachable as error:
                reason = error.reason
            except ConfigError as error:
                reason = str(error)
            nursery.cancel_scope.cancel()

        try:
            with trio.move_on_after(until - self._host.now()):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(dial)
                    streams.append(await accepted.receive())
                    nursery.cancel_scope.cancel()
        except BaseException:
            await _close(streams)
            raise
        await _close(streams[1:])
        return (streams[0] if streams else None), reason

    async def _sleep_until(self, time: float) -> None:
        await trio.sleep(max(0.0, time - self._host.now()))


def _left(accepted: Accepted) -> list[ByteStream]:
    """What was handed over and not received."""
    try:
        return [accepted.receive_nowait()]
    except (trio.WouldBlock, trio.EndOfChannel):
        return []


async def _close(streams: Sequence[ByteStream]) -> None:
    for stream in streams:
        await trio.aclose_forcefully(stream)
