"""A whole node that kills itself with SIGKILL at one exact action of its stage: ``stage_kill_child.py start …``.

It is ``shoal start …`` with the trainer's actions watched from outside: what computes, sends, receives and commits is
the code that runs in production, wrapped in this process alone. Every action is written to the file ``$TRACE`` as a
line of JSON, with the clock that all processes of a machine share; one that the file ``$ORDER`` names is the last.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import time
from typing import Any

from shoal.learning.pipeline.crew import Crew
from shoal.learning.pipeline.flow import Flow
from shoal.learning.pipeline.messages import PULL, PUSH, STEP
from shoal.learning.pipeline.schedule import Schedule
from shoal.learning.pipeline.trainer import StageTrainer
from shoal.learning.run import Run
from shoal.node.cli import leave, main
from shoal.transport.endpoint import Endpoint

TRACE, ORDER = os.environ["TRACE"], os.environ["ORDER"]
_trace = os.open(TRACE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
#: The stage held here, and the schedule's load that is computed.
_held: dict[str, Any] = {"stage": -1}
_SENDS = {PUSH.name: "send on", PULL.name: "send back", STEP.name: "tell"}


def say(what: str, **more: Any) -> None:
    line = {"t": time.monotonic(), "what": what, "stage": _held["stage"], **more}
    os.write(_trace, json.dumps(line).encode() + b"\n")


def act(point: str, index: int = -1, step: int = -1) -> None:
    """This action is done now, and is the last one if it was ordered so."""
    try:
        with open(ORDER) as file:
            order = json.load(file)
    except (OSError, ValueError):
        order = None
    if order == {"stage": _held["stage"], "point": point, "index": index}:
        say("killed", point=point, index=index)
        os.kill(os.getpid(), signal.SIGKILL)
    say("act", point=point, index=index, step=step)


def _patched(owner: type, name: str, make: Any) -> None:
    setattr(owner, name, functools.wraps(getattr(owner, name))(make(getattr(owner, name))))


def _crew_say(old: Any) -> Any:
    def say_it(self: Crew, **changes: Any) -> None:
        before = self.own
        old(self, **changes)
        if (before.state, before.stage, before.part) != (self.own.state, self.own.stage, self.own.part):
            _held["stage"] = self.own.stage if self.own.part else -1
            say("seat", state=self.own.state, generation=self.own.generation)

    return say_it


def _next(old: Any) -> Any:
    def following(self: Flow) -> Any:
        found = old(self)
        if found is not None:
            _held["load"] = (found[0].value, found[1].key.index, found[1].key.step)
            act(f"before {found[0].value}", *_held["load"][1:])
        return found

    return following


def _done(old: Any) -> Any:
    def done(self: Schedule) -> None:
        old(self)
        kind, index, step = _held["load"]
        act(f"after {kind}", index, step)

    return done


def _call(old: Any) -> Any:
    async def call(self: Endpoint, peer: Any, method: Any, request: Any, **more: Any) -> Any:
        verb = _SENDS.get(method.name)
        if verb is None:
            return await old(self, peer, method, request, **more)
        index = -1 if verb == "tell" else request.key.index
        act(f"before {verb}", index)
        answer = await old(self, peer, method, request, **more)
        act(f"after {verb}", index)
        return answer

    return call


def _on_push(old: Any) -> Any:
    async def on_push(self: StageTrainer, call: Any) -> Any:
        act("before receive", call.request.key.index, call.request.key.step)
        answer = await old(self, call)
        act("after receive", call.request.key.index, call.request.key.step)
        return answer

    return on_push


def _on_pull(old: Any) -> Any:
    async def on_pull(self: StageTrainer, call: Any) -> Any:
        act("before gradient", call.request.key.index, call.request.key.step)
        answer = await old(self, call)
        act("after gradient", call.request.key.index, call.request.key.step)
        return answer

    return on_pull


def _on_step(old: Any) -> Any:
    async def on_step(self: StageTrainer, call: Any) -> Any:
        act("before word", step=call.request.step)
        answer = await old(self, call)
        act("after word", step=call.request.step)
        return answer

    return on_step


def _close(old: Any) -> Any:
    def close(self: Flow) -> None:
        act("before end of step", step=self.step)
        old(self)
        act("after end of step", step=self.step - 1)

    return close


def _emit(old: Any) -> Any:
    def emit(self: Run, phase: str, what: str, peer: Any = None, detail: str = "") -> None:
        if phase != "run":
            act(f"round: {phase} {what}", step=self.round_now)
        else:
            say("run", event=what, detail=detail)
        old(self, phase, what, peer, detail)

    return emit


def _settle(old: Any) -> Any:
    async def settle(self: Run) -> None:
        act("round: before settling", step=self.round)
        await old(self)
        act("round: after settling", step=self.round)

    return settle


for _owner, _name, _make in (
    (Crew, "say", _crew_say), (Flow, "next", _next), (Schedule, "done", _done), (Endpoint, "call", _call),
    (StageTrainer, "_on_push", _on_push), (StageTrainer, "_on_pull", _on_pull), (StageTrainer, "_on_step", _on_step),
    (Flow, "close", _close), (Run, "emit", _emit), (Run, "settle", _settle),
):  # fmt: skip
    _patched(_owner, _name, _make)

if __name__ == "__main__":
    leave(main(sys.argv[1:]))
