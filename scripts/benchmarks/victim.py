"""A peer of the group reduce that ends itself with SIGKILL at a given point of a round, in the middle of a transfer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import torch
import trio
from torch import Tensor

from shoal.learning.reduce.slices import reassign
from shoal.learning.rounds import leader
from shoal.learning.rounds.actions import Note, Pace
from shoal.learning.rounds.decisions import candidates
from shoal.learning.rounds.messages import Commit, CommitRecord, Plan, Propose
from shoal.learning.rounds.pace import pace
from shoal.learning.rounds.planning import first_plan
from shoal.learning.rounds.post import Post
from shoal.transport.endpoint import Endpoint
from shoal.transport.identity import PeerId

from . import vectors
from .children import end_now
from .reducer import ShoalPeer, genesis


class Watcher(trio.abc.Instrument):
    """Looks after every step of every task whether so many bytes have been sent; then there is no next step."""

    def __init__(self, endpoint: Endpoint, sent: int, die: Callable[[], None]) -> None:
        self._endpoint, self._sent, self._die = endpoint, sent, die

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if sum(link.bytes_sent for link in self._endpoint.links()) >= self._sent:
            self._die()


class SlyPost(Post):
    """Shows each message to ``before`` ahead of sending it."""

    def __init__(self, endpoint: Endpoint, nursery: trio.Nursery, before: Callable[[Any], None]) -> None:
        super().__init__(endpoint, nursery)
        self._before = before

    def send(self, to: PeerId, message: Any) -> None:
        self._before(message)
        super().send(to, message)


class KillPeer(ShoalPeer):
    """Order ``arm`` says where the next round is to end for this process.

    ``at``: ``scatter`` or ``gather``, once the part ``share`` of its bytes is sent; ``freeze``: before anything is
    combined; ``full``: it holds the result; ``propose``, ``commit``: it is about to send the first such message.
    ``file``: where to leave ``time.monotonic()`` of that moment.
    """

    def __init__(self) -> None:
        super().__init__()
        leader.first_plan = self._first_plan
        self._lazy, self._ring = "", False
        self._at, self._share, self._file = "", 0.0, Path()
        self._bases: dict[int, Tensor] = {}
        self._numbers: dict[PeerId, int] = {}
        self._means: dict[tuple[int, ...], Tensor] = {}

    async def do(self, order: str, arguments: dict[str, Any]) -> dict[str, Any]:
        match order:
            case "prepare":
                return self._prepare(arguments["elements"], arguments["numbers"])
            case "group":
                self._voters = tuple(sorted(PeerId.parse(peer) for peer in arguments["voters"]))
                self._head = attrs.evolve(genesis(self._voters), state=arguments["name"].encode())
                self._lazy, self._ring = arguments["lazy"], arguments["ring"]
                self._presence.watch(self._voters)
                return {}
            case "open":
                self._open(arguments["run"])
                return {"leader": candidates(self._head.digest, self._head.round + 1, self._voters)[0].text}
            case "lazy":
                self._lazy = arguments["name"]
                return {}
            case "arm":
                self._at, self._share, self._file = arguments["at"], arguments["share"], Path(arguments["file"])
                return {}
        return await super().do(order, arguments)

    def _prepare(self, elements: int, numbers: dict[str, int]) -> dict[str, Any]:
        """``numbers``: which of the known vectors each peer contributes."""
        self._numbers = {PeerId.parse(peer): number for peer, number in numbers.items()}
        for number in self._numbers.values():
            if number not in self._bases:
                self._bases[number] = vectors.base(number, elements)
        self._base = self._bases[self._numbers[self._endpoint.peer_id]]
        self._vector = torch.empty_like(self._base)
        return {}

    def _make_post(self) -> Post:
        return SlyPost(self._endpoint, self.nursery, self._before)

    def _pace(self) -> Pace:
        return pace(self._endpoint, self._voters, self._base.numel() * 4, 0.0)

    def _first_plan(self, *arguments: Any, **more: Any) -> Plan:
        """The planner's, but nobody waits for the one that is to be a contributor alone: it owns nothing. Or a ring."""
        plan = first_plan(*arguments, **more)
        if self._ring and plan.members == self._voters:
            return attrs.evolve(plan, ring=plan.members)
        heirs = tuple(peer for peer in dict.fromkeys(p.owner for p in plan.slices) if peer.text != self._lazy)
        lazy = tuple(peer for peer in self._voters if peer.text == self._lazy)
        return attrs.evolve(plan, slices=reassign(plan.slices, lazy, heirs))

    def _wrong_members(self, record: CommitRecord) -> str | None:
        return None if set(record.members) <= set(self._voters) else "a stranger is a member"

    def _check_result(self, result: Tensor, record: CommitRecord) -> str | None:
        """It must be the mean over exactly the members that were committed."""
        numbers = tuple(sorted(self._numbers[member] for member in record.members))
        if len(numbers) < len(self._voters) - 1:
            return f"only {len(numbers)} members"
        if numbers not in self._means:
            total = self._bases[numbers[0]].clone()
            for number in numbers[1:]:
                total += self._bases[number]
            self._means[numbers] = total / len(numbers)
        return vectors.wrong(result, self._means[numbers], self._run)

    async def _reduce(self) -> dict[str, Any]:
        answer = await super()._reduce()
        return {**answer, "members": [self._numbers[member] for member in self._head.members]}

    # -- the end ------------------------------------------------------------------------------------

    def _die(self) -> None:
        end_now(self._file)

    def _on_note(self, note: Note) -> None:
        super()._on_note(note)
        if note.what != "begin":
            return
        if note.phase == self._at and self._share:
            before = sum(link.bytes_sent for link in self._endpoint.links())
            goal = before + int(self._share * self._to_send(note.phase))
            trio.lowlevel.add_instrument(Watcher(self._endpoint, goal, self._die))
        elif (note.phase, self._at) in (("combine", "freeze"), ("commit", "full")):
            self._die()

    def _to_send(self, phase: str) -> int:
        """Bytes that we send in a phase of the present plan."""
        plan = self._instance.voter.plan
        assert plan is not None
        mine = sum(piece.stop - piece.start for piece in plan.slices if piece.owner == self._endpoint.peer_id)
        return 4 * (plan.length - mine if phase == "scatter" else mine * (len(plan.receivers) - 1))

    def _before(self, message: Any) -> None:
        if (self._at == "propose" and isinstance(message, Propose)) or (
            self._at == "commit" and isinstance(message, Commit)
        ):
            self._die()
