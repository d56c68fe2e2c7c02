"""The whole `shoal` command: the node's commands, `shoal sim` and `shoal lab`. Imports nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from ..learning.strategies import names as strategy_names
from ..node import cli
from ..node.cli import command, count, positive
from ..node.stages_cli import add_stages

DHT_EPILOG = """\
examples:
  shoal lab dht                                     1,000 nodes join; 2,000 lookups
  shoal lab dht --nodes 10000 --plot dht.png        minutes, and some GiB of memory
  shoal lab dht --churn 30m                         nodes stay for 30 minutes in the mean
  shoal lab dht --adversaries 0.2 --plot liars.png  every fifth node drops, lies or crowds the place of a record

Real nodes' code (endpoints, calls, tables, lookups, signed records, upkeep) in virtual time on a network in memory;
only encryption and what lies below calls is left out, unless --encrypted. Latencies are those of hosts all over the
Internet. Same seed, same result: the digest in the last line covers every lookup.

Exits 0 only if hops are at most log2(nodes) / 2 + 2 in the mean, and lookups succeed: 99.9 % of them, 99 % with churn,
95 % with adversaries.
"""

REDUCE_EPILOG = """\
examples:
  shoal lab reduce                                       16 peers, 16 MiB, 25 Mbit/s, 40 ms: as 64 MiB at 100 Mbit/s
  shoal lab reduce --unequal 0.25,0.5,1,2,4 --probes     lines of five kinds, measured before the first round
  shoal lab reduce --mb 64 --uplink 100 --plot out.png   minutes, and 3 GiB of memory

Real endpoints with encryption and real rounds, in virtual time on a network in memory whose uplinks are shared by all
that a peer sends. What computing takes is not part of the virtual time.

Exits 0 only if everybody is in the last round and it takes at most the least time that the uplinks allow (the optimum
of the slice planner, without latency) divided by 0.9, with unequal uplinks times 1.1.
"""

STRATEGIES_EPILOG = """\
Real strategies, training, codecs and data in virtual time; lines and the bytes of reduces are modelled. All methods
train the same number of steps on each peer. The target is nine tenths of the way that data parallel training comes.

examples:
  shoal lab strategies --seeds 2 --lines home              a first look: minutes
  shoal lab strategies --plot strategies.png               everything on digits
  shoal lab strategies --task stdlib-small --peers 4 --steps 150 --methods diloco,streaming,async
"""

BYZANTINE_EPILOG = """\
examples:
  shoal lab byzantine                                          all rules, all attacks, 3 liars of 15, 5 seeds: minutes
  shoal lab byzantine --rules flag,multikrum --attacks alie    some of them
  shoal lab byzantine --liars 1,3,5 --alpha 0.1                more liars; peers that miss most of the classes
  shoal lab byzantine --json out.json --plot out.png           for programs, and as a heat-map

Peers train one model on scikit-learn's digits, a gradient each step; liars know what everybody else sends, and the
strongest attacks try the rule that they face. Rules that need to know how many liars there are, are told. A rule or an
attack with parameters is written `multikrum:definition=byzfl` (with several parameters, separate the list by spaces).

Exits 0 only if one rule loses at most 2 points under every attack, against the mean without attackers; every attack
leaves some rule within 2 points; no rule costs more than 1 point without attackers; and flag beats the mean by 50
points under gaussian and reverse.
"""

AVERAGING_EPILOG = """\
examples:
  shoal lab averaging                                              everything: a quarter of an hour on two idle cores
  shoal lab averaging --graphs ring --methods plain,corrected      some of it
  shoal lab averaging --form neighbours --exchanges 1              each peer averages with all its neighbours at once
  shoal lab averaging --json out.json --plot out.svg               for programs, and as curves

16 peers train a network each, on scikit-learn's digits, and average their weights along a graph; those of `same init`
and `fedavg` begin from the same weights, all others from weights of their own. The averages are those of the
strategies gossip and dimat (docs/averaging.md). A method with a comma in its name needs the list separated by
semicolons: --methods "dimat; dimat, corrected".

