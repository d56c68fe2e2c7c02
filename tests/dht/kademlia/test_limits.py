"""Request limits: strangers are held short, friends are not."""

from __future__ import annotations

from shoal.dht.kademlia import defaults
from shoal.dht.kademlia.limits import RequestLimits
from shoal.transport.identity import PeerId


def peer(number: int) -> PeerId:
    return PeerId(number.to_bytes(32, "big"))


def test_a_stranger_gets_its_burst_and_then_its_rate() -> None:
    limits = RequestLimits(0.0)
    allowed = sum(limits.allow(peer(1), False, 0.0)[0] for _ in range(1000))
    assert allowed == defaults.STRANGER_BURST
    assert limits.allow(peer(1), False, 0.0) == (False, "more than 50 requests per second")
    allowed = sum(limits.allow(peer(1), False, 1.0)[0] for _ in range(1000))
    assert allowed == defaults.STRANGER_RATE


def test_many_strangers_share_one_limit_that_friends_do_not_feel() -> None:
    limits = RequestLimits(0.0)
    allowed = sum(limits.allow(peer(n), False, 0.0)[0] for n in range(2 * int(defaults.STRANGERS_BURST)))
    assert allowed == defaults.STRANGERS_BURST
    assert limits.allow(peer(1 << 20), False, 0.0) == (False, "too many requests from peers we do not know")
    assert limits.allow(peer(1 << 20), True, 0.0) == (True, "within limits")


def test_remembered_strangers_are_bounded() -> None:
    limits = RequestLimits(0.0)
    for number in range(defaults.MAX_STRANGERS + 100):
        limits.allow(peer(number), False, 0.0)
    assert len(limits._strangers) == defaults.MAX_STRANGERS
