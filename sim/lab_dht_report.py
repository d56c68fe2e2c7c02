"""What a trial of the DHT found: table, requirements, JSON and plot."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import attrs
from rich.table import Table

from ..dht.kademlia.defaults import CAREFUL_PATHS
from .outputs import save_figure

#: Parts of lookups that must succeed: nobody leaves; nodes leave; a part of the nodes are adversaries.
QUIET, CHURNING, HOSTILE = 0.999, 0.99, 0.95

KIND_NAMES = {
    "node": "the closest node to a key",
    "record": "a record",
    "victim": "a record whose place is crowded",
}
MODE_NAMES = {"single": "one path", "disjoint": f"{CAREFUL_PATHS} disjoint paths", "full": "as `get` does"}


@attrs.frozen
class Act:
    """One lookup. ``kind``: node, record or victim (a record whose place adversaries crowd). ``mode``: how.

    ``began``, ``seconds``: virtual. ``hops``: answers in a row up to the closest peer; 0 for records. ``recall``: part
    of the k closest nodes that were among those found; 0 for records.
    """

    kind: str
    mode: str
    began: float
    ok: bool
    hops: int
    queries: int
    seconds: float
    recall: float


@attrs.frozen
class Health:
    """Means over honest nodes at the end. ``contacts`` of a table; ``alive``: part of them that is there;
    ``neighbours``: part of a node's k closest that it knows; ``size_estimate``: median, in parts of the true size."""

    contacts: float
    alive: float
    neighbours: float
    size_estimate: float
    links: float


