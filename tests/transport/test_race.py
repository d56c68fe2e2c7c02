"""Races of ways: order, head starts, winners, losers, and peers that come by themselves."""

from __future__ import annotations

from typing import cast

import pytest
import trio

from shoal.transport import defaults
from shoal.transport.address import Address, RelayAddress
from shoal.transport.errors import ConfigError, PeerUnreachable, ProtocolMisuse, RemoteRefused
from shoal.transport.identity import Identity
from shoal.transport.link import Link
from shoal.transport.network import ByteStream
from shoal.transport.planner import Outcome, Plan, Step
from shoal.transport.race import Past, Race
from shoal.transport.ways import Way

PEER = Identity(b"p" * 32).peer_id
VIA = RelayAddress(Identity(b"v" * 32).peer_id, ())


class Scripted(Way):
    """Does for each step what a table says: seconds, then a result or an error. None: the peer will come."""

    def __init__(self, name: str, table: dict[str, tuple[float, object]]) -> None:
        self.name = name
        self.table = table
        self.begun: list[tuple[str, float]] = []
        self.cancelled: list[str] = []

    async def open(self, peer: object, step: Step) -> ByteStream | None:
        self.begun.append((step.target, trio.current_time()))
        seconds, result = self.table[step.target]
        try:
            await trio.sleep(seconds)
        except trio.Cancelled:
            self.cancelled.append(step.target)
            raise
        if isinstance(result, Exception):
            raise result
        return cast(ByteStream | None, result)


def step(port: int, head_start: float = 0.25) -> Step:
    return Step("direct", head_start, "why", address=Address("mem", "x", port))


def target(port: int) -> str:
    return f"mem://x:{port}"


class Run:
    """A race whose streams are texts and whose links are too."""

    def __init__(self, steps: list[Step], *ways: Scripted, shake: float = 0.0, skipped: object = ()) -> None:
        self.past: list[Outcome] = []
        self.finished: list[str] = []
        self.shake = shake
        plan = Plan(tuple(steps), cast(tuple[tuple[str, str], ...], skipped))
        self.race = Race(PEER, plan, {way.name: way for way in ways}, self.finish, self.past.append, trio.current_time)

    async def finish(self, stream: ByteStream, way: str) -> Link:
        await trio.sleep(self.shake)
        self.finished.append(f"{stream} by {way}")
        return cast(Link, f"link over {stream}")


def unreachable(reason: str) -> PeerUnreachable:
    return PeerUnreachable("x", attempts=(("x", reason),))


async def test_steps_begin_after_their_head_starts_or_when_the_one_before_has_failed() -> None:
    way = Scripted(
        "direct",
        {
            target(1): (9.0, unreachable("slow")),
            target(2): (0.1, unreachable("fast")),
            target(3): (0.5, "three"),
            target(4): (9.0, "four"),
        },
    )
    run = Run([step(1, 0.0), step(2), step(3), step(4, 0.3)], way)
    began = trio.current_time()
    assert await run.race.run() == "link over three"
    times = [round(at - began, 6) for _, at in way.begun]
    assert times == [0.0, 0.25, 0.35, 0.65]
    assert trio.current_time() - began == pytest.approx(0.85)
    assert sorted(way.cancelled) == [target(1), target(4)]
    assert run.finished == ["three by direct"]
    assert run.race.won is not None
    assert run.race.won.target == target(3)
    assert [(o.target, o.ok, o.reason) for o in run.past] == [(target(2), False, "fast"), (target(3), True, "")]


async def test_the_first_finished_link_wins_not_the_first_stream() -> None:
    way = Scripted("direct", {target(1): (0.0, "one"), target(2): (0.0, "two")})
    run = Run([step(1, 0.0), step(2, 0.1)], way)

    async def finish(stream: ByteStream, way: str) -> Link:
        await trio.sleep(5.0 if str(stream) == "one" else 0.1)
        return cast(Link, f"link over {stream}")

    run.race.finish = finish
    assert await run.race.run() == "link over two"


