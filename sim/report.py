"""What a simulation found: the report, the claims it must meet, and its JSON form."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs

from .outputs import write_text

#: What can become of a peer.
STATUSES = ("finished", "killed", "expelled", "left", "failed")
#: The phases of a round between scatter and commit: where a kill is meant to hurt.
KILL_PHASES = ("scatter", "combine", "gather")
#: The same where nothing is combined: before its word, and before it agrees to the record.
GATHER_KILL_PHASES = ("convene", "commit")
#: And where the model is cut into stages, whose holder may be the only one.
STAGE_KILL_PHASES = ("train",)


@attrs.frozen
class Baseline:
    """The main metric without a swarm. ``start``: untrained; ``single``: one machine with all the data and the
    same number of samples; ``isolated``: mean of peers that train alone, each with its own part and samples.
    ``reference``: a yardstick of the task itself (``reference_name``), for instance an n-gram model."""

    start: float | None
    single: float | None
    isolated: float | None
    reference: float | None = None
    reference_name: str = ""


@attrs.frozen
class PeerOutcome:
    """One node. ``peer``: text id. ``rounds``: rounds it committed. ``digest``: of the weights it exported,
    recomputed by the parent; empty without an export."""

    peer: str
    status: str
    rounds: int
    samples: int
    metric: float | None
    digest: str
    bytes_sent: int
    bytes_received: int
    late: bool = False


@attrs.frozen
class RoundOutcome:
    """One committed round. ``wall_s``: from the end of training to the commit, the slowest member's.
    ``payload``: bytes that its members gave where nothing was combined."""

    round: int
    members: tuple[str, ...]
    wall_s: float
    retries: int
    dropped: tuple[str, ...]
    reason: str
    payload: int = 0


@attrs.frozen
class SimEvent:
    """``t``: seconds since the simulation began. ``what``: start, kill, late, joined, dropped, finished, failed …"""

    t: float
    round: int
    phase: str
    what: str
    peer: str


@attrs.frozen
class Claim:
    """One thing the simulation promises. ``found``: the evidence, for people."""

    claim: str
    ok: bool
    found: str


@attrs.frozen
class Expectation:
    """What is claimed of this simulation. ``identical``: survivors end with the same bits. ``at_least`` and
    ``above_isolated``: of the metric, None where the task or the number of rounds promises nothing. ``recovers``: the
    model is cut into stages."""

    rounds: int
    kills: int
    late: int
    identical: bool
    higher_is_better: bool
    at_least: float | None = None
    above_isolated: float | None = None
    beats_reference: bool = False
    late_rounds: int = 3
    expelled: int = 0
    recovers: bool = False


@attrs.frozen
class Report:
    """All of it. ``why``: the claims that did not hold and what was found instead; empty when ``ok``."""

    ok: bool
    why: tuple[str, ...]
    task: str
    strategy: str
    mode: str
    seed: int
    wall_s: float
    metric: str
    baseline: Baseline
    swarm: float | None
    peers: tuple[PeerOutcome, ...]
    rounds: tuple[RoundOutcome, ...]
    events: tuple[SimEvent, ...]
    claims: tuple[Claim, ...]

    def to_json(self) -> str:
        """Numbers that JSON cannot carry (NaN, infinities) become null."""
        return json.dumps(_plain(attrs.asdict(self)), indent=2, allow_nan=False) + "\n"

    def write(self, path: Path) -> None:
        """Raises :class:`ConfigError` naming the file."""
        write_text(path, self.to_json())


def judge(report: Report, expected: Expectation, problems: Sequence[str] = ()) -> Report:
    """The report with its claims checked. ``problems``: what went wrong on the way (a process that died …)."""
    claims = tuple(check(report, expected))
    why = (*problems, *(f"{claim.claim}: {claim.found}" for claim in claims if not claim.ok))
    return attrs.evolve(report, claims=claims, why=why, ok=not why)


def check(report: Report, expected: Expectation) -> list[Claim]:
    """Every claim of ``expected``, with the evidence."""
    finished = [peer for peer in report.peers if peer.status == "finished"]
    survivors = len(report.peers) - expected.kills - expected.expelled
    last = max((r.round for r in report.rounds), default=0)
    claims = [
        Claim(
            "every surviving peer finishes the run",
            len(finished) == survivors and last >= expected.rounds,
            f"{len(finished)} of {survivors} finished, {last} of {expected.rounds} rounds committed",
        )
    ]
    if expected.identical:
        digests = sorted({peer.digest or "none" for peer in finished})
        claims.append(
            Claim(
                "all surviving peers hold bit-identical weights",
                len(digests) == 1 and digests[0] != "none",
                f"{len(finished)} peers, digest {' '.join(d[:16] for d in digests) or 'none'}",
            )
        )
    if expected.kills:
        claims.append(_check_kills(report, expected.kills, expected.recovers))
    if expected.expelled:
        claims.append(_check_expelled(report, expected.expelled))
    if expected.late:
        late = [peer for peer in report.peers if peer.late]
        rounds = min((peer.rounds for peer in late), default=0)
        claims.append(
            Claim(
                f"a peer that joins late commits at least {expected.late_rounds} rounds",
                len(late) == expected.late and rounds >= expected.late_rounds,
                ", ".join(f"{peer.peer[:8]} committed {peer.rounds}" for peer in late) or "none joined",
            )
        )
    claims += _check_metric(report, expected)
    return claims


def _check_kills(report: Report, kills: int, recovers: bool) -> Claim:
    killed = [event for event in report.events if event.what == "kill"]
    dropped = {peer for r in report.rounds for peer in r.dropped}
    unnamed = [event.peer[:8] for event in killed if event.peer not in dropped]
    phases = STAGE_KILL_PHASES if recovers else (*KILL_PHASES, *GATHER_KILL_PHASES)
    misplaced = [event.phase for event in killed if event.phase not in phases]
    found = ", ".join(f"{e.peer[:8]} killed in round {e.round} at {e.phase}" for e in killed) or "nobody was killed"
    if unnamed:
        found += f"; no round names {' '.join(unnamed)} as dropped"
    if recovers:
        # Where it was the only holder of its stage, nobody is left to drop it: the stage is founded anew. The other one
        # of two goes on as a branch, whose roster never had it.
        recovered, branched = (sum(event.what == what for event in report.events) for what in ("recovered", "branch"))
        found += f"; stages recovered {recovered}, gone on as a branch {branched}"
        unnamed = unnamed[recovered + branched :]
        claim = "a peer killed while it trains is dropped, or its stage goes on without it, recovered or as a branch"
        return Claim(claim, len(killed) == kills and not unnamed and not misplaced, found)
    return Claim(
        "a peer killed between scatter and commit is dropped by name and the run goes on",
        len(killed) == kills and not unnamed and not misplaced,
        found,
    )


def _check_expelled(report: Report, liars: int) -> Claim:
    first = {event.peer: event for event in reversed(report.events) if event.what == "expelled"}
    expelled = list(first.values())
    gone = {peer for r in report.rounds for peer in r.dropped}
    kept = [event.peer[:8] for event in expelled if event.peer not in gone]
    found = ", ".join(f"{e.peer[:8]} expelled in round {e.round}" for e in expelled) or "nobody was expelled"
    if kept:
        found += f"; no round drops {' '.join(kept)} from the roster"
    claim = "an owner that lies is found out and expelled, and the run goes on"
    return Claim(claim, len(expelled) == liars and not kept, found)


def _check_metric(report: Report, expected: Expectation) -> list[Claim]:
    sign = 1.0 if expected.higher_is_better else -1.0
    name, swarm, baseline = report.metric or "metric", report.swarm, report.baseline
    claims = []

    def claim(text: str, bound: float | None, found: str) -> None:
        ok = swarm is not None and bound is not None and sign * swarm >= sign * bound
        claims.append(Claim(text, ok, found))

    def better(text: str, other: float | None, label: str) -> None:
        ok = swarm is not None and other is not None and sign * swarm > sign * other
        claims.append(Claim(text, ok, f"swarm {_number(swarm)}, {label} {_number(other)}"))

    better(f"training improves {name}", baseline.start, "untrained")
    if expected.at_least is not None:
        word = "at least" if expected.higher_is_better else "at most"
        claim(f"{name} is {word} {expected.at_least:g}", expected.at_least, f"swarm {_number(swarm)}")
    if expected.above_isolated is not None:
        bound = None if baseline.isolated is None else baseline.isolated + sign * expected.above_isolated
        claim(
            f"{name} is {expected.above_isolated:g} better than the mean of isolated peers",
            bound,
            f"swarm {_number(swarm)}, isolated {_number(baseline.isolated)}",
        )
    if expected.beats_reference:
        label = baseline.reference_name or "reference"
        better(f"{name} is better than the {label}'s", baseline.reference, label)
    return claims


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


def _plain(value: Any) -> Any:
    match value:
        case dict():
            return {key: _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case float():
            return value if math.isfinite(value) else None
        case _:
            return value
