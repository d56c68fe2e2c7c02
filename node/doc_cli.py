"""The arguments of `shoal doc`. Imports nothing heavy."""

from __future__ import annotations

import argparse

from .cli import _add_data_dir, _add_json, _Formatter, command, positive

EPILOG = """\
examples:
  shoal doc show                       the documents of this node's run: authors, envelopes, sizes
  shoal doc show roster                who takes part, who is alive, in which round
  shoal doc show commits --last 50     the last rounds: members, samples, digest
  shoal doc show metrics --json        loss and metric of every member, for programs
  shoal doc watch                      what changes, line by line, until Ctrl-C
  shoal doc watch roster               the table, drawn anew when it changes

The documents of a run: spec, roster, commits, metrics, bans. All members hold them, each member writes its own part,
and what one of them wrote outlives it. While no node runs, `show` reads what the last one left on disk.
"""


def add_doc(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "doc",
        help="what the swarm wrote down: spec, roster, commits, metrics, bans",
        description="What the swarm wrote down about the run.",
        epilog=EPILOG,
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    show = command(actions, "show", "print the documents, or one of them", ".doc_commands:show", epilog=EPILOG)
    watch = command(actions, "watch", "follow changes until Ctrl-C", ".doc_commands:watch", epilog=EPILOG)
    for action in (show, watch):
        action.add_argument(
            "name", nargs="?", metavar="NAME", help="spec, roster, commits, metrics or bans (default: all of them)"
        )
        action.add_argument("--last", type=positive, default=20, metavar="N", help="rounds to show (default 20)")
        _add_data_dir(action)
    _add_json(show)
