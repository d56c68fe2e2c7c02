"""The training process of :mod:`.apart`: a :class:`.worker.Worker` that does what comes through its standard input."""

from __future__ import annotations

import math
import os
import sys
import traceback
from typing import BinaryIO

import attrs
import numpy as np
import torch
import trio

from ..transport.errors import ConfigError
from ..transport.host import RealHost
from ..transport.wire import unpack
from . import defaults, exact
from .apart import Cancel, Descend, Do, Done, Failed, FromChild, Look, Setup, ToChild, Turn, framed, id_of
from .task import resolve
from .worker import TrainResult, Worker


def main() -> None:
    """Until standard input ends."""
    source = sys.stdin.buffer
    # What hooks print must not get among the messages.
    sink = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    first = _read(source)
    if first is None:
        return
    setup = unpack(Setup, first, limit=defaults.APART_MESSAGE)
    exact.prepare_torch(setup.threads)
    trio.run(_Child(setup, source, sink).run)


def _read(source: BinaryIO) -> bytes | None:
    head = source.read(4)
    if len(head) < 4:
        return None
    data = source.read(int.from_bytes(head, "big"))
    return data or None


class _Child:
    def __init__(self, setup: Setup, source: BinaryIO, sink: BinaryIO) -> None:
        self._setup, self._source, self._sink = setup, source, sink
        self._shared = np.memmap(setup.shared, np.float32, "r+", shape=(2 * setup.size,))
        self._worker: Worker | None = None
        self._training: dict[int, trio.CancelScope] = {}

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                data = await trio.to_thread.run_sync(_read, self._source)
                if data is None:
                    os._exit(0)  # the node is gone: nobody wants what is still being computed
                message = unpack(ToChild, data, limit=defaults.APART_MESSAGE).message
                match message:
                    case Turn():
                        if (worker := self._made(-1)) is not None:
                            worker.set_shard(message.shard)
                    case Cancel():
                        if message.cancel in self._training:
                            self._training[message.cancel].cancel()
                    case Look() | Descend():
                        await self._do(message, None, trio.CancelScope())
                    case Do():
                        # In the order in which they came; only training goes on while others are done.
                        vector = (
                            torch.from_numpy(np.array(self._shared[: self._setup.size])) if message.vector else None
                        )
                        if message.what == "train":
                            scope = self._training[message.id] = trio.CancelScope()
                            nursery.start_soon(self._do, message, vector, scope)
                        else:
                            await self._do(message, vector, trio.CancelScope())

    def _made(self, id: int) -> Worker | None:
        if self._worker is None:
            try:
                task = resolve(self._setup.task, allow_import=True)
                self._worker = Worker(RealHost(), task, self._setup.shard, self._setup.device)
            except Exception as error:  # noqa: BLE001  # boundary: hooks of the user, told to the node
                self._fail(id, error)
        return self._worker

    async def _do(self, do: Do | Look | Descend, vector: torch.Tensor | None, scope: trio.CancelScope) -> None:
        id = id_of(do)
        worker = self._made(id)
        if worker is None:
            return
        done = Done(id)
        try:
            with scope:
                done = await self._done(worker, do, vector)
        except Exception as error:  # noqa: BLE001  # boundary: hooks of the user, told to the node
            self._fail(id, error)
        else:
            self._sink.write(framed(FromChild(done)))
        finally:
            self._training.pop(id, None)

    async def _done(self, worker: Worker, do: Do | Look | Descend, vector: torch.Tensor | None) -> Done:
        if isinstance(do, Look):
            losses, result = await worker.probe(do.directions, do.eps, do.sides, do.part)
            return attrs.evolve(self._told(do.look, result), losses=tuple(tuple(map(_finite, each)) for each in losses))
        if isinstance(do, Descend):
            await worker.descend(do.moves)
            return Done(do.descend)
        if do.what == "train":
            result = await worker.train(do.steps, do.seconds, rate=do.rate, drift=vector)
            return self._told(do.id, result)
        if do.what == "gradient":
            gradient, result = await worker.gradient()
            self._shared[self._setup.size :] = gradient.numpy()
            return self._told(do.id, result)
        if do.what == "weights":
            self._shared[self._setup.size :] = (await worker.weights()).numpy()
        elif do.what == "fresh":
            self._shared[self._setup.size :] = (await worker.fresh(do.peer)).numpy()
        elif do.what == "evaluate":
            return Done(do.id, values={k: _finite(v) for k, v in (await worker.evaluate(vector)).items()})
        elif do.what == "reset":
            worker.reset_optimizer()
        elif do.what != "sync":
            assert vector is not None
            await (worker.apply(vector) if do.what == "apply" else worker.load(vector))
        return Done(do.id)

    @staticmethod
    def _told(id: int, result: TrainResult) -> Done:
        return Done(id, result.steps, result.samples, _finite(result.loss_mean), result.seconds)

    def _fail(self, id: int, error: Exception) -> None:
        ours = isinstance(error, ConfigError)
        text = str(error) if ours else "in the training process: " + "".join(traceback.format_exception(error))
        self._sink.write(framed(FromChild(Failed(id, text[-defaults.APART_MESSAGE // 2 :], ours))))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


if __name__ == "__main__":
    main()
