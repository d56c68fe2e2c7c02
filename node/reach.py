"""Who can connect to a node, judged by the addresses it listens on: a pure decision with its reason."""

from __future__ import annotations

from collections.abc import Sequence

from ..transport.address import Address, scope_of
from ..transport.endpoint import Endpoint
from ..transport.planner import Reach

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
    scopes = [scope_of(address) for address in addresses]
    if "public" in scopes:
        return "internet", "anybody, unless a firewall or router is in the way"
    if all(scope == "loopback" for scope in scopes):
        return "machine", (
            "only processes on this machine: it listens on loopback addresses alone (--host 0.0.0.0 for the network)"
        )
    return "network", (
        f"this machine and its local network, not the internet: none of its addresses is public. {remedy}"
    )


def reach_of(endpoint: Endpoint, remedy: str = REMEDY) -> tuple[str, str]:
    """The same from what others have found out about ``endpoint``, as far as they have."""
    scope, sentence = reach(endpoint.addresses(), remedy)
    if endpoint.traversal is None or scope in ("machine", "nobody", "world"):
        return scope, sentence
    verdict = endpoint.traversal.reachability.verdict
    public = any(scope_of(address) == "public" for address in verdict.confirmed)
    if verdict.state is Reach.REACHABLE and public:
        return "internet", f"anybody: {verdict.reason}"
    if verdict.state is Reach.UNREACHABLE:
        relays = [relay.peer.short for relay in endpoint.traversal.relays]
        if relays:
            return "relay", f"anybody, through the relay {' and '.join(relays)}; not directly: {verdict.reason}"
        return "network", f"this machine and its local network: {verdict.reason}. {remedy}"
    if scope != "internet" and endpoint.links():
        return scope, "not known yet: others are asked whether they can dial this machine"
    return scope, sentence
