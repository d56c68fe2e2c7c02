"""Micro-batches at one replica of one stage, without any IO: what has come, what counts, when a step is over.

A step belongs to all feeders (replicas of the first stage) together: each brings micro-batches of its own, and says
when it has all of their gradients and which ways they took. Only then is it known what counts: a micro-batch that was
sent twice, because a peer died or was slow, has left gradients at peers that are not on its way. Those that it passed
in vain leave it out; they compute their sum anew from what they keep (inputs and gradients of outputs, not weights).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import attrs
from torch import Tensor

from ...transport.identity import PeerId
from . import defaults
from .messages import Hop, Key, StepDone, Won
from .schedule import Kind, Schedule


@attrs.define(eq=False)
class Load:
    """One micro-batch here. ``token``: the sender's number for it; ``sender`` None: we feed it ourselves."""

    key: Key
    token: int
    sender: PeerId | None
    order: tuple[int, ...]
    at: int
    samples: int
    input: Tensor
    #: The batch as it travels: its tensors, and how they are nested.
    tensors: list[Tensor]
    nest: str
    #: What was computed, with its graph, between the forward and the backward pass.
    leaf: Tensor | None = None
    output: Tensor | None = None
    #: Attempts to have it computed further on: our number → to whom.
    attempts: dict[int, PeerId] = attrs.field(factory=dict)
    #: Gradient of the output, and whom the micro-batch passed from there on.
    gradient: Tensor | None = None
    path: tuple[Hop, ...] = ()
    loss: float = 0.0
    #: Seconds of computing.
    spent: float = 0.0
    #: Whether its gradient is in the sum.
    counted: bool = False

    @property
    def name(self) -> bytes:
        """Of this attempt: two senders may have the same number for one micro-batch."""
        key = self.key
        return b"%s %d %d %s %d" % (key.feeder, key.step, key.index, self.sender or b"", self.token)

    @property
    def last(self) -> bool:
        return self.at == len(self.order) - 1