Exits 0 only if, where exchanges are most frequent, plain averaging stays under 30 %, the correction reaches 95 % with
the same classes everywhere and 90 % otherwise, and stays within 2 points of `same init` and of `fedavg`.
"""

STAGES_EPILOG = """\
examples:
  shoal lab stages                                                 everything: a quarter of an hour on two cores
  shoal lab stages --resume runs --markdown tables.md              the same; when it is killed, it goes on
  shoal lab stages --problems gpt --rates 10 --methods none,checkpoint,redundant,checkfree+       some of it
  shoal lab stages --every 25 --checkpoint 60                      checkpoints of another interval and cost
  shoal lab stages --json out.json --plot out.png                  for programs, and as curves

A pipeline of six stages is trained, and loses stages at 5, 10, 16 or 33 % per hour. Time is virtual: seconds of an
iteration, a recovery and a checkpoint are those of CheckFree's paper (arXiv 2506.15461). docs/stages.md has a run.

Exits 0 only if random weights are worse than a copy, and a copy than the weighted average, for a lost inner stage;
swapping makes the loss of the first stage cheaper; and CheckFree and CheckFree+ reach the target before checkpointing
at 5 and 10 %. Each by more than twice the standard error over the seeds.
"""

SIM_EPILOG = """\
examples:
  shoal sim                                         8 peers train `digits`; one is killed, one joins late
  shoal sim --peers 4 --task stdlib                 a small language model on Python's own source text
  shoal sim --strategy noloco --plot noloco.png     another strategy, with a picture
  shoal sim --task digits-finetune --strategy spsa --peers 4 --rounds 32     one byte per gradient
  shoal sim --kill 3 --rounds 30 --json out.json    more dying, and a report for programs
  shoal sim --byzantine 2:signflip --aggregator descent:f=2+mean    two of them lie, and a rule that stands it
  shoal sim --byzantine 1:lying_owner --aggregator median       one returns wrong combinations, and is found out
  shoal sim --task my_task:MyTask                   a task of your own

Exits 0 only if every claim held: all survivors finish with identical bits, each victim is dropped by name, the
late peer takes part, and training did what it should. When something fails, the logs are kept and named.
"""

NAT_EPILOG = """\
examples:
  shoal lab nat                                     every kind of host dials every kind
  shoal lab nat --kinds cone,symmetric              only these kinds
  shoal lab nat --json nat.json --plot nat.png      for programs, and as a picture
  shoal lab nat --scenario kill-relay               the relay dies after the upgrade; the link must live

The hosts are network namespaces of this machine with real kernel NAT between them; nothing leaves the machine. Needs
Linux, root, `ip` and `iptables`; UPnP routers need miniupnpd and nftables.

