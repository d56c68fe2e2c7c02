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
  bench.py link --json link.json
  bench.py rpc --systems shoal,tcp --in-flight 1,8,32
  bench.py link --peer-python peers/bin/python      where trustme, grpcio, libp2p, hivemind are installed
  bench.py codecs --elements 1048576
  bench.py aggregate --shapes 16x1e6 --peer-python peers/bin/python     where byzfl is (pip install --no-deps)
  bench.py dht --peer-python peers/bin/python       where hivemind, libp2p, kademlia are
  bench.py field --peer-python peers/bin/python     where flwr[simulation] is
  bench.py stages --json runs.json                  all ways to recover a stage; goes on with what runs.json has

A peer that cannot run is left out, with the reason.
"""

#: All that `--systems` may name.
SYSTEMS = ("shoal", "tcp", "tls", "grpc", "libp2p", "hivemind")
WAYS = ("none", "checkfree", "checkfree+", "kept", "copy", "skip", "random", "checkpoint")
DHT_SYSTEMS = ("shoal", "kademlia", "hivemind", "libp2p")
REDUCE_SYSTEMS = ("shoal", "shoal int8", "gloo", "torchft", "hivemind")

ALLREDUCE = """\
One round of the group reduce beside other all-reduces, one fp32 tensor, the mean over all peers.

