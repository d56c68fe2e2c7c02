"""The matrix of strategies: what it runs, what it says, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shoal.learning.tasks.digits import Digits
from shoal.sim.cli import main
from shoal.sim.field import FieldPoint
from shoal.sim.lab_strategies import SETTINGS, Block, Method, case_of, reaching, sweep_over
from shoal.transport.errors import ConfigError


def point(round: int, metric: float, seconds: float = 0.0) -> FieldPoint:
    return FieldPoint(round, seconds, 100 * round, (100 * round,), 1.0, metric, metric, None, 1)


def test_a_method_is_a_strategy_with_arguments() -> None:
    method = Method.parse("streaming:bits=4,overlap=2")
    assert (method.strategy, dict(method.args)) == ("streaming", {"bits": 4.0, "overlap": 2.0})
    with pytest.raises(ConfigError, match="unknown strategy 'stream'"):
        Method.parse("stream")
    with pytest.raises(ConfigError, match="'overlap' is no name=value of strategy streaming"):
        Method.parse("streaming:overlap")
    with pytest.raises(ConfigError, match="strategy diloco has no parameter 'bits'"):
        Method.parse("diloco:bits=4")


def test_all_methods_train_the_same_number_of_steps() -> None:
    task = Digits()
    for text, rounds in (("allreduce", 600), ("diloco:inner_steps=20", 30), ("streaming:inner_steps=30", 60)):
        assert Method.parse(text).rounds(task, 600) == rounds


def test_every_fourth_peer_of_mixed_lines_is_slow() -> None:
    case = case_of("digits", None, "mixed", Method.parse("diloco"), 8, 100, 0)
    assert [number for number, _ in case.slowness] == [3, 7]
    assert case.links.line(3).up < case.links.line(2).up
    assert case_of("digits", None, "home", Method.parse("diloco"), 8, 100, 0).slowness == ()


def test_the_target_is_nine_tenths_of_what_data_parallel_training_gains() -> None:
    runs = {"allreduce": ((point(0, 0.1), point(9, 0.9)),), "diloco": ((point(0, 0.1), point(9, 0.95)),)}
    block = Block("digits", None, "home", runs)
    assert block.target(True) == pytest.approx(0.82)
    assert Block("digits", None, "home", {"diloco": runs["diloco"]}).target(True) == pytest.approx(0.1 + 0.9 * 0.85)
    run = (point(0, 3.0), point(1, 2.0), point(2, 1.0))
    assert reaching(run, 2.5, False) == run[1]
    assert reaching(run, 5.0, True) is None


def test_a_sweep_runs_every_combination_and_says_what_it_cost() -> None:
    methods = [Method.parse("diloco:inner_steps=5"), Method.parse("async:inner_steps=5")]
    sweep = sweep_over(["digits"], [None, 0.1], ["home", "datacentre"], methods, 3, 20, 2, processes=1)
    titles = [f"digits, {split}, {lines}" for split in ("IID", "Dirichlet 0.1") for lines in ("home", "datacentre")]
    assert [block.title for block in sweep.blocks] == titles
    for block in sweep.blocks:
        assert {name: len(runs) for name, runs in block.runs.items()} == {m.text: 2 for m in methods}
        for runs in block.runs.values():
            assert all(run[0].round == 0 and run[-1].round == 4 for run in runs)
    home, datacentre = sweep.blocks[:2]
    for name in home.runs:
        # What is learnt does not depend on how fast it travels.
        assert home.runs[name][0][-1].metric == datacentre.runs[name][0][-1].metric
        assert home.runs[name][0][-1].seconds > datacentre.runs[name][0][-1].seconds
    assert home.runs["async:inner_steps=5"][0][-1].seconds < home.runs["diloco:inner_steps=5"][0][-1].seconds
    assert len(json.loads(sweep.to_json())["blocks"]) == 4


def test_the_command_writes_its_figures_and_names_what_it_cannot_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [
        "lab",
        "strategies",
        "--peers",
        "2",
        "--steps",
        "10",
        "--seeds",
        "1",
        "--alpha",
        "iid",
        "--processes",
        "1",
    ]
    files = ["--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")]
    assert main([*common, "--lines", "home", "--methods", "diloco:inner_steps=5,outer_lr=1 local", *files]) == 0
    shown = capsys.readouterr().out
    assert "digits, IID, home" in shown and "diloco:inner_steps=5,outer_lr=1" in shown
    assert json.loads((tmp_path / "a.json").read_text())["steps"] == 10
    assert (tmp_path / "a.png").stat().st_size > 10_000
    assert main([*common, "--lines", "wet"]) == 2
    assert f"no kind of lines is called 'wet'; there are {', '.join(SETTINGS)}" in capsys.readouterr().err
    assert main([*common, "--methods", "dilico"]) == 2
    assert "unknown strategy 'dilico'" in capsys.readouterr().err
