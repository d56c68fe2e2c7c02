"""Plans with a ring, wherever one could be, whatever the paths are."""

from __future__ import annotations

from typing import Any

import attrs
import pytest

from shoal.learning.rounds import leader
from shoal.learning.rounds.messages import Plan
from shoal.learning.rounds.planning import first_plan


def ring_plan(*arguments: Any, **more: Any) -> Plan:
    """As :func:`first_plan`, round a ring in an order that is not that of the members."""
    plan = first_plan(*arguments, **more)
    if len(plan.members) < 3 or set(plan.members) != set(plan.receivers) or plan.trial or plan.codec != "fp32":
        return plan
    return attrs.evolve(plan, ring=(*plan.members[::2], *plan.members[1::2][::-1]))


@pytest.fixture
def rings(monkeypatch: pytest.MonkeyPatch) -> None:
    """All leaders plan rings, at every attempt."""
    monkeypatch.setattr(leader, "first_plan", ring_plan)
