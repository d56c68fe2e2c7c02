"""Which peer holds which stage, and who takes over a lost one: pure functions of what is known, with their reasons.

Theory of operation: a replica of a stage computes as many samples a second as its speed *and* its line allow, a stage
as many as its replicas together, the pipeline as many as its slowest stage. Memory says only where a peer can be at
all. So compute and memory are one problem (Cephalo: Guo et al., 2024, arXiv 2411.01075, section 3, there for shares of
a batch and of a state), here: give each peer one stage that it has the memory for, such that the slowest stage is as
fast as can be, then the second slowest, and so on. That is max-min allocation of indivisible goods, NP-hard in
general: few peers are solved exactly, by dynamic programming over the rates that stages can have together; many by a
greedy start, exchanges, and prices. Peers of the same view find the same plan, whatever the order they know each other
in.
"""

from __future__ import annotations

import math
from base64 import b32encode
from collections.abc import Collection, Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import TypeAlias

import attrs

from . import defaults


@attrs.frozen
class Able:
    """What a peer can do. ``rate``: of computing, in units of :attr:`StageCost.flops` a second; ``memory``: bytes;
    ``bandwidth``: bytes/s."""

    peer: bytes
    rate: float
    memory: float
    bandwidth: float


@attrs.frozen
class StageCost:
    """What a stage asks for. ``flops``: computing for one sample, forward and backward; ``memory``: bytes for its state
    and activations; ``bytes``: that come and go for one sample. Zero: costs nothing."""

    flops: float
    memory: float
    bytes: float


#: Of each stage, samples a second in the planner's unit (:func:`_table`).
Rates: TypeAlias = tuple[int, ...]
#: Of each peer, in the order of their ids, its stage; the stages it may get.
Seats: TypeAlias = list[int]
Options: TypeAlias = list[list[int]]
#: Peers, and the stages they go to.
Moves: TypeAlias = tuple[tuple[int, int], ...]


def assign(
    peers: Iterable[Able], costs: Sequence[StageCost], *, held: Mapping[bytes, int] = {}
) -> tuple[dict[bytes, int], str]:
    """The stage of each peer that can hold one, and why; no stage for anybody when there is no plan.

    ``held``: stages that peers hold now, which proves that they have the memory for it. They stay, unless moving them
    makes the slowest stage more than ``defaults.MOVE_GAIN`` times as fast: a move costs the transfer of a state.

    Maximises in this order: the rate of the slowest stage, of the second slowest, ...; the number of holders that stay;
    then the smallest stages go to the smallest ids. Exactly so where that takes no more than
    ``defaults.MAX_PLANS`` steps (always for 7 peers and 3 stages), else nearly. Raises ValueError for no stages, a peer
    that is there twice, negative numbers and infinite costs.
    """
    all_peers = sorted(peers, key=lambda able: able.peer)
    _check(all_peers, costs)
    rates, unit = _table(all_peers, costs, held)
    there = [able for able, row in zip(all_peers, rates, strict=True) if any(row)]
    left = [able.peer for able, row in zip(all_peers, rates, strict=True) if not any(row)]
    rates = [row for row in rates if any(row)]
    out = f"; left out, too small for every stage: {_names(left)}" if left else ""
    for stage, cost in enumerate(costs):
        if not any(row[stage] for row in rates):
            return {}, f"nobody can hold stage {stage}, which takes {_size(cost.memory)}{out}"
    if len(there) < len(costs):
        return {}, f"{len(there)} peers for {len(costs)} stages{out}"
    before = [_held(held, able.peer, len(costs)) for able in there]
    problem = _Problem(rates, before, len(costs))
    tight = problem.tight()
    if tight is not None:
        stages, few = tight
        return {}, (
            f"stages {', '.join(map(str, stages))} can be held by {_names(there[each].peer for each in few)} only{out}"
        )
    seats = problem.solve()
    total = problem.sums(seats)
    slowest = min(range(len(costs)), key=lambda stage: (total[stage], stage))
    moved = [able.peer for able, at, was in zip(there, seats, before, strict=True) if was is not None and at != was]
    counts = ", ".join(str(seats.count(stage)) for stage in range(len(costs)))
    reason = f"{counts} peers at stages 0 to {len(costs) - 1}, the slowest is {slowest}"
    if total[slowest] < 1 << defaults.FREE_BITS:
        reason += f" with {total[slowest] * unit:.3g} samples/s"
    if moved:
        reason += f"; moved for more than {defaults.MOVE_GAIN:g} times the speed: {_names(moved)}"
    return {able.peer: stage for able, stage in zip(there, seats, strict=True)}, reason + out