Exits 0 only if every pair is connected by a way that its kinds of hosts allow: directly where one of them can be
dialled, by hole punching between NATs that keep the port, through the relay otherwise. 2: this machine has no lab.
"""


def main(argv: Sequence[str] | None = None) -> int:
    return cli.main(argv, extra=(_add_sim, _add_lab))


def entry() -> NoReturn:
    """The console script."""
    try:
        code = main()
    except KeyboardInterrupt:  # before a command ran
        code = cli.INTERRUPTED
    cli.leave(code)


def _add_sim(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = command(
        commands, "sim", "run a whole swarm on this machine: real processes, sockets, encryption, training",
        ".simulate:simulate", package=__package__, epilog=SIM_EPILOG,
    )  # fmt: skip
    parser.add_argument("--peers", type=positive, default=8, metavar="N", help="node processes, late ones included (8)")
    parser.add_argument("--task", default="digits", metavar="NAME", help="a built-in task or module:Class (digits)")
    parser.add_argument(
        "--strategy", default="diloco", metavar="NAME", help=f"diloco (default), or one of {strategy_names()}"
    )
    parser.add_argument(
        "--set", metavar="NAME=VALUE", action="append", default=[], dest="strategy_args", type=cli.assignment,
        help="an argument of the strategy; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--topology", default="", metavar="NAME",
        help="who meets whom where peers gossip: random (default), all, grid, ring, full, regular:4, barabasi-albert:2",
    )  # fmt: skip
    add_stages(parser, count, positive)
    parser.add_argument("--aggregator", default="mean", metavar="RULE", help="how contributions are combined (mean)")
    parser.add_argument(
        "--audit", type=float, metavar="N",
        help="slices at which each peer looks in a round (1 with any rule but the mean, else 0)",
    )  # fmt: skip
    parser.add_argument(
        "--admission", type=count, metavar="N",
        help="rounds that a newcomer is on trial (3 with any rule but the mean, else 0)",
    )  # fmt: skip
    parser.add_argument("--mode", choices=("available", "strict"), default="available", help="of rounds (available)")
    parser.add_argument("--rounds", type=positive, metavar="R", help="rounds to train (default: the task's)")
    parser.add_argument("--seed", type=count, default=0, metavar="S", help="of data, victims, rounds and phases (0)")
    parser.add_argument(
        "--kill", type=count, metavar="N", help="peers killed between scatter and commit (1; 0 for few)"
    )
    parser.add_argument("--late", type=count, metavar="N", help="peers that join late (1)")
    parser.add_argument(
        "--byzantine",
        type=_liars,
        metavar="N:ATTACK",
        help="N peers lie in every round: 2:alie, 3:reverse, 1:lying_owner (nobody)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw loss and metric over time per peer")
    parser.add_argument("--no-live", action="store_true", help="a line per round instead of a live view")
    parser.add_argument("--workdir", type=Path, metavar="DIR", help="put data, logs and exports here, and keep them")
    parser.add_argument("--keep", action="store_true", help="keep the working folder even if all is well")
    parser.add_argument(
        "--log-level", choices=("debug", "info", "warning", "error"), default="info", help="of the nodes' logs (info)"
    )


def _add_lab(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "lab", help="trials of real nodes on this machine: NAT, a DHT of thousands, slow lines", allow_abbrev=False,
        description="Trials of real nodes on this machine.",
    )  # fmt: skip
    trials = parser.add_subparsers(title="trials", metavar="TRIAL", required=True)
    nat = command(
        trials, "nat", "every pair of kinds of hosts behind real kernel NAT, and how they connect",
        ".lab:nat", package=__package__, epilog=NAT_EPILOG,
    )  # fmt: skip
    nat.add_argument(
        "--kinds", metavar="A,B", type=_names, default=(), help="kinds of hosts (all but dual); see the output"
    )
    nat.add_argument(
        "--scenario",
        metavar="NAME",
        type=_names,
        help="address-change, kill-relay or train-relay instead of the matrix",
    )
    nat.add_argument(
        "--delay", type=_milliseconds, default=0.0, metavar="MS", help="each way at every host (0); 4 make a round trip"
    )
    nat.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")
    nat.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the matrix")

    _add_reduce(trials)
    _add_byzantine(trials)
    _add_averaging(trials)
    _add_stages(trials)
    _add_strategies(trials)
    dht = command(
        trials, "dht", "thousands of nodes of the DHT in virtual time, and whether lookups find what they should",
        ".lab_dht:dht", package=__package__, epilog=DHT_EPILOG,
    )  # fmt: skip
    dht.add_argument("--nodes", type=positive, default=1000, metavar="N", help="nodes at once (1000)")
    dht.add_argument("--lookups", type=positive, default=2000, metavar="N", help="lookups in all (2000)")
    dht.add_argument(
        "--churn",
        type=_duration,
        metavar="TIME",
        help="mean session of a node: 30m, 900s (default: all stay)",
    )
    dht.add_argument(
        "--adversaries", type=_fraction, default=0.0, metavar="PART", help="part of the nodes that do harm (0): 0.2"
    )
    dht.add_argument("--loss", type=_fraction, default=0.005, metavar="PART", help="of packets (0.005)")
    dht.add_argument(
        "--time",
        type=_duration,
        metavar="TIME",
        help="virtual time of the lookups (20m with churn, else 20 a second)",
    )
    dht.add_argument("--seed", type=count, default=0, metavar="S", help="of everything (0)")
    dht.add_argument("--encrypted", action="store_true", help="real links with encryption; at most 500 nodes")
    dht.add_argument("--verbose", action="store_true", help="progress even where it is no terminal that sees it")
    dht.add_argument("--json", type=Path, metavar="FILE", help="write every figure and lookup as JSON")
    dht.add_argument("--plot", type=Path, metavar="FILE.png", help="draw success, hops, latency and success over time")


def _several(text: str) -> int:
    if (number := positive(text)) < 2:
        raise argparse.ArgumentTypeError("a reduce takes two peers at least")
    return number


def _add_reduce(trials: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    reduce = command(
        trials, "reduce", "rounds of the group reduce over slow lines, beside the least time that these allow",
        ".lab_reduce:reduce", package=__package__, epilog=REDUCE_EPILOG,
    )  # fmt: skip
    reduce.add_argument("--peers", type=_several, default=16, metavar="N", help="peers, all in one round (16)")
    reduce.add_argument("--mb", type=_size, default=16.0, metavar="MIB", help="size of the vector (16)")
    reduce.add_argument("--uplink", type=_megabits, default=25 * 125e3, metavar="MBIT", help="of each peer (25)")
    reduce.add_argument("--probes", action="store_true", help="peers measure their lines before the first round")
    reduce.add_argument("--unequal", type=_factors, metavar="A,B,…", help="uplinks are A, B, … times that, in turns")
    reduce.add_argument("--slow-paths", type=_percent, default=0.0, metavar="PERCENT", help="5 to 20 times slower (0)")
    reduce.add_argument("--latency", type=_milliseconds, default=0.04, metavar="MS", help="one way (40)")
    reduce.add_argument("--rounds", type=positive, default=2, metavar="R", help="the first knows nothing (2)")
    reduce.add_argument("--seed", type=count, default=0, metavar="S", help="of everything (0)")
    reduce.add_argument("--json", type=Path, metavar="FILE", help="write every figure as JSON")
    reduce.add_argument("--plot", type=Path, metavar="FILE.png", help="draw where the time goes")


def _add_byzantine(trials: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = command(
        trials, "byzantine", "rules of aggregation under attacks: which liars do how much harm to which rule",
        ".lab_byzantine:byzantine", package=__package__, epilog=BYZANTINE_EPILOG,
    )  # fmt: skip
    parser.add_argument("--rules", type=_list, metavar="A,B", help="rules (a selection of all), without their f")
    parser.add_argument("--attacks", type=_list, metavar="A,B", help="attacks (all)")
    parser.add_argument("--liars", type=_counts, default=(3,), metavar="N,M", help="how many lie (3)")
    parser.add_argument("--peers", type=positive, default=15, metavar="N", help="peers, liars included (15)")
    parser.add_argument(
        "--alpha", type=_alphas, default=(None, 0.3), metavar="A,B",
        help="how classes are spread over peers: Dirichlet concentrations, `iid` (iid,0.3)",
    )  # fmt: skip
    parser.add_argument("--seeds", type=positive, default=5, metavar="N", help="runs of each case (5)")
    parser.add_argument("--steps", type=positive, default=150, metavar="N", help="training steps of a run (150)")
    parser.add_argument("--batch", type=positive, default=32, metavar="N", help="images of a peer in a step (32)")
    parser.add_argument("--rate", type=_rate, default=1.0, metavar="R", help="learning rate (1)")
    parser.add_argument(
        "--hidden", type=count, default=0, metavar="N", help="width of two hidden layers (0: softmax regression)"
    )
    parser.add_argument("--momentum", type=_momentum, default=0.0, metavar="M", help="of each peer's gradients (0)")
    parser.add_argument("--loss", type=_fraction, default=0.0, metavar="PART", help="contributions that get lost (0)")
    parser.add_argument("--noise", type=_noise, default=0.0, metavar="S", help="noise added to training images (0)")
    parser.add_argument(
        "--shift", type=_pixels, default=0, metavar="N", help="augmented data: images moved by up to N pixels (0)"
    )
    parser.add_argument("--processes", type=positive, metavar="N", help="runs at a time (one for each core)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw heat-maps")


def _add_strategies(trials: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = command(
        trials, "strategies", "ways of learning together: loss against bytes and against time, on all kinds of lines",
        ".lab_strategies:strategies", package=__package__, epilog=STRATEGIES_EPILOG,
    )  # fmt: skip
    parser.add_argument(
        "--methods", type=_list, metavar="A,B", help="strategies, with arguments: 'diloco streaming:bits=4,overlap=2'"
    )
    parser.add_argument("--task", type=_names, default=("digits",), metavar="A,B", help="built-in tasks (digits)")
    parser.add_argument(
        "--alpha", type=_alphas, default=(None, 0.1), metavar="A,B",
        help="how the classes of digits are spread over peers: Dirichlet concentrations, `iid` (iid,0.1)",
    )  # fmt: skip
    parser.add_argument(
        "--lines", type=_names, default=("datacentre", "home", "mixed"), metavar="A,B",
        help="kinds of lines and machines (datacentre,home,mixed)",
    )  # fmt: skip
    parser.add_argument("--peers", type=positive, default=8, metavar="N", help="peers (8)")
    parser.add_argument("--steps", type=positive, default=600, metavar="N", help="training steps of each peer (600)")
    parser.add_argument("--seeds", type=positive, default=5, metavar="N", help="runs of each case (5)")
    parser.add_argument("--processes", type=positive, metavar="N", help="runs at a time (one for each core)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every point of every run as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw loss against bytes and against time")


def _add_averaging(trials: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = command(
        trials, "averaging", "averaging of models that began apart: plain, corrected, matched, by graph and data",
        ".lab_averaging:averaging", package=__package__, epilog=AVERAGING_EPILOG,
    )  # fmt: skip
    parser.add_argument("--methods", type=_titles, metavar="A,B", help="methods (all)")
    parser.add_argument("--graphs", type=_list, metavar="A,B", help="ring, barabasi-albert:2, regular:4, full, random")
    parser.add_argument(
        "--form", choices=("pairs", "neighbours"), default="pairs",
        help="an exchange is with one neighbour, in a random matching, or with all of them (pairs)",
    )  # fmt: skip
    parser.add_argument("--exchanges", type=_counts, default=(1, 5), metavar="N,M", help="in each round (1,5)")
    parser.add_argument(
        "--alpha", type=_alphas, default=(None, 0.1), metavar="A,B",
        help="how classes are spread over peers: Dirichlet concentrations, `iid` (iid,0.1)",
    )  # fmt: skip
    parser.add_argument("--model", choices=("tanh", "digits"), default="tanh", help="what is trained (tanh)")
    parser.add_argument("--peers", type=_several, default=16, metavar="N", help="peers (16)")
    parser.add_argument("--rounds", type=positive, default=60, metavar="R", help="rounds (60)")
    parser.add_argument("--steps", type=positive, default=5, metavar="N", help="training steps of a round (5)")
    parser.add_argument("--rate", type=_rate, default=0.2, metavar="R", help="learning rate in the beginning (0.2)")
    parser.add_argument("--steady", action="store_true", help="the learning rate stays (it falls linearly to 0)")
    parser.add_argument("--seeds", type=positive, default=5, metavar="N", help="runs of each case (5)")
    parser.add_argument("--processes", type=positive, metavar="N", help="runs at a time (one for each core)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw accuracy over rounds")


def _add_stages(trials: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = command(
        trials, "stages", "a pipeline loses stages: recovery from neighbours, from checkpoints, by redundancy",
        ".lab_stages:stages", package=__package__, epilog=STAGES_EPILOG,
    )  # fmt: skip
    parser.add_argument("--problems", type=_names, default=("teacher", "gpt"), metavar="A,B", help="teacher,gpt (both)")
    parser.add_argument("--methods", type=_names, metavar="A,B", help="ways to stand losses (all)")
    parser.add_argument(
        "--rates", type=_counts, default=(5, 10, 16, 33), metavar="N,M", help="%% per hour (5,10,16,33)"
    )
    parser.add_argument("--iterations", type=_iterations, metavar="N", help="without failures (the problem's)")
    parser.add_argument("--every", type=positive, default=100, metavar="N", help="iterations of a checkpoint (100)")
    parser.add_argument("--checkpoint", type=_seconds, default=3.0, metavar="S", help="seconds that one takes (3)")
    parser.add_argument("--recovery", type=_seconds, default=30.0, metavar="S", help="seconds of a recovery (30)")
    parser.add_argument("--seeds", type=positive, default=5, metavar="N", help="runs of each case (5)")
    parser.add_argument("--processes", type=positive, metavar="N", help="runs at a time (one for each core)")
    parser.add_argument(
        "--resume", type=Path, metavar="DIR", help="keep each run in DIR as it ends, and go on from what is there"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw loss against virtual hours")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables as docs/stages.md has them")


def _iterations(text: str) -> int:
    return int(_number(text, 20, 1e6, "number of iterations, 20 at least"))


def _seconds(text: str) -> float:
    return _number(text, 0.0, 86400.0, "number of seconds, up to a day")


def _titles(text: str) -> tuple[str, ...]:
    """Names that may hold commas, between semicolons; else between commas."""
    return tuple(part.strip() for part in text.split(";" if ";" in text else ",") if part.strip())


def _liars(text: str) -> tuple[int, str]:
    number, _, attack = text.partition(":")
    if not attack:
        raise argparse.ArgumentTypeError(f"{text!r} is not how many and which attack: 2:alie")
    return positive(number), attack


def _list(text: str) -> tuple[str, ...]:
    """Parts may hold commas after a colon; then the list is separated by spaces."""
    return tuple(part for part in (text.split() if " " in text.strip() else text.split(",")) if part)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(positive(part) for part in text.split(","))


def _alphas(text: str) -> tuple[float | None, ...]:
    return tuple(None if part == "iid" else _number(part, 0.001, 1e6, "concentration") for part in text.split(","))


def _momentum(text: str) -> float:
    return _number(text, 0.0, 0.999, "momentum, 0 to 0.999")


def _rate(text: str) -> float:
    return _number(text, 1e-6, 1e3, "learning rate")


def _noise(text: str) -> float:
    return _number(text, 0.0, 100.0, "standard deviation")


def _pixels(text: str) -> int:
    return int(_number(text, 0, 7, "whole number of pixels, 0 to 7"))


def _size(text: str) -> float:
    return _number(text, 0.001, 4096.0, "size in MiB, up to 4096")


def _megabits(text: str) -> float:
    """Bytes per second, from ``100`` or ``100Mbit``."""
    return _number(text.removesuffix("Mbit"), 0.01, 1e6, "number of Mbit/s") * 125e3


def _factors(text: str) -> tuple[float, ...]:
    return tuple(_number(part, 0.001, 1000.0, "factor, 0.001 to 1000") for part in text.split(","))


def _percent(text: str) -> float:
    return _number(text.removesuffix("%"), 0.0, 100.0, "percentage, 0 to 100") / 100.0


def _number(text: str, least: float, most: float, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is not a {what}")
    return value


def _duration(text: str) -> float:
    """Seconds, from ``90``, ``90s``, ``30m`` or ``2h``."""
    unit = {"s": 1.0, "m": 60.0, "h": 3600.0}.get(text[-1:])
    try:
        value = float(text if unit is None else text[:-1]) * (unit or 1.0)
    except ValueError:
        value = -1.0
    if not 0 < value <= 7 * 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 90s, 30m or 2h")
    return value


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 0.5:
        raise argparse.ArgumentTypeError(f"{text!r} is not a part between 0 and 0.5")
    return value


def _milliseconds(text: str) -> float:
    """Seconds, from ``40`` or ``40ms``."""
    try:
        value = float(text.removesuffix("ms"))
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of milliseconds, 0 to 1000")
    return value / 1e3


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.replace(" ", "").split(",") if name)


if __name__ == "__main__":
    entry()
