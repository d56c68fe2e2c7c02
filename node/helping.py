"""What a real node answers so that others find out about themselves: STUN, and a probe of clock and line."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import attrs
import trio

from ..transport.address import Address
from ..transport.endpoint import Endpoint
from ..transport.errors import ConfigError, RemoteRefused
from ..transport.network import Datagrams
from ..transport.rpc import Call, Method
from ..transport.signals import PeerRates
from ..transport.stun_service import StunServer
from . import defaults

log = logging.getLogger(__name__)


@attrs.frozen
class Probe:
    """What is your clock? A body may follow, which measures the line and is thrown away."""


@attrs.frozen
class Probed:
    """``wall``: Unix seconds there. ``received``: bytes of body. ``stun``: it answers UDP too."""

    wall: float
    received: int
    stun: bool


PROBE = Method("node.probe", Probe, Probed)


class Helping:
    """Serves ``endpoint``'s peers. The probe is served from the start, STUN while :meth:`run` runs."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._rates = PeerRates(defaults.PROBE_RATE, defaults.PROBE_BURST)
        self._stun: list[StunServer] = []
        endpoint.serve(PROBE, self._probed)

    @property
    def answered(self) -> int:
        """STUN requests answered so far."""
        return sum(server.answered for server in self._stun)

    async def run(self, bind: Sequence[Address]) -> None:
        """Answer STUN at the host and port of each of ``bind``, until cancelled."""
        async with trio.open_nursery() as nursery:
            for address in bind:
                try:
                    datagrams = await self._endpoint.host.network.open_datagrams(address)
                except ConfigError as error:
                    log.info("no STUN for others: %s", error)
                    continue
                if self._endpoint.traversal is not None:
                    self._endpoint.traversal.stun.provide()
                nursery.start_soon(self._serve, datagrams)

    async def _serve(self, datagrams: Datagrams) -> None:
        server = StunServer(self._endpoint.host, datagrams)
        self._stun.append(server)
        try:
            async with datagrams:
                await server.run()
        finally:
            self._stun.remove(server)

    async def _probed(self, call: Call[Probe]) -> Probed:
        size = call.body_left
        if size > defaults.PROBE_BYTES or not self._rates.take(call.peer, self._endpoint.host.now()):
            raise RemoteRefused("busy", "that is more probing than one peer may do")
        buffer = memoryview(bytearray(min(size, 1 << 16)))
        while call.body_left:
            await call.read_into(buffer[: min(call.body_left, len(buffer))])
        traversal = self._endpoint.traversal
        stun = bool(self._stun) or (traversal is not None and traversal.stun.serving)
        return Probed(self._endpoint.host.wall(), size, stun)
