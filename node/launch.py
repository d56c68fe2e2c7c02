"""`shoal start` and `shoal join`: from arguments to a running node process."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..learning import strategies, tasks, topologies
from ..transport.address import Address
from ..transport.errors import ConfigError
from ..transport.host import RealHost
from . import swarm_key
from .datadir import DataDir, NodeRecord
from .listening import parse_hosts, parse_via
from .terminal import configure_logging, read_line
from .ticket import Ticket

if TYPE_CHECKING:
    from ..learning.faults import Faults
    from ..learning.spec import RunSpec
    from ..transport.webrtc_signal import TurnServer

#: What argparse stores for ``--private`` without a file.
FRESH_KEY = ""


def start(options: argparse.Namespace) -> int:
    """Found a run, or resume the one in the data directory."""
    data = DataDir(options.data_dir)
    _take_task_back(options)
    check_usage(options)
    data.create()
    with data.locked():
        record = data.read_record()
        if record is None and not options.task:
            raise ConfigError(
                f"the data directory {data.path} holds no run to resume: name a task (digits, stdlib or module:Class), "
                "or join a run with `shoal join TICKET`"
            )
        if record is None:
            return _run(options, data, None, ticket=None, psk=_swarm_key(options, data))
        if options.origin is not None:
            raise ConfigError(
                f"the data directory {data.path} holds a run already, which goes on with its own state; --from founds "
                "a new one: name another --data-dir"
            )
        ticket = Ticket.parse(record.ticket)
        _refuse_conflicts(options, data, record)
        _refuse_other_swarm(options, data, ticket)
        return _run(options, data, record, ticket=ticket)


def join(options: argparse.Namespace) -> int:
    """Join the run of a ticket, or resume it where the data directory holds it already."""
    check_usage(options)
    if options.ticket == "-":
        # The imports take longest, and whoever writes the ticket may still be working on it.
        _load_torch(options.threads)
        from . import daemon  # noqa: F401

        ticket = Ticket.parse(read_line())
    else:
        ticket = Ticket.parse(options.ticket)
    data = DataDir(options.data_dir)
    data.create()
    with data.locked():
        record = data.read_record()
        if record is not None:
            known = Ticket.parse(record.ticket)
            if known.run_id != ticket.run_id:
                raise ConfigError(
                    f"the data directory {data.path} holds another run ({known.run_id.hex()[:8]}) than the ticket's "
                    f"({ticket.run_id.hex()[:8]}); resume that one with `shoal start`, or join with another --data-dir"
                )
        return _run(options, data, record, ticket=ticket)


def check_usage(options: argparse.Namespace) -> None:
    """What can be said of the arguments at once: before torch, which takes seconds. Raises :class:`ConfigError`."""
    if options.task:
        _check_task(options.task)
    if getattr(options, "strategy", None):
        strategies.check_name(options.strategy)
    if getattr(options, "topology", None):
        topologies.check(options.topology)
    parse_hosts(options.host, options.port or 0)
    parse_via(options.via)
    parse_export(options.export)
    origin = getattr(options, "origin", None)
    if origin is not None and not origin.is_file():
        raise ConfigError(f"--from {origin}: {'that is no file' if origin.exists() else 'there is no such file'}")


def _check_task(task: str) -> None:
    if ":" not in task:
        tasks.check_name(task)
        return
    module, _, name = task.partition(":")
    parts = module.split(".")
    if not name.isidentifier() or not all(part.isidentifier() for part in parts):
        raise ConfigError(f"{task!r} does not name a task: expected module:Class, for instance my_task:MyTask")
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    if parts[0] not in sys.modules and importlib.util.find_spec(parts[0]) is None:
        raise ConfigError(f"task {task!r}: no module {parts[0]!r} here ({folder}) or installed")


def parse_export(path: Path | None) -> Path | None:
    """``--export``, absolute. Raises :class:`ConfigError` when nothing could be written there."""
    if path is not None and not path.absolute().parent.is_dir():
        raise ConfigError(f"cannot write {path}: there is no folder {path.absolute().parent}")
    return None if path is None else path.absolute()


def _take_task_back(options: argparse.Namespace) -> None:
    """``shoal start --private digits`` means the task: no file of that name is there, and no task was named."""
    given = options.private
    if given and not options.task and not os.path.exists(given) and (given in tasks.BUILTIN or ":" in given):
        options.task, options.private = given, FRESH_KEY


def _swarm_key(options: argparse.Namespace, data: DataDir) -> bytes | None:
    """The key of the private swarm to found, None for an open one.

    A directory with a key in it stays private, also when its first start was cut short.
    """
    if options.private is None:
        return data.swarm_key()
    return data.make_private(Path(options.private) if options.private else None, RealHost().entropy)


def _refuse_other_swarm(options: argparse.Namespace, data: DataDir, ticket: Ticket) -> None:
    """A run is private from its founding on, or never: ``--private`` cannot change that later."""
    if options.private is None:
        return
    if ticket.psk is None:
        raise ConfigError(
            f"the data directory {data.path} holds the run {ticket.run_id.hex()[:8]} of an open swarm: a run cannot "
            "become private later, as tickets are out. Found another with another --data-dir"
        )
    if options.private and swarm_key.load_or_create(Path(options.private), RealHost().entropy) != ticket.psk:
        raise ConfigError(
            f"the data directory {data.path} holds the run {ticket.run_id.hex()[:8]} of a private swarm with another "
            f"key than {options.private}; leave out the key file to resume it"
        )


def _refuse_conflicts(options: argparse.Namespace, data: DataDir, record: NodeRecord) -> None:
    from ..learning.store import RunStore

    signed = RunStore(data.run_path).load_spec()
    if signed is None:
        return
    found = conflicts(options, signed.open(), record)
    if found:
        raise ConfigError(
            f"the data directory {data.path} already holds the run {signed.run_id.hex()[:8]}, which differs: "
            f"{'; '.join(found)}. Leave these out to resume it, or found another run with another --data-dir"
        )


def conflicts(options: argparse.Namespace, spec: RunSpec, record: NodeRecord) -> list[str]:
    """What was asked for on the command line and is not so in the run, each as a phrase."""
    given: list[tuple[str, object, object]] = [
        ("task", options.task, record.task or spec.task),
        ("--strategy", options.strategy, spec.strategy),
        ("--mode", options.mode, spec.mode),
        ("--rounds", options.rounds, spec.rounds),
        ("--min-peers", options.min_peers, spec.min_peers),
        ("--group", options.group, spec.group),
        ("--topology", options.topology, spec.topology),
        ("--codec", options.codec, spec.codec),
        ("--aggregator", options.aggregator, spec.aggregator),
        ("--audit", options.audit, spec.audit),
        ("--admission", options.admission, spec.admission),
        ("--seed", options.seed, spec.seed),
    ]
    cut = spec.pipeline
    given += [
        ("--stages", options.stages, cut.stages if cut else 0),
        ("--micro-batches", options.micro, cut.micro if cut else 0),
        ("--swap", options.swap, cut.swap if cut else False),
        ("--activations", options.activations, cut.codec if cut else "fp32"),
        ("--recovery", options.recovery, cut.recovery if cut else "checkfree"),
    ]
    args = dict(spec.strategy_args)
    given += [(f"--set {name}", value, args.get(name)) for name, value in options.strategy_args]
    return [
        f"{name} {asked} (it has {'another' if has is None else has})"
        for name, asked, has in given
        if asked is not None and asked != has
    ]


def _run(
    options: argparse.Namespace,
    data: DataDir,
    record: NodeRecord | None,
    *,
    ticket: Ticket | None,
    psk: bytes | None = None,
) -> int:
    identity = data.identity(RealHost().entropy)
    bind, fallback = choose_bind(options.host, options.port, record)
    via = parse_via([*options.via, *(record.via if record is not None else ())])
    _load_torch(options.threads)
    from importlib.metadata import version

    from ..learning.checkpoints import Keeping
    from ..transport.traversal import Traversal
    from .console import Console
    from .daemon import Daemon, DaemonOptions, run_daemon
    from .node import Founding, NodeConfig

    configure_logging(options.log_level)
    device = _check_device(options.device)
    founding = None
    if ticket is None:
        founding = Founding(
            strategy=options.strategy or "diloco",
            strategy_args=tuple(sorted(dict(options.strategy_args).items())),
            mode=options.mode or "available",
            group=options.group or 0,
            topology=options.topology or "",
            codec=options.codec or "fp32",
            aggregator=options.aggregator or "mean",
            audit=options.audit,
            admission=options.admission,
            min_peers=options.min_peers or 1,
            rounds=options.rounds or 0,
            seed=options.seed or 0,
            stages=options.stages or 0,
            micro=options.micro or 0,
            swap=bool(options.swap),
            activations=options.activations or "fp32",
            recovery=options.recovery or "checkfree",
        )
    task = options.task or (record.task if record is not None else "")
    config = NodeConfig(
        bind=bind,
        fallback=fallback,
        folder=data.run_path,
        documents=data.documents_path,
        version=version("shoal"),
        task=task,
        founding=founding,
        ticket=ticket,
        psk=psk,
        via=via,
        traversal=Traversal(turn=parse_turn(options.turn)),
        map_port=not options.no_port_mapping,
        device=device,
        train_apart=options.train_apart,
        time_budget=options.time_budget,
        evaluate_every=options.evaluate_every,
        faults=parse_faults(options.fault),
        snapshot=data.read_dht(),
        keeping=Keeping() if options.checkpoint_every is None else Keeping(options.checkpoint_every, apart=0.0),
        origin=getattr(options, "origin", None),
        whole=options.export is not None,
        memory=memory_of(device),
    )
    extra = DaemonOptions(task, remembered_hosts(options.host, record), parse_export(options.export), options.leash)
    return run_daemon(lambda: Daemon(RealHost(), identity, data, config, extra, Console()))


def choose_bind(
    hosts: Sequence[str], port: int | None, record: NodeRecord | None
) -> tuple[tuple[Address, ...], tuple[Address, ...]]:
    """Where to listen, and where instead if the port of an earlier life is taken (nowhere else for a port asked for).

    Raises :class:`ConfigError` for a host that is no IP address.
    """
    hosts = remembered_hosts(hosts, record)
    if port is None and record is not None and record.port != 0:
        return parse_hosts(hosts, record.port), parse_hosts(hosts, 0)
    return parse_hosts(hosts, port or 0), ()


def remembered_hosts(hosts: Sequence[str], record: NodeRecord | None) -> tuple[str, ...]:
    """What ``--host`` said, now or in an earlier life; empty: everywhere."""
    return tuple(hosts) or (tuple(filter(None, record.host.split(","))) if record is not None else ())


def parse_turn(text: str) -> TurnServer | None:
    """The TURN server of ``--turn``; None when there is none. Raises :class:`ConfigError`, without the password."""
    from ..transport.webrtc_signal import TurnServer

    try:
        return TurnServer.parse(text) if text else None
    except ValueError as error:
        raise ConfigError(f"--turn (or $SHOAL_TURN): {error}") from None


def parse_faults(texts: list[str]) -> Faults:
    """``hold:ROUND:PHASE``, ``spoil:ROUND``, ``flip:ROUND``, ``lie:NAME``, ``distort:NAME``: for tests, simulations."""
    from ..learning.faults import DISGUISES, DISTORTIONS, Faults

    hold, spoil, flip, disguise, distort = [], [], [], None, None
    for text in texts:
        kind, _, rest = text.partition(":")
        number, _, phase = rest.partition(":")
        if kind == "hold" and number.isdigit() and phase:
            hold.append((int(number), phase))
        elif kind == "spoil" and number.isdigit():
            spoil.append(int(number))
        elif kind == "flip" and number.isdigit():
            flip.append(int(number))
        elif kind == "lie" and rest in DISGUISES:
            disguise = DISGUISES[rest]()
        elif kind == "distort" and rest in DISTORTIONS:
            distort = DISTORTIONS[rest]
        else:
            raise ConfigError(f"--fault {text!r}: expected hold:ROUND:PHASE, spoil:ROUND or flip:ROUND")
    return Faults(tuple(hold), tuple(spoil), tuple(flip), disguise, distort)


def _load_torch(threads: int | None) -> None:
    """Import torch with ``threads`` threads, and what it would otherwise import later, on the event loop."""
    if threads is None:
        # One core is for the network and for whoever sits there. Torch's own choice, all of them, makes small models
        # hundreds of times slower as soon as something else runs: its threads wait for each other at every operation.
        given = os.environ.get("OMP_NUM_THREADS", "")
        threads = int(given) if given.isdigit() else max(1, (os.cpu_count() or 2) - 1)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    # The first optimiser imports this: a second or more, in which a running node would be deaf.
    import torch._dynamo

    torch.set_num_threads(threads)


def _check_device(name: str) -> str:
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--device {name!r} cannot be used here: {reason}") from None
    return name


def memory_of(device: str) -> int:
    """Bytes of memory of a torch ``device``; of the CPU what this machine, or the container that we are in, has. 0: not
    known."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_properties(device).total_memory
    if "SC_PHYS_PAGES" not in os.sysconf_names:
        return 0
    found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return max(0, found)
    return min(found, int(limit)) if limit.isdecimal() else max(0, found)
