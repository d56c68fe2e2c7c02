"""Runs that a joiner must not follow, whoever signed them; and what is only worth a warning."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs
import pytest
import trio

from shoal.dht.kademlia.node import Dht
from shoal.learning.membership import certify
from shoal.learning.rounds.messages import CommitRecord
from shoal.learning.spec import BadSpec, RunSpec, SignedSpec
from shoal.learning.sync import HEAD, AskHead, HeadInfo
from shoal.learning.task import resolve, signature, source_hash, title
from shoal.node.cli import USAGE, main
from shoal.node.node import Founding, Node, NodeConfig
from shoal.node.ticket import Ticket
from shoal.sim.virtual import VirtualHost
from shoal.transport.address import Address
from shoal.transport.aead import NOMINAL_CIPHERS
from shoal.transport.endpoint import Endpoint
from shoal.transport.errors import DecodeError
from shoal.transport.host import RealHost
from shoal.transport.identity import Identity
from shoal.transport.memory import MemoryWorld
from shoal.transport.rpc import Call

from ..sim import tiny

FOUNDER = Identity(b"f" * 32)


def spec(**changes: object) -> RunSpec:
    task = tiny.Pull()
    fair = RunSpec(
        task=title(task), task_hash=source_hash(task), strategy="diloco", strategy_args=tiny.PLAIN, seed=0,
        mode="available", group=0, min_peers=1, rounds=0, parameters=signature(task.model()),
        founder=FOUNDER.peer_id, created=1.8e9,
    )  # fmt: skip
    return attrs.evolve(fair, **changes)


def head_of(signed: SignedSpec, endpoint: Endpoint) -> HeadInfo:
    """What the founder of a run says before the first round."""
    record = CommitRecord(
        run=signed.run_id, round=0, kind="genesis", prev=signed.run_id, members=(), samples=(), weights=(),
        roster=(endpoint.peer_id,), total=0, branch=0, state=b"", nonces=(), algorithm="", fingerprint=b"",
        reason="founded",
    )  # fmt: skip
    head = certify(endpoint, record, (endpoint.peer_id,))
    return HeadInfo(signed, head.record, head.certificate, head.voters, (), -1, b"", ())


@contextmanager
def founder_of(run: RunSpec) -> Iterator[str]:
    """The ticket of a founder, in a thread of its own, who has signed ``run`` and hands it out."""
    ready, tickets = threading.Event(), list[str]()
    token: list[trio.lowlevel.TrioToken] = []
    done = trio.Event()

    async def serve() -> None:
        endpoint = Endpoint(RealHost(), FOUNDER)
        Dht(endpoint)
        signed = SignedSpec.sign(FOUNDER, run)

        async def head(call: Call[AskHead]) -> HeadInfo:
            return head_of(signed, endpoint)

        endpoint.serve(HEAD, head)
        async with trio.open_nursery() as nursery:
            await nursery.start(endpoint.run, [Address("tcp", "127.0.0.1", 0)])
            token.append(trio.lowlevel.current_trio_token())
            tickets.append(Ticket(signed.run_id, FOUNDER.peer_id, endpoint.addresses()).encode())
            ready.set()
            await done.wait()
            nursery.cancel_scope.cancel()

    thread = threading.Thread(target=trio.run, args=(serve,), daemon=True)
    thread.start()
    assert ready.wait(20.0)
    yield tickets[0]
    token[0].run_sync_soon(done.set)
    thread.join(20.0)


@pytest.mark.process
@pytest.mark.parametrize(
    ("changes", "message", "process"),
    [
        ({"task": "os:system"}, "run spec names a module ('os:system'); the network never names code", True),
        ({"task": "evil.payload"}, "run spec names a module ('evil.payload')", False),
        ({"task": "\x1b[2Jcleared"}, "run spec with the task name", False),
        ({"task": "digits", "strategy": "shoal.evil"}, "unknown strategy 'shoal.evil'", False),
        ({"task": "digits"}, "the model does not match the run's", True),
    ],
)
def test_joining_a_run_that_asks_for_what_nobody_may_ask_is_refused_at_once(
    changes: dict[str, str], message: str, process: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """``process``: a command of its own, once for each of the two places where a run is refused (its spec, its model);
    the others call what the command calls, and start no torch."""
    arguments = ["join", "--host", "127.0.0.1", "--data-dir", str(tmp_path / "b")]
    with founder_of(spec(**changes)) as ticket:
        if process:
            done = subprocess.run(
                [sys.executable, "-m", "shoal.node.process", *arguments, ticket], cwd=tmp_path, capture_output=True,
                text=True, timeout=60.0, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
            )  # fmt: skip
            code, said, error = done.returncode, done.stdout, done.stderr
        else:
            monkeypatch.chdir(tmp_path)
            monkeypatch.setenv("OMP_NUM_THREADS", "1")
            interval = sys.getswitchinterval()
            code = main([*arguments, ticket])
            sys.setswitchinterval(interval)
            said, error = capsys.readouterr()
    assert code == USAGE, error
    assert message in error
    assert "\x1b[2J" not in error
    assert "Traceback" not in error
    assert "trying again" not in error + said


@pytest.mark.parametrize(
    "changes",
    [
        {"task": ""},
        {"task": "a" * 65},
        {"task": "a b"},
        {"task": "../../tmp/evil"},
        {"mode": "anarchy"},
        {"min_peers": -1},
        {"rounds": -5},
        {"group": -2},
    ],
)
def test_a_spec_that_only_its_founder_can_have_spoilt_is_told_from_one_that_was_altered(
    changes: dict[str, object],
) -> None:
    with pytest.raises(BadSpec):
        SignedSpec.sign(FOUNDER, spec(**changes)).open()
    fair = SignedSpec.sign(FOUNDER, spec())
    assert fair.open() == spec()
    stranger = Identity(b"s" * 32)
    with pytest.raises(DecodeError, match="wrong signature") as caught:
        SignedSpec(fair.spec, stranger.sign(fair.spec)).open()
    assert not isinstance(caught.value, BadSpec)


SOURCE = """
import torch
from torch import nn
from shoal import Task

