"""Where a node listens: both IP versions on one port, the port of an earlier life, and which addresses go first."""

from __future__ import annotations

import errno
import ipaddress
from collections.abc import Callable, Sequence

from ..transport.address import Address, family_of, scope_of
from ..transport.errors import ConfigError, PeerUnreachable
from ..transport.network import Network
from . import defaults

#: Every interface, by IPv4 and IPv6: what a node listens at unless it is told otherwise.
EVERYWHERE = ("0.0.0.0", "::")


def parse_hosts(hosts: Sequence[str], port: int) -> tuple[Address, ...]:
    """The addresses to listen at for ``--host`` options; both IP versions when there are none.

    Raises :class:`ConfigError` for a host that is no IP address.
    """
    found = []
    for host in hosts or EVERYWHERE:
        try:
            found.append(Address("tcp", str(ipaddress.ip_address(host.strip("[]"))), port))
        except ValueError:
            raise ConfigError(
                f"--host {host!r} is not an IP address; 0.0.0.0 listens on every interface (:: for IPv6), "
                "127.0.0.1 on this machine only"
            ) from None
    return tuple(dict.fromkeys(found))


def parse_via(texts: Sequence[str]) -> tuple[Address, ...]:
    """``--via`` options. Raises :class:`ConfigError`."""
    found = []
    for text in texts:
        try:
            found.append(parse_remote(text))
        except ConfigError as error:
            raise ConfigError(f"--via: {error}; `shoal relay` prints what to give here") from None
    return tuple(dict.fromkeys(found))


def parse_remote(text: str) -> Address:
    """An address to dial. Raises :class:`ConfigError`, also for one that nobody can listen at."""
    address = Address.parse(text)
    if address.port == 0:
        raise ConfigError(f"{text!r} has port 0, at which nobody can be reached; give the port that the peer shows")
    return address


async def free_bind(
    network: Network,
    bind: Sequence[Address],
    fallback: Sequence[Address] = (),
    note: Callable[[str], None] = lambda text: None,
) -> tuple[Address, ...]:
    """What of ``bind`` can be listened at now, every address with the same port.

    Port 0 becomes a port that is free for all of them. One IP version's wildcard may be missing on this machine, not
    both. Where a port is taken, ``fallback`` counts instead, if given, and ``note`` hears why. Raises
    :class:`ConfigError`. The addresses are free again on return: somebody else could be faster.
    """
    try:
        return await _together(network, bind)
    except ConfigError as error:
        if not fallback:
            raise
        note(f"{error}; taking another port: tickets printed earlier may lead nowhere")
        return await _together(network, fallback)


async def _together(network: Network, bind: Sequence[Address]) -> tuple[Address, ...]:
    for last in [False] * (defaults.PORT_TRIES - 1) + [True]:
        found: list[Address] = []
        try:
            for address in bind:
                port = address.port or (found[0].port if found else 0)
                at = await _listened(network, Address(address.kind, address.host, port), optional=_is_optional(bind))
                if at is not None:
                    found.append(at)
        except ConfigError:
            # The port that the first one got is taken on the second: try with another, if we may choose.
            if last or not found or all(address.port for address in bind):
                raise
            continue
        if bind and not found:
            raise ConfigError("this machine has neither IPv4 nor IPv6: there is nothing to listen at")
        return tuple(found)
    raise AssertionError("the last try returns or raises")


def _is_optional(bind: Sequence[Address]) -> bool:
    """Both wildcards were asked for, as they are by default: one may be missing."""
    return {address.host for address in bind} >= set(EVERYWHERE)


async def _listened(network: Network, address: Address, *, optional: bool) -> Address | None:
    """``address`` with its real port; None for a wildcard of an IP version that this machine does not have."""
    wildcard = optional and address.host in EVERYWHERE
    try:
        listener = await network.listen(address)
    except ConfigError as error:
        if wildcard and isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EAFNOSUPPORT:
            return None
        raise
    async with listener:
        if not wildcard:
            return listener.address
        loopback = [a for a in network.reachable_addresses(listener) if ipaddress.ip_address(a.host).is_loopback]
        if len(loopback) == len(network.reachable_addresses(listener)):
            # With IPv6 switched off the wildcard can still be listened at, but not even this machine reaches it.
            try:
                await (await network.dial(loopback[0])).aclose()
            except PeerUnreachable:
                return None
        return listener.address


def in_order(addresses: Sequence[Address]) -> tuple[Address, ...]:
    """Public addresses first, then those of local networks, loopback last; within these as given."""
    return tuple(sorted(dict.fromkeys(addresses), key=_rank))


def for_ticket(own: Sequence[Address], limit: int = defaults.OWN_TICKET_ADDRESSES) -> tuple[Address, ...]:
    """Which of a node's own addresses travel in a ticket, at most ``limit``; the best of each IP version among them.

    Of the loopback addresses one is enough: whoever can use it is on this machine.
    """
    ordered = in_order(own)
    loopback = [address for address in ordered if _rank(address) == 2]
    others = [address for address in ordered if _rank(address) != 2]
    kept = others[: limit - len(loopback[:1])]
    if others and not any(":" in a.host for a in kept):
        # A machine with many interfaces: one way by IPv6 is worth more than one more bridge.
        kept[-1:] = [a for a in others if ":" in a.host][:1] or kept[-1:]
    return (*kept, *loopback[:1])


def best_of_each(addresses: Sequence[Address]) -> tuple[Address, ...]:
    """The best of a peer's addresses by each IP version; loopback only where there is nothing else."""
    ordered = in_order(addresses)
    far = [address for address in ordered if _rank(address) != 2] or ordered[:1]
    best: dict[str, Address] = {}
    for address in far:
        best.setdefault(family_of(address), address)
    return tuple(best.values())


def _rank(address: Address) -> int:
    return {"public": 0, "loopback": 2}.get(scope_of(address), 1)
