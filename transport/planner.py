"""Which ways to a peer are worth trying, in which order, with which head starts, and why: a pure decision.

The order is that of the design: reversal when only we can be reached, direct TCP, hole punching, a relay, WebRTC. Head
starts follow RFC 8305 (happy eyeballs v2) while the peer counts as reachable. A peer whose record names relays has
found out that strangers cannot dial it; there everything is begun almost at once, so that a relayed link is up within
well under a second; a better way then takes over from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum

import attrs

from . import defaults
from .address import Address, PeerRecord, RelayAddress, family_of, neighbours, scope_of
from .identity import PeerId

#: How good a way is, lower is better: kernel TCP from end to end, then WebRTC (Python's SCTP), then others' uplinks.
QUALITY = {"direct": 0, "reversal": 0, "punch": 0, "webrtc": 1, "relay": 2}

#: For people.
TITLES = {
    "direct": "direct",
    "reversal": "reversal",
    "punch": "hole punching",
    "webrtc": "WebRTC",
    "relay": "relay",
}


class Reach(Enum):
    """Whether strangers can dial us."""

    UNKNOWN = "unknown"
    REACHABLE = "reachable"
    UNREACHABLE = "unreachable"


@attrs.frozen
class OwnReach:
    """What we know of our own place on the network.

    ``addresses``: of our own machine; ``external``: under which others see us; ``families``: that we have a route for
    (None: not known); ``varying``: our NAT maps every destination to another port; ``ways``: that we may use;
    ``linked``: peers that we hold a link with, nearest first.
    """

    peer: PeerId
    state: Reach = Reach.UNKNOWN
    reason: str = "nobody has tried yet"
    addresses: tuple[Address, ...] = ()
    external: tuple[Address, ...] = ()
    families: tuple[str, ...] | None = None
    varying: bool = False
    ways: tuple[str, ...] = ("direct",)
    linked: tuple[PeerId, ...] = ()


@attrs.frozen
class Outcome:
    """How one step ended at ``at`` (host's monotonic seconds). ``target`` as in :attr:`Step.target`."""

    target: str
    ok: bool
    at: float
    reason: str = ""


@attrs.frozen
class Step:
    """One attempt. It begins ``head_start`` seconds after the one before it, or as soon as that one has failed."""

    way: str
    head_start: float
    reason: str
    address: Address | None = None
    via: RelayAddress | None = None

    @property
    def target(self) -> str:
        """What is tried, for people and for the memory of outcomes."""
        if self.address is not None:
            return str(self.address)
        assert self.via is not None
        return f"{TITLES[self.way]} through {self.via.peer.short}"


@attrs.frozen
class Plan:
    """``steps`` in order; ``skipped``: (what, why it is not tried)."""

    steps: tuple[Step, ...]
    skipped: tuple[tuple[str, str], ...] = ()

    def better_than(self, way: str) -> Plan:
        """Only what would improve a link that has ``way``."""
        return attrs.evolve(self, steps=tuple(step for step in self.steps if QUALITY[step.way] < QUALITY[way]))


def plan(
    own: OwnReach,
    peer: PeerId,
    record: PeerRecord | None,
    extra: Sequence[Address] = (),
    past: Sequence[Outcome] = (),
    *,
    helpers: Sequence[RelayAddress] = (),
    linked: bool = False,
    now: float = 0.0,
) -> Plan:
    """How to reach ``peer``.

    ``record``: its newest one; ``extra``: addresses that somebody gave us (a ticket, a document); ``past``: outcomes
    with this peer, oldest first; ``helpers``: peers that may share a link with it, where its record names no relays;
    ``linked``: a link with it is up, if a poor one, and carries signals.
    """
    skipped: list[tuple[str, str]] = []
    known = record.addresses if record is not None else ()
    relays = record.relays if record is not None else ()
    vias = _vias(own, peer, relays, skipped)
    # Who serves others is reachable, and keeps a place at a relay for those of the other IP version.
    hidden = bool(vias) and not (record is not None and record.services)
    common = vias or [helper for helper in helpers if helper.peer not in (peer, own.peer)]
    if linked:
        common = [RelayAddress(peer, ())]
    steps: list[Step] = []
    if "direct" in own.ways:
        steps += _direct(own, tuple(extra), known, hidden, past, now, skipped)
    if "reversal" in own.ways:
        reversal = list(_reversal(own, common, hidden, skipped))
        steps = reversal + steps if hidden else steps + reversal
    if "punch" in own.ways:
        steps += _through(own, "punch", peer, common, defaults.PUNCH_HEAD_START, past, now, skipped)
    if "relay" in own.ways:
        if vias:
            first = defaults.RELAY_HEAD_START
            steps += [
                Step("relay", first, f"it holds a reservation at {via.peer.short}", via=via)
                for via in vias[: defaults.MAX_RECORD_RELAYS]
            ]
        else:
            skipped.append(("relay", "its record names no relay"))
    if "webrtc" in own.ways and not (vias or linked):
        skipped.append(("WebRTC", "its record names no relay, so it does not count itself hidden"))
    elif "webrtc" in own.ways:
        # Behind the relay although it is better: it takes a process of its own and seconds, which a link through the
        # relay bridges. It gets its turn when that link is to become a better one. Who holds no place at a relay can be
        # dialled, as far as it knows: for such a one no process is started.
        steps += _through(own, "webrtc", peer, common, defaults.WEBRTC_HEAD_START, past, now, skipped)
    return Plan(tuple(_begin_at_once(steps)), tuple(skipped))


def _begin_at_once(steps: list[Step]) -> Iterable[Step]:
    """The first step waits for nobody."""
    for index, step in enumerate(steps):
        yield step if index else attrs.evolve(step, head_start=0.0)


def _vias(
    own: OwnReach, peer: PeerId, relays: tuple[RelayAddress, ...], skipped: list[tuple[str, str]]
) -> list[RelayAddress]:
    """Relays of the peer that we can use, those we are linked with first, nearest first."""
    usable = []
    for relay in relays:
        if relay.peer == own.peer:
            skipped.append((f"relay through {relay.peer.short}", "that is this node itself, and no link with it is up"))
        elif relay.peer != peer:
            usable.append(relay)
    nearness = {linked: index for index, linked in enumerate(own.linked)}
    return sorted(usable, key=lambda relay: nearness.get(relay.peer, len(nearness)))


def _reversal(
    own: OwnReach, common: list[RelayAddress], hidden: bool, skipped: list[tuple[str, str]]
) -> Iterable[Step]:
    if own.state is not Reach.REACHABLE:
        word = "cannot be dialled either" if own.state is Reach.UNREACHABLE else "do not know that we can be dialled"
        skipped.append(("reversal", f"we {word}: {own.reason}"))
    elif not common:
        skipped.append(("reversal", "no common peer is known that could ask it to dial us"))
    elif hidden:
        yield Step("reversal", 0.0, "it cannot be dialled, we can: it is asked to dial us", via=common[0])
    else:
        yield from (
            Step("reversal", defaults.DIAL_HEAD_START, "it may be dialling out only, and we can be dialled", via=via)
            for via in common[:1]
        )


def _through(
    own: OwnReach,
    way: str,
    peer: PeerId,
    common: list[RelayAddress],
    head_start: float,
    past: Sequence[Outcome],
    now: float,
    skipped: list[tuple[str, str]],
) -> Iterable[Step]:
    """Punching and WebRTC: both need a common peer that carries their signals."""
    title = TITLES[way]
    if not common:
        skipped.append((title, "no common peer is known that could carry the signals"))
        return
    if way == "punch" and own.varying:
        skipped.append((title, "our NAT gives every destination another port, so the peer cannot know where to aim"))
        return
    why = f"{common[0].peer.short} is linked with both of us" if common[0].peer != peer else "the link we have signals"
    step = Step(way, head_start, why, via=common[0])
    failed = [
        outcome for outcome in past if outcome.target.startswith(title) and now - outcome.at < _memory(past, title)
    ]
    if failed and not failed[-1].ok:
        last = failed[-1]
        skipped.append((title, f"it failed {now - last.at:.0f} s ago: {last.reason}"))
        return
    yield step


def _memory(past: Sequence[Outcome], title: str) -> float:
    """Seconds for which a failed way is left alone: doubling with each failure in a row."""
    failures = 0
    for outcome in reversed(past):
        if outcome.target.startswith(title):
            if outcome.ok:
                break
            failures += 1
    return min(defaults.WAY_BACKOFF * 2.0 ** max(0, failures - 1), defaults.WAY_BACKOFF_MAX)


def _direct(
    own: OwnReach,
    extra: tuple[Address, ...],
    known: tuple[Address, ...],
    hidden: bool,
    past: Sequence[Outcome],
    now: float,
    skipped: list[tuple[str, str]],
) -> Iterable[Step]:
    """Every address of the peer that this machine could dial, the likeliest first."""
    everything = list(dict.fromkeys((*extra, *known)))
    if not everything:
        skipped.append(("direct", "no address of it is known"))
        return
    latest = {outcome.target: outcome for outcome in past if now - outcome.at < defaults.OUTCOME_LIFETIME}
    ranked: list[tuple[int, Address, str]] = []
    for address in everything:
        refusal = _no_use(own, address, everything)
        if refusal:
            skipped.append((str(address), refusal))
        else:
            rank, reason = _rank(own, address, address in extra, latest.get(str(address)))
            ranked.append((rank, address, reason))
    ordered: list[tuple[Address, str]] = []
    for rank in sorted(dict.fromkeys(entry[0] for entry in ranked)):
        ordered += _interleaved([(address, reason) for r, address, reason in ranked if r == rank])
    head_start = defaults.HIDDEN_HEAD_START if hidden else defaults.DIAL_HEAD_START
    for address, reason in ordered[: defaults.MAX_ADDRESSES]:
        yield Step("direct", head_start, reason, address=address)
    for address, _ in ordered[defaults.MAX_ADDRESSES :]:
        skipped.append((str(address), f"more than {defaults.MAX_ADDRESSES} addresses"))


def _no_use(own: OwnReach, address: Address, all_of_it: Sequence[Address]) -> str:
    """Why dialling ``address`` is no use from here; empty when it may be."""
    family = family_of(address)
    if own.families is not None and family not in own.families:
        return f"this machine has no {family}"
    if scope_of(address) == "loopback":
        # The same port on our own machine may well answer, as somebody else.
        ours = [a.host for a in own.addresses if scope_of(a) != "loopback"]
        theirs = [a.host for a in all_of_it if scope_of(a) != "loopback"]
        if ours and theirs and not any(host in ours for host in theirs):
            return "that is another machine's own loopback"
    return ""


def _rank(own: OwnReach, address: Address, given: bool, last: Outcome | None) -> tuple[int, str]:
    """(place in the queue, why): likely ones first. Strangers' private addresses cost one packet, so they come too."""
    scope = scope_of(address)
    if last is not None and last.ok:
        return 0, "it worked last time"
    if last is not None:
        return 5, f"it failed last time: {last.reason}"
    if scope == "loopback":
        return 4, "it may be on this machine"
    if any(neighbours(address, ours) for ours in own.addresses):
        return 1, "it seems to be on our local network"
    if given:
        return 1, "we were given this address"
    if scope == "public":
        return 2, "it published this address"
    return 3, "it published this address of a private network, which may be ours too"


def _interleaved(entries: list[tuple[Address, str]]) -> list[tuple[Address, str]]:
    """IPv6 and IPv4 in turn, beginning with the first entry's family (RFC 8305, section 4)."""
    queues: dict[str, list[tuple[Address, str]]] = {}
    for entry in entries:
        queues.setdefault(family_of(entry[0]), []).append(entry)
    found: list[tuple[Address, str]] = []
    while len(found) < len(entries):
        for queue in queues.values():
            if queue:
                found.append(queue.pop(0))
    return found
