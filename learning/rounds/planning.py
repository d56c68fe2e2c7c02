"""Plans of a round as pure functions: the first one of an attempt, the next epoch's, and who was too late for them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import attrs

from ...transport import deadlines
from ...transport.identity import PeerId
from .. import defaults
from ..aggregate.aggregator import Aggregator
from ..reduce import topology
from ..reduce.codecs import FP32, resolve
from ..reduce.slices import covers, reassign
from .actions import Pace
from .decisions import contributors, kind_of, shares, short
from .messages import Plan, Progress, Ready
from .weighing import MEAN, too_few


def first_plan(
    key: bytes,
    attempt: int,
    ready: Mapping[PeerId, Ready],
    me: PeerId,
    needed: int,
    reason: str,
    rule: Aggregator = MEAN,
    guests: Mapping[PeerId, Ready] | None = None,
    rings: bool = False,
) -> Plan:
    """Who contributes, who receives and who owns what, for those that are ``ready``; ``me`` leads.

    Members whose line is known to be far too slow are left out at once, as long as ``needed`` contribute, and as many
    as ``rule`` needs: see :func:`topology.laggards`. They receive the result like all others.

    ``guests``: those on trial that are ready. They send what they have and receive the result, and own nothing.
    ``rings``: contributions may go round a ring, where sums of them are all that ``rule`` needs.
    """
    members, (length, name, layout), without = contributors(ready)
    codec = resolve(name)
    rates = {peer: each.rates for peer, each in ready.items()}
    late, why = topology.laggards(members, rates, needed)
    if late and too_few(rule, len(members) - len(late)) is not None:
        late, why = (), ""
    members = tuple(member for member in members if member not in late)
    voters = tuple(sorted({*ready, me}))
    trial: tuple[PeerId, ...] = ()
    if guests:
        trial = tuple(sorted(p for p, r in guests.items() if r.contributes and kind_of(r) == (length, name, layout)))
        rates.update({peer: each.rates for peer, each in guests.items()})
        chosen = topology.plan(members, voters, length, rates, codec, guests=tuple(guests), judged=trial)
    else:
        ring = ("ring",) if rings and rule.is_mean and codec is FP32 else ()
        chosen = topology.plan(members, voters, length, rates, codec, ("butterfly", *ring))
    return Plan(
        key=key,
        attempt=attempt,
        epoch=0,
        members=members,
        samples=tuple(ready[m].samples for m in members),
        weights=tuple(ready[m].weight for m in members),
        receivers=tuple(sorted({*voters, *(guests or ())})),
        slices=chosen.slices,
        length=length,
        reason=f"{reason}{without}{why}; {chosen.reason}",
        within=_milliseconds(chosen),
        codec=codec.name,
        layout=layout,
        trial=trial if members else (),
        ring=chosen.order,
    )


def without_result(plan: Plan, why: str) -> Plan:
    """``plan`` for a round without contributions, since ``why``: nothing weaker than the run's rule will do."""
    return attrs.evolve(
        plan, members=(), samples=(), weights=(), trial=(), ring=(), reason=f"no contribution is combined: {why}"
    )


def _milliseconds(chosen: topology.Topology) -> int:
    if chosen.phase is None:
        return 0
    return int(1e3 * deadlines.planned_phase(defaults.TRANSFER_FLOOR, chosen.phase, chosen.rtt)) + 1


