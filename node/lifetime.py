"""How a node's process ends: signals, a leash, `shoal stop`, and the two seconds that are promised for it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable

import trio

from . import defaults


class Lifetime:
    """``stop`` begins the node's goodbye, ``note`` tells people why, ``flush`` empties what was written for them."""

    def __init__(self, stop: Callable[[], None], note: Callable[[str], None], flush: Callable[[], None]) -> None:
        self._stop, self._note, self._flush = stop, note, flush
        self._interrupts = 0

    async def watch_signals(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Stop at Ctrl-C or SIGTERM; a second Ctrl-C ends the process at once."""
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            task_status.started()
            async for number in signals:
                self._interrupts += 1
                if number == signal.SIGINT and self._interrupts > 1:
                    self._flush()
                    # At once means at once: worker threads cannot be interrupted, and files are written whole.
                    os._exit(130)
                self.begin_stop(signal.Signals(number).name)

    async def hold_leash(self) -> None:
        """Stop when standard input ends: whoever started us is gone."""

        def wait() -> None:
            # Unbuffered: a thread inside a buffered read would hold its lock when the interpreter ends.
            while os.read(0, 4096):
                pass

        await trio.to_thread.run_sync(wait, abandon_on_cancel=True)
        self.begin_stop("standard input closed")

    def begin_stop(self, why: str) -> None:
        """Say goodbye; the process ends within :data:`defaults.SHUTDOWN` seconds, one way or another."""
        self._note(f"{why}: saying goodbye and saving" + (" (again to end at once)" if why == "SIGINT" else ""))
        self._stop()
        limit = threading.Timer(defaults.SHUTDOWN, _too_slow)
        limit.daemon = True
        limit.start()


def _too_slow() -> None:
    sys.stderr.write(
        f"shoal: error: not done {defaults.SHUTDOWN:g} s after it was told to stop; ending without a last save "
        "(the state of an earlier round is on disk)\n"
    )
    sys.stderr.flush()
    os._exit(1)
