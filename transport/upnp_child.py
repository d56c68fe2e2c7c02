"""The child process that asks a UPnP router (IGD) for a port with miniupnpc: ``python -m … PORT EXTERNAL SECONDS``.

A process of its own, because miniupnpc blocks for as long as devices on the network like, parses what they send in C,
and cannot be cancelled: a process can be killed. It prints one packed :class:`UpnpReply` and ends.
"""

from __future__ import annotations

import sys
from typing import Any

import attrs

from . import defaults
from .wire import pack


@attrs.frozen
class UpnpReply:
    """``trouble`` says why there is no mapping; empty when ``external_port`` at ``external_address`` is ours."""

    trouble: str = ""
    gateway: str = ""
    external_address: str = ""
    external_port: int = 0
    lifetime: int = 0


#: What a router says when the port is another machine's, or it wants another kind of lease (WANIPConnection 2.4.16).
_TAKEN = ("ConflictInMappingEntry", "ConflictWithOtherMechanisms")
_PERMANENT_ONLY = "OnlyPermanentLeasesSupported"


def main(port: int, external: int, lifetime: int) -> UpnpReply:
    """Talk to the router; never raises for what routers do."""
    try:
        import miniupnpc
    except ImportError:
        return UpnpReply("the package miniupnpc is not installed")
    igd = miniupnpc.UPnP(discoverdelay=int(1000 * defaults.UPNP_SEARCH))
    try:
        if igd.discover() == 0:
            return UpnpReply("no UPnP router answers on this network")
        gateway = str(igd.selectigd())
    except Exception as error:  # noqa: BLE001  # boundary: miniupnpc raises bare Exception with its own text
        # Its text for an empty answer is, of all things, "Success".
        why = "" if str(error) in ("Success", "No UPnP device discovered") else f" ({error})"
        return UpnpReply(f"no UPnP router answers on this network{why}"[:300])
    try:
        got, granted = _map(igd, port, external, lifetime)
        return UpnpReply("", gateway[:200], str(igd.externalipaddress() or "")[:60], got, granted)
    except Exception as error:  # noqa: BLE001  # boundary: see above
        return UpnpReply(f"the UPnP router refuses: {error}"[:300], gateway[:200])


def _map(igd: Any, port: int, external: int, lifetime: int) -> tuple[int, int]:
    """The external port and its life; another port than the wished one where that is taken."""
    for wished in (external, *((port * 7919 + number * 104729) % 55000 + 10000 for number in range(1, 5))):
        for seconds in (lifetime, 0):
            try:
                igd.addportmapping(wished, "TCP", igd.lanaddr, port, "Shoal", "", seconds)
                return wished, seconds or lifetime
            except Exception as error:  # boundary: miniupnpc raises bare Exception
                if _PERMANENT_ONLY in str(error):
                    continue
                if not any(taken in str(error) for taken in _TAKEN):
                    raise
                break
    raise ValueError("every port that was tried is taken")


if __name__ == "__main__":
    sys.stdout.buffer.write(pack(main(*map(int, sys.argv[1:4]))))
