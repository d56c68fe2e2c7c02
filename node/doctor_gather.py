"""Gathers the facts for `shoal doctor`: asks the running node, or starts an endpoint for a moment, and tries a peer."""

from __future__ import annotations

from functools import partial

import attrs
import trio

from ..transport.address import Address, scope_of
from ..transport.endpoint import Endpoint
from ..transport.errors import ConfigError, PeerUnreachable, RemoteError
from ..transport.gateway import Route, default_route
from ..transport.host import Host
from ..transport.identity import Identity
from ..transport.link import Link
from ..transport.planner import Reach
from ..transport.portmap import METHODS, TITLES, Mapping, PortMapper
from ..transport.stun import Observation, classify_mapping
from ..transport.stun_service import observe
from ..transport.traversal import Traversal
from . import defaults, doctor_system
from .control import ControlClient, NodeHealth, NodeStatus
from .datadir import DataDir
from .doctor_checks import Facts, PeerFacts
from .helping import PROBE, Probe
from .listening import free_bind, parse_hosts
from .mapping import worth_mapping
from .ticket import Ticket


@attrs.frozen
class Wishes:
    """What to look at. ``target``: a ticket, an address or None; ``psk``: of the swarm; ``hosts``: to listen at."""

    target: Ticket | Address | None = None
    psk: bytes | None = None
    hosts: tuple[str, ...] = ()
    ask_router: bool = True
    look_at_torch: bool = True


async def gather(host: Host, data: DataDir, wishes: Wishes) -> Facts:
    """Everything that can be found out now, in less than a minute; nothing here raises for what is broken."""
    route = default_route()
    facts = _machine(data, route)
    torch: list[tuple[tuple[str, tuple[str, ...]] | None, str]] = []

    async def look_at_torch() -> None:
        torch.append(await doctor_system.torch_devices())

    async with trio.open_nursery() as nursery:
        if wishes.look_at_torch:
            nursery.start_soon(look_at_torch)
        facts = _of_running_node(facts, data)
        facts = await _network(host, data, wishes, facts)
    if torch:
        facts = attrs.evolve(facts, torch=torch[0][0], torch_trouble=torch[0][1])
    return facts


def _machine(data: DataDir, route: Route | None) -> Facts:
    trouble = ""
    if data.path.exists() and not data.path.is_dir():
        trouble = "the data directory is a file"
    key, swarm = doctor_system.key_troubles(data)
    return Facts(
        addresses=doctor_system.interface_addresses(),
        gateway=None if route is None else route.gateway,
        mtu=doctor_system.path_mtu(route),
        running=data.holder(),
        data_dir=str(data.path),
        data_trouble=trouble,
        disk_free=doctor_system.disk_free(data.path),
        key=key,
        swarm_key=swarm,
    )


def _of_running_node(facts: Facts, data: DataDir) -> Facts:
    """What the node that runs in the data directory knows already."""
    if facts.running is None:
        return facts
    client = ControlClient(data)
    try:
        status: NodeStatus = client.status()
        health: NodeHealth = client.health()
    except ConfigError as error:
        return attrs.evolve(facts, data_trouble=str(error))
    return attrs.evolve(
        facts,
        listen=tuple(map(Address.parse, status.addresses)),
        state=health.state,
        reason=health.reason,
        external=tuple(map(Address.parse, health.external)),
        confirmed=tuple(map(Address.parse, health.confirmed)),
        port_mapping=(("the running node", health.port_mapping),),
        mapped=health.mapped,
    )


async def _network(host: Host, data: DataDir, wishes: Wishes, facts: Facts) -> Facts:
    """With an endpoint of our own, under an identity made for this moment."""
    try:
        bind = await free_bind(host.network, parse_hosts(wishes.hosts, 0))
    except ConfigError as error:
        return attrs.evolve(facts, listen_trouble=str(error))
    endpoint = Endpoint(
        host, Identity(host.entropy(32)), psk=wishes.psk, traversal=Traversal(relay=False, reservations=0)
    )
    mapper = PortMapper(host)
    gained: list[Mapping] = []
    async with trio.open_nursery() as nursery:
        await nursery.start(endpoint.run, bind)
        if facts.running is None:
            facts = attrs.evolve(facts, listen=endpoint.own_addresses())
            if wishes.ask_router:
                facts = await _router(mapper, facts, bind[0].port, gained)
        useful = tuple(mapping.external for mapping in gained if not mapping.trouble)[:1]
        if endpoint.traversal is not None and useful:
            # The dial-back below then tells whether the router keeps its word.
            endpoint.traversal.reachability.map(useful)
        try:
            if wishes.target is not None:
                facts = await _peer(endpoint, wishes.target, facts)
        finally:
            with trio.CancelScope(shield=True):  # each is bounded
                for mapping in gained:
                    await mapper.unmap(mapping)
        nursery.cancel_scope.cancel()
    return facts


async def _router(mapper: PortMapper, facts: Facts, port: int, gained: list[Mapping]) -> Facts:
    """Ask by every method; what is ``gained`` is the caller's to take back."""
    wanted, reason = worth_mapping(facts.listen)
    if not wanted:
        return attrs.evolve(facts, mapped_trouble=f"not asked for: {reason}")
    said: list[tuple[str, str]] = []
    for method in METHODS:
        try:
            found = await mapper.map(port, methods=(method,))
        except PeerUnreachable:
            said.append((TITLES[method], mapper.troubles[method]))
        else:
            said.append((TITLES[method], f"gives {found.external}"))
            gained.append(found)
    mapped = str(gained[0].external) if gained else ""
    trouble = gained[0].trouble if gained else ""
    return attrs.evolve(facts, port_mapping=tuple(said), mapped=mapped, mapped_trouble=trouble)


