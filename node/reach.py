"""Who can connect to a node, judged by the addresses it listens on: a pure decision with its reason."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from ..transport.address import Address

#: What helps when no member can be reached from outside.
REMEDY = (
    "For a swarm across networks one member must be reachable: run `shoal relay` on a machine with a public address "
    "and start with --via ITS_ADDRESS, or forward this port at the router (`shoal doctor` looks into it)"
)
#: The same for the relay itself.
RELAY_REMEDY = "A relay must be reachable from outside: forward its port (TCP and UDP) at the router to this machine"


def reach(addresses: Sequence[Address], remedy: str = REMEDY) -> tuple[str, str]:
    """``(scope, sentence)``: scope is ``nobody``, ``machine``, ``network``, ``internet`` or ``world`` (simulated)."""
    if not addresses:
        return "nobody", "nobody can connect to this node: it listens nowhere and only dials out"
    if any(address.kind != "tcp" for address in addresses):
        return "world", "every node of the simulated network"
    hosts = [ipaddress.ip_address(address.host.partition("%")[0]) for address in addresses]
    if any(host.is_global for host in hosts):
        return "internet", "anybody, unless a firewall or router is in the way"
    if all(host.is_loopback for host in hosts):
        return "machine", (
            "only processes on this machine: it listens on loopback addresses alone (--host 0.0.0.0 for the network)"
        )
    return "network", (
        f"this machine and its local network, not the internet: none of its addresses is public. {remedy}"
    )
