"""Signals through a common peer: forwarded, answered, refused, limited."""

from __future__ import annotations

import pytest
import trio

from shoal.transport import defaults
from shoal.transport.endpoint import Endpoint
from shoal.transport.errors import ProtocolMisuse, RemoteRefused, WaitExpired
from shoal.transport.identity import Identity, PeerId
from shoal.transport.signals import SIGNAL, SIGNALLED, Askers, Forwarded, PeerRates, Signal, Signals

from .harness import Nodes, Real, Virtual, World, nodes


async def three(n: Nodes) -> tuple[tuple[Endpoint, Endpoint, Endpoint], tuple[Signals, Signals, Signals]]:
    """``a`` and ``c`` linked with ``b`` and not with each other."""
    a, b, c = await n.add("a"), await n.add("b"), await n.add("c")
    signals = Signals(a), Signals(b), Signals(c)
    await a.connect(b.peer_id, b.addresses())
    await c.connect(b.peer_id, b.addresses())
    return (a, b, c), signals


class Worlds:
    def world(self) -> World:
        raise NotImplementedError

    async def test_a_common_peer_forwards_a_signal_and_its_answer(self) -> None:
        heard: list[tuple[PeerId, PeerId, bytes]] = []

        async def answer(origin: PeerId, via: PeerId, body: bytes) -> bytes:
            heard.append((origin, via, body))
            return body.upper()

        async with nodes(self.world()) as n:
            (a, b, c), (from_a, via_b, from_c) = await three(n)
            from_c.handle("shout", answer)
            assert await from_a.ask(b.peer_id, c.peer_id, "shout", b"hello", 5.0) == b"HELLO"
            assert heard == [(a.peer_id, b.peer_id, b"hello")]
            assert via_b.forwarded == 1
            assert a.link(c.peer_id) is None
            # without a common peer, over a link of its own
            assert await from_a.ask(c.peer_id, c.peer_id, "shout", b"x", 5.0, addresses=c.addresses()) == b"X"
            assert heard[1:] == [(a.peer_id, a.peer_id, b"x")]

    async def test_refusals_are_typed(self) -> None:
        async def refuse(origin: PeerId, via: PeerId, body: bytes) -> bytes:
            raise RemoteRefused("tired", "not today")

        async with nodes(self.world()) as n:
            (a, b, c), (from_a, _, from_c) = await three(n)
            from_c.handle("no", refuse)
            stranger = Identity(b"s" * 32).peer_id
            for to, kind, code in (
                (stranger, "no", "not_linked"),
                (c.peer_id, "no", "tired"),
                (c.peer_id, "unheard of", "unknown_kind"),
            ):
                with pytest.raises(RemoteRefused) as caught:
                    await from_a.ask(b.peer_id, to, kind, b"", 5.0)
                assert caught.value.code == code
            with pytest.raises(ProtocolMisuse):
                await from_a.ask(b.peer_id, c.peer_id, "no", bytes(defaults.MAX_SIGNAL + 1), 5.0)
            for request in (
                Signal(c.peer_id, "no", bytes(defaults.MAX_SIGNAL + 1)),
                Signal(c.peer_id, "n" * 99, b""),
            ):
                with pytest.raises(RemoteRefused) as caught:
                    await a.call(b.peer_id, SIGNAL, request)
                assert caught.value.code == "too_large"
            with pytest.raises(RemoteRefused) as caught:
                await a.call(b.peer_id, SIGNALLED, Forwarded(b.peer_id, "no", b""))
            assert caught.value.code == "bad_origin"


class TestVirtual(Worlds):
    def world(self) -> World:
        return Virtual()


@pytest.mark.real
class TestReal(Worlds):
    def world(self) -> World:
        return Real()


async def test_a_peer_that_signals_too_often_is_refused_and_others_are_not() -> None:
    async def nothing(origin: PeerId, via: PeerId, body: bytes) -> bytes:
        return b""

    async with nodes(Virtual()) as n:
        (_, b, c), (from_a, _, from_c) = await three(n)
        d = await n.add("d")
        from_d = Signals(d)
        await d.connect(b.peer_id, b.addresses())
        from_c.handle("hi", nothing)
        with pytest.raises(RemoteRefused) as caught:  # noqa: PT012
            for _ in range(2 * int(defaults.SIGNAL_BURST)):
                await from_a.ask(b.peer_id, c.peer_id, "hi", b"", 5.0)
        assert caught.value.code == "rate"
        await from_d.ask(b.peer_id, c.peer_id, "hi", b"", 5.0)
        await trio.sleep(1 / defaults.SIGNAL_RATE)
        await from_a.ask(b.peer_id, c.peer_id, "hi", b"", 5.0)


async def test_a_target_that_does_not_answer_costs_the_time_the_caller_gave() -> None:
    async def never(origin: PeerId, via: PeerId, body: bytes) -> bytes:
        await trio.sleep_forever()

    async with nodes(Virtual()) as n:
        (_, b, c), (from_a, _, from_c) = await three(n)
        from_c.handle("hi", never)
        began = trio.current_time()
        with pytest.raises((WaitExpired, RemoteRefused)):
            await from_a.ask(b.peer_id, c.peer_id, "hi", b"", 3.0)
        assert trio.current_time() - began < 3.1


def test_rates_are_remembered_for_a_bounded_number_of_peers() -> None:
    rates = PeerRates(1.0, 2.0, peers=3)
    peers = [Identity(bytes([i]) * 32).peer_id for i in range(5)]
    for peer in peers:
        assert rates.take(peer, 0.0)
    assert len(rates) == 3
    assert rates.take(peers[4], 0.0)
    assert not rates.take(peers[4], 0.5)
    assert rates.take(peers[4], 1.0)


def test_a_common_peer_that_invents_origins_gets_no_more_than_its_own_share() -> None:
    askers = Askers((1.0, 2.0), (2.0, 4.0), (4.0, 8.0), 0.0)
    origins = [Identity(bytes([n]) * 32).peer_id for n in range(1, 60)]
    liar, honest = (Identity(bytes([n]) * 32).peer_id for n in (100, 101))

    def granted(via: PeerId, origin: PeerId, now: float) -> bool:
        try:
            askers.admit(origin, via, now)
        except RemoteRefused as error:
            assert error.code == "rate"
            return False
        return True

    assert sum(granted(liar, origin, 0.0) for origin in origins) == 4
    # Others have their share meanwhile, each origin its own.
    assert [granted(honest, honest, 0.0) for _ in range(3)] == [True, True, False]
    assert sum(granted(liar, origin, 1.0) for origin in origins) == 2
    # And all together theirs: 8 at once, of which 6 and 2 were used, and 4 per second.
    vias = [Identity(bytes([n]) * 32).peer_id for n in range(150, 170)]
    assert sum(granted(via, via, 1.0) for via in vias) == 4
