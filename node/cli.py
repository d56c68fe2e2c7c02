"""The `shoal` command: arguments and exit codes. Imports nothing heavy; each command imports what it needs."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from ..learning.strategies import names as strategy_names
from ..transport.errors import ConfigError, ShoalError
from .stages_cli import add_stages

#: Exit codes, also in `shoal --help`.
OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130

#: What every complaint begins with.
ERROR = "shoal: error: "

#: A command's arguments after its name, and what runs it: returns the exit code.
AddCommand = Callable[["argparse._SubParsersAction[argparse.ArgumentParser]"], None]

DESCRIPTION = """\
Shoal trains one model on many machines that nobody owns together: no server, no coordinator.
"""

EPILOG = """\
examples:
  shoal sim                              a whole swarm on this machine: 8 processes, real sockets, one is killed
  shoal start digits                     found a run here; prints a ticket and trains until you stop it
  shoal join shoal1aaq…                  join it from another machine, or from another terminal with --data-dir
  shoal start my_task:MyTask             train a model of your own: a subclass of shoal.Task in my_task.py
  shoal relay                            on a machine with a public address: helps the others meet through NAT
  shoal doctor                           why do two machines not connect?
  shoal status                           what the node of this machine is doing, and why
  shoal export model.safetensors         the weights as they are now
  shoal checkpoint list                  the states of past rounds that are kept
  shoal doc show roster                  who takes part and who is alive, as the swarm wrote it down

A node keeps its key and its place in the run in its data directory (--data-dir, $SHOAL_HOME, or
~/.local/share/shoal): start it again after a crash or a reboot and it goes on. Two nodes on one machine need
two data directories.

exit codes:
  0    done: finished, or stopped by Ctrl-C, SIGTERM or `shoal stop` with a goodbye to the others
  1    the run, or a claim that `sim` checks, failed
  2    wrong usage or bad input: the message says what to change
  130  interrupted at once (a second Ctrl-C)
"""

START_EPILOG = """\
examples:
  shoal start digits --rounds 50                  a built-in task, 50 rounds
  shoal start stdlib --strategy noloco            another strategy: see --strategy
  shoal start my_task:MyTask --set inner_steps=50 your own task, an argument of the strategy
  shoal start digits --private                    only who has the ticket gets in: keep it secret
  shoal start digits --from checkpoint-280.safetensors --data-dir new
                                                  a new run that begins with these weights: see `shoal checkpoint`
  shoal start digits --via 203.0.113.5:4001       not reachable from outside? begin with a `shoal relay` that is
  shoal start                                     go on with the run in the data directory

Started in a data directory that already holds a run, it resumes that run, with the same key and ticket.
"""

JOIN_EPILOG = """\
examples:
  shoal join shoal1aaq…                            a run of a built-in task
  shoal join shoal1aaq… --task my_task:MyTask      a run of your own task: the network never names code to import
  shoal join shoal1aaq… --data-dir /tmp/second     a second node on the same machine
  shoal join - < ticket.txt                        the ticket from a file: it does not show in the list of processes
"""

PEERS_EPILOG = """\
columns, besides those of the link:
  ROUND          member: takes part in the present round
  CONTRIBUTED    17/20: of the 20 rounds it was to take part in, 17 hold its contribution
  QUALITY        how far the run's aggregator took its contributions seriously, 0 to 1; only where the aggregator says
                 so (flag, multikrum, …: see docs/aggregation.md)
  AUDITS         of slices that it had combined: 5 ok, 1 lied (proven), 2 unanswered; and false
                 accusations that it made

The last three are this node's own view, kept over restarts; another node has seen other things. "lately" is added when
the last 20 or so rounds were different from all. A column without anything in it is left out. --json has all numbers.
"""

RELAY_EPILOG = """\
examples:
  shoal relay                                      an open relay at port 4001; prints the address to give out
  shoal start digits --via 203.0.113.5:4001        on the machines that train
  shoal relay shoal1aaq…                           for the swarm of one run, also a private one
  shoal relay --private team.key                   for all runs of a private swarm that share this key file

It must be reachable from outside: a public address, or TCP and UDP port 4001 forwarded at the router. It relays with
limits, answers STUN, tells peers whether they can be reached, and keeps addresses; what it carries it cannot read.
"""

DOCTOR_EPILOG = """\
examples:
  shoal doctor                                     this machine and its network
  shoal doctor shoal1aaq…                          and whether the run of a ticket can be reached from here
  shoal doctor 203.0.113.5:4001                    and whether that relay can

