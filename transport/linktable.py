"""The links of one node by peer: which one calls use, which idle ones give way, and the task that runs each."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import trio

from . import defaults
from .callmux import IncomingCall
from .errors import LinkClosed, RemoteProtocolError
from .eviction import Candidate, make_room, relieve
from .frames import GoodbyeCode
from .host import Host
from .identity import PeerId
from .linemeter import LineMeter
from .link import Link
from .stream import LinkStream
from .throttle import source_of

log = logging.getLogger(__name__)


class LinkTable:
    """All links of the node ``own``. ``limit``: links kept; idle ones beyond are closed, least recently used first.

    ``nursery``, in which links run, is set before the first link is adopted.
    """

    def __init__(self, host: Host, own: PeerId, limit: int, count: Callable[[str], None]) -> None:
        self.limit = limit
        #: Called for every new link and every lost one. Must not wait.
        self.on_link: list[Callable[[Link], None]] = []
        self.on_link_lost: list[Callable[[Link], None]] = []
        #: Takes the streams that peers open.
        self.on_stream: Callable[[LinkStream], None] = lambda stream: None
        #: Takes their small calls; see :attr:`Link.on_call`.
        self.on_call: Callable[[Link, IncomingCall, memoryview], None] | None = None
        #: Called when a link is interrupted or answers late. Must not wait. None: interrupted links end at once.
        self.on_trouble: Callable[[Link], None] | None = None
        #: Called when a link wants another number of pipes for bulk. Must not wait.
        self.on_width: Callable[[Link], None] | None = None
        #: How many paths seem to lead to the peer of a link.
        self.paths: Callable[[Link], int] = lambda link: 1
        #: What the line of this machine carries, over all links.
        self.line = LineMeter()
        self.nursery: trio.Nursery | None = None
        self._host, self._own, self._count = host, own, count
        self._links: dict[PeerId, list[Link]] = {}
        self._sessions: dict[bytes, Link] = {}
        self._moved = 0  # bytes since what links hold was looked at

    def session(self, id: bytes) -> Link | None:
        """The link of a session, by what :class:`SessionSecrets` calls ``id``."""
        return self._sessions.get(id)

    def live(self) -> list[Link]:
        """All live links, oldest peer first; two to one peer may exist for a while."""
        return [link for links in self._links.values() for link in links if link.alive]

    def get(self, peer: PeerId) -> Link | None:
        """The live link to ``peer`` that calls use, or None.

        When both sides dialled at once, both prefer the link that the smaller PeerId dialled; otherwise the newest.
        """
        links = self._links.get(peer)
        if links is None:
            return None
        if len(links) == 1:
            return links[0] if links[0].alive else None
        live = [link for link in links if link.alive]
        if len(live) < 2:
            return live[0] if live else None
        newest = max(link.opened_at for link in live)
        recent = [link for link in live if link.opened_at >= newest - defaults.SIMULTANEOUS]
        return min(reversed(recent), key=lambda link: self._own if link.initiator else link.peer)

    def adopt(self, link: Link) -> None:
        """Run ``link`` from now on, until it ends. Raises :class:`LinkClosed` when the node stops."""
        if self.nursery is None:
            raise LinkClosed("this node stops", peer=link.peer.short)
        for older in self._links.get(link.peer, ()):
            # Whoever still knew that session would have brought a pipe for it.
            older.give_up(LinkClosed("it came back without its memory of this link", peer=link.peer.short))
        self._links.setdefault(link.peer, []).append(link)
        self._sessions[link.secrets.id] = link
        if self.on_trouble is not None:
            link.on_trouble = partial(self.on_trouble, link)
        if self.on_width is not None:
            link.on_width, link.paths = partial(self.on_width, link), partial(self.paths, link)
        link.line = self.line
        link.on_stream = self.on_stream
        link.on_call = self.on_call
        link.on_idle = partial(self._on_idle, link)
        link.watch(self._note_moved)
        self.nursery.start_soon(self._run, link)
        self.trim()
        for hook in self.on_link:
            hook(link)

    def make_room(self, newcomer: Link) -> bool:
        """Have another link give way to one from outside where there is no slot; False when none may."""
        live = self.live()
        if len(live) < 2 * self.limit:
            return True
        candidates = [_candidate(link) for link in live]
        index, reason = make_room(candidates, source_of(newcomer.remote.host)[0], self._host.now())
        if index is None:
            log.info("no slot for %s: %s", newcomer.peer.short, reason)
            return False
        log.info("the link to %s gives way to %s: %s", live[index].peer.short, newcomer.peer.short, reason)
        self._count("links_evicted")
        self._close(live[index], f"its slot is needed: {reason}", GoodbyeCode.BUSY)
        return True

    def refuse(self, link: Link) -> None:
        """Tell the other side that there is no slot for it."""
        assert self.nursery is not None
        self._count("links_refused")
        self.nursery.start_soon(link.run)
        self.nursery.start_soon(link.aclose, "no slot for another link", GoodbyeCode.BUSY)

    async def say_goodbye(self) -> None:
        """On all links at once."""
        async with trio.open_nursery() as nursery:
            for link in self.live():
                nursery.start_soon(link.aclose, "the node stops")

    async def _run(self, link: Link) -> None:
        try:
            await link.run()
        except Exception:  # boundary: a bug in serving one peer must not end the links to others
            log.exception("the link to %s failed for a reason of our own", link.peer.short)
            self._count("link_bugs")
        finally:
            links = self._links[link.peer]
            links.remove(link)
            self._sessions.pop(link.secrets.id, None)
            if not links:
                del self._links[link.peer]
        if isinstance(link.close_reason, RemoteProtocolError):
            self._count("protocol_errors")
            log.warning("the link to %s broke the protocol: %s", link.peer.short, link.close_reason)
        else:
            log.info("the link to %s is gone: %s", link.peer.short, link.close_reason)
        for hook in self.on_link_lost:
            hook(link)

    def trim(self) -> None:
        """Close idle links beyond the limit, least recently used first; one just made gets to be used."""
        if len(self._sessions) <= self.limit:
            return  # every link that falls silent comes by here: nothing may be looked for among all of them
        live = self.live()
        before = self._host.now() - defaults.IDLE_GRACE
        spare = [link for link in live if link.idle and link.last_used < before]
        spare.sort(key=lambda link: link.last_used)
        for link in spare[: max(0, len(live) - self.limit)]:
            self._close_idle(link, "its slot is needed")

    def _on_idle(self, link: Link) -> None:
        if link.bulk_pipes:
            link.narrow()
            link.width.reset()
        if link.alive and link.idle and self.get(link.peer) is not link:
            self._close_idle(link, "another link to the same peer took over")
        self.trim()

    def _close_idle(self, link: Link, reason: str) -> None:
        self._count("links_closed_idle")
        self._close(link, reason, GoodbyeCode.IDLE)

    def _close(self, link: Link, reason: str, code: GoodbyeCode) -> None:
        link.say_goodbye(reason, code)
        if self.nursery is not None:  # else all links are about to end
            self.nursery.start_soon(link.aclose, reason, code)

    def _note_moved(self, size: int) -> None:
        self._moved += size
        if self._moved >= defaults.HELD_CHECK and self.nursery is not None:
            self._moved = 0
            # Not here: a link is in the middle of a record.
            self.nursery.start_soon(self._relieve)

    async def _relieve(self) -> None:
        """End links while all together hold too much memory."""
        live = self.live()
        while live:
            index, reason = relieve([_candidate(link) for link in live], defaults.MAX_HELD)
            if index is None:
                return
            link = live.pop(index)
            log.warning("ends the link to %s: %s", link.peer.short, reason)
            self._count("links_held_too_much")
            self._close(link, reason, GoodbyeCode.BUSY)


def _candidate(link: Link) -> Candidate:
    return Candidate(
        source=source_of(link.remote.host)[0],
        proven=link.initiator or link.useful,
        idle=link.idle,
        opened_at=link.opened_at,
        last_used=link.last_used,
        held=link.held,
    )
