"""The arguments of `shoal dht …`; :mod:`.dht_commands` runs them. Imports nothing heavy."""

from __future__ import annotations

import argparse
from pathlib import Path

from .cli import _add_data_dir, _add_json, _Formatter, command, positive

EPILOG = """\
examples:
  shoal dht table                                  who this node knows, bucket by bucket
  shoal dht walk --random --paths 3                a lookup on three disjoint paths, query by query
  shoal dht put greeting "hello"                   a record of this node's own; prints how to get it
  shoal dht get owned zm3f…/greeting               from any node of the swarm
  shoal dht providers shoal1aaq…                   who takes part in the run of a ticket

All of them ask the node that runs in the data directory, which may be a relay.

exit codes:
  0    done
  1    it was not found, or the others did not answer
  2    wrong usage or bad input: the message says what to change
"""

GET_EPILOG = """\
KEY is PEER/NAME for a record that a peer published under a name (PEER: 52 letters and digits), or hexadecimal digits.

examples:
  shoal dht get owned zm3f…/greeting
  shoal dht get owned zm3f…/greeting --raw > greeting
  shoal dht get run 5f0c…                          a run's spec, by its hash
"""

PUT_EPILOG = """\
The record is signed with this node's key, in the namespace `owned`: nobody else can replace it. Its sequence number is
one above what the swarm holds. It lives a day, and is published again while this node runs.

examples:
  shoal dht put greeting "hello"
  shoal dht put config @config.json                the content of a file
  date | shoal dht put seen -                      standard input
"""

WALK_EPILOG = """\
WHAT is a peer (52 letters and digits), a ticket (who keeps the providers of its run), PEER/NAME (who keeps that
record), or a place in the key space (64 hexadecimal digits).

examples:
  shoal dht walk --random
  shoal dht walk zm3f… --paths 3
"""


def add_dht(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "dht", help="look inside: the routing table, lookups, records, providers", epilog=EPILOG,
        description="What this node knows of the swarm, and what the swarm keeps.",
        formatter_class=_Formatter, allow_abbrev=False,
    )  # fmt: skip
    inner = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    get = command(inner, "get", "the newest record under a key", ".dht_commands:get", epilog=GET_EPILOG)
    get.add_argument("namespace", metavar="NAMESPACE", help="owned or run")
    get.add_argument("key", metavar="KEY", help="PEER/NAME, or hexadecimal digits")
    get.add_argument("--raw", action="store_true", help="the bytes of the value, and nothing else")

    put = command(inner, "put", "publish a record of this node's own", ".dht_commands:put", epilog=PUT_EPILOG)
    put.add_argument("name", metavar="NAME", help="up to 32 bytes")
    put.add_argument("value", metavar="VALUE", help="the text; @FILE: a file's content; -: standard input")

    find = command(inner, "providers", "who announced a topic", ".dht_commands:providers")
    find.add_argument("topic", metavar="TOPIC", help="a ticket, or hexadecimal digits: a run's id, a blob's hash")
    find.add_argument("--limit", type=positive, default=20, metavar="N", help="how many are told (default: 20)")

    table = command(inner, "table", "the routing table, bucket by bucket, and its health", ".dht_commands:table")

    walk = command(inner, "walk", "a lookup, query by query", ".dht_commands:walk", epilog=WALK_EPILOG)
    walk.add_argument("what", nargs="?", metavar="WHAT", help="a peer, a ticket, PEER/NAME, or 64 hexadecimal digits")
    walk.add_argument("--random", action="store_true", help="a random place")
    walk.add_argument("--paths", type=positive, default=1, metavar="N", help="disjoint paths (default: 1)")

    for one in (get, put, find, table, walk):
        _add_data_dir(one)
        _add_json(one)


#: Where `put` reads from.
STDIN, FILE = "-", "@"


def path_of(value: str) -> Path:
    return Path(value.removeprefix(FILE)).expanduser()
