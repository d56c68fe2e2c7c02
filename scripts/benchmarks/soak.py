"""``bench.py soak``: thousands of small reduces by real nodes; about once a second one is killed, stopped or back."""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import trio

from .processes import Child, ChildFailed, Children, children
from .report import Row, machine, show, write

#: Peers that are stopped like all others but never killed: what grows in them is a leak.
ELDERS = 2
#: Seconds of a stop.
STALL = 2.0
#: Seconds between two faults, at least and at most.
PAUSE = (0.5, 1.5)
#: Seconds without any committed round, or of one peer without one, after which the soak has failed. A round waits for
#: a stopped peer (2 s) or for stragglers (3 s), for a suspected leader (6 s, doubled with every turn of candidates),
#: and a majority may have to be started anew first, on a machine with fewer cores than processes.
HANG = 60.0
#: Seconds for a process to start and take part in the run.
START = 120.0
#: Seconds between two looks at what the processes take up.
LOOK = 2.0


@attrs.define(eq=False)
class Seat:
    """One peer through its lives. ``state``: ``down``, ``starting``, ``up`` or ``stalled``."""

    number: int
    key: str
    port: int = 0
    life: int = 0
    child: Child | None = None
    state: str = "down"
    since: float = 0.0
    round: int = 0
    heard: float = 0.0
    looks: list[dict[str, Any]] = attrs.field(factory=list)
    lock: trio.Lock = attrs.field(factory=trio.Lock)
    read: int = 0

    @property
    def elder(self) -> bool:
        return self.number < ELDERS


