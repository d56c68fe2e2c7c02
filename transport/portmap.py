"""Port mapping: asks the home router to pass a port on to this machine, by PCP, NAT-PMP or UPnP, and keeps it so."""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Callable
from typing import Literal, TypeVar
from urllib.parse import urlsplit

import attrs
import trio

from . import defaults, portmap_wire
from .address import Address
from .errors import ConfigError, PeerUnreachable, RemoteError
from .gateway import Route, default_route
from .host import Host
from .network import Datagrams
from .portmap_wire import Granted, Refused, judge_external
from .upnp import ask_router
from .wire import printable

log = logging.getLogger(__name__)

A = TypeVar("A")
Method = Literal["pcp", "nat-pmp", "upnp"]
METHODS: tuple[Method, ...] = ("pcp", "nat-pmp", "upnp")
TITLES: dict[Method, str] = {"pcp": "PCP", "nat-pmp": "NAT-PMP", "upnp": "UPnP"}


@attrs.frozen
class Mapping:
    """Who connects to ``external`` reaches our ``port``, for ``lifetime`` seconds from the asking on.

    ``trouble``: why it may help nobody all the same (double NAT), a sentence; then it is not worth telling others.
    """

    external: Address
    port: int
    method: Method
    gateway: str
    lifetime: float
    trouble: str = ""