def place(newcomer: Able, peers: Iterable[Able], costs: Sequence[StageCost], held: Mapping[bytes, int]) -> int | None:
    """The stage at which ``newcomer`` helps most while all others stay where they are; None: it can hold none.

    Most: as :func:`assign` compares plans. ``peers``: the others, each with a stage in ``held``.
    """
    able = [newcomer, *sorted(peers, key=lambda each: each.peer)]
    rates, _ = _table(able, costs, held)
    total = [0] * len(costs)
    for each, row in zip(able[1:], rates[1:], strict=True):
        total[held[each.peer]] += row[held[each.peer]]
    options = [stage for stage, rate in enumerate(rates[0]) if rate]
    after = {stage: sorted(t + rates[0][s] * (s == stage) for s, t in enumerate(total)) for stage in options}
    return max(options, key=lambda stage: (after[stage], -stage), default=None)


def rescuer(holders: Mapping[int, Collection[bytes]], spares: Collection[bytes], lost: int) -> tuple[bytes | None, str]:
    """Who takes over stage ``lost``, which nobody holds, and why: a spare, or a replica of the stage that has most.

    Never the only holder of a stage. All who see the same decide the same; which one it is depends on the stage:
    two stages lost at once go to two peers more often than not.
    """
    if holders.get(lost):
        return None, f"stage {lost} is held by {_names(sorted(holders[lost]))}"
    if spares:
        return min(spares, key=lambda peer: _draw(lost, peer)), f"stage {lost} goes to a spare"
    most = min(holders, key=lambda stage: (-len(holders[stage]), stage), default=None)
    if most is None or len(holders[most]) < 2:
        return None, f"stage {lost} stays lost: there is no spare, and no other stage has a replica to give"
    found = min(holders[most], key=lambda peer: _draw(lost, peer))
    return found, f"stage {lost} goes to one of the {len(holders[most])} replicas of stage {most}"


def _draw(lost: int, peer: bytes) -> tuple[bytes, bytes]:
    return blake2b(lost.to_bytes(8, "big") + peer, digest_size=16, person=b"shoal rescue").digest(), peer


# --- reading what is given --------------------------------------------------------------------------------------------


def _check(peers: Sequence[Able], costs: Sequence[StageCost]) -> None:
    if not costs:
        raise ValueError("no stages")
    if len({able.peer for able in peers}) < len(peers):
        raise ValueError("a peer is there twice")
    numbers = [n for able in peers for n in (able.rate, able.memory, able.bandwidth)]
    numbers += [n for cost in costs for n in (cost.flops, cost.memory, cost.bytes)]
    if not all(n >= 0 for n in numbers):
        raise ValueError("a negative rate, memory, bandwidth or cost")
    if any(math.isinf(n) for cost in costs for n in (cost.flops, cost.bytes)):
        raise ValueError("an infinite cost")


def _held(held: Mapping[bytes, int], peer: bytes, stages: int) -> int | None:
    stage = held.get(peer, -1)
    return stage if 0 <= stage < stages else None


def _table(peers: Sequence[Able], costs: Sequence[StageCost], held: Mapping[bytes, int]) -> tuple[list[Rates], float]:
    """Samples a second of each peer at each stage, 0: it cannot hold it; and how many samples/s the unit is.

    The unit is a power of two, rates are whole: sums do not depend on their order.
    """
    plain = [[min(_over(able.rate, c.flops), _over(able.bandwidth, c.bytes)) for c in costs] for able in peers]
    greatest = max((rate for row in plain for rate in row if not math.isinf(rate)), default=1.0)
    shift = defaults.RATE_BITS - math.frexp(greatest)[1]
    rows: list[Rates] = []
    for able, row in zip(peers, plain, strict=True):
        mine = _held(held, able.peer, len(costs))
        rows.append(
            tuple(
                _whole(rate, shift) if stage == mine or (rate > 0 and able.memory >= cost.memory) else 0
                for stage, (rate, cost) in enumerate(zip(row, costs, strict=True))
            )
        )
    return rows, math.ldexp(1.0, -shift)


def _over(speed: float, cost: float) -> float:
    return speed / cost if cost else math.inf


def _whole(rate: float, shift: int) -> int:
    return 1 << defaults.FREE_BITS if math.isinf(rate) else max(1, round(math.ldexp(rate, shift)))


def _names(peers: Iterable[bytes]) -> str:
    return ", ".join(b32encode(peer).decode().lower()[:8] for peer in peers)


def _size(count: float) -> str:
    return f"{count / 1e6:.3g} MB"


# --- the plan ---------------------------------------------------------------------------------------------------------


