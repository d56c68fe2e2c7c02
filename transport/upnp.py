"""Starts the child process that talks to a UPnP router, bounds its time and its words."""

from __future__ import annotations

import sys

import trio

from . import defaults
from .errors import DecodeError
from .upnp_child import UpnpReply
from .wire import printable, unpack


async def ask_router(port: int, wished: int, lifetime: int) -> UpnpReply:
    """What came of asking for ``wished`` to lead to our TCP ``port``. Never raises for what routers or the child do.

    The child is killed when :data:`defaults.UPNP_TIME` seconds are over, and on cancellation.
    """
    with trio.move_on_after(defaults.UPNP_TIME):
        try:
            done = await trio.run_process(
                [sys.executable, "-m", f"{__package__}.upnp_child", *map(str, (port, wished, lifetime))],
                capture_stdout=True, capture_stderr=True, check=False,
            )  # fmt: skip
            return unpack(UpnpReply, done.stdout, limit=defaults.MAX_UPNP_REPLY)
        except (OSError, DecodeError) as error:
            return UpnpReply(f"the UPnP child process failed: {printable(str(error))}")
    return UpnpReply(f"no UPnP router finished within {defaults.UPNP_TIME:g} s")