class PortMapper:
    """Asks the router of ``host`` for ports. ``route``: where it is, default: what the routing table says."""

    def __init__(self, host: Host, *, route: Callable[[], Route | None] = default_route) -> None:
        self._host, self._route = host, route
        #: What the last attempt met, by method; for doctor.
        self.troubles: dict[Method, str] = {}
        self._nonce = host.entropy(12)

    async def map(self, port: int, *, wished: int = 0, methods: tuple[Method, ...] = METHODS) -> Mapping:
        """A mapping of the TCP port ``port``, at the external port ``wished`` (0: the same) if that is free.

        Methods are tried in order; takes up to 12 s where no router answers. Raises :class:`PeerUnreachable`
        with the reason of each. Cancellation may leave a mapping behind, which runs out by itself.
        """
        self.troubles = {}
        wished = wished or port
        for method in methods:
            found = await self._try(method, port, wished, defaults.MAPPING_LIFETIME)
            if isinstance(found, Mapping):
                return found
            self.troubles[method] = found
        attempts = tuple((TITLES[method], self.troubles[method]) for method in methods)
        raise PeerUnreachable("no router here maps a port for us", attempts=attempts)

    async def unmap(self, mapping: Mapping) -> None:
        """Take ``mapping`` back, within :data:`defaults.UNMAP_TIME` seconds or not at all."""
        with trio.move_on_after(defaults.UNMAP_TIME):
            if mapping.method == "upnp":
                await self._unmap_upnp(mapping)
            else:
                await self._try(mapping.method, mapping.port, mapping.external.port, 0)

    async def keep(self, port: int, on_change: Callable[[Mapping | None, str], None]) -> None:
        """Keep ``port`` mapped until cancelled; then take it back.

        ``on_change(mapping, reason)`` hears of every new mapping, of its loss (None) and of failure; it must not wait.
        Renewed at half its life. Without any, asks again every :data:`defaults.MAPPING_RETRY` seconds.
        """
        current: Mapping | None = None
        said: tuple[Address | None, str] | None = None
        try:
            while True:
                try:
                    found = await self.map(port, wished=current.external.port if current is not None else 0)
                    pause = found.lifetime / 2
                    reason = found.trouble or f"by {TITLES[found.method]} of the router {found.gateway}"
                    current = found
                except PeerUnreachable as error:
                    current, pause, reason = None, defaults.MAPPING_RETRY, str(error)
                news = (current.external if current is not None else None, reason)
                if news != said:
                    said = news
                    on_change(current, reason)
                await trio.sleep(pause)
        finally:
            if current is not None:
                with trio.CancelScope(shield=True):  # bounded: see unmap
                    await self.unmap(current)

    async def _try(self, method: Method, port: int, wished: int, lifetime: int) -> Mapping | str:
        """A mapping, or why there is none."""
        if method == "upnp":
            return await self._upnp(port, wished, lifetime)
        route = await self._host.run_blocking(self._route)
        if route is None:
            return "this machine has no IPv4 gateway to ask"
        try:
            datagrams = await self._host.network.open_datagrams(Address("tcp", "0.0.0.0", 0))
        except ConfigError as error:
            return str(error)
        async with datagrams:
            try:
                if method == "pcp":
                    return await self._pcp(datagrams, route, port, wished, lifetime)
                return await self._nat_pmp(datagrams, route.gateway, port, wished, lifetime)
            except PeerUnreachable as error:
                return f"router {route.gateway}: {error.reason}"

    async def _pcp(self, datagrams: Datagrams, route: Route, port: int, wished: int, lifetime: int) -> Mapping | str:
        request = portmap_wire.pcp_map_request(self._nonce, "tcp", route.own, port, wished, None, lifetime)
        answer: Granted | Refused | None = await self._ask(
            datagrams, route.gateway, request,
            lambda data: portmap_wire.read_pcp_map(data, self._nonce, "tcp", port, lifetime),
        )  # fmt: skip
        return self._taken("pcp", route.gateway, port, answer, None)

    async def _nat_pmp(
        self, datagrams: Datagrams, gateway: str, port: int, wished: int, lifetime: int
    ) -> Mapping | str:
        public: str | Refused | None = await self._ask(
            datagrams, gateway, portmap_wire.pmp_public_request(), portmap_wire.read_pmp_public
        )
        if not isinstance(public, str):
            return self._taken("nat-pmp", gateway, port, public, None)
        request = portmap_wire.pmp_map_request("tcp", port, wished if lifetime else 0, lifetime)
        answer: Granted | Refused | None = await self._ask(
            datagrams, gateway, request, lambda data: portmap_wire.read_pmp_map(data, "tcp", port, lifetime)
        )
        return self._taken("nat-pmp", gateway, port, answer, public)

    @staticmethod
    def _taken(
        method: Method, gateway: str, port: int, answer: Granted | Refused | None, public: str | None
    ) -> Mapping | str:
        if answer is None:
            return f"the router {gateway} does not answer"
        if isinstance(answer, Refused):
            return f"the router {gateway} {answer.reason}"
        return _mapping(method, gateway, port, answer.external_address or public or "", answer)

    async def _ask(
        self, datagrams: Datagrams, gateway: str, request: bytes, read: Callable[[bytes], A | None]
    ) -> A | None:
        """Send ``request``, again a few times, until ``read`` makes something of an answer; None: there was none."""
        to = Address("tcp", gateway, portmap_wire.PORT)
        for pause in defaults.MAPPING_REPEATS:
            await datagrams.send(request, to)
            with trio.move_on_after(pause):
                while True:
                    data, source = await datagrams.receive()
                    if (source.host, source.port) != (to.host, to.port):
                        continue
                    answer = read(data)
                    if answer is not None:
                        return answer
        return None

    async def _upnp(self, port: int, wished: int, lifetime: int) -> Mapping | str:
        reply = await ask_router(port, wished, lifetime)
        if reply.trouble:
            return printable(reply.trouble)
        if not 0 < reply.external_port <= 65535:
            return f"the UPnP router gives port {reply.external_port}"
        granted = Granted(reply.external_address, reply.external_port, reply.lifetime)
        return _mapping("upnp", printable(reply.gateway), port, reply.external_address, granted)

    async def _unmap_upnp(self, mapping: Mapping) -> None:
        """Ask where the router listens, which is known: to search for it again would take seconds."""
        control = urlsplit(mapping.gateway)
        try:
            to = Address("tcp", str(ipaddress.IPv4Address(control.hostname or "")), control.port or 80)
            request = portmap_wire.upnp_delete_request(mapping.gateway, mapping.external.port)
            async with await self._host.network.dial(to) as stream:
                await stream.send_all(request)
                await stream.receive_some(defaults.MAX_UPNP_REPLY)
        except (ValueError, RemoteError, trio.BrokenResourceError) as error:
            log.debug("the mapping of port %d stays until it runs out: %s", mapping.external.port, error)


def _mapping(method: Method, gateway: str, port: int, external: str, granted: Granted) -> Mapping | str:
    trouble = judge_external(external)
    try:
        address = Address("tcp", str(ipaddress.ip_address(external)), granted.external_port)
    except ValueError:
        return trouble
    return Mapping(address, port, method, gateway, float(granted.lifetime), trouble)
