"""What a node's links are doing, for people and programs: one line per link, and bytes over all of them."""

from __future__ import annotations

from collections.abc import Sequence

from ..transport.endpoint import Endpoint
from ..transport.link import Link
from .control import PeerInfo


class Traffic:
    """Wire bytes over all links of ``endpoint``, past ones included."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._sent = self._received = 0
        endpoint.on_link_lost.append(self._lost)

    def _lost(self, link: Link) -> None:
        self._sent += link.bytes_sent
        self._received += link.bytes_received

    def total(self) -> tuple[int, int]:
        """Bytes sent and received."""
        links = self._endpoint.links()
        return (
            self._sent + sum(link.bytes_sent for link in links),
            self._received + sum(link.bytes_received for link in links),
        )


def peer_infos(endpoint: Endpoint, members: Sequence[str] = ()) -> tuple[PeerInfo, ...]:
    """The live links, by peer. ``members``: text of the peers in our round."""
    reasons = {(connection.peer, connection.remote): connection.reason for connection in endpoint.connections()}
    return tuple(
        PeerInfo(
            peer=link.peer.text,
            address=str(link.remote),
            direction="out" if link.initiator else "in",
            cipher=link.cipher,
            rtt_ms=1000.0 * link.rtt,
            bytes_sent=link.bytes_sent,
            bytes_received=link.bytes_received,
            member=link.peer.text in members,
            way=link.way,
            reason=reasons.get((link.peer, link.remote), ""),
        )
        for link in sorted(endpoint.links(), key=lambda link: link.peer)
    )
