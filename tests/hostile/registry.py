"""Finds by itself everything that decodes bytes from outside, so that no new message or method goes untested."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import shoal.dht
import shoal.learning
import shoal.node
import shoal.transport
from shoal.transport.rpc import Method

FLOORS = (shoal.transport, shoal.dht, shoal.learning, shoal.node)

#: Calls of ``unpack`` whose class is only known when they run, and where those classes come from.
DYNAMIC = {
    ("shoal.transport.rpc", "self._method.response"): "the response of a Method",
    ("shoal.transport.rpc", "method.response"): "the response of a Method",
    ("shoal.transport.serving", "found.method.request"): "the request of a Method",
    ("shoal.learning.rundocs_content", "Lie"): "rounds.lies.Lie, imported where there is one: decoders.py has it",
    ("shoal.learning.rundocs_content", "CommitRecord"): "a record in a note of a commit: in Propose and Commit as well",
    ("shoal.learning.store", "kind"): "RunStore._unpack: SignedSpec, Vote, Head",
    ("shoal.transport.relay", "kind"): "receive_message: Reserve, Circuit, RelayAnswer",
    ("shoal.node.datadir", "kind"): "DataDir._read: NodeRecord",
    ("shoal.node.control", "kind"): "control.MESSAGES",
}


@cache
def modules() -> tuple[ModuleType, ...]:
    """All modules of the floors that hear bytes from outside."""
    found = []
    for floor in FLOORS:
        for info in pkgutil.walk_packages(floor.__path__, floor.__name__ + "."):
            if not info.name.startswith("shoal.node.api"):
                found.append(importlib.import_module(info.name))
    return tuple(found)


@cache
def methods() -> dict[str, Method[Any, Any]]:
    """Every constant that is a :class:`Method`, also inside a mapping or a tuple of a module, by its wire name."""
    found: dict[str, Method[Any, Any]] = {}
    for module in modules():
        for value in vars(module).values():
            items = (
                value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else (value,)
            )
            for item in items:
                if isinstance(item, Method):
                    found[item.name] = item
    return dict(sorted(found.items()))


@cache
def unpacked() -> tuple[tuple[str, str, Any], ...]:
    """Every call of ``wire.unpack``: (module, the expression of its class, the class or None when it is dynamic)."""
    found = []
    for module in modules():
        file = inspect.getsourcefile(module)
        if file is None:
            continue  # compiled
        source = Path(file).read_text()
        if "import" not in source or "unpack" not in source or module.__name__ == "shoal.transport.wire":
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "unpack":
                text = ast.unparse(node.args[0])
                found.append((module.__name__, text, getattr(module, text, None) if text.isidentifier() else None))
    return tuple(found)


@cache
def messages() -> dict[str, type[Any]]:
    """Every class that is decoded from bytes, by its qualified name: of methods, and named in a call of ``unpack``."""
    from shoal.learning.store import Head, Vote
    from shoal.node import control
    from shoal.node.datadir import NodeRecord
    from shoal.transport.relay import Circuit, RelayAnswer, Reserve

    kinds = [kind for method in methods().values() for kind in (method.request, method.response)]
    kinds += [kind for _, _, kind in unpacked() if isinstance(kind, type)]
    kinds += [*control.MESSAGES.values(), NodeRecord, Head, Vote, Reserve, Circuit, RelayAnswer]
    return {f"{kind.__module__.removeprefix('shoal.')}.{kind.__name__}": kind for kind in sorted(kinds, key=str)}


@cache
def parsing() -> tuple[str, ...]:
    """Modules that take binary layouts apart themselves, by name."""
    found = []
    for module in modules():
        file = inspect.getsourcefile(module)
        if file is None:
            continue  # compiled
        tree = ast.parse(Path(file).read_text())
        called = {
            node.func.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        }
        if called & {"unpack", "unpack_from", "iter_unpack", "from_bytes"}:
            found.append(module.__name__.removeprefix("shoal."))
    return tuple(found)
