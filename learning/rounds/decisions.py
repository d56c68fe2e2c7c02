"""Every choice a round makes, as pure functions that return the choice and its reason."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import TypeAlias

from ...transport.identity import PeerId
from .messages import Accepted, Plan, Ready, quorum
from .payloads import GATHER


def candidates(prev: bytes, round: int, voters: Sequence[PeerId]) -> tuple[PeerId, ...]:
    """Voters in the order in which they may lead: rendezvous hashing of (digest of commit r-1, r, peer).

    The digest is known only once round r-1 is over, so nobody can grind an id for a seat.
    """
    seed = prev + round.to_bytes(8, "big")
    return tuple(
        sorted(
            voters,
            key=lambda peer: hashlib.blake2b(seed + peer.key, digest_size=16, person=b"shoal candidate").digest(),
        )
    )


def resume_at(
    stored: tuple[int, Accepted | None] | None, order: Sequence[PeerId], me: PeerId
) -> tuple[int, Accepted | None]:
    """The attempt at which a voter begins, and what it accepted, from what an earlier life stored (None: nothing).

    An attempt that we led before is over: we may have proposed at its ballot, and do not know what.
    """
    promised, accepted = stored or (0, None)
    if stored is not None and order[promised % len(order)] == me:
        promised += 1
    return promised, accepted


def may_begin(
    voters: Sequence[PeerId],
    ready: Collection[PeerId],
    lost: Collection[PeerId],
    needed: int,
    now: float,
    grace_until: float | None,
) -> tuple[bool, str]:
    """Whether a leader may fix the members now. ``grace_until``: when stragglers are no longer waited for."""
    missing = [voter for voter in voters if voter not in ready]
    waiting = [voter for voter in missing if voter not in lost]
    if len(ready) < needed:
        return False, f"{len(ready)} of {len(voters)} ready, {needed} needed"
    if not missing:
        return True, "all voters are ready"
    if not waiting:
        return True, "all but lost voters are ready; lost: " + short(missing)
    if grace_until is not None and now >= grace_until:
        return True, "a quorum is ready and the time for stragglers is over; missing: " + short(missing)
    return False, "waiting for " + short(waiting)


def waits_for_guests(
    guests: Sequence[PeerId],
    ready: Collection[PeerId],
    lost: Collection[PeerId],
    now: float,
    grace_until: float | None,
    reason: str,
) -> tuple[bool, str]:
    """Whether a round that its voters could begin, for ``reason``, begins without waiting for those on trial. They are
    waited for as long as other stragglers: late, they could not be judged."""
    waiting = [guest for guest in guests if guest not in ready and guest not in lost]
    if waiting and (grace_until is None or now < grace_until):
        return False, f"{reason}; waiting for {short(waiting)}, on trial"
    return True, reason


#: What contributions must have in common to be combined: length, codec, layout.
Kind: TypeAlias = tuple[int, str, str]


def kind_of(ready: Ready) -> Kind:
    return ready.length, ready.codec, ready.layout


def contributors(ready: Mapping[PeerId, Ready]) -> tuple[tuple[PeerId, ...], Kind, str]:
    """Who contributes among those that are ready, in order; what they have in common; and who does not, with reasons.

    Length, codec and layout are the most common ones of those that contribute, if there are any: honest peers have the
    same. Numbers of another layout are those of other tensors, also where there are as many of them.
    """
    giving = [r for r in ready.values() if r.contributes] or list(ready.values())
    kinds = [kind_of(r) for r in giving]
    kind = max(sorted(set(kinds)), key=lambda each: (kinds.count(each), each))
    members = tuple(sorted(p for p, r in ready.items() if r.contributes and r.weight > 0 and kind_of(r) == kind))
    others = sorted(p for p in ready if p not in members)
    named = ", ".join(f"{p.short} ({ready[p].why[:100] or unlike(kind_of(ready[p]), kind)})" for p in others[:4])
    return members, kind, f"; without a contribution: {named}" if others else ""


def unlike(one: Kind, most: Kind) -> str:
    """In which respect ``one`` is not as ``most`` are, for people."""
    if one[0] != most[0]:
        return f"another length: {one[0]} instead of {most[0]}"
    if one[1] != most[1]:
        return f"another codec: {one[1]} instead of {most[1]}"
    if one[2] != most[2]:
        return f"other tensors: {one[2] or 'not named'} instead of {most[2] or 'not named'}"
    return "without weight"


def shares(plan: Plan, members: Sequence[PeerId]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Samples and weights of some of the members of a plan, in the order of ``members``."""
    samples = dict(zip(plan.members, plan.samples, strict=True))
    weights = dict(zip(plan.members, plan.weights, strict=True))
    return tuple(samples[m] for m in members), tuple(weights[m] for m in members)


def never_decided(voters: Sequence[PeerId], promises: Mapping[PeerId, Accepted | None], needed: int) -> bool:
    """Whether so many voters have promised without ever having accepted a value that no value can have been decided."""
    blank = sum(promise is None for promise in promises.values())
    return len(voters) - blank < needed


def may_abandon(
    voters: Sequence[PeerId],
    ready: Collection[PeerId],
    lost: Collection[PeerId],
    strict: bool,
    now: float,
    grace_until: float | None,
) -> tuple[bool, str]:
    """Whether a value that was accepted, but whose result no ready voter holds any more, may be given up.

    When all voters say so, nobody can have applied it: peers that restarted lost the result with their memory and are
    back at the state before. In ``strict`` mode nothing less will do; otherwise the voters that can be reached suffice,
    and what they agree on next is a branch beside the value that was given up (docs/agreement.md).
    """
    missing = [voter for voter in voters if voter not in ready]
    waiting = [voter for voter in missing if voter not in lost]
    if not missing:
        return True, "an accepted result is held by no voter any more: the round is done again"
    if strict or waiting or grace_until is None or now < grace_until:
        return False, "an accepted result is held by nobody here; waiting for " + short(missing)
    return True, "an accepted result is held by no voter that can be reached: the round is done again"


