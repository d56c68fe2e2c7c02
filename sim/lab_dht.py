"""`shoal lab dht`: a DHT of thousands of nodes in virtual time, and whether it finds what it should."""

from __future__ import annotations

import argparse
import functools
import math
import resource
import statistics
import sys
import time
from pathlib import Path

import attrs
import trio
from rich.console import Console

from ..dht.kademlia import defaults as kademlia
from ..dht.kademlia.keys import record_key
from ..dht.kademlia.records import SignedRecord, owned_key
from ..transport.errors import ConfigError
from ..transport.identity import Identity
from . import defaults
from .crowd import Crowd, CrowdScenario, Progress, run_crowd
from .lab_dht_report import Act, DhtReport, Health
from .liars import grind
from .outputs import check_outputs, write_text

#: Everything in a crowd's results: what a lookup did, in virtual time.
Lookups = list[Act]


@attrs.frozen
class Plan:
    """What is tried. ``lookups``: of nodes and of records in turns; ``records``: stored before; ``victims``: how many
    of them have their place crowded by adversaries; ``seconds``: over which the lookups are spread."""

    lookups: int
    records: int
    victims: int
    seconds: float


def dht(options: argparse.Namespace) -> int:
    """Run the trial that the command line asks for; 0 when every requirement holds."""
    console = Console(highlight=False)
    check_outputs(options.json, options.plot)
    if options.encrypted and options.nodes > 500:
        raise ConfigError("--encrypted runs every byte through real links: 500 nodes at most, 100 take some minutes")
    if options.adversaries and options.nodes < 200:
        raise ConfigError("with adversaries at least 200 nodes: fewer than 40 of them crowd no place")
    if options.churn and options.churn < defaults.MIN_SESSION:
        raise ConfigError(
            f"--churn: a mean session of {options.churn:g} s is too short, joining takes some seconds: "
            f"{defaults.MIN_SESSION:.0f} s or more"
        )
    scenario = CrowdScenario(
        nodes=options.nodes,
        seed=options.seed,
        session=options.churn,
        adversaries=options.adversaries,
        loss=options.loss,
        encrypted=options.encrypted,
    )
    seconds = options.time or (1200.0 if options.churn else options.lookups / defaults.LOOKUP_RATE)
    records = max(20, min(200, options.nodes // 10))
    victims = min(4, int(options.nodes * options.adversaries / 2) // defaults.ECLIPSE_SIZE)
    plan = Plan(options.lookups, records, victims, seconds)
    progress = _Telling(console, quiet=not sys.stderr.isatty() and not options.verbose)
    report = run_crowd(scenario, functools.partial(trial, plan=plan, progress=progress))
    progress.end()
    console.print(report.table())
    for line in report.complaints():
        console.print(f"[bold red]not as required:[/] {line}")
    if options.json is not None:
        write_text(options.json, report.to_json())
    if options.plot is not None:
        report.plot(options.plot)
        console.print(f"wrote {options.plot}")
    return 0 if not report.complaints() else 1


class _Telling:
    """Says on the terminal what is going on, a few times a second."""

    def __init__(self, console: Console, *, quiet: bool) -> None:
        self._console, self._quiet = console, quiet
        self._began = self._said = time.monotonic()

    def __call__(self, text: str) -> None:
        now = time.monotonic()
        if self._quiet or now - self._said < 0.5:
            return
        self._said = now
        line = f"{text} · {trio.current_time():,.0f} s virtual, {now - self._began:.0f} s real"
        self._console.print(f"\r{line:<100}", end="")

    def end(self) -> None:
        if not self._quiet:
            self._console.print("\r" + " " * 100 + "\r", end="")


async def trial(crowd: Crowd, *, plan: Plan, progress: Progress) -> DhtReport:
    """Bring up the crowd, store records, look up nodes and records, and report."""
    began = time.perf_counter()
    adversaries, victims = _adversaries(crowd, plan)
    await crowd.populate(adversaries, progress)
    booted, boot_queries = time.perf_counter() - began, crowd.queries()
    authors = _authors(crowd, plan)
    stored = await _store(crowd, authors, progress)
    messages, moved, since = crowd.network.messages, crowd.network.bytes, trio.current_time()
    acts: Lookups = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(crowd.churn)
        await _look_up(crowd, plan, authors, victims, acts, progress)
        nursery.cancel_scope.cancel()
    elapsed = trio.current_time() - since
    present = len(crowd.nodes)
    acts.sort(key=lambda act: (act.began, act.kind, act.mode))
    for act in acts:
        crowd.trace(
            act.began, f"{act.kind} {act.mode} {act.ok} {act.hops} {act.queries}", "", "", round(act.seconds * 1e6)
        )
    return DhtReport(
        nodes=crowd.scenario.nodes,
        seed=crowd.scenario.seed,
        session=crowd.scenario.session,
        adversaries=crowd.scenario.adversaries,
        loss=crowd.scenario.loss,
        encrypted=crowd.scenario.encrypted,
        k=kademlia.K,
        departed=crowd.departed,
        stored=statistics.mean(stored) if stored else 0.0,
        join_seconds=statistics.median(node.join_time for node in crowd.nodes.values()),
        join_queries=boot_queries / crowd.scenario.nodes,
        messages_per_node=(crowd.network.messages - messages) / present / elapsed if elapsed else 0.0,
        bytes_per_node=(crowd.network.bytes - moved) / present / elapsed if elapsed else 0.0,
        virtual_seconds=trio.current_time(),
        boot_wall=booted,
        wall=time.perf_counter() - began,
        memory_mib=_peak_memory(),
        acts=tuple(acts),
        health=_health(crowd),
        digest=crowd.trace.hexdigest(),
    )


def _peak_memory() -> float:
    """MiB that this process has held at most."""
    status = Path("/proc/self/status")
    if status.exists():
        # ru_maxrss of a process that was started by a large one is that one's: it survives the exec.
        lines = status.read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _adversaries(crowd: Crowd, plan: Plan) -> tuple[dict[int, tuple[Identity | None, str]], dict[int, int]]:
    """Numbers of adversaries with identity and kind, and places of records by record number that are to be crowded."""
    total = int(crowd.scenario.nodes * crowd.scenario.adversaries)
    # The first nodes are honest: somebody founds a swarm.
    numbers = crowd.rng.sample(range(min(20, crowd.scenario.nodes // 4), crowd.scenario.nodes), total)
    victims = {
        number: record_key("owned", _record_name(_author_of(crowd, number), number)) for number in range(plan.victims)
    }
    ground = [
        identity
        for number, place in victims.items()
        for identity in grind(
            f"{crowd.scenario.seed} gang {number}", place, crowd.scenario.nodes, defaults.ECLIPSE_SIZE
        )
    ]
    kinds: dict[int, tuple[Identity | None, str]] = {}
    for index, number in enumerate(sorted(numbers)):
        if index < len(ground):
            kinds[number] = ground[index], "eclipse"
        else:
            kinds[number] = None, ("drop", "lie")[index % 2]
    return kinds, victims


def _author_of(crowd: Crowd, number: int) -> Identity:
    """Authors publish through nodes but are nobody's identity: the node of one may leave, its records stay."""
    return Identity(f"author {crowd.scenario.seed} {number}".encode().ljust(32, b".")[:32])


def _record_name(author: Identity, number: int) -> bytes:
    return owned_key(author.peer_id, number.to_bytes(4, "big"))


def _authors(crowd: Crowd, plan: Plan) -> list[Identity]:
    return [_author_of(crowd, number) for number in range(plan.records)]


async def _store(crowd: Crowd, authors: list[Identity], progress: Progress) -> list[int]:
    """Every record through an honest node of chance; returns at how many peers each was stored."""
    counts: list[int] = []

    async def put(number: int, author: Identity) -> None:
        node = crowd.draw_honest()
        expires = node.host.wall() + kademlia.RECORD_LIFETIME / 2
        record = SignedRecord.sign(
            author, "owned", _record_name(author, number), b"value %d" % number, seq=1, expires=expires
        )
        counts.append(await node.dht.put(record))

    async with trio.open_nursery() as nursery:
        for number, author in enumerate(authors):
            nursery.start_soon(put, number, author)
            await trio.sleep(0.2)
            progress(f"{number + 1} of {len(authors)} records are stored")
    return counts


async def _look_up(
    crowd: Crowd, plan: Plan, authors: list[Identity], victims: dict[int, int], acts: Lookups, progress: Progress
) -> None:
    moments = sorted(crowd.rng.random() * plan.seconds for _ in range(plan.lookups))
    began = trio.current_time()
    modes = _MODES if crowd.scenario.adversaries else _MODES[-1:]

    async def node_lookup() -> None:
        asker, place = crowd.draw_honest(), crowd.rng.getrandbits(256)
        since = trio.current_time()
        lookup = await asker.dht.find(place)
        seconds = trio.current_time() - since
        found = dict.fromkeys(lookup.closest)
        # Those present all the while: who came or went meanwhile is neither right nor wrong.
        true = [n for n in crowd.truth(place, kademlia.K, beside=asker) if n.joined]
        hit = [node.identity.peer_id in found for node in true]
        acts.append(
            Act(
                "node",
                "single",
                since,
                bool(hit and hit[0]),
                lookup.hops,
                lookup.queries,
                seconds,
                statistics.mean(hit),
            )
        )

    async def record_lookup(number: int) -> None:
        name = _record_name(authors[number], number)
        asker = crowd.draw_honest(lambda node: node.dht.store.get("owned", name, node.host.wall()) is None)
        for mode, paths, thorough in modes:
            since, queries = trio.current_time(), asker.dht.counters.queries
            record = await asker.dht.get("owned", name, paths=paths, thorough=thorough)
            acts.append(
                Act(
                    "victim" if number in victims else "record",
                    mode,
                    since,
                    record is not None and record.value == b"value %d" % number,
                    0,
                    asker.dht.counters.queries - queries,
                    trio.current_time() - since,
                    0.0,
                )
            )

    async with trio.open_nursery() as nursery:
        for index, moment in enumerate(moments):
            await trio.sleep_until(began + moment)
            if index % 2:
                # Every tenth for a record whose place is crowded, where there are such.
                pick = crowd.rng.randrange(plan.victims) if plan.victims and index % 20 == 1 else None
                number = crowd.rng.randrange(plan.victims, len(authors)) if pick is None else pick
                nursery.start_soon(record_lookup, number)
            else:
                nursery.start_soon(node_lookup)
            progress(f"{index + 1:,} of {plan.lookups:,} lookups")


#: How records are looked for: name, disjoint paths, and whether a miss is searched for again as `Dht.get` does.
_MODES: tuple[tuple[str, int, bool], ...] = (
    ("single", 1, False),
    ("disjoint", kademlia.CAREFUL_PATHS, False),
    ("full", 1, True),
)


def _health(crowd: Crowd) -> Health:
    """How true the routing tables of honest nodes are, at the end."""
    present = {node.identity.peer_id: None for node in crowd.nodes.values()}
    honest = [node for node in crowd.nodes.values() if node.honest and node.joined]
    sample = honest[:: max(1, len(honest) // 500)]
    alive, sizes, neighbours, estimates = [], [], [], []
    for node in sample:
        contacts = [contact.peer for contact in node.dht.table]
        sizes.append(len(contacts))
        alive.append(sum(peer in present for peer in contacts) / max(1, len(contacts)))
        true = crowd.truth(node.key, kademlia.K, beside=node)
        neighbours.append(statistics.mean(other.identity.peer_id in node.dht.table for other in true))
        if node.dht.swarm_size is not None:
            estimates.append(node.dht.swarm_size / len(crowd.nodes))
    return Health(
        contacts=statistics.mean(sizes),
        alive=statistics.mean(alive),
        neighbours=statistics.mean(neighbours),
        size_estimate=statistics.median(estimates) if estimates else math.nan,
        links=statistics.mean(len(node.endpoint.links()) for node in sample),
    )