@attrs.frozen
class DhtReport:
    """``session``, ``loss``, ``adversaries`` …: see :class:`.crowd.CrowdScenario`. ``stored``: mean number of peers
    that took a record. ``messages_per_node``, ``bytes_per_node``: sent in a virtual second, lookups and upkeep alike.
    ``boot_wall``, ``wall``: real seconds. ``digest`` covers everything but those: equal for equal seeds.
    """

    nodes: int
    seed: int
    session: float | None
    adversaries: float
    loss: float
    encrypted: bool
    k: int
    departed: int
    stored: float
    join_seconds: float
    join_queries: float
    messages_per_node: float
    bytes_per_node: float
    virtual_seconds: float
    boot_wall: float
    wall: float
    memory_mib: float
    acts: tuple[Act, ...]
    health: Health
    digest: str

    # -- figures -------------------------------------------------------------------------------------------------------

    def of(self, kind: str, mode: str | None = None) -> list[Act]:
        return [act for act in self.acts if act.kind == kind and mode in (None, act.mode)]

    def groups(self) -> list[tuple[str, str, list[Act]]]:
        """The lookups by kind and mode, those that there are."""
        found = [(kind, mode, self.of(kind, mode)) for kind in KIND_NAMES for mode in MODE_NAMES]
        return [group for group in found if group[2]]

    @property
    def hops(self) -> float:
        found = [act.hops for act in self.of("node") if act.ok]
        return statistics.mean(found) if found else math.nan

    @property
    def hops_allowed(self) -> float:
        return math.log2(self.nodes) / 2 + 2

    @property
    def required(self) -> float:
        return HOSTILE if self.adversaries else CHURNING if self.session else QUIET

    def complaints(self) -> list[str]:
        """What does not hold that must."""
        found = []
        if not self.hops <= self.hops_allowed:
            found.append(f"{self.hops:.2f} hops in the mean, at most {self.hops_allowed:.2f} allowed")
        for kind, mode, acts in self.groups():
            # With adversaries one path is only there for comparison, and is enough where nobody crowds a place.
            if self.adversaries and (mode == "single" or (kind == "victim" and mode != "full")):
                continue
            rate = success(acts)
            if rate < self.required:
                what = f"{KIND_NAMES[kind]}, {MODE_NAMES[mode]}"
                found.append(f"{what}: {rate:.2%} of {len(acts)} lookups succeed, {self.required:.1%} required")
        return found

    # -- showing -------------------------------------------------------------------------------------------------------

    def title(self) -> str:
        parts = [f"{self.nodes:,} nodes"]
        if self.session:
            parts.append(f"mean session {self.session / 60:g} min ({self.departed:,} left)")
        if self.adversaries:
            parts.append(f"{self.adversaries:.0%} adversaries")
        if self.loss:
            parts.append(f"{self.loss:.1%} loss")
        return ", ".join(parts) + f", seed {self.seed}"

    def table(self) -> Table:
        table = Table(title=f"DHT in virtual time: {self.title()}", title_justify="left", show_header=True)
        for column in ("lookups for", "how", "number", "success", "hops", "queries", "median s", "p95 s"):
            table.add_column(column, justify="left" if column in ("lookups for", "how") else "right")
        for kind, mode, acts in self.groups():
            hops = [act.hops for act in acts if act.hops]
            seconds = [act.seconds for act in acts]
            table.add_row(
                KIND_NAMES[kind],
                MODE_NAMES[mode],
                f"{len(acts):,}",
                f"{success(acts):.2%}",
                f"{statistics.mean(hops):.2f}" if hops else "",
                f"{statistics.mean(act.queries for act in acts):.1f}",
                f"{statistics.median(seconds):.2f}",
                f"{quantile(seconds, 0.95):.2f}",
            )
        recalls = [act.recall for act in self.of("node")]
        recall = f"lookups name {statistics.mean(recalls):.1%} of the {self.k} closest" if recalls else ""
        table.caption_justify = "left"
        table.caption = "\n".join(
            (
                f"tables: {self.health.contacts:.0f} contacts, {self.health.alive:.1%} of them alive; nodes know "
                f"{self.health.neighbours:.1%} of their {self.k} neighbours; {recall}",
                f"swarm size as nodes estimate it: {self.health.size_estimate:.2f} of the true one (median); "
                f"a record is stored at {self.stored:.1f} peers",
                f"joining: {self.join_queries:.0f} queries, {self.join_seconds:.1f} s (median); then "
                f"{self.messages_per_node:.2f} messages and {self.bytes_per_node / 1e3:.2f} kB per node and second",
                f"{self.virtual_seconds:,.0f} virtual seconds in {self.wall:.0f} s ({self.boot_wall:.0f} s until all "
                f"had joined), {self.memory_mib:,.0f} MiB; digest {self.digest[:16]}",
            )
        )
        return table

    def to_json(self) -> str:
        whole = attrs.asdict(self)
        whole["acts"] = [list(attrs.astuple(act)) for act in self.acts]
        whole["act_fields"] = [field.name for field in attrs.fields(Act)]
        whole |= {"hops": self.hops, "hops_allowed": self.hops_allowed, "complaints": self.complaints()}
        if math.isnan(self.health.size_estimate):
            whole["health"]["size_estimate"] = None
        whole["hops"] = None if math.isnan(self.hops) else self.hops
        return json.dumps(whole, indent=1, allow_nan=False) + "\n"

    def plot(self, path: Path) -> None:
        """Success by kind and mode, hops, latency, success over time. Raises :class:`ConfigError` naming the file."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, ((bars, hops), (times, course)) = pyplot.subplots(2, 2, figsize=(12, 8), layout="constrained")
        colours = dict(zip(MODE_NAMES, ("tab:orange", "tab:blue", "tab:green"), strict=True))
        groups = self.groups()
        for index, (_, mode, acts) in enumerate(groups):
            rate = success(acts)
            bars.bar(index, rate, color=colours[mode])
            bars.text(index, rate + 0.01, f"{rate:.1%}", ha="center", fontsize=8)
        labels = [f"{KIND_NAMES[kind]}\n{MODE_NAMES[mode]}" for kind, mode, _ in groups]
        bars.set_xticks(range(len(groups)), labels, fontsize=6, rotation=20, ha="right")
        bars.axhline(self.required, ls=":", c="black", label=f"required: {self.required:.1%}")
        bars.set_ylim(0, 1.12)
        bars.set_title("lookups that succeed", fontsize=10)
        bars.legend(fontsize="x-small", loc="lower right")
        counts = [act.hops for act in self.of("node")]
        if counts:
            hops.hist(counts, bins=[edge - 0.5 for edge in range(max(counts) + 2)], color="tab:grey", rwidth=0.9)
            hops.axvline(self.hops, c="black", label=f"mean {self.hops:.2f}")
            hops.axvline(self.hops_allowed, c="black", ls=":", label=f"allowed {self.hops_allowed:.2f}")
            hops.legend(fontsize="x-small")
        hops.set_title("hops of a node lookup", fontsize=10)
        for kind, mode, acts in groups:
            seconds = sorted(act.seconds for act in acts)
            share = [(place + 1) / len(seconds) for place in range(len(seconds))]
            times.plot(seconds, share, label=f"{KIND_NAMES[kind]}, {MODE_NAMES[mode]}")
        times.set_title("seconds (virtual) that lookups take: part that is done", fontsize=10)
        times.set_xlabel("seconds")
        times.legend(fontsize="x-small")
        for kind, mode, acts in groups:
            points = _over_time(acts)
            style = {"node": "-", "record": "--", "victim": ":"}[kind]
            course.plot(*points, style, color=colours[mode], label=f"{KIND_NAMES[kind]}, {MODE_NAMES[mode]}")
        course.set_ylim(-0.02, 1.05)
        course.set_xlabel("virtual seconds since the first node")
        course.set_title("part that succeeds, over time", fontsize=10)
        course.legend(fontsize="x-small", loc="lower right")
        figure.suptitle(f"DHT in virtual time: {self.title()}")
        save_figure(figure, path)


def success(acts: Sequence[Act]) -> float:
    return sum(act.ok for act in acts) / len(acts)


def quantile(values: Sequence[float], part: float) -> float:
    """The value that ``part`` of ``values`` do not exceed."""
    return sorted(values)[min(len(values) - 1, int(part * len(values)))]


def _over_time(acts: Sequence[Act], slots: int = 20) -> tuple[list[float], list[float]]:
    first, last = acts[0].began, acts[-1].began
    width = (last - first) / slots or 1.0
    found: dict[int, list[Act]] = {}
    for act in acts:
        found.setdefault(min(slots - 1, int((act.began - first) / width)), []).append(act)
    times = sorted(found)
    return [first + (slot + 0.5) * width for slot in times], [success(found[slot]) for slot in times]
