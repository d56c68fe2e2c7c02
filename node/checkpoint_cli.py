"""The arguments of `shoal checkpoint`. Imports nothing heavy."""

from __future__ import annotations

import argparse
from pathlib import Path

from .cli import _add_data_dir, _add_json, _Formatter, command

DESCRIPTION = """\
A node keeps the state after every 10th round (every 20th, 40th … where that takes less than 30 s; and after 5 minutes
in any case) in its data directory: the last 3, and those that are pinned, for ever. `shoal start --checkpoint-every N`
sets another number. REF is a round, or the beginning of a digest (6 digits or more).
"""

EPILOG = """\
examples:
  shoal checkpoint list                            what is kept here
  shoal checkpoint pin 280                         keep the state after round 280 for ever
  shoal checkpoint restore 280                     write it as a model file, ./checkpoint-280.safetensors
  shoal checkpoint restore 5f0c…  old.safetensors  by its whole digest: while the node runs, others that have it help

To go on from an earlier round, found another run with that state; its members join with the new ticket:
  shoal start TASK --from checkpoint-280.safetensors --data-dir NEW
A run itself never goes back: what its members have signed as round 281 stays round 281.
"""


def add_checkpoint(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "checkpoint",
        help="states of past rounds: list them, write one to a file, keep one for ever",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    listing = command(actions, "list", "the checkpoints on this machine", ".checkpoint_commands:list_command")
    _add_json(listing)
    restore = command(
        actions, "restore", "write a checkpoint as a safetensors file, to be used or to begin a run with",
        ".checkpoint_commands:restore",
    )  # fmt: skip
    pin = command(actions, "pin", "keep a checkpoint for ever", ".checkpoint_commands:pin")
    unpin = command(actions, "unpin", "let a checkpoint go when it is its turn", ".checkpoint_commands:unpin")
    for action in (restore, pin, unpin):
        action.add_argument("ref", metavar="REF", help="a round, or the beginning of a digest")
    restore.add_argument(
        "file", metavar="FILE", nargs="?", type=Path, help="replaced if it exists (default: checkpoint-REF.safetensors)"
    )
    for action in (listing, restore, pin, unpin):
        _add_data_dir(action)