class Flow:
    """``me``: our id; ``stage`` of ``stages``. Steps begin at ``step``."""

    def __init__(self, me: PeerId, stage: int, stages: int, step: int = 0) -> None:
        self.me, self.stage, self.stages, self.step = me, stage, stages, step
        self.loads: dict[bytes, Load] = {}
        self.schedule = Schedule(stage, stages)
        #: Steps that each feeder has said to be done with, the last one: and the ways that count in it.
        self.done: dict[PeerId, int] = {}
        self._won: dict[tuple[PeerId, int], dict[int, tuple[Hop, ...]]] = {}
        #: The greatest step in which a feeder brought anything.
        self._seen: dict[PeerId, int] = {}

    # -- a micro-batch's way ------------------------------------------------------------------------------------------

    def feed(self, load: Load) -> None:
        """A micro-batch of our own."""
        self.loads[load.name] = load
        self.schedule.forward(load.name)

    def arrive(self, load: Load) -> str:
        """One that another peer sent: ``taken``, ``late`` (the step is over here) or ``full``."""
        feeder, step = load.key.feeder, load.key.step
        if step < self.step:
            return "late"
        if load.name in self.loads:
            return "taken"
        # Whoever is ahead of us waits for us; who claims to be far ahead would only fill the place of others.
        waiting = sum(other.sender == load.sender for other in self.loads.values())
        if step > self.step + defaults.MAX_AHEAD or waiting >= defaults.MAX_WAITING:
            return "full"
        self._seen[feeder] = max(step, self._seen.get(feeder, 0))
        self.loads[load.name] = load
        if step == self.step:
            self.schedule.forward(load.name)
        return "taken"

    def wants(self, sender: PeerId, key: Key, token: int) -> Load | None:
        """What waits for a gradient from ``sender`` under this number."""
        for load in self.loads.values():
            if load.key == key and load.attempts.get(token) == sender:
                return load if load.gradient is None and load.output is not None else None
        return None

    def returned(self, sender: PeerId, key: Key, token: int, gradient: Tensor, path: tuple[Hop, ...]) -> Load | None:
        """The gradient of what we sent on under ``token``. None when it is not wanted (any more), or does not fit."""
        load = self.wants(sender, key, token)
        if load is None or load.output is None or load.output.shape != gradient.shape:
            return None
        if path[:1] != (Hop(sender, token),) or len(path) != len(load.order) - 1 - load.at:
            return None
        load.gradient, load.path = gradient, path
        self.schedule.backward(load.name)
        return load

    def next(self) -> tuple[Kind, Load] | None:
        """What to compute now; say ``schedule.done()`` when it is."""
        found = self.schedule.next()
        return None if found is None else (found[0], self.loads[found[1]])

    def give_up(self, load: Load) -> None:
        """It cannot be computed: whoever sent it may try elsewhere."""
        self.loads.pop(load.name, None)
        self.schedule.drop(load.name)

    # -- steps --------------------------------------------------------------------------------------------------------

    def finish(self, feeder: PeerId, message: StepDone) -> None:
        """``feeder`` is done with a step."""
        if message.step < self.step:
            return
        self.done[feeder] = max(message.step, self.done.get(feeder, -1))
        if message.step > self.step + defaults.MAX_AHEAD:
            return
        self._won[feeder, message.step] = {each.index: each.path for each in message.won}

    def own_done(self) -> StepDone | None:
        """As a feeder: what to say once all of our micro-batches of this step are back; None before."""
        own = [load for load in self.loads.values() if load.sender is None and load.key.step == self.step]
        if not own or not all(load.counted for load in own):
            return None
        won = tuple(Won(load.key.index, load.path) for load in sorted(own, key=lambda load: load.key.index))
        return StepDone(b"", self.step, won)

    def awaited(self, feeders: Iterable[PeerId], at: Collection[tuple[PeerId, int]]) -> list[PeerId]:
        """Those of ``feeders`` whose word on the present step is still to come. ``at``: steps that they are in, by what
        they said last."""
        steps = dict(at)
        return [
            peer
            for peer in feeders
            if self.done.get(peer, -1) < self.step
            and steps.get(peer, 0) <= self.step
            and self._seen.get(peer, 0) <= self.step
        ]

    def ended(self, feeders: Collection[PeerId]) -> bool:
        """Whether one of ``feeders`` said that this step is done, or is past it."""
        return any(self.done.get(peer, -1) >= self.step or self._seen.get(peer, -1) > self.step for peer in feeders)

    def counting(self) -> tuple[list[Load], list[Load]]:
        """Of this step: what counts and is in the sum; and what is in the sum and does not count."""
        right: list[Load] = []
        wrong: list[Load] = []
        for load in self.loads.values():
            if load.key.step != self.step or not load.counted:
                continue
            if load.sender is None:
                right.append(load)
                continue
            path = self._won.get((load.key.feeder, self.step), {}).get(load.key.index, ())
            (right if self._passed(load, path) else wrong).append(load)
        return right, wrong

    def _passed(self, load: Load, path: tuple[Hop, ...]) -> bool:
        """Whether the way ``path`` of a micro-batch leads through ``load``: here, and from the peer that sent it."""
        here = load.at - 1  # the feeder itself is not in the path
        if not 0 <= here < len(path) or path[here] != Hop(self.me, load.token):
            return False
        return load.sender == (path[here - 1].peer if here else load.key.feeder)

    def close(self) -> None:
        """Go on to the next step: what is left of this one is dropped."""
        self.go_to(self.step + 1)

    def go_to(self, step: int) -> None:
        """Go to ``step``, forward or back: what came for earlier ones is dropped, for later ones it stays."""
        if step == self.step:
            return
        self.step = step
        self.schedule = Schedule(self.stage, self.stages)
        self.loads = {name: load for name, load in self.loads.items() if load.key.step >= step}
        self._won = {at: won for at, won in self._won.items() if at[1] >= step}
        for load in self.loads.values():
            if load.key.step == step:
                self.schedule.forward(load.name)

    def restart(self) -> None:
        """Forget what we fed in this step and what was computed of it: it is begun anew, under new numbers."""
        kept = {}
        self.schedule = Schedule(self.stage, self.stages)
        for name, load in self.loads.items():
            if load.sender is None:
                continue
            load.leaf = load.output = load.gradient = None
            load.attempts, load.path, load.counted, load.loss, load.spent = {}, (), False, 0.0, 0.0
            kept[name] = load
            if load.key.step == self.step:
                self.schedule.forward(name)
        self.loads = kept