class Line(Task):
    inputs = {inputs}
    def model(self):
        return nn.Linear(self.inputs, 1)
    def optimizer(self, model):
        return torch.optim.SGD(model.parameters(), lr=0.02)
    def batches(self, shard):
        while True:
            yield torch.ones(8, self.inputs)
    def loss(self, model, batch):
        return {factor} * (model(batch) - 1).square().mean()
    def evaluate(self, model):
        return {{"bias": float(model.bias)}}
"""


def module(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch, *, inputs: int = 3, factor: str = "1.0") -> str:
    (folder / f"{name}.py").write_text(SOURCE.format(inputs=inputs, factor=factor))
    monkeypatch.syspath_prepend(str(folder))
    return f"{name}:Line"


async def test_a_task_of_other_source_but_the_same_model_only_warns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = module(tmp_path, "line_of_the_founder", monkeypatch)
    theirs = module(tmp_path, "line_of_another", monkeypatch, factor="2.0")
    notes: dict[str, list[str]] = {}
    world = MemoryWorld(random.Random(0))

    def node(name: str, task: str, ticket: Ticket | None) -> Node:
        host = VirtualHost(name, world, seed=1)
        host.ciphers = NOMINAL_CIPHERS
        config = NodeConfig(
            bind=(Address("mem", name, 1),),
            task=task,
            ticket=ticket,
            founding=None if ticket else Founding(rounds=6),
        )
        return Node(host, Identity(name.encode().ljust(32)), config, on_note=notes.setdefault(name, []).append)

    async with trio.open_nursery() as nursery:
        founder = node("a", ours, None)
        await nursery.start(founder.run)
        ticket = founder.ticket()
        for name, task in (("b", ours), ("c", theirs)):
            await nursery.start(node(name, task, ticket).run)
        nursery.cancel_scope.cancel()
    assert notes["b"] == []
    (warning,) = notes["c"]
    assert "warning: the source of task Line here differs from the founder's" in warning


def test_joining_with_other_layer_sizes_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    theirs = module(tmp_path, "line_of_another_width", monkeypatch, inputs=5)
    parameters = signature(resolve(module(tmp_path, "line_of_three", monkeypatch), allow_import=True).model())
    interval = sys.getswitchinterval()
    with founder_of(spec(task="Line", parameters=parameters)) as ticket:
        arguments = ["join", ticket, "--task", theirs, "--host", "127.0.0.1", "--data-dir", str(tmp_path / "b")]
        assert main(arguments) == USAGE
    sys.setswitchinterval(interval)
    error = capsys.readouterr().err
    assert "the model does not match the run's" in error
    for part in ("weight", "1x5", "1x3"):
        assert part in error
