"""What a child process does: reads orders, one JSON line each, and answers with one line."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from abc import ABC, abstractmethod
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import trio

#: Seconds between an order and the moment at which all processes act on it together.
HEAD_START = 0.05


class Worker(ABC):
    """A child: ``do`` carries out one order. ``nursery`` lives as long as the child, if it runs trio."""

    framework: ClassVar[str] = "trio"
    nursery: trio.Nursery

    @abstractmethod
    async def do(self, order: str, arguments: dict[str, Any]) -> dict[str, Any]: ...


def child_main(kind: str) -> int:
    """Run until the parent closes our standard input, which it also does by dying."""
    # What libraries print must not get between the answers.
    answers = os.dup(1)
    os.dup2(2, 1)
    try:
        module, _, name = KINDS[kind].partition(":")
        made: type[Worker] = getattr(import_module(f"benchmarks.{module}"), name)
    except ImportError as error:
        if kind not in OPTIONAL:
            raise
        os.write(answers, json.dumps({"missing": str(error)}).encode() + b"\n")
        return 0
    if kind in OPTIONAL:
        os.write(answers, b"{}\n")
    if made.framework == "trio":
        trio.run(_obey, made, answers)
    else:
        asyncio.run(_obey_asyncio(made, answers))
    return 0


#: What a child can be → the class that it runs.
KINDS = {
    "shoal": "reducer:ShoalPeer",
    "gloo": "gloo:GlooPeer",
    "victim": "victim:KillPeer",
    "soaker": "soaker:Soaker",
    "blobs": "blobs:BlobPeer",
    "overlapper": "overlap:Overlapper",
    "stage-holder": "stages:StageHolder",
    **{
        f"{system}-{end.lower()}": f"systems.{module}:{name}{end}"
        for system, module, name in (
            ("shoal", "shoal", "Shoal"),
            ("tcp", "plain", "Tcp"),
            ("tls", "tls", "Tls"),
            ("grpc", "grpc", "Grpc"),
            ("libp2p", "libp2p", "Libp2p"),
            ("hivemind", "hivemind", "Hivemind"),
        )
        for end in ("Server", "Client")
    },
    **{
        f"dht-{system}": f"systems.dht_{system}:{system.capitalize()}Dht"
        for system in ("shoal", "kademlia", "hivemind", "libp2p")
    },
    **{
        f"reduce-{system}": f"systems.reduce_{system}:{system.capitalize()}Reduce" for system in ("hivemind", "torchft")
    },
}


#: These may lack a package: a line before the first order says ``{"missing": …}``, or ``{}``.
OPTIONAL = tuple(
    kind
    for kind in KINDS
    if kind.removeprefix("dht-").removeprefix("reduce-").partition("-")[0]
    in ("tls", "grpc", "libp2p", "hivemind", "kademlia", "torchft")
)


async def _obey(made: type[Worker], answers: int) -> None:
    worker = made()
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


async def _obey_asyncio(made: type[Worker], answers: int) -> None:
    worker = made()
    orders = os.fdopen(os.dup(0), "rb")
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, orders.readline):
        arguments = json.loads(line)
        answer = await worker.do(arguments.pop("order"), arguments)
        os.write(answers, json.dumps(answer).encode() + b"\n")
    os._exit(0)


async def until(moment: float) -> None:
    """Sleep until ``time.monotonic()`` is ``moment``: that clock is the same in all processes of a machine."""
    await trio.sleep(max(0.0, moment - time.monotonic()))


def end_now(file: Path) -> None:
    """End this process with SIGKILL; ``file`` keeps ``time.monotonic()`` of that moment."""
    file.write_text(str(time.monotonic()))
    os.kill(os.getpid(), signal.SIGKILL)
