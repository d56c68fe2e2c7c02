"""Runs of large records: sealed in one call, and received straight to where their data belong, without Python between.

The native helper (``pump.c``, built when there is a compiler) does it with the GIL released. Without it, with
``SHOAL_PURE=1`` or on Windows records are sealed and opened one by one (:mod:`records`): slower, the same bytes on the
wire. For what it receives the helper takes only the plain case: whole records of bulk, in order, of one stream whose
reader waits for more than they bring (:class:`Lane`). Everything else it leaves to the layers that know what it means.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import Any

import attrs

from .aead import Aead

#: Revision of the native helper that this module expects.
REVISION = 2
#: Records sealed in one call at most; bytes of the head of a record that the helper receives, without credit in it, and
#: how many more each grant of credit takes.
MOST_JOBS, SPLIT_HEAD, FRAME_HEAD = 64, 22, 9

#: Why a run of received records ended: nothing more is there, the connection has ended, or failed; a tag is wrong; the
#: head of the next one, which is open now, is another one than expected; a whole record is the last one; another record
#: begins than the helper takes.
WAIT, ENDED, FAILED, FORGED, HEADED, LANDED, OTHER = range(7)

#: The wire, the bytes of the head that stands in it in clear, the body that is sealed behind it.
Job = tuple[memoryview, int, "bytes | bytearray | memoryview"]


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

    ``credits``: the frames that granted credit in their heads. ``came``: bytes received. ``drained``: there were no more. ``control``, ``bulk``: what the last head acknowledges.
    ``error``: of the socket, a number of :mod:`errno`.
    """

    records: int
    size: int
    came: int
    drained: bool
    control: int
    bulk: int
    error: int
    credits: bytes = b""


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


def seal(aead: Aead, counter: int, jobs: Sequence[Job], descriptor: int = -1) -> tuple[int, int]:
    """Seal split records under one key, each with two counters of its own from ``counter`` on.

    ``descriptor``: of a socket that takes each as soon as it is sealed. Returns how many of their bytes it took (the
    first ones; 0 is always right), and its error, a number of :mod:`errno`, or 0. All are sealed in any case.
    """
    suite = aead.suite
    if active is not None and (len(jobs) > 1 or descriptor >= 0):
        taken: tuple[int, int] = active.seal(
            descriptor, suite.addresses[0], suite.nonce, suite.counter_at, suite.tag, aead.key, counter, list(jobs)
        )
        return taken
    for wire, head, body in jobs:
        header, at = bytes(wire[:4]), 4 + head
        aead.seal(wire, 4, at, counter, header)
        aead.seal_from(body, wire, at + suite.tag, counter + 1, header)
        counter += 2
    return 0, 0
