"""Proves our head to others, and asks others to prove theirs before anything they say counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import trio

from ..transport.errors import RemoteError, RemoteRefused
from ..transport.identity import PeerId
from ..transport.rpc import Call
from . import defaults
from .store import Head
from .sync import HeadInfo
from .trust import TRUST, AskTrust, Trust, TrustPage, page_of

if TYPE_CHECKING:
    from .run import Run


class Proofs:
    """The network's side of :class:`shoal.learning.trust.Trust`, and its place on disk."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.trust = Trust(run.run_id, run.spec.founder, run.spec.mode == "strict")
        self._doubted: dict[PeerId, str] = {}
        self._saving = trio.Lock()
        run.endpoint.serve(TRUST, self._on_trust)

    def belong(self, head: Head) -> None:
        """We hold the state after ``head``."""
        if self.trust.belong(head):
            self._run.nursery.start_soon(self._save)

    def doubts(self) -> str:
        """Who was not believed when last asked, and why: for people, empty when there is nobody."""
        found = [f"{peer.short}: {why}" for peer, why in self._doubted.items()]
        return f"; not believed: {'; '.join(found[:2])}" if found else ""

    async def believable(
        self, infos: Mapping[PeerId, HeadInfo], matters: Callable[[Head], bool]
    ) -> dict[PeerId, HeadInfo]:
        """The answers whose heads are proven. A proof is only asked for when the head ``matters``."""
        doubted: dict[PeerId, str] = {}

        async def weigh(peer: PeerId, head: Head) -> None:
            why = self.trust.add(head)
            if why is not None and matters(head):
                why = await self._ask_proof(peer, head)
            if why is not None:
                doubted[peer] = why

        async with trio.open_nursery() as nursery:
            for peer, info in infos.items():
                nursery.start_soon(weigh, peer, info.head())
        for peer, why in sorted(doubted.items()):
            if self._doubted.get(peer) != why:
                self._run.emit("run", "doubted", peer, f"its head is not believed: {why}")
        self._doubted = doubted
        return {peer: info for peer, info in infos.items() if peer not in doubted}

    async def _ask_proof(self, peer: PeerId, head: Head) -> str | None:
        """None once ``peer`` has shown links that lead to ``head``, else why not."""
        at, run = 0, self._run
        try:
            while True:
                ask = AskTrust(run.run_id, at)
                page = await run.endpoint.call(peer, TRUST, ask, timeout=defaults.ASK_HEADS)
                self.trust.check_page(page, at)
                for number, link in enumerate(page.links, start=at):
                    if self.trust.believes(link.record.roster):
                        continue
                    path, why = await run.host.run_blocking(self.trust.find, link)
                    if path is None:
                        return f"link {number} of its proof: {why}"
                    self.trust.believe(path)
                at += len(page.links)
                if at == page.total:
                    return self.trust.add(head)
        except RemoteError as error:
            return f"it does not prove it ({error.message})"

    async def _on_trust(self, call: Call[AskTrust]) -> TrustPage:
        if call.request.run != self._run.run_id:
            raise RemoteRefused("unknown-run", "this peer takes no part in that run")
        return page_of(self.trust.own, max(0, call.request.start))

    async def restore(self) -> None:
        """Believe again what was proven in an earlier life."""
        for link in await self._run.host.run_blocking(self._run.store.load_trust):
            self.trust.add(link)

    async def _save(self) -> None:
        async with self._saving:
            await self._run.host.run_blocking(self._run.store.save_trust, self.trust.own)
