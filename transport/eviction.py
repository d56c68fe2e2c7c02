"""Which link gives way when there are too many, or when all together hold too much memory: pure decisions.

A link that we dialled, or over which the peer has answered calls of ours, is *proven*: the node has a use for it, and
strangers cannot take its place. Links that only others have a use for share what is left, by source address (as in
:mod:`throttle`): a newcomer takes the slot of the source that holds most, or of one that had its time.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from . import defaults


@attrs.frozen
class Candidate:
    """What a decision looks at. Times are ``now`` seconds. ``held``: bytes that the node holds for the link."""

    source: str
    #: We dialled it, or it answered calls of ours.
    proven: bool
    #: No stream or call is open on it.
    idle: bool
    opened_at: float
    last_used: float
    held: int = 0


def make_room(links: Sequence[Candidate], newcomer: str, now: float) -> tuple[int | None, str]:
    """Which of ``links`` gives way to a newcomer from source ``newcomer``, when there is no slot left.

    Returns (index, reason for people); None: the newcomer is refused.
    """
    strangers = [index for index, link in enumerate(links) if not link.proven]
    if not strangers:
        return None, "every link is one that this node has a use for"
    shares: dict[str, int] = {}
    for index in strangers:
        shares[links[index].source] = shares.get(links[index].source, 0) + 1
    most = max(shares.values())
    # Of the source with most of them: an idle one first, then the oldest.
    first = min(
        (index for index in strangers if shares[links[index].source] == most),
        key=lambda index: (not links[index].idle, links[index].opened_at, index),
    )
    link = links[first]
    if most > shares.get(newcomer, 0) + 1:
        return first, f"{link.source} holds {most} links, the newcomer's address fewer"
    if link.idle and now - link.last_used >= defaults.IDLE_GRACE:
        return first, "it was idle"
    stayed = now - link.opened_at
    if stayed >= defaults.STRANGER_STAY:
        return first, f"a stranger's link that had its {stayed:.0f} s"
    return (
        None,
        f"no slot for another link: {len(strangers)} strangers came less than {defaults.STRANGER_STAY:.0f} s ago",
    )


def relieve(links: Sequence[Candidate], limit: int) -> tuple[int | None, str]:
    """Which of ``links`` must end because all together hold more than ``limit`` bytes; (None, …): none.

    The stranger that holds most; only when strangers hold nothing worth it, the proven one that holds most.
    """
    total = sum(link.held for link in links)
    if total <= limit:
        return None, "within limits"
    strangers = [index for index, link in enumerate(links) if not link.proven]
    if sum(links[index].held for index in strangers) < total - limit:
        strangers = list(range(len(links)))  # what is proven holds too much by itself
    victim = max(strangers, key=lambda index: (links[index].held, -index))
    allowed = f"all links hold {total >> 20} MiB that nobody has read, {limit >> 20} allowed"
    return victim, f"{allowed}; this one {links[victim].held >> 20}"