class _Problem:
    """``rates``: of each peer at each stage, 0: impossible; ``before``: what it holds. Peers are numbers, by their ids'
    order. Each has a stage that it can hold, each stage a peer."""

    def __init__(self, rates: Sequence[Rates], before: Sequence[int | None], stages: int) -> None:
        self.rates, self.before, self.stages = rates, before, stages
        self.options: Options = [[stage for stage in range(stages) if row[stage]] for row in rates]
        self.staying: Options = [o if b is None else [b] for o, b in zip(self.options, before, strict=True)]

    def solve(self) -> Seats:
        """The plan, see :func:`assign`. Only where there is one (:meth:`tight`)."""
        found = self._plan(self.staying)
        if found is not None and self.staying == self.options:
            return found
        moving = [self._plan(self.options)]
        if not _few(self.options):  # exchanges that begin where all are move fewer than a plan from nothing does
            near = self._greedy(self.staying) if found is None else list(found)
            self._cover(near, self.options)
            moving.insert(0, self._exchanged(near, self.options, only_slowest=True))
        for other in moving:
            if other is not None and (found is None or self._floor(other) > defaults.MOVE_GAIN * self._floor(found)):
                found = other
        assert found is not None
        return found

    def tight(self) -> tuple[list[int], list[int]] | None:
        """Stages that fewer peers can hold than they are, and these peers (Hall's theorem); None: there is a plan."""
        return self._cover([options[0] for options in self.options], self.options)

    def sums(self, seats: Sequence[int]) -> Rates:
        """The rate of each stage."""
        total = [0] * self.stages
        for row, stage in zip(self.rates, seats, strict=True):
            total[stage] += row[stage]
        return tuple(total)

    def _floor(self, seats: Sequence[int]) -> int:
        return min(self.sums(seats))

    def _plan(self, options: Options) -> Seats | None:
        """The best plan in which each peer gets one of its ``options``; None: there is none."""
        seats = self._greedy(options)
        if self._cover(seats, options) is not None:
            return None
        seats = self._exchanged(seats, options)
        if _few(options):
            return self._exact(options, self._floor(seats)) or seats
        other = self._priced(options)
        self._cover(other, options)
        return max(seats, self._exchanged(other, options), key=lambda found: sorted(self.sums(found)))

    # -- many peers ---------------------------------------------------------------------------------------------------

    def _greedy(self, options: Options) -> Seats:
        """Each peer, those with few options and the fast ones first, goes where it multiplies the rate most."""
        order = sorted(range(len(options)), key=lambda n: (len(options[n]), -max(self.rates[n]), n))
        return self._seated(order, options)

    def _priced(self, options: Options) -> Seats:
        """As :meth:`_greedy`, but peers go only where they are of use: a sample/s is worth more at a stage that the
        peers do badly. Those that know best where begin.

        The prices are what the fractional problem's dual has (a peer may be at several stages then), by multiplicative
        weights: in each turn all go where they earn most, and a stage's price falls by what it got.
        """
        now, mean = [1.0] * self.stages, [0.0] * self.stages
        for turn in range(defaults.PRICE_TURNS):
            total = [0] * self.stages
            for row, can in zip(self.rates, options, strict=True):
                best = max(can, key=lambda stage: now[stage] * row[stage])
                total[best] += row[best]
            pace = 1 / math.sqrt(turn + 1) / max(total)
            now = [price * math.exp(-pace * got) for price, got in zip(now, total, strict=True)]
            now = [price / max(now) for price in now]
            mean = [a + b for a, b in zip(mean, now, strict=True)]
        earned = [[mean[stage] * row[stage] for stage in can] for row, can in zip(self.rates, options, strict=True)]
        good = [
            [stage for stage, value in zip(can, values, strict=True) if value >= defaults.PRICE_SLACK * max(values)]
            for can, values in zip(options, earned, strict=True)
        ]
        doubt = [0.0 if len(values) < 2 else sorted(values)[-2] / max(values) for values in earned]
        return self._seated(sorted(range(len(options)), key=lambda n: (doubt[n], n)), good)

    def _seated(self, order: Iterable[int], options: Options) -> Seats:
        seats, total = [0] * len(options), [0] * self.stages
        for each in order:
            row = self.rates[each]
            at = max(options[each], key=lambda stage: (not total[stage], row[stage] / (total[stage] or 1), -stage))
            seats[each] = at
            total[at] += row[at]
        return seats

    def _cover(self, seats: Seats, options: Options) -> tuple[list[int], list[int]] | None:
        """Move peers until each stage has one (augmenting paths); or what :meth:`tight` says."""
        counts = [seats.count(stage) for stage in range(self.stages)]
        for empty in range(self.stages):
            if counts[empty]:
                continue
            #: From which peer's move to which stage a stage loses a peer.
            way: dict[int, tuple[int, int]] = {}
            reached = [empty]
            for stage in reached:
                for each, at in enumerate(seats):
                    if stage in options[each] and at not in reached:
                        way[at] = (each, stage)
                        reached.append(at)
            given = next((stage for stage in reached if counts[stage] > 1), None)
            if given is None:
                return sorted(reached), [n for n, o in enumerate(options) if any(stage in reached for stage in o)]
            counts[given] -= 1
            counts[empty] += 1
            while given != empty:
                each, given = way[given]
                seats[each] = given
        return None

    def _exchanged(self, seats: Seats, options: Options, *, only_slowest: bool = False) -> Seats:
        """``seats`` after moves and swaps, each of which speeds up a stage and leaves no other behind what it was."""
        tries = 1 if only_slowest else self.stages
        total = list(self.sums(seats))
        for _ in range(defaults.MAX_EXCHANGES):
            for slow in sorted(range(self.stages), key=lambda stage: (total[stage], stage))[:tries]:
                found = self._exchange(seats, options, total, slow)
                if found is not None:
                    break
            else:
                break
            for each, stage in found:
                total[seats[each]] -= self.rates[each][seats[each]]
                total[stage] += self.rates[each][stage]
                seats[each] = stage
        return seats

    def _exchange(self, seats: Seats, options: Options, total: Sequence[int], slow: int) -> Moves | None:
        """Moves of one peer to stage ``slow``, and maybe of one from there or from a third stage to where it was, after
        which the slowest of these stages is fastest; None: not faster than ``slow`` is."""
        best = total[slow]
        found: Moves | None = None
        rows = list(zip(range(len(seats)), self.rates, seats, strict=True))
        here = [(other, row) for other, row, at in rows if at == slow]
        for each, mine, at in rows:
            if at == slow or not mine[slow] or slow not in options[each] or total[at] <= total[slow]:
                continue
            gain, left = total[slow] + mine[slow], total[at] - mine[at]
            if min(gain, left) > best:
                best, found = min(gain, left), ((each, slow),)
            if gain <= best:
                continue
            for other, row in here:
                worse = min(gain - row[slow], left + row[at])
                if worse > best and at in options[other]:
                    best, found = worse, ((each, slow), (other, at))
        return found or self._chain(rows, options, total, slow)

    def _chain(
        self, rows: Sequence[tuple[int, Rates, int]], options: Options, total: Sequence[int], slow: int
    ) -> Moves | None:
        best, found = total[slow], None
        spare = [(other, row, at) for other, row, at in rows if total[at] - row[at] > total[slow]]
        for each, mine, at in rows:
            gain, left = total[slow] + mine[slow], total[at] - mine[at]
            if at == slow or slow not in options[each] or gain <= best:
                continue
            for other, row, third in spare:
                if left + row[at] > best and third not in (at, slow) and at in options[other]:
                    worse = min(gain, left + row[at], total[third] - row[third])
                    if worse > best:
                        best, found = worse, ((each, slow), (other, at))
        return found

    # -- few peers ----------------------------------------------------------------------------------------------------

    def _exact(self, options: Options, floor: int) -> Seats | None:
        """The best plan; None: it takes too many. Some plan's slowest stage has rate ``floor``.

        Of plans for some of the peers that give all stages the same rates only the best can be part of the whole's: the
        one that moves fewest, and then comes first.
        """
        order = sorted(range(len(options)), key=lambda n: (-max(self.rates[n]), n))
        weight = [self.stages ** (len(options) - 1 - n) for n in range(len(options))]
        rest = [0] * self.stages
        for n in order:
            for stage in options[n]:
                rest[stage] += self.rates[n][stage]
        most = sum(max(self.rates[n][stage] for stage in options[n]) for n in order)
        tried = 0
        plans: dict[Rates, tuple[int, int]] = {(0,) * self.stages: (0, 0)}
        for n in order:
            row, before = self.rates[n], self.before[n]
            most -= max(row[stage] for stage in options[n])
            for stage in options[n]:
                rest[stage] -= row[stage]
            after: dict[Rates, tuple[int, int]] = {}
            for total, (moves, number) in plans.items():
                for stage in options[n]:
                    rates = (*total[:stage], total[stage] + row[stage], *total[stage + 1 :])
                    lacking = 0
                    for has, can in zip(rates, rest, strict=True):
                        if has < floor:
                            if has + can < floor:
                                break
                            lacking += floor - has
                    else:
                        if lacking <= most:
                            moved = before is not None and before != stage
                            value = (moves + moved, number + stage * weight[n])
                            if rates not in after or value < after[rates]:
                                after[rates] = value
                if (tried := tried + len(options[n])) > defaults.MAX_PLANS:
                    return None
            plans = after
        _, (_, number) = min(plans.items(), key=lambda item: ([-rate for rate in sorted(item[0])], item[1]))
        return [number // each % self.stages for each in weight]


def _few(options: Options) -> bool:
    return sum(len(each) > 1 for each in options) <= defaults.MAX_FEW
