"""What a run tells people of the moment."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from .checkpoints import write_model
from .events import RunStatus
from .rounds.decisions import told

if TYPE_CHECKING:
    from .run import Run


def status_of(run: Run) -> RunStatus:
    """The moment of ``run``; on any thread."""
    head = run.membership.head if hasattr(run, "membership") else None
    record = head.record if head is not None else None
    voter = run._instance.voter if run._instance is not None else None
    exchanging = voter is not None and voter.offer is not None and run.phase != "finished"
    now, reason = run.host.now() if trio.lowlevel.in_trio_run() else math.inf, run.reason  # or another thread's
    if voter is not None and run.phase != "finished":
        reason = told(now, voter.due, voter.reason, None if exchanging else reason)
    return RunStatus(
        run=run.run_id.hex(),
        task=run.spec.task,
        strategy=run.spec.strategy,
        mode=run.spec.mode,
        round=run.round,
        phase=voter.phase if voter is not None and exchanging else run.phase,
        reason=(run.membership.reason if head is not None else "") or reason,
        leader=voter.leader().text if voter is not None else "",
        members=tuple(peer.text for peer in run.membership.members()) if head is not None else (),
        samples=(run._given or run._peer.tally).samples,
        total_samples=record.total if record is not None else 0,
        loss=run._loss,
        metric_name=run._metric_name,
        metric=run._metric,
        digest=run.digest(),
        branch=record.branch if record is not None else 0,
        finished=run.finished.is_set(),
        trial=() if record is None else tuple((each.peer.text, each.left) for each in record.trial),
    )


async def export(run: Run, path: Path) -> str:
    """See :meth:`Run.export`."""
    async with run.shelf.reading() as snapshot:
        return await run.host.run_blocking(
            write_model, path, run.spec, run.run_id, snapshot.round, snapshot.vectors, snapshot.digest
        )
