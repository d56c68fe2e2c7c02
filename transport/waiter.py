"""One task that waits until it is woken: a parking lot for exactly one, at a fraction of the cost."""

from __future__ import annotations

import trio


class Waiter:
    """False while nobody waits. The owner sees to it that no second task waits at the same time."""

    __slots__ = ("_task",)

    def __init__(self) -> None:
        self._task: trio.lowlevel.Task | None = None

    def __bool__(self) -> bool:
        return self._task is not None

    async def wait(self) -> None:
        """Wait for the next :meth:`wake`. May be cancelled."""

        def abort(_: object) -> trio.lowlevel.Abort:
            self._task = None
            return trio.lowlevel.Abort.SUCCEEDED

        self._task = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(abort)

    def wake(self) -> None:
        """Let the task that waits go on, if there is one."""
        if self._task is not None:
            task, self._task = self._task, None
            trio.lowlevel.reschedule(task)
