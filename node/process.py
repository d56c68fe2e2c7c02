"""Entry of a node in a child process: ``python -m shoal.node.process start …`` is ``shoal start …``."""

from __future__ import annotations

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
