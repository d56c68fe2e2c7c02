"""From a peer's name to a link: attempts shared by all who wait for the same peer."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import trio

from . import deadlines
from .address import Address
from .contacts import Contacts
from .dialer import Attempt, dial_one, race
from .errors import ConfigError, PeerUnreachable, ProtocolMisuse, RemoteError, WaitExpired
from .host import Host
from .identity import PeerId
from .link import Link
from .linktable import LinkTable
from .network import ByteStream

log = logging.getLogger(__name__)

#: Turns a stream that we opened into a running link, adopted by the table; the peer must be the given one.
Dial = Callable[[PeerId | None, ByteStream], Awaitable[Link]]


class Connector:
    """``dial`` shakes hands as the initiator, ``greet`` says hello on a new link."""

    def __init__(
        self,
        host: Host,
        table: LinkTable,
        contacts: Contacts,
        lag: deadlines.LoopLag,
        *,
        dial: Dial,
        greet: Callable[[Link], Awaitable[None]],
        count: Callable[[str], None],
    ) -> None:
        #: Where attempts run, while the endpoint does.
        self.nursery: trio.Nursery | None = None
        self._host, self._table, self._contacts, self._lag = host, table, contacts, lag
        self._dial, self._greet, self._count = dial, greet, count
        self._attempts: dict[PeerId, Attempt] = {}
        table.on_link.append(self._linked)

    def _linked(self, link: Link) -> None:
        if not link.initiator and (attempt := self._attempts.get(link.peer)) is not None:
            attempt.done.set()  # it came to us while we were on the way to it

    async def connect(self, peer: PeerId, addresses: Sequence[Address], timeout: float | None) -> Link:
        """See :meth:`Endpoint.connect`."""
        seconds = deadlines.connect(self._lag.value(self._host.now())) if timeout is None else timeout
        link: Link | None = None
        with trio.move_on_after(seconds):
            link = await self._connect(peer, tuple(addresses))
        if link is None:
            raise WaitExpired("link", seconds, peer=peer.short)
        return link

    async def _connect(self, peer: PeerId, addresses: tuple[Address, ...]) -> Link:
        await trio.lowlevel.checkpoint()
        while True:
            link = self._table.get(peer)
            if link is not None:
                link.last_used = self._host.now()
                return link
            attempt = self._attempts.get(peer)
            if attempt is None:
                if self.nursery is None:
                    raise ProtocolMisuse("the endpoint does not run")
                known = self._contacts.get(peer, self._host.wall())
                ways = addresses + (known[1].addresses if known is not None else ())
                attempt = self._attempts[peer] = Attempt(tuple(dict.fromkeys(ways)))
                self.nursery.start_soon(self._attempt, peer, attempt)
            attempt.waiters += 1
            try:
                await attempt.done.wait()
            finally:
                attempt.waiters -= 1
                if not attempt.waiters and not attempt.done.is_set():
                    self._attempts.pop(peer, None)
                    attempt.scope.cancel()
            if self._table.get(peer) is None:
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
                        self._host,
                        peer,
                        attempt.addresses,
                        partial(self._dial, peer),
                        self._lag.value(self._host.now()),
                    )
                    attempt.link = link
                    await self._greet(link)
                except PeerUnreachable as error:
                    attempt.error = error
                    self._count("dials_failed")
        finally:
            if self._attempts.get(peer) is attempt:
                del self._attempts[peer]
            attempt.done.set()

    async def identify(self, address: Address) -> Link:
        """See :meth:`Endpoint.identify`."""
        if self.nursery is None:
            raise ProtocolMisuse("the endpoint does not run")
        try:
            lag = self._lag.value(self._host.now())
            link = await dial_one(self._host, address, partial(self._dial, None), lag)
        except PeerUnreachable as error:
            reason = error.attempts[0][1] if error.attempts else error.message
            raise PeerUnreachable("nobody was reached", attempts=((str(address), reason),)) from error
        except (RemoteError, ConfigError) as error:
            lasting = isinstance(error, RemoteError) and error.lasting
            raise PeerUnreachable(
                "nobody was reached", attempts=((str(address), str(error)),), lasting=lasting
            ) from error
        await self._greet(link)
        if not link.alive:
            reason = link.close_reason.message if link.close_reason is not None else "closed by us"
            raise PeerUnreachable("nobody was reached", attempts=((str(address), reason),))
        return link
