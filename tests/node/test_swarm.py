"""A user's own loops on real nodes: they meet, agree bit for bit, and say goodbye."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from shoal import Swarm
from shoal.node.ticket import Ticket
from shoal.transport.errors import ConfigError, PeerUnreachable

TRUTH = torch.tensor([[1.0, 2.0, -1.0]])


def make(seed: int, width: int = 3) -> tuple[nn.Linear, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Linear(width, 1)
    return model, torch.optim.SGD(model.parameters(), lr=0.05)


def loop(swarm: Swarm, model: nn.Linear, optimizer: torch.optim.Optimizer, seed: int, pause: float = 0.0) -> int:
    """Train until the run is over; returns the steps taken."""
    generator, steps = torch.Generator().manual_seed(seed), 0
    while True:
        x = torch.randn(16, 3, generator=generator)
        loss = (model(x) - x @ TRUTH.T).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
        time.sleep(pause)
        if not swarm.step(samples=16, loss=loss):
            return steps


@pytest.mark.process
def test_two_own_loops_train_one_model() -> None:
    model, optimizer = make(1)
    swarm = Swarm.start(
        model, optimizer, host="127.0.0.1", strategy_args={"inner_steps": 10}, rounds=8, min_peers=2,
        evaluate=lambda m: {"error": float((m.weight - TRUTH).abs().max())},
    )  # fmt: skip
    other_model, other_optimizer = make(2)
    found: dict[str, object] = {}

    def other() -> None:
        with Swarm.join(swarm.ticket, other_model, other_optimizer, host="127.0.0.1") as joined:
            found["start"] = other_model.weight.detach().clone()
            found["steps"] = loop(joined, other_model, other_optimizer, 2)
            found["finished"] = joined.finished

    start = model.weight.detach().clone()
    thread = threading.Thread(target=other)
    thread.start()
    with swarm:
        assert loop(swarm, model, optimizer, 1) == 80
        assert swarm.finished
        assert [len(report.members) for report in swarm.reports] == [2] * 8
        errors = [report.metric for report in swarm.reports]
    thread.join(20)
    assert found["finished"]
    assert found["steps"] == 80
    assert torch.equal(found["start"], start)  # type: ignore[arg-type]  # the founder's initial weights
    assert torch.equal(model.weight, other_model.weight)
    assert torch.equal(model.bias, other_model.bias)
    assert errors[-1] is not None
    assert errors[0] is not None
    assert errors[-1] < errors[0] / 4


@pytest.mark.process
def test_leaving_the_block_says_goodbye_within_two_seconds_and_a_data_directory_resumes(tmp_path: Path) -> None:
    model, optimizer = make(1)
    with Swarm.start(model, optimizer, host="127.0.0.1", strategy_args={"inner_steps": 5}, data_dir=tmp_path) as swarm:
        peer, ticket = swarm.peer, swarm.ticket
        while len(swarm.reports) < 3:
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            assert swarm.step()
        left = time.monotonic()
    assert time.monotonic() - left < 2.0
    status = swarm.status()
    assert status is not None
    assert status.round >= 3
    again, optimizer = make(7)
    with Swarm.start(again, optimizer, host="127.0.0.1", data_dir=tmp_path) as swarm:
        assert swarm.peer == peer
        assert Ticket.parse(swarm.ticket).run_id == Ticket.parse(ticket).run_id
        resumed = swarm.status()
        assert resumed is not None
        assert resumed.round >= 1


@pytest.mark.process
def test_another_model_than_the_runs_is_refused_by_name() -> None:
    model, optimizer = make(1)
    with Swarm.start(model, optimizer, host="127.0.0.1") as swarm:
        wider, its_optimizer = make(1, width=5)
        with pytest.raises(ConfigError, match=r"weight.*1x5.*1x3"):
            Swarm.join(swarm.ticket, wider, its_optimizer, host="127.0.0.1")


@pytest.mark.process
def test_nobody_there_to_join_is_said_with_the_reason() -> None:
    model, optimizer = make(1)
    with Swarm.start(model, optimizer, host="127.0.0.1") as swarm:
        ticket = swarm.ticket
    with pytest.raises(PeerUnreachable, match=r"could not join the run .* refused"):
        Swarm.join(ticket, model, optimizer, host="127.0.0.1", timeout=0.5)


def test_a_bad_ticket_is_refused_before_anything_starts() -> None:
    model, optimizer = make(1)
    with pytest.raises(ConfigError, match="is not a ticket"):
        Swarm.join("digits", model, optimizer)


@pytest.mark.process
def test_importing_shoal_loads_no_torch() -> None:
    code = "import sys, shoal; assert 'torch' not in sys.modules; shoal.ConfigError; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
