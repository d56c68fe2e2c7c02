"""Runs of large records: sealed and sent in one call, and received straight to where their data belong, without Python
between.

The native helper (``pump.c``, built when there is a compiler) does it with the GIL released. Without it, with
``SHOAL_PURE=1`` or on Windows records are sealed and opened one by one (:mod:`records`): slower, the same bytes on the
wire. The helper knows only the plain case: data of one stream in records of bulk, in order, with grants of credit
beside them, and where it receives, a reader who waits for more than they bring (:class:`Lane`). Everything else it
leaves to the layers that know what it means.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import attrs

from .aead import Aead

#: Revision of the native helper that this module expects.
REVISION = 2
#: Records of one run at most; bytes of the head of a record in it, without credit, and how many more each grant takes.
MOST_RUN, SPLIT_HEAD, FRAME_HEAD = 64, 22, 9

#: Why a run of received records ended: nothing more is there, the connection has ended, or failed; a tag is wrong; the
#: head of the next one, which is open now, is another one than expected; a whole record is the last one; another record
#: begins than the helper takes.
WAIT, ENDED, FAILED, FORGED, HEADED, LANDED, OTHER = range(7)


@attrs.frozen(eq=False)
class Stretch:
    """Data of the bulk ``stream`` that a run of ``records`` is to carry: ``piece`` bytes in each, but for the first,
    which takes the frames ``credits`` instead of as many of them, and the last, which takes the rest."""

    stream: int
    credits: bytes
    body: memoryview
    piece: int
    records: int


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

    ``credits``: the frames in their heads that grant credit. ``came``: bytes received. ``drained``: there were no more.
    ``control``, ``bulk``: what the last head acknowledges. ``error``: of the socket, a number of :mod:`errno`.
    """

    records: int
    size: int
    came: int
    drained: bool
    control: int
    bulk: int
    error: int
    credits: bytes = b""


#: Of a socket that is known to have nothing.
NOTHING = Run(0, 0, 0, True, 0, 0, 0)


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


def launch(
    aead: Aead, counter: int, descriptor: int, wires: list[memoryview], head: tuple[int, int, int], stretch: Stretch
) -> tuple[int, int]:
    """Make the records of ``stretch``, seal them, each with two counters of its own from ``counter`` on, and send each
    to the socket ``descriptor`` as soon as it is sealed (below 0: nothing is sent). Only where :data:`active`.

    ``wires``: a buffer for each record, large enough. ``head``: the number of the first of them, and what each
    acknowledges of control and of bulk. Returns how many of the first bytes were sent, and the socket's error, a number
    of :mod:`errno`, or 0: all are sealed in any case.
    """
    suite = aead.suite
    taken: tuple[int, int] = active.launch(
        descriptor, suite.addresses[0], suite.nonce, suite.counter_at, suite.tag, aead.key, counter, wires, *head,
        stretch.stream, stretch.credits, stretch.body, stretch.piece,
    )  # fmt: skip
    return taken
