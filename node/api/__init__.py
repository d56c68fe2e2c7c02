"""Shoal: train one model on many machines that nobody owns together.

The public face. Names are imported on first use, so that ``import shoal`` costs nothing and loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .learning.shard import Shard as Shard
    from .learning.task import Batch as Batch
    from .learning.task import Task as Task
    from .node.swarm import Swarm as Swarm
    from .transport.errors import ConfigError as ConfigError
    from .transport.errors import RemoteError as RemoteError
    from .transport.errors import ShoalError as ShoalError

_NAMES = {
    "Batch": "learning.task",
    "ConfigError": "transport.errors",
    "RemoteError": "transport.errors",
    "Shard": "learning.shard",
    "ShoalError": "transport.errors",
    "Swarm": "node.swarm",
    "Task": "learning.task",
}

__all__ = ["Batch", "ConfigError", "RemoteError", "Shard", "ShoalError", "Swarm", "Task"]


def __getattr__(name: str) -> Any:
    module = _NAMES.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{module}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__doc__", "__name__"]
