"""The router this machine sends strangers' packets to, from the routing table."""

from __future__ import annotations

import ipaddress
import re
import socket
import struct
import subprocess
import sys
from pathlib import Path

import attrs

from .interfaces import local_addresses

_ROUTES = Path("/proc/net/route")
_RTF_UP, _RTF_GATEWAY = 0x1, 0x2


@attrs.frozen
class Route:
    """The way to strangers by IPv4: through the router ``gateway``, from our address ``own``."""

    gateway: str
    own: str


def default_route() -> Route | None:
    """The way to strangers; None without one. Blocks for milliseconds."""
    gateway = _default_gateway()
    own = local_addresses(socket.AF_INET)[0]
    return None if gateway is None or own == "127.0.0.1" else Route(gateway, own)


def _default_gateway() -> str | None:
    if _ROUTES.exists():
        return gateway_of(_ROUTES.read_text("ascii", "replace"))
    if sys.platform == "win32":
        return None
    try:
        shown = subprocess.run(
            ["route", "-n", "get", "default"], capture_output=True, text=True, timeout=2.0, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    return gateway_in(shown)


def gateway_of(table: str) -> str | None:
    """The gateway of the default route with the least metric in Linux's ``/proc/net/route``."""
    found: list[tuple[int, str]] = []
    for line in table.splitlines()[1:]:
        fields = line.split()
        if len(fields) < 8 or fields[1] != "00000000" or fields[7] != "00000000":
            continue
        try:
            flags, metric, gateway = int(fields[3], 16), int(fields[6]), int(fields[2], 16)
        except ValueError:
            continue
        if flags & _RTF_UP and flags & _RTF_GATEWAY and gateway:
            # As the kernel holds it: network order, read as a number of this machine.
            found.append((metric, socket.inet_ntoa(struct.pack("=L", gateway & 0xFFFFFFFF))))
    return min(found)[1] if found else None


def gateway_in(shown: str) -> str | None:
    """The gateway in what ``route -n get default`` of macOS and the BSDs prints."""
    match = re.search(r"^\s*gateway:\s*(\S+)\s*$", shown, re.MULTILINE)
    try:
        return None if match is None else str(ipaddress.IPv4Address(match[1]))
    except ValueError:
        return None
