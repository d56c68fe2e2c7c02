"""Asks the home router for a port while a node runs, where that can help."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..transport.address import Address, scope_of
from ..transport.endpoint import Endpoint
from ..transport.portmap import Mapping, PortMapper


def worth_mapping(addresses: Sequence[Address]) -> tuple[bool, str]:
    """Whether a router's port would help, and why: pure. ``addresses``: where the node listens on its own machine."""
    fours = [a for a in addresses if a.kind == "tcp" and ":" not in a.host]
    scopes = [scope_of(address) for address in fours]
    if not fours:
        return False, "it does not listen by IPv4"
    if "public" in scopes:
        return False, "it has a public IPv4 address"
    if all(scope == "loopback" for scope in scopes):
        six = any(":" in a.host and scope_of(a) not in ("loopback", "link") for a in addresses)
        return False, "its network has no IPv4" if six else "it listens on this machine only"
    return True, "its IPv4 addresses are all private"


class PortKeeper:
    """Keeps a mapping for ``endpoint``; ``outcome`` says what came of it, for status and doctor."""

    def __init__(self, endpoint: Endpoint, note: Callable[[str], None] = lambda text: None) -> None:
        self._endpoint, self._note = endpoint, note
        self.mapping: Mapping | None = None
        self.outcome = "not tried"

    async def run(self) -> None:
        """Until cancelled; then the mapping is taken back. Returns at once where it would not help."""
        own = self._endpoint.own_addresses()
        wanted, reason = worth_mapping(own)
        self.outcome = f"not asked for: {reason}"
        if wanted:
            self.outcome = "asking the router"
            port = next(a.port for a in own if ":" not in a.host)
            await PortMapper(self._endpoint.host).keep(port, self._changed)

    def _changed(self, mapping: Mapping | None, reason: str) -> None:
        self.mapping = mapping
        self.outcome = reason if mapping is None else f"{mapping.external}, {reason}"
        useful = mapping is not None and not mapping.trouble
        if useful:
            self._note(f"the router passes {self.outcome} on to this node")
        if self._endpoint.traversal is not None:
            self._endpoint.traversal.reachability.map((mapping.external,) if mapping is not None and useful else ())
