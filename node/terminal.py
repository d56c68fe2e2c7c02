"""Plain lines out to a terminal or log file, one line in, and the log."""

from __future__ import annotations

import logging
import os
import sys
from typing import TextIO


class Lines:
    """Writes lines to ``out`` as long as somebody reads them."""

    def __init__(self, out: TextIO) -> None:
        self._out: TextIO | None = out

    def line(self, text: str) -> None:
        if self._out is None:
            return
        try:
            self._out.write(text + "\n")
            self._out.flush()
        except (BrokenPipeError, ValueError):
            # Whoever read our output is gone; the node goes on, and nobody is told any more.
            self._out = None

    def flush(self) -> None:
        if self._out is not None:
            self._out.flush()


def read_line() -> str:
    """One line from standard input, unbuffered: what follows it belongs to others."""
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(0, 1)):
        line += byte
    return line.decode("utf-8", "replace")


def configure_logging(level: str) -> None:
    """The log goes to standard error."""
    logging.basicConfig(
        level=level.upper(), format="%(asctime)s %(levelname)-7s %(name)s: %(message)s", stream=sys.stderr, force=True
    )