@pytest.mark.parametrize(
    "error", [unreachable("no"), ConfigError("no"), ProtocolMisuse("no"), RemoteRefused("busy", "no")]
)
async def test_when_everything_fails_every_step_and_what_was_skipped_is_named(error: Exception) -> None:
    way = Scripted("direct", {target(1): (0.0, error), target(2): (0.0, unreachable("down"))})
    run = Run([step(1, 0.0), step(2)], way, skipped=(("relay", "none is known"),))
    with pytest.raises(PeerUnreachable) as caught:
        await run.race.run()
    (first, why), *rest = caught.value.attempts
    assert first == target(1)
    assert "no" in why
    assert rest == [(target(2), "down"), ("relay", "none is known")]
    # a refusal that passes is no mark against the way
    assert len(run.past) == (1 if isinstance(error, RemoteRefused) else 2)


async def test_a_way_we_have_no_means_for_fails_with_that_reason() -> None:
    with pytest.raises(PeerUnreachable, match="no means for direct"):
        await Run([step(1)], Scripted("relay", {})).race.run()


async def test_a_race_without_steps_says_that_nothing_is_known() -> None:
    with pytest.raises(PeerUnreachable, match="no address of it is known"):
        await Run([]).race.run()


def asked() -> Step:
    return Step("reversal", 0.0, "why", via=VIA)


async def test_a_peer_that_was_asked_to_come_and_comes_ends_the_race_without_a_link_of_ours() -> None:
    reversal = Scripted("reversal", {asked().target: (0.1, None)})
    direct = Scripted("direct", {target(1): (9.0, unreachable("slow")), target(2): (0.0, "two")})
    run = Run([asked(), step(1, 0.0), step(2, 5.0)], reversal, direct)
    results: list[Link | None] = []

    async def go() -> None:
        results.append(await run.race.run())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(go)
        await trio.sleep(1)
        assert run.race.asked == asked()
        run.race.arrive()
    assert results == [None]
    assert direct.cancelled == [target(1)]
    assert [name for name, _ in direct.begun] == [target(1)]  # the second was never begun


async def test_what_already_shakes_hands_is_finished_when_the_peer_comes() -> None:
    # Both sides dial at once: each sees the other come. If both gave up, there would be no link.
    run = Run([step(1)], Scripted("direct", {target(1): (0.0, "one")}), shake=1.0)
    async with trio.open_nursery() as nursery:

        async def go() -> None:
            assert await run.race.run() == "link over one"

        nursery.start_soon(go)
        await trio.sleep(0.5)
        run.race.arrive()


async def test_a_peer_that_was_asked_to_come_and_does_not_is_named() -> None:
    run = Run([asked()], Scripted("reversal", {asked().target: (0.1, None)}))
    with pytest.raises(PeerUnreachable, match="though it was asked to dial us"):
        await run.race.run()


async def test_failures_are_told_as_they_happen() -> None:
    heard: list[tuple[str, str]] = []

    def note(step: Step, error: Exception) -> None:
        heard.append((step.target, str(error)))

    run = Run([step(1, 0.0), step(2)], Scripted("direct", {target(1): (0, unreachable("a")), target(2): (0, "two")}))
    run.race.on_failure = note
    await run.race.run()
    assert [name for name, _ in heard] == [target(1)]


def test_outcomes_are_remembered_for_a_bounded_number_of_peers() -> None:
    past = Past()
    peers = [Identity(i.to_bytes(32, "big")).peer_id for i in range(1, 4)]
    for i in range(2 * defaults.MAX_OUTCOMES):
        past.note(peers[0], Outcome("x", True, float(i)))
    assert len(past.of(peers[0])) == defaults.MAX_OUTCOMES
    assert past.of(peers[0])[-1].at == 2 * defaults.MAX_OUTCOMES - 1
    assert past.of(peers[1]) == ()
