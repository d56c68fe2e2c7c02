"""What a running node tells about the documents of its run: control messages, and how contents travel in them.

A document travels as JSON text, bytes in it as ``{"hex": "…"}``, so that a client needs nothing to show it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import attrs

from ..transport.errors import ConfigError, DecodeError
from ..transport.identity import PeerId


@attrs.frozen
class GetDocuments:
    """Answered by :class:`DocumentList`, at once, or, if it is still as ``after`` says, when something has changed.

    ``after``: the digest of an earlier answer, empty for none. The answer comes within some seconds all the same.
    """

    after: str = ""


@attrs.frozen
class GetDocument:
    """Answered by :class:`DocumentState`; ``after`` as in :class:`GetDocuments`."""

    name: str
    after: str = ""


@attrs.frozen
class DocumentRow:
    """One document of the run. ``size``: bytes of what its authors wrote, ``frozen``: who contradicted itself."""

    name: str
    id: str
    authors: int
    envelopes: int
    size: int
    digest: str
    frozen: tuple[str, ...] = ()


@attrs.frozen
class DocumentList:
    """``digest``: changes when a document does. ``wall``: Unix seconds of the node's clock. ``me``: the node's peer."""

    run: str
    me: str
    wall: float
    digest: str
    documents: tuple[DocumentRow, ...]


@attrs.frozen
class DocumentState:
    """What a document says. ``content``: JSON, author → root types by name. ``omitted``: authors that did not fit.

    ``ids``: of all documents of the run, as hex: a ban counts with a proof about one of them, or about a round, whose
    rule is ``aggregator``.
    """

    run: str
    me: str
    wall: float
    row: DocumentRow
    content: str
    ids: tuple[str, ...]
    omitted: int = 0
    aggregator: str = "mean"


REQUESTS = (GetDocuments, GetDocument)
MESSAGES = (*REQUESTS, DocumentList, DocumentState)


def _plain(value: Any) -> Any:
    match value:
        case bytes():
            return {"hex": value.hex()}
        case dict():
            return {key: _plain(item) for key, item in value.items()}
        case list():
            return [_plain(item) for item in value]
        case float() if value != value or abs(value) == float("inf"):
            return None
        case _:
            return value


def to_json(content: Mapping[PeerId, Mapping[str, Any]], room: int) -> tuple[str, int]:
    """``content`` as text of at most ``room`` characters, and how many authors did not fit, the largest ones first."""
    parts = {author.text: json.dumps(_plain(dict(content[author])), sort_keys=True) for author in sorted(content)}
    total = sum(map(len, parts.values())) + 64 * len(parts)
    omitted = 0
    for author in sorted(parts, key=lambda name: (-len(parts[name]), name)):
        if total <= room:
            break
        total -= len(parts.pop(author)) + 64
        omitted += 1
    return "{" + ", ".join(f"{json.dumps(author)}: {text}" for author, text in parts.items()) + "}", omitted


def _bytes(value: dict[str, Any]) -> Any:
    if list(value) == ["hex"] and isinstance(value["hex"], str):
        try:
            return bytes.fromhex(value["hex"])
        except ValueError:
            return value
    return value


def from_json(text: str) -> dict[PeerId, dict[str, Any]]:
    """The reverse. Raises :class:`DecodeError`."""
    try:
        found = json.loads(text, object_hook=_bytes)
        # An author with one text called "hex" has roots that look like bytes: it says nothing that anybody reads.
        return {PeerId.parse(author): {} if type(roots) is bytes else dict(roots) for author, roots in found.items()}
    except (ValueError, TypeError, AttributeError, RecursionError, ConfigError) as error:
        raise DecodeError(f"the node's answer holds no document: {error}") from None
