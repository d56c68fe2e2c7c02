"""``bench.py kill``: one of four processes ends by SIGKILL in the middle of a reduce; how long it takes the others."""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import attrs
import trio

from .children import HEAD_START
from .processes import Child, ChildFailed, Children, act_all, ask_all, checked, children
from .report import Row, machine, show, write

PEERS = 4
#: Of the bytes that the victim sends in a phase, the part after which it dies.
MIDDLE, NEAR_THE_END = 0.5, 0.95
#: Seconds for one round with a loss in it.
PATIENCE = 150.0
#: Seconds that gloo gets to notice.
GLOO_PATIENCE = 30.0
STILL_WAITS = f"still waits after {GLOO_PATIENCE:.0f} s"
#: What was seen of others in this experiment on a machine of this kind; not measured here.
QUOTED = (("PCCL", "270–330"), ("torchft, its timeout at 5 s", "5300"), ("hivemind", "1500–23000"))


@attrs.frozen
class Case:
    """Who dies when. ``share``: of the bytes it sends in phase ``at``; ``owns``: whether it owns a slice."""

    name: str
    at: str
    share: float = 0.0
    leads: bool = False
    owns: bool = True


CASES = (
    Case("contributor, in mid scatter", "scatter", MIDDLE, owns=False),
    Case("owner, in mid scatter", "scatter", MIDDLE),
    Case("owner, before gather", "freeze"),
    Case("owner, in mid gather", "gather", MIDDLE),
    Case("owner, late in gather", "gather", NEAR_THE_END),
    Case("owner, with the result", "full"),
    Case("leader, in mid scatter", "scatter", MIDDLE, leads=True),
    Case("leader, before gather", "freeze", leads=True),
    Case("leader, in mid gather", "gather", MIDDLE, leads=True),
    Case("leader, before proposing", "propose", leads=True),
    Case("leader, before its commit", "commit", leads=True),
)


@attrs.define
class Peer:
    """A child, and how others reach it. ``number``: which vector it contributes; a successor takes it over."""

    number: int
    child: Child
    name: str
    address: str


class Team:
    """Four processes. Whoever is killed is replaced by a new one with another key."""

    def __init__(self, group: Children, elements: int, *, ring: bool) -> None:
        self._group, self._elements, self._ring = group, elements, ring
        self.peers: list[Peer] = []
        self._rounds = 0

    async def fill(self) -> None:
        """Start who is missing and let all find together."""
        taken = [peer.number for peer in self.peers]
        missing = [number for number in range(PEERS) if number not in taken]
        fresh = await self._group.start("victim", len(missing))
        hellos = await ask_all(fresh, "start")
        new = [Peer(n, c, h["peer"], h["address"]) for n, c, h in zip(missing, fresh, hellos, strict=True)]
        self.peers = new + self.peers
        everybody = [[peer.name, peer.address] for peer in self.peers]
        team = [peer.child for peer in self.peers]
        await ask_all(team, "meet", [{"rank": rank} for rank in range(PEERS)], everybody=everybody)
        numbers = {peer.name: peer.number for peer in self.peers}
        await ask_all(team, "prepare", elements=self._elements, numbers=numbers)

    async def begin(self, members: list[Peer], lazy: str = "") -> str:
        """Open a round of ``members``; returns the name of its leader."""
        self._rounds += 1
        team, voters = [peer.child for peer in members], [peer.name for peer in members]
        await ask_all(team, "group", voters=voters, name=f"round {self._rounds}", lazy=lazy, ring=self._ring)
        answers = await ask_all(team, "open", run=self._rounds % 100)
        return str(answers[0]["leader"])

    async def clean(self, members: list[Peer]) -> float:
        """A round of ``members`` in which nothing happens: its seconds."""
        await self.begin(members)
        team = [peer.child for peer in members]
        answers = await act_all(team)
        check(members, answers, "a clean round")
        if any(answer["members"] != sorted(peer.number for peer in members) for answer in answers):
            # Members stand in the order of their keys.
            found = {tuple(sorted(answer["members"])) for answer in answers}
            if found != {tuple(sorted(peer.number for peer in members))}:
                raise ChildFailed(f"a clean round without some of its members: {found}")
        return float(max(a["ended"] for a in answers) - min(a["began"] for a in answers))

    async def kill(self, case: Case, file: Path) -> tuple[float, list[dict[str, Any]], bool]:
        """A round with a victim: seconds from its end to the last survivor's result, answers, was it a member."""
        lazy = self.peers[0] if not case.owns else None
        leader = await self.begin(self.peers, lazy.name if lazy is not None else "")
        if lazy is not None and lazy.name == leader:
            lazy = self.peers[1]
            # The order of candidates depends on the round's name alone: the same round again, with another idle owner.
            await ask_all([p.child for p in self.peers], "lazy", name=lazy.name)
        victim = lazy or next(peer for peer in self.peers if (peer.name == leader) == case.leads)
        await victim.child.ask("arm", at=case.at, share=case.share, file=str(file))
        survivors = [peer for peer in self.peers if peer is not victim]
        answers: list[dict[str, Any]] = []
        at = time.monotonic() + HEAD_START

        async def last_words() -> None:
            try:
                await victim.child.ask("go", at=at, patience=PATIENCE)
            except ChildFailed:
                return
            raise ChildFailed(f"{victim.child.name} outlived its round ({case.name})")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(last_words)
            answers += await ask_all([peer.child for peer in survivors], "go", at=at, patience=PATIENCE)
        answers = await checked([peer.child for peer in survivors], answers)
        check(survivors, answers, case.name)
        self.peers = survivors
        await self._group.end(victim.child)
        seconds = max(answer["ended"] for answer in answers) - moment_in(file)
        return seconds, answers, victim.number in answers[0]["members"]


