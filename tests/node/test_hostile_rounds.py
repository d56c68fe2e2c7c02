"""Whole nodes in virtual time: what strangers and members may not do to a round is refused by name; it goes on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import pytest
import torch
import trio

from shoal.learning import defaults
from shoal.learning.exchange import Contribution
from shoal.learning.reduce.slices import Slice
from shoal.learning.rounds.actions import Share
from shoal.learning.rounds.bounded import MAX_REASON
from shoal.learning.rounds.claims import Accuse, Denied, Missing, Proof, Receipt, Receipts
from shoal.learning.rounds.decisions import roster_room
from shoal.learning.rounds.instance import Instance
from shoal.learning.rounds.messages import (
    MAX_SAMPLES,
    Accept,
    Accepted,
    Ask,
    Certificate,
    Commit,
    CommitRecord,
    Convene,
    Decided,
    Fetch,
    Freeze,
    Held,
    Plan,
    Products,
    Progress,
    Propose,
    Ready,
    Reject,
    Signed,
    Waiting,
    members_hash,
    quorum,
    sign_accept,
)
from shoal.learning.rounds.methods import SAY, SCATTER, SHARE, WANT, Scatter, Shared, Want
from shoal.learning.rounds.payloads import Payload
from shoal.learning.state import bytes_view
from shoal.sim.world import World, simulate
from shoal.transport.endpoint import Endpoint
from shoal.transport.errors import RemoteError, RemoteRefused
from shoal.transport.frames import Priority
from shoal.transport.identity import PeerId
from shoal.transport.rpc import LENGTH, PART, PROTOCOL, Head, Method
from shoal.transport.wire import pack

from ..sim import tiny
from .test_hostile_run import Stranger, events, known_round, scenario


async def open_round(world: World, number: int = 0) -> Instance:
    """A round of a member that is not decided yet, with time left to spoil it."""
    run = world.members[number].run
    # The next round just begun: all of its training is still to come.
    old = run._instance
    await world.until(
        lambda: run._instance is not None and run._instance is not old and run.phase == "train", "training"
    )
    assert run._instance is not None
    assert run._instance.commit is None
    return run._instance


async def refusal(
    endpoint: Endpoint, peer: PeerId, method: Method, request: object, body: Sequence[memoryview] | None = None
) -> tuple[str, str]:
    with pytest.raises(RemoteRefused) as caught:
        await endpoint.call(peer, method, request, body=body, timeout=20.0)
    return caught.value.code, caught.value.reason


def record_of(world: World, instance: Instance) -> CommitRecord:
    head = world.members[0].run.membership.head.record
    members = instance.voters
    return attrs.evolve(
        head, round=instance.round, kind="reduce", prev=head.digest, members=members, samples=(1,) * len(members),
        weights=(1,) * len(members), roster=members, total=head.total + len(members), reason="forged",
    )  # fmt: skip


def everything(key: bytes, record: CommitRecord, me: PeerId) -> list[object]:
    """One message of every kind that a round knows, but a commit."""
    owner = (Slice(0, tiny.SIZE, me),)
    return [
        Ready(key, record.round, 0, True, 1, 1, tiny.SIZE, Accepted(9, record), True, ""),
        Ready(key, record.round, 0, True, 1, 1, 0, None, False, "", payload=Payload(b"mine", bytes(64))),
        Waiting(key, 0, (), "wait for me"),
        Convene(key, record.round, 5),
        Plan(key, 0, 0, (me,), (1,), (1,), (me,), owner, tiny.SIZE, "mine"),
        Held(key, 0, 0, (me,), b"s" * 64),
        Freeze(key, 0, 0, (me,)),
        Products(key, 0, 0, members_hash((me,)), bytes(8)),
        Decided(key, 0, 0, members_hash((me,)), (bytes(8),), bytes(8)),
        Ask(key, 0, 0),
        Progress(key, 0, 0, (0,), b"n" * 16, ()),
        Fetch(key, 0, 0, 0, me),
        Propose(key, 0, record, (me,)),
        Accept(key, 0, record.digest, b"s" * 64),
        Reject(key, 0, 900, "no"),
        Accuse(key, 0, 0, 0, 0),
        Proof(key, b"proof"),
        Missing(key, 0, 0, me),
        Receipts(key, 0, 0, me, (Receipt(0, 16, "fp32", bytes(32), bytes(64)),)),
        Denied(key, 0, 0, me, me),
    ]


def sound(world: World, without: tuple[str, ...] = ()) -> None:
    """All members did all rounds together; only those ``without`` whom it may be were left out of one."""
    assert len({member.run.digest() for member in world.live()}) == 1
    for member in world.live():
        assert not any(events(member, what) for what in ("step-aside", "branch", "out-of-step"))
        left_out = [m.peer for m in world.live() for report in member.run.reports if m.peer not in report.members]
        assert tuple(left_out) in ((), without)
        assert all(report.retries == 0 for report in member.run.reports)


def test_strangers_have_no_say_in_a_round() -> None:
    told: dict[str, tuple[str, str]] = {}

    async def script(world: World) -> None:
        await known_round(world, 2)
        stranger = Stranger(world)
        await stranger.enter()
        me = world.members[0].node.identity.peer_id
        instance = await open_round(world)
        record, vector = record_of(world, instance), torch.ones(tiny.SIZE)
        async with trio.open_nursery() as nursery:

            async def say(name: str, method: Method, request: object, body: Sequence[memoryview] | None = None) -> None:
                told[name] = await refusal(stranger.endpoint, me, method, request, body)

            for message in everything(instance.key, record, stranger.me):
                nursery.start_soon(say, type(message).__name__, SAY[type(message)], message)
            body = [bytes_view(vector)]
            nursery.start_soon(say, "Scatter", SCATTER, Scatter(instance.key, 0, tiny.SIZE), body)
            shared = Shared(instance.key, 0, 0, 0, 0, tiny.SIZE, b"m" * 16)
            nursery.start_soon(say, "Shared", SHARE, shared, body)
            # It signs a commit for itself, and one in the names of the voters.
            key, own = instance.key, sign_accept(stranger.endpoint.identity, instance.key, 0, record.digest).signature
            for name, signers in (("own", (stranger.me,)), ("others'", instance.voters), ("no", ())):
                certificate = Certificate(key, 0, tuple(Signed(peer, own) for peer in signers))
                nursery.start_soon(say, f"Commit with {name} names", SAY[Commit], Commit(key, record, certificate))

    world = simulate(scenario(3, 6), script)
    assert len(told) == 19 + 2 + 3
    for name, (code, reason) in told.items():
        if name.startswith("Commit"):
            assert code == "bad-certificate"
            assert any(part in reason for part in ("no voter", "wrong signature", f"0 accepts, {quorum(3)} needed"))
        else:
            assert (code, "is no voter of round" in reason) == ("not-a-voter", True), name
    sound(world)


def test_absurd_contributions_of_a_member_are_refused_and_the_round_goes_on() -> None:
    told: dict[str, tuple[str, str]] = {}
    size = tiny.SIZE

    async def script(world: World) -> None:
        await known_round(world, 2)
        me, endpoint = world.members[0].node.identity.peer_id, world.members[1].node.endpoint
        instance = await open_round(world)
        good, nan, infinite = torch.ones(size), torch.ones(size), torch.ones(size)
        nan[5], infinite[9] = float("nan"), float("-inf")
        most = instance.setting.max_length
        ranges = {
            "backwards": (size, 0),
            "empty": (7, 7),
            "before the start": (-16, 16),
            "beyond the end": (0, most + 1),
            "astronomical": (0, 1 << 62),
        }
        for name, (start, stop) in ranges.items():
            told[name] = await refusal(endpoint, me, SCATTER, Scatter(instance.key, start, stop), [bytes_view(good)])
        for name, vector in (("nan", nan), ("infinite", infinite)):
            told[name] = await refusal(endpoint, me, SCATTER, Scatter(instance.key, 0, size), [bytes_view(vector)])
        short = [bytes_view(good)[:100]]
        told["short"] = await refusal(endpoint, me, SCATTER, Scatter(instance.key, 0, size), short)
        # More than twice the vector, piece by piece.
        piece = most // 4
        big = torch.zeros(piece)
        for part in range(8):
            await_range = Scatter(instance.key, part % 4 * piece, (part % 4 + 1) * piece)
            try:
                await endpoint.call(me, SCATTER, await_range, body=[bytes_view(big)], timeout=20.0)
            except RemoteRefused as error:
                told["volume"] = error.code, error.reason
        for want in (Want(instance.key, 0, 0, 0, 1 << 62, b""), Want(instance.key, 9, 9, 0, 16, b"")):
            told[f"want {want.stop}"] = await refusal(endpoint, me, WANT, want)
        other = Shared(instance.key, 0, 0, 0, 0, 1 << 62, b"m" * 16)
        told["shared"] = await refusal(endpoint, me, SHARE, other, [bytes_view(good)])

    world = simulate(scenario(3, 6), script)
    for name in ("backwards", "empty", "before the start", "beyond the end", "astronomical", "volume", "shared"):
        assert told[name][0] == "bad-range", name
    for name in ("nan", "infinite"):
        code, reason = told[name]
        assert code == "not-finite"
        assert "your contribution of round" in reason
    assert told["short"][0] in ("failed", "bad_request")
    assert "a body with 100 bytes left, 256 expected" in told["short"][1]
    assert told["want 16"][0] == "not-held"
    # It has used up what a contributor may send, so that round was without it: the next ones were not.
    sound(world, without=(world.members[1].peer,))


def test_an_owner_cannot_change_a_combined_slice_after_it_has_arrived() -> None:
    """It begins to send its slice, sends the slice in another call, and ends the first one with other numbers."""
    told: list[str] = []

    async def script(world: World) -> None:
        await known_round(world, 2)
        instance = await open_round(world, 2)
        liar, traffic = world.members[2].run, instance.traffic
        real = traffic._share

        async def share(action: Share) -> None:
            plan, frozen, part = instance.voter.plan, instance.voter.frozen, instance.buffers.coded[action.index]
            assert plan is not None and frozen is not None
            start, stop = plan.slices[action.index].range
            members = members_hash(frozen.members)
            request = Shared(instance.key, action.attempt, action.epoch, action.index, start, stop, members)
            link = liar.endpoint.link(action.receiver)
            assert link is not None
            stream = await link.open_stream(PROTOCOL, Priority.BULK)
            head, message = pack(Head(SHARE.name, 60.0, len(part.data))), pack(request)
            await stream.send_all(LENGTH.pack(len(head)) + head + LENGTH.pack(len(message)) + message)
            await stream.send_all(part.data[:4])
            await trio.sleep(0.1)
            await real(action)
            try:
                await stream.send_all(b"\x7f" * (len(part.data) - 4))
                kind, size = PART.unpack(await stream.read_exactly(PART.size))
                told.append(bytes(await stream.read_exactly(size)).decode(errors="replace") if kind else "")
            except RemoteError as error:
                told.append(str(error))

        traffic._share = share  # type: ignore[method-assign]

    world = simulate(scenario(3, 6), script)
    assert told
    assert len({member.run.digest() for member in world.live()}) == 1
    for member in world.live():
        # Nobody found that its state, made of an agreed result, was not that of the others.
        assert not any(event.round and event.what in ("diverged", "loaded") for event in member.events)


def test_a_contribution_that_is_not_finite_leaves_its_peer_out_of_that_round_only() -> None:
    """A member whose training gives NaN and that sends it all the same."""

    async def script(world: World) -> None:
        await known_round(world, 2)
        liar = world.members[2].run
        original = liar.agree

        async def agree(given: Contribution) -> torch.Tensor:
            instance = liar._instance
            assert instance is not None
            liar.agree = original  # type: ignore[method-assign]
            liar.emit("convene", "spoilt")
            real = instance.begin

            def begin(offered: torch.Tensor, *rest: Any) -> None:
                real(offered * float("nan"), *rest)

            instance.begin = begin  # type: ignore[method-assign,assignment]
            return await original(given)

        liar.agree = agree  # type: ignore[method-assign]

    world = simulate(scenario(3, 12), script)
    assert len({member.run.digest() for member in world.live()}) == 1
    (round,) = [event.round for event in world.members[2].events if event.what == "spoilt"]
    liar = world.members[2].peer
    for report in world.members[0].run.reports:
        assert (liar in report.members) == (report.round != round), report
    refused = [e for m in world.live() for e in m.events if (e.phase, e.what) == ("scatter", "not-finite")]
    assert {event.peer for event in refused} == {liar}
    assert {event.round for event in refused} == {round}
    assert torch.isfinite(world.members[0].run.weights()).all()


@pytest.mark.parametrize(
    "changes", [{"samples": MAX_SAMPLES + 1}, {"samples": (1 << 63) - 1}, {"weight": 1 << 62}, {"why": "x" * 9999}]
)
def test_a_member_that_offers_absurd_numbers_only_stays_out(changes: dict[str, object]) -> None:
    async def script(world: World) -> None:
        await known_round(world, 2)
        liar = world.members[2].run
        instance = await open_round(world, 2)
        honest = Ready(instance.key, instance.round, 0, True, 1, 1, tiny.SIZE, None, False, "")
        false = object.__new__(Ready)
        for field in attrs.fields(Ready):
            object.__setattr__(false, field.name, changes.get(field.name, getattr(honest, field.name)))
        for number in (0, 1):
            peer = world.members[number].node.identity.peer_id
            code, reason = await refusal(liar.endpoint, peer, SAY[Ready], false)
            assert code == "bad_request"
            assert "Ready does not decode" in reason

    sound(simulate(scenario(3, 6), script))


def test_reasons_that_would_fill_memory_or_command_a_terminal_do_not_travel() -> None:
    key = b"k" * 32
    for reason in ("x" * (MAX_REASON + 1), "\x1b]0;owned\x07", "two\nlines"):
        for make in (lambda r: Waiting(key, 0, (), r), lambda r: Reject(key, 0, 0, r)):
            with pytest.raises(ValueError, match="too long or holds control characters"):
                make(reason)


def test_messages_for_rounds_that_do_not_exist_wait_in_bounded_number() -> None:
    codes: list[str] = []
    kept: list[int] = []

    async def script(world: World) -> None:
        await known_round(world, 2)
        stranger = Stranger(world)
        await stranger.enter()
        me = world.members[0].node.identity.peer_id

        async def say(number: int) -> None:
            try:
                await stranger.endpoint.call(me, SAY[Convene], Convene(number.to_bytes(32, "big"), 1, 1), timeout=30.0)
            except RemoteError as error:
                codes.append(getattr(error, "code", type(error).__name__))

        async with trio.open_nursery() as nursery:
            for number in range(240):
                nursery.start_soon(say, number)
        kept.append(len(world.members[0].run.hub._early))

    sound(simulate(scenario(3, 8), script))
    assert codes == []  # heard, and forgotten: a round that begins may want the last few
    assert kept == [defaults.MAX_EARLY_OF_PEER]


def test_newcomers_never_outvote_those_who_did_the_round() -> None:
    assert [roster_room(proven, 256) for proven in (1, 2, 3, 4, 8)] == [2, 3, 5, 7, 15]
    for proven in range(2, 200):
        assert quorum(roster_room(proven, 256)) <= proven
    assert roster_room(100, 64) == 64
