"""What is asked for on the command line against what a data directory already holds."""

from __future__ import annotations

import attrs
import pytest

from shoal.node.cli import build_parser
from shoal.node.datadir import NodeRecord
from shoal.node.launch import conflicts
from tests.learning.test_spec import SPEC

RECORD = NodeRecord("ticket", "digits", "", 4001, founder=True)
HELD = attrs.evolve(
    SPEC, aggregator="descent:f=1+mean", audit=1.0, admission=3, codec="int8", topology="ring", min_peers=3
)


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ([], []),
        (["--aggregator", "descent:f=1+mean", "--audit", "1", "--admission", "3", "--codec", "int8"], []),
        (["--topology", "ring"], []),
        (["--topology", "full"], ["--topology full (it has ring)"]),
        (["--aggregator", "median"], ["--aggregator median (it has descent:f=1+mean)"]),
        (["--audit", "0"], ["--audit 0.0 (it has 1.0)"]),
        (["--admission", "0"], ["--admission 0 (it has 3)"]),
        (["--admission", "4", "--min-peers", "5"], ["--min-peers 5 (it has 3)", "--admission 4 (it has 3)"]),
        (
            ["--set", "inner_steps=5", "--set", "x=1"],
            ["--set inner_steps 5.0 (it has 20.0)", "--set x 1.0 (it has another)"],
        ),
    ],
)
def test_what_a_run_has_otherwise_is_named(arguments: list[str], found: list[str]) -> None:
    options = build_parser().parse_args(["start", "digits", *arguments])
    assert conflicts(options, HELD, RECORD) == found
