"""The simple scheduler that the real one is tested against: each idle holder is asked for the rarest chunk it has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...transport.identity import PeerId


def assign(wanted: Sequence[int], holders: Mapping[PeerId, Sequence[int]], idle: Sequence[PeerId]) -> dict[PeerId, int]:
    """One chunk for each ``idle`` holder that has one of those ``wanted`` (nobody is asked for them yet).

    ``holders``: everybody's chunks. Knows nothing of rates, of several requests at a time, or of an end.
    """
    count = {chunk: sum(chunk in has for has in holders.values()) for chunk in wanted}
    left, chosen = list(wanted), dict[PeerId, int]()
    for peer in idle:
        candidates = [chunk for chunk in left if chunk in holders[peer]]
        if candidates:
            chosen[peer] = min(candidates, key=lambda chunk: count[chunk])
            left.remove(chosen[peer])
    return chosen
