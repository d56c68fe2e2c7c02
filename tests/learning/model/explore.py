"""Goes through the states of a :class:`Table`: all of them within a budget, or many long ways at random."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

import attrs

from shoal.learning.rounds.messages import ANSWERED, Commit, Reject, quorum

from .seats import Shape, forget_hashes
from .table import Table
from .words import Broken, Budget, Step

#: What fires on its own account. What is left out fires along with these, as late as on a stalled machine.
TIMERS = ("suspect", "phase", "until", "grace")

#: Steps within which the acting peer may die.
DIES = ("deliver", "timer", "lose")

#: Virtual seconds within which a round ends once nothing goes wrong any more: some turns of all candidates, whose
#: patience doubles with every turn.
WITHIN = 400.0

#: Steps of a way at random, at most: ten rounds' worth.
LONGEST = 400

Link = tuple["Link | None", Step]


@attrs.define
class Found:
    """What an exploration saw. ``states``: different ones; ``steps``: ways between them; ``whole``: none was left."""

    states: int = 0
    steps: int = 0
    ended: int = 0
    committed: int = 0
    deepest: int = 0
    whole: bool = False
    broken: str = ""
    trace: tuple[Step, ...] = ()
    start: Table | None = None

    def story(self) -> str:
        """The way to what is broken, for people."""
        if not self.broken or self.start is None:
            return f"{self.states} states, {self.steps} steps: nothing wrong"
        return f"{self.broken}\n" + "\n".join(tell(self.start, self.trace))

    def line(self) -> str:
        left = "all" if self.whole else "not all"
        return (
            f"{self.states} states ({left}), {self.steps} steps, at most {self.deepest} deep; "
            f"{self.committed} with a commit, {self.ended} run to their end"
        )


def explore(
    start: Table,
    budget: Budget,
    *,
    ordered: bool = False,
    timers: tuple[str, ...] = TIMERS,
    limit: int = 10_000_000,
    every: int = 0,
    within: float = WITHIN,
) -> Found:
    """Every state that can be reached with the faults of ``budget``, up to ``limit`` states.

    ``ordered``: messages come in the order in which they were sent, but for those of a pair that is held (a fault);
    without it in every order that keeps each pair's. One state of every ``every`` (0: none) is let run to its end
    without further faults (:func:`ends`). Stops at the first thing that is broken, with as short a way to it as
    :func:`shorten` finds.
    """
    found = Found(start=start)
    seen: dict[int, list[Budget]] = {start.fingerprint(ordered=ordered): [budget]}
    stack: list[tuple[Table, Budget, Link | None, int]] = [(start, budget, None, 0)]
    found.states = 1

    def visit(table: Table, left: Budget, link: Link, depth: int) -> None:
        found.steps += 1
        print_ = table.fingerprint(ordered=ordered)
        known = seen.get(print_)
        if known is None:
            seen[print_] = [left]
            found.states += 1
            found.committed += bool(table.records)
            if every and found.states % every == 0:
                found.ended += 1
                wrong = ends(table, within)
                if wrong:
                    raise _Stop(wrong, link)
        elif any(_covers(other, left) for other in known):
            return
        else:
            known[:] = [other for other in known if not _covers(left, other)]
            known.append(left)
        stack.append((table, left, link, depth))

    try:
        while stack:
            table, left, link, depth = stack.pop()
            if found.states >= limit:
                return found
            found.deepest = max(found.deepest, depth)
            if not left.crash and all(seat.commit is not None for seat in table.seats):
                continue  # whatever is still under way means nothing to anybody
            free = [(step, left) for step in table.free(ordered=ordered)]
            if not ordered:
                # What comes too late to mean anything may come at once: when it comes makes no difference.
                final = not left.crash
                late = (step for step, _ in free if step[0] == "deliver" and _stale(table, step, final=final))
                step = next(late, None)
                if step is not None:
                    visit(table.after(step), left, (link, step), depth + 1)
                    continue
            faults = table.faults(left, timers, ordered=ordered)
            free += [(step, after) for step, kind in faults if (after := left.less(kind)) is not None]
            for step, after in free:
                here: Link = (link, step)
                try:
                    reached = table.after(step)
                    visit(reached, after, here, depth + 1)
                    dying = after.less("crash") if len(step) == 3 and step[0] in DIES else None
                    for effects in range(1, reached.effects) if dying is not None else ():
                        here = (link, (*step, effects))
                        visit(table.after((*step, effects)), dying, here, depth + 1)
                except Broken as broken:
                    raise _Stop(str(broken), here) from broken
        found.whole = True
    except _Stop as stop:
        found.broken, found.trace = stop.args[0], _way(stop.args[1])
        found.trace = shorten(start, found.trace, lambda table: ends(table, within) if every else None)
        found.broken = failing(start, found.trace, lambda table: ends(table, within) if every else None) or found.broken
    finally:
        forget_hashes()
    return found


def _stale(table: Table, step: Step, *, final: bool) -> bool:
    """Whether the message that ``step`` delivers means nothing to its receiver, now or at any later time.

    ``final``: nobody who has ended the round can crash any more.
    """
    seat, message = table.seats[step[2]], table.queues[step[1], step[2]][0]
    if isinstance(message, Commit | Reject) or not seat.alive:
        return False
    if seat.commit is not None:
        return final and not isinstance(message, ANSWERED)
    if message.attempt >= seat.voter.promised or (seat.leader is not None and message.attempt >= seat.leader.attempt):
        return False
    after = table.after(step)
    return not after.effects and after.seats[step[2]].fingerprint() == seat.fingerprint()


class _Stop(Exception):
    pass


def _way(link: Link | None) -> tuple[Step, ...]:
    steps: list[Step] = []
    while link is not None:
        link, step = link
        steps.append(step)
    return tuple(reversed(steps))


def _covers(a: Budget, b: Budget) -> bool:
    return all(x >= y for x, y in zip(attrs.astuple(a), attrs.astuple(b), strict=True))


def walk(
    start: Table,
    budget: Budget,
    seed: int,
    *,
    timers: tuple[str, ...] = (*TIMERS, "word", "resend"),
    to_end: bool = True,
) -> Found:
    """One long way at random, with the faults of ``budget`` somewhere on it, and then on to its end (``to_end``).

    Every way has only some kinds of faults, and ways of its own that are slow: what all ways have a little of, none has
    enough of (swarm testing, Groce et al. 2012; priorities that change a few times, Burckhardt et al. 2010).
    """
    chance, found, table, way = random.Random(seed), Found(start=start), start, list[Step]()
    haste = chance.choice((0.02, 0.1, 0.3))
    kinds = [name for name in attrs.asdict(budget) if name != "total"]
    budget = attrs.evolve(budget, **dict.fromkeys(chance.sample(kinds, chance.randrange(len(kinds) - 1)), 0))
    ranks: dict[tuple[int, int], float] = {}
    orderly = chance.random() < 0.7
    then = ends if to_end else lambda table: None
    try:
        for _ in range(LONGEST):
            free = list(table.free())
            faults = list(table.faults(budget, timers))
            if not free and not faults:
                break
            if faults and (not free or chance.random() < haste):
                kinds = sorted({kind for _, kind in faults})
                kind = chance.choice(kinds)
                step = chance.choice([step for step, of in faults if of == kind])
                budget = budget.less(kind) or budget
            else:
                # Notices and restarts come late now and then.
                sent = [step for step in free if step[0] == "deliver"]
                step = chance.choice(sent if sent and chance.random() < 0.8 else free)
                if orderly and step[0] == "deliver":
                    for pair in (each[1:] for each in sent):
                        ranks.setdefault(pair, chance.random())
                    if chance.random() < 0.05:
                        ranks[step[1:]] = chance.random()
                    step = max(sent, key=lambda each: ranks[each[1:]])
            dying = budget.less("crash") if len(step) == 3 and step[0] in DIES else None
            if dying is not None and chance.random() < haste:
                step, budget = (*step, chance.randint(1, 6)), dying
            way.append(step)
            table = table.after(step)
            found.steps += 1
        found.ended += 1
        found.committed += bool(table.records)
        wrong = then(table)
        if wrong:
            raise Broken(wrong)
    except Broken as broken:
        found.broken = str(broken)
        found.trace = shorten(start, tuple(way), then)
        found.broken = failing(start, found.trace, then) or found.broken
    finally:
        forget_hashes()
    return found


# -- fairness -------------------------------------------------------------------------------------------


def ends(table: Table, within: float = WITHIN) -> str | None:
    """None when the round ends for every peer that lives, once nothing goes wrong any more; else who is left.

    Tried twice: with whoever is dead staying dead, if a majority lives and with it a memory of what may have been
    decided; and with the dead back.
    """
    wrong = None
    if sum(seat.alive for seat in table.seats) >= quorum(table.shape.count) and _remembered(table):
        wrong = _fair(table.own(), within, back=False)
    return wrong or _fair(table.own(), within, back=True)


def _remembered(table: Table) -> bool:
    """Whether some peer that lives still holds the result of whatever another that lives has accepted.

    In strict mode the others rightly wait otherwise, until all are there.
    """
    held = {digest: None for seat in table.seats if seat.alive for digest in seat.final}
    for seat in table.seats:
        accepted = seat.voter.accepted if seat.alive and seat.commit is None else None
        if accepted is not None and accepted.record.digest not in held:
            return not table.shape.strict
    return True


def _fair(table: Table, within: float, *, back: bool) -> str | None:
    for step in [s for s in table.free() if s[0] in ("mend", "release")]:
        table.take(step)
    for seat in list(table.seats):
        if back and not seat.alive:
            table.take(("restart", seat.place))
    now = 0.0
    while True:
        for step in [s for s in table.free() if s[0] in ("begin", "lose", "find")]:
            if table.can(step):
                table.take(step)
        count = 0
        while table.queues:
            for sender, to in list(table.queues):
                table.take(("deliver", sender, to))
                count += 1
            if count > 20_000:
                return f"messages without end: {table.queues}"
        waiting = [seat for seat in table.seats if seat.alive and seat.commit is None]
        if not waiting:
            return None
        dues = [(due - seat.clock, seat) for seat in waiting if (due := seat.due()) is not None]
        if not dues or now > within:
            names = "; ".join(
                f"{s.place}: {s.voter.phase} at {s.voter.attempt} ({s.voter.reason})"
                + (f", leads {s.leader.attempt}: {s.leader.phase} ({s.leader._reason})" if s.leader else "")
                for s in waiting
            )
            there = "all are back" if back else "the dead stay dead"
            return f"the round has not ended {now:.0f} s after the last fault ({there}): {names}"
        pause = max(0.0, min(due for due, _ in dues))
        now += pause
        for seat in table.seats:
            seat.clock += pause
        for due, seat in dues:
            if due <= pause:
                table.run_timers(seat.place)
                again = seat.due()
                if seat.commit is None and again is not None and again <= seat.clock:
                    return f"{seat.place} ticks for ever without time going on"


# -- counterexamples ------------------------------------------------------------------------------------


def failing(start: Table, way: Iterable[Step], then: Callable[[Table], str | None]) -> str | None:
    """What goes wrong on this way, steps that mean nothing left out; ``then`` looks at where it leads."""
    table = start
    try:
        for step in way:
            if table.can(step):
                table = table.after(step)
        return then(table)
    except Broken as broken:
        return str(broken)


def shorten(start: Table, way: tuple[Step, ...], then: Callable[[Table], str | None]) -> tuple[Step, ...]:
    """The same failure with fewer steps: chunks are left out as long as something is still wrong."""
    size = len(way) // 2
    while size >= 1:
        at = 0
        while at < len(way):
            shorter = way[:at] + way[at + size :]
            if failing(start, shorter, then):
                way = shorter
            else:
                at += size
        size //= 2
    # Steps that mean nothing any more.
    table, kept = start, list[Step]()
    try:
        for step in way:
            if table.can(step):
                kept.append(step)
                table = table.after(step)
    except Broken:
        pass
    return tuple(kept)


def tell(start: Table, way: Iterable[Step]) -> list[str]:
    """Every step of a way and what it makes the peers do."""
    lines: list[str] = []
    table = start
    for step in way:
        lines.append(" ".join(map(str, step)))
        try:
            table = table.after(step, lines)
        except Broken as broken:
            lines.append(f"  !! {broken}")
            break
    return lines


def round_of(count: int, **options: object) -> Table:
    """The beginning of a round of ``count`` peers."""
    return Table(Shape(count, **options))  # type: ignore[arg-type]
