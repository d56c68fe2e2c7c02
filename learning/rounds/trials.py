"""Who is on trial, who passed a round of it, and who is a voter next: pure functions over signed opinions.

A newcomer does every round as all others do, but what it sends is only looked at: each owner compares it with the
combined slices that it owns, and signs whose work was fit. A round counts for a newcomer when more than half of the
owners say so, and the record holds their signatures: whoever accepts it can see for itself that the leader invented
nothing. No leader can admit anybody; it can leave somebody out of the next record, as it can a voter that it calls
lost, and whoever is left out begins anew.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable, Mapping, Sequence

import attrs

from ...transport.identity import Identity, PeerId
from .decisions import short
from .messages import CommitRecord, OnTrial, Progress, members_hash

#: Peers on trial at the same time. Opinions name them by bits of 32, and each costs every round as many bytes as a
#: member that owns nothing.
MAX_TRIAL = 32

_OPINION = b"shoal opinion v1\0"
_LAYOUT = struct.Struct("<H?I64s")


@attrs.frozen
class Opinion:
    """What member ``index`` of a record says of those on trial. ``owns``: it owned slices, so that it could see any.

    ``fit``: bit i for the i-th of those on trial in the round. ``signature``: over the instance, the members, the rest.
    """

    index: int
    owns: bool
    fit: int
    signature: bytes

    @property
    def data(self) -> bytes:
        return _LAYOUT.pack(self.index, self.owns, self.fit, self.signature)

    @classmethod
    def read(cls, data: bytes) -> Opinion:
        """From :attr:`data`. ``ValueError`` for what is none."""
        if len(data) != _LAYOUT.size or data[2] > 1:
            raise ValueError(f"{len(data)} bytes are no opinion")
        return cls(*_LAYOUT.unpack(data))

    @classmethod
    def sign(cls, identity: Identity, key: bytes, members: Sequence[PeerId], fit: int | None) -> Opinion:
        """Ours, as one of ``members``; ``fit``: None where we owned nothing."""
        index, owns = members.index(identity.peer_id), fit is not None
        return cls(index, owns, fit or 0, identity.sign(_signed(key, members, owns, fit or 0)))

    def fault(self, key: bytes, members: Sequence[PeerId], trial: int) -> str | None:
        """What is wrong with it in a round of these ``members``, with ``trial`` peers on trial."""
        if self.index >= len(members):
            return "an opinion of nobody"
        peer = members[self.index]
        if self.fit >> trial or (self.fit and not self.owns):
            return f"{peer.short} has an opinion of what it cannot know"
        if not peer.verify(_signed(key, members, self.owns, self.fit), self.signature):
            return f"an opinion with a wrong signature in the name of {peer.short}"
        return None


def _signed(key: bytes, members: Sequence[PeerId], owns: bool, fit: int) -> bytes:
    return _OPINION + key + members_hash(tuple(members)) + struct.pack("<?I", owns, fit)


def gathered(
    progress: Mapping[PeerId, Progress], key: bytes, members: Sequence[PeerId], trial: int
) -> tuple[bytes, ...]:
    """The opinions for a record, in order, from what receivers have said: those that change anything."""
    found: dict[int, Opinion] = {}
    for peer, each in progress.items():
        try:
            opinion = Opinion.read(each.opinion)
        except ValueError:
            continue
        if opinion.fault(key, members, trial) is None and members[opinion.index] == peer:
            found[opinion.index] = opinion
    # Who found nobody fit says the same as who says nothing.
    return tuple(found[index].data for index in sorted(found) if found[index].fit or not found[index].owns)


def passed(opinions: Iterable[bytes], members: int, trial: Sequence[PeerId]) -> tuple[PeerId, ...]:
    """Whose work counts in a round of so many ``members``: more than half of those that may own slices found it fit.

    Owners lie as others do: while less than half of them do, neither can they get a friend in nor keep anybody out.
    """
    read = [Opinion.read(data) for data in opinions]
    owners = members - sum(not opinion.owns for opinion in read)
    return tuple(peer for at, peer in enumerate(trial) if 2 * sum(opinion.fit >> at & 1 for opinion in read) > owners)


def counted(
    opinions: Iterable[bytes], members: Sequence[PeerId], trial: Sequence[PeerId], few: bool
) -> tuple[PeerId, ...]:
    """For whom of ``trial`` a round of these ``members`` counts: those that :func:`passed`.

    ``few``: the round has too few voters for the run's rule, whoever leads it. Then nothing is combined, and nobody can
    be measured; but without newcomers the run would learn nothing any more. So such a round counts for all of them.
    """
    return tuple(trial) if few and not members else passed(opinions, len(members), trial)


def served(trial: Sequence[OnTrial], good: Collection[PeerId]) -> tuple[OnTrial, ...]:
    """How many rounds each has left after one that counts for ``good``; 0: it is to be a voter."""
    return tuple(OnTrial(each.peer, each.left - (each.peer in good)) for each in trial)


def next_trial(
    now: Sequence[OnTrial],
    roster: Collection[PeerId],
    voters: Collection[PeerId],
    present: Collection[PeerId],
    gone: Collection[PeerId],
    wishes: Sequence[PeerId],
    room: int,
    admission: int,
) -> tuple[tuple[OnTrial, ...], str]:
    """Who is on trial in the next round, at most ``room`` peers: who is and stays, then who wishes to join.

    ``now``: see :func:`served`. ``roster``: the voters of the next round, ``voters``: of this one. ``gone``: who left,
    or lied. Who is done and found no seat in the roster waits for one.
    """
    stay = [each for each in now if each.peer not in roster and each.peer in present and each.peer not in gone]
    known = {each.peer for each in now}
    free = max(0, min(room, MAX_TRIAL) - len(stay))
    # A voter that was lost may be back already: it begins anew in the round after.
    new = [p for p in sorted(wishes) if p not in known and p not in roster and p not in voters and p not in gone][:free]
    lost = [each.peer for each in now if each.peer not in roster and each not in stay]
    parts = [f"on trial: {short(new)}"] if new else []
    if lost:
        parts.append(f"trial ended: {short(lost)}")
    found = [OnTrial(each.peer, max(1, each.left)) for each in stay] + [OnTrial(peer, admission) for peer in new]
    return tuple(sorted(found, key=lambda each: each.peer)), "".join(f"; {part}" for part in parts)


def trial_fault(
    record: CommitRecord,
    before: Sequence[OnTrial],
    voters: Sequence[PeerId],
    key: bytes,
    admission: int,
    few: bool = False,
) -> str | None:
    """Why ``record`` does not follow from who was on trial ``before`` and from the opinions in it; None when it does.

    ``key``: of the instance, ``voters``: its own. ``admission``: rounds of a trial in this run, 0: it has none.
    ``few``: see :func:`counted`.
    """
    if not admission:
        return "nobody is on trial in this run" if record.trial or record.opinions else None
    if len(record.trial) > MAX_TRIAL or len(record.opinions) > len(record.members):
        return "more on trial, or more opinions of them, than there may be"
    try:
        opinions = [Opinion.read(data) for data in record.opinions]
    except ValueError as error:
        return str(error)
    if [o.index for o in opinions] != sorted({o.index for o in opinions}):
        return "its opinions are not in order"
    for opinion in opinions:
        if (wrong := opinion.fault(key, record.members, len(before))) is not None:
            return wrong
    good = counted(record.opinions, record.members, [each.peer for each in before], few)
    left = {each.peer: each.left for each in served(before, good)}
    known = set(voters)
    for peer in record.roster:
        if peer not in known and left.get(peer) != 0:
            return f"{peer.short} is to vote, and is not admitted"
    named, roster = [each.peer for each in record.trial], set(record.roster)
    if named != sorted(set(named)) or any(peer in known or peer in roster for peer in named):
        return "who is on trial is not in order, or votes"
    for each in record.trial:
        if each.left != (max(1, left[each.peer]) if each.peer in left else admission):
            return f"{each.peer.short} is said to have {each.left} rounds of its trial left"
    return None