def plan_fault(
    plan: Plan,
    voters: Sequence[PeerId],
    max_length: int,
    me: PeerId,
    offer: Ready | None,
    trial: Sequence[PeerId] = (),
    sums: bool = False,
) -> str | None:
    """What is wrong with a plan, None when ``me`` may follow it. A leader is a peer like any other.

    ``trial``: who is on trial in this round. ``sums``: contributions may be summed on their way.
    """
    if not len(plan.members) == len(plan.samples) == len(plan.weights):
        return "members, samples and weights differ in number"
    if list(plan.members) != sorted(set(plan.members)) or any(p not in voters for p in plan.members):
        return "members are not voters in order"
    everybody = {*voters, *trial}
    if any(p not in everybody for p in plan.receivers) or len(plan.receivers) > len(everybody):
        return "receivers are not voters"
    if list(plan.trial) != sorted(set(plan.trial)) or any(p not in trial for p in plan.trial):
        return "contributions of others than those on trial"
    if any(w <= 0 for w in plan.weights) or any(s < 0 for s in plan.samples):
        return "weights are not above zero"
    if not 0 < plan.length <= max_length:
        return f"a vector of {plan.length} elements"
    if len(plan.slices) > 4 * len(voters) ** 2 or not covers(plan.slices, plan.length):
        return "slices do not cover the vector"
    if any(piece.owner not in plan.receivers or piece.owner in trial for piece in plan.slices):
        return "an owner that is no receiver"
    if plan.ring and (wrong := _ring_fault(plan, sums)) is not None:
        return wrong
    block = resolve(plan.codec).block
    if any(piece.start % block for piece in plan.slices):
        return f"a slice that begins within a block of {block}"
    ours = offer is not None and offer.contributes and kind_of(offer) == (plan.length, plan.codec, plan.layout)
    if (me in plan.members or me in plan.trial) and not ours:
        return "we contribute nothing of that length, codec and layout"
    return None


def _ring_fault(plan: Plan, sums: bool) -> str | None:
    owners = [piece.owner for piece in plan.slices]
    if not sums or plan.codec != FP32.name or plan.trial:
        return "a ring where each contribution is looked at"
    if tuple(sorted(plan.ring)) != plan.members or set(plan.receivers) != set(plan.members) or len(plan.ring) < 3:
        return "a ring of others than the members"
    if len(owners) != len(set(owners)):
        return "a ring in which somebody owns two slices"
    return "a ring after the first epoch" if plan.epoch else None


def step_time(pace: Pace, plan: Plan | None, frozen: bool, spare: float) -> float:
    """Seconds within which the next step of an attempt is due, beyond every deadline that its leader has for it.

    A leader may be unable to make that step, or unwilling, and say all the time that it waits: its plan does not reach
    us, it forgets the freeze. ``plan``: that of this attempt, if any. ``spare``: see :class:`Voter`.
    """
    if plan is None:
        # A plan; or, where one went out before we were ready, the end of that.
        return 4.0 * (pace.grace + pace.scatter + pace.gather)
    return 6.0 * plan.phase(pace.gather) if frozen else 2.0 * (plan.phase(pace.scatter) + spare)


def next_plan(
    plan: Plan, gone: Collection[PeerId], lost: Collection[PeerId], frozen: tuple[PeerId, ...], why: str
) -> Plan | None:
    """The next epoch, without ``gone`` as owners and contributors; None when no owner is left.

    ``frozen``: who was in when the epoch before was frozen, empty: it was not. After that members only ever shrink.
    """
    members = tuple(m for m in frozen or plan.members if m not in gone)
    owners = dict.fromkeys(piece.owner for piece in plan.slices)
    heirs = tuple(o for o in owners if o not in gone and o not in lost and (o in members or not members))
    if not heirs or (plan.members and not members):
        return None
    samples, weights = shares(plan, members)
    return attrs.evolve(
        plan,
        epoch=plan.epoch + 1,
        ring=(),  # it takes all of them: where one is missing, each sends what it has to the owners
        members=members,
        samples=samples,
        weights=weights,
        receivers=tuple(r for r in plan.receivers if r not in lost),
        slices=reassign(plan.slices, tuple(o for o in owners if o not in heirs), heirs, resolve(plan.codec).block),
        reason=f"{why}: its slices go to {short(heirs)}",
    )


