"""Bad input on the command line: the message says what is wrong and what to do, the exit code is 2."""

from __future__ import annotations

import logging
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.node.cli import OK, USAGE, main
from shoal.node.datadir import DataDir, NodeRecord
from shoal.node.ticket import Ticket
from shoal.sim import cli as sim_cli
from shoal.transport.address import Address
from shoal.transport.identity import Identity

TICKET = Ticket(b"r" * 32, Identity(b"f" * 32).peer_id, (Address("tcp", "127.0.0.1", 9),)).encode()

OTHER_TASK = """
from collections.abc import Iterator
import torch
from torch import nn
from shoal import Shard, Task

class Small(Task):
    width = 3
    def model(self) -> nn.Module:
        return nn.Linear(self.width, 1)
    def optimizer(self, model):
        return torch.optim.SGD(model.parameters(), lr=0.1)
    def batches(self, shard: Shard):
        rng = shard.generator("data")
        while True:
            yield torch.randn(8, self.width, generator=rng)
    def loss(self, model, batch):
        return (model(batch) - batch.sum(1, keepdim=True)).square().mean()
    def evaluate(self, model):
        return {"error": float((model.weight - 1).abs().max())}

class Wider(Small):
    width = 4

class Broken(Task):
    def model(self):
        return nn.Linear(1, 1)
"""


@pytest.fixture(autouse=True)
def _as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The command changes what belongs to its process; tests share theirs."""
    (tmp_path / "other_task.py").write_text(OTHER_TASK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    interval, path, root = sys.getswitchinterval(), list(sys.path), logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    sys.setswitchinterval(interval)
    sys.path[:] = path
    sys.modules.pop("other_task", None)
    root.handlers[:], root.level = handlers, level


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs the command; asserts exit code 2 and one sentence of error; returns it."""
    assert main(arguments) == USAGE
    error = capsys.readouterr().err
    assert error.startswith("shoal: error: ")
    assert "Traceback" not in error
    return error


# --- tickets ----------------------------------------------------------------------------------------------------------


def test_a_truncated_ticket(capsys: pytest.CaptureFixture[str]) -> None:
    assert f"cut short: {len(TICKET) - 20} of {len(TICKET)} characters" in refused(capsys, "join", TICKET[:-20])


def test_an_altered_ticket(capsys: pytest.CaptureFixture[str]) -> None:
    altered = TICKET[:50] + ("a" if TICKET[50] != "a" else "b") + TICKET[51:]
    assert "was altered: its checksum does not match" in refused(capsys, "join", altered)


def test_a_ticket_of_another_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert "version 2; the Shoal on this machine reads version 1" in refused(capsys, "join", "shoal2" + TICKET[6:])


def test_something_that_is_no_ticket(capsys: pytest.CaptureFixture[str]) -> None:
    assert "'digits' is not a ticket" in refused(capsys, "join", "digits")


# --- tasks and strategies ---------------------------------------------------------------------------------------------


def test_an_unknown_task_lists_the_built_in_ones(capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, "start", "digitz", "--host", "127.0.0.1")
    assert "unknown task 'digitz'" in error
    assert "digits" in error
    assert "module:Class" in error


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ("no_such_module:Thing", "no module 'no_such_module' here"),
        ("other_task:Missing", "module other_task has no class 'Missing'"),
        ("other_task:OTHER", "has no class 'OTHER'"),
        ("other_task:nn", "nn is not a subclass of shoal.Task"),
        ("other_task:Broken", "Broken lacks batches, evaluate, loss, optimizer"),
        ("other_task:", "does not name a task: expected module:Class"),
        ("a b:C", "does not name a task"),
    ],
)
def test_a_task_of_ones_own_that_cannot_be_had(capsys: pytest.CaptureFixture[str], task: str, reason: str) -> None:
    assert reason in refused(capsys, "start", task, "--host", "127.0.0.1")


def test_an_unknown_strategy_lists_the_built_in_ones(capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, "start", "digits", "--strategy", "fedavgm", "--host", "127.0.0.1")
    assert "unknown strategy 'fedavgm': built-in strategies are allreduce, async, co2, diloco" in error


def test_an_unknown_argument_of_a_strategy_lists_what_it_has(capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, "start", "digits", "--set", "inner_step=3", "--host", "127.0.0.1")
    assert "has no parameter 'inner_step'; it has inner_steps=20" in error


def test_private_before_the_task_does_not_take_it_for_a_key_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """``shoal start --private digits``: the run is digits, and no file of that name appears."""
    assert "--device 'warp' cannot be used" in refused(capsys, "start", "--private", "digits", "--device", "warp")
    assert not (tmp_path / "digits").exists()
    assert DataDir().swarm_key() is not None


def test_a_device_that_is_not_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--device 'warp' cannot be used here" in refused(capsys, "start", "digits", "--device", "warp")


# --- ports, addresses, files ------------------------------------------------------------------------------------------


