"""Whether strangers can dial us: what peers see of us, who has dialled us, what dial-backs found; and what follows.

The verdict (:func:`judge`) is a pure function of the evidence. Around it one loop watches our own addresses and links,
asks peers to dial us when nobody has by himself, and tells what has changed to whom it concerns.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import attrs
import trio

from . import defaults
from .address import Address, family_of, scope_of
from .dialback import DialBackService, Dialled, permitted
from .errors import RemoteError
from .identity import PeerId
from .planner import Reach

if TYPE_CHECKING:
    from .endpoint import Endpoint
    from .link import Link

log = logging.getLogger(__name__)


@attrs.frozen
class Observation:
    """``peer`` sees us at ``address``. ``incoming``: because it dialled us there; ``at``: host's monotonic seconds."""

    peer: PeerId
    address: Address
    incoming: bool
    at: float


@attrs.frozen
class Trial:
    """What a dial-back found about one address. ``asked``: whom we asked, who may have asked another to dial."""

    dialled: Dialled
    asked: PeerId
    at: float


@attrs.frozen
class Verdict:
    """``reason``: for people, with the evidence. ``confirmed``: addresses at which strangers have reached us.
    ``external``: addresses that others see and that are not ours: there is a NAT between."""

    state: Reach
    reason: str
    confirmed: tuple[Address, ...] = ()
    external: tuple[Address, ...] = ()


def judge(
    own: Sequence[Address],
    mapped: Sequence[Address],
    observations: Sequence[Observation],
    trials: Sequence[Trial],
    now: float,
) -> Verdict:
    """Whether strangers can dial us, and why.

    ``own``: addresses of our listeners; ``mapped``: those that a router said it forwards to us. Evidence of one IP
    version behind a NAT counts only for addresses outside of it: a neighbour's connection proves nothing then. What
    peers did (a connection that came) counts more than what they say (a dial-back), newer evidence more than older.
    """
    if not own:
        return Verdict(Reach.UNREACHABLE, "this node does not listen for connections")
    external = tuple(dict.fromkeys(o.address for o in observations if _outside(o, own, observations)))
    outside = [address.host for address in (*external, *mapped)]
    hidden = [family_of(address) for address in external]

    def counts(address: Address) -> bool:
        return address.host in outside or family_of(address) not in hidden

    came = [o for o in observations if o.incoming and counts(o.address)]
    recent = [t for t in trials if counts(t.dialled.address) and t.dialled.outcome != "not_tried"]
    reached = [t for t in recent if t.dialled.outcome == "reached" and now - t.at < defaults.REACH_LIFETIME]
    latest = {trial.dialled.address: trial for trial in recent}
    failed = [t for t in latest.values() if t.dialled.outcome == "failed" and now - t.at < defaults.UNREACH_LIFETIME]
    held = [t for t in reached if latest[t.dialled.address] is t]
    confirmed = tuple(dict.fromkeys((*(t.dialled.address for t in held), *(o.address for o in came))))
    if came:
        newest = max(came, key=lambda o: o.at)
        reason = f"{newest.peer.short} has dialled us at {newest.address}"
        return Verdict(Reach.REACHABLE, reason, confirmed, external)
    if held:
        trial = held[-1].dialled
        return Verdict(Reach.REACHABLE, f"{trial.by.short} could dial {trial.address}", confirmed, external)
    if failed:
        trial = failed[-1].dialled
        nat = f"behind a NAT that others see as {external[0].host}, and " if external else ""
        reason = f"{nat}{trial.by.short} could not dial {trial.address}: {trial.reason or 'no reason given'}"
        return Verdict(Reach.UNREACHABLE, reason, (), external)
    nat = f"; others see us as {external[0].host}, so there is a NAT" if external else ""
    return Verdict(Reach.UNKNOWN, f"nobody has tried to dial us yet{nat}", (), external)


def _outside(one: Observation, own: Sequence[Address], all_of_them: Sequence[Observation]) -> bool:
    """Whether ``one`` shows a NAT: another address than ours, and no more peers see a public one of ours.

    One liar must not talk a public node into hiding.
    """
    hosts = [address.host for address in own]
    if one.address.host in hosts:
        return False
    same = [o for o in all_of_them if family_of(o.address) == family_of(one.address)]
    straight = [o for o in same if o.address.host in hosts and scope_of(o.address) == "public"]
    return len([o for o in same if o.address.host not in hosts]) > len(straight)


def candidates(own: Sequence[Address], mapped: Sequence[Address], seen: Address) -> list[Address]:
    """What a peer that sees us at ``seen`` may be asked to dial, the likeliest first."""
    ports = dict.fromkeys(address.port for address in own)
    outer = [Address(seen.kind, seen.host, port) for port in ports]
    wanted = dict.fromkeys((*mapped, *outer, *own))
    allowed = [address for address in wanted if permitted(address, seen)]
    # Loopback, seen from this machine, proves nothing to others, unless there is nothing else.
    others = [address for address in allowed if scope_of(address) != "loopback"]
    return (others or allowed)[: defaults.MAX_DIAL_BACK]


