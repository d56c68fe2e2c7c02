"""How peers behave about documents: what each may ask and send per second, and what counts against it; sans-IO.

Every peer has a bucket each for calls, envelopes, bytes it sends and bytes it is sent. What it did wrong is counted by
name for people to see; what only a liar or a broken program does is a *strike*, and a peer with too many of them is not
heard for a while. Memory is bounded: the peers that were silent longest are forgotten first, but those with strikes
last.
"""

from __future__ import annotations

import enum
from collections.abc import Callable

import attrs

from ...transport.identity import PeerId
from ...transport.throttle import TokenBucket
from . import defaults


class Fault(enum.StrEnum):
    """What a peer can do wrong. Strikes: see :data:`STRIKES`."""

    #: A wrong signature, size or shape.
    INVALID = "invalid"
    #: Signed by its author, and no change an honest author makes; whoever passes it on has not looked at it.
    GARBAGE = "garbage"
    #: Signed two envelopes that contradict each other.
    FORK = "fork"
    #: The same envelope again from the same peer.
    REPLAY = "replay"
    #: Long replaced, or over.
    STALE = "stale"
    #: By somebody who may not write there, as far as we know.
    FOREIGN = "foreign"
    #: More of one author than the document takes.
    TOO_MUCH = "too-much"
    #: More per second than a peer may.
    FLOOD = "flood"
    #: Said that it has what it then did not give.
    EMPTY_PROMISE = "empty-promise"
    #: An answer about something else, or against the protocol.
    NONSENSE = "nonsense"
    #: A proof that proves nothing.
    FALSE_PROOF = "false-proof"


#: What no honest peer does, whatever it knows and however the clocks stand.
STRIKES = (Fault.INVALID, Fault.GARBAGE, Fault.FORK, Fault.NONSENSE, Fault.FALSE_PROOF)


@attrs.define(eq=False)
class _Record:
    calls: TokenBucket
    envelopes: TokenBucket
    incoming: TokenBucket
    outgoing: TokenBucket
    faults: dict[Fault, int] = attrs.field(factory=dict)
    strikes: int = 0
    struck: float = 0.0
    muted_until: float = 0.0


class Conduct:
    """Of all peers of one node. ``now`` in seconds, any zero."""

    def __init__(self, on_fault: Callable[[PeerId, Fault, str], None] = lambda peer, fault, detail: None) -> None:
        self._peers: dict[PeerId, _Record] = {}  # most recently heard last
        self._on_fault = on_fault

    def _of(self, peer: PeerId, now: float) -> _Record:
        record = self._peers.pop(peer, None)
        if record is None:
            record = _Record(
                TokenBucket(defaults.PEER_CALLS, defaults.PEER_CALLS_BURST, now),
                TokenBucket(defaults.PEER_ENVELOPES, defaults.PEER_ENVELOPES_BURST, now),
                TokenBucket(defaults.PEER_BYTES, defaults.PEER_BYTES_BURST, now),
                TokenBucket(defaults.PEER_BYTES, defaults.PEER_BYTES_BURST, now),
            )
            if len(self._peers) >= defaults.MAX_CONDUCT:
                clean = next((other for other, state in self._peers.items() if not state.faults), None)
                del self._peers[next(iter(self._peers)) if clean is None else clean]
        self._peers[peer] = record
        return record

    # -- limits -------------------------------------------------------------------------------------------------------

    def admit(self, peer: PeerId, now: float) -> tuple[bool, str, str]:
        """May it ask something now? Returns (decision, code of the refusal, reason)."""
        record = self._of(peer, now)
        if record.muted_until > now:
            worst = ", ".join(f"{count} {fault}" for fault, count in record.faults.items())
            return False, "misbehaved", f"not heard for {record.muted_until - now:.0f} s more ({worst})"
        if not record.calls.take(now):
            self.count(peer, Fault.FLOOD, now, "calls")
            return False, "rate", f"more than {defaults.PEER_CALLS:.0f} calls per second"
        return True, "", "within limits"

    def may_send(self, peer: PeerId, size: int, now: float) -> tuple[bool, str]:
        """May it send us one more envelope, of ``size`` bytes? Returns (decision, reason)."""
        record = self._of(peer, now)
        # A bucket of bytes may go below zero once: what comes next waits for it.
        if not record.incoming.holds(now):
            self.count(peer, Fault.FLOOD, now, "bytes")
            return False, f"more than {defaults.PEER_BYTES:.0f} bytes per second"
        if not record.envelopes.take(now):
            self.count(peer, Fault.FLOOD, now, "envelopes")
            return False, f"more than {defaults.PEER_ENVELOPES:.0f} envelopes per second"
        record.incoming.tokens -= size
        return True, "within limits"

    def may_have(self, peer: PeerId, now: float) -> bool:
        """Whether it may be sent more. Say :meth:`gave` afterwards."""
        return self._of(peer, now).outgoing.holds(now)

    def gave(self, peer: PeerId, size: int, now: float) -> None:
        """It was sent ``size`` bytes that it asked for."""
        self._of(peer, now).outgoing.tokens -= size

    # -- faults -------------------------------------------------------------------------------------------------------

    def count(self, peer: PeerId, fault: Fault, now: float, detail: str = "") -> bool:
        """It did this. Returns whether it is not heard any more from now on."""
        record = self._of(peer, now)
        record.faults[fault] = record.faults.get(fault, 0) + 1
        self._on_fault(peer, fault, detail)
        if fault not in STRIKES:
            return False
        record.strikes = max(0, record.strikes - int((now - record.struck) / defaults.STRIKE_FORGIVEN)) + 1
        record.struck = now
        if record.strikes < defaults.STRIKES:
            return False
        record.strikes = 0
        record.muted_until = now + defaults.MUTED_FOR
        return True

    def muted(self, peer: PeerId, now: float) -> bool:
        """Whether it is not heard at present."""
        record = self._peers.get(peer)
        return record is not None and record.muted_until > now

    def faults(self) -> dict[PeerId, dict[Fault, int]]:
        """What counts against whom."""
        return {peer: dict(record.faults) for peer, record in sorted(self._peers.items()) if record.faults}
