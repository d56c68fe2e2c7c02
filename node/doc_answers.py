"""Answers about the documents of a run: from a running node, or from what it left on disk."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

import trio

from ..dht.documents.policy import DocumentSpec
from ..dht.documents.replica import Replica
from ..learning.rundocs_content import read_spec, run_document, run_documents
from ..transport.errors import ConfigError
from ..transport.identity import PeerId
from . import defaults
from .datadir import DataDir
from .doc_messages import DocumentList, DocumentRow, DocumentState, GetDocument, GetDocuments, to_json
from .ticket import Ticket

if TYPE_CHECKING:
    from ..learning.rundocs import RunDocuments

log = logging.getLogger(__name__)


def _row(replica: Replica) -> DocumentRow:
    held = replica.summary()
    return DocumentRow(
        replica.spec.name,
        replica.spec.id.hex(),
        len(held),
        sum(one.next - one.first for one in held),
        replica.size,
        replica.digest().hex(),
        tuple(one.author.text for one in held if one.frozen),
    )


def _list(run: bytes, me: PeerId, wall: float, replicas: Mapping[str, Replica]) -> DocumentList:
    rows = tuple(_row(replica) for replica in replicas.values())
    digest = hashlib.blake2b("".join(row.digest for row in rows).encode(), digest_size=32).hexdigest()
    return DocumentList(run.hex(), me.text, wall, digest, rows)


def _state(run: bytes, founder: PeerId, me: PeerId, wall: float, replica: Replica, aggregator: str) -> DocumentState:
    # Half of a message: JSON in msgpack grows by its quotes.
    content, omitted = to_json(replica.read(), defaults.MAX_CONTROL_MESSAGE // 2)
    ids = tuple(spec.id.hex() for spec in run_documents(run, founder).values())
    return DocumentState(run.hex(), me.text, wall, _row(replica), content, ids, omitted, aggregator)


async def answer(documents: RunDocuments | None, request: GetDocuments | GetDocument) -> DocumentList | DocumentState:
    """What a running node answers, when something has changed since ``request.after`` or its time is over.

    Raises :class:`ConfigError` before it takes part in a run, and for a document that the run does not have.
    """
    if documents is None or not documents.opened():
        raise ConfigError("this node takes part in no run yet; there are no documents to show")
    replicas = {name: document.replica for name, document in documents.opened().items()}
    run, me, host = documents.run_here.run_id, documents.me, documents.host
    chosen = [documents.document(request.name)] if isinstance(request, GetDocument) else []
    subscriptions = [document.subscribe() for document in chosen or documents.opened().values()]

    def now() -> DocumentList | DocumentState:
        if isinstance(request, GetDocument):
            spec = documents.run_here.spec
            return _state(run, spec.founder, me, host.wall(), replicas[request.name], spec.aggregator)
        return _list(run, me, host.wall(), replicas)

    def digest(found: DocumentList | DocumentState) -> str:
        return found.digest if isinstance(found, DocumentList) else found.row.digest

    found = now()
    if request.after and request.after == digest(found):
        with trio.move_on_after(defaults.DOCUMENT_PATIENCE):
            async with trio.open_nursery() as nursery:

                async def wait(index: int) -> None:
                    await subscriptions[index].changed()
                    nursery.cancel_scope.cancel()

                for index in range(len(subscriptions)):
                    nursery.start_soon(wait, index)
        found = now()
    return found


def stored(data: DataDir, name: str, wall: float) -> DocumentList | DocumentState:
    """What a node that does not run has left. ``name`` empty: all documents.

    Raises :class:`ConfigError` when there is nothing, and while a node runs.
    """
    from ..dht.documents.store import DocumentStore

    record = data.read_record()
    if record is None or not data.documents_path.exists():
        raise ConfigError(
            f"there are no documents here: {data.path} has taken part in no run, and no node is running there; start "
            "one with `shoal start TASK` or `shoal join TICKET`, or name another directory with --data-dir"
        )
    ticket = Ticket.parse(record.ticket)
    specs = run_documents(ticket.run_id, ticket.founder)
    if name:
        specs = {each: run_document(each, ticket.run_id, ticket.founder) for each in (name, "spec")}
    with data.locked():
        me = data.identity(_no_key).peer_id
        store = DocumentStore(data.documents_path)
        try:
            replicas = {key: _loaded(store.load(spec.id, me), spec, wall) for key, spec in specs.items()}
            for notice in store.notices:
                log.warning("documents: %s", notice)
        finally:
            store.close()
    if name:
        signed = read_spec(replicas["spec"].read(), ticket.run_id)
        aggregator = signed.open().aggregator if signed is not None else "mean"
        return _state(ticket.run_id, ticket.founder, me, wall, replicas[name], aggregator)
    return _list(ticket.run_id, me, wall, replicas)


def _loaded(found: object, spec: DocumentSpec, wall: float) -> Replica:
    from ..dht.documents.store import Loaded

    assert isinstance(found, Loaded)
    replica = Replica(spec, lambda peer: True)
    replica.load(found.envelopes, found.evidence, wall)
    return replica


def _no_key(size: int) -> bytes:
    raise ConfigError("there is no key in the data directory: no node has run here")
