"""What a child process does: reads orders, one JSON line each, and answers with one line."""

from __future__ import annotations

import json
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import trio

#: Seconds between an order and the moment at which all processes act on it together.
HEAD_START = 0.05


class Worker(ABC):
    """A child that runs trio: ``do`` carries out one order. ``nursery`` lives as long as the child."""

    nursery: trio.Nursery

    @abstractmethod
    async def do(self, order: str, arguments: dict[str, Any]) -> dict[str, Any]: ...


def child_main(kind: str) -> int:
    """Run until the parent closes our standard input, which it also does by dying."""
    # What libraries print must not get between the answers.
    answers = os.dup(1)
    os.dup2(2, 1)
    trio.run(_obey, _kinds()[kind](), answers)
    return 0


def _kinds() -> dict[str, Callable[[], Worker]]:
    from .gloo import GlooPeer
    from .link import ShoalClient, ShoalServer, TcpClient, TcpServer
    from .reducer import ShoalPeer

    return {
        "shoal": ShoalPeer,
        "gloo": GlooPeer,
        "shoal-server": ShoalServer,
        "shoal-client": ShoalClient,
        "tcp-server": TcpServer,
        "tcp-client": TcpClient,
    }


async def _obey(worker: Worker, answers: int) -> None:
    orders = trio.lowlevel.FdStream(os.dup(0))
    replies = trio.lowlevel.FdStream(answers)
    buffer = bytearray()
    async with trio.open_nursery() as nursery:
        worker.nursery = nursery
        while True:
            while (at := buffer.find(b"\n")) < 0:
                data = await orders.receive_some(65536)
                if not data:
                    # Whatever still waits for other processes, in threads too, waits in vain.
                    sys.stderr.flush()
                    os._exit(0)
                buffer += data
            line = json.loads(bytes(buffer[:at]))
            del buffer[: at + 1]
            answer = await worker.do(line.pop("order"), line)
            await replies.send_all(json.dumps(answer).encode() + b"\n")


async def until(moment: float) -> None:
    """Sleep until ``time.monotonic()`` is ``moment``: that clock is the same in all processes of a machine."""
    await trio.sleep(max(0.0, moment - time.monotonic()))
