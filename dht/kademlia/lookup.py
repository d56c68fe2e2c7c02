"""The iterative Kademlia lookup as a pure state machine: answers and failures in, peers to query next out.

A lookup ends when the ``k`` closest candidates that did not fail have all answered. Three things go beyond
the paper (Maymounkov & Mazières 2002, section 2.3):

* Adaptive parallelism. It begins with ``alpha`` queries in flight; each failure, and each answer that brings
  nothing closer, raises that by one up to ``alpha_max``, progress lowers it again. A quick lookup stays
  cheap and one among dead peers does not wait for them one by one.
* Patience without waiting. A query that takes longer than the others did (:class:`Slow`) gives its place to the next
  candidate, and still counts when its answer comes: a peer that has gone costs one more query, not its time-out.
* Disjoint paths (S/Kademlia, Baumgart & Mies 2007, section 4.3). With ``paths`` > 1 the first candidates are
  dealt to that many paths; a peer is queried on one path only, and a path hears only of the peers its own
  answers name. One liar misleads the path that met it. Where liars have surrounded us, or the target, all of the
  closest contacts may be theirs: the last path begins at ``outside`` contacts, from anywhere in the key space. When
  every path has its share of ``k``, what they found is merged and finished as one.

No randomness and no clock: the same events give the same queries.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum

import attrs

from ...transport.errors import ProtocolMisuse
from ...transport.identity import PeerId
from . import defaults
from .keys import node_key


@attrs.frozen
class Answered:
    """``peer`` answered and named ``closer``."""

    peer: PeerId
    closer: tuple[PeerId, ...]


@attrs.frozen
class Failed:
    """``peer`` gave no usable answer."""

    peer: PeerId


@attrs.frozen
class Slow:
    """``peer`` has been asked for longer than others take. Its answer or failure may still come."""

    peer: PeerId


Event = Answered | Failed | Slow


class State(Enum):
    NEW = "new"
    ASKED = "asked"
    ANSWERED = "answered"
    FAILED = "failed"


@attrs.define(eq=False)
class Candidate:
    """A peer that was named. ``sources``: who named it (empty for our own contacts); ``hops``: answers it took."""

    peer: PeerId
    distance: int
    hops: int
    sources: list[PeerId] = attrs.field(factory=list)
    state: State = State.NEW
    slow: bool = False


@attrs.define(eq=False)
class Path:
    """One disjoint path: its candidates by distance, and how many of its queries are in flight."""

    width: int
    alpha: int
    candidates: dict[PeerId, Candidate] = attrs.field(factory=dict)
    in_flight: int = 0
    best: int | None = None
    #: The candidates in order of distance.
    order: list[tuple[int, Candidate]] = attrs.field(factory=list)

    def add(self, candidate: Candidate) -> None:
        self.candidates[candidate.peer] = candidate
        insort(self.order, (candidate.distance, candidate))  # no two peers have one distance

    def extend(self, candidates: Sequence[Candidate]) -> None:
        """Add some that are farther than all so far, by rising distance."""
        self.candidates.update((candidate.peer, candidate) for candidate in candidates)
        self.order.extend((candidate.distance, candidate) for candidate in candidates)

    def drop(self, index: int) -> None:
        del self.candidates[self.order.pop(index)[1].peer]


class Lookup:
    """One lookup for ``target``. Drive it with :meth:`start`, then :meth:`receive` until :attr:`done`.

    ``seeds``: our own closest contacts. ``own`` is never queried. Queries in flight when :attr:`done` becomes
    True are no longer needed.
    """

    def __init__(
        self,
        target: int,
        seeds: Iterable[PeerId],
        *,
        own: PeerId | None = None,
        k: int = defaults.K,
        alpha: int = defaults.ALPHA,
        alpha_max: int = defaults.ALPHA_MAX,
        paths: int = 1,
        outside: Iterable[PeerId] = (),
        settled: int | None = None,
        max_queries: int = defaults.MAX_QUERIES,
    ) -> None:
        """``settled``: how many of the closest must have answered, on each path and in the end (default: ``k``)."""
        if min(k, alpha, paths, max_queries, settled or k) < 1 or alpha_max < alpha:
            raise ProtocolMisuse("a lookup needs k, alpha, paths, settled, max_queries >= 1 and alpha_max >= alpha")
        self.target = target
        self._settled = min(settled or k, k)
        self._missing: int | None = None
        self.k, self._alpha_min, self._alpha_max = k, alpha, alpha_max
        self._own, self._max_queries = own, max_queries
        self.queries = 0
        self.done = False
        self._claimed: dict[PeerId, Path] = {}
        self._named: dict[PeerId, list[int]] = {}  # source -> [answered, failed] among the peers it named
        candidates = [self._candidate(peer) for peer in dict.fromkeys(seeds) if peer != own]
        candidates.sort(key=lambda candidate: candidate.distance)
        known = {candidate.peer: None for candidate in candidates}
        others = [self._candidate(peer) for peer in dict.fromkeys(outside) if peer != own and peer not in known]
        apart = 1 if paths > 1 and others else 0
        paths = max(1, min(paths, len(candidates) + apart))
        width = min(-(-k // paths), self._settled)
        self._paths = [Path(width=width, alpha=max(1, -(-alpha // paths))) for _ in range(paths)]
        near = max(1, paths - apart)
        for index, path in enumerate(self._paths[:near]):
            path.extend(candidates[index::near])
        for candidate in others[: len(others) * apart]:
            self._paths[-1].add(candidate)

    def _candidate(self, peer: PeerId, hops: int = 0) -> Candidate:
        return Candidate(peer, node_key(peer) ^ self.target, hops)

    # -- events ----------------------------------------------------------------------------------------------

    def start(self, costs: Mapping[PeerId, float] | None = None) -> tuple[PeerId, ...]:
        """The first queries; none, and :attr:`done`, when there was nobody to ask.

        ``costs``: seconds that an answer of a seed is likely to take. Far from the target all contacts of a bucket take
        a lookup on alike, so the quickest of them are asked; near it the closest.
        """
        quick = [peer for path in self._paths for peer in self._quickest(path, costs)] if costs else []
        return (*quick, *self._due())

    def _quickest(self, path: Path, costs: Mapping[PeerId, float]) -> list[PeerId]:
        """The queries of ``path`` within its closest bucket, where that is large enough to be far from the target."""
        bits = path.order[0][0].bit_length() if path.order else 0
        bucket = [candidate for distance, candidate in path.order if distance.bit_length() == bits]
        if len(bucket) <= max(path.alpha, path.width // 2):
            return []
        bucket.sort(key=lambda candidate: costs.get(candidate.peer, float("inf")))
        return [self._ask(path, candidate) for candidate in bucket[: path.alpha - path.in_flight]]

    def _ask(self, path: Path, candidate: Candidate) -> PeerId:
        self.queries += 1
        self._claimed[candidate.peer] = path
        candidate.state = State.ASKED
        path.in_flight += 1
        return candidate.peer

    def receive(self, event: Event) -> tuple[PeerId, ...]:
        """Feed what became of one query; returns the queries to send now.

        Raises :class:`ProtocolMisuse` for a peer that was not asked or has answered already.
        """
        path = self._claimed.get(event.peer)
        candidate = None if path is None else path.candidates.get(event.peer)
        if path is None or candidate is None or candidate.state is not State.ASKED:
            raise ProtocolMisuse(f"{event.peer.short} has no query in flight")
        if not candidate.slow:
            path.in_flight -= 1
        progress = failed = False
        match event:
            case Slow():
                if candidate.slow:
                    raise ProtocolMisuse(f"{event.peer.short} was slow before")
                candidate.slow = True
                return () if self.done else self._due()
            case Failed():
                failed = True
                candidate.state = State.FAILED
            case Answered(closer=closer):
                candidate.state = State.ANSWERED
                self._learn(path, candidate, closer)
                progress = path.best is None or candidate.distance < path.best
                if progress:
                    path.best = candidate.distance
        for source in candidate.sources:
            self._named.setdefault(source, [0, 0])[failed] += 1
        path.alpha = max(path.alpha - 1, self._floor()) if progress else min(path.alpha + 1, self._ceiling())
        return () if self.done else self._due()

    def expose(self, peer: PeerId) -> None:
        """``peer`` has named somebody under a forged record: its answer counts for nothing, and it is believed last."""
        path = self._claimed.get(peer)
        candidate = None if path is None else path.candidates.get(peer)
        if candidate is not None and candidate.state is State.ANSWERED:
            candidate.state = State.FAILED
        self._named[peer] = [0, 1 << 30]

    def stop(self) -> None:
        """The caller has what it wants: no further queries."""
        self.done = True

    def expect(self, missing: int) -> None:
        """``missing`` more answers like the last one are all the caller wants: with as many in flight, none are added.

        One that is slow or fails is made up for.
        """
        self._missing = missing

    def discard(self, peer: PeerId) -> None:
        """A candidate that was not asked is of no use after all."""
        for path in self._paths:
            candidate = path.candidates.get(peer)
            if candidate is not None and candidate.state is State.NEW:
                candidate.state = State.FAILED

    def _floor(self) -> int:
        return max(1, -(-self._alpha_min // len(self._paths)))

    def _ceiling(self) -> int:
        return max(1, -(-self._alpha_max // len(self._paths)))

    def _learn(self, path: Path, source: Candidate, closer: tuple[PeerId, ...]) -> None:
        candidates, asker = path.candidates, source.peer
        for peer in closer:
            known = candidates.get(peer)
            if known is None:
                if peer == self._own or peer in self._claimed:  # another path's
                    continue
                known = self._candidate(peer, source.hops + 1)
                known.sources.append(asker)
                path.add(known)
            elif known.sources and known is not source and asker not in known.sources:
                known.sources.append(asker)
        index = len(path.order)
        while len(path.order) > defaults.MAX_CANDIDATES and index:
            index -= 1
            if path.order[index][1].state is State.NEW:
                path.drop(index)

    def knows(self, enough: int, distance: int) -> bool:
        """True when so many peers within ``distance`` of the target are known that have not failed, on one path."""
        if len(self._paths) > 1:
            return False
        for away, candidate in self._paths[0].order:
            if away > distance:
                return False
            enough -= candidate.state is not State.FAILED
            if enough <= 0:
                return True
        return False

    # -- decisions -------------------------------------------------------------------------------------------

    def _believed(self, candidate: Candidate) -> bool:
        """False when everybody who named ``candidate`` has mostly named peers that do not answer."""
        if not candidate.sources:
            return True
        for source in candidate.sources:
            answered, failed = self._named.get(source, (0, 0))
            if failed < defaults.DISCREDIT_FAILURES or failed < 2 * answered:
                return True
        return False

    def _askable(self, path: Path, candidate: Candidate) -> bool:
        """True when ``candidate`` is new and may be queried on ``path``."""
        free = candidate.state is State.NEW and self._claimed.get(candidate.peer, path) is path
        return free and self.queries < self._max_queries and self._believed(candidate)

    def _wanted(self, path: Path) -> list[PeerId]:
        """Queries that ``path`` sends now: new ones among its ``width`` closest that live, up to alpha in flight."""
        wanted: list[PeerId] = []
        alive = 0
        room = (path.alpha if self._missing is None else min(path.alpha, self._missing)) - path.in_flight
        for _, candidate in path.order:
            if room <= 0 or alive >= path.width:
                break
            if candidate.state is State.FAILED or (candidate.slow and candidate.state is State.ASKED):
                continue
            if candidate.state is State.NEW:
                if not self._askable(path, candidate):
                    continue
                wanted.append(self._ask(path, candidate))
                room -= 1
            alive += 1
        return wanted

    def _finished(self, path: Path) -> bool:
        """True when the ``width`` closest live candidates have answered, or nobody is left to ask."""
        answered = 0
        for _, candidate in path.order:
            if candidate.state is State.ANSWERED:
                answered += 1
                if answered >= path.width:
                    return True
            elif candidate.state is State.ASKED or self._askable(path, candidate):
                return False
        return True

    def _due(self) -> tuple[PeerId, ...]:
        wanted = [peer for path in self._paths for peer in self._wanted(path)]
        if not wanted and all(self._finished(path) for path in self._paths):
            if len(self._paths) > 1:
                self._merge()
                return self._due()
            self.done = True
        return tuple(wanted)

    def _merge(self) -> None:
        """All paths have their share: go on as one path over everything they found."""
        merged = Path(width=self._settled, alpha=self._alpha_max)
        for path in self._paths:
            merged.in_flight += path.in_flight
            for peer, candidate in path.candidates.items():
                held = merged.candidates.get(peer)
                if held is None or held.state is State.NEW:
                    merged.candidates[peer] = candidate
        merged.order = sorted((candidate.distance, candidate) for candidate in merged.candidates.values())
        for peer in self._claimed:
            self._claimed[peer] = merged
        self._paths = [merged]

    # -- results ---------------------------------------------------------------------------------------------

    @property
    def closest(self) -> tuple[PeerId, ...]:
        """The up to ``k`` closest peers that answered, by rising distance."""
        return tuple(candidate.peer for candidate in self._answered()[: self.k])

    def ranked(self, n: int) -> tuple[PeerId, ...]:
        """The up to ``n`` closest peers that answered, or that nobody has asked and that are believed to be there."""
        found = {
            c.distance: c.peer
            for path in self._paths
            for _, c in path.order
            if c.state is State.ANSWERED or (c.state is State.NEW and self._believed(c))
        }
        return tuple(found[distance] for distance in sorted(found)[:n])

    @property
    def hops(self) -> int:
        """Answers in a row that led to the closest peer that answered, its own included; 0 when nobody did."""
        answered = self._answered()
        return answered[0].hops + 1 if answered else 0

    def states(self) -> Mapping[PeerId, State]:
        """Every candidate and what became of it."""
        return {c.peer: c.state for path in self._paths for _, c in path.order}

    def _answered(self) -> list[Candidate]:
        answered = [c for path in self._paths for c in path.candidates.values() if c.state is State.ANSWERED]
        return sorted(answered, key=lambda candidate: candidate.distance)
