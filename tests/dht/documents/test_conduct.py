"""What counts against a peer, what it may ask per second, and that nobody's misdeeds fill the memory."""

from __future__ import annotations

from shoal.dht.documents import defaults
from shoal.dht.documents.conduct import STRIKES, Conduct, Fault

from .epidemic import peer


def test_calls_are_limited_per_peer_and_come_back_with_time() -> None:
    conduct = Conduct()
    served = sum(conduct.admit(peer(1), 0.0)[0] for _ in range(1000))
    assert served == defaults.PEER_CALLS_BURST
    assert conduct.admit(peer(1), 0.0)[1:] == ("rate", "more than 50 calls per second")
    assert conduct.admit(peer(2), 0.0)[0], "another peer is served"
    assert sum(conduct.admit(peer(1), 1.0)[0] for _ in range(1000)) == defaults.PEER_CALLS
    assert conduct.faults()[peer(1)] == {Fault.FLOOD: 1000 - served + 1 + 950}


def test_envelopes_are_limited_in_number_and_bytes() -> None:
    conduct = Conduct()
    assert sum(conduct.may_send(peer(1), 100, 0.0)[0] for _ in range(5000)) == defaults.PEER_ENVELOPES_BURST
    sent = 0
    while conduct.may_send(peer(2), 128 * 1024, 0.0)[0]:
        sent += 128 * 1024
    assert defaults.PEER_BYTES_BURST <= sent < defaults.PEER_BYTES_BURST + 256 * 1024
    assert conduct.may_have(peer(3), 0.0)
    conduct.gave(peer(3), int(defaults.PEER_BYTES_BURST) + 1, 0.0)
    assert not conduct.may_have(peer(3), 0.0)
    assert conduct.may_have(peer(3), 1.0)


def test_a_peer_with_too_many_strikes_is_not_heard_for_a_while() -> None:
    conduct = Conduct()
    muted = [conduct.count(peer(1), Fault.INVALID, float(turn)) for turn in range(defaults.STRIKES)]
    assert muted == [False] * (defaults.STRIKES - 1) + [True]
    allowed, code, reason = conduct.admit(peer(1), 10.0)
    assert (allowed, code) == (False, "misbehaved")
    assert "5 invalid" in reason
    assert conduct.muted(peer(1), 10.0)
    assert conduct.admit(peer(1), defaults.STRIKES + defaults.MUTED_FOR)[0]
    assert not conduct.muted(peer(2), 10.0)


def test_strikes_are_forgiven_and_what_may_happen_to_anybody_is_none() -> None:
    conduct = Conduct()
    assert not any(conduct.count(peer(1), Fault.INVALID, turn * (defaults.STRIKE_FORGIVEN + 1)) for turn in range(50))
    harmless = [fault for fault in Fault if fault not in STRIKES]
    assert not any(conduct.count(peer(2), fault, 0.0) for fault in harmless for _ in range(100))
    assert conduct.admit(peer(2), 0.0)[0]


def test_memory_is_bounded_and_the_guilty_are_forgotten_last() -> None:
    conduct = Conduct()
    conduct.count(peer(0), Fault.FORK, 0.0)
    for number in range(1, defaults.MAX_CONDUCT + 500):
        conduct.admit(peer(number), 0.0)
    assert conduct.faults() == {peer(0): {Fault.FORK: 1}}
    assert len(conduct._peers) == defaults.MAX_CONDUCT


def test_every_fault_is_told() -> None:
    told: list[tuple[str, str]] = []
    conduct = Conduct(lambda who, fault, detail: told.append((fault, detail)))
    conduct.count(peer(1), Fault.STALE, 0.0, "old")
    assert told == [("stale", "old")]