class Reachability:
    """Keeps :attr:`verdict`. ``changed(what)`` is called when our addresses, or it, have become others."""

    def __init__(self, endpoint: Endpoint, *, ask: bool, changed: Callable[[], None]) -> None:
        self.verdict = Verdict(Reach.UNKNOWN, "nobody has tried to dial us yet")
        self.trials: tuple[Trial, ...] = ()
        self.observations: tuple[Observation, ...] = ()
        #: Addresses that a router forwards to us (UPnP, NAT-PMP). Set by :meth:`map`.
        self.mapped: tuple[Address, ...] = ()
        self._endpoint, self._ask, self._changed = endpoint, ask, changed
        self._service = DialBackService(endpoint)
        self._came: dict[PeerId, Observation] = {}
        self._own: tuple[Address, ...] | None = None
        self._lost = 0
        self._kick = trio.Event()
        self._retry = defaults.REACH_RETRY
        self._next = 0.0
        self._since: float | None = None  # when there was a first link
        endpoint.on_link.append(self._linked)
        endpoint.on_link_lost.append(self._unlinked)

    def map(self, addresses: Sequence[Address]) -> None:
        """A router forwards ``addresses`` to us from now on, and no others."""
        if tuple(addresses) != self.mapped:
            self.mapped = tuple(addresses)
            self.recheck("the router's port mapping has changed")

    def recheck(self, why: str) -> None:
        """Forget what was found: the network is another one."""
        log.info("looking anew whether we can be dialled: %s", why)
        self.trials = ()
        self._came.clear()
        self._next, self._retry = 0.0, defaults.REACH_RETRY
        self._kick.set()

    def _linked(self, link: Link) -> None:
        if self._since is None:
            self._since = self._endpoint.host.now()
        self._kick.set()

    def _unlinked(self, link: Link) -> None:
        if not (link.closed_idle or link.goodbye_code is not None):
            self._lost += 1

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self._kick = trio.Event()
            self._look()
            now = self._endpoint.host.now()
            settled = self._since is not None and now - self._since >= defaults.REACH_SETTLE
            if self._ask and settled and now >= self._next and self._wanted(now):
                await self._have_us_dialled()
                self._look()
            pause = defaults.REACH_POLL
            if self._since is not None and not settled:
                pause = defaults.REACH_SETTLE
            with trio.move_on_after(pause):
                await self._kick.wait()

    def _look(self) -> None:
        """Gather evidence and judge it."""
        endpoint = self._endpoint
        now, links = endpoint.host.now(), endpoint.links()
        own = endpoint.own_addresses()
        changed = own != self._own
        if changed and self._own is not None:
            self.recheck("our own addresses have changed")
            for link in links:
                link.probe()
        lost, self._lost = self._lost, 0
        if lost >= defaults.MASS_LOSS and lost >= len(links):
            self.recheck(f"{lost} links were lost at once")
        before = self.verdict
        self.observations = self._observe(links, own, now)
        self.verdict = judge(own, self.mapped, self.observations, self.trials, now)
        self._own = own
        if (self.verdict.state, self.verdict.confirmed) != (before.state, before.confirmed) or changed:
            if self.verdict.state is not before.state:
                log.info("%s: %s", self.verdict.state.value, self.verdict.reason)
            self._changed()

    def _observe(self, links: Sequence[Link], own: Sequence[Address], now: float) -> tuple[Observation, ...]:
        ports = [address.port for address in own]
        # An outer address that peers at two places name is taken for ours, as is one at which we were reached.
        named: dict[str, dict[str, None]] = {}
        for link in links:
            if link.observed is not None:
                named.setdefault(link.observed.host, {})[link.remote.host] = None
        reached = [trial.dialled.address.host for trial in self.trials if trial.dialled.outcome == "reached"]
        seen = []
        for link in links:
            if link.observed is None or link.way in ("relay", "webrtc"):
                continue
            # Only where we listen: what a peer claims beside that is no evidence.
            host, port = link.observed.host, link.observed.port
            outer = port in ports and (host in reached or len(named[host]) > 1)
            here = link.observed in own or link.observed in self.mapped or outer
            incoming = not link.initiator and link.way == "direct" and here
            observation = Observation(link.peer, link.observed, incoming, now)
            seen.append(observation)
            if incoming:
                self._came.pop(link.peer, None)
                self._came[link.peer] = observation
        for peer, old in list(self._came.items()):
            if now - old.at >= defaults.REACH_LIFETIME or len(self._came) > defaults.MAX_RATED_PEERS:
                del self._came[peer]
        live = [observation.peer for observation in seen]
        return (*(old for peer, old in self._came.items() if peer not in live), *seen)

    def _wanted(self, now: float) -> bool:
        """Whether a dial-back would tell something new."""
        if self.verdict.state is Reach.UNKNOWN:
            return True
        if any(observation.incoming for observation in self.observations) and self.verdict.state is Reach.REACHABLE:
            return False
        lifetime = defaults.REACH_LIFETIME if self.verdict.state is Reach.REACHABLE else defaults.UNREACH_LIFETIME
        return not self.trials or now - self.trials[-1].at >= 0.8 * lifetime

    async def _have_us_dialled(self) -> None:
        endpoint = self._endpoint
        own = endpoint.own_addresses()
        asked = [link for link in endpoint.links() if link.observed is not None and link.way not in ("relay", "webrtc")]
        # Who sees us from afar knows more; among those, whoever answers soonest.
        asked.sort(key=lambda link: (scope_of(link.observed or link.remote) != "public", link.rtt))
        for link in asked[: defaults.DIAL_BACK_ASKED]:
            assert link.observed is not None
            wanted = candidates(own, self.mapped, link.observed)
            if not wanted:
                continue
            try:
                found = await self._service.ask(link, wanted)
            except RemoteError as error:
                log.debug("%s had nobody dial us: %s", link.peer.short, error)
                continue
            now = endpoint.host.now()
            fresh = [Trial(dialled, link.peer, now) for dialled in found]
            self.trials = (*self.trials, *fresh)[-defaults.MAX_TRIALS :]
            if any(trial.dialled.outcome != "not_tried" for trial in fresh):
                self._next, self._retry = now, defaults.REACH_RETRY
                return
        self._next = endpoint.host.now() + self._retry
        self._retry = min(2 * self._retry, defaults.UNREACH_LIFETIME)
