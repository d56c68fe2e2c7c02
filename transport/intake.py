"""The side of a link that takes records in: what has come on a pipe, in turns of many records where its stream can.

Of plain bulk the native helper (:mod:`pump`) receives whole runs of records straight to where their reader wants the
data; the layers above are told the sum. Everything else goes through them record by record.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import defaults, pool, pump
from .callmux import CallEvent
from .errors import LinkClosed, RecordError, RemoteError, RemoteProtocolError
from .frames import Event, Priority
from .records import Record
from .session import PIPE

if TYPE_CHECKING:
    from .frames import MuxStream
    from .host import Host
    from .identity import PeerId
    from .mux import Mux
    from .pipe import Pipe
    from .pipeset import PipeSet
    from .records import RecordOpener
    from .secure import Established
    from .session import Session


class TakesRecords:
    """A link, to those who send to it."""

    #: Turns that ended early in a row because nobody waited for bulk.
    _unready = 0
    peer: PeerId
    _host: Host
    _mux: Mux
    _pipes: PipeSet
    _session: Session

    @abstractmethod
    def _changed(self) -> None: ...

    @abstractmethod
    def _end(self, reason: LinkClosed | RemoteError) -> None: ...

    @abstractmethod
    def _handle(self, event: Event | CallEvent) -> None: ...

    @abstractmethod
    def _note_heard(self, pipe: Pipe, size: int, now: float, *, whole: bool) -> None: ...

    @abstractmethod
    def _answered(self, pipe: Pipe) -> None: ...

    async def _read(self, pipe: Pipe) -> None:
        """Take in what comes on ``pipe`` until it has ended."""
        self._take(pipe, pipe.records)
        pipe.records.clear()
        try:
            while await self._receive(pipe):
                pass
        except RecordError as error:
            raise RecordError(error.message, peer=self.peer.short) from None
        if pipe.peer_retired:
            return  # it stays until we have retired too
        if not self._mux.goodbye_sent:
            try:
                pipe.channel.eof()
            except RecordError as cut:
                # Where a line ends is up to anybody on the way, and to a kernel that closes the connections of a
                # killed process: no fault of the peer's, and what was cut is sent again on another pipe.
                raise LinkClosed(cut.message, peer=self.peer.short) from None
        raise LinkClosed("the connection ended without a goodbye", peer=self.peer.short)

    async def _receive(self, pipe: Pipe) -> int:
        """Wait for bytes and take in what they bring; how many there were, 0 at their end."""
        channel, stream = pipe.channel, pipe.stream
        while stream.run:
            await stream.wait_receivable()
            came = self._receive_run(pipe)
            if came is not None:
                return came
        opener = channel.opener
        room = None if opener is None else opener.room()
        if opener is None or room is None:
            data = await stream.receive_some(defaults.READ_SIZE)
            if data and not self._mux.goodbye_sent:
                self._came(pipe, len(data), channel.receive(data))
            return len(data)
        size = await stream.receive_into(room)
        if size and not self._mux.goodbye_sent:
            self._came(pipe, size, opener.fill(size))
        return size

    def _receive_run(self, pipe: Pipe) -> int | None:
        """:meth:`_receive` of what is there; None: nothing is, or not any more."""
        channel, stream = pipe.channel, pipe.stream
        inbox = self._session.into[Priority.BULK]
        total, expected = 0, inbox.expected
        while total < stream.run:
            if inbox.expected != expected:
                if self._mux.lane() is not None:
                    self._unready = 0
                elif self._unready < defaults.READER_TURNS:
                    # Whom this is for may want what comes next in a place of its own, once it has had a turn or two.
                    self._unready += 1
                    break
                expected = inbox.expected
            opener = channel.opener
            size: int | None
            if self._mux.goodbye_sent:
                size = stream.receive_now(pool.scratch())  # nobody looks at it
            elif opener is not None and opener.at_lane and (found := self._lane()) is not None:
                size = self._land(pipe, opener, *found, stream.run - total)
                if size and 2 * size > stream.run:
                    return total + size  # not once more for the little that is left of this turn
            elif opener is None or (room := opener.room()) is None:
                if size := stream.receive_now(scratch := pool.scratch()):
                    self._came(pipe, size, (channel.receive if opener is None else opener.feed)(scratch[:size]))
            elif size := stream.receive_now(room):
                self._came(pipe, size, opener.fill(size))
            if size is None:
                break
            total += size
            if not size:
                return total
        return total or None

    def _lane(self) -> tuple[MuxStream, pump.Lane] | None:
        """What the native helper may take in, if there is one, and whose it is."""
        inbox = self._session.into[Priority.BULK]
        if pump.active is None or inbox.held:
            return None
        found = self._mux.lane()
        if found is None:
            return None
        stream, sink = found
        return stream, pump.Lane(inbox.expected, stream.id, sink)

    def _land(self, pipe: Pipe, opener: RecordOpener, stream: MuxStream, lane: pump.Lane, most: int) -> int | None:
        """As :meth:`_receive_run`, of what belongs to ``lane``, and a record more."""
        run, records = pipe.stream.land(opener, lane, most)
        if run.came:
            self._note_heard(pipe, run.came, self._host.now(), whole=bool(run.records or records))
        if run.records:
            try:
                self._session.landed(run)
                for event in self._mux.landed(stream, run.size, run.credits):
                    self._handle(event)
            except RemoteProtocolError as error:
                self._end(type(error)(error.message, peer=self.peer.short))
            self._heard(pipe)
        self._take(pipe, records)
        if run.records and not records:
            self._changed()
        if run.error:
            pipe.stream.failed(run.error)
        return None if not run.came and run.drained else run.came

    def _came(self, pipe: Pipe, size: int, events: Sequence[Established | Record]) -> None:
        self._note_heard(pipe, size, self._host.now(), whole=bool(events))
        self._answered(pipe)
        self._take(pipe, [event for event in events if isinstance(event, Record)])

    def _take(self, pipe: Pipe, records: Sequence[Record]) -> None:
        for record in records:
            self._record(pipe, record)
        if records:
            self._changed()

    def _record(self, pipe: Pipe, record: Record) -> None:
        """What an authenticated record says; nonsense in it is the peer's fault and ends the link."""
        retired_before = pipe.peer_retired
        try:
            kind, payloads = self._session.receive(record)
            for payload in payloads:
                if kind == PIPE:
                    pipe.receive_frames(payload.whole(), self._host.now())
                    continue
                for event in self._mux.receive(payload, Priority(kind)):
                    self._handle(event)
        except LinkClosed as goodbye:
            self._end(goodbye)
        except RecordError as error:
            # Of a body, whose head has been counted already: what it held would be missing among all that follows.
            self._end(RecordError(error.message, peer=self.peer.short))
            raise
        except RemoteProtocolError as error:
            self._end(type(error)(error.message, peer=self.peer.short))
        if pipe.peer_retired is not retired_before:
            self._pipes.heard_on(pipe, self._host.now())
        else:
            self._heard(pipe)

    def _heard(self, pipe: Pipe) -> None:
        """A record came on ``pipe``."""
        if not pipe.confirmed or pipe.suspect:
            self._pipes.heard_on(pipe, self._host.now())
