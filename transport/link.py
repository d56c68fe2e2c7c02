"""One live link to one peer: a session of many streams over one or more pipes, which outlives each of them.

A pipe is a byte stream with keys of its own (:mod:`pipe`). The link sends control on the best pipe, bulk on the pipes
opened for it, or on the best one when there are none. When a pipe dies, what was not acknowledged goes out again on
another one (:mod:`session`); the streams notice nothing. A link without a pipe is *interrupted*: somebody (through
``on_trouble``, the connector) has :func:`deadlines.resume` seconds to attach another; then it ends, with the reason for
which the last pipe was lost. Without that somebody it ends at once.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import trio
from trio.lowlevel import ParkingLot

from . import deadlines, defaults
from .callmux import CallEvent
from .errors import LinkClosed, RecordError, RemoteError, RemoteProtocolError
from .frames import (
    DataReceived,
    Event,
    GoodbyeCode,
    GoodbyeReceived,
    MuxLimits,
    Priority,
    ResetCode,
    StreamOpened,
    StreamStopped,
    StreamWasReset,
)
from .intake import TakesRecords
from .linkcalls import CarriesCalls
from .linkstreams import OpensStreams
from .mux import Mux
from .output import SendsRecords
from .pipe import Pipe
from .pipehello import TOO_MANY, PipeRefused, SessionSecrets
from .pipeset import PipeSet, SeenThroughPipes
from .secure import SecureChannel
from .session import Session
from .stream import LinkStream, StreamLost, link_lost
from .width import Width
from .wire import printable

if TYPE_CHECKING:
    from .address import Address
    from .deadlines import LoopLag
    from .host import Host
    from .identity import PeerId

__all__ = ["Link", "LinkStream", "Priority", "StreamLost"]

log = logging.getLogger(__name__)


class Link(SeenThroughPipes, TakesRecords, SendsRecords, CarriesCalls, OpensStreams):
    """An authenticated, encrypted connection to ``peer`` that carries many streams.

    Run by :meth:`run`, in a nursery of the endpoint. ``closed`` is set when everything about it has ended;
    ``close_reason`` then says why.
    """

    def __init__(
        self, host: Host, channel: SecureChannel, pipe: Pipe, lag: LoopLag, *, limits: MuxLimits | None = None
    ) -> None:
        super().__init__()
        self.peer: PeerId = channel.peer
        self.initiator: bool = channel.initiator
        self.cipher: str = channel.cipher
        self.exporter: bytes = channel.exporter
        #: What further pipes derive their keys from.
        self.secrets = SessionSecrets(channel.exporter, channel.cipher, initiator=channel.initiator)
        self.opened_at = self.last_used = host.now()
        self.closed = trio.Event()
        self.close_reason: LinkClosed | RemoteError | None = None
        #: The code of the peer's goodbye.
        self.goodbye_code: int | None = None
        #: True when we closed the link because it was idle.
        self.closed_idle = False
        #: The address under which the peer sees us, once it has said so.
        self.observed: Address | None = None
        #: Takes streams that the peer opens. Must not wait.
        self.on_stream: Callable[[LinkStream], None] | None = None
        #: Called each time the link has been idle for a keepalive interval. Must not wait.
        self.on_idle: Callable[[], None] = lambda: None
        #: Called when :attr:`troubled` becomes true. Must not wait.
        self.on_trouble: Callable[[], None] | None = None
        #: Called when the best pipe has become another one, or one has gone. Must not wait.
        self.on_pipes: Callable[[], None] | None = None
        #: Called when :attr:`width` wants another number of pipes for bulk. Must not wait.
        self.on_width: Callable[[], None] | None = None
        #: How many paths seem to lead to the peer. Asked rarely.
        self.paths: Callable[[], int] = lambda: 1
        self.width = Width()
        #: Pipes lost so far, those that were retired for better ones not counted.
        self.pipes_lost = 0
        self._host = host
        self._lag = lag
        self._mux = Mux(initiator=channel.initiator, limits=limits, peer=self.peer.short)
        self._pipes = PipeSet(pipe, self.peer.short, self._pipes_changed)
        self._session = Session(self._mux.limits.link_window)
        self._slots = ParkingLot()
        self._nursery: trio.Nursery | None = None
        self._watching: trio.CancelScope | None = None
        #: When to look again, but for an answer that we wait for since we looked last.
        self._due = math.inf
        self._interrupted: float | None = None
        self._parting = ""  # what we said in our goodbye

    def __repr__(self) -> str:
        state = "closed" if self.close_reason is not None else "interrupted" if self.interrupted else "live"
        return f"<Link to {self.peer.short} at {self.remote} {state}>"

    # What is known of it

    @property
    def alive(self) -> bool:
        """True while streams can be opened."""
        return self.close_reason is None and not self._mux.goodbye_sent

    @property
    def interrupted(self) -> bool:
        """True while it has no pipe and waits for one."""
        return self._interrupted is not None and self.close_reason is None

    @property
    def troubled(self) -> bool:
        """True while it has no pipe, or none that answers in time."""
        return self.alive and (self.interrupted or self._pipes.best.suspect)

    @property
    def lag(self) -> float:
        """Our loop's lag in seconds, for deadlines."""
        return self._lag.value(self._host.now())

    async def aclose(self, reason: str = "goodbye", code: int = GoodbyeCode.LEAVING) -> None:
        """Say goodbye (best effort, at most :func:`deadlines.goodbye` seconds), then close.

        Cancellation skips what is left of the goodbye; the link closes all the same.
        """
        try:
            self.say_goodbye(reason, code)
            with trio.move_on_after(deadlines.goodbye()):
                await self.closed.wait()
        finally:
            self._end(LinkClosed(f"closed by us: {reason}", peer=self.peer.short))
            with trio.CancelScope(shield=True):
                await self.closed.wait()

    def say_goodbye(self, reason: str, code: int = GoodbyeCode.LEAVING) -> None:
        """Begin to close, without waiting: from here on no stream opens and nothing that comes in is looked at."""
        if self.alive:
            self._parting = reason
            self.closed_idle = code == GoodbyeCode.IDLE
            self._mux.goodbye(code, reason)
            self._break_streams(LinkClosed(f"closed by us: {reason}", peer=self.peer.short))
            if self.interrupted:
                self._end(LinkClosed(f"closed by us: {reason}", peer=self.peer.short))
            self._pipes.best.work.wake()

    def _as_link(self) -> Link:
        return self

    # Pipes

    def attach(self, pipe: Pipe) -> None:
        """Take another pipe, opened by either side. It carries something once it has proved itself.

        Raises :class:`LinkClosed`, :class:`PipeRefused` when it has as many as it may have.
        """
        if not self.alive:
            raise self._closed_error()
        if not self._pipes.takes(bulk_only=pipe.bulk_only):
            raise PipeRefused("it has as many pipes as it may have", code=TOO_MANY, peer=self.peer.short)
        self._pipes.all.append(pipe)
        pipe.ping(self._host.now())
        if self._nursery is not None:
            self._nursery.start_soon(self._run_pipe, pipe)
        self._look_now()

    def give_up(self, reason: RemoteError) -> None:
        """End an interrupted link before its time: there is nobody any more."""
        if self.interrupted:
            self._end(reason)

    def _pipes_changed(self) -> None:
        self._interrupted = None
        self._look_now()
        for pipe in self._pipes.all:
            if pipe.suspect and pipe is not self._pipes.best:
                self._session.lost(pipe.index)  # it may never arrive; if it does, once is enough for the receiver
        if self.on_pipes is not None:
            self.on_pipes()

    def _pipe_ended(self, pipe: Pipe) -> None:
        self._pipes.remove(pipe)
        self._session.lost(pipe.index)
        if self.close_reason is not None or (pipe.reason is None and not pipe.retired):
            return
        reason = pipe.reason or LinkClosed("its last pipe was retired", peer=self.peer.short)
        if pipe.reason is not None:
            self.pipes_lost += 1
        if self._mux.goodbye_sent:
            self._end(LinkClosed(f"closed by us: {self._parting}", peer=self.peer.short))
        elif self._pipes.elect():
            log.info("a pipe of the link to %s is gone: %s", self.peer.short, reason)
            if self.troubled and self.on_trouble is not None:
                self.on_trouble()
        elif isinstance(reason, RecordError) or self.on_trouble is None:
            self._end(reason)
        elif self._interrupted is None:
            log.info("the link to %s is interrupted: %s", self.peer.short, reason)
            self._interrupted = self._host.now()
            self._pipes.best = pipe
            self._look_now()
            self.on_trouble()

    # Life

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve the link until it ends, for whatever reason. A peer's fault is no exception here: it is recorded."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                if self.close_reason is not None:
                    nursery.cancel_scope.cancel()
                task_status.started()
                for pipe in self._pipes.all:
                    nursery.start_soon(self._run_pipe, pipe)
                try:
                    await self._watch()
                finally:
                    self._ended()  # while the nursery is still open: who has a pipe for us must not find it closed
        finally:
            self._ended()
            assert self.close_reason is not None
            self._break_streams(self.close_reason)
            self._slots.unpark_all()
            self.closed.set()

    async def _run_pipe(self, pipe: Pipe) -> None:
        try:
            async with trio.open_nursery() as nursery:
                pipe.scope = nursery.cancel_scope
                if pipe.reason is not None:
                    nursery.cancel_scope.cancel()
                nursery.start_soon(self._guard, pipe, self._write)
                await self._guard(pipe, self._read)
        finally:
            self._pipe_ended(pipe)
            pipe.records.clear()
            with trio.CancelScope(shield=True):
                await self._say_why(pipe)
                await trio.aclose_forcefully(pipe.stream)

    async def _guard(self, pipe: Pipe, task: Callable[[Pipe], Awaitable[None]]) -> None:
        try:
            await task(pipe)
        except RemoteError as error:
            pipe.fail(error)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pipe.fail(LinkClosed("the connection broke without a goodbye", peer=self.peer.short))

    def _ended(self) -> None:
        self._nursery = None
        self.close_reason = self.close_reason or LinkClosed("closed by us", peer=self.peer.short)

    def _end(self, reason: LinkClosed | RemoteError) -> None:
        self.close_reason = self.close_reason or reason
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()

    async def _say_why(self, pipe: Pipe) -> None:
        """Tell a peer that broke the protocol what it did: the other side's log is where somebody will look."""
        reason = self.close_reason
        if not isinstance(reason, RemoteProtocolError) or pipe.writing or pipe is not self._pipes.best:
            return
        self._mux.goodbye(GoodbyeCode.PROTOCOL_ERROR, reason.message)
        with trio.move_on_after(deadlines.goodbye()):
            try:
                wire = self._compose_channel(pipe, Priority.CONTROL)
                if wire is not None:
                    await pipe.stream.send_all(wire)
            except (trio.BrokenResourceError, trio.ClosedResourceError, RemoteProtocolError):
                pass

    def _sent(self, pipe: Pipe, size: int, seconds: float, now: float) -> None:
        if pipe.unheard_since is None and self._watching is not None and not self.idle:
            due = now + deadlines.probe(pipe.rtt, self._lag.value(now))
            if due < self._watching.deadline:
                self._watching.deadline = due
        self._note_sent(pipe, size, seconds, now)
        if pipe.sent_bulk:
            links = 1 if self.line is None else self.line.up.peers
            self._session.bound_bulk(deadlines.under_way(self._pipes.bandwidth, pipe.nearest, links))

    def _composed(self) -> None:
        self._slots_changed()
        self._calls_sent()

    # Signs of life

    async def _watch(self) -> None:
        while True:
            now = self._host.now()
            lag = self._lag.value(now)
            due, before = math.inf, self._pipes.best.suspect
            for pipe in list(self._pipes.all):
                due = min(due, self._pipes.look_after(pipe, now, lag, busy=not self.idle, on_idle=self.on_idle))
            if self.troubled and not before and not self.interrupted and self.on_trouble is not None:
                self.on_trouble()
            if self._interrupted is not None:
                give_up = self._interrupted + deadlines.resume(self._pipes.best.rtt, lag)
                if now >= give_up:
                    self._end(self._pipes.best.reason or LinkClosed("no pipe is left", peer=self.peer.short))
                due = min(due, give_up)
            self._due = due
            with trio.CancelScope(deadline=due) as self._watching:
                await trio.sleep_forever()
            now = self._host.now()
            self._lag.note(now - due, now)
            if now - due >= defaults.LAG_TOLERANCE:
                # We were suspended, or starved: that says nothing about the peer. It gets another go.
                for pipe in self._pipes.all:
                    pipe.asked = None if pipe.asked is None else now
                self._interrupted = None if self._interrupted is None else now

    def _answered(self, pipe: Pipe) -> None:
        """What was sent on ``pipe`` need not be looked after any more: most answers come long before it would be."""
        watching = self._watching
        if watching is None or pipe.unheard_since is not None or pipe.asked is not None or len(self._pipes.all) > 1:
            return
        if -math.inf < watching.deadline < self._due:
            watching.deadline = self._due

    def _look_now(self) -> None:
        if self._watching is not None:
            self._watching.deadline = -math.inf

    # Between the mux and its streams

    def _handle(self, event: Event | CallEvent) -> None:
        match event:
            case DataReceived(stream):
                if stream.owner is not None:
                    stream.owner._wake_receiver()
            case StreamOpened(stream):
                self.last_used = self._host.now()
                if self.on_stream is None:
                    self._mux.reset(stream, ResetCode.UNKNOWN_PROTOCOL)
                else:
                    self.on_stream(LinkStream(self, self._mux, stream))
            case StreamStopped(stream):
                if stream.owner is not None:
                    stream.owner._wake_sender()
            case StreamWasReset(stream):
                if stream.owner is not None:
                    stream.owner._broken()
            case GoodbyeReceived(code, reason):
                self.goodbye_code = code
                what = f"it said goodbye: {printable(reason)}" if reason else "it said goodbye"
                raise LinkClosed(what, peer=self.peer.short, goodbye=True)
            case _:
                self._on_call_event(event)

    def _changed(self) -> None:
        """Something happened in the mux: there may be a record to write, or a slot for a stream."""
        best = self._pipes.best
        if best.work and (self._mux.has_output or best.has_frames or self._session.owes):
            best.work.wake()
        if len(self._pipes.all) > 1:
            for pipe in self._pipes.all:
                pipe.work.wake()
        if self._slots:
            self._slots_changed()

    def _break_streams(self, reason: RemoteError) -> None:
        for stream in self._mux.live_streams():
            if stream.owner is not None:
                stream.owner._link_lost(reason)
        self._break_calls(reason)

    def _closed_error(self) -> StreamLost:
        reason = self.close_reason
        if reason is None:
            return StreamLost("the link is being closed by us", peer=self.peer.short)
        return link_lost(reason, self.peer)
