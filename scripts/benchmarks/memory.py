"""``bench.py memory``: what a process grows by at most in rounds of one codec, by processes that did nothing else."""

from __future__ import annotations

import argparse
from typing import Any

import attrs

from .processes import Child, ChildFailed, act_all, ask_all, children
from .report import Row, machine, show, write

#: The codecs, and how many times the tensor a process may grow by.
BOUNDS = {"fp32": 2.25, "int8": 1.6}
COLUMNS = ("peers, MiB", "codec", "most", "bound", "of it kept", "worst rank, round by round")


@attrs.define
class Rank:
    """What one process said after each round, in tensors."""

    peak: list[float] = attrs.field(factory=list)
    kept: list[float] = attrs.field(factory=list)


async def run(options: argparse.Namespace) -> None:
    rows = []
    lines = []
    for peers in options.peers:
        for codec, bound in BOUNDS.items():
            for mb in options.mb:
                ranks = await _measure(peers, mb << 20, codec, options.runs)
                row = Row("memory", {"peers": peers, "bytes": mb << 20, "codec": codec}, "shoal", "times")
                row.runs = [max(rank.peak) for rank in ranks]
                most = max(row.runs)
                worst = ranks[row.runs.index(most)]
                row.extra = {"bound": bound, "kept": max(worst.kept), "rounds": worst.peak, **machine()}
                rows.append(row)
                shown = ", ".join(f"{value:.2f}" for value in worst.peak)
                cells = (f"{most:.2f}", f"{bound}", f"{max(worst.kept):.2f}", shown)
                lines.append((f"{peers}, {mb}", codec, *cells))
                print(f"{peers} peers, {mb} MiB, {codec}: {most:.2f} × the tensor", flush=True)
    notes = [
        "Most: what a process had at most (VmHWM) since before its first round, less what it had then, ÷ bytes of the",
        "tensor, which is not in it; of all ranks and rounds, in fresh processes for each row. Kept: in their buffers.",
    ]
    show("memory: rounds of the group reduce, one fp32 tensor", COLUMNS, lines, notes)
    write(rows, options.json)


async def _measure(peers: int, size: int, codec: str, runs: int) -> list[Rank]:
    async with children() as group:
        team = await group.start("shoal", peers)
        hellos = await ask_all(team, "start")
        everybody = [[hello["peer"], hello["address"]] for hello in hellos]
        await ask_all(team, "meet", [{"rank": rank} for rank in range(peers)], everybody=everybody)
        await ask_all(team, "prepare", elements=size // 4)
        ranks = [Rank() for _ in team]
        for number in range(runs):
            for rank, answer in zip(ranks, await _once(team, number, codec), strict=True):
                rank.peak.append(answer["peak"] / size)
                rank.kept.append(answer["buffers"] / size)
        return ranks


async def _once(team: list[Child], number: int, codec: str) -> list[dict[str, Any]]:
    await ask_all(team, "open", run=number, codec=codec)
    answers = await act_all(team)
    for child, answer in zip(team, answers, strict=True):
        if answer["wrong"] is not None:
            raise ChildFailed(f"{child.name} holds a wrong result in run {number}: {answer['wrong']}")
    return answers
