"""Inner products and decisions in the model: real messages and arithmetic over products that mean nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from shoal.learning.aggregate.products import pack_triangle
from shoal.learning.rounds.actions import Action, Check, Measure, Weigh
from shoal.learning.rounds.weighing import decide

from .laws import check_held
from .seats import Seat
from .words import Broken

if TYPE_CHECKING:
    from .table import Table


def weighed(table: Table, seat: Seat, action: Measure | Weigh | Check) -> Callable[[], list[Action]]:
    """What ``seat`` does for ``action``, as an instance would: the step that tells its voter or leader of it."""
    place, rule, key = seat.place, table.shape.rule, seat.view.key
    at = action.attempt, action.epoch
    match action:
        case Measure():
            check_held(seat, action)
            # Every owner has products of its own.
            data = pack_triangle(np.eye(len(action.members)) * (1 + sum(action.indices)))
            return lambda: table.seats[place].voter.measured(table.seats[place].clock, *at, data)
        case Check():
            own = decide(rule, key, action.parts, action.members, action.scores, action.decision)
            if own.wrong is not None:
                raise Broken(f"{place} refuses an honest leader's decision: {own.wrong}")
            return lambda: table.seats[place].voter.weighed(table.seats[place].clock, *at, own)
    made = decide(rule, key, action.parts, action.members, action.scores)

    def decided() -> list[Action]:
        leader = table.seats[place].leader
        return [] if leader is None else leader.weighed(table.seats[place].clock, action, made)

    return decided
