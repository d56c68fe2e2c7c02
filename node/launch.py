"""`shoal start` and `shoal join`: from arguments to a running node process."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from typing import TYPE_CHECKING

from ..transport.address import Address
from ..transport.errors import ConfigError
from .datadir import DataDir, NodeRecord
from .ticket import Ticket

if TYPE_CHECKING:
    from ..learning.run import Faults
    from ..learning.spec import RunSpec

ALL_INTERFACES = "0.0.0.0"


def start(options: argparse.Namespace) -> int:
    """Found a run, or resume the one in the data directory."""
    data = DataDir(options.data_dir)
    if options.task and ":" in options.task:
        _check_module_form(options.task)
    data.create()
    with data.locked():
        record = data.read_record()
        if record is None and not options.task:
            raise ConfigError(
                f"the data directory {data.path} holds no run to resume: name a task (digits, stdlib or module:Class), "
                "or join a run with `shoal join TICKET`"
            )
        if record is not None:
            _refuse_conflicts(options, data, record)
        return _run(options, data, record, ticket=Ticket.parse(record.ticket) if record else None)


def join(options: argparse.Namespace) -> int:
    """Join the run of a ticket, or resume it where the data directory holds it already."""
    if options.task:
        _check_module_form(options.task)
    if options.ticket == "-":
        # The imports take longest, and whoever writes the ticket may still be working on it.
        _load_torch(options.threads)
        from . import daemon  # noqa: F401

        ticket = Ticket.parse(_read_line())
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


def _check_module_form(task: str) -> None:
    module, _, name = task.partition(":")
    if not name.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise ConfigError(f"{task!r} does not name a task: expected module:Class, for instance my_task:MyTask")


def _read_line() -> str:
    """One line from standard input, unbuffered: what follows it belongs to others."""
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(0, 1)):
        line += byte
    return line.decode("utf-8", "replace")


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
        ("--seed", options.seed, spec.seed),
    ]
    args = dict(spec.strategy_args)
    given += [(f"--set {name}", value, args.get(name)) for name, value in options.strategy_args]
    return [
        f"{name} {asked} (it has {'another' if has is None else has})"
        for name, asked, has in given
        if asked is not None and asked != has
    ]


def _run(options: argparse.Namespace, data: DataDir, record: NodeRecord | None, *, ticket: Ticket | None) -> int:
    _load_torch(options.threads)
    from ..transport.host import RealHost
    from .console import Console
    from .daemon import Daemon, DaemonOptions, run_daemon
    from .node import Founding, NodeConfig

    _configure_logging(options.log_level)
    device = _check_device(options.device)
    if options.export is not None and not options.export.absolute().parent.is_dir():
        raise ConfigError(f"cannot write {options.export}: there is no folder {options.export.absolute().parent}")
    identity = data.identity(RealHost().entropy)
    founding = None
    if ticket is None:
        founding = Founding(
            strategy=options.strategy or "diloco",
            strategy_args=tuple(sorted(dict(options.strategy_args).items())),
            mode=options.mode or "available",
            group=options.group or 0,
            min_peers=options.min_peers or 1,
            rounds=options.rounds or 0,
            seed=options.seed or 0,
        )
    task = options.task or (record.task if record is not None else "")
    bind, fallback = choose_bind(options.host, options.port, record)
    config = NodeConfig(
        bind=bind,
        fallback=fallback,
        folder=data.run_path,
        task=task,
        founding=founding,
        ticket=ticket,
        device=device,
        time_budget=options.time_budget,
        evaluate_every=options.evaluate_every,
        faults=parse_faults(options.fault),
        snapshot=data.read_dht(),
    )
    extra = DaemonOptions(task, bind[0].host, options.export.absolute() if options.export else None, options.leash)
    return run_daemon(lambda: Daemon(RealHost(), identity, data, config, extra, Console()))


def choose_bind(
    host: str | None, port: int | None, record: NodeRecord | None
) -> tuple[tuple[Address, ...], tuple[Address, ...]]:
    """Where to listen, and where instead if the port of an earlier life is taken (nowhere else for a port asked for).

    Raises :class:`ConfigError` for a host that is no IP address.
    """
    remembered = port is None and record is not None and record.port != 0
    number = record.port if remembered and record is not None else (port or 0)
    wanted = host or (record.host if record is not None else "") or ALL_INTERFACES
    try:
        first = Address("tcp", wanted, number)
    except ValueError:
        raise ConfigError(
            f"--host {host!r} is not an IP address; 0.0.0.0 listens on every interface, 127.0.0.1 on this machine only"
        ) from None
    return (first,), (Address("tcp", first.host, 0),) if remembered else ()


def parse_faults(texts: list[str]) -> Faults:
    """``hold:ROUND:PHASE`` and ``spoil:ROUND``, for tests and the simulator."""
    from ..learning.run import Faults

    hold, spoil = [], []
    for text in texts:
        kind, _, rest = text.partition(":")
        number, _, phase = rest.partition(":")
        if kind == "hold" and number.isdigit() and phase:
            hold.append((int(number), phase))
        elif kind == "spoil" and number.isdigit():
            spoil.append(int(number))
        else:
            raise ConfigError(f"--fault {text!r}: expected hold:ROUND:PHASE or spoil:ROUND")
    return Faults(tuple(hold), tuple(spoil))


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


def _configure_logging(level: str) -> None:
    logging.basicConfig(
        level=level.upper(), format="%(asctime)s %(levelname)-7s %(name)s: %(message)s", stream=sys.stderr, force=True
    )
