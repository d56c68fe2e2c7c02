"""Runs of large records: sealed, sent and received by a thread in C, without Python between them.

The native helper (``pump.c``, built when there is a compiler) seals a run in one call (:func:`seal`), and has a thread
for each run of trio (:class:`Pump`) that works on sockets. It sends records one after the other, sealing each when its
turn comes, and receives the plain case, whole records of bulk, in order, of one stream whose reader waits for more than
they bring (:class:`Lane`), straight to their place. Everything else that comes it leaves to the layers that know what
it means. Python hears of what came when it is due to be acknowledged, or after :data:`defaults.PUMP_LINGER` seconds: a
turn of the loop costs as much as some hundred KiB.

Without it, with ``SHOAL_PURE=1`` or on Windows records are sealed and opened one by one (:mod:`records`): slower, the
same bytes on the wire.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Sequence
from typing import Any

import attrs
import trio

from . import defaults
from .aead import Aead

log = logging.getLogger(__name__)

#: Revision of the native helper that this module expects.
REVISION = 2
#: Records of one call at most, and bytes of the head of a record that the helper receives.
MOST_JOBS, SPLIT_HEAD = 64, 22

#: Why a run of received records ended: nothing more is there, or enough came, or another record follows; the connection
#: has ended, or failed; a tag is wrong; the head of the next one, which is open now, is another one than expected.
WAIT, ENDED, FAILED, FORGED, HEADED = range(5)

#: The wire, the bytes of the head that stands in it in clear, the body that is sealed behind it.
Job = tuple[memoryview, int, "bytes | bytearray | memoryview"]

#: A record to send: room for it, the length and the head in clear, the body, the first of its two counters. Without
#: room the body is a record that is sealed already.
Item = tuple["memoryview | None", bytes, "bytes | bytearray | memoryview", int]


@attrs.frozen(eq=False)
class Lane:
    """What the next records should be: of bulk, the first with this ``number``, for the ``stream`` whose reader wants
    them in ``sink``, and no more than that."""

    number: int
    stream: int
    sink: memoryview


@attrs.frozen
class Run:
    """What came of a :class:`Lane`: ``records`` whose data fill ``size`` bytes of the sink's beginning, all verified.

    ``came``: bytes received. ``drained``: there were no more; ``ended``: nor will there be. ``control``, ``bulk``: what
    the last head acknowledges. ``error``: of the socket, a number of :mod:`errno`.
    """

    records: int
    size: int
    came: int
    drained: bool
    ended: bool
    control: int
    bulk: int
    error: int


@attrs.frozen
class Which:
    """The implementation in use: ``native``, or not, with the ``reason``."""

    native: bool
    reason: str

    def __str__(self) -> str:
        return "native" if self.native else f"pure Python ({self.reason})"


def load(pure: bool) -> tuple[Any, Which]:
    """The native helper, or None when not asked for or not there, and why."""
    if pure:
        return None, Which(False, "SHOAL_PURE is set")
    try:
        native = importlib.import_module("._pump", __package__)
    except ImportError as error:
        return None, Which(False, f"the native helper is not installed: {error}")
    if native.REVISION != REVISION:
        return None, Which(False, f"the native helper is of revision {native.REVISION}, not {REVISION}")
    return native, Which(True, "")


#: The native helper, or None. Tests and benchmarks replace it.
active, _which = load(os.environ.get("SHOAL_PURE", "0") not in ("", "0"))


def which() -> Which:
    """What was chosen when this module was imported, and why."""
    return _which


def seal(aead: Aead, counter: int, jobs: Sequence[Job]) -> None:
    """Seal split records under one key, each with two counters of its own from ``counter`` on."""
    suite = aead.suite
    if active is not None and len(jobs) > 1:
        active.seal(suite.addresses[0], suite.nonce, suite.counter_at, suite.tag, aead.key, counter, list(jobs))
        return
    for wire, head, body in jobs:
        header, at = bytes(wire[:4]), 4 + head
        aead.seal(wire, 4, at, counter, header)
        aead.seal_from(body, wire, at + suite.tag, counter + 1, header)
        counter += 2


class Transfer:
    """What the thread does for one task, which waits for it."""

    def __init__(self) -> None:
        self._job: Any = None
        self._task: trio.lowlevel.Task | None = None
        self._over = False

    def begun(self, job: Any) -> Transfer:
        """``job`` is what the thread does, unless all of it was done at once."""
        self._job, self._over = job, job.over
        return self

    @property
    def over(self) -> bool:
        """True when the thread has nothing to do with it any more."""
        return self._over

    async def wait(self) -> None:
        """Wait until it is over. Cancelled, it is over when this raises; what came of it stays to be asked for."""

        def abort(_: object) -> trio.lowlevel.Abort:
            self._task = None
            self.recall()
            return trio.lowlevel.Abort.SUCCEEDED

        if self._over:
            await trio.lowlevel.checkpoint()
            return
        self._task = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(abort)

    def recall(self) -> None:
        """Take it back from the thread, as far as it has come, and wake who waits for it. Blocks for the thread's work
        on one record at most."""
        if not self._over:
            self._job.stop()
            self.finished()

    def finished(self) -> None:
        """The thread is done with it: called once by the :class:`Pump`."""
        if self._over:
            return
        self._over = True
        if self._task is not None:
            task, self._task = self._task, None
            trio.lowlevel.reschedule(task)

    def result(self) -> Any:
        """What the job says, once it is :attr:`over`; it lets go of all memory."""
        job, self._job = self._job, None
        return job.result()


class Pump:
    """The thread of one run of trio. Everything is called from there."""

    def __init__(self, native: Any) -> None:
        self._native = native

    def send(self, descriptor: int, aead: Aead, items: list[Item], size: int) -> Transfer:
        """Send records of ``size`` bytes on a socket. The result: records that are gone, bytes of the next one that
        are, an errno or 0."""
        suite, transfer = aead.suite, Transfer()
        job = self._native.send(
            transfer, size <= defaults.PUMP_AT_ONCE, descriptor, suite.addresses[0], suite.nonce, suite.counter_at,
            suite.tag, aead.key, items,
        )  # fmt: skip
        return transfer.begun(job)

    def receive(
        self, descriptor: int, aead: Aead, counter: int, buffer: object, word: int, filled: int, largest: int,
        lane: Lane, most: int,
    ) -> Transfer:  # fmt: skip
        """Receive records on a socket. Of the first ``buffer`` holds ``filled`` bytes, and ``word`` is its length; of
        -1 bytes not even that is there. ``most``: records. The result is that of ``receive`` in ``pump.c``, for
        :meth:`RecordOpener.landed`."""
        suite, transfer = aead.suite, Transfer()
        job = self._native.receive(
            transfer, len(lane.sink) <= defaults.PUMP_AT_ONCE, descriptor, suite.addresses[1], suite.nonce,
            suite.counter_at, suite.tag, aead.key, counter, buffer, word, filled, defaults.DIRECT_RECORD, largest,
            lane.number, lane.stream, lane.sink, most, defaults.ACKNOWLEDGE_BYTES, defaults.PUMP_LINGER,
        )  # fmt: skip
        return transfer.begun(job)

    async def serve(self) -> None:
        """Hand over what is done, until cancelled; then the thread ends."""
        native = self._native
        try:
            while True:
                await trio.lowlevel.wait_readable(native.bell)
                for transfer in native.finished():
                    transfer.finished()
        finally:
            native.close()


_current: trio.lowlevel.RunVar[Pump | None] = trio.lowlevel.RunVar("shoal pump")


def current() -> Pump | None:
    """The pump of this run of trio, which begins with its first use and ends with the run; None without a helper."""
    if active is None:
        return None
    try:
        return _current.get()
    except LookupError:
        pass
    pump = None
    try:
        pump = Pump(active.Pump())
    except OSError as error:
        log.warning("records are moved by Python, which is slower: no thread for them can be had: %s", error.strerror)
    else:
        trio.lowlevel.spawn_system_task(pump.serve, name="shoal pump")
    _current.set(pump)
    return pump
