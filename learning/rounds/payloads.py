"""A few bytes of each member in the record of a round: signed by who gives them, and by nobody else to be altered.

A round in which nothing is combined (:meth:`shoal.learning.peer.Round.gather`) is agreed in one exchange: what voters
give comes with their Ready, and the leader proposes a record that holds it. The record is of kind ``gather``, without
a result, fingerprint or nonces. Each payload is signed under the key of the instance, so that a leader can leave one
out, as it can a contribution that it calls late, but can invent none, alter none, and take none from another round.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from ...transport.identity import Identity, PeerId

if TYPE_CHECKING:
    from .messages import CommitRecord

#: The kind of a record that holds payloads, and of one in whose round something was combined.
GATHER, REDUCE = "gather", "reduce"

#: Bytes of one payload. 256 members with as many each make a record of 300 KB; a message may have 1 MiB.
MAX_PAYLOAD = 1024

_PAYLOAD = b"shoal payload v1\0"


@attrs.frozen
class Payload:
    """What one member gives in a round, with its signature under the key of the instance."""

    data: bytes
    signature: bytes

    def __attrs_post_init__(self) -> None:
        if len(self.data) > MAX_PAYLOAD or len(self.signature) != 64:
            raise ValueError(f"a payload of {len(self.data)} bytes, signed with {len(self.signature)}")

    @classmethod
    def sign(cls, identity: Identity, key: bytes, data: bytes) -> Payload:
        """``data`` as ours in the instance ``key``."""
        return cls(data, identity.sign(_signed(key, data)))

    def of(self, peer: PeerId, key: bytes) -> bool:
        """Whether ``peer`` gave this in the instance ``key``."""
        return peer.verify(_signed(key, self.data), self.signature)


def _signed(key: bytes, data: bytes) -> bytes:
    return _PAYLOAD + key + data


def payloads_fault(record: CommitRecord, key: bytes, kind: str) -> str | None:
    """What is wrong with the payloads of a record of the instance ``key``; None when its members gave them.

    ``kind``: that of all rounds of the run. Who has not begun yet cannot tell otherwise what a round is about, and a
    leader could end one that reduces with a record of nothing.
    """
    if record.kind != kind:
        return f"a record of kind {record.kind!r} in a run whose rounds are of kind {kind!r}"
    if kind != GATHER:
        return "payloads in a record of another kind" if record.payloads else None
    if record.fingerprint or record.algorithm or record.nonces:
        return "a result in a record of payloads"
    if len(record.payloads) != len(record.members):
        return "members and payloads differ in number"
    for member, payload in zip(record.members, record.payloads, strict=True):
        if not payload.of(member, key):
            return f"a payload that {member.short} did not give"
    return None


def said(record: CommitRecord) -> dict[bytes, bytes]:
    """Who gave what, in PeerId order; nothing where something was combined."""
    return {member.key: payload.data for member, payload in zip(record.members, record.payloads, strict=False)}
