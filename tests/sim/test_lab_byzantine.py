"""`shoal lab byzantine`: training with liars among the peers, sweeps of rules and attacks, what is said of them."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import attrs
import numpy as np
import pytest
import torch
from rich.console import Console

from shoal.sim import cli
from shoal.sim.byzantine_field import BACKGROUND, CLASSES, Case, Field, _Model, run, shifted
from shoal.sim.lab_byzantine import NONE, sweep_over, with_liars
from shoal.sim.sweep import run_all
from shoal.transport.errors import ConfigError

FIELD = Field(steps=60)


def accuracy(rule: str, attack: str = "", liars: int = 3, field: Field = FIELD, seed: int = 0) -> float:
    return run(Case(field, rule, attack, liars if attack else 0, seed)).accuracy


@pytest.mark.parametrize("hidden", [0, 9])
def test_gradients_of_all_peers_at_once_are_those_of_autograd(hidden: int) -> None:
    model = _Model(hidden, 3)
    model.vector += 0.1 * torch.randn(len(model.vector), generator=torch.Generator().manual_seed(1))
    images = torch.randn(4, 5, 64, generator=torch.Generator().manual_seed(2))
    labels = torch.randint(0, CLASSES, (4, 5), generator=torch.Generator().manual_seed(3))
    mine = model.gradients(images, labels)
    for peer in range(4):
        model.vector = model.vector.detach().requires_grad_()
        h, layers = images[peer], model._layers()
        for index, (weight, bias) in enumerate(layers):
            h = h @ weight.T + bias
            h = torch.relu(h) if index < len(layers) - 1 else h
        (theirs,) = torch.autograd.grad(torch.nn.functional.cross_entropy(h, labels[peer]), model.vector)
        torch.testing.assert_close(mine[peer], theirs, rtol=1e-4, atol=1e-6)


def test_a_run_is_the_same_for_the_same_seed_and_another_for_another() -> None:
    case = Case(FIELD, "flag", "gaussian", 3, 7)
    assert run(case) == run(case)
    assert run(case) != run(attrs.evolve(case, seed=8))


def test_liars_break_the_mean_and_not_a_robust_rule() -> None:
    assert accuracy("mean") > 0.93
    for attack in ("gaussian", "reverse"):
        assert accuracy("mean", attack) < 0.5
        for rule in ("trimmed_mean:f=3", "multikrum:f=3", "geometric_median", "flag"):
            assert accuracy(rule, attack) > 0.88, (rule, attack)


def test_a_rule_with_a_memory_finds_who_works_against_all_where_peers_miss_classes() -> None:
    field = attrs.evolve(FIELD, alpha=0.3, steps=100)
    for attack in ("signflip", "ipm", "optimal_ipm"):
        case = Case(field, "descent:f=3+mean", attack, 3, 0)
        outcome = run(case)
        assert outcome.accuracy > 0.92, attack
        assert outcome.accuracy > run(attrs.evolve(case, rule="normalise+mean")).accuracy - 0.01, attack
        assert outcome.quality is not None
        honest, liars = outcome.quality
        assert honest > 0.95 and liars < 0.2, (attack, honest, liars)


def test_what_is_remembered_belongs_to_peers_and_not_to_places_where_contributions_get_lost() -> None:
    field = attrs.evolve(FIELD, alpha=0.3, steps=100, loss=0.1)
    outcome = run(Case(field, "descent:f=3+mean", "ipm", 3, 0))
    assert outcome.accuracy > 0.9 and outcome.skipped == 0
    assert outcome.quality is not None and outcome.quality[1] < 0.3 < 0.9 < outcome.quality[0]


def test_a_model_that_liars_drive_to_infinity_ends_at_guessing() -> None:
    field = attrs.evolve(FIELD, hidden=8, rate=50.0, steps=100)
    for attack in ("reverse", "optimal_ipm"):
        assert accuracy("mean", attack, field=field) < 0.2


def test_several_numbers_of_liars_share_the_runs_without_any() -> None:
    sweep = sweep_over((attrs.evolve(FIELD, steps=5),), (1, 3), ("mean", "krum"), ("gaussian", "sleeper"), 1, 1)
    one, three = sweep.blocks
    assert one.cells["mean", NONE] == three.cells["mean", NONE]
    assert set(one.cells) == set(three.cells)
    assert one.worst("mean")[1] == "gaussian", "what is made against one rule does not count"
    assert any("sleeper" in line for line in sweep.distances())


def test_augmented_images_are_moved_down_and_right_over_the_background() -> None:
    images = torch.arange(64.0).expand(2, 3, 64)
    by = np.array([[[0, 0], [1, 0], [0, 2]], [[-1, -1], [0, -1], [7, 7]]])
    found = shifted(images, by).reshape(2, 3, 8, 8)
    whole = torch.arange(64.0).reshape(8, 8)
    assert torch.equal(found[0, 0], whole)
    assert torch.equal(found[0, 1, 1:], whole[:-1]) and bool((found[0, 1, 0] == BACKGROUND).all())
    assert torch.equal(found[0, 2, :, 2:], whole[:, :-2]) and bool((found[0, 2, :, :2] == BACKGROUND).all())
    assert torch.equal(found[1, 0, :-1, :-1], whole[1:, 1:]) and bool((found[1, 0, -1] == BACKGROUND).all())
    assert torch.equal(found[1, 1, :, :-1], whole[:, 1:])
    assert found[1, 2, 7, 7] == 0.0 and int((found[1, 2] != BACKGROUND).sum()) == 1


def test_augmented_data_are_harder_and_change_nothing_else() -> None:
    plain, moved = (accuracy("mean", field=attrs.evolve(FIELD, shift=shift)) for shift in (0, 1))
    assert 0.7 < moved < plain


def test_what_is_not_finite_reaches_no_rule() -> None:
    for rule in ("mean", "median", "flag", "krum:f=3"):
        assert accuracy(rule, "inf") > 0.9


def test_lost_contributions_leave_out_steps_for_which_too_few_are_left() -> None:
    lossy = attrs.evolve(FIELD, loss=0.5)
    outcome = run(Case(lossy, "multikrum:f=3", "gaussian", 3, 0))
    assert 0 < outcome.skipped < FIELD.steps
    assert outcome.accuracy > 0.85
    assert run(Case(lossy, "median", "gaussian", 3, 0)).skipped == 0


def test_fields_differ_in_what_their_label_says() -> None:
    field = Field(alpha=0.3, hidden=16, momentum=0.9, loss=0.1, noise=0.5, rate=0.3, steps=40)
    assert field.label == "Dirichlet 0.3, hidden 16, momentum 0.9, 10% lost, noise 0.5"
    assert Field(shift=1).label == "IID, shifted by up to 1"
    assert Field().label == "IID"
    assert run(Case(field, "mean", "", 0, 0)).accuracy > 0.3


def test_a_rule_is_told_how_many_liars_there_are_only_if_it_must_know() -> None:
    assert with_liars("median", 3) == "median"
    assert with_liars("krum", 3) == "krum:f=3"
    assert with_liars("multikrum:definition=byzfl", 2) == "multikrum:definition=byzfl,f=2"
    assert with_liars("nnm+geometric_median", 3) == "nnm+geometric_median:f=3"
    assert with_liars("krum:f=1", 3) == "krum:f=1"
    with pytest.raises(ConfigError, match="'medain'"):
        with_liars("medain", 3)


def test_a_sweep_runs_every_case_names_what_cannot_stand_and_judges_by_the_mean_without_attackers() -> None:
    sweep = sweep_over([attrs.evolve(FIELD, peers=9)], (4,), ("mean", "median", "krum"), ("gaussian",), 2, 1)
    (block,) = sweep.blocks
    assert set(block.cells) == {(rule, attack) for rule in ("mean", "median") for attack in (NONE, "gaussian")}
    assert "krum: f = 4 of 9 vectors cannot be tolerated" in block.impossible["krum"]
    assert block.drop("mean", NONE) == 0.0
    assert block.worst("mean") == (block.drop("mean", "gaussian"), "gaussian")
    assert sweep.recommended()[0] == "median"
    assert all(len(cell.values) == 2 for cell in block.cells.values())
    texts = [text for _, text in sweep.verdicts()]
    assert texts[0].startswith("median loses at most")


def test_the_command_writes_table_json_and_picture_and_says_what_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    code = cli.main(
        ["lab", "byzantine", "--rules", "flag,multikrum,normalise+mean", "--attacks", "gaussian", "--seeds", "2",
         "--steps", "40", "--alpha", "iid", "--processes", "1", "--json", str(out), "--plot", str(picture)]
    )  # fmt: skip
    said = capsys.readouterr().out
    written = json.loads(out.read_text())
    assert code == (0 if all(verdict["holds"] for verdict in written["verdicts"]) else 1)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "flag beats the mean by" in said
    assert "flag against normalise+mean" in said
    assert {cell["rule"] for cell in written["blocks"][0]["cells"]} == {"mean", "flag", "multikrum", "normalise+mean"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rules", "flag,medain"], "there is no 'medain'"),
        (["--attacks", "alei"], "no attack 'alei'"),
        (["--liars", "8"], "8 liars of 15 peers"),
        (["--liars", "x"], "--liars"),
        (["--alpha", "0"], "--alpha"),
        (["--momentum", "1"], "--momentum"),
        (["--json", "/nowhere/at/all.json"], "there is no folder"),
    ],
)
def test_wrong_arguments_are_named_before_anything_runs(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = cli.main(["lab", "byzantine", *arguments])
    except SystemExit as error:
        code = int(error.code or 0)
    assert code == 2
    assert words in capsys.readouterr().err


def children_of(pid: int) -> set[int]:
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            if int(stat.rpartition(")")[2].split()[1]) == pid:
                found.add(int(entry.name))
    return found


@pytest.mark.parametrize("grouped", [False, True])
def test_a_sweep_without_other_processes_says_how_far_it_came_too(grouped: bool) -> None:
    def run(case: int) -> int:
        if case == 2:
            raise BaseExceptionGroup("of a nursery", [KeyboardInterrupt()]) if grouped else KeyboardInterrupt
        return case

    console = Console(file=io.StringIO(), width=100)
    with pytest.raises(KeyboardInterrupt):
        run_all(run, [1, 2, 3], 1, console)
    assert isinstance(console.file, io.StringIO)
    assert "interrupted: 1 of 3 runs are done" in console.file.getvalue()
    with pytest.raises(BaseExceptionGroup):
        run_all(lambda case: _raise(BaseExceptionGroup("both", [KeyboardInterrupt(), ValueError()])), [1], 1, console)


def _raise(error: BaseException) -> int:
    raise error


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_sweep_that_is_broken_off_leaves_no_process_and_no_traceback(number: int) -> None:
    command = [sys.executable, "-m", "shoal.sim.cli", "lab", "byzantine", "--processes", "2", "--seeds", "3"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child:
        give_up = time.monotonic() + 60
        while len(started := children_of(child.pid)) < 2:
            assert time.monotonic() < give_up
            time.sleep(0.1)
        time.sleep(4.0)  # they have imported torch, and train
        started |= children_of(child.pid)
        child.send_signal(number)
        output, _ = child.communicate(timeout=30)
    assert child.returncode != 0
    assert "Traceback" not in output, output
    if number == signal.SIGINT:
        assert child.returncode == 130
        assert "interrupted: " in output
        assert "resource_tracker" not in output, output
    while any(Path(f"/proc/{pid}").exists() for pid in started):
        assert time.monotonic() < give_up + 30, "a process of the pool is left"
        time.sleep(0.1)
