"""A trainer in a process of its own: the node's loop and the training steps share no interpreter lock.

For models whose steps take less than some 10 ms, where a busy node costs training a good part of its time. Vectors pass
through a file that both have mapped into memory, everything else as messages through the child's pipes. The child
(:mod:`.apart_child`) ends when its standard input does, so never later than the node.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Literal

import attrs
import numpy as np
import torch
import trio
from numpy.typing import NDArray
from torch import Tensor

from ..transport import deadlines
from ..transport.errors import ConfigError, DecodeError, LocalError
from ..transport.wire import pack, unpack
from . import defaults
from .directions import Direction, Move
from .peer import Activations
from .shard import Shard
from .state import Layout
from .task import Task
from .worker import Part, TrainResult

What = Literal["train", "gradient", "apply", "weights", "load", "evaluate", "reset", "sync", "fresh"]


@attrs.frozen
class Setup:
    """The first message to the child. ``task``: as typed on this machine; ``shared``: the file, two vectors long."""

    task: str
    shard: Shard
    device: str
    threads: int
    size: int
    shared: str


@attrs.frozen
class Do:
    """To the child: do ``what``. ``vector``: there is one in the file for it. ``peer``: whose fresh weights."""

    id: int
    what: What
    steps: int | None = None
    seconds: float | None = None
    rate: float | None = None
    vector: bool = False
    peer: bytes = b""


@attrs.frozen
class Cancel:
    """To the child: end the training that ``cancel`` began after the present slice."""

    cancel: int


@attrs.frozen
class Look:
    """To the child: see :meth:`.worker.Worker.probe`."""

    look: int
    directions: tuple[Direction, ...]
    eps: float
    sides: tuple[int, ...]
    part: Part | None


@attrs.frozen
class Descend:
    """To the child: move the parameters."""

    descend: int
    moves: tuple[Move, ...]


@attrs.frozen
class Turn:
    """To the child: take batches from ``shard``."""

    shard: Shard


@attrs.frozen
class Done:
    """From the child. ``loss``: None for one that is not finite. ``values``: of an evaluation; ``losses``: of looks;
    likewise."""

    id: int
    steps: int = 0
    samples: int = 0
    loss: float | None = None
    seconds: float = 0.0
    values: dict[str, float | None] = attrs.field(factory=dict)
    losses: tuple[tuple[float | None, ...], ...] = ()


@attrs.frozen
class Failed:
    """From the child: ``failed`` raised an error; ``ours``: a :class:`ConfigError`, whose text says everything."""

    failed: int
    text: str
    ours: bool


@attrs.frozen
class ToChild:
    message: Do | Cancel | Turn | Look | Descend


@attrs.frozen
class FromChild:
    message: Done | Failed


class TrainingFailed(LocalError):
    """A hook of the task raised in the training process, or the process is gone."""


def id_of(do: Do | Look | Descend) -> int:
    """What the answer to ``do`` is called."""
    return do.look if isinstance(do, Look) else do.descend if isinstance(do, Descend) else do.id


def framed(message: object) -> bytes:
    """``message`` as it goes through a pipe."""
    data = pack(message)
    return len(data).to_bytes(4, "big") + data


class Apart:
    """See the module and :class:`.worker.Worker`, whose methods it has. Made by :meth:`open`.

    A hook that raises in the child is a :class:`TrainingFailed` with its traceback here, as is the child's death.
    """

    def __init__(self, process: trio.Process, task: Task, shared: NDArray[np.float32]) -> None:
        # Only its names and shapes are of use here.
        self.model = task.model().to("meta")
        self.layout = Layout.of(self.model)
        self._process, self._shared = process, shared
        self._ids = itertools.count()
        self._waiting: dict[int, trio.Event] = {}
        self._answers: dict[int, Done | Failed] = {}
        self._gone = ""
        self._turn: Shard | None = None
        self._reset = False
        self._sending, self._vectors = trio.Lock(), trio.Lock()

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, task: Task, name: str, shard: Shard, device: str) -> AsyncIterator[Apart]:
        """The trainer of ``task``, which is called ``name`` on this machine, while the block runs."""
        size = Layout.of(task.model()).size
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        with tempfile.TemporaryDirectory(prefix="shoal-", dir=memory) as folder:
            path = Path(folder) / "vectors"
            shared = np.memmap(path, np.float32, "w+", shape=(2 * size,))
            process = await trio.lowlevel.open_process(
                [sys.executable, "-m", "shoal.learning.apart_child"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
            )  # fmt: skip
            trainer = cls(process, task, shared)
            try:
                setup = Setup(name, shard, device, torch.get_num_threads(), size, str(path))
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(trainer._listen)
                    await trainer._send(framed(setup))
                    yield trainer
                    nursery.cancel_scope.cancel()
            finally:
                with trio.CancelScope(shield=True):  # bounded: the kernel ends what is killed
                    assert process.stdin is not None
                    await trio.aclose_forcefully(process.stdin)
                    with trio.move_on_after(deadlines.goodbye()):
                        await process.wait()
                    if process.poll() is None:
                        process.kill()
                    await process.wait()

    @property
    def pid(self) -> int:
        """The child's."""
        return self._process.pid

    # -- a trainer ------------------------------------------------------------------------------------------

    def set_shard(self, shard: Shard) -> None:
        """Take batches from ``shard`` from the next slice on."""
        self._turn = shard

    def reset_optimizer(self) -> None:
        """A fresh optimiser, before the next training."""
        self._reset = True

    async def train(
        self,
        steps: int | None = None,
        seconds: float | None = None,
        *,
        rate: float | None = None,
        drift: Tensor | None = None,
    ) -> TrainResult:
        """As :meth:`.worker.Worker.train`; cancelled, it stops at the end of the running slice too."""
        await self._prepare()
        id = next(self._ids)
        do = Do(id, "train", steps, None if seconds is None else float(seconds), rate, drift is not None)
        try:
            if drift is None:
                await self._send_do(do)
                return _result(await self._answer(id))
            async with self._vectors:
                self._give(drift)
                await self._send_do(do)
                # It has its copy when it answers anything that was asked after it.
                await self._ask(Do(next(self._ids), "sync"))
            return _result(await self._answer(id))
        except trio.Cancelled:
            if id in self._waiting:
                with trio.CancelScope(shield=True), trio.move_on_after(deadlines.goodbye()):
                    await self._send(framed(ToChild(Cancel(id))))
                    await self._answer(id)
            raise

    async def gradient(self) -> tuple[Tensor, TrainResult]:
        await self._prepare()
        async with self._vectors:
            result = _result(await self._ask(Do(next(self._ids), "gradient")))
            return self._taken(None), result

    async def apply(self, gradient: Tensor) -> None:
        await self._with_vector("apply", gradient)

    async def weights(self, out: Tensor | None = None) -> Tensor:
        async with self._vectors:
            await self._ask(Do(next(self._ids), "weights"))
            return self._taken(out)

    async def fresh(self, peer: bytes) -> Tensor:
        async with self._vectors:
            await self._ask(Do(next(self._ids), "fresh", peer=peer))
            return self._taken(None)

    async def activations(self, vectors: Sequence[Tensor], modules: Sequence[str], samples: int) -> Activations:
        """Raises :class:`ConfigError`: they would have to travel."""
        raise ConfigError("this strategy looks at activations, which a training process keeps: without --train-apart")

    async def load(self, vector: Tensor) -> None:
        await self._with_vector("load", vector)

    async def evaluate(self, vector: Tensor | None = None) -> dict[str, float]:
        if vector is None:
            done = await self._ask(Do(next(self._ids), "evaluate"))
        else:
            done = await self._with_vector("evaluate", vector)
        return {name: _number(value) for name, value in done.values.items()}

    async def probe(
        self, directions: Sequence[Direction], eps: float, sides: Sequence[int], part: Part | None = None
    ) -> tuple[list[tuple[float, ...]], TrainResult]:
        await self._prepare()
        done = await self._ask(Look(next(self._ids), tuple(directions), eps, tuple(sides), part))
        return [tuple(_number(loss) for loss in each) for each in done.losses], _result(done)

    async def descend(self, moves: Sequence[Move]) -> None:
        await self._ask(Descend(next(self._ids), tuple(moves)))

    # -- messages -------------------------------------------------------------------------------------------

    async def _prepare(self) -> None:
        if self._turn is not None:
            turn, self._turn = self._turn, None
            await self._send(framed(ToChild(Turn(turn))))
        if self._reset:
            self._reset = False
            await self._ask(Do(next(self._ids), "reset"))

    async def _with_vector(self, what: What, vector: Tensor) -> Done:
        async with self._vectors:
            self._give(vector)
            return await self._ask(Do(next(self._ids), what, vector=True))

    def _give(self, vector: Tensor) -> None:
        self._shared[: self.layout.size] = vector.detach().numpy()

    def _taken(self, out: Tensor | None) -> Tensor:
        found = torch.from_numpy(np.array(self._shared[self.layout.size :]))
        return found if out is None else out.copy_(found)

    async def _ask(self, do: Do | Look | Descend) -> Done:
        """Not cancelled before it is answered, as work in a thread is not: what is in the file must stay till then."""
        with trio.CancelScope(shield=True):
            await self._send_do(do)
            await self._answered(id_of(do))
        return self._answer_to(id_of(do))

    async def _send_do(self, do: Do | Look | Descend) -> None:
        self._waiting[id_of(do)] = trio.Event()
        await self._send(framed(ToChild(do)))

    async def _send(self, data: bytes) -> None:
        assert self._process.stdin is not None
        try:
            # Half a message would spoil all that follow. It is smaller than a pipe.
            async with self._sending:
                with trio.CancelScope(shield=True):
                    await self._process.stdin.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            await self._end()

    async def _answer(self, id: int) -> Done:
        await self._answered(id)
        return self._answer_to(id)

    async def _answered(self, id: int) -> None:
        event = self._waiting.get(id)
        if event is not None and not self._gone:
            await event.wait()  # as long as the hook takes: its death is told at once

    def _answer_to(self, id: int) -> Done:
        self._waiting.pop(id, None)
        match answer := self._answers.pop(id, None):
            case Done():
                return answer
            case Failed():
                raise ConfigError(answer.text) if answer.ours else TrainingFailed(answer.text)
            case None:
                raise TrainingFailed(self._gone or "the training process gave no answer")

    async def _listen(self) -> None:
        stream, buffer = self._process.stdout, bytearray()
        assert stream is not None
        while not self._gone:
            try:
                more = await stream.receive_some(defaults.APART_MESSAGE)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                more = b""
            if not more:
                await self._end()
                return
            buffer += more
            while len(buffer) >= 4 and len(buffer) >= 4 + (length := int.from_bytes(buffer[:4], "big")):
                data = bytes(buffer[4 : 4 + length])
                del buffer[: 4 + length]
                try:
                    message = unpack(FromChild, data, limit=defaults.APART_MESSAGE).message
                except DecodeError as error:
                    self._gone = f"the training process speaks nonsense ({error}); does a hook print to its output?"
                    self._wake()
                    return
                id = message.failed if isinstance(message, Failed) else message.id
                self._answers[id] = message
                if id in self._waiting:
                    self._waiting[id].set()

    async def _end(self) -> None:
        with trio.move_on_after(deadlines.goodbye()):
            await self._process.wait()  # its pipe closes a moment before it is dead
        code = self._process.poll()
        how = "" if code is None else f" ({signal.Signals(-code).name})" if code < 0 else f" (exit status {code})"
        self._gone = self._gone or f"the training process ended{how}; what it wrote to standard error says more"
        self._wake()

    def _wake(self) -> None:
        for event in self._waiting.values():
            event.set()


def _result(done: Done) -> TrainResult:
    return TrainResult(done.steps, done.samples, _number(done.loss), done.seconds)


def _number(value: float | None) -> float:
    return math.nan if value is None else value
