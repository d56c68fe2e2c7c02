#!/usr/bin/env python
"""Benchmarks: Shoal beside a peer, measured in turns in the same run on this machine."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

# Children and parent alike: one thread per process, more are slower when processes share the cores.
for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

EPILOG = """\
All processes are fresh ones on this machine; what they say to each other goes through 127.0.0.1. Shoal and its peer
take turns, run by run, so that a busy machine slows both; judge by the ratio of medians. Every result is checked.

examples:
  bench.py allreduce --peers 2,4,8 --mb 4,64
  bench.py allreduce --peers 4 --mb 64 --runs 15 --json rows.json
  bench.py link --mb 256
"""

ALLREDUCE = """\
One round of the group reduce against torch gloo's all_reduce, one fp32 tensor, the mean over all peers.

shoal   the real path: links over TCP with encryption, voters and leader, scatter, combine, gather, fingerprint,
        proposal, signed accepts, commit. Timed from the end of training (the first peer's) to the moment the last
        peer holds the committed result. Votes are kept in memory instead of on disk.
gloo    torch.distributed.all_reduce(SUM): no encryption, no agreement, no fault tolerance.
floor   bytes that have to be moved, sealed, opened, reduced and fingerprinted × ns per byte, measured here in this run,
        ÷ cores that can work at the same time.
"""

LINK = """\
One encrypted link against plain TCP of trio, two processes each.

bulk    calls that upload --mb MiB in bodies of at most 64 MiB, against send_all and receive_some of the same bytes.
calls   one small call after the other and its answer, against an echo of 64 bytes.
"""


def numbers(text: str) -> tuple[int, ...]:
    """Positive whole numbers, separated by commas."""
    values = tuple(int(part) for part in text.split(","))
    if not values or min(values) < 1:
        raise argparse.ArgumentTypeError(f"expected positive numbers with commas between, got {text!r}")
    return values


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench.py", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="BENCHMARK")
    shape = argparse.RawDescriptionHelpFormatter
    one = commands.add_parser(
        "allreduce", help="a round of the group reduce against torch gloo", description=ALLREDUCE, formatter_class=shape
    )
    one.add_argument("--peers", type=numbers, default=(2, 4, 8), metavar="N,…", help="processes (default: 2,4,8)")
    one.add_argument("--mb", type=numbers, default=(4, 64), metavar="N,…", help="MiB of the tensor (default: 4,64)")
    one.add_argument("--warmup", type=int, default=2, metavar="N", help="runs that do not count (default: 2)")
    two = commands.add_parser(
        "link", help="one encrypted link against plain TCP", description=LINK, formatter_class=shape
    )
    two.add_argument("--mb", type=int, default=256, metavar="N", help="MiB per bulk run (default: 256)")
    two.add_argument("--calls", type=int, default=500, metavar="N", help="small calls per run (default: 500)")
    for command in (one, two):
        command.add_argument("--runs", type=int, default=9, metavar="N", help="counted runs per case (default: 9)")
        command.add_argument(
            "--seconds",
            type=float,
            default=None,
            metavar="S",
            help="stop taking runs of a case after its share of S seconds (but take 3)",
        )
        command.add_argument("--json", type=Path, default=None, metavar="FILE", help="write the rows to FILE")
    return parser


def main() -> int:
    if sys.argv[1:2] == ["child"]:
        from benchmarks.children import child_main

        return child_main(sys.argv[2])
    options = arguments().parse_args()
    if options.runs < 1:
        arguments().error("--runs must be at least 1")
    # Imported late, so that --help answers at once.
    import trio
    from benchmarks import allreduce, link
    from benchmarks.processes import ChildFailed

    run = {"allreduce": allreduce.run, "link": link.run}[options.command]
    code = 0
    try:
        trio.run(run, options)
    except* ChildFailed as failures:
        print(f"bench.py: {_first(failures)}", file=sys.stderr)
        code = 1
    except* KeyboardInterrupt:
        print("bench.py: interrupted; all processes are ended", file=sys.stderr)
        code = 130
    return code


def _first(error: BaseException) -> BaseException:
    """The others are of the same making: when one peer ends, all wait in vain."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


if __name__ == "__main__":
    sys.exit(main())
