"""Which part of the data is a peer's in a round: a pure function of the run's seed and the committed roster."""

from __future__ import annotations

import hashlib

import attrs
import numpy as np
import torch
from numpy.typing import NDArray

from . import defaults


@attrs.frozen
class Shard:
    """This peer's part of the data.

    ``seed`` is the run's; ``peer`` the 32 bytes of the PeerId; ``round`` the round the shard was issued for; ``index``
    and ``count`` the peer's place in the committed roster. ``epoch`` is 0 and counts up each time a worker has used up
    a finite ``batches(shard)`` and asks again, so that every pass has an order of its own.

    The same fields and labels give the same random numbers on every machine with the same library versions.
    """

    seed: int
    peer: bytes = attrs.field(validator=attrs.validators.instance_of(bytes))
    round: int
    index: int
    count: int
    epoch: int = 0

    def __attrs_post_init__(self) -> None:
        if len(self.peer) != 32:
            raise ValueError("a shard's peer is 32 bytes")
        if not 0 <= self.index < self.count:
            raise ValueError(f"a shard's index lies in 0..{self.count - 1}, got {self.index}")

    def same_part(self, other: Shard) -> bool:
        """True when both name the same samples: everything but ``round`` and ``epoch`` agrees."""
        ours = self.index, self.count, self.seed, self.peer
        return ours == (other.index, other.count, other.seed, other.peer)

    def entropy(self, *labels: str | int) -> int:
        """64 bits from BLAKE2b over all fields and ``labels``; labels keep independent uses apart."""
        fields = (self.seed, self.peer.hex(), self.round, self.index, self.count, self.epoch, *labels)
        return _entropy("shoal shard v1", *fields)

    def generator(self, *labels: str | int) -> torch.Generator:
        """A fresh CPU torch generator seeded by :meth:`entropy`."""
        return torch.Generator().manual_seed(self.entropy("torch", *labels))

    def rng(self, *labels: str | int) -> np.random.Generator:
        """A fresh numpy generator (PCG64) seeded by :meth:`entropy`."""
        return np.random.Generator(np.random.PCG64(self.entropy("numpy", *labels)))


def frozen_random(seed: int, *labels: str | int) -> np.random.RandomState:
    """A numpy generator whose streams never change between numpy versions.

    ``RandomState`` is frozen by numpy's compatibility policy, ``Generator`` is not. What all peers must agree on (who
    holds which sample) is drawn from here.
    """
    return np.random.RandomState(_entropy("shoal split v1", seed, *labels) % (1 << 32))


def dirichlet_split(
    labels: NDArray[np.integer], count: int, alpha: float, seed: int, *, minimum: int = defaults.MIN_PART
) -> list[NDArray[np.int64]]:
    """Split sample indices over ``count`` peers with label proportions drawn from Dirichlet(``alpha``).

    ``labels``: integer array of shape ``(n,)``. Returns ``count`` disjoint sorted index arrays that cover ``range(n)``.
    For each class the shares of the peers are one draw (Hsu et al., 2019, arXiv 1909.06335): a small ``alpha`` gives
    each peer few classes. No part is smaller than ``min(minimum, n // (2 * count))`` (at least 1): short parts
    take random samples from the largest part. Raises ValueError when there are fewer samples than parts.
    """
    if count < 1 or alpha <= 0:
        raise ValueError("count must be at least 1 and alpha positive")
    if len(labels) < count:
        raise ValueError(f"{len(labels)} samples cannot be split into {count} non-empty parts")
    random = frozen_random(seed, "dirichlet", count, repr(float(alpha)))
    parts: list[list[int]] = [[] for _ in range(count)]
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        shares = random.dirichlet(np.full(count, alpha))
        cuts = np.rint(np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
        for part, piece in zip(parts, np.split(members, cuts), strict=True):
            part.extend(int(i) for i in piece)
    floor = max(1, min(minimum, len(labels) // (2 * count)))
    for part in parts:
        while len(part) < floor:
            largest = max(parts, key=len)
            part.append(largest.pop(int(random.randint(len(largest)))))
    return [np.sort(np.array(part, dtype=np.int64)) for part in parts]


def _entropy(*fields: str | int) -> int:
    # repr of str and int is unambiguous, so distinct field tuples never hash the same text.
    return int.from_bytes(hashlib.blake2b(repr(fields).encode(), digest_size=8).digest(), "little")