Each finding comes with its evidence and with what to do. If a node runs in the data directory, it is asked what it
knows. A peer tells whether it can dial this machine, under what address it sees it, and what its clock says.

exit codes (of the worst finding):
  0    nothing is wrong
  3    warnings: it works, but not as well as it could
  1    something is broken
"""


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=min(112, _terminal_width()))


def _terminal_width() -> int:
    try:
        return os.get_terminal_size().columns
    except OSError:
        return 112


def main(argv: Sequence[str] | None = None, *, extra: Sequence[AddCommand] = ()) -> int:
    """Run one command and return its exit code. ``extra``: commands of the floors above."""
    options = build_parser(extra).parse_args(argv)
    try:
        return int(options.run(options))
    except ConfigError as error:
        complain(str(error))
        return USAGE
    except ShoalError as error:
        complain(f"{type(error).__name__}: {error}")
        return FAILED
    except UnicodeEncodeError as error:
        # Python hands over bytes of the command line that are no text as half characters.
        if not any("\ud800" <= c <= "\udfff" for c in error.object):
            raise
        complain(f"{error.object!r} is not UTF-8 text")
        return USAGE
    except BrokenPipeError:
        # `shoal peers | head`: the reader has seen enough. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except KeyboardInterrupt:
        return INTERRUPTED
    except BaseExceptionGroup as group:
        # Ctrl-C in a command that runs on trio comes wrapped in the groups of its nurseries.
        if group.split(KeyboardInterrupt)[1] is not None:
            raise
        return INTERRUPTED


def leave(code: int) -> NoReturn:
    """End the process with ``code``, at once where torch was loaded.

    By now everything is saved, closed and said. Python would still take torch's modules apart, for one to three
    seconds: longer than a user waits after Ctrl-C.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if "torch" in sys.modules and not sys.gettrace():
        logging.shutdown()
        os._exit(code)
    sys.exit(code)


def complain(message: str) -> None:
    sys.stderr.write(f"{ERROR}{message}\n")


def build_parser(extra: Sequence[AddCommand] = ()) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="shoal", description=DESCRIPTION, epilog=EPILOG, formatter_class=_Formatter, allow_abbrev=False
    )
    parser.add_argument("--version", action=_ShowVersion, nargs=0, help="show the version and exit")
    from .checkpoint_cli import add_checkpoint  # these use what stands here
    from .dht_cli import add_dht
    from .doc_cli import add_doc

    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (
        *extra,
        _add_start,
        _add_join,
        _add_relay,
        _add_doctor,
        _add_status,
        _add_peers,
        _add_stop,
        _add_export,
        add_dht,
        add_checkpoint,
        add_doc,
    ):
        add(commands)
    return parser


class _ShowVersion(argparse.Action):
    """Reads the installed version only when it is asked for: importlib.metadata costs 30 ms."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        parser.exit(0, f"shoal {version('shoal')}\n")


def command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    summary: str,
    target: str,
    *,
    package: str = __package__ or "",
    description: str = "",
    epilog: str = "",
) -> argparse.ArgumentParser:
    """Add a command whose ``target`` (``.module:function``) is imported only when it runs."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=description or summary[0].upper() + summary[1:] + ".",
        epilog=epilog,
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    module, _, function = target.partition(":")

    def run(options: argparse.Namespace) -> int:
        return int(getattr(importlib.import_module(module, package), function)(options))

    parser.set_defaults(run=run)
    return parser


# --- commands ---------------------------------------------------------------------------------------------------------