def moment_in(file: Path) -> float:
    """When the victim ended."""
    return float(file.read_text())


def check(members: list[Peer], answers: list[dict[str, Any]], what: str) -> None:
    """Every result is the mean over the committed members, the same bits everywhere."""
    for peer, answer in zip(members, answers, strict=True):
        if answer["wrong"] is not None:
            raise ChildFailed(f"{what}: {peer.child.name} holds a wrong result: {answer['wrong']}")
    if len({(answer["digest"], *answer["members"]) for answer in answers}) != 1:
        raise ChildFailed(f"{what}: the survivors hold different results")


async def run(options: argparse.Namespace) -> None:
    rows: list[Row] = []
    size = options.mb << 20
    cases = [case for case in CASES if options.only in case.name and (case.owns or not options.ring)]
    ends = None if options.seconds is None else trio.current_time() + options.seconds
    for case in cases:
        about = {"case": case.name, "peers": PEERS, "bytes": size, "ring": options.ring}
        rows.append(Row("kill", about, "shoal", "median_s"))
    cleans: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as folder:
        try:
            async with children() as group:
                team = Team(group, size // 4, ring=options.ring)
                await team.fill()
                for _ in range(options.warmup):
                    await team.clean(team.peers)
                for number in range(options.runs):
                    for case, row in zip(cases, rows, strict=True):
                        if ends is not None and number >= 1 and trio.current_time() > ends:
                            continue
                        await _turn(team, case, row, Path(folder) / "moment", cleans, verbose=options.verbose)
            if options.gloo:
                rows.append(await _gloo(size, min(3, options.runs), Path(folder)))
        finally:
            if cleans:
                _table(rows)
                write([row for row in rows if row.runs], options.json)


async def _turn(team: Team, case: Case, row: Row, file: Path, cleans: dict[str, list[float]], *, verbose: bool) -> None:
    """A clean round of all, a clean one of as many as will survive, and the one with the kill."""
    everybody = await team.clean(team.peers)
    few = await team.clean(team.peers[1:])
    seconds, answers, member = await team.kill(case, file)
    row.runs.append(seconds)
    cleans.setdefault(case.name, []).append(few)
    extra = row.extra
    extra.setdefault("ratios", []).append(seconds / few)
    extra.setdefault("clean_few_s", []).append(few)
    extra.setdefault("clean_all_s", []).append(everybody)
    extra.setdefault("attempts", []).append(max(answer["attempts"] for answer in answers))
    extra.setdefault("epochs", []).append(
        sum(what == "begin" and phase == "scatter" for phase, what, _, _ in answers[0]["notes"])
    )
    extra.setdefault("victim_is_member", []).append(member)
    print(f"{case.name}: {seconds * 1e3:.0f} ms, clean {few * 1e3:.0f} ms", flush=True)
    if verbose:
        killed = moment_in(file)
        for answer in answers:
            for phase, what, at, detail in answer["notes"]:
                print(f"  {(at - killed) * 1e3:8.1f} {phase} {what} {detail[:100]}")
            print(f"  {(answer['ended'] - killed) * 1e3:8.1f} ended; cpu {answer['cpu'] * 1e3:.0f} ms")
    await team.fill()


async def _die(child: Child, at: float, after: float, file: Path) -> None:
    try:
        await child.ask("go", at=at, dies=after, file=str(file))
    except ChildFailed:
        return
    raise ChildFailed(f"{child.name} outlived its reduce")


async def _until_error(child: Child, at: float, ends: list[tuple[float, str]]) -> None:
    """Append when a survivor had an error or was ended by it, and what it said; infinity when it still waits."""
    began = time.monotonic()
    try:
        answer = await child.ask("go", at=at, patience=GLOO_PATIENCE)
    except ChildFailed as failure:
        ended = time.monotonic()
        waits = ended - began >= GLOO_PATIENCE
        text = str(failure).splitlines()[0].partition(child.name)[2].strip()
        ends.append((math.inf, STILL_WAITS) if waits else (ended, text))
    else:
        ends.append((answer["ended"], str(answer.get("wrong")).splitlines()[0]))


async def _gloo(size: int, runs: int, folder: Path) -> Row:
    """The same for gloo: seconds until the last survivor has an error."""
    row = Row("kill", {"case": "in mid all_reduce", "peers": PEERS, "bytes": size}, "gloo", "median_s")
    said, waited = "", 0
    for number in range(runs):
        async with children() as group:
            team = await group.start("gloo", PEERS)
            await ask_all(team, "start")
            each = [{"rank": rank} for rank in range(PEERS)]
            await ask_all(team, "meet", each, count=PEERS, file=str(folder / f"gloo {number}"))
            await ask_all(team, "prepare", elements=size // 4)
            clean = 0.0
            for turn in range(3):
                await ask_all(team, "open", run=turn)
                answers = await ask_all(team, "go", at=time.monotonic() + HEAD_START)
                clean = max(a["ended"] for a in answers) - min(a["began"] for a in answers)
            await ask_all(team, "open", run=3)
            moment = folder / f"moment of gloo {number}"
            survivors, at = team[:-1], time.monotonic() + HEAD_START

            async def victim(
                child: Child = team[-1], at: float = at, clean: float = clean, file: Path = moment
            ) -> None:
                try:
                    await child.ask("go", at=at, dies=clean / 2, file=str(file))
                except ChildFailed:
                    return

            ends: list[tuple[float, str]] = []
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_die, team[-1], at, clean / 2, moment)
                for child in survivors:
                    nursery.start_soon(_until_error, child, at, ends)
            last = max(ended for ended, _ in ends)
            waited += math.isinf(last)
            # What was not seen is no figure: such a run counts as our patience, and the table says so.
            row.runs.append(GLOO_PATIENCE if math.isinf(last) else last - moment_in(moment))
            said = "; ".join(dict.fromkeys(text for _, text in ends))
    row.extra = {"error": said, "still_waiting": waited, **machine()}
    return row


def _table(rows: list[Row]) -> None:
    columns = ("victim", "system", "median ms", "min", "max", "runs", "clean of 3", "× clean", "clean of 4", "plans")
    lines = []
    for row in rows:
        if not row.runs:
            continue
        figures = (f"{row.median * 1e3:.0f}", f"{min(row.runs) * 1e3:.0f}", f"{max(row.runs) * 1e3:.0f}")
        if row.system != "shoal":
            if row.extra["still_waiting"]:
                figures = (f"> {GLOO_PATIENCE * 1e3:.0f}", "", "")
            lines.append((row.case["case"], "gloo (error)", *figures, str(len(row.runs)), "", "", "", ""))
            continue
        extra = row.extra
        extra["ratio"] = statistics.median(extra["ratios"])
        extra.update(machine())
        lines.append(
            (
                row.case["case"],
                "shoal",
                *figures,
                str(len(row.runs)),
                f"{statistics.median(extra['clean_few_s']) * 1e3:.0f}",
                f"{extra['ratio']:.2f}",
                f"{statistics.median(extra['clean_all_s']) * 1e3:.0f}",
                f"{statistics.median(extra['epochs']):.0f}",
            )
        )
    lines += [("(quoted)", name, figure, "", "", "", "", "", "", "") for name, figure in QUOTED]
    facts = machine()
    notes = [
        f"From SIGKILL of 1 of {PEERS} processes to the last survivor's committed result; clean: a round of as many as "
        "survive, and of all, in turns with it; × clean: the median of the ratios, turn by turn.",
        "Every result was checked: the mean over the committed members, the same bits on all survivors. plans: of the "
        "round, the first one included.",
        "gloo: until the last survivor's error; it has no result. >: some survivor still waited when we looked away.",
        "quoted: seen on a machine of this kind, not in this run. "
        f"{facts['cores']} cores, load {facts['load'][0]} at the end.",
    ]
    show("kill: one fp32 tensor, one of four peers dies", columns, lines, notes)
