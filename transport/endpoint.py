"""One node's presence on the network: listeners, links, contacts, calls.

The endpoint owns two nurseries. Links live in the outer one, which is shielded, so that a node that is being cancelled
can still say goodbye; everything else (accept loops, dials, handlers of calls) lives in the inner one and stops first.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

import attrs
import trio

from . import deadlines, defaults
from .address import Address, SignedPeerRecord
from .contacts import Contacts, OwnRecord
from .dialer import Attempt, dial_one, race
from .errors import (
    ConfigError,
    LinkClosed,
    PeerUnreachable,
    ProtocolMisuse,
    RemoteError,
    RemoteProtocolError,
    WaitExpired,
)
from .frames import Buffer, GoodbyeCode, MuxLimits, ResetCode
from .host import Host
from .identity import Identity, PeerId
from .link import Link, establish
from .network import ByteStream, Listener
from .rpc import Call, Handler, Method, Q, R, Reply, RpcServer, exchange
from .secure import SecureChannel
from .stream import LinkStream

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
    ones beyond are closed, least recently used first. Nothing works before :meth:`run` has started.
    """

    def __init__(
        self,
        host: Host,
        identity: Identity,
        *,
        psk: bytes | None = None,
        max_links: int = defaults.MAX_LINKS,
        limits: MuxLimits | None = None,
    ) -> None:
        self.host = host
        self.identity = identity
        self.peer_id: PeerId = identity.peer_id
        self.max_links = max_links
        #: Called for every new link and every lost one. Must not wait.
        self.on_link: list[Callable[[Link], None]] = []
        self.on_link_lost: list[Callable[[Link], None]] = []
        #: How often what happened; for status and doctor.
        self.counters: dict[str, int] = {}
        self.lag = deadlines.LoopLag()
        self._psk = psk
        self._limits = limits
        self._contacts = Contacts()
        self._links: dict[PeerId, list[Link]] = {}
        self._attempts: dict[PeerId, Attempt] = {}
        self._half_open: dict[int, trio.CancelScope] = {}
        self._half_open_number = 0
        self._listeners: list[Listener] = []
        self._server = RpcServer(host)
        self._nursery: trio.Nursery | None = None
        self._link_nursery: trio.Nursery | None = None
        self._own = OwnRecord(identity)
        self.serve(HELLO, self._answer_hello)

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
                self._link_nursery = links
                try:
                    async with trio.open_nursery() as nursery:
                        self._nursery = nursery
                        self._listeners = listeners
                        for listener in listeners:
                            nursery.start_soon(self._accept, listener)
                        task_status.started()
                        await trio.sleep_forever()
                finally:
                    self._nursery = None
                    try:
                        await self._say_goodbye()
                    finally:
                        # Shielded: nobody else can end them.
                        links.cancel_scope.cancel()
        finally:
            for listener in listeners:
                await trio.aclose_forcefully(listener)
            self._listeners = []

    async def _say_goodbye(self) -> None:
        with trio.CancelScope(shield=True):
            async with trio.open_nursery() as nursery:
                for link in self.links():
                    nursery.start_soon(link.aclose, "the node stops")

    async def _accept(self, listener: Listener) -> None:
        while True:
            stream = await listener.accept()
            assert self._nursery is not None
            self._nursery.start_soon(self._incoming, stream)

    async def _incoming(self, stream: ByteStream) -> None:
        if len(self._half_open) >= defaults.MAX_HALF_OPEN:
            oldest = next(iter(self._half_open))
            self._half_open.pop(oldest).cancel()
            self._count("half_open_dropped")
        self._half_open_number += 1
        number = self._half_open_number
        link: Link | None = None
        with trio.CancelScope() as scope:
            self._half_open[number] = scope
            try:
                link = await self._establish(stream, initiator=False)
            except RemoteError as error:
                log.info("no link with %s: %s", stream.remote, error)
            finally:
                self._half_open.pop(number, None)
        if link is None:
            return
        assert self._link_nursery is not None
        if len(self.links()) >= 2 * self.max_links:
            self._count("links_refused")
            self._link_nursery.start_soon(link.run)
            await link.aclose("no slot for another link", GoodbyeCode.BUSY)
            return
        self._adopt(link)

    async def _establish(self, stream: ByteStream, *, initiator: bool, expected: PeerId | None = None) -> Link:
        channel = SecureChannel(
            initiator=initiator,
            identity=self.identity,
            entropy=self.host.entropy,
            wall=self.host.wall(),
            expected=expected,
            psk=self._psk,
            ciphers=self.host.ciphers,
        )
        try:
            link = await establish(self.host, stream, channel, self.lag, limits=self._limits)
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

    async def _dial(self, expected: PeerId | None, stream: ByteStream) -> Link:
        link = await self._establish(stream, initiator=True, expected=expected)
        self._adopt(link)
        return link

    # Links

    def links(self) -> list[Link]:
        """All live links, oldest peer first; two to one peer may exist for a while."""
        return [link for links in self._links.values() for link in links if link.alive]

    def link(self, peer: PeerId) -> Link | None:
        """The live link to ``peer`` that calls use, or None.

        When both sides dialled at once, both prefer the link that the smaller PeerId dialled; otherwise the newest.
        """
        live = [link for link in self._links.get(peer, ()) if link.alive]
        if len(live) < 2:
            return live[0] if live else None
        newest = max(link.opened_at for link in live)
        recent = [link for link in live if link.opened_at >= newest - defaults.SIMULTANEOUS]
        return min(reversed(recent), key=lambda link: self.peer_id if link.initiator else link.peer)

    async def connect(self, peer: PeerId, addresses: Sequence[Address] = (), *, timeout: float | None = None) -> Link:
        """The live link to ``peer``, or a new one by ``addresses`` and those of its contact.

        Concurrent callers share one attempt; it goes on while one of them waits. Raises :class:`PeerUnreachable` that
        names each address and why it failed, :class:`WaitExpired`, :class:`ProtocolMisuse` for our own PeerId.
        """
        if peer == self.peer_id:
            raise ProtocolMisuse("a node does not call itself")
        seconds = deadlines.connect(self.lag.value(self.host.now())) if timeout is None else timeout
        link: Link | None = None
        with trio.move_on_after(seconds):
            link = await self._connect(peer, tuple(addresses))
        if link is None:
            raise WaitExpired("link", seconds, peer=peer.short)
        return link

    async def _connect(self, peer: PeerId, addresses: tuple[Address, ...]) -> Link:
        await trio.lowlevel.checkpoint()
        while True:
            link = self.link(peer)
            if link is not None:
                link.last_used = self.host.now()
                return link
            attempt = self._attempts.get(peer)
            if attempt is None:
                if self._nursery is None:
                    raise ProtocolMisuse("the endpoint does not run")
                known = self._contacts.get(peer, self.host.wall())
                ways = addresses + (known[1].addresses if known is not None else ())
                attempt = self._attempts[peer] = Attempt(tuple(dict.fromkeys(ways)))
                self._nursery.start_soon(self._attempt, peer, attempt)
            attempt.waiters += 1
            try:
                await attempt.done.wait()
            finally:
                attempt.waiters -= 1
                if not attempt.waiters and not attempt.done.is_set():
                    self._attempts.pop(peer, None)
                    attempt.scope.cancel()
            if self.link(peer) is None:
                if attempt.link is not None:
                    reason = attempt.link.close_reason
                    why = "the link ended as soon as it was made"
                    raise PeerUnreachable(f"{why}: {reason.message}" if reason else why, peer=peer.short)
                if attempt.error is not None and all(address in attempt.addresses for address in addresses):
                    raise PeerUnreachable(
                        attempt.error.summary, peer=peer.short, attempts=attempt.error.attempts
                    ) from attempt.error

    async def _attempt(self, peer: PeerId, attempt: Attempt) -> None:
        try:
            with attempt.scope:
                try:
                    link = await race(
                        self.host,
                        peer,
                        attempt.addresses,
                        partial(self._dial, peer),
                        self.lag.value(self.host.now()),
                    )
                    attempt.link = link
                    await self._say_hello(link)
                except PeerUnreachable as error:
                    attempt.error = error
                    self._count("dials_failed")
        finally:
            if self._attempts.get(peer) is attempt:
                del self._attempts[peer]
            attempt.done.set()

    async def identify(self, address: Address) -> Link:
        """Dial ``address`` without knowing who is there (a bootstrap address).

        Raises :class:`PeerUnreachable`, also when it is this node itself.
        """
        if self._nursery is None:
            raise ProtocolMisuse("the endpoint does not run")
        try:
            link = await dial_one(self.host, address, partial(self._dial, None), self.lag.value(self.host.now()))
        except PeerUnreachable as error:
            reason = error.attempts[0][1] if error.attempts else error.message
            raise PeerUnreachable("nobody was reached", attempts=((str(address), reason),)) from error
        except (RemoteError, ConfigError) as error:
            raise PeerUnreachable("nobody was reached", attempts=((str(address), str(error)),)) from error
        await self._say_hello(link)
        if not link.alive:
            reason = link.close_reason.message if link.close_reason is not None else "closed by us"
            raise PeerUnreachable("nobody was reached", attempts=((str(address), reason),))
        return link

    def _adopt(self, link: Link) -> None:
        assert self._link_nursery is not None
        self._links.setdefault(link.peer, []).append(link)
        link.on_stream = self._on_stream
        link.on_idle = partial(self._on_idle, link)
        self._link_nursery.start_soon(self._run_link, link)
        self._trim()
        if not link.initiator and (attempt := self._attempts.get(link.peer)) is not None:
            attempt.done.set()  # it came to us while we were on the way to it
        for hook in self.on_link:
            hook(link)

    async def _run_link(self, link: Link) -> None:
        try:
            await link.run()
        except Exception:  # boundary: a bug in serving one peer must not end the links to others
            log.exception("the link to %s failed for a reason of our own", link.peer.short)
            self._count("link_bugs")
        finally:
            links = self._links[link.peer]
            links.remove(link)
            if not links:
                del self._links[link.peer]
        if isinstance(link.close_reason, RemoteProtocolError):
            self._count("protocol_errors")
            log.warning("the link to %s broke the protocol: %s", link.peer.short, link.close_reason)
        else:
            log.info("the link to %s is gone: %s", link.peer.short, link.close_reason)
        for hook in self.on_link_lost:
            hook(link)

    def _trim(self) -> None:
        """Close idle links beyond the limit, least recently used first; one just made gets to be used."""
        live = self.links()
        before = self.host.now() - defaults.IDLE_GRACE
        spare = [link for link in live if link.idle and link.last_used < before]
        spare.sort(key=lambda link: link.last_used)
        for link in spare[: max(0, len(live) - self.max_links)]:
            self._close_idle(link, "its slot is needed")

    def _on_idle(self, link: Link) -> None:
        if link.alive and link.idle and self.link(link.peer) is not link:
            self._close_idle(link, "another link to the same peer took over")
        self._trim()

    def _close_idle(self, link: Link, reason: str) -> None:
        assert self._link_nursery is not None
        self._count("links_closed_idle")
        link.say_goodbye(reason, GoodbyeCode.IDLE)
        self._link_nursery.start_soon(link.aclose, reason, GoodbyeCode.IDLE)

    def _count(self, what: str) -> None:
        self.counters[what] = self.counters.get(what, 0) + 1

    # Contacts

    def addresses(self) -> tuple[Address, ...]:
        """Where others may reach us."""
        found = (a for listener in self._listeners for a in self.host.network.reachable_addresses(listener))
        return tuple(dict.fromkeys(found))[: defaults.MAX_ADDRESSES]

    def record(self) -> SignedPeerRecord:
        """Our own record, signed anew when our addresses have changed or half its life is over."""
        return self._own.signed(self.addresses(), self.host.wall())

    def learn(self, record: SignedPeerRecord) -> None:
        """Keep a contact (a contact is not a link). Raises :class:`DecodeError` when it does not verify."""
        self._contacts.learn(record, self.host.wall())

    def contact(self, peer: PeerId) -> SignedPeerRecord | None:
        """The newest record of ``peer`` that has not expired."""
        known = self._contacts.get(peer, self.host.wall())
        return None if known is None else known[0]

    async def _say_hello(self, link: Link) -> None:
        seconds = deadlines.request_header(link.rtt, link.lag)
        try:
            async with exchange(link, HELLO, self._hello(link), timeout=seconds) as reply:
                self._take_hello(link, await reply.result())
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

    async def call(
        self,
        peer: PeerId,
        method: Method[Q, R],
        request: Q,
        *,
        body: Sequence[Buffer] | None = None,
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
                async with exchange(link, method, request, body=body, timeout=left) as reply:
                    await reply.begin()
                    begun = True
                    result = await reply.result()
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
                yield reply
                return

    async def _way(self, peer: PeerId, body: Sequence[Buffer] | None, end: float | None) -> tuple[Link, float]:
        """The link for a call, and its seconds: until ``end``, or what its size calls for."""
        link = self.link(peer)
        if link is None:
            link = await self.connect(peer, timeout=None if end is None else max(0.0, end - self.host.now()))
        link.last_used = now = self.host.now()
        if end is not None:
            return link, max(0.0, end - now)
        size = sum(memoryview(part).nbytes for part in body) if body else 0
        return link, deadlines.call(link.rtt, link.lag, size, link.bandwidth)

    @staticmethod
    def _unheard(link: Link) -> bool:
        """It was closed as idle before the peer looked at the call: nothing is lost by asking again."""
        return link.goodbye_code == GoodbyeCode.IDLE or link.closed_idle

    def _on_stream(self, stream: LinkStream) -> None:
        if self._nursery is None:
            stream.reset(ResetCode.CANCELLED)
            return
        scope = trio.CancelScope()
        stream.on_broken = scope.cancel
        self._nursery.start_soon(self._server.handle, stream, scope)


async def _shielded_nursery(*, task_status: trio.TaskStatus[trio.Nursery]) -> None:
    """A nursery in a task of its own, so that only what runs in it is shielded, not whoever opened it."""
    async with trio.open_nursery() as nursery:
        nursery.cancel_scope.shield = True
        task_status.started(nursery)
        await trio.sleep_forever()
