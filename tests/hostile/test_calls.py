"""Calls whose bytes make no sense: small ones and those with a stream, asked by an enemy and answered by one."""

from __future__ import annotations

import logging
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import attrs
import pytest
import trio

from shoal.transport.callmux import IncomingCall
from shoal.transport.endpoint import Endpoint
from shoal.transport.errors import LinkClosed, RemoteError
from shoal.transport.frames import Priority
from shoal.transport.link import Link
from shoal.transport.rpc import LENGTH, PART, PROTOCOL, SMALL_HEAD, CallError, Head, Method, Part, exchange
from shoal.transport.rpc import call as ask
from shoal.transport.stream import LinkStream
from shoal.transport.wire import pack

from ..transport.harness import Virtual, link_pair, nodes
from .samples import bent, retyped


@attrs.frozen
class Text:
    text: str


SMALL = Method("hostile.small", Text, Text)
BULK = Method("hostile.bulk", Text, Text, Priority.BULK)
ROUNDS = 400


async def _echo(call: object) -> Text:
    return Text("answer")


@asynccontextmanager
async def asked_by_an_enemy() -> AsyncIterator[tuple[Endpoint, Link]]:
    """(the node that is asked, the enemy's link to it)."""
    async with nodes(Virtual()) as n:
        target, enemy = await n.add("target"), await n.add("enemy")
        target.serve(SMALL, _echo)
        target.serve(BULK, _echo)
        yield target, await enemy.connect(target.peer_id, target.own_addresses())


def _small(rng: random.Random) -> bytes:
    name = b"hostile.small"
    return SMALL_HEAD.pack(rng.choice((1.0, 0.0, -1.0, float("nan"), float("inf"), 1e300)), len(name)) + name


@pytest.mark.parametrize("seed", [1, 2])
async def test_small_calls_of_any_bytes_are_answered_or_end_the_link_and_the_node_lives(
    seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    rng, answered = random.Random(seed), 0
    async with asked_by_an_enemy() as (target, link):
        for _ in range(ROUNDS):
            good = _small(rng) + pack(Text("x"))
            data = rng.choice((good, bent(good, rng), _small(rng) + retyped(pack(Text("x")), rng), rng.randbytes(40)))
            with trio.move_on_after(30.0) as patience:
                try:
                    answered += len(await link.ask(data[:1000])) > 0
                except LinkClosed:
                    break
            # Only a call whose own time is without end may stay without an answer.
            assert not patience.cancelled_caught or b"hostile.small" in data
        assert answered > ROUNDS / 2
        assert target.counters.get("link_bugs", 0) == 0
    assert _bugs(caplog) == []


@pytest.mark.parametrize("seed", [1, 2])
async def test_streams_of_any_bytes_are_refused_in_words_and_the_link_lives(
    seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    rng = random.Random(seed)
    async with asked_by_an_enemy() as (target, link):
        for _ in range(ROUNDS):
            stream = await link.open_stream(rng.choice((PROTOCOL, PROTOCOL, "x")), rng.choice(list(Priority)))
            head = pack(Head("hostile.bulk", rng.choice((5.0, 0.0, -1.0, 1e300)), rng.choice((0, 5, 1 << 60, -1))))
            request = pack(Text("x"))
            good = LENGTH.pack(len(head)) + head + LENGTH.pack(len(request)) + request + b"body"
            head = retyped(head, rng)
            odd = LENGTH.pack(len(head)) + head + LENGTH.pack(len(request)) + request
            data = rng.choice((good, bent(good, rng), odd, rng.randbytes(rng.randrange(60))))
            with trio.move_on_after(20.0):
                try:
                    await stream.send_all(data)
                    if rng.random() < 0.8:
                        await stream.send_eof()
                    while await stream.receive_some():
                        pass
                except RemoteError:
                    pass
            stream.close()
        assert link.alive
        assert await ask(link, SMALL, Text("still there?"), timeout=5) == Text("answer")
        assert target.counters.get("link_bugs", 0) == 0
    assert _bugs(caplog) == []


def _parts(rng: random.Random) -> bytes:
    """An answer on a stream: parts as a server sends them."""
    parts = [(Part.BODY, rng.randbytes(5))] * rng.randrange(3)
    error = pack(CallError(rng.choice(("busy", "expired", "\x1b[2J")), "x" * rng.choice((0, 5000))))
    parts.append(rng.choice(((Part.RESULT, pack(Text("answer"))), (Part.ERROR, error), (Part.RESULT, b""))))
    return b"".join(PART.pack(kind, len(data)) + data for kind, data in parts)


@pytest.mark.parametrize("seed", [1, 2])
async def test_an_answer_on_a_stream_of_any_bytes_is_a_result_or_a_typed_error(seed: int) -> None:
    rng = random.Random(seed)
    async with link_pair(Virtual()) as pair, trio.open_nursery() as nursery:

        async def lie(stream: LinkStream) -> None:
            try:
                await stream.receive_some()
                good = _parts(rng)
                await stream.send_all(rng.choice((good, bent(good, rng), rng.randbytes(30))))
                await stream.send_eof()
            except RemoteError:
                pass

        pair.b.on_stream = lambda stream: nursery.start_soon(lie, stream)
        outcomes: dict[str, int] = {}
        for number in range(ROUNDS):
            try:
                async with exchange(pair.a, BULK, Text("x"), timeout=5.0) as reply:
                    if number % 3 == 0:
                        await reply.read_into(memoryview(bytearray(5)))
                    await reply.result()
                outcome = "ok"
            except RemoteError as error:
                assert str(error).isprintable()
                assert len(str(error)) < 1500
                outcome = type(error).__name__
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
        assert outcomes["ok"] > 10
        assert len(outcomes) >= 3, outcomes
        assert pair.a.alive
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("seed", [1, 2])
async def test_an_answer_to_a_small_call_of_any_bytes_is_a_result_or_a_typed_error(seed: int) -> None:
    rng = random.Random(seed)
    async with link_pair(Virtual()) as pair:

        def lie(link: Link, call: IncomingCall, data: memoryview) -> None:
            good = rng.choice(
                (
                    bytes((Part.RESULT,)) + pack(Text("answer")),
                    bytes((Part.ERROR,)) + pack(CallError("busy", "later")),
                )
            )
            # Not empty: that ends the link (test_callmux.py).
            link.answer(call, rng.choice((good, bent(good, rng) or b"?", b"\0", b"\2", rng.randbytes(5), good[:1])))

        pair.b.on_call = lie
        outcomes: dict[str, int] = {}
        for _ in range(ROUNDS):
            try:
                await ask(pair.a, SMALL, Text("x"), timeout=5.0)
                outcome = "ok"
            except RemoteError as error:
                assert str(error).isprintable()
                outcome = type(error).__name__
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
        assert outcomes["ok"] > 10
        assert len(outcomes) >= 3, outcomes
        assert pair.a.alive


def _bugs(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