def freeze(plan: Plan, held: Mapping[PeerId, Sequence[PeerId]]) -> tuple[tuple[PeerId, ...], tuple[PeerId, ...], str]:
    """Once all owners have said whose slices they hold: (members to freeze, owners to go on without, why).

    An owner that lacks most members is what is slow, not they. A member that is late for most owners sends as slowly
    what it owns, for which everybody would wait in the next phase. Either is gone without before the others are frozen.
    A member that only some owners lack is just left out.
    """
    owners = tuple(dict.fromkeys(piece.owner for piece in plan.slices))
    deaf = tuple(o for o in owners if 2 * sum(m in held[o] for m in plan.members) < len(plan.members))
    if deaf and len(deaf) < len(owners):
        return (), deaf, f"too little reaches owner {short(deaf)} in time"
    frozen = tuple(m for m in plan.members if all(m in held[o] for o in owners))
    slow = tuple(
        m for m in owners if m not in frozen and 2 * sum(m in held[o] for o in owners if o != m) < len(owners) - 1
    )
    if slow and len(slow) < len(owners) and frozen:
        return frozen, slow, f"late: {short(slow)}"
    return frozen, (), ""


def freeze_fault(
    plan: Plan,
    members: Sequence[PeerId],
    mine: Sequence[int],
    holds: Mapping[tuple[int, int, str], Collection[PeerId]],
) -> str | None:
    """What is wrong with frozen ``members``; None when an owner of the slices ``mine`` may combine them.

    ``holds``: whose elements it has, by (start, stop, form).
    """
    given = set(members)
    if list(members) != [m for m in plan.members if m in given] or (plan.members and not given):
        return "frozen members are not the plan's"
    if plan.ring and tuple(members) != plan.members:
        return "nobody can be left out of what came round a ring"
    for index in mine:
        held = holds.get((*plan.slices[index].range, plan.form), ())
        for member in members:
            if member not in held:
                return f"{member.short}'s slice is not held here"
    return None


def mending(
    plan: Plan,
    progress: Mapping[PeerId, Progress],
    lost: Collection[PeerId],
    tried: dict[tuple[PeerId, int], list[PeerId]],
) -> tuple[list[tuple[PeerId, int, PeerId]], tuple[PeerId, ...]]:
    """How those that lack combined slices of lost owners get them, as (receiver, index, holder), and the owners whose
    slice nobody holds. ``tried``: holders that a receiver was sent to already, by (receiver, index); grows.
    """
    live = [r for r in plan.receivers if r not in lost]
    told = [r for r in live if r in progress]
    fetches: list[tuple[PeerId, int, PeerId]] = []
    orphans: dict[PeerId, None] = {}
    for index, piece in enumerate(plan.slices):
        holders = [r for r in told if index in progress[r].have]
        gone = piece.owner in lost
        if gone and not holders and told:
            if len(told) == len(live):
                orphans[piece.owner] = None
            continue
        for receiver in told:
            # A live owner is still sending, unless the receiver's own deadline said otherwise already.
            if receiver in holders or not (gone or piece.owner in holders):
                continue
            before = tried.setdefault((receiver, index), [])
            fresh = [holder for holder in holders if holder not in before]
            if fresh:
                before.append(fresh[0])
                fetches.append((receiver, index, fresh[0]))
    return fetches, tuple(orphans)


def overdue(plan: Plan, progress: Mapping[PeerId, Progress], live: Collection[PeerId]) -> tuple[PeerId, ...]:
    """Owners from whom, past the deadline, some slice has reached no other peer."""
    slow = {
        piece.owner: None
        for index, piece in enumerate(plan.slices)
        if not any(index in progress[r].have for r in live if r in progress and r != piece.owner)
        and any(r in progress for r in live if r != piece.owner)
    }
    return tuple(slow)


def left_out(members: Collection[PeerId], late: Mapping[PeerId, str]) -> str:
    """For the record's reason: whose contribution was not waited for, and in which phase."""
    named = [peer for peer in late if peer not in members]
    return f"; left out: {short(named)} ({late[named[0]]})" if named else ""
