"""What a running node has found out about its own place on the network, for `shoal doctor`."""

from __future__ import annotations

from ..transport.address import scope_of
from ..transport.endpoint import Endpoint
from .control import NodeHealth
from .mapping import PortKeeper


def health_of(endpoint: Endpoint, port: PortKeeper) -> NodeHealth:
    """A snapshot."""
    traversal = endpoint.traversal
    mapped = "" if port.mapping is None else str(port.mapping.external)
    candidates = tuple(record.peer.short for record in endpoint.contacts_offering("relay"))
    ways = tuple(connection.way for connection in endpoint.connections())
    if traversal is None:
        return NodeHealth("off", "traversal is switched off", (), (), (), candidates, ways, port.outcome, mapped)
    verdict = traversal.reachability.verdict
    return NodeHealth(
        state=verdict.state.value,
        reason=verdict.reason,
        external=tuple(map(str, verdict.external)),
        confirmed=tuple(str(address) for address in verdict.confirmed if scope_of(address) != "loopback"),
        relays=tuple(relay.peer.short for relay in traversal.relays),
        candidates=candidates,
        ways=ways,
        port_mapping=port.outcome,
        mapped=mapped,
    )
