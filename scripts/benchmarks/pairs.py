"""A server and a client process of each system, and turns among them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
import trio

from .children import OPTIONAL
from .processes import Child, ChildFailed, Children

#: What a system is called in ``--systems`` → in tables.
NAMES = {
    "shoal": "shoal",
    "tcp": "trio TCP",
    "tls": "trio TLS 1.3",
    "grpc": "grpc.aio",
    "libp2p": "py-libp2p",
    "hivemind": "hivemind p2pd",
}

_LOOPBACK = Path("/sys/class/net/lo/statistics/tx_bytes")


@attrs.frozen
class Pair:
    """Two processes of one system that know each other. ``cipher``: what hides the bytes between them."""

    system: str
    server: Child
    client: Child
    cipher: str

    @property
    def name(self) -> str:
        return NAMES[self.system]


async def meet(group: Children, systems: Sequence[str], options: argparse.Namespace) -> tuple[list[Pair], list[str]]:
    """Start those of ``systems`` that were asked for; returns them, and why others are missing."""
    found, missing = [], []
    for system in systems:
        if system not in options.systems:
            continue
        try:
            pair = await _pair(group, system, options.peer_python)
        except ChildFailed as error:
            if f"{system}-server" not in OPTIONAL:
                raise
            pair = str(error)
        if isinstance(pair, Pair):
            found.append(pair)
        else:
            missing.append(f"{NAMES[system]} is left out: {pair}")
            print(missing[-1], file=sys.stderr)
    return found, missing


async def _pair(group: Children, system: str, python: str) -> Pair | str:
    optional = f"{system}-server" in OPTIONAL
    ends = []
    for end in ("server", "client"):
        (child,) = await group.start(f"{system}-{end}", 1, python if optional else sys.executable)
        if optional and (lack := await child.missing()):
            return lack
        ends.append(child)
    server, client = ends
    hello = await server.ask("start")
    await client.ask("start")
    facts = await client.ask("meet", **hello)
    return Pair(system, server, client, facts["cipher"])


async def turns(
    pairs: Sequence[Pair],
    once: Callable[[Pair, bool], Awaitable[None]],
    options: argparse.Namespace,
    share: float = 1.0,
) -> None:
    """Each pair in its turn, the first time not counted, until all runs are taken or ``share`` of the time is over."""
    ends = None if options.seconds is None else trio.current_time() + options.seconds * share
    for number in range(-1, options.runs):
        if ends is not None and number >= 3 and trio.current_time() > ends:
            break
        for pair in pairs:
            await once(pair, number >= 0)


def loopback() -> int | None:
    """Bytes that have gone over the loopback interface, headers included; of the whole machine. None: not Linux."""
    try:
        return int(_LOOPBACK.read_text())
    except OSError:
        return None


def ratio(value: float, other: float | None) -> str:
    return "" if other is None else f"{value / other:.2f}"


def facts(pairs: Sequence[Pair]) -> dict[str, Any]:
    return {pair.name: pair.cipher for pair in pairs}
