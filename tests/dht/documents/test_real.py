"""Documents over kernel TCP and encryption, with SQLite files and worker threads."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from shoal.dht.documents.document import Document
from shoal.dht.documents.policy import DocumentSpec, Members
from shoal.dht.documents.service import Documents
from shoal.dht.documents.store import DocumentStore
from shoal.transport.address import Address
from shoal.transport.endpoint import Endpoint
from shoal.transport.host import RealHost
from shoal.transport.identity import Identity, PeerId

from .doc_swarm import put

SPEC = DocumentSpec("facts", b"a run", Members("of the test"))


@pytest.mark.real
async def test_writes_spread_over_tcp_and_are_on_disk_when_they_are_acknowledged(tmp_path: Path) -> None:
    members: list[PeerId] = []
    documents: list[Document] = []
    stores: list[DocumentStore] = []
    async with trio.open_nursery() as nursery:
        endpoints: list[Endpoint] = []
        for _ in range(5):
            host = RealHost()
            endpoint = Endpoint(host, Identity(host.entropy(32)))
            await nursery.start(endpoint.run, [Address("tcp", "127.0.0.1", 0)])
            for other in endpoints:
                endpoint.learn(other.record())
                other.learn(endpoint.record())
            endpoints.append(endpoint)
            members.append(endpoint.peer_id)
        for number, endpoint in enumerate(endpoints):
            stores.append(DocumentStore(tmp_path / f"{number}.sqlite"))
            service = Documents(endpoint, stores[-1], reconcile_every=1.0)
            service.join(SPEC.scope, lambda: members)
            documents.append(await service.open(SPEC, lambda peer: peer in members))
            await nursery.start(service.run)
        changes = documents[4].subscribe()
        for number, document in enumerate(documents):
            await document.write(put(number=number))
        with trio.fail_after(60):
            while len(documents[4].read()) < 5:
                await changes.changed()
            while len({document.replica.digest() for document in documents}) > 1:
                await trio.sleep(0.05)
        assert [documents[0].read()[peer]["entry"]["number"] for peer in members] == list(range(5))
        nursery.cancel_scope.cancel()
    for store in stores:
        store.close()
    again = DocumentStore(tmp_path / "4.sqlite")
    assert len(again.load(SPEC.id, members[4]).envelopes) == 5
    again.close()