# --- the peer ---------------------------------------------------------------------------------------------------------


async def _peer(endpoint: Endpoint, target: Ticket | Address, facts: Facts) -> Facts:
    addresses = (target,) if isinstance(target, Address) else target.addresses
    name = str(target) if isinstance(target, Address) else f"ticket of run {target.run_id.hex()[:8]}"
    outcomes, links = await _dial(endpoint, addresses)
    peer = PeerFacts(name, tuple((str(address), outcomes[address]) for address in addresses))
    if not links:
        return attrs.evolve(facts, peer=peer)
    link = min(links, key=lambda found: found.rtt)
    peer = attrs.evolve(peer, peer=link.peer.short, way=link.way, rtt=link.rtt)
    peer, stun = await _probe(endpoint, link, peer)
    others = [found.remote for found in links if found.remote.kind == "tcp"]
    if stun:
        facts = await _stun(endpoint, facts, tuple(dict.fromkeys(others)))
    if facts.running is None:
        facts = await _reach(endpoint, facts)
    candidates = tuple(record.peer.short for record in endpoint.contacts_offering("relay"))
    return attrs.evolve(facts, peer=attrs.evolve(peer, candidates=candidates))


async def _dial(endpoint: Endpoint, addresses: tuple[Address, ...]) -> tuple[dict[Address, str], list[Link]]:
    """Every address at once: what happened, and the links."""
    outcomes = dict.fromkeys(addresses, f"no answer within {defaults.DOCTOR_CONNECT:g} s")
    links: list[Link] = []

    async def dial(address: Address) -> None:
        try:
            link = await endpoint.identify(address)
        except PeerUnreachable as error:
            outcomes[address] = error.reason
        else:
            outcomes[address] = f"{link.peer.short} answers after {1000 * link.rtt:.0f} ms"
            links.append(link)

    with trio.move_on_after(defaults.DOCTOR_CONNECT):
        async with trio.open_nursery() as nursery:
            for address in outcomes:
                nursery.start_soon(dial, address)
    return outcomes, [link for link in links if link.alive]


async def _probe(endpoint: Endpoint, link: Link, peer: PeerFacts) -> tuple[PeerFacts, bool]:
    """Clock and line of the peer, and whether it answers STUN."""
    now, wall = endpoint.host.now, endpoint.host.wall
    ask = partial(endpoint.call, link.peer, PROBE, Probe(), timeout=defaults.PROBE_TIME)
    try:
        began = wall()
        answer = await ask()
        skew = answer.wall - (began + wall()) / 2
        peer = attrs.evolve(peer, skew=skew, rtt=min(link.rtt, peer.rtt or link.rtt))
        for size in (defaults.PROBE_FIRST, defaults.PROBE_BYTES):
            start = now()
            await ask(body=[memoryview(bytes(size))])
            took = max(1e-6, now() - start)
            peer = attrs.evolve(peer, rate=size / took)
            if took > defaults.PROBE_SHORT:
                break
    except RemoteError as error:
        return attrs.evolve(peer, trouble=f"not measured: {error}"), False
    return peer, answer.stun


async def _stun(endpoint: Endpoint, facts: Facts, observers: tuple[Address, ...]) -> Facts:
    """Ask peers by UDP under what address they see us, all from one socket per IP version."""
    seen: list[Observation] = []
    own: tuple[Address, ...] = ()
    for six, everywhere in ((False, "0.0.0.0"), (True, "::")):
        some = tuple(address for address in observers if (":" in address.host) == six)
        if not some:
            continue
        try:
            datagrams = await endpoint.host.network.open_datagrams(Address("tcp", everywhere, 0))
        except ConfigError:
            continue
        async with datagrams:
            own += tuple(Address("tcp", a.host, datagrams.local.port) for a in facts.addresses)
            seen += await observe(endpoint.host, datagrams, some)
    mapping, reason = classify_mapping(own, tuple(seen))
    said = tuple(
        (str(o.observer), o.trouble if o.mapped is None else f"sees {o.mapped}", o.mapped is not None) for o in seen
    )
    outside = tuple(o.mapped for o in seen if o.mapped is not None and o.mapped not in own)
    if facts.running is None and not facts.external:
        facts = attrs.evolve(facts, external=outside)
    return attrs.evolve(facts, stun=said, mapping=mapping, mapping_reason=reason)


async def _reach(endpoint: Endpoint, facts: Facts) -> Facts:
    """Wait until peers have found out whether we can be dialled."""
    assert endpoint.traversal is not None
    reachability = endpoint.traversal.reachability
    with trio.move_on_after(defaults.DOCTOR_REACH):
        while reachability.verdict.state is Reach.UNKNOWN:  # noqa: ASYNC110  # looked at once, by a command
            await trio.sleep(0.1)
    verdict = reachability.verdict
    confirmed = tuple(a for a in verdict.confirmed if scope_of(a) != "loopback")
    return attrs.evolve(
        facts,
        state=verdict.state.value,
        reason=verdict.reason,
        external=verdict.external or facts.external,
        confirmed=confirmed,
    )
