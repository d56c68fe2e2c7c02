"""The pipes of one link: which carries control, which carry bulk, which give way, which still live. Sans-IO."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from . import deadlines, defaults
from .errors import WaitExpired
from .pipe import Pipe

if TYPE_CHECKING:
    from .address import Address
    from .host import Host
    from .identity import PeerId
    from .linemeter import LineMeter
    from .mux import Mux
    from .session import Session

log = logging.getLogger(__name__)


class PipeSet:
    """``first``: the pipe of the handshake. ``peer``: short name of the other end. ``on_change`` hears of elections."""

    def __init__(self, first: Pipe, peer: str, on_change: Callable[[], None]) -> None:
        self.all = [first]
        #: The pipe that carries control; while there is none, the last that did.
        self.best = first
        self._peer, self._on_change = peer, on_change
        self._past_sent = self._past_received = 0  # bytes of pipes that are gone

    @property
    def usable(self) -> list[Pipe]:
        return [pipe for pipe in self.all if pipe.usable]

    @property
    def bytes_sent(self) -> int:
        return self._past_sent + sum(pipe.bytes_sent for pipe in self.all)

    @property
    def bytes_received(self) -> int:
        return self._past_received + sum(pipe.bytes_received for pipe in self.all)

    @property
    def bandwidth(self) -> float | None:
        """Bytes per second, smoothed, of the pipes that carry bulk; None: not measured yet."""
        measured = [pipe.bandwidth for pipe in self.all if pipe.bandwidth and self.carries_bulk(pipe)]
        return sum(measured) if measured else None

    def takes(self, *, bulk_only: bool) -> bool:
        """Whether there is room for another one."""
        return len(self.all) < defaults.MAX_PIPES + (0 if bulk_only else defaults.SPARE_PIPES)

    def carries_bulk(self, pipe: Pipe) -> bool:
        if len(self.all) == 1:
            return pipe.usable
        if any(other.bulk_only and other.usable and not other.suspect for other in self.all):
            return pipe.bulk_only and pipe.usable and not pipe.suspect
        return pipe is self.best and pipe.usable

    def share(self, pipe: Pipe) -> float:
        """Which part of the bulk under way may be on ``pipe``, 0 to 1: all of them get rid of theirs in the same time.

        What a slow one has taken all others would wait for: data are wanted in order, and by an end.
        """
        if len(self.all) < 3:  # one that carries control, and one for bulk
            return 1.0
        total = self.bandwidth
        return (pipe.bandwidth or 0.0) / total if total else 1.0

    def remove(self, pipe: Pipe) -> None:
        self.all.remove(pipe)
        self._past_sent += pipe.bytes_sent
        self._past_received += pipe.bytes_received

    def heard_on(self, pipe: Pipe, now: float) -> None:
        """A record came on ``pipe`` that changes what it is good for."""
        pipe.confirmed, pipe.suspect = True, False
        self.elect()
        if self.best.peer_retired:
            # The peer has a better one, of which we have heard nothing yet. If that does not change soon, it never came
            # about, and the peer may have no pipe at all by now: to be found out before it gives the link up.
            self.best.ping(now)

    def elect(self) -> bool:
        """Choose the pipe for control anew, and retire those that are worse. False when there is none to choose."""
        usable = self.usable
        if not usable:
            return False
        # What the peer has retired still carries what we send, but no answer comes back on it. Of those that are alike
        # the newest counts, at both ends: it was opened because one of them found the older one dead, and the other may
        # not know yet.
        best = min(usable, key=lambda pipe: (pipe.suspect, pipe.peer_retired, pipe.bulk_only, pipe.rank, -pipe.index))
        if best is not self.best:
            before, self.best = self.best, best
            if before in self.all or before.way != best.way:
                log.info("the link to %s goes on by %s instead of %s", self._peer, best.way, before.way)
        for pipe in usable:
            spare = pipe.rank > best.rank or not (pipe.bulk_only or best.bulk_only)
            # What the peer gives back is of no use for an answer: it goes as soon as another one can take its place.
            spare |= pipe.peer_retired and not best.peer_retired
            if pipe is not best and spare and not best.suspect:
                pipe.retire()
        for pipe in self.all:
            pipe.work.wake()
        self._on_change()
        return True

    def look_after(self, pipe: Pipe, now: float, lag: float, *, busy: bool, on_idle: Callable[[], None]) -> float:
        """Ping, suspect or give up ``pipe`` where it is time; returns when to look again.

        ``lag``: of our loop, seconds. ``busy``: somebody waits for an answer. ``on_idle``: called when ``pipe`` is the
        best one and was silent for a keepalive interval.
        """
        if pipe.asked is not None and pipe.heard > pipe.asked:
            pipe.asked = None
        if pipe.asked is None:
            due = idle = pipe.heard + defaults.KEEPALIVE_IDLE
            if pipe.unheard_since is not None and busy:
                due = min(due, pipe.unheard_since + deadlines.probe(pipe.rtt, lag))
            if now < due:
                return due
            if now >= idle and pipe is self.best:
                on_idle()
            pipe.ping(now)
        assert pipe.asked is not None
        suspect = pipe.asked + deadlines.suspect(pipe.rtt, lag, pipe.unheard, pipe.bandwidth)
        dead = pipe.asked + deadlines.sign_of_life(pipe.rtt, lag, pipe.unheard, pipe.bandwidth)
        if now >= dead:
            pipe.fail(WaitExpired("sign of life", now - pipe.asked, peer=self._peer))
            return math.inf
        if now < suspect:
            return suspect
        if not pipe.suspect:
            pipe.suspect = True
            self.elect()
        return dead


class SeenThroughPipes:
    """What can be said of a link by looking at its pipes, and at what it holds."""

    _pipes: PipeSet
    _mux: Mux
    _session: Session
    #: It has answered calls of this node, which therefore has a use for it.
    useful = False
    #: What all links of this node tell of their bulk.
    line: LineMeter | None = None
    peer: PeerId

    def _note_sent(self, pipe: Pipe, size: int, seconds: float, now: float) -> None:
        """A record of ``size`` bytes was taken by the network within ``seconds``."""
        pipe.note_sent(size, seconds, now)
        if self.line is not None and pipe.sent_bulk:
            self.line.up.note(now - seconds, now, size, self.peer)

    def _note_heard(self, pipe: Pipe, size: int, now: float, *, whole: bool) -> None:
        """``size`` bytes came; ``whole``: see :meth:`Pipe.note_heard`."""
        pipe.note_heard(size, now, whole=whole)
        if self.line is not None and size >= defaults.LINE_BULK:
            self.line.down.note(now, now, size)

    @property
    def held(self) -> int:
        """Bytes that this node holds for it: unread, received out of order, sent and not acknowledged."""
        mux = self._mux  # it counts what the peer may still send, and what was read and not granted anew
        unread = sum(mux.limits.link_window) - sum(mux._allowance) - sum(mux._unacknowledged)
        return unread + self._session.held

    def watch(self, note: Callable[[int], None]) -> None:
        """Have ``note`` told of the bytes of every record, in and out. It must not wait."""
        self._session.note = note

    @property
    def idle(self) -> bool:
        """True when no stream is open and no call waits for its answer."""
        mux = self._mux
        return not mux.calls.open and not mux.streams

    @property
    def streams(self) -> int:
        return self._mux.streams

    _host: Host

    def _look_now(self) -> None:
        """Have signs of life judged again at once."""
        raise NotImplementedError

    @property
    def pipes(self) -> tuple[Pipe, ...]:
        """The pipes it has, the best one first."""
        return tuple(sorted(self._pipes.all, key=lambda pipe: (pipe is not self._pipes.best, pipe.index)))

    def takes_pipe(self, *, bulk_only: bool) -> bool:
        """Whether there is room for another one."""
        return self._pipes.takes(bulk_only=bulk_only)

    @property
    def bulk_pipes(self) -> list[Pipe]:
        """Those that were opened for bulk and can take some, oldest first."""
        return [pipe for pipe in self._pipes.all if pipe.bulk_only and pipe.usable]

    def probe(self) -> None:
        """Ask every pipe for a sign of life now: something about the network has changed."""
        for pipe in self._pipes.all:
            pipe.ping(self._host.now())
        self._look_now()

    def narrow(self, count: int = 0) -> None:
        """Give back all pipes for bulk but ``count``."""
        for pipe in self.bulk_pipes[count:]:
            pipe.retire()

    @property
    def best(self) -> Pipe:
        """The pipe that carries control; of an interrupted link, the last that did."""
        return self._pipes.best

    @property
    def way(self) -> str:
        """How the best pipe came about: one of :data:`pipehello.WAYS`."""
        return self._pipes.best.way

    @property
    def remote(self) -> Address:
        return self._pipes.best.remote

    @property
    def rtt(self) -> float:
        """Smoothed round trip of the best pipe, seconds."""
        return self._pipes.best.rtt

    @property
    def nearest(self) -> float:
        """The shortest round trip of the best pipe, seconds: what it takes when nothing is in the way."""
        return self._pipes.best.nearest

    @property
    def bandwidth(self) -> float | None:
        """Bytes per second, smoothed, at which the network took bulk; None: not measured yet."""
        return self._pipes.bandwidth

    @property
    def bytes_sent(self) -> int:
        return self._pipes.bytes_sent

    @property
    def bytes_received(self) -> int:
        return self._pipes.bytes_received
