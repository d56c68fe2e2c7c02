"""Entry of a node in a child process: ``python -m shoal.node.process start …`` is ``shoal start …``."""

from __future__ import annotations

from .cli import leave, main

if __name__ == "__main__":
    leave(main())