def next_roster(
    voters: Sequence[PeerId],
    present: Collection[PeerId],
    leaving: Collection[PeerId],
    wishes: Sequence[PeerId],
    limit: int,
    liars: Collection[PeerId] = (),
) -> tuple[tuple[PeerId, ...], str]:
    """The voters of the next round: who is present and stays, then who wishes to join, up to ``limit``."""
    stay = [voter for voter in voters if voter in present and voter not in leaving and voter not in liars]
    gone = [voter for voter in voters if voter not in stay]
    room = max(0, limit - len(stay))
    new = [peer for peer in sorted(wishes) if peer not in stay and peer not in leaving and peer not in liars][:room]
    parts = []
    expelled = [peer for peer in gone if peer in liars]
    left = [peer for peer in gone if peer in leaving and peer not in liars]
    silent = [peer for peer in gone if peer not in leaving and peer not in liars]
    if expelled:
        parts.append("expelled: " + short(expelled))
    if left:
        parts.append("left: " + short(left))
    if silent:
        parts.append("lost: " + short(silent))
    if new:
        parts.append("joined: " + short(new))
    return tuple(sorted([*stay, *new])), "; ".join(parts) or "unchanged"


def roster_room(proven: int, limit: int) -> int:
    """Peers that the next roster may have: so few that those who are ``proven``, having done this round, are still a
    majority. Whoever only says that it wishes to join costs nothing and may come in any number. One may always come.
    """
    return min(limit, max(2, 2 * proven - 1))


def may_branch(mode: str, voters: int, alive: int, stalled_s: float, lease_s: float) -> tuple[bool, str]:
    """Whether survivors without a majority may go on as a branch (DESIGN.md section 6).

    In ``strict`` mode never, but for runs of up to 3 voters, for which a majority is too easily lost.
    """
    need = quorum(voters)
    if alive >= need:
        return False, f"{alive} of {voters} voters alive, a majority of {need} can go on"
    if mode == "strict":
        return False, f"strict: {alive} of {voters} voters alive, waiting for a majority of {need}"
    if stalled_s < lease_s:
        return False, f"{alive} of {voters} voters alive; going on as a branch in {lease_s - stalled_s:.0f} s"
    return True, f"{alive} of {voters} voters alive for {stalled_s:.0f} s: going on as a branch"


def better(total_a: int, digest_a: bytes, total_b: int, digest_b: bytes) -> bool:
    """True when branch a wins over b: more committed samples, then the larger digest."""
    return (total_a, digest_a) > (total_b, digest_b)


def random_groups(seed: int, round: int, view: Sequence[PeerId], size: int) -> tuple[tuple[PeerId, ...], ...]:
    """A shared-seed shuffle of the view, in even groups of at most ``size``, each in canonical order.

    For ``size`` 2 these are NoLoCo's random pairs (one peer is left alone when the view is odd).
    """
    label = seed.to_bytes(16, "big", signed=True) + round.to_bytes(8, "big")
    order = sorted(view, key=lambda p: hashlib.blake2b(label + p.key, digest_size=16, person=b"shoal group").digest())
    count = -(-len(order) // size)
    base, extra = divmod(len(order), count)
    groups, start = [], 0
    for group in range(count):
        stop = start + base + (1 if group < extra else 0)
        groups.append(tuple(sorted(order[start:stop])))
        start = stop
    return tuple(groups)


def group_of(seed: int, round: int, peer: PeerId, view: Sequence[PeerId], size: int) -> tuple[tuple[PeerId, ...], str]:
    """The gossip group of ``peer`` in ``round`` among :func:`random_groups`, and the reason."""
    groups = random_groups(seed, round, view, size)
    index = next(index for index, group in enumerate(groups) if peer in group)
    return groups[index], f"group {index + 1} of {len(groups)}"


def proposal_of(promises: Mapping[PeerId, Accepted | None]) -> Accepted | None:
    """The accepted value with the highest ballot among ``promises``."""
    accepted = [promise for promise in promises.values() if promise is not None]
    return max(accepted, key=lambda value: value.attempt, default=None)


def holders_of(value: Accepted, ready: Mapping[PeerId, Ready]) -> tuple[PeerId, ...]:
    """Who of those that are ready accepted ``value``, at whatever ballot, and still holds its result.

    Where nothing was combined the record itself is all there is to hold.
    """
    digest, whole = value.record.digest, value.record.kind == GATHER
    return tuple(
        peer
        for peer, r in ready.items()
        if (r.holds or whole) and r.accepted is not None and r.accepted.record.digest == digest
    )


def told(now: float, due: float | None, reason: str, training: str | None) -> str:
    """For people: what the round waits for, and how long, as its leader says.

    ``due``: when it goes on without those who are late. ``training``: what we do while we are not ready ourselves.
    """
    left = due - now if due is not None else 0.0
    if training is not None:
        return f"{training}; the round begins without us in {left:.1f} s: {reason}" if left > 0 else training
    return f"{reason}; {left:.1f} s left for those who are late" if left > 0 else reason


def short(peers: Sequence[PeerId]) -> str:
    """Names for people, a few and a count."""
    names = [peer.short for peer in peers[:4]]
    return ", ".join(names) + (f" and {len(peers) - 4} more" if len(peers) > 4 else "")
