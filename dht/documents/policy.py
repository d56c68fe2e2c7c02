"""What a document is and who may write in it: a spec whose hash is the document's id."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import attrs

from ...transport.errors import DecodeError
from ...transport.identity import PeerId
from ...transport.wire import pack, unpack
from . import defaults
from .envelope import digest


@attrs.frozen
class Owner:
    """One peer writes."""

    owner: PeerId


@attrs.frozen
class Listed:
    """These peers write, in ascending order."""

    writers: tuple[PeerId, ...]


@attrs.frozen
class Members:
    """Who is a member decides: the application says who that is at the moment (``members``: of what, for people)."""

    members: str


@attrs.frozen
class DocumentSpec:
    """``scope`` keeps documents of one name apart: a run id. Peers agree on a document when they agree on this."""

    name: str
    scope: bytes
    policy: Owner | Listed | Members

    def __attrs_post_init__(self) -> None:
        if not (0 < len(self.name) <= defaults.MAX_DOCUMENT_NAME and self.name.isprintable()):
            raise ValueError(f"a document's name has 1 to {defaults.MAX_DOCUMENT_NAME} printable characters")
        if len(self.scope) > defaults.MAX_SCOPE:
            raise ValueError(f"a document's scope of {len(self.scope)} bytes, at most {defaults.MAX_SCOPE} allowed")
        if isinstance(self.policy, Listed):
            writers = self.policy.writers
            if not 0 < len(writers) <= defaults.MAX_LISTED:
                raise ValueError(f"a policy lists 1 to {defaults.MAX_LISTED} writers, not {len(writers)}")
            if any(not one < other for one, other in itertools.pairwise(writers)):
                raise ValueError("the writers of a policy are not in ascending order, or one stands twice")
        elif isinstance(self.policy, Members) and len(self.policy.members) > defaults.MAX_DOCUMENT_NAME:
            raise ValueError(f"members are named in at most {defaults.MAX_DOCUMENT_NAME} characters")

    @functools.cached_property
    def id(self) -> bytes:
        """32 bytes."""
        return digest(b"shoal document v1\0", pack(self))

    def may_write(self, peer: PeerId, is_member: Callable[[PeerId], bool]) -> tuple[bool, str]:
        """May ``peer`` be an author? Returns (decision, reason)."""
        match self.policy:
            case Owner(owner):
                return (peer == owner, "the owner" if peer == owner else f"only {owner.short} writes here")
            case Listed(writers):
                listed = peer in writers
                return (listed, "listed" if listed else f"not among the {len(writers)} writers")
            case Members():
                member = is_member(peer)
                return (member, "a member" if member else "not a member")


def unpack_spec(data: bytes) -> DocumentSpec:
    """Read a packed spec. Raises :class:`DecodeError`; a spec whose canonical bytes are others is refused."""
    spec = unpack(DocumentSpec, data)
    if pack(spec) != data:
        raise DecodeError("document spec in another encoding than ours")
    return spec
