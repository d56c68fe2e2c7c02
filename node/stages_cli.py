"""The arguments that say how a model is cut into stages."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def add_stages(group: argparse._ActionsContainer, count: Callable[[str], int], positive: Callable[[str], int]) -> None:
    """``count`` and ``positive``: parsers of numbers."""
    group.add_argument(
        "--stages", type=count, metavar="N",
        help="cut the model into N stages, each held by other peers: for models larger than one peer; begins once N "
        "peers are there; see docs/stages.md",
    )  # fmt: skip
    group.add_argument(
        "--micro-batches", type=positive, metavar="N", dest="micro",
        help="parts of a batch that are under way between stages at once (default: as many as stages)",
    )  # fmt: skip
    group.add_argument(
        "--swap", action="store_true", default=None,
        help="half of the micro-batches pass the outer inner stages in swapped order, so that one can stand in for "
        "the other when it is lost (CheckFree+)",
    )  # fmt: skip
    group.add_argument(
        "--recovery", metavar="NAME",
        help="what a stage that nobody holds any more goes on with: checkfree (default: the mean of its neighbours, "
        "else what is kept), kept (the newest copy that others keep), copy (of the stage before), skip (nothing is "
        "added to what passes), random (drawn anew)",
    )  # fmt: skip
    group.add_argument(
        "--activations", metavar="CODEC",
        help="how activations and their gradients travel between stages: fp32 (default), bf16, int8",
    )  # fmt: skip
