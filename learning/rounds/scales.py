"""Inner products and decisions of one round on one peer: computed off the event loop, told to voter and leader."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...transport.host import Host
from ...transport.identity import PeerId
from ..aggregate.products import pack_triangle
from ..reduce.buffers import Buffers
from ..reduce.codecs import resolve
from .actions import Action, Assess, Check, Measure, Weigh
from .audits import Auditor
from .messages import CommitRecord
from .passes import Passes
from .setting import Setting
from .voter import Voter
from .weighing import Weighed, decide


class Scales:
    """``quality``: how far the run's rule took the members of the present plan seriously, as we decided ourselves."""

    def __init__(
        self,
        host: Host,
        setting: Setting,
        voter: Voter,
        buffers: Buffers,
        passes: Passes,
        feed: Callable[[Callable[[], Sequence[Action]]], None],
        auditor: Auditor,
    ) -> None:
        self._auditor = auditor
        self._host, self._setting, self._voter, self._buffers = host, setting, voter, buffers
        self._passes, self._feed = passes, feed
        self._quality: tuple[tuple[PeerId, ...], tuple[float, ...]] = (), ()

    def quality_of(self, record: CommitRecord) -> tuple[float, ...]:
        """Of the members of ``record``, in their order, 0 … 1; empty where the rule has none, or we did not decide."""
        members, quality = self._quality
        return quality if members == record.members else ()

    async def measure(self, action: Measure) -> None:
        """Compute our part of the inner products."""
        plan = self._voter.plan
        if plan is None or self._buffers.generation != (action.attempt, action.epoch):
            return
        ranges = [plan.slices[index].range for index in action.indices]
        elements = sum(stop - start for start, stop in ranges)
        products = self._buffers.products(action.members, ranges, resolve(plan.codec))
        if self._auditor.audits(resolve(plan.codec)):
            data = await self._passes.run(elements * len(action.members), self._auditor.products(action, plan))
        else:
            data = pack_triangle(await self._passes.run(elements * len(action.members), products))
        self._feed(lambda: self._voter.measured(self._host.now(), action.attempt, action.epoch, data))

    async def assess(self, action: Assess) -> None:
        """Whose work of those on trial goes where our combined slices go."""
        plan = self._voter.plan
        if plan is None or self._buffers.generation != (action.attempt, action.epoch):
            return
        ranges = [plan.slices[index].range for index in action.indices]
        elements = sum(stop - start for start, stop in ranges) * (1 + len(action.trial))
        fit = await self._passes.run(elements, self._buffers.fit(action.trial, ranges, resolve(plan.codec)))
        self._feed(lambda: self._voter.assessed(self._host.now(), action.attempt, action.epoch, fit))

    async def weigh(self, action: Weigh) -> Weighed:
        """What the leader decides; some rules search for seconds."""
        return await self._host.run_blocking(
            decide, self._setting.rule, self._setting.key, action.parts, action.members, action.scores
        )

    async def check(self, action: Check) -> None:
        """Decide as the leader should have, and compare."""
        frozen = self._voter.frozen
        found = await self._host.run_blocking(
            decide, self._setting.rule, self._setting.key, action.parts, action.members, action.scores, action.decision
        )
        if frozen is not None and found.wrong is None:
            self._quality = frozen.members, found.quality
        self._feed(lambda: self._voter.weighed(self._host.now(), action.attempt, action.epoch, found))
