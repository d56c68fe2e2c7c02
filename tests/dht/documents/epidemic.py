"""A thousand broadcast cores and no network: every message takes one round. For tests and figures."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

import attrs

from shoal.dht.documents.broadcast import Action, Broadcast, Fetch, Follow, Push, Settings, Tell
from shoal.dht.documents.messages import Advert
from shoal.transport.identity import PeerId

#: Times are rounds: tell at once, give a fetch the round trip and one round more.
ROUNDS = Settings(tell_delay=0.0, fetch_patience=3.0, silent_for=50.0, renew=1000.0)
DOCUMENT = bytes(32)


def peer(number: int) -> PeerId:
    return PeerId(hashlib.blake2b(b"member %d" % number, digest_size=32).digest())


@attrs.define(eq=False)
class Spread:
    """How one write spread. ``last``: the round in which the last honest, present member had it."""

    members: int
    reached: dict[PeerId, int]
    copies: int
    told: int
    fetches: int

    @property
    def last(self) -> int:
        return max(self.reached.values())

    @property
    def mean(self) -> float:
        return sum(self.reached.values()) / len(self.reached)

    @property
    def redundant(self) -> float:
        """Payload copies beyond the first, per member."""
        return (self.copies - (len(self.reached) - 1)) / self.members

    @property
    def complete(self) -> bool:
        return len(self.reached) == self.members


class Swarm:
    """Members in one overlay. ``liars`` tell everybody of every envelope at once, hold none, and answer no fetch."""

    def __init__(self, members: int, seed: int, settings: Settings = ROUNDS, liars: int = 0) -> None:
        self.rng = random.Random(f"{seed} world")
        self.now = 0.0
        self.has: dict[PeerId, dict[bytes, None]] = {}
        self.cores: dict[PeerId, Broadcast] = {}
        names = [peer(number) for number in range(members)]
        self.liars = dict.fromkeys(names[:liars])
        self.silent: dict[PeerId, None] = {}
        for name in names:
            self.has[name] = {}
            rng = random.Random(f"{seed} {name.text}")
            self.cores[name] = Broadcast(name, rng, lambda advert, name=name: advert.id in self.has[name], settings)
        for name in names:
            self._follow(name, self.cores[name].set_members(names, self.now))
        self._written = 0

    def _follow(self, name: PeerId, actions: Sequence[Action]) -> None:
        """Following happens between writes: it takes no round."""
        queue = [(name, action) for action in actions]
        while queue:
            me, action = queue.pop(0)
            assert isinstance(action, Follow)
            if action.leave:
                self.cores[action.peer].unfollowed(me)
            elif action.peer in self.silent or not self.cores[action.peer].followed(me, action.feed, self.now)[0]:
                queue += [(me, more) for more in self.cores[me].silent(action.peer, self.now)]

    def honest(self) -> list[PeerId]:
        return [name for name in self.cores if name not in self.silent and name not in self.liars]

    def fall_silent(self, share: float) -> None:
        """This share of all members vanishes, and nobody knows yet."""
        self.silent = dict.fromkeys(self.rng.sample(self.honest(), int(share * len(self.cores))))

    def notice(self) -> None:
        """Everybody finds out which of its neighbours are silent."""
        for name in self.honest():
            core = self.cores[name]
            for other in core.neighbours():
                if other in self.silent:
                    self._follow(name, core.silent(other, self.now))

    def write(self, *, loss: float = 0.0, size: int = 500, limit: int = 60) -> Spread:
        """One honest member writes an envelope; runs until nothing is under way any more, or ``limit`` rounds."""
        self._written += 1
        id = hashlib.blake2b(b"envelope %d" % self._written, digest_size=32).digest()
        honest = self.honest()
        author = self.rng.choice(honest)
        advert = Advert(DOCUMENT, author, 1, self._written, id)
        spread = Spread(len(honest), {}, 0, 0, 0)
        start = self.now
        mail: list[tuple[PeerId, Action]] = []  # (sender, what arrives in the next round)
        answers: list[tuple[PeerId, PeerId, tuple[Advert, ...]]] = []  # (asker, asked, what it asked for)

        def reached(name: PeerId, hop: int, senders: tuple[PeerId, ...]) -> None:
            self.has[name][id] = None
            spread.reached[name] = int(self.now - start)
            mail.extend((name, action) for action in self.cores[name].kept(advert, size, hop, self.now, senders))

        def payload(name: PeerId, sender: PeerId, hop: int) -> None:
            spread.copies += 1
            if not self.cores[name].pushed(sender, advert):
                reached(name, hop, (sender,))

        for liar in self.liars:
            core = self.cores[liar]
            mail += [(liar, Tell(other, (advert,))) for other in core.neighbours()]
        reached(author, 0, ())
        while (mail or answers or self._waiting(honest)) and self.now < start + limit:
            self.now += 1
            arriving, mail = mail, []
            answering, answers = answers, []
            for sender, action in arriving:
                if action.peer in self.silent or action.peer in self.liars or self.rng.random() < loss:
                    continue
                core = self.cores[action.peer]
                match action:
                    case Push(name, _, hop):
                        payload(name, sender, hop)
                    case Tell(name, adverts):
                        spread.told += 1
                        mail.extend((name, more) for more in core.advertised(sender, adverts, self.now))
                    case Fetch(name, adverts):
                        spread.fetches += 1
                        answers.append((sender, name, adverts))
                    case Follow():
                        self._follow(sender, [action])
            for asker, asked, adverts in answering:
                if self.rng.random() < loss:
                    continue
                if id in self.has[asked]:
                    payload(asker, asked, -1)
                more, _ = self.cores[asker].fetched(asked, adverts, self.now)
                mail.extend((asker, action) for action in more)
            for name in honest:
                mail.extend((name, action) for action in self.cores[name].tick(self.now))
        return spread

    def _waiting(self, honest: Sequence[PeerId]) -> bool:
        return any(self.cores[name].wanting for name in honest)


def plain_push(members: int, fanout: int, seed: int) -> Spread:
    """The simplest epidemic: whoever gets it first sends it to ``fanout`` members at random, once."""
    rng = random.Random(seed)
    names = [peer(number) for number in range(members)]
    spread = Spread(members, {names[0]: 0}, 0, 0, 0)
    fresh, round = [names[0]], 0
    while fresh:
        round += 1
        targets = [target for _ in fresh for target in rng.sample(names, fanout)]
        spread.copies += len(targets)
        fresh = []
        for target in targets:
            if target not in spread.reached:
                spread.reached[target] = round
                fresh.append(target)
    return spread
