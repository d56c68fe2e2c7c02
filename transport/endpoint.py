"""One node's presence on the network: listeners, links, contacts, calls.

The endpoint owns two nurseries. Links live in the outer one, which is shielded, so that a node that is being cancelled
can still say goodbye; everything else (accept loops, dials, handlers of calls) lives in the inner one and stops first.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

import attrs
import trio

from . import deadlines, defaults
from .acceptor import Acceptor
from .address import Address, PeerRecord, Service, SignedPeerRecord
from .callmux import IncomingCall
from .connector import Connection, Connector
from .contacts import Contacts, OwnRecord
from .credentials import Credentials
from .errors import (
    ConfigError,
    LinkClosed,
    PeerUnreachable,
    ProtocolMisuse,
    RemoteError,
    RemoteProtocolError,
    WaitExpired,
)
from .establish import establish
from .frames import Buffer, GoodbyeCode, MuxLimits, Priority, ResetCode
from .host import Host
from .identity import Identity, PeerId
from .link import Link
from .linktable import LinkTable
from .network import ByteStream, Listener
from .rpc import Answerer, Body, Call, Handler, Method, Q, R, Reply, call, exchange
from .secure import SecureChannel
from .serving import RpcServer
from .stream import LinkStream
from .traversal import Traversal, Traversing
from .widening import WIDEN, Widening

log = logging.getLogger(__name__)


@attrs.frozen
class Hello:
    """What both sides of a new link tell each other. ``observed``: the address under which the other is seen."""

    record: SignedPeerRecord
    observed: str


HELLO = Method("transport.hello", Hello, Hello)


class Endpoint:
    """A node on the network, under one identity.

    ``psk``: 32 bytes that all members of a private swarm share; None for an open one. ``max_links``: links kept; idle
    ones beyond are closed, least recently used first. ``traversal``: what to do about NATs, for oneself and others;
    None: dial and be dialled, nothing else. Nothing works before :meth:`run` has started.
    """

    def __init__(
        self,
        host: Host,
        identity: Identity,
        *,
        psk: bytes | None = None,
        max_links: int = defaults.MAX_LINKS,
        limits: MuxLimits | None = None,
        traversal: Traversal | None = None,
    ) -> None:
        self.host = host
        self.identity = identity
        self.peer_id: PeerId = identity.peer_id
        #: How often what happened; for status and doctor.
        self.counters: dict[str, int] = {}
        self.lag = deadlines.LoopLag()
        self._psk = psk
        self._limits = limits
        self._contacts = Contacts()
        self._table = LinkTable(host, self.peer_id, max_links, self._count)
        #: What the line of this machine carries, over all links.
        self.line = self._table.line
        self._table.on_stream = self._on_stream
        self._table.on_call = self._on_call
        #: Called for every new link and every lost one. Must not wait.
        self.on_link = self._table.on_link
        self.on_link_lost = self._table.on_link_lost
        self._acceptor = Acceptor(host, self._table, self.lag, partial(self._establish, initiator=False), self._count)
        self._connector = Connector(
            host,
            self.peer_id,
            self._table,
            self._contacts,
            self.lag,
            dial=self._dial,
            greet=self._say_hello,
            count=self._count,
        )
        self._widening = Widening(host, self._connector.direct.dial, self._known_addresses, self.own_addresses)
        self._table.on_width, self._table.paths = self._widening.wanted, self._widening.paths
        self._listeners: list[Listener] = []
        self._server = RpcServer(host)
        self._credentials = Credentials(identity, host.entropy)
        self._protocols: dict[str, Callable[[LinkStream], Awaitable[None]]] = {}
        self._handled: dict[PeerId, int] = {}  # streams that handlers of protocols work on
        self._nursery: trio.Nursery | None = None
        self._own = OwnRecord(identity)
        self.serve(HELLO, self._answer_hello)
        self.serve(WIDEN, self._widening.answer)
        #: The services that help where plain dialling fails; None where they are switched off.
        self.traversal = Traversing(self, self._connector, traversal) if traversal is not None else None

    @property
    def max_links(self) -> int:
        """Links kept; idle ones beyond are closed, least recently used first."""
        return self._table.limit

    # Life

    async def run(
        self, bind: Sequence[Address] = (), *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Listen at every address of ``bind`` (none: only dial out) and serve until cancelled.

        Then says goodbye on all links, within :func:`deadlines.goodbye` seconds. Raises :class:`ConfigError` for an
        address that cannot be listened at.
        """
        if self._nursery is not None:
            raise ProtocolMisuse("an endpoint runs once")
        listeners: list[Listener] = []
        try:
            for address in bind:
                listeners.append(await self.host.network.listen(address))
            async with trio.open_nursery() as outer:
                links: trio.Nursery = await outer.start(_shielded_nursery)
                self._table.nursery = links
                try:
                    async with trio.open_nursery() as nursery:
                        self._nursery = self._connector.nursery = self._widening.nursery = nursery
                        self._listeners = listeners
                        for listener in listeners:
                            nursery.start_soon(self._acceptor.serve, listener, nursery)
                        if self.traversal is not None:
                            nursery.start_soon(self.traversal.run)
                        task_status.started()
                        try:
                            await trio.sleep_forever()
                        finally:
                            # Before it closes: from here on, whoever wants something of it gets a typed error.
                            self._nursery = self._connector.nursery = self._widening.nursery = None
                            self._connector.stopped = True
                finally:
                    try:
                        with trio.CancelScope(shield=True):
                            await self._table.say_goodbye()
                    finally:
                        # Shielded: nobody else can end them.
                        self._table.nursery = None
                        links.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):  # cancelled at the first one, it would leave the others open
                for listener in listeners:
                    await trio.aclose_forcefully(listener)
            self._listeners = []

    async def _establish(
        self, stream: ByteStream, way: str, *, initiator: bool, expected: PeerId | None = None
    ) -> Link:
        channel = self.channel(initiator=initiator, expected=expected)
        try:
            link = await establish(self.host, stream, channel, self.lag, limits=self._limits, way=way)
        except WaitExpired:
            self._count("handshakes_expired")
            raise
        except LinkClosed:
            self._count("handshakes_broken_off")
            raise
        except RemoteProtocolError:
            self._count("handshakes_refused")
            raise
        if link.peer == self.peer_id:
            await trio.aclose_forcefully(stream)
            raise PeerUnreachable("that address is this node itself")
        return link

    def channel(self, *, initiator: bool, expected: PeerId | None = None) -> SecureChannel:
        """Our side of a handshake that has not begun."""
        return SecureChannel(
            initiator=initiator,
            identity=self.identity,
            entropy=self.host.entropy,
            wall=self.host.wall(),
            expected=expected,
            psk=self._psk,
            ciphers=self.host.ciphers,
            credentials=self._credentials,
        )

    async def _dial(self, expected: PeerId | None, stream: ByteStream, way: str) -> Link:
        link = await self._establish(stream, way, initiator=True, expected=expected)
        try:
            self._table.adopt(link)
        except LinkClosed:
            await trio.aclose_forcefully(stream)
            raise
        return link

    def incoming(self, stream: ByteStream, way: str) -> None:
        """Take a byte stream that a peer opened to us by another ``way`` than our listeners. Does not wait.

        Raises :class:`LinkClosed`, and leaves the stream to the caller, when the node stops.
        """
        if self._nursery is None:
            raise self._connector.not_running()
        self._nursery.start_soon(self._acceptor.incoming, stream, way)

    def claim_accepted(self, take: Callable[[ByteStream], bool]) -> None:
        """Offer each stream that a listener accepts to ``take`` first; where it returns True, the stream is its own."""
        self._acceptor.claim = take

    # Links

    def links(self) -> list[Link]:
        """All live links, oldest peer first; two to one peer may exist for a while."""
        return self._table.live()

    def link(self, peer: PeerId) -> Link | None:
        """The live link to ``peer`` that calls use, or None.

        When both sides dialled at once, both prefer the link that the smaller PeerId dialled; otherwise the newest.
        """
        return self._table.get(peer)

    async def connect(self, peer: PeerId, addresses: Sequence[Address] = (), *, timeout: float | None = None) -> Link:
        """The live link to ``peer``, or a new one by ``addresses`` and those of its contact.

        Concurrent callers share one attempt; it goes on while one of them waits. Raises :class:`PeerUnreachable` that
        names each address and why it failed, :class:`WaitExpired`, :class:`ProtocolMisuse` for our own PeerId.
        """
        if peer == self.peer_id:
            raise ProtocolMisuse("a node does not call itself")
        return await self._connector.connect(peer, addresses, timeout)

    async def identify(self, address: Address) -> Link:
        """Dial ``address`` without knowing who is there (a bootstrap address).

        Raises :class:`PeerUnreachable`, also when it is this node itself.
        """
        return await self._connector.identify(address)

    def connections(self) -> list[Connection]:
        """All live links, by which way each goes, and why."""
        return self._connector.connections()

    def _count(self, what: str) -> None:
        self.counters[what] = self.counters.get(what, 0) + 1

    # Contacts

    def own_addresses(self) -> tuple[Address, ...]:
        """The addresses of this machine at which we listen."""
        found = (a for listener in self._listeners for a in self.host.network.reachable_addresses(listener))
        return tuple(dict.fromkeys(found))

    def listening(self) -> tuple[Address, ...]:
        """The addresses that our listeners are bound to, wildcards as such."""
        return tuple(listener.address for listener in self._listeners)

    def addresses(self) -> tuple[Address, ...]:
        """Where others may reach us."""
        outer = self.traversal.addresses() if self.traversal is not None else ()
        return tuple(dict.fromkeys((*outer, *self.own_addresses())))[: defaults.MAX_ADDRESSES]

    def record(self) -> SignedPeerRecord:
        """Our own record, signed anew when what stands in it has changed or half its life is over."""
        relays, services = ((), ()) if self.traversal is None else (self.traversal.relays, self.traversal.services)
        return self._own.signed(self.addresses(), self.host.wall(), relays=relays, services=services)

    def learn(self, record: SignedPeerRecord) -> None:
        """Keep a contact (a contact is not a link). Raises :class:`DecodeError` when it does not verify."""
        self._contacts.learn(record, self.host.wall())

    def contact(self, peer: PeerId) -> SignedPeerRecord | None:
        """The newest record of ``peer`` that has not expired."""
        known = self._contacts.get(peer, self.host.wall())
        return None if known is None else known[0]

    def _known_addresses(self, peer: PeerId) -> tuple[Address, ...]:
        known = self._contacts.get(peer, self.host.wall())
        return () if known is None else known[1].addresses

    def contacts_offering(self, service: Service) -> list[PeerRecord]:
        """Records of known peers that offer ``service``, most recently used first."""
        return self._contacts.offering(service, self.host.wall())

    async def _say_hello(self, link: Link) -> None:
        seconds = deadlines.request_header(link.rtt, link.lag)
        try:
            self._take_hello(link, await call(link, HELLO, self._hello(link), timeout=seconds))
        except RemoteError as error:
            self._count("hellos_failed")
            log.info("no hello from %s: %s", link.peer.short, error)

    def _hello(self, link: Link) -> Hello:
        return Hello(self.record(), str(link.remote))

    async def _answer_hello(self, call: Call[Hello]) -> Hello:
        self._take_hello(call.link, call.request)
        return self._hello(call.link)

    def _take_hello(self, link: Link, hello: Hello) -> None:
        if hello.record.open(self.host.wall()).peer != link.peer:
            raise RemoteProtocolError("its hello carries somebody else's record", peer=link.peer.short)
        self.learn(hello.record)
        try:
            link.observed = Address.parse(hello.observed)
        except ConfigError:
            raise RemoteProtocolError("its hello carries no address", peer=link.peer.short) from None

    # Calls

    def serve(self, method: Method[Q, R], handler: Handler[Q, R]) -> None:
        """Answer calls of ``method`` with ``handler``. It may raise RemoteRefused to refuse with a code of its own."""
        self._server.serve(method, handler)

    def serve_at_once(self, method: Method[Q, R], answerer: Answerer[Q, R]) -> None:
        """Like :meth:`serve`, with a plain function that never waits: it is called as soon as the request is read."""
        self._server.serve_at_once(method, answerer)

    def serve_streams(self, protocol: str, handler: Callable[[LinkStream], Awaitable[None]]) -> None:
        """Give streams that peers open with ``protocol`` to ``handler``, in a task each. Remote errors may leave it."""
        self._protocols[protocol] = handler

    async def call(
        self,
        peer: PeerId,
        method: Method[Q, R],
        request: Q,
        *,
        body: Sequence[Buffer] | Body | None = None,
        timeout: float | None = None,
    ) -> R:
        """Call ``method`` at ``peer``, connecting first if need be; ``body`` is uploaded behind the request.

        ``timeout`` seconds bound everything, connecting included. Raises :class:`PeerUnreachable`, :class:`LinkClosed`
        as soon as the link is lost, :class:`WaitExpired`, :class:`RemoteRefused` with the peer's code,
        :class:`StreamReset`, :class:`RemoteProtocolError`. Cancellation cancels the handler at the peer.
        """
        end = None if timeout is None else self.host.now() + timeout
        result: R
        for last in (False, True):
            link, left = await self._way(peer, body, end)
            begun = False
            try:
                if method.priority is Priority.CONTROL and not body:
                    result = await call(link, method, request, timeout=left)
                else:
                    async with exchange(link, method, request, body=body, timeout=left) as reply:
                        await reply.begin()
                        begun = True
                        result = await reply.result()
                self._answered(link)
                break
            except LinkClosed:
                if begun or last or not self._unheard(link):
                    raise
        return result

    @asynccontextmanager
    async def stream(
        self, peer: PeerId, method: Method[Q, R], request: Q, *, timeout: float | None = None
    ) -> AsyncIterator[Reply[R]]:
        """A call whose answer has a body: ``await reply.read_into(buffer)`` …, then ``await reply.result()``.

        The block begins when the answer does. ``timeout`` bounds the whole block; errors as in :meth:`call`.
        """
        end = None if timeout is None else self.host.now() + timeout
        for last in (False, True):
            link, left = await self._way(peer, None, end)
            async with AsyncExitStack() as stack:
                try:
                    reply = await stack.enter_async_context(exchange(link, method, request, timeout=left))
                    await reply.begin()
                except LinkClosed:
                    if last or not self._unheard(link):
                        raise
                    continue
                self._answered(link)
                yield reply
                return

    async def _way(self, peer: PeerId, body: Sequence[Buffer] | Body | None, end: float | None) -> tuple[Link, float]:
        """The link for a call, and its seconds: until ``end``, or what its size calls for."""
        link = self.link(peer)
        if link is None:
            link = await self.connect(peer, timeout=None if end is None else max(0.0, end - self.host.now()))
        link.last_used = now = self.host.now()
        if end is not None:
            return link, max(0.0, end - now)
        if isinstance(body, Body):
            return link, body.patience + deadlines.call(link.rtt, link.lag, body.size, link.bandwidth)
        size = sum(memoryview(part).nbytes for part in body) if body else 0
        return link, deadlines.call(link.rtt, link.lag, size, link.bandwidth)

    def _answered(self, link: Link) -> None:
        """It is of use to us: neither a crowd of strangers nor a flood from elsewhere shall take its place."""
        if not link.useful:
            link.useful = True
            if self._acceptor.throttle is not None:
                self._acceptor.throttle.vouch(link.remote.host)

    @staticmethod
    def _unheard(link: Link) -> bool:
        """It was closed as idle before the peer looked at the call: nothing is lost by asking again."""
        return link.goodbye_code == GoodbyeCode.IDLE or link.closed_idle

    def _on_call(self, link: Link, asked: IncomingCall, data: memoryview) -> None:
        if self._nursery is not None:
            self._server.accept(link, asked, data, self._nursery)

    def _on_stream(self, stream: LinkStream) -> None:
        if self._nursery is None:
            stream.reset(ResetCode.CANCELLED)
            return
        if (handler := self._protocols.get(stream.protocol)) is not None:
            handled = self._handled.get(stream.peer, 0)
            if handled >= defaults.MAX_HANDLED_STREAMS:
                stream.reset(ResetCode.TOO_MANY_STREAMS)
                return
            self._nursery.start_soon(self._handle_stream, handler, stream)
            self._handled[stream.peer] = handled + 1
            return
        scope = trio.CancelScope()
        stream.on_broken = scope.cancel
        self._nursery.start_soon(self._server.handle, stream, scope)

    async def _handle_stream(self, handler: Callable[[LinkStream], Awaitable[None]], stream: LinkStream) -> None:
        peer = stream.peer
        try:
            await handler(stream)
        except (RemoteError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            log.info("a stream %s of %s ended: %s", stream.protocol, peer.short, error)
            stream.reset(ResetCode.CANCELLED)
        except trio.Cancelled:
            stream.reset(ResetCode.CANCELLED)
            raise
        except Exception:  # boundary: a bug in a handler must not reach the link
            log.exception("our handler of %s failed for %s", stream.protocol, peer.short)
            stream.reset(ResetCode.CANCELLED)
        finally:
            self._handled[peer] -= 1
            if not self._handled[peer]:
                del self._handled[peer]


async def _shielded_nursery(*, task_status: trio.TaskStatus[trio.Nursery]) -> None:
    """A nursery in a task of its own, so that only what runs in it is shielded, not whoever opened it."""
    async with trio.open_nursery() as nursery:
        nursery.cancel_scope.shield = True
        task_status.started(nursery)
        await trio.sleep_forever()
