"""The side of a link that sends records: what goes out on a pipe next, in turns of many records where its stream can.

Plain bulk goes out in runs that the native helper (:mod:`pump`) makes, seals and sends. Everything else, and all of it
where there is no helper, is composed record by record.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import trio

from . import defaults, pump
from .frames import Buffer, Priority
from .network import remaining
from .session import HEAD_BYTES

if TYPE_CHECKING:
    from .host import Host
    from .mux import Mux
    from .pipe import Pipe
    from .pipeset import PipeSet
    from .session import Session
    from .width import Width


class SendsRecords:
    """A link, to those who receive from it."""

    on_width: Callable[[], None] | None
    paths: Callable[[], int]
    width: Width
    _host: Host
    _mux: Mux
    _pipes: PipeSet
    _session: Session

    @property
    @abstractmethod
    def bulk_pipes(self) -> list[Pipe]: ...

    @abstractmethod
    def _sent(self, pipe: Pipe, size: int, seconds: float, now: float) -> None: ...

    @abstractmethod
    def _composed(self) -> None: ...

    async def _write(self, pipe: Pipe) -> None:
        host, stream = self._host, pipe.stream
        while True:
            began = host.now()
            wires, size = self._compose_run(pipe)
            if not size:
                if self._mux.goodbye_sent and pipe is self._pipes.best:
                    await stream.send_eof()
                    return  # the reader goes on until the peer has hung up, so that no reset overtakes the goodbye
                if pipe.retiring and not pipe.retired:
                    pipe.retired = True
                    await stream.send_all(self._session.seal(pipe.channel.sealer, pipe.retirement()))
                    await stream.send_eof()
                if pipe.retired and pipe.peer_retired and pipe.scope is not None:
                    pipe.scope.cancel()
                await pipe.work.wait()
                continue
            turned = False
            if wires:
                pipe.writing = True
                turned = await stream.send_run(wires)
                pipe.writing = False
            now = host.now()
            self._sent(pipe, size, now - began, now)
            for other in self._pipes.all:
                if other.refused:  # what was just measured may be in its favour, and nothing else would wake it
                    other.refused = False
                    other.work.wake()
            if pipe.sent_bulk and self.on_width is not None:
                held = turned or self._session.out[Priority.BULK].full
                more, have = held and self._mux.has(Priority.BULK), len(self.bulk_pipes)
                nearest = self._pipes.best.nearest
                if self.width.note(now, size, more=more, rtt=nearest, have=have, paths=self.paths):
                    self.on_width()
            if not self._may_write(pipe):
                await pipe.work.wait()
            elif not turned:
                await trio.lowlevel.checkpoint()

    def _may_write(self, pipe: Pipe) -> bool:
        """False where there is surely nothing that the writer of ``pipe`` could do now."""
        mux, session = self._mux, self._session
        return bool(
            session.owes
            or mux.has(Priority.CONTROL)
            or (mux.has(Priority.BULK) and not session.out[Priority.BULK].full)
            or pipe.has_frames
            or pipe.unsent is not None
            or pipe.retiring
            or pipe.peer_retired
            or mux.goodbye_sent
            or session.must_repeat(Priority.CONTROL)
            or session.must_repeat(Priority.BULK)
        )

    def _compose_run(self, pipe: Pipe) -> tuple[Sequence[Buffer], int]:
        """The next records of ``pipe``, as many as should go out in one turn: what is left to send, and how many bytes
        they are in all."""
        unsent = pipe.take_unsent()
        if unsent is not None:
            return [unsent], len(unsent)
        wires, size = self._launch_bulk(pipe)
        if size or (composed := self._compose(pipe)) is None:
            return wires, size
        size = len(composed)
        if not pipe.sent_bulk or size >= defaults.DIRECT_BODY or not (sent := pipe.stream.send_now(composed)):
            return [composed], size
        if sent < size:
            return remaining([composed], sent), size
        wires, more = self._launch_bulk(pipe)  # which it leads
        return wires, size + more

    def _launch_bulk(self, pipe: Pipe) -> tuple[Sequence[Buffer], int]:
        """A run of records of bulk, where bulk is next and plain: what is left to send, and how many bytes in all."""
        if pump.active is None or not self._only_bulk(pipe) or (most := min(pipe.run, self._allowance(pipe))) <= 0:
            return (), 0
        limit = min(pipe.record_limit, defaults.MAX_RECORD) - HEAD_BYTES
        wires, sent, error = self._session.launch(
            pipe.index, pipe.channel.sealer, partial(self._mux.next_stretch, limit), most, pipe.stream.launch
        )
        if not wires:
            return (), 0
        pipe.sent_bulk = True
        self._wake_drained()
        if error:
            pipe.stream.failed(error)
        return remaining(wires, sent), sum(map(len, wires))

    def _only_bulk(self, pipe: Pipe) -> bool:
        """Whether bulk is next on ``pipe``, where its stream takes many records at once."""
        if not pipe.stream.run or pipe.retired or pipe.has_frames or not self._pipes.carries_bulk(pipe):
            return False
        if pipe is not self._pipes.best:
            return True  # it does not carry control
        return not (self._mux.has(Priority.CONTROL) or self._session.must_repeat(Priority.CONTROL))

    def _allowance(self, pipe: Pipe) -> int:
        """Bytes of new bulk that ``pipe`` may take until it has its share, as measured; one record in any case."""
        outbox = self._session.out[Priority.BULK]
        share = max(pipe.record_limit, int(self._pipes.share(pipe) * outbox.window))
        allowance = share - outbox.kept_on.get(pipe.index, 0)
        pipe.refused = allowance <= 0
        return allowance

    def _compose(self, pipe: Pipe) -> bytearray | memoryview | None:
        """The next record of ``pipe`` for the wire."""
        pipe.sent_bulk = False
        if pipe.retired:
            return None
        if pipe.has_frames:
            return self._session.seal(pipe.channel.sealer, pipe.take_frames())
        control = self._mux.has(Priority.CONTROL) or self._session.must_repeat(Priority.CONTROL)
        if control and pipe is self._pipes.best and pipe.usable:
            wire = self._compose_channel(pipe, Priority.CONTROL)
            if wire is not None:
                return wire
        repeats = self._session.must_repeat(Priority.BULK)
        if self._pipes.carries_bulk(pipe) and (repeats or self._allowance(pipe) > 0):
            wire = self._compose_channel(pipe, Priority.BULK)
            if wire is not None:
                pipe.sent_bulk = True
                return wire
        if pipe is self._pipes.best and self._session.owes:
            return self._session.seal(pipe.channel.sealer, b"")
        return None

    def _compose_channel(self, pipe: Pipe, channel: Priority) -> bytearray | memoryview | None:
        limit = min(pipe.record_limit, defaults.MAX_RECORD) - HEAD_BYTES
        wire = self._session.compose(
            channel, pipe.index, pipe.channel.sealer, lambda: self._mux.next_record(channel, limit)
        )
        self._wake_drained()
        return wire

    def _wake_drained(self) -> None:
        for drained in self._mux.take_drained():
            if drained.owner is not None:
                drained.owner._wake_sender()
        self._composed()
