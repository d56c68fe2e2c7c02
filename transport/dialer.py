"""Ways to one peer, raced with small head starts: the first complete handshake wins."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import trio

from . import deadlines, defaults
from .address import Address
from .errors import ConfigError, PeerUnreachable, RemoteError, WaitExpired
from .host import Host
from .identity import PeerId
from .link import Link
from .network import ByteStream

#: Turns a fresh byte stream into an authenticated, running link; raises RemoteError.
Shake = Callable[[ByteStream], Awaitable[Link]]


class Attempt:
    """One attempt to reach a peer, shared by all who wait for it."""

    def __init__(self, addresses: tuple[Address, ...]) -> None:
        self.addresses = addresses
        self.done = trio.Event()
        self.scope = trio.CancelScope()
        self.waiters = 0
        self.link: Link | None = None
        self.error: PeerUnreachable | None = None


async def dial_one(host: Host, address: Address, shake: Shake, lag: float) -> Link:
    """Open a byte stream to ``address`` and shake hands. Raises :class:`RemoteError` with the reason."""
    seconds = deadlines.dial(lag)
    stream: ByteStream | None = None
    with trio.move_on_after(seconds):
        stream = await host.network.dial(address)
    if stream is None:
        raise WaitExpired("answer to a dial", seconds)
    return await shake(stream)


async def race(host: Host, peer: PeerId, addresses: Sequence[Address], shake: Shake, lag: float) -> Link:
    """Dial ``addresses`` in order, each :data:`defaults.DIAL_HEAD_START` after the one before or as soon as it failed.

    Returns the first link; the other attempts are cancelled (one that completed too is a spare link). Raises
    :class:`PeerUnreachable`, which names every address and why it failed.
    """
    winner: list[Link] = []
    reasons: dict[Address, str] = {}

    async def attempt(address: Address, failed: trio.Event, scope: trio.CancelScope) -> None:
        try:
            link = await dial_one(host, address, shake, lag)
        except PeerUnreachable as error:
            reasons[address] = error.attempts[0][1] if error.attempts else error.message
        except (RemoteError, ConfigError) as error:
            reasons[address] = str(error)
        else:
            winner.append(link)
            scope.cancel()
        failed.set()

    ordered = list(dict.fromkeys(addresses))[: defaults.MAX_ADDRESSES]
    async with trio.open_nursery() as nursery:
        for address in ordered:
            failed = trio.Event()
            nursery.start_soon(attempt, address, failed, nursery.cancel_scope)
            with trio.move_on_after(defaults.DIAL_HEAD_START):
                await failed.wait()
    if winner:
        return winner[0]
    attempts = tuple((str(address), reasons[address]) for address in ordered)
    message = "no way to it succeeded" if attempts else "no address of it is known"
    raise PeerUnreachable(message, peer=peer.short, attempts=attempts)
