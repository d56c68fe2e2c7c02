"""Epidemic broadcast of new envelopes among the members of a scope: who gets what pushed, and who is only told;
sans-IO.

How it spreads. Every member chooses *partners* at random and follows them; at a few of these it asks to be *fed*. Those
who chose it are its *followers*. Whoever comes to hold a new envelope

- pushes it to the followers that it feeds; while the envelope is young (its first hops, when hardly anybody has it) to
  all partners and followers;
- tells all others that it has it. Who lacks it fetches it, from one of those who told.

Why so. Plain push with fan-out f leaves e^-f of the members out and costs f - 1 redundant copies, so all of 1,000
members take about ten copies each. Pushing along a spanning tree and telling the rest (Plumtree: Leitão, Pereira,
Rodrigues, "Epidemic Broadcast Trees", SRDS 2007) costs no redundant copy but is as deep as the tree, begins with a
flood, and mends its tree by timers whenever a member falls silent. Push and pull in rounds (Karp, Schindelhauer,
Shenker, Vöcking, "Randomized Rumor Spreading", FOCS 2000) shows where the copies go: pushing is nearly free until half
of the members know, pulling from then on. Here the feeds are chosen by who receives, so that *everybody* has the same
number of chances to be pushed to (chosen by the sender, the numbers are Poisson's and the unlucky ones make the tail),
copies are bounded by feeds and the few wide hops, and no liar can make itself anybody's source. Followers and partners
together are an undirected random graph, as HyParView's active view (Leitão et al., DSN 2007), whose replacing of silent
neighbours this follows too. Numbers: docs/gossip.md, tests/dht/documents/test_broadcast.py.

A hop count cannot be believed; whoever lies about it makes a push wide (the copies are still bounded: everybody passes
on an envelope once) or narrow (the telling still reaches everybody).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TypeAlias

import attrs

from ...transport.identity import PeerId
from . import defaults
from .messages import Advert


@attrs.frozen
class Settings:
    """How one member spreads envelopes. See the constants of the same names in ``defaults``; times in seconds."""

    partners: int = defaults.PARTNERS
    feeds: int = defaults.FEEDS
    followers: int = defaults.MAX_FOLLOWERS
    tell_delay: float = defaults.TELL_DELAY
    fetch_patience: float = defaults.FETCH_PATIENCE
    silent_for: float = defaults.SILENT_FOR
    renew: float = defaults.FOLLOW_RENEW
    eager_size: int = defaults.EAGER_SIZE
    remembered: int = defaults.REMEMBERED
    wanted: int = defaults.MAX_WANTED


@attrs.frozen
class Push:
    """Send the envelope to ``peer``, with ``hop``."""

    peer: PeerId
    advert: Advert
    hop: int


@attrs.frozen
class Tell:
    """Tell ``peer`` that we have these."""

    peer: PeerId
    adverts: tuple[Advert, ...]


@attrs.frozen
class Fetch:
    """Ask ``peer`` for these; then say :meth:`Broadcast.fetched`."""

    peer: PeerId
    adverts: tuple[Advert, ...]


@attrs.frozen
class Follow:
    """Tell ``peer`` that we follow it (``feed``: and want to be pushed to), or no longer do (``leave``)."""

    peer: PeerId
    feed: bool
    leave: bool = False


Action: TypeAlias = Push | Tell | Fetch | Follow


@attrs.define(eq=False)
class _Seen:
    """An envelope that we hold: who else is known to, and who has sent it how often."""

    holders: dict[PeerId, None]
    senders: dict[PeerId, int]


@attrs.define(eq=False)
class _Wanted:
    """An envelope that we were told of and lack. ``by``: by whom first; ``asked``: who is being asked, since when."""

    advert: Advert
    by: PeerId
    told: dict[PeerId, None]
    asked: PeerId | None = None
    since: float = 0.0


@attrs.define(eq=False)
class _Follower:
    feed: bool
    member: bool
    until: float


def wide_hops(members: int, neighbours: int) -> int:
    """For how many hops an envelope goes to all neighbours: as long as hardly anybody can have it already.

    ``neighbours`` of each, so that hop h reaches about neighbours^(h+1) of ``members``.
    """
    hops, reached = 0, neighbours
    while reached <= members and neighbours > 1:
        hops += 1
        reached *= neighbours
    return max(1, hops)


class Broadcast:
    """One member of one scope. ``holds``: whether an advertised envelope, or what replaced it, is here already.

    Every method that is told ``now`` (seconds, any zero) returns the :data:`Action` to carry out. All memory is bounded
    by :class:`Settings`: neighbours, remembered envelopes, wanted ones.
    """

    def __init__(
        self,
        me: PeerId,
        rng: random.Random,
        holds: Callable[[Advert], bool],
        settings: Settings | None = None,
    ) -> None:
        self.me, self._random, self._holds = me, rng, holds
        self.settings = settings or Settings()
        self._members: dict[PeerId, None] = {}
        self._partners: dict[PeerId, bool] = {}  # → whether it feeds us
        self._renewed: dict[PeerId, float] = {}
        self._followers: dict[PeerId, _Follower] = {}
        self._silent: dict[PeerId, float] = {}
        self._seen: dict[bytes, _Seen] = {}
        self._wanted: dict[bytes, _Wanted] = {}
        self._first: dict[PeerId, int] = {}  # → of the wanted, how many it was the first to tell of
        self._idle: dict[bytes, None] = {}  # of the wanted: nobody is being asked for it
        self._telling: dict[PeerId, dict[bytes, Advert]] = {}
        self._tell_at: float | None = None
        #: Payload copies received beyond the first, and envelopes received at all; for status and tests.
        self.redundant = 0
        self.received = 0

    @property
    def wanting(self) -> int:
        """Envelopes that we were told of, lack, and are trying to get."""
        return len(self._wanted)

    # -- neighbours ---------------------------------------------------------------------------------------------------

    @property
    def partners(self) -> tuple[PeerId, ...]:
        """Whom we follow."""
        return tuple(self._partners)

    @property
    def feeds(self) -> tuple[PeerId, ...]:
        """Whom we asked to push to us."""
        return tuple(peer for peer, feed in self._partners.items() if feed)

    @property
    def followers(self) -> tuple[PeerId, ...]:
        """Who follows us."""
        return tuple(self._followers)

    def neighbours(self) -> tuple[PeerId, ...]:
        """Partners and followers."""
        return tuple({**dict.fromkeys(self._partners), **dict.fromkeys(self._followers)})

    def set_members(self, members: Sequence[PeerId], now: float) -> list[Action]:
        """The members as the application sees them now (ourselves or not); missing partners are chosen."""
        self._members = dict.fromkeys(peer for peer in members if peer != self.me)
        for follower, state in self._followers.items():
            state.member = follower in self._members
        actions: list[Action] = [self._drop(peer) for peer in self._partners if peer not in self._members]
        return actions + self._complete(now)

    def _drop(self, peer: PeerId) -> Follow:
        return Follow(peer, feed=False, leave=True)

    def _complete(self, now: float) -> list[Action]:
        """Choose partners and feeds where some are missing."""
        for peer in [peer for peer in self._partners if peer not in self._members]:
            self._forget_partner(peer)
        self._silent = {peer: until for peer, until in self._silent.items() if until > now and peer in self._members}
        actions: list[Action] = []
        wanted = self.settings.partners - len(self._partners)
        if wanted > 0:
            free = [peer for peer in self._members if peer not in self._partners and peer not in self._silent]
            for peer in self._random.sample(free, min(wanted, len(free))):
                self._partners[peer] = False
                self._renewed[peer] = now
                actions.append(Follow(peer, feed=False))
        hungry = self.settings.feeds - len(self.feeds)
        if hungry > 0:
            candidates = [peer for peer, feed in self._partners.items() if not feed]
            for peer in self._random.sample(candidates, min(hungry, len(candidates))):
                self._partners[peer] = True
                self._renewed[peer] = now
                actions = [action for action in actions if not (isinstance(action, Follow) and action.peer == peer)]
                actions.append(Follow(peer, feed=True))
        return actions

    def _forget_partner(self, peer: PeerId) -> None:
        self._partners.pop(peer, None)
        self._renewed.pop(peer, None)

    def followed(self, peer: PeerId, feed: bool, now: float) -> tuple[bool, str]:
        """``peer`` follows us, for the next two renewals. Returns (decision, reason)."""
        member = peer in self._members
        if peer not in self._followers and len(self._followers) >= self.settings.followers:
            gone = next((other for other, state in self._followers.items() if state.until <= now), None)
            if gone is None and member:
                gone = next((other for other, state in self._followers.items() if not state.member), None)
            if gone is None:
                return False, f"{self.settings.followers} follow already"
            del self._followers[gone]
        self._followers[peer] = _Follower(feed, member, now + 2.5 * self.settings.renew)
        self._silent.pop(peer, None)
        return True, "follows"

    def unfollowed(self, peer: PeerId) -> None:
        """``peer`` no longer follows us."""
        self._followers.pop(peer, None)

    def silent(self, peer: PeerId, now: float) -> list[Action]:
        """``peer`` did not answer, refused to be followed, or lied: it is replaced, and left alone for a while."""
        self._followers.pop(peer, None)
        self._telling.pop(peer, None)
        if peer in self._members:
            self._silent[peer] = now + self.settings.silent_for
        self._forget_partner(peer)
        actions: list[Action] = self._complete(now)
        for id, wanted in self._wanted.items():
            wanted.told.pop(peer, None)
            if wanted.asked == peer:
                self._free(id, wanted)
        return actions + self._fetches(now)

    # -- envelopes ----------------------------------------------------------------------------------------------------

    def pushed(self, peer: PeerId, advert: Advert) -> int:
        """``peer`` sent us this envelope. Returns 0 when it is not remembered; else how often this peer has sent it."""
        self.received += 1
        seen = self._seen.get(advert.id)
        if seen is not None:
            self.redundant += 1
            self._held_by(peer, advert.id, seen)
            copies = seen.senders.get(peer, 0) + 1
            if copies > 1 or len(seen.senders) < self._most:
                seen.senders[peer] = copies
            return copies
        wanted = self._wanted.get(advert.id)
        if wanted is not None and len(wanted.told) < self._most:
            wanted.told[peer] = None
        return 0

    @property
    def _most(self) -> int:
        """Of how many peers it is remembered that they have an envelope: twice as many as we could tell of it."""
        return 2 * (self.settings.partners + self.settings.followers)

    def _held_by(self, peer: PeerId, id: bytes, seen: _Seen) -> None:
        """``peer`` has it: no need to tell it."""
        if len(seen.holders) < self._most or peer in self._partners or peer in self._followers:
            seen.holders[peer] = None
        waiting = self._telling.get(peer)
        if waiting is not None:
            waiting.pop(id, None)

    def kept(
        self, advert: Advert, size: int, hop: int, now: float, senders: Sequence[PeerId] = (), *, wide: bool = True
    ) -> list[Action]:
        """We hold this new envelope of ``size`` bytes, which ``senders`` sent at ``hop`` (0: we wrote it).

        ``wide`` False: it was caught up on; whoever lacks it is told, nobody is pushed to.
        """
        wanted = self._unwant(advert.id)
        holders = dict.fromkeys(senders)
        if wanted is not None:
            holders.update(wanted.told)
        seen = self._seen.get(advert.id)
        if seen is not None:
            seen.holders.update(holders)
            return []
        self._seen[advert.id] = _Seen(holders, dict.fromkeys(senders, 1))
        if len(self._seen) > self.settings.remembered:
            del self._seen[next(iter(self._seen))]
        for peer in holders:
            self._telling.get(peer, {}).pop(advert.id, None)
        neighbours = [peer for peer in self.neighbours() if peer not in holders and peer not in self._silent]
        pushing = wide and size <= self.settings.eager_size
        around = len(self.neighbours())
        everywhere = pushing and 0 <= hop < wide_hops(len(self._members) + 1, max(around, self.settings.partners))
        # In a small swarm, where everybody is everybody's neighbour, whoever wrote it has pushed it to all.
        done = pushing and hop > 0 and len(self._members) <= around
        actions: list[Action] = []
        for peer in neighbours:
            follower = self._followers.get(peer)
            fed = follower is not None and follower.feed
            if pushing and not done and (everywhere or fed):
                actions.append(Push(peer, advert, hop + 1))
            elif fed or not done:
                self._tell(peer, advert, now)
        return actions + self._told(now)

    def _tell(self, peer: PeerId, advert: Advert, now: float) -> None:
        waiting = self._telling.setdefault(peer, {})
        waiting[advert.id] = advert
        if len(waiting) > self.settings.wanted:
            del waiting[next(iter(waiting))]
        if self._tell_at is None:
            self._tell_at = now + self.settings.tell_delay

    def _told(self, now: float) -> list[Action]:
        if self._tell_at is None or now < self._tell_at:
            return []
        self._tell_at = None
        telling, self._telling = self._telling, {}
        return [Tell(peer, tuple(adverts.values())) for peer, adverts in telling.items() if adverts]

    def advertised(self, peer: PeerId, adverts: Sequence[Advert], now: float) -> list[Action]:
        """``peer`` says that it has these."""
        for advert in adverts:
            seen = self._seen.get(advert.id)
            if seen is not None:
                self._held_by(peer, advert.id, seen)
                continue
            wanted = self._wanted.get(advert.id)
            if wanted is None:
                # Nobody fills all of the room with names that mean nothing.
                share = max(1, self.settings.wanted // defaults.WANTED_SHARES)
                full = len(self._wanted) >= self.settings.wanted or self._first.get(peer, 0) >= share
                if full or self._holds(advert):
                    continue
                wanted = self._wanted[advert.id] = _Wanted(advert, peer, {})
                self._first[peer] = self._first.get(peer, 0) + 1
                self._idle[advert.id] = None
            if len(wanted.told) < self.settings.partners + self.settings.followers:
                wanted.told[peer] = None
        return self._fetches(now)

    def _unwant(self, id: bytes) -> _Wanted | None:
        self._idle.pop(id, None)
        wanted = self._wanted.pop(id, None)
        if wanted is not None:
            self._first[wanted.by] -= 1
            if not self._first[wanted.by]:
                del self._first[wanted.by]
        return wanted

    def _free(self, id: bytes, wanted: _Wanted) -> None:
        """Nobody is being asked for it any more."""
        wanted.asked = None
        self._idle[id] = None

    def _fetches(self, now: float) -> list[Action]:
        """Ask for what is wanted and not being fetched; give up what nobody is left to ask for."""
        asking: dict[PeerId, list[Advert]] = {}
        idle, self._idle = self._idle, {}
        for id in idle:
            wanted = self._wanted[id]
            if not wanted.told:
                self._unwant(id)
                continue
            wanted.asked, wanted.since = self._random.choice(list(wanted.told)), now
            asking.setdefault(wanted.asked, []).append(wanted.advert)
        size = defaults.MAX_FETCH
        return [
            Fetch(peer, tuple(adverts[at : at + size]))
            for peer, adverts in asking.items()
            for at in range(0, len(adverts), size)
        ]

    def fetched(self, peer: PeerId, adverts: Sequence[Advert], now: float) -> tuple[list[Action], int]:
        """A fetch of ``adverts`` from ``peer`` is over, however it went, and what came was :meth:`kept`.

        Returns what to do about those that are still missing, and their number.
        """
        missing = 0
        for advert in adverts:
            wanted = self._wanted.get(advert.id)
            if wanted is None:
                continue
            if self._holds(advert):
                self._unwant(advert.id)  # it came, or what replaces it
                continue
            missing += 1
            wanted.told.pop(peer, None)
            if wanted.asked == peer:
                self._free(advert.id, wanted)
        return self._fetches(now), missing

    def refused(self, advert: Advert) -> None:
        """What was sent under this name is no good: it is not wanted any more."""
        self._unwant(advert.id)

    # -- time ---------------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> list[Action]:
        """What is due: telling, asking again, renewing what we follow, forgetting who no longer follows."""
        for peer in [peer for peer, follower in self._followers.items() if follower.until <= now]:
            del self._followers[peer]
        for id, wanted in self._wanted.items():
            if wanted.asked is not None and now >= wanted.since + self.settings.fetch_patience:
                # Slow: ask another one. What the first one still brings is welcome.
                wanted.told.pop(wanted.asked, None)
                self._free(id, wanted)
        actions = self._told(now) + self._fetches(now) + self._complete(now)
        for peer, feed in self._partners.items():
            if now >= self._renewed[peer] + self.settings.renew:
                self._renewed[peer] = now
                actions.append(Follow(peer, feed))
        return actions

    def due(self, now: float) -> float:
        """When :meth:`tick` has something to do next, at the latest; not before ``now``."""
        times = [renewed + self.settings.renew for renewed in self._renewed.values()]
        if self._tell_at is not None:
            times.append(self._tell_at)
        times += [wanted.since + self.settings.fetch_patience for wanted in self._wanted.values()]
        return max(now, min(times, default=now + self.settings.renew))
