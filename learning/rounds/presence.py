"""Which peers can be reached right now: one watcher per peer, told to whoever asks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import trio

from ...transport.endpoint import Endpoint
from ...transport.errors import RemoteError
from ...transport.frames import GoodbyeCode
from ...transport.identity import PeerId
from ...transport.link import Link
from .. import defaults

#: Why a peer is lost that told us so itself.
GOODBYE = "said goodbye"


class Presence:
    """Keeps a link to every watched peer and reports losses and returns, each once, in order.

    A link that ends is dialled again at once; only when that fails is the peer lost. A peer that said goodbye is lost
    at once.
    """

    def __init__(self, endpoint: Endpoint, nursery: trio.Nursery) -> None:
        self._endpoint, self._nursery = endpoint, nursery
        self._scopes: dict[PeerId, trio.CancelScope] = {}
        self.lost: dict[PeerId, str] = {}
        self._came: dict[PeerId, trio.Event] = {}
        endpoint.on_link.append(self._on_link)
        self.on_change: Callable[[PeerId, str | None], None] = lambda peer, why: None
        #: A link to a watched peer is up, for the first time or again.
        self.on_link: Callable[[PeerId], None] = lambda peer: None
        endpoint.on_link.append(self._linked)

    def watch(self, peers: Iterable[PeerId]) -> None:
        """Watch exactly ``peers`` (ourselves left out)."""
        wanted = {peer: None for peer in peers if peer != self._endpoint.peer_id}
        for peer in [p for p in self._scopes if p not in wanted]:
            self._scopes.pop(peer).cancel()
            self.lost.pop(peer, None)
        for peer in wanted:
            if peer not in self._scopes:
                self._scopes[peer] = trio.CancelScope()
                self._nursery.start_soon(self._watch, peer, self._scopes[peer])

    def _linked(self, link: Link) -> None:
        # A peer that was lost and dials us is back before our own next attempt to reach it.
        if link.peer in self._scopes:
            self._set(link.peer, None)

    def _on_link(self, link: Link) -> None:
        # It dialled us: no need to wait for our own next attempt.
        event = self._came.pop(link.peer, None)
        if event is not None:
            event.set()

    def _set(self, peer: PeerId, why: str | None) -> None:
        if why is None and peer in self.lost:
            del self.lost[peer]
            self.on_change(peer, None)
        elif why is not None and peer not in self.lost:
            self.lost[peer] = why
            self.on_change(peer, why)

    async def _watch(self, peer: PeerId, scope: trio.CancelScope) -> None:
        with scope:
            pause = defaults.REDIAL_FIRST
            while True:
                try:
                    link = await self._endpoint.connect(peer)
                except RemoteError as error:
                    self._set(peer, error.message)
                else:
                    self._set(peer, None)
                    self.on_link(peer)
                    pause = defaults.REDIAL_FIRST
                    await link.closed.wait()
                    if link.goodbye_code != GoodbyeCode.LEAVING:
                        # The node did not leave: the path broke, or the link was spare and idle. Dial at once.
                        try:
                            await self._endpoint.connect(peer)
                            continue
                        except RemoteError as error:
                            self._set(peer, error.message)
                    else:
                        self._set(peer, GOODBYE)
                self._came[peer] = came = trio.Event()
                with trio.move_on_after(pause * (0.75 + 0.5 * self._endpoint.host.random.random())):
                    await came.wait()
                pause = min(pause * 2, defaults.REDIAL_LAST)
