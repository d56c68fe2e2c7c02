"""Our places at relays: as many as wanted, at the nearest that have room, each kept until it is lost and replaced."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import trio

from . import defaults
from .address import Address, PeerRecord, RelayAddress, family_of, scope_of
from .errors import RemoteError
from .identity import PeerId
from .relay import RESERVE_PROTOCOL, Reserve, request

if TYPE_CHECKING:
    from .endpoint import Endpoint
    from .link import Link

log = logging.getLogger(__name__)


def relay_address(record: PeerRecord, dialled: Address | None) -> RelayAddress:
    """Where others find that relay: first where we have found it, then one of each IP version, public ones first."""
    ranked = sorted(record.addresses, key=lambda address: (address != dialled, scope_of(address) != "public"))
    chosen: list[Address] = []
    for address in ranked:
        if family_of(address) not in [family_of(other) for other in chosen]:
            chosen.append(address)
    chosen += [address for address in ranked if address not in chosen]
    return RelayAddress(record.peer, tuple(chosen[: defaults.MAX_RELAY_ADDRESSES]))


def one_version_only(addresses: Sequence[Address]) -> bool:
    """Whether strangers of the other IP version need a relay to reach who has ``addresses``."""
    return len(dict.fromkeys(family_of(a) for a in addresses if a.kind != "mem" and scope_of(a) == "public")) == 1


class Reservations:
    """Holds :attr:`wanted` reservations of ``endpoint``; ``changed`` is called when one begins or ends."""

    def __init__(self, endpoint: Endpoint, changed: Callable[[], None]) -> None:
        self.held: dict[PeerId, RelayAddress] = {}
        #: Why a relay refused, or was lost; for status and doctor.
        self.refusals: dict[PeerId, str] = {}
        self._wanted = 0
        self._endpoint, self._changed = endpoint, changed
        self._holding: dict[PeerId, trio.CancelScope] = {}
        self._not_before: dict[PeerId, float] = {}
        self._kick = trio.Event()

    @property
    def wanted(self) -> int:
        return self._wanted

    @wanted.setter
    def wanted(self, wanted: int) -> None:
        if wanted != self._wanted:
            self._wanted = wanted
            self.look_again()

    def look_again(self) -> None:
        """There may be something to do: a new link, a new relay."""
        self._kick.set()

    def candidates(self) -> list[PeerRecord]:
        """Relays that we know, without those that refused lately: those with both IP versions first, then the nearest
        we are linked with.

        An IPv6-only peer can use no relay that has only IPv4.
        """
        endpoint = self._endpoint
        now = endpoint.host.now()
        nearness = {link.peer: link.rtt for link in endpoint.links() if link.way not in ("relay", "webrtc")}
        known = [
            record
            for record in endpoint.contacts_offering("relay")
            if record.peer not in self._holding
            and record.peer != endpoint.peer_id
            and self._not_before.get(record.peer, now) <= now
        ]
        return sorted(
            known, key=lambda record: (one_version_only(record.addresses), nearness.get(record.peer, float("inf")))
        )

    async def run(self) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                self._kick = trio.Event()
                for record in self.candidates():
                    if len(self._holding) >= self._wanted:
                        break
                    scope = self._holding[record.peer] = trio.CancelScope()
                    nursery.start_soon(self._hold, record, scope)
                for peer in list(self._holding)[self._wanted :]:
                    self._holding[peer].cancel()
                pause = defaults.RESERVATION_RETRY if len(self._holding) < self._wanted else float("inf")
                with trio.move_on_after(pause):
                    await self._kick.wait()

    async def _hold(self, record: PeerRecord, scope: trio.CancelScope) -> None:
        peer, endpoint = record.peer, self._endpoint
        try:
            with scope:
                link: Link = endpoint.link(peer) or await endpoint.connect(peer, record.addresses)
                stream = await request(link, RESERVE_PROTOCOL, Reserve())
                try:
                    dialled = link.remote if link.initiator and link.way == "direct" else None
                    self.held[peer] = relay_address(record, dialled)
                    self.refusals.pop(peer, None)
                    log.info("reachable through %s at %s", peer.short, link.remote)
                    self._changed()
                    while await stream.receive_some(64):
                        pass
                    self.refusals[peer] = "it ended our reservation"
                finally:
                    stream.close()
        except (RemoteError, trio.BrokenResourceError) as error:
            self.refusals[peer] = str(error)
            log.info("no reservation at %s: %s", peer.short, error)
        finally:
            del self._holding[peer]
            self._not_before[peer] = endpoint.host.now() + defaults.RESERVATION_PAUSE
            if len(self._not_before) > defaults.MAX_RATED_PEERS:
                del self._not_before[next(iter(self._not_before))]
            if self.held.pop(peer, None) is not None:
                self._changed()
            self.look_again()
