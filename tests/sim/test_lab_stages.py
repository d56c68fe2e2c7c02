"""`shoal lab stages`: failures and virtual time, recoveries in a small pipeline, what is said of them, and refusals."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from pathlib import Path

import attrs
import pytest
import torch

from shoal.sim import cli
from shoal.sim.lab_stages import INNER, Block, Difference, Sweep, sweep_over
from shoal.sim.stages_field import (
    METHODS,
    RATES,
    TRAINED,
    WAYS,
    Case,
    Chain,
    Costs,
    Jump,
    Outcome,
    Shared,
    Start,
    failures,
    first_loss,
    run,
    times,
)  # fmt: skip
from shoal.sim.stages_models import PROBLEMS, STAGES, SWAPPED

COSTS = Costs()


def height(outcomes: list[Outcome], way: str, *stages: int) -> float:
    return statistics.fmean(p.height for o in outcomes for p in o.probes if p.way == way and p.stage in stages)


def whole(method: str, seeds: int = 2, iterations: int = 100) -> list[Outcome]:
    return [run(Case("teacher", method, 0, seed, iterations)) for seed in range(seeds)]


def test_random_weights_are_worse_than_a_copy_and_a_copy_than_the_average_and_swapping_helps_the_first_stage() -> None:
    straight, swapped = whole("none"), whole("none:swapped")
    assert height(straight, "random", *INNER) > height(straight, "copy", *INNER)
    assert height(straight, "copy", *INNER) > height(straight, "gradient", *INNER)
    assert height(straight, "copy", 0) > height(swapped, "copy", 0)
    # With one neighbour there is nothing to weigh.
    assert height(straight, "copy", 0) == height(straight, "average", 0)
    for outcome in straight:
        assert outcome.looks[-1][1] < outcome.looks[0][1] / 3


def test_a_run_repeats_itself_and_loses_what_its_trace_says() -> None:
    case = Case("teacher", "checkfree", 33, 1, 60)
    outcome = run(case)
    assert outcome == run(case)
    lost = [(i, s) for i, stages in enumerate(itertools.islice(failures(1, RATES[33]), 60)) for s in stages]
    assert [(jump.iteration, jump.stage) for jump in outcome.jumps] == lost and lost
    spared = run(attrs.evolve(case, method="checkfree:spared"))
    assert [jump.stage for jump in spared.jumps] == [s for _, s in lost if s in INNER]
    assert run(attrs.evolve(case, method="checkfree+")).looks != outcome.looks


def test_a_run_goes_on_to_its_target_but_not_for_ever() -> None:
    case = Case("teacher", "none", 0, 0, 40, target=0.0)
    assert run(case).looks[-1][0] == 50
    assert run(attrs.evolve(case, target=math.inf)).looks[-1][0] == 40


def test_failures_at_a_low_rate_are_among_those_at_a_higher_one_and_never_beside_each_other() -> None:
    low, high = (list(itertools.islice(failures(3, rate), 3000)) for rate in (0.01, 0.05))
    assert low[0] == high[0] == ()
    for few, many in zip(low, high, strict=True):
        assert all(b - a > 1 for a, b in itertools.pairwise(many))
        # Left out at the higher rate only for a neighbour that is lost too.
        assert all(stage in many or stage - 1 in many for stage in few)
    assert sum(map(len, high)) == pytest.approx(3000 * STAGES * 0.05, rel=0.15)


def test_every_method_is_charged_for_what_it_does() -> None:
    hours = times("none", 0, 0, 100, COSTS)
    assert hours[100] == pytest.approx(100 * 91.32 / 3600)
    assert times("redundant", 0, 33, 100, COSTS)[100] == pytest.approx(100 * 151.04 / 3600)
    struck = [i for i, lost in enumerate(itertools.islice(failures(0, RATES[33]), 100)) if lost]
    assert times("checkfree", 0, 33, 100, COSTS)[100] == pytest.approx((100 * 91.32 + 30 * len(struck)) / 3600)
    free = Costs(checkpoint=0.0, recovery=0.0, every=10)
    again = times("checkpoint", 0, 33, 100, free) * 3600 / free.iteration
    # By hand: the state falls back to the last multiple of ten, before the iteration in which something is lost.
    done, executed, first = 0, 0, {0: 0}
    for lost in itertools.islice(failures(0, RATES[33]), 10_000):
        if lost:
            done = 10 * (done // 10)
        done, executed = done + 1, executed + 1
        first.setdefault(done, executed)
    assert again[:101].tolist() == pytest.approx([first[i] for i in range(101)])
    assert math.isinf(times("checkpoint", 0, 33, 500, Costs(every=100_000))[500])
    assert COSTS.tuned(RATES[5]) > COSTS.tuned(RATES[33]) >= 1


@pytest.mark.parametrize("problem", PROBLEMS)
def test_every_way_to_recover_replaces_one_stage_and_its_moments(problem: str) -> None:
    chain = Chain(PROBLEMS[problem], 0)
    chain.step(*next(PROBLEMS[problem].batches(0)), swap=True)
    others = [{n: t.clone() for n, t in stage.state_dict().items()} for stage in chain.pipeline.stages]
    loss = chain.held_out()
    assert len(list(chain.probe(1))) == STAGES * len(WAYS)
    assert chain.held_out() == loss
    for way, stage in (("random", 1), ("skip", 2), ("gradient", 3), ("copy", STAGES - 1)):
        chain.recover(stage, way, 1)
        assert not chain.optimizers[stage].optimizer.state and chain.optimizers[stage].factor == 1.1
        others[stage] = {n: t.clone() for n, t in chain.pipeline.stages[stage].state_dict().items()}
    for stage, kept in zip(chain.pipeline.stages, others, strict=True):
        assert all(torch.equal(t, kept[n]) for n, t in stage.state_dict().items())
    x = torch.randn(2, 3, PROBLEMS[problem].width)  # type: ignore[attr-defined]
    assert torch.equal(chain.pipeline.stages[2](x), x)
    last, before = (chain.pipeline.stages[i].state_dict() for i in (STAGES - 1, STAGES - 2))
    assert all(torch.equal(last[name], before[name]) for name in last)
    assert sorted(SWAPPED) == list(range(STAGES)) and SWAPPED[:2] == (1, 0) and SWAPPED[-2:] == (5, 4)


# -- what is said ------------------------------------------------------------------------------------------------------


def outcome(*losses: float, jump: float = 0.1) -> Outcome:
    """A look each ten iterations; probes in which copies are as bad as ``jump``, random weights worse, averages not."""
    worse = {"random": 2 * jump, "copy": jump}
    probes = tuple(Jump(10, s, way, 0.0, worse.get(way, 0.0)) for way in WAYS for s in range(STAGES))
    looks = tuple((10 * i, loss) for i, loss in enumerate(losses))
    return Outcome(looks, (Jump(5, 2, "x", 1.0, 1.5),), probes)


def block(trained: Outcome, rate: int = 10) -> Block:
    runs = {
        ("none", 0): (outcome(4, 3, 2, 1),) * 2, ("none:swapped", 0): (outcome(4, 3, 2, 1, jump=0.05),) * 2,
        ("checkfree", rate): (trained,) * 2,
    }  # fmt: skip
    return Block("teacher", 30, Costs(), (rate,), ("none", "checkpoint", "redundant", "checkfree"), runs)


def test_verdicts_come_from_the_runs() -> None:
    good = block(outcome(4, 1, 1, 1))
    assert [holds for holds, _ in good.verdicts()] == [True] * 4
    assert good.hours("checkfree", 10) == pytest.approx([10 * 91.32 / 3600] * 2, rel=0.1)
    assert "checkfree is first" in good.remarks()[0] and "before checkpoint" not in good.remarks()[0]
    late = block(outcome(4, 4, 4, 4, 1))
    assert [holds for holds, _ in late.verdicts()] == [True, True, True, False]
    never = block(outcome(4, 4, 4, 4))
    assert math.isinf(never.hours("checkfree", 10)[0])
    told = (
        "teacher: checkfree reaches the target before checkpointing at 10 %, by nothing: 2 times it does not reach it"
    )
    assert never.verdicts()[-1] == (False, told)
    assert "redundant computation is before checkfree" in never.remarks()[0]
    # At rates of which the paper does not claim it, nothing is judged.
    assert len(block(outcome(4, 4), rate=33).verdicts()) == 3


def test_a_difference_within_the_spread_is_none() -> None:
    assert Difference((1.0, 1.1, 0.9)).clear
    assert not Difference((1.0, -0.9, 0.2)).clear
    assert not Difference((math.inf, 1.0)).clear and not Difference((-1.0,)).clear


def test_json_has_no_infinities() -> None:
    written = json.loads(Sweep((block(outcome(4, 4, 4, 4)),), 1.0).to_json())
    methods = {entry["method"]: entry for entry in written["blocks"][0]["methods"]}
    assert methods["checkfree"]["hours"] == [None, None]
    assert methods["checkpoint"]["outcomes"] == []


def test_a_sweep_trains_each_case_once() -> None:
    sweep = sweep_over(("teacher",), METHODS, (5, 33), 1, 20, COSTS, processes=1)
    (found,) = sweep.blocks
    assert set(found.runs) == {("none", 0), ("none:swapped", 0)} | {(m, r) for m in TRAINED for r in (5, 33)}
    assert found.final("checkpoint", 33) == found.final("none", 0)


@pytest.mark.parametrize(
    ("problem", "method", "rate"),
    [
        ("teacher", "checkfree", 33),
        ("teacher", "checkfree+", 33),
        ("teacher", "checkfree:spared", 16),
        ("gpt", "copy", 33),
    ],
)
def test_a_run_that_begins_with_what_others_trained_is_the_same_to_the_bit(
    problem: str, method: str, rate: int, tmp_path: Path
) -> None:
    seed = next(s for s in range(99) if 3 < first_loss(Case(problem, method, rate, s, 30)) < 25)
    case = Case(problem, method, rate, seed, 30, target=0.0)
    shared = Shared(tmp_path, ((method, rate),))
    whole = Case(problem, "none:swapped" if TRAINED[method].swap else "none", 0, seed, 30)
    assert shared(whole) == run(whole)
    (start,) = tmp_path.iterdir()
    expected = run(case)
    assert expected.jumps and shared(case) == expected
    # It is used, and not needed.
    found = Start.load(start)
    assert found is not None and found.done == first_loss(case)
    wrong = attrs.evolve(found, looks=((0, 7.0), *found.looks[1:]))
    wrong.save(start)
    assert shared(case).looks[0] == (0, 7.0)
    start.unlink()
    assert shared(case) == expected


def test_a_sweep_that_was_killed_goes_on_with_what_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sweep(methods: tuple[str, ...], folder: Path | None) -> list[dict[tuple[str, int], tuple[Outcome, ...]]]:
        found = sweep_over(("teacher",), methods, (33,), 1, 30, COSTS, processes=1, folder=folder)
        return [dict(block.runs) for block in found.blocks]

    expected = sweep(("copy", "random"), None)
    calls: list[Case] = []

    def counted(self: Shared, case: Case) -> Outcome:
        calls.append(case)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, case)

    real = Shared.__call__
    monkeypatch.setattr(Shared, "__call__", counted)
    with pytest.raises(KeyboardInterrupt):
        sweep(("copy", "random"), tmp_path)
    assert sweep(("copy", "random"), tmp_path) == expected
    # Two without failures and two with: three were done when it ended, and one again.
    assert len(calls) == 5
    assert sweep(("copy", "random"), tmp_path) == expected and len(calls) == 5
    assert not list(tmp_path.glob("starts-*"))
    # What cannot be read, or is of another version, is run again.
    (kept,) = list(tmp_path.glob("*.json"))[:1]
    kept.write_text(kept.read_text()[:50])
    assert sweep(("copy", "random"), tmp_path) == expected and len(calls) == 6
    monkeypatch.setattr("shoal.sim.lab_stages.version", lambda: "another")
    assert sweep(("copy", "random"), tmp_path) == expected and len(calls) == 10


@pytest.mark.process(computes=True)
def test_the_command_prints_tables_and_writes_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "lab stages --problems teacher --rates 10,33 --iterations 40 --seeds 2 --processes 1"
    files = ["--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")]
    files += ["--markdown", str(tmp_path / "out.md")]
    code = cli.main([*arguments.split(), "--methods", "none,checkpoint,redundant,checkfree,checkfree+", *files])
    output = capsys.readouterr().out
    assert "33 %: " in output and "squared" in output and "holds" in output
    written = json.loads((tmp_path / "out.json").read_text())
    assert code == (0 if all(verdict["holds"] for verdict in written["verdicts"]) else 1)
    assert (tmp_path / "out.png").stat().st_size > 10_000
    tables = (tmp_path / "out.md").read_text()
    assert "| `checkfree+` | 33 |" in tables and "| seconds of a checkpoint | 10 % | 33 % |" in tables
    assert "| swapping makes the loss of a copied first stage cheaper | " in tables


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--methods", "checkfre"], "no method is called 'checkfre'"),
        (["--problems", "student"], "no problem is called 'student'"),
        (["--rates", "7"], "no probabilities are known for 7 % per hour"),
        (["--iterations", "3"], "--iterations"),
        (["--recovery", "-1"], "--recovery"),
        (["--json", "/nowhere/at/all.json"], "there is no folder"),
        (["--markdown", "/nowhere/at/all.md"], "there is no folder"),
        (["--resume", "/dev/null/runs"], "cannot make the folder /dev/null/runs"),
    ],
)
def test_wrong_arguments_are_named_before_anything_runs(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = cli.main(["lab", "stages", *arguments])
    except SystemExit as error:
        code = int(error.code or 0)
    assert code == 2
    assert words in capsys.readouterr().err