shoal   the real path: links over TCP with encryption, voters and leader, scatter, combine, gather, fingerprint,
        proposal, signed accepts, commit. Timed from the end of training (the first peer's) to the moment the last
        peer holds the committed result. Votes are kept in memory instead of on disk.
gloo    torch.distributed.all_reduce(SUM): no encryption, no agreement, no fault tolerance.
torchft its manager's allreduce over gloo and its decision to commit. The quorum, by a lighthouse, is not timed.
hivemind  its AllReduceRunner over p2pd daemons, encrypted: the transfer alone, without matchmaking and timeouts.
floor   bytes that have to be moved, sealed, opened, reduced and fingerprinted × ns per byte, measured here in this run,
        ÷ cores that can work at the same time.
"""

LINK = """\
Messages of 1 MiB from one process to another, one after the other on one stream; the receiver looks at each and says
when it has all. Then small calls of 1 KiB, one at a time, while such a stream takes all it can get.

Beside Shoal: plain TCP and TLS 1.3 of trio, grpc.aio without encryption, py-libp2p (Noise, yamux), hivemind's p2pd.
"""

RPC = """\
Calls of 1 KiB that are answered with what they brought, one at a time and more in flight, over one link.

Beside Shoal: an echo over plain TCP of trio, grpc.aio without encryption, hivemind's p2pd, py-libp2p (Noise, yamux).
"""

FIELD = """\
Federated averaging on digits in one process: a loop over the clients with nothing around it, and the field of
`shoal.sim.field`, which is the real strategy with rounds, virtual time, modelled lines and bytes; plain, and with
replicas that train at the same time in one call (the same bits). One thread each, but:

flower  the simulation of Flower over Ray: the same model, data, batches and mean; clients in a process for each core.
        Its time has the start of Ray in it; `s a round` has not, and leaves the first round out.
"""

TOPOLOGY = """\
Seconds that the planner predicts for 64 MiB over random meshes of peers with 12.5 MB/s (unless equal: a quarter to four
times that) and paths of 40 ms: equal and sized butterflies, rings in the order of the shortest tour and of the fastest
slowest path. How often each is best, and what the planner would pick if rings could be executed. Nothing is sent.
"""

HANDSHAKE = """\
A new connection, the handshake, one small exchange, the end; one after the other and several at once. Then with a new
identity each time, which only Shoal is asked for.

Beside Shoal: TCP and TLS 1.3 of trio, py-libp2p (Noise, yamux), hivemind's p2pd.
"""

IDLE = """\
Links from so many peers to one process, after one exchange each: what its memory grew by, for each link.

Beside Shoal: TCP and TLS 1.3 of trio, py-libp2p.
"""

DHT = """\
DHTs of N nodes. Keys are stored by the nodes in turns, then each is got by a node that does not hold it itself; one act
at a time, all keys distinct, what comes back is compared. The nodes of every system are dealt to as many processes.

shoal      records signed by their author, who may replace them: a get takes three holders that agree. 20 copies.
kademlia   the package of that name: UDP, no encryption, no signatures. 20 copies.
hivemind   DHTNode in asyncio, and for each node a p2pd daemon beside the processes. 5 copies, a get takes one holder.
libp2p     py-libp2p's KadDHT over Noise and yamux. 20 copies.
"""

WEBRTC = """\
A byte stream over a WebRTC data channel, its engine in a process of its own: bulk one way, an echo of 1 KiB, and the
processor time of both engines. It is as shoal opens it between two hosts that nothing else connects.

Beside it: aiortc without what webrtc_sctp.py changes, libdatachannel through its C interface, plain TCP of trio.
"""


MEMORY = """\
What a process grows by at most in rounds of the group reduce: fresh processes for every number of peers and codec, that
never did anything else. The bounds are what DESIGN asks for: 2.25 times the tensor in fp32, 1.6 times with int8.
"""


BLOBS = """\
A blob from holder processes on this machine into one buffer of another process, and into its store on disk, each chunk
checked against the hash tree. Beside it: the same bytes as the answer of one call, unchecked.
"""


CODECS = """\
Every codec of the group reduce on one core: encoding, with error feedback, decoding, adding a weighted contribution to
a sum, looking for faults, in ns per element; native kernels, pure numpy, and plain torch (several whole-tensor
operations that give the same values) in turns. Then the mean of fp32 vectors and the check for NaN. Then size, error
and bias.
"""


AGGREGATE = """\
Aggregators in their centralised form: n vectors of d random numbers, f a fifth of n, one thread. The check for NaN and
infinity is part of ours. Results are compared.

Beside Shoal: byzfl 0.0.11, with arrays and with tensors (of large vectors only the form that was faster before).
"""


KILL = """\
One of four processes ends itself with SIGKILL at a given point of a round of the group reduce, in the middle of a
transfer where the point is one: the time from there to the moment at which the last survivor holds the committed
result. In turns with it: a round of all four, and one of three, in which nobody dies.

contributor     owns no slice: nobody waits for anything of it
owner           contributes, and combines a quarter of the tensor
leader          does that too, and plans, freezes, proposes and commits
gloo            torch.distributed.all_reduce with a rank killed in its middle: the time to the last survivor's error
"""


OVERLAP = """\
Streaming DiLoCo on real nodes over loopback: what a step of training takes while a third of the model is being reduced,
and while nothing is; with training in the node's process, and in a process of its own (--train-apart).
"""


SOAK = """\
Real nodes, everything but the command line, that reduce vectors of 4 KiB to 1 MiB, round after round, in strict mode.
About once a second one of them is killed with SIGKILL, stopped for 2 s, or started again with its key and its folder.
It fails when no round, or none of some peer, is committed for 60 s, when two peers differ in the state after a round,
when a mean is not the mean of its members, bit for bit, or when file descriptors, tasks or memory grow in two peers
that are stopped but never killed.
"""


STAGES = """\
A small model in stages, each held by one process, `allreduce`, a step a round. The only holder of an inner stage ends
itself with SIGKILL after a round; one more process is in the run and has no stage yet. For each way to recover: the
held-out loss before, right after the recovery (of the weights, before anything is trained with them), and at the end;
seconds from the kill until the stage is held again, to the next round of the first stage, and to the first round that
nobody had done before.

teacher      four residual stages that learn from another such chain, as in `shoal lab stages`
text         a GPT on Python's source in five: embedding, three blocks, head
checkpoint   folders of all nodes are copied some rounds before; at the kill all are ended, get those folders back and
             start again. All other ways are `--recovery` of the run.
"""


def several(text: str) -> tuple[int, ...]:
    if min(found := numbers(text)) < 2:
        raise argparse.ArgumentTypeError("a reduce takes two processes at least")
    return found


def numbers(text: str) -> tuple[int, ...]:
    """Positive whole numbers, separated by commas."""
    values = tuple(int(part) for part in text.split(","))
    if not values or min(values) < 1:
        raise argparse.ArgumentTypeError(f"expected positive numbers with commas between, got {text!r}")
    return values


def shapes(text: str) -> tuple[tuple[int, int], ...]:
    """``16x1000000,32x1e7``: vectors and their elements."""
    found = tuple((int(n), int(float(d))) for n, d in (part.split("x") for part in text.split(",")))
    if min(min(shape) for shape in found) < 1:
        raise argparse.ArgumentTypeError(f"expected NxD,… with positive numbers, got {text!r}")
    return found


def _some_of(known: tuple[str, ...], text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if not set(names) <= set(known):
        raise argparse.ArgumentTypeError(f"expected some of {','.join(known)}, got {text!r}")
    return names


def _systems(text: str) -> tuple[str, ...]:
    return _some_of(SYSTEMS, text)


def _reduce_systems(text: str) -> tuple[str, ...]:
    return _some_of(REDUCE_SYSTEMS, text)


def _ways(text: str) -> tuple[str, ...]:
    return _some_of(WAYS, text)


def _pythons(text: str) -> list[str]:
    return [sys.executable, *text.split(",")]


def _dht_systems(text: str) -> tuple[str, ...]:
    return _some_of(DHT_SYSTEMS, text)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench.py", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="BENCHMARK")
    shape = argparse.RawDescriptionHelpFormatter
    one = commands.add_parser(
        "allreduce",
        help="a round of the group reduce beside other all-reduces",
        description=ALLREDUCE,
        formatter_class=shape,
    )
    one.add_argument("--peers", type=several, default=(2, 4, 8), metavar="N,…", help="processes (default: 2,4,8)")
    one.add_argument("--mb", type=numbers, default=(4, 64), metavar="N,…", help="MiB of the tensor (default: 4,64)")
    one.add_argument("--plot", type=Path, metavar="FILE", help="draw MB/s over size and peers to this .png or .svg")
    one.add_argument("--warmup", type=int, default=2, metavar="N", help="runs that do not count (default: 2)")
    one.add_argument(
        "--systems", type=_reduce_systems, default=REDUCE_SYSTEMS, metavar="A,…", help=f"of {','.join(REDUCE_SYSTEMS)}"
    )
    one.add_argument(
        "--peer-python",
        type=_pythons,
        default=[sys.executable],
        metavar="PATH,…",
        help="interpreters that have torchft or hivemind (and trio): the first one that has it runs it",
    )
    two = commands.add_parser(
        "link", help="bulk messages, and calls beside them, on one link", description=LINK, formatter_class=shape
    )
    two.add_argument("--what", choices=("messages", "messages,load"), default="messages,load", help="which tables")
    three = commands.add_parser("rpc", help="small calls", description=RPC, formatter_class=shape)
    three.add_argument(
        "--in-flight", type=numbers, default=(1, 32), metavar="N,…", help="calls at once (default: 1,32)"
    )
    four = commands.add_parser("handshake", help="new connections", description=HANDSHAKE, formatter_class=shape)
    four.add_argument("--at-once", type=int, default=16, metavar="N", help="handshakes at once (default: 16)")
    five = commands.add_parser("idle", help="memory of idle links", description=IDLE, formatter_class=shape)
    five.add_argument("--links", type=int, default=1000, metavar="N", help="links (default: 1000)")
    six = commands.add_parser("webrtc", help="a WebRTC data channel", description=WEBRTC, formatter_class=shape)
    six.add_argument("--mb", type=int, default=64, metavar="N", help="MiB of one run (default: 64)")
    six.add_argument("--echoes", type=int, default=300, metavar="N", help="echoes of one run (default: 300)")
    six.add_argument(
        "--peer-python", default=sys.executable, metavar="PATH", help="the interpreter that has pylibdatachannel"
    )
    seven = commands.add_parser("dht", help="stores and gets of a DHT", description=DHT, formatter_class=shape)
    seven.add_argument("--nodes", type=int, default=32, metavar="N", help="nodes of each system (default: 32)")
    seven.add_argument("--processes", type=int, default=8, metavar="N", help="that they are dealt to (default: 8)")
    seven.add_argument("--keys", type=int, default=32, metavar="N", help="keys in one run (default: 32)")
    seven.add_argument(
        "--systems", type=_dht_systems, default=DHT_SYSTEMS, metavar="A,…", help=f"of {','.join(DHT_SYSTEMS)}"
    )
    seven.add_argument(
        "--peer-python", default=sys.executable, metavar="PATH", help="the interpreter for kademlia, hivemind, libp2p"
    )
    eight = commands.add_parser(
        "blobs", help="a blob from one and several holders", description=BLOBS, formatter_class=shape
    )
    eight.add_argument("--mb", type=int, default=256, metavar="N", help="MiB of the blob (default: 256)")
    eight.add_argument("--holders", type=numbers, default=(1, 3), metavar="N,…", help="holders (default: 1,3)")
    nine = commands.add_parser("codecs", help="codecs and kernels", description=CODECS, formatter_class=shape)
    nine.add_argument("--elements", type=int, default=8 << 20, metavar="N", help="of the vector (default: 8388608)")
    ten = commands.add_parser(
        "topology", help="schedules over random meshes, predicted", description=TOPOLOGY, formatter_class=shape
    )
    ten.add_argument("--seed", type=int, default=0, metavar="S", help="of the meshes (default: 0)")
    eleven = commands.add_parser(
        "aggregate", help="aggregators beside byzfl", description=AGGREGATE, formatter_class=shape
    )
    eleven.add_argument(
        "--shapes",
        type=shapes,
        default=((16, 10**6), (32, 10**7)),
        metavar="NxD,…",
        help="vectors and their elements (default: 16x1e6,32x1e7: the second takes 15 GB and minutes)",
    )
    eleven.add_argument("--only", default="", metavar="TEXT", help="only rules whose text contains TEXT")
    eleven.add_argument("--peer-python", default=sys.executable, metavar="PATH", help="the interpreter that has byzfl")
    many = commands.add_parser("field", help="many learners in one process", description=FIELD, formatter_class=shape)
    many.add_argument("--clients", type=int, default=32, metavar="N", help="peers (default: 32)")
    many.add_argument("--rounds", type=int, default=10, metavar="N", help="rounds (default: 10)")
    many.add_argument("--steps", type=int, default=20, metavar="N", help="steps of a client in a round (default: 20)")
    many.add_argument("--peer-python", default=sys.executable, metavar="PATH", help="the interpreter for flwr with ray")
    killing = commands.add_parser(
        "kill", help="one of four peers dies in the middle of a reduce", description=KILL, formatter_class=shape
    )
    killing.add_argument("--mb", type=int, default=64, metavar="N", help="MiB of the tensor (default: 64)")
    killing.add_argument("--warmup", type=int, default=2, metavar="N", help="clean runs that do not count (default: 2)")
    killing.add_argument("--only", default="", metavar="TEXT", help="only victims whose name contains TEXT")
    killing.add_argument("--ring", action="store_true", help="contributions go round a ring, in which all own a part")
    killing.add_argument("--no-gloo", dest="gloo", action="store_false", help="without torch gloo beside it")
    killing.add_argument("--verbose", action="store_true", help="what happened when, of every run")
    soaking = commands.add_parser(
        "soak", help="thousands of small reduces under random kills and stops", description=SOAK, formatter_class=shape
    )
    soaking.add_argument("--peers", type=int, default=8, metavar="N", help="processes (default: 8)")
    soaking.add_argument("--reduces", type=int, default=10_000, metavar="N", help="rounds (default: 10000)")
    soaking.add_argument("--seconds", type=float, default=None, metavar="S", help="or as many as S seconds allow")
    soaking.add_argument("--seed", type=int, default=0, metavar="N", help="of the faults and keys (default: 0)")
    soaking.add_argument("--json", type=Path, default=None, metavar="FILE", help="write the row to FILE")
    weighing = commands.add_parser(
        "memory", help="what a process grows by in rounds of one codec", description=MEMORY, formatter_class=shape
    )
    weighing.add_argument("--peers", type=several, default=(2, 4, 8), metavar="N,…", help="processes (default: 2,4,8)")
    weighing.add_argument("--mb", type=numbers, default=(64,), metavar="N,…", help="MiB of the tensor (default: 64)")
    weighing.add_argument("--runs", type=int, default=5, metavar="N", help="rounds (default: 5)")
    weighing.add_argument("--json", type=Path, default=None, metavar="FILE", help="write the rows to FILE")
    hiding = commands.add_parser(
        "overlap", help="training while a fragment is under way", description=OVERLAP, formatter_class=shape
    )
    hiding.add_argument("--peers", type=several, default=(2,), metavar="N", help="processes (default: 2)")
    hiding.add_argument(
        "--step-ms", type=numbers, default=(2, 5, 10, 30), metavar="N,…", help="of a step (default: 2,5,10,30)"
    )
    hiding.add_argument("--rounds", type=int, default=16, metavar="N", help="fragments of a run (default: 16)")
    hiding.add_argument("--runs", type=int, default=3, metavar="N", help="runs per case (default: 3)")
    hiding.add_argument("--json", type=Path, default=None, metavar="FILE", help="write the rows to FILE")
    losing = commands.add_parser(
        "stages", help="a stage's only holder is killed: what each way to recover makes of the loss",
        description=STAGES, formatter_class=shape,
    )  # fmt: skip
    losing.add_argument("--ways", type=_ways, default=WAYS, metavar="A,…", help=f"of {','.join(WAYS)}")
    losing.add_argument("--task", choices=("teacher", "text"), default="teacher", help="what is trained (teacher)")
    losing.add_argument("--seeds", type=int, default=5, metavar="N", help="runs of each way (default: 5)")
    losing.add_argument("--rounds", type=int, default=40, metavar="N", help="of a run (default: 40)")
    losing.add_argument("--at", type=int, default=25, metavar="N", help="the round after which it dies (default: 25)")
    losing.add_argument("--back", type=int, default=5, metavar="N", help="rounds from a checkpoint to the kill (5)")
    losing.add_argument(
        "--victim", type=int, default=2, metavar="S", help="the stage (2: both beside it are built alike)"
    )
    losing.add_argument("--json", type=Path, default=None, metavar="FILE", help="keep each run in FILE as it ends")
    for command in (two, three, four, five):
        command.add_argument("--systems", type=_systems, default=SYSTEMS, metavar="A,…", help=f"of {','.join(SYSTEMS)}")
        command.add_argument(
            "--peer-python",
            default=sys.executable,
            metavar="PATH",
            help="the interpreter for tls, grpc, libp2p, hivemind: these want versions of packages that Shoal does not",
        )
    for command in (two, three, four):
        command.add_argument(
            "--time", type=float, default=0.5, metavar="S", help="seconds of one run, about (default: 0.5)"
        )
    for command in (one, two, three, four, five, six, seven, eight, nine, ten, eleven, many, killing):
        runs = 3 if command in (five, six, many) else 5 if command is killing else 9
        command.add_argument(
            "--runs", type=int, default=runs, metavar="N", help=f"counted runs per case (default: {runs})"
        )
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
    if getattr(options, "runs", 1) < 1:
        arguments().error("--runs must be at least 1")
    # Imported late, so that --help answers at once.
    import trio
    from benchmarks import (
        aggregate,
        allreduce,
        blobs,
        codecs,
        dht,
        field,
        handshake,
        idle,
        kill,
        link,
        memory,
        overlap,
        rpc,
        soak,
        stages,
        topology,
        webrtc,
    )
    from benchmarks.processes import ChildFailed

    run = {
        "aggregate": aggregate.run,
        "allreduce": allreduce.run,
        "link": link.run,
        "rpc": rpc.run,
        "handshake": handshake.run,
        "idle": idle.run,
        "webrtc": webrtc.run,
        "dht": dht.run,
        "blobs": blobs.run,
        "kill": kill.run,
        "memory": memory.run,
        "overlap": overlap.run,
        "soak": soak.run,
        "stages": stages.run,
        "codecs": codecs.run,
        "topology": topology.run,
        "field": field.run,
    }[options.command]
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