class Soak:
    """Runs it. Raises :class:`ChildFailed` that says what was found."""

    def __init__(self, group: Children, folder: Path, peers: int, seed: int, say: Callable[[str], None]) -> None:
        self._group, self._folder, self._say = group, folder, say
        self._draw = random.Random(f"soak {seed}")
        self.seats = [Seat(number, self._draw.randbytes(32).hex()) for number in range(peers)]
        #: Of each round: its digest and who said so first.
        self.digests: dict[int, tuple[str, int]] = {}
        self.walls: list[float] = []
        self.faults = {"kill": 0, "restart": 0, "stall": 0}
        self.longest = 0.0
        self._ticket = ""
        self._progress = 0.0
        self.checked = 0

    @property
    def head(self) -> int:
        return max(self.digests, default=0)

    # -- lives --------------------------------------------------------------------------------------

    async def start(self, seat: Seat) -> None:
        """Start a process, again with its key, port and folder; returns once it takes part."""
        seat.state, seat.life, seat.read = "starting", seat.life + 1, 0
        (seat.child,) = await self._group.start("soaker", 1)
        answer = await seat.child.ask(
            "begin",
            patience=START,
            folder=str(self._folder),
            number=seat.number,
            peers=len(self.seats),
            port=seat.port,
            ticket=self._ticket,
            key=seat.key,
            life=seat.life,
        )
        seat.port, self._ticket = answer["port"], answer["ticket"] or self._ticket
        seat.state, seat.since = "up", trio.current_time()
        seat.heard = seat.since

    async def kill(self, seat: Seat) -> None:
        child = seat.child
        assert child is not None
        seat.state = "down"
        child.signal(signal.SIGKILL)
        async with seat.lock:
            # Whoever was asking it has its error by now.
            await self._group.end(child)
            self._listen(seat)

    async def stall(self, seat: Seat) -> None:
        assert seat.child is not None
        seat.state = "stalled"
        seat.child.signal(signal.SIGSTOP)
        await trio.sleep(STALL)
        seat.child.signal(signal.SIGCONT)
        seat.state, seat.heard = "up", trio.current_time()

    # -- faults -------------------------------------------------------------------------------------

    async def torment(self, nursery: trio.Nursery) -> None:
        """For ever. A majority of all is always alive and awake, but for the time a start takes."""
        spare = (len(self.seats) - 1) // 2
        while True:
            await trio.sleep(self._draw.uniform(*PAUSE))
            up = [seat for seat in self.seats if seat.state == "up"]
            down = [seat for seat in self.seats if seat.state == "down"]
            may = len(self.seats) - len(up) < spare
            mortal = [seat for seat in up if not seat.elder]
            kinds = ["restart"] * bool(down) + (["stall"] + ["kill"] * bool(mortal)) * may
            if not kinds:
                continue
            kind = self._draw.choice(kinds)
            self.faults[kind] += 1
            match kind:
                case "restart":
                    seat = self._draw.choice(down)
                    seat.state = "starting"
                    nursery.start_soon(self.start, seat)
                case "kill":
                    seat = self._draw.choice(mortal)
                    await self.kill(seat)
                case "stall":
                    seat = self._draw.choice(up)
                    seat.state = "stalled"
                    nursery.start_soon(self.stall, seat)

    # -- watching -----------------------------------------------------------------------------------

    def _listen(self, seat: Seat) -> None:
        """Read what a peer has said about rounds since the last time, and hold it against what others said."""
        file = self._folder / f"rounds-{seat.number}-{seat.life}"
        if not file.exists():
            return
        with file.open("rb") as lines:
            lines.seek(seat.read)
            data = lines.read()
        whole = data[: data.rfind(b"\n") + 1]
        seat.read += len(whole)
        for line in whole.splitlines():
            round, digest, wall, wrong = json.loads(line)
            if wrong:
                raise ChildFailed(f"node {seat.number}: {wrong}")
            told, by = self.digests.setdefault(round, (digest, seat.number))
            if told != digest:
                raise ChildFailed(f"round {round}: node {seat.number} has state {digest[:16]}, node {by} {told[:16]}")
            self.checked += 1
            self.walls.append(wall)
            seat.round, seat.heard = round, trio.current_time()

    async def watch(self) -> None:
        """For ever: look for hangs, divergence and what grows."""
        self._progress, last, looked = trio.current_time(), 0, 0.0
        while True:
            await trio.sleep(0.1)
            now = trio.current_time()
            for seat in self.seats:
                if seat.state in ("up", "stalled"):
                    self._listen(seat)
            if self.head > last:
                self.longest = max(self.longest, now - self._progress)
                self._progress, last = now, self.head
            if now - self._progress > HANG:
                raise ChildFailed(f"no round for {HANG:.0f} s after round {last}\n{await self.describe()}")
            for seat in self.seats:
                if seat.state == "up" and now - seat.heard > HANG:
                    raise ChildFailed(
                        f"node {seat.number}: no round for {HANG:.0f} s after {seat.round}, others are at {last}\n"
                        f"{await self.describe()}"
                    )
            if now - looked > LOOK:
                looked = now
                async with trio.open_nursery() as nursery:
                    for seat in self.seats:
                        if seat.state == "up":
                            nursery.start_soon(self._look, seat)

    async def _look(self, seat: Seat) -> dict[str, Any] | None:
        child = seat.child
        assert child is not None
        async with seat.lock:
            if seat.child is not child or seat.state == "down":
                return None
            try:
                found = await child.ask("look", patience=STALL + 20.0)
            except ChildFailed:
                if seat.child is not child or seat.state == "down":
                    return None
                raise
        self._ticket = found["ticket"] or self._ticket
        if seat.elder:
            seat.looks.append({key: found[key] for key in ("rss", "fds", "tasks", "round")})
        return found

    async def describe(self) -> str:
        """What every peer says of itself, for an error."""
        parts = []
        for seat in self.seats:
            parts.append(f"  node {seat.number} is {seat.state}, life {seat.life}, round {seat.round}")
            if seat.state == "up" and (found := await self._look(seat)) is not None:
                parts.append(f"    {found['phase']}")
                parts += [f"    {event}" for event in found["events"][-12:]]
        return "\n".join(parts)

    # -- the whole ----------------------------------------------------------------------------------

    async def run(self, reduces: int, seconds: float | None) -> None:
        """Faults until ``reduces`` rounds or ``seconds`` have passed; then all must come together and end in order."""
        await self._begin()
        ends = trio.current_time() + (seconds if seconds is not None else float("inf"))
        told = trio.current_time()
        async with trio.open_nursery() as watching:
            watching.start_soon(self.watch)
            async with trio.open_nursery() as faults:
                torments = trio.CancelScope()
                faults.start_soon(self._torment, torments, faults)
                while self.head < reduces and trio.current_time() < ends:
                    await trio.sleep(0.1)
                    if trio.current_time() - told > 15.0:
                        told = trio.current_time()
                        self._say(f"round {self.head}; {self.faults}; longest without a round {self.longest:.1f} s")
                # Stops and starts that have begun end by themselves.
                torments.cancel()
            self._say(f"faults end at round {self.head}")
            await self._gather()
            watching.cancel_scope.cancel()
        await self._end()

    async def _torment(self, scope: trio.CancelScope, nursery: trio.Nursery) -> None:
        with scope:
            await self.torment(nursery)

    async def _begin(self) -> None:
        async with trio.open_nursery() as nursery:
            await self.start(self.seats[0])
            for seat in self.seats[1:]:
                nursery.start_soon(self.start, seat)

    async def _gather(self) -> None:
        """All are started; every one of them must commit ten more rounds."""
        async with trio.open_nursery() as nursery:
            for seat in self.seats:
                if seat.state == "down":
                    nursery.start_soon(self.start, seat)
        goal, limit = self.head + 10, trio.current_time() + 2 * HANG
        while any(seat.round < goal for seat in self.seats):
            if trio.current_time() > limit:
                raise ChildFailed(f"not all have come to round {goal}\n{await self.describe()}")
            await trio.sleep(0.1)

    async def _end(self) -> None:
        async def stop(seat: Seat) -> None:
            assert seat.child is not None
            async with seat.lock:
                answer = await seat.child.ask("stop", patience=30.0)
            if answer["outcome"] != "left":
                raise ChildFailed(f"node {seat.number} ended as {answer['outcome']!r}")
            self._listen(seat)

        async with trio.open_nursery() as nursery:
            for seat in self.seats:
                nursery.start_soon(stop, seat)