def test_a_port_in_use_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = refused(capsys, "start", "digits", "--host", "127.0.0.1", "--port", str(port))
    assert str(port) in error
    assert "in use" in error


def test_a_host_name_where_an_address_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, "start", "digits", "--host", "localhost")
    assert "--host 'localhost' is not an IP address; 0.0.0.0 listens on every interface" in error


def test_a_key_file_that_others_can_read(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    data = DataDir(tmp_path / "data")
    data.create()
    data.identity(os.urandom)
    data.key_path.chmod(0o640)
    error = refused(capsys, "start", "digits", "--data-dir", str(data.path))
    assert f"the key file {data.key_path} can be read by others (mode 0640); run: chmod 600" in error


def test_a_data_directory_in_use_names_the_pid(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    hold = (
        "import sys; from pathlib import Path; from shoal.node.datadir import DataDir\n"
        "with DataDir(Path(sys.argv[1])).locked(): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        error = refused(capsys, "start", "digits", "--data-dir", str(tmp_path))
    assert f"a node (pid {child.pid}) already runs in {tmp_path}" in error


def test_an_export_into_a_folder_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    error = refused(capsys, "start", "digits", "--export", str(tmp_path / "nowhere" / "x.safetensors"))
    assert "there is no folder" in error


def test_an_export_without_any_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    error = refused(capsys, "export", str(tmp_path / "x.safetensors"))
    assert "there is nothing to export" in error


# --- no node, another run ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["status", "peers", "stop"])
def test_commands_without_a_node_say_how_to_start_one(capsys: pytest.CaptureFixture[str], command: str) -> None:
    error = refused(capsys, command)
    assert "no node is running here" in error
    assert "shoal start TASK" in error


def test_start_without_task_or_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert "holds no run to resume: name a task" in refused(capsys, "start")


def test_joining_another_run_than_the_data_directorys(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    data = DataDir(tmp_path / "data")
    data.create()
    other = Ticket(b"o" * 32, Identity(b"f" * 32).peer_id, ())
    data.write_record(NodeRecord(other.encode(), "digits", "127.0.0.1", 0, False))
    error = refused(capsys, "join", TICKET, "--data-dir", str(data.path))
    assert "holds another run (6f6f6f6f) than the ticket's (72727272)" in error
    assert "--data-dir" in error


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["start", "digits", "--set", "inner_steps"], "'inner_steps' is not NAME=NUMBER"),
        (["start", "digits", "--port", "70000"], "'70000' is not a port"),
        (["start", "digits", "--rounds", "-1"], "expected one argument|'-1' is not a whole number"),
        (["start", "digits", "--mode", "lenient"], "invalid choice: 'lenient'"),
        (["start", "digits", "--time-budget", "0"], "not a number of seconds above 0"),
        (["begin"], "invalid choice: 'begin'"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_wrong_usage_exits_with_2(capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == USAGE
    error = capsys.readouterr().err
    assert any(part in error for part in reason.split("|")), error


# --- help -------------------------------------------------------------------------------------------------------------


def test_help_shows_every_command_examples_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        sim_cli.main(["--help"])
    assert caught.value.code == OK
    text = capsys.readouterr().out
    for command in ("sim", "start", "join", "relay", "doctor", "status", "peers", "stop", "export", "doc"):
        assert f"\n    {command} " in text
    assert "examples:" in text
    assert "exit codes:" in text


@pytest.mark.parametrize(
    "command", ["sim", "start", "join", "relay", "doctor", "status", "peers", "stop", "export", "doc"]
)
def test_every_command_has_help(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit) as caught:
        sim_cli.main([command, "--help"])
    assert caught.value.code == OK
    assert f"usage: shoal {command}" in capsys.readouterr().out


@pytest.mark.process
@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["status"],
        ["start", "digitz"],
        ["start", "digits", "--strategy", "fedavgm"],
        ["start", "digits", "--via", "nowhere"],
        ["start", "no_such_module:Thing"],
        ["join", "shoal1abc"],
    ],
)
def test_light_commands_answer_at_once(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "shoal.node.process", *arguments]
    best = float("inf")
    for _ in range(5):  # processor time: the machine may be busy, and what counts is what the command itself needs
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, capture_output=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        best = min(best, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert best < 0.5


def test_a_turn_server_is_read_and_a_wrong_one_named_without_its_password() -> None:
    from shoal.node.launch import parse_turn
    from shoal.transport.errors import ConfigError

    assert parse_turn("") is None
    server = parse_turn("turn:me:secret@192.0.2.7:3478")
    assert server is not None
    assert (server.host, server.port, server.user, server.password) == ("192.0.2.7", 3478, "me", "secret")
    with pytest.raises(ConfigError, match=r"--turn .*turn:user:password@host:port") as caught:
        parse_turn("turn:me:secret@192.0.2.7")
    assert "secret" not in str(caught.value)
