"""`shoal lab averaging`: the field, its graphs and weights, what is said of a sweep, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import attrs
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from shoal.sim import cli
from shoal.sim.averaging_field import EVERY, FORMS, GRAPHS, Case, Field, Models, Outcome, meetings_of, run, weights_of
from shoal.sim.lab_averaging import Block, Sweep, sweep_over

FIELD = Field(rounds=15, steps=5, exchanges=5, rate=0.2)


def end(method: str, graph: str = "full", form: str = "pairs", seed: int = 0) -> Outcome:
    return run(Case(FIELD, method, graph, form, seed))


def test_models_that_began_apart_are_broken_by_plain_averaging_and_healed_by_the_correction() -> None:
    plain, corrected, same = end("plain"), end("corrected"), end("same init")
    assert plain.accuracy[-1] < 0.3 and plain.variance[-1] < 0.15
    assert corrected.accuracy[-1] > same.accuracy[-1] - 0.03 > 0.9
    assert 0.9 < corrected.variance[-1] < 2
    assert end("corrected", "ring", "neighbours").accuracy[-1] > 0.85


@pytest.mark.parametrize("method", ["dimat", "same init, corrected", "fedavg", "solo"])
def test_every_other_method_learns_too_and_repeats_itself(method: str) -> None:
    field = attrs.evolve(FIELD, rounds=6, exchanges=1)
    case = Case(field, method, "random", "pairs", 1)
    outcome = run(case)
    assert outcome == run(case) and len(outcome.accuracy) == 2
    assert outcome.accuracy[-1] > 0.3
    assert run(attrs.evolve(case, seed=2)) != outcome


def test_the_variants_of_the_target_and_the_digits_network_learn() -> None:
    field = attrs.evolve(FIELD, rounds=2 * EVERY, model="digits")
    for method in ("corrected:self", "corrected:conservative"):
        first, last = run(Case(field, method, "full", "pairs", 0)).accuracy
        assert last > max(first, 0.3)


def test_steps_of_all_models_at_once_are_those_of_each_alone() -> None:
    models = Models(FIELD, 0, same=False)
    images, labels = torch.randn(16, 8, 64), torch.randint(0, 10, (16, 8))
    vector = models.vectors()[3].requires_grad_()
    h = images[3]
    for layer in models.layers:
        assert layer.bias is not None
        end_ = layer.weight + layer.outputs * layer.inputs
        h = h @ vector[layer.weight : end_].view(layer.outputs, layer.inputs).T
        h = h + vector[layer.bias : layer.bias + layer.outputs]
        h = torch.tanh(h) if layer is not models.layers[-1] else h
    (gradient,) = torch.autograd.grad(F.cross_entropy(h, labels[3]), vector)
    models.step(images, labels)
    torch.testing.assert_close(models.vectors()[3], vector.detach() - FIELD.rate * gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("form", FORMS)
def test_mixing_weights_are_doubly_stochastic_and_mix_everybody(graph: str, form: str) -> None:
    meetings = meetings_of(Case(FIELD, "plain", graph, form, 3))
    product = np.eye(16)
    for _ in range(60):
        shares = weights_of(next(meetings))
        assert (shares >= 0).all() and (shares == shares.T).all()
        np.testing.assert_allclose(shares.sum(0), 1)
        np.testing.assert_allclose(shares.sum(1), 1)
        if form == "pairs":
            assert set(np.unique(shares)) <= {0.0, 0.5, 1.0}
        product = shares @ product
    assert product.min() > 0  # everybody has something of everybody


def test_ones_own_share_may_be_chosen() -> None:
    shares = weights_of([[1, 2], [0], [0]], own=0.4)
    np.testing.assert_allclose(shares, [[0.4, 0.3, 0.3], [0.6, 0.4, 0], [0.6, 0, 0.4]])


def outcome(last: float) -> Outcome:
    return Outcome((0.1, last), (1.0, 1.0), last)


def test_what_is_required_is_judged_where_exchanges_are_most_frequent() -> None:
    runs = {
        ("plain", "ring"): (outcome(0.1), outcome(0.2)), ("corrected", "ring"): (outcome(0.96), outcome(0.94)),
        ("same init", "ring"): (outcome(0.98),), ("fedavg", ""): (outcome(0.965),),
    }  # fmt: skip
    blocks = tuple(Block(attrs.evolve(FIELD, exchanges=n), runs) for n in (1, 5))
    sweep = Sweep(("plain", "corrected", "same init", "fedavg"), ("ring",), "pairs", 2, blocks, 1.0)
    holds = {text.split(": ", 1)[1]: held for held, text in sweep.verdicts()}
    assert holds == {
        "plain averaging ends at 15.0 (below 30)": True,
        "corrected ends at 95.0 (at least 95)": True,
        "corrected is -3.0 to same init (-2 at most)": False,
        "corrected is -1.5 to fedavg (-2 at most)": True,
    }


def test_a_sweep_runs_methods_without_a_graph_once() -> None:
    fields = [Field(rounds=2, steps=1, exchanges=1, peers=4, alpha=alpha) for alpha in (None, 0.1)]
    sweep = sweep_over(fields, ("plain", "solo"), ("ring", "full"), "pairs", 2, processes=1)
    for block in sweep.blocks:
        assert {key: len(found) for key, found in block.runs.items()} == {
            ("plain", "ring"): 2, ("plain", "full"): 2, ("solo", ""): 2,
        }  # fmt: skip
        assert block.accuracy("solo", "ring") == block.accuracy("solo", "full")
    assert sweep.blocks[0].runs != sweep.blocks[1].runs


@pytest.mark.process(computes=True)
def test_the_command_prints_tables_and_writes_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "lab averaging --rounds 2 --steps 1 --exchanges 1 --graphs ring,full --seeds 2 --peers 4 --processes 1"
    files = ["--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")]
    code = cli.main([*arguments.split(), "--methods", "plain; corrected; dimat, corrected; fedavg", *files])
    output = capsys.readouterr().out
    assert code == 1  # nothing is learned in two steps
    assert "Dirichlet 0.1" in output and "does not hold" in output and "barabasi" not in output
    written = json.loads((tmp_path / "out.json").read_text())
    assert [block["field"]["alpha"] for block in written["blocks"]] == [None, 0.1]
    assert (tmp_path / "out.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--methods", "plane"], "no method is called 'plane'"),
        (["--graphs", "star"], "unknown topology 'star'"),
        (["--exchanges", "2"], "2 exchanges cannot be spread evenly over 5 steps"),
        (["--form", "triples"], "--form"),
        (["--peers", "1"], "--peers"),
        (["--json", "/nowhere/at/all.json"], "there is no folder"),
    ],
)
def test_wrong_arguments_are_named_before_anything_runs(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = cli.main(["lab", "averaging", *arguments])
    except SystemExit as error:
        code = int(error.code or 0)
    assert code == 2
    assert words in capsys.readouterr().err