def growth(looks: list[dict[str, Any]], key: str) -> tuple[float, float]:
    """Medians of ``key`` in the second and in the last quarter of the looks: the first one warms up."""
    quarter = max(1, len(looks) // 4)
    early, late = looks[quarter : 2 * quarter] or looks, looks[-quarter:]
    return statistics.median(look[key] for look in early), statistics.median(look[key] for look in late)


def leaks(looks: list[dict[str, Any]], reduces: int) -> list[str]:
    """What has grown in a peer that lived from beginning to end, beyond what rounds to come would explain."""
    found = []
    for key, allowed in (("fds", 6.0), ("tasks", 30.0), ("rss", (24 << 20) + 1024.0 * reduces)):
        early, late = growth(looks, key)
        if late - early > allowed:
            found.append(f"{key} grew from {early:.0f} to {late:.0f}")
    return found


async def run(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="shoal-soak-") as folder:
        async with children() as group:
            soak = Soak(group, Path(folder), options.peers, options.seed, lambda text: print(text, flush=True))
            began = trio.current_time()
            await soak.run(options.reduces, options.seconds)
            seconds = trio.current_time() - began
    missing = [round for round in range(1, soak.head + 1) if round not in soak.digests]
    if missing:
        raise ChildFailed(f"nobody has reported rounds {missing[:10]}")
    lines, grown = [], []
    for seat in soak.seats[:ELDERS]:
        lines.append(
            (
                f"node {seat.number}",
                *(f"{a:.0f} → {b:.0f}" for a, b in (growth(seat.looks, key) for key in ("fds", "tasks"))),
                " → ".join(f"{value / 2**20:.1f}" for value in growth(seat.looks, "rss")),
            )
        )
        grown += [f"node {seat.number}: {text}" for text in leaks(seat.looks, soak.head)]
    walls = sorted(soak.walls)
    notes = [
        f"{soak.head} rounds in {seconds:.0f} s over {options.peers} processes (seed {options.seed}); {soak.faults}.",
        f"A round took {statistics.median(walls) * 1e3:.0f} ms (median), 99 % under "
        f"{walls[int(len(walls) * 0.99)]:.1f} s; the longest time without one was {soak.longest:.1f} s.",
        f"{soak.checked} reports of states compared, each round's mean computed by hand by one of the peers. "
        f"{os.cpu_count()} cores, load {machine()['load'][0]} at the end.",
    ]
    show("soak: what peers that were never killed take up", ("peer", "fds", "tasks", "RSS MiB"), lines, notes)
    row = Row("soak", {"peers": options.peers, "seed": options.seed}, "shoal", "median_s", walls)
    row.extra = {
        "rounds": soak.head,
        "seconds": seconds,
        "faults": soak.faults,
        "longest_s": soak.longest,
        "looks": {str(seat.number): seat.looks for seat in soak.seats[:ELDERS]},
        **machine(),
    }
    write([row], options.json)
    if grown:
        raise ChildFailed("leaks: " + "; ".join(grown))
