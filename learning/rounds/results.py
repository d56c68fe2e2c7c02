"""The committed result of one round on one peer: its fingerprint, how it is obtained, and where it is kept."""

from __future__ import annotations

import hashlib

import torch
import trio
from torch import Tensor

from ...transport.endpoint import Endpoint
from ...transport.errors import RemoteError
from ...transport.identity import PeerId
from ..digest import ALGORITHMS, fingerprint
from ..reduce.buffers import Buffers
from ..state import bytes_view
from .actions import Note
from .downloads import download
from .messages import CommitRecord
from .methods import Want
from .passes import Passes
from .payloads import GATHER
from .setting import Setting
from .voter import Voter


class Results:
    """``buffers`` hold what was combined and gathered here; ``final`` is what was agreed on."""

    def __init__(self, endpoint: Endpoint, setting: Setting, voter: Voter, buffers: Buffers, passes: Passes) -> None:
        self._endpoint, self._setting, self._voter, self._buffers = endpoint, setting, voter, buffers
        self._passes, self._key = passes, setting.key
        #: The committed result, once it is ours, and the digest of its record.
        self.final: Tensor | None = None
        self.final_digest = b""
        self._printed: _Printed | None = None

    def drop(self) -> None:
        """Nobody is given the result any more."""
        self.final, self.final_digest, self._printed = None, b"", None

    async def own_fingerprint(self, algorithm: str, nonces: tuple[bytes, ...]) -> bytes:
        """Of the result that was gathered in full here and no longer changes.

        A leader needs it to propose, everybody to accept, and it may be asked for ahead of time: it is computed once.
        """
        # A task that begins when its round has just been closed comes this far, and the buffers are empty.
        await trio.lowlevel.checkpoint_if_cancelled()
        result = self._buffers.result
        assert result is not None
        printed = self._printed
        if printed is None or not printed.of(result, algorithm, nonces):
            printed = self._printed = _Printed(result, algorithm, nonces)
            try:
                printed.value = await self._fingerprint(result, algorithm, nonces)
            finally:
                printed.done.set()
                if not printed.value and self._printed is printed:
                    self._printed = None  # cancelled
        await printed.done.wait()
        return printed.value or await self._fingerprint(result, algorithm, nonces)

    async def _fingerprint(self, result: Tensor, algorithm: str, nonces: tuple[bytes, ...]) -> bytes:
        key = hashlib.blake2b(self._key + b"".join(nonces), digest_size=32, person=b"shoal finger v1").digest()
        return await self._passes.run(result.numel(), fingerprint, algorithm, key, bytes_view(result))

    async def obtain(self, record: CommitRecord, holders: tuple[PeerId, ...]) -> str | None:
        """Make the result of ``record`` ours: what we combined, or a holder's, if its fingerprint is the record's.

        Returns what is wrong; None when the result is ours. Each download goes on as long as bytes come.
        """
        digest = record.digest
        if self.final_digest == digest:
            return None
        if record.kind == GATHER:
            self.final, self.final_digest = torch.empty(0), digest
            return None
        if record.algorithm not in ALGORITHMS:
            return f"unknown fingerprint algorithm {record.algorithm[:20]!r}"
        frozen, result = self._voter.frozen, self._buffers.result
        if self._voter.full and frozen is not None and result is not None and frozen.members == record.members:
            if await self.own_fingerprint(record.algorithm, record.nonces) == record.fingerprint:
                self.final, self.final_digest = result, digest
                return None
            self._setting.note(Note("commit", "differs", "our result differs from the proposed one"))
        length = self._voter.plan.length if self._voter.plan is not None else 0
        why = "nobody was named as a holder of the result"
        for holder in holders:
            try:
                final = await self._download(holder, digest, length)
            except RemoteError as error:
                why = str(error)
                continue
            if await self._fingerprint(final, record.algorithm, record.nonces) == record.fingerprint:
                self.final, self.final_digest = final, digest
                return None
            why = f"the result of {holder.short} has another fingerprint"
        return why

    async def _download(self, holder: PeerId, digest: bytes, length: int) -> Tensor:
        final = self._buffers.room(length or self._own_length())
        want = Want(self._key, 0, 0, 0, final.numel(), digest)
        await download(self._endpoint, holder, want, bytes_view(final))
        return final

    def _own_length(self) -> int:
        if self._buffers.own is not None:
            return self._buffers.own.numel()
        offer = self._voter.offer
        if offer is not None and offer.length:
            return offer.length
        raise RemoteError("the length of the result is not known yet")


class _Printed:
    """A fingerprint of one result under one key, and whether it is computed."""

    def __init__(self, result: Tensor, algorithm: str, nonces: tuple[bytes, ...]) -> None:
        self._result, self._under = result, (algorithm, nonces)
        self.value = b""
        self.done = trio.Event()

    def of(self, result: Tensor, algorithm: str, nonces: tuple[bytes, ...]) -> bool:
        return self._result is result and self._under == (algorithm, nonces)
