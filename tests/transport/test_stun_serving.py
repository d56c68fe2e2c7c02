"""STUN for others: offered in the record while strangers can dial us, whoever of the process answers it."""

from __future__ import annotations

import pytest
import trio

from shoal.transport.address import Address
from shoal.transport.endpoint import Endpoint
from shoal.transport.host import RealHost
from shoal.transport.stun_service import observe
from shoal.transport.traversal import Traversal

from .harness import Real, nodes


def services(endpoint: Endpoint) -> tuple[str, ...]:
    return endpoint.record().open(endpoint.host.wall()).services


async def until_offered(endpoint: Endpoint) -> None:
    with trio.fail_after(10):
        while "stun" not in services(endpoint):
            await trio.sleep(0.05)


@pytest.mark.real
async def test_who_was_dialled_answers_stun_at_its_listening_port_and_says_so() -> None:
    async with nodes(Real()) as n:
        a, b = [await n.add(name, traversal=Traversal(ways=("direct",))) for name in "ab"]
        assert services(a) == ()
        await b.connect(a.peer_id, a.addresses())
        await until_offered(a)
        (listening,) = a.own_addresses()
        host = RealHost()
        async with await host.network.open_datagrams(Address("tcp", "127.0.0.1", 0)) as datagrams:
            (seen,) = await observe(host, datagrams, (listening,))
            assert seen.mapped == datagrams.local


@pytest.mark.real
async def test_where_somebody_else_of_the_process_answers_only_the_record_says_so() -> None:
    async with nodes(Real()) as n:
        a, b = [await n.add(name, traversal=Traversal(ways=("direct",))) for name in "ab"]
        assert a.traversal is not None
        a.traversal.stun.provide()
        (listening,) = a.own_addresses()
        async with await RealHost().network.open_datagrams(listening):
            await b.connect(a.peer_id, a.addresses())
            await until_offered(a)
            with trio.fail_after(5):
                while (record := b.contact(a.peer_id)) is None or "stun" not in record.open(b.host.wall()).services:
                    await trio.sleep(0.05)