def _add_start(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = command(
        commands, "start", "found a run (or resume one) on this machine; prints a ticket for others",
        ".launch:start", epilog=START_EPILOG,
    )  # fmt: skip
    parser.add_argument("task", nargs="?", metavar="TASK", help="a built-in task (digits, stdlib) or module:Class")
    run = parser.add_argument_group("the run (fixed once it is founded)")
    run.add_argument("--strategy", metavar="NAME", help=f"diloco (default), or one of {strategy_names()}")
    run.add_argument(
        "--set", metavar="NAME=VALUE", action="append", default=[], dest="strategy_args", type=assignment,
        help="an argument of the strategy, for instance inner_steps=50; may be repeated",
    )  # fmt: skip
    run.add_argument(
        "--mode", choices=("available", "strict"),
        help="available (default): survivors of a split go on as branches; strict: a minority waits",
    )  # fmt: skip
    run.add_argument("--rounds", type=count, metavar="N", help="end after N rounds (default: go on until stopped)")
    run.add_argument(
        "--from", metavar="FILE", dest="origin", type=Path,
        help="begin with the weights of this safetensors file: an export, a checkpoint, or any file with the model's "
        "tensors (default: the task's fresh model)",
    )  # fmt: skip
    run.add_argument("--min-peers", type=positive, metavar="N", help="begin once N peers are there (default 1)")
    run.add_argument("--group", type=count, metavar="N", help="peers in one group reduce (default 0: all of them)")
    run.add_argument(
        "--topology", metavar="NAME",
        help="who meets whom where peers gossip (noloco, gossip): random (default), all, grid, or pairs along the "
        "edges of a ring, full, regular:DEGREE or barabasi-albert:EDGES",
    )  # fmt: skip
    run.add_argument(
        "--codec", metavar="NAME",
        help="how what is exchanged travels: fp32 (default), fp16, bf16, int8 (a quarter of the bytes), e3m0 (an "
        "eighth), topk:SHARE",
    )  # fmt: skip
    run.add_argument(
        "--audit", type=float, metavar="N",
        help="combined slices of others at which each peer looks in a round, in the mean, before the result counts "
        "(default: 1 with any rule but the mean, else 0); see docs/audits.md",
    )  # fmt: skip
    run.add_argument(
        "--admission", type=count, metavar="N",
        help="rounds in which a newcomer's work must be fit before it votes and its work has weight (default: 3 with "
        "any rule but the mean, else 0); see docs/byzantine.md",
    )  # fmt: skip
    run.add_argument(
        "--aggregator", metavar="RULE",
        help="how contributions are combined: mean (default), or a rule that tolerates f liars: descent:f=1+mean, or "
        "for instance multikrum:f=1, trimmed_mean:f=2, nnm+median:f=1, flag; see docs/byzantine.md",
    )  # fmt: skip
    run.add_argument("--seed", type=count, metavar="N", help="seed of the split of the data (default 0)")
    add_stages(run, count, positive)
    run.add_argument(
        "--private", metavar="KEYFILE", nargs="?", const="",
        help="a private swarm: only who has the ticket gets in, or learns who is there. With KEYFILE several runs and "
        "relays share one key (made there if the file does not exist)",
    )  # fmt: skip
    _add_node_options(parser)


def _add_join(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = command(
        commands, "join", "join a run through a ticket: fetch its state, check it, train with it",
        ".launch:join", epilog=JOIN_EPILOG,
    )  # fmt: skip
    parser.add_argument("ticket", metavar="TICKET", help="what `shoal start` printed; - reads it from standard input")
    parser.add_argument("--task", metavar="MODULE:CLASS", help="the run's task where it is not a built-in one")
    _add_node_options(parser)


def _add_node_options(parser: argparse.ArgumentParser) -> None:
    node = parser.add_argument_group("this node")
    _add_data_dir(node)
    _add_listening(node, "the last one used, or any")
    _add_via(node)
    node.add_argument("--device", metavar="DEVICE", default="cpu", help="cpu (default), cuda, cuda:1, mps …")
    node.add_argument(
        "--threads",
        type=positive,
        metavar="N",
        help="CPU threads for training (default: $OMP_NUM_THREADS, or all cores but one)",
    )
    node.add_argument(
        "--train-apart", action="store_true",
        help="train in a process of its own: for models with steps of a few ms, which a busy network would slow down",
    )  # fmt: skip
    node.add_argument(
        "--time-budget", type=_seconds, metavar="SECONDS",
        help="train at most this long per round; the mean is weighted by samples, so slow machines take part",
    )  # fmt: skip
    node.add_argument(
        "--turn", metavar="TURN", default=os.environ.get("SHOAL_TURN", ""),
        help="a TURN server of yours for WebRTC, turn:USER:PASSWORD@HOST:PORT (default: $SHOAL_TURN, which others "
        "on this machine cannot read off the process list)",
    )  # fmt: skip
    node.add_argument("--evaluate-every", type=count, metavar="N", default=1, help="rounds between two evaluations")
    node.add_argument(
        "--checkpoint-every", type=count, metavar="N",
        help="keep the state after every Nth round (default: 10, or so many that it takes 30 s, and after 5 minutes in "
        "any case; 0: never)",
    )  # fmt: skip
    node.add_argument("--export", metavar="FILE", type=Path, help="write the weights to FILE when the node ends")
    _add_log_level(node)
    # For tests and the simulator: announce a phase of a round, then wait there to be killed.
    node.add_argument("--fault", action="append", default=[], help=argparse.SUPPRESS)
    _add_leash(node)


def _add_relay(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = command(
        commands, "relay", "help others meet: run this on a machine that can be reached from outside; needs no torch",
        ".relay:relay", epilog=RELAY_EPILOG,
    )  # fmt: skip
    parser.add_argument(
        "ticket", nargs="?", metavar="TICKET", help="of a run whose swarm to serve (- reads it from standard input)"
    )
    parser.add_argument(
        "--private", metavar="KEYFILE", nargs="?", const="",
        help="serve a private swarm: only who has this key gets in; made if the file does not exist",
    )  # fmt: skip
    _add_data_dir(parser)
    _add_listening(parser, "4001")
    _add_via(parser)
    _add_log_level(parser)
    _add_leash(parser)


def _add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = command(
        commands, "doctor", "why do two machines not connect? looks at this one, its network, and a peer",
        ".doctor:doctor", epilog=DOCTOR_EPILOG,
    )  # fmt: skip
    parser.add_argument(
        "target", nargs="?", metavar="TICKET|ADDRESS", help="the peer to try (- reads it from standard input)"
    )
    _add_data_dir(parser)
    _add_json(parser)
    parser.add_argument("--verbose", action="store_true", help="evidence for every finding")
    parser.add_argument("--no-torch", action="store_true", help="leave torch out, which takes seconds to load")
    parser.add_argument("--no-port-mapping", action="store_true", help="do not ask the router for a port")
    parser.add_argument("--host", metavar="IP", action="append", default=[], help="listen here instead of everywhere")
    _add_log_level(parser)


def _add_via(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--via", metavar="ADDRESS", action="append", default=[],
        help="a relay or other peer to begin with, as `shoal relay` prints it; may be repeated",
    )  # fmt: skip


def _add_log_level(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--log-level", choices=("debug", "info", "warning", "error"), default="warning", help="of the log on stderr"
    )


def _add_leash(parser: argparse._ActionsContainer) -> None:
    # For whoever starts nodes as children: end when standard input closes.
    parser.add_argument("--leash", action="store_true", help=argparse.SUPPRESS)


def _add_listening(parser: argparse._ActionsContainer, port: str) -> None:
    parser.add_argument(
        "--host", metavar="IP", action="append", default=[],
        help="address to listen on (default: every interface, IPv4 and IPv6); may be repeated",
    )  # fmt: skip
    parser.add_argument("--port", type=_port, metavar="N", help=f"port to listen on (default: {port})")
    parser.add_argument(
        "--no-port-mapping", action="store_true", help="do not ask the router to pass the port on (PCP, NAT-PMP, UPnP)"
    )


def _add_status(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = command(commands, "status", "what the running node is doing, and why", ".commands:status")
    _add_data_dir(parser)
    _add_json(parser)


def _add_peers(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = command(
        commands, "peers", "the peers the running node has a link to, and what it has seen of them in the run",
        ".commands:peers", epilog=PEERS_EPILOG,
    )  # fmt: skip
    _add_data_dir(parser)
    _add_json(parser)


def _add_stop(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = command(commands, "stop", "stop the running node: goodbye to the others, state saved", ".commands:stop")
    _add_data_dir(parser)


def _add_export(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = command(
        commands, "export", "write the run's weights to a file, from the running node or its saved state",
        ".commands:export",
    )  # fmt: skip
    parser.add_argument("file", metavar="FILE", type=Path, help="a safetensors file; replaced if it exists")
    _add_data_dir(parser)


def _add_data_dir(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--data-dir", type=Path, metavar="DIR",
        help="the node's key and state (default: $SHOAL_HOME or ~/.local/share/shoal)",
    )  # fmt: skip


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="for programs: one JSON object")


# --- values -----------------------------------------------------------------------------------------------------------


def count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def _port(text: str) -> int:
    if not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: expected 0 to 65535")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value


def assignment(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        if not name.isidentifier():
            raise ValueError
        return name, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=NUMBER") from None
