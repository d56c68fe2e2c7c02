"""What virtual time replaces in a node, and that it replaces nothing else."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

import shoal.transport.host
from shoal.node.node import Node, NodeConfig
from shoal.sim.virtual import VirtualHost
from shoal.sim.world import World, simulate
from shoal.transport.address import Address
from shoal.transport.host import Host, RealHost
from shoal.transport.identity import Identity
from shoal.transport.memory import MemoryListener, MemoryNetwork, MemoryStream
from shoal.transport.network import ByteStream, Listener, Network
from shoal.transport.tcp import TcpListener, TcpNetwork, TcpStream

from . import tiny

#: All that is replaced: streams (with the listeners and networks that make them) and the host, which is the two clocks,
#: the random source and blocking calls.
REPLACED: dict[type, type] = {
    VirtualHost: RealHost,
    MemoryNetwork: TcpNetwork,
    MemoryListener: TcpListener,
    MemoryStream: TcpStream,
}

#: What a host is asked for. The clock behind ``now`` is trio's in both worlds: the mock clock here.
PARTS = {
    "now": "monotonic clock",
    "wall": "wall clock",
    "entropy": "random source of keys and nonces",
    "run_blocking": "blocking calls",
    "compute": "blocking calls that are modelled to take time",
}
#: The others are attributes: ``network`` (streams) and ``random`` (random source for jitter and choices), ``ciphers``,
#: and ``webrtc`` (starts engines; there are none in virtual time).
ATTRIBUTES = {"network", "random", "ciphers", "webrtc"}

#: What a replaced part is made of is its own affair.
OPAQUE = (Host, Network, Listener, ByteStream)


def attributes(value: object) -> Iterator[tuple[str, object]]:
    """Name and value of everything an object of ours refers to by itself."""
    yield from sorted(vars(value).items()) if hasattr(value, "__dict__") else ()
    for kind in type(value).__mro__:
        for name in getattr(kind, "__slots__", ()):
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                yield name, getattr(value, name)


def ours(value: object) -> bool:
    return type(value).__module__.startswith("shoal.")


def flat(value: object) -> Iterator[object]:
    """The objects in ``value`` that are not containers; a bound method stands for its object."""
    match value:
        case dict():
            for key, item in value.items():
                yield from flat(key)
                yield from flat(item)
        case list() | tuple() | set() | frozenset():
            for item in value:
                yield from flat(item)
        case _ if inspect.ismethod(value):
            yield value.__self__
        case _:
            yield value


def parts_of(node: Node) -> dict[tuple[str, str], set[type]]:
    """For every (class, attribute) in the object graph of a node: the classes of ours that were found there."""
    found: dict[tuple[str, str], set[type]] = {}
    seen: dict[int, object] = {}
    waiting: list[object] = [node]
    while waiting:
        holder = waiting.pop()
        if id(holder) in seen or isinstance(holder, OPAQUE):
            continue
        seen[id(holder)] = holder
        for name, value in attributes(holder):
            for item in flat(value):
                if ours(item):
                    found.setdefault((type(holder).__qualname__, name), set()).add(type(item))
                    waiting.append(item)
    return found


def virtual_parts() -> dict[tuple[str, str], set[type]]:
    """Of a node of a virtual swarm that has just committed a round."""
    found: list[dict[tuple[str, str], set[type]]] = []

    async def script(world: World) -> None:
        await world.until(lambda: bool(world.members[1].node.run_here and world.members[1].run.reports), "a round")
        found.append(parts_of(world.members[1].node))

    simulate(tiny.scenario(2, 3), script)
    return found[0]


async def real_parts() -> dict[tuple[str, str], set[type]]:
    """The same of a node on real sockets, threads and clocks."""
    founding = tiny.scenario(2, 3).founding
    here = Address("tcp", "127.0.0.1", 0)
    async with trio.open_nursery() as nursery:
        founder = Node(RealHost(), Identity(bytes(range(32))), NodeConfig((here,), founding=founding), task=tiny.Pull())
        nursery.start_soon(founder.run)
        while (ticket := founder.ticket()) is None:
            await trio.sleep(0.02)
        joiner = Node(RealHost(), Identity(bytes(range(1, 33))), NodeConfig((here,), ticket=ticket), task=tiny.Pull())
        nursery.start_soon(joiner.run)
        while joiner.run_here is None or not joiner.run_here.reports:
            await trio.sleep(0.02)
        found = parts_of(joiner)
        nursery.cancel_scope.cancel()
    return found


@pytest.mark.real
async def test_a_virtual_node_differs_from_a_real_one_in_the_listed_parts_only() -> None:
    virtual = await trio.to_thread.run_sync(virtual_parts)
    real = await real_parts()
    assert len(virtual) > 100
    both = [place for place in virtual if place in real]
    assert len(both) > 100
    replaced: dict[type, type] = {}
    for place in both:
        # Other messages and states may have been there at the moment; other kinds of parts may not.
        if virtual[place].isdisjoint(real[place]):
            assert len(virtual[place]) == len(real[place]) == 1, f"{place}: {virtual[place]} for {real[place]}"
            (mine,), (other,) = virtual[place], real[place]
            assert REPLACED.get(mine) is other, f"{place} holds a {mine.__name__} in place of a {other.__name__}"
            replaced[mine] = other
    assert replaced == {mine: other for mine, other in REPLACED.items() if mine is not MemoryNetwork}
    # Nothing that only exists in a simulation is anywhere else in a node.
    special = {kind for kinds in virtual.values() for kind in kinds if ".sim." in kind.__module__}
    assert special == {VirtualHost}
    assert type(VirtualHost("n", _world(), seed=0).network) is MemoryNetwork
    assert type(RealHost().network) is TcpNetwork


def _world() -> Any:
    import random

    from shoal.transport.memory import MemoryWorld

    return MemoryWorld(random.Random(0))


def public(kind: type) -> set[str]:
    return {name for name, value in vars(kind).items() if isinstance(value, Callable) and not name.startswith("_")}  # type: ignore[arg-type]


def test_the_virtual_host_replaces_exactly_what_a_host_is_asked_for() -> None:
    assert public(Host) == set(PARTS)
    assert set(Host.__annotations__) == ATTRIBUTES
    assert public(VirtualHost) == set(PARTS)
    # What is abstract is replaced in both; the real machine takes the time that it takes.
    assert public(RealHost) == set(Host.__abstractmethods__) == set(PARTS) - {"compute"}
    for name in PARTS:
        mine, asked = inspect.signature(getattr(VirtualHost, name)), inspect.signature(getattr(Host, name))
        assert list(mine.parameters) == list(asked.parameters)


#: Calls by which code would go round its host.
AROUND = {
    "time": ("time", "monotonic", "perf_counter", "time_ns", "sleep"),
    "random": ("random", "choice", "shuffle", "sample", "randint", "randbytes", "getrandbits", "SystemRandom"),
    "os": ("urandom", "getrandom"),
    "secrets": ("token_bytes", "randbelow", "choice"),
    "socket": ("socket", "create_connection"),
    "threading": ("Thread",),
    "to_thread": ("run_sync",),
}

#: Who may: the real host itself, TCP, the speed of this machine's ciphers, what a process adds around a node, and the
#: child process in which an engine runs.
OUTSIDE = {
    "transport/host.py", "transport/tcp.py", "transport/interfaces.py", "transport/aead.py", "learning/digest.py",
    "node/swarm.py", "node/own_loop.py", "node/launch.py", "node/daemon.py", "node/control.py",
    "node/local_socket.py", "node/commands.py", "node/console.py", "transport/webrtc_child.py", "node/lifetime.py",
    "node/doc_commands.py", "learning/apart_child.py",
}  # fmt: skip


def calls(tree: ast.AST) -> Iterator[str]:
    """``module.function`` of every call of an attribute; a variable named like a module is none if it is assigned."""
    variables = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            holder = node.func.value
            name = (
                holder.id if isinstance(holder, ast.Name) else holder.attr if isinstance(holder, ast.Attribute) else ""
            )
            # host.random is the injected source.
            injected = name == "random" and isinstance(holder, ast.Attribute)
            if name not in variables and not injected and node.func.attr in AROUND.get(name, ()):
                yield f"{name}.{node.func.attr}"


def test_no_floor_below_knows_whether_time_is_virtual_or_goes_round_its_host() -> None:
    root = Path(shoal.transport.host.__file__).parents[1]
    virtual = re.compile(r"MockClock|VirtualHost|run_virtual|\bMemoryWorld\b|\bMemoryNetwork\b|shoal\.sim|\.\.sim\b")
    for floor in ("transport", "dht", "learning", "node"):
        for path in sorted((root / floor).rglob("*.py")):
            name = path.relative_to(root).as_posix()
            text = path.read_text()
            if not name.startswith("transport/memory"):
                code = re.sub(r'""".*?"""', "", text, flags=re.DOTALL)
                assert not virtual.search(code), f"{name} knows of virtual time"
            if name not in OUTSIDE:
                assert list(calls(ast.parse(text))) == [], f"{name} goes round the host"
