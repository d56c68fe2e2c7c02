"""A swarm in virtual time, and those who lie about the run: nobody gives up its state, joiners find the true one."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import attrs
import pytest
import torch
import trio

from shoal.dht.blobs.ends import MemorySource
from shoal.dht.blobs.messages import (
    CHUNKS,
    INFO,
    LEAVES,
    AskBlob,
    AskChunks,
    AskLeaves,
    BlobInfo,
    Leaves,
    Sent,
)
from shoal.dht.blobs.node import Blobs
from shoal.dht.blobs.store import Store
from shoal.dht.blobs.tree import Part, build_tree
from shoal.dht.kademlia.node import Dht
from shoal.learning import defaults
from shoal.learning.rounds.messages import Certificate, Commit, Signed, instance_key, sign_accept
from shoal.learning.rounds.methods import SAY, WANT, Want
from shoal.learning.sync import (
    BRANCH,
    HEAD,
    VIEW,
    WISH,
    AskBranch,
    AskHead,
    HeadInfo,
    Seen,
    View,
    Wish,
    check_head,
    state_parts,
)
from shoal.learning.trust import TRUST, AskTrust, TrustPage
from shoal.node.node import Founding
from shoal.sim.virtual import VirtualHost
from shoal.sim.world import Member, Scenario, World, simulate
from shoal.transport import defaults as transport_defaults
from shoal.transport.address import Address
from shoal.transport.aead import NOMINAL_CIPHERS
from shoal.transport.endpoint import Endpoint
from shoal.transport.errors import RemoteRefused
from shoal.transport.identity import Identity, PeerId
from shoal.transport.memory import Route
from shoal.transport.rpc import Call

from ..sim import tiny


class Slow(tiny.Pull):
    """Rounds of two virtual seconds: time for those who look around every few seconds."""

    step_seconds: ClassVar[float] = 1.0


def scenario(nodes: int, rounds: int, *, limit: float = 7200.0) -> Scenario:
    return attrs.evolve(tiny.scenario(nodes, rounds), make_task=Slow, limit=limit)


class Stranger:
    """A peer of the network that is in no run, and knows how to speak."""

    def __init__(self, world: World, name: str = "evil") -> None:
        host = VirtualHost(name, world.network, seed=4242)
        host.ciphers = NOMINAL_CIPHERS
        self.name, self.world = name, world
        self.endpoint = Endpoint(host, Identity(host.entropy(32)))
        self.dht = Dht(self.endpoint)

    @property
    def me(self) -> PeerId:
        return self.endpoint.peer_id

    async def enter(self, *, dht: bool = True) -> None:
        """Begin to listen, and meet all members."""
        await self.world.nursery.start(self.endpoint.run, [Address("mem", self.name, 1)])
        if dht:
            self.world.nursery.start_soon(self.dht.run)
        for member in self.world.live():
            for address in member.node.endpoint.addresses():
                await self.endpoint.identify(address)
        if dht:
            await self.dht.bootstrap([a for m in self.world.live() for a in m.node.endpoint.addresses()])


async def known_round(world: World, round: int, *numbers: int) -> None:
    """Wait until these members have had that many rounds."""
    members = [world.members[n] for n in numbers] if numbers else world.live()
    await world.until(
        lambda: all(m.node.run_here is not None and m.run.round >= round for m in members), f"round {round}"
    )


def events(member: Member, what: str) -> list[str]:
    return [event.detail for event in member.events if event.what == what]


def invented(world: World, me: Identity, puppets: list[Identity], *, victim: PeerId | None = None) -> HeadInfo:
    """A head that claims a century of training, agreed by the liar and its puppets."""
    member = world.members[0]
    true = member.run.membership.head.record
    everyone = sorted([me, *puppets], key=lambda identity: identity.peer_id)
    voters = tuple(identity.peer_id for identity in everyone)
    roster = tuple(sorted([*voters, *([victim] if victim else [])]))
    record = attrs.evolve(
        true, round=10_000, kind="reduce", members=voters, samples=(1 << 39,) * len(voters),
        weights=(1,) * len(voters), roster=roster, total=1 << 50,
    )  # fmt: skip
    key = instance_key(record.run, record.round, record.prev, voters)
    accepts = [Signed(i.peer_id, sign_accept(i, key, 0, record.digest).signature) for i in everyone]
    return HeadInfo(
        member.run.signed, record, Certificate(key, 0, tuple(accepts)), voters, (), record.round, b"d" * 32, ()
    )


# --- histories that were invented -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("proof", "names_its_victim"), [("none", False), ("stolen", True), ("endless", False)])
def test_a_stranger_with_a_longer_history_draws_nobody_away_and_no_joiner_to_it(
    proof: str, names_its_victim: bool
) -> None:
    asked = [0, 0]

    async def script(world: World) -> None:
        await known_round(world, 3)
        stranger = Stranger(world)
        puppets = [Identity(bytes([n]) * 32) for n in (201, 202)]
        victim = world.members[1].node.identity.peer_id if names_its_victim else None
        info = invented(world, stranger.endpoint.identity, puppets, victim=victim)
        assert check_head(info, info.record.run, False) is None  # in itself it is sound

        async def head(call: Call[AskHead]) -> HeadInfo:
            asked[0] += 1
            return info

        async def trust(call: Call[AskTrust]) -> TrustPage:
            asked[1] += 1
            run = world.members[0].run
            stolen = (run.membership.head,)
            match proof:
                case "none":
                    raise RemoteRefused("no", "I would rather not")
                case "stolen":
                    return TrustPage(stolen, 1)
                case _:
                    return TrustPage(stolen * defaults.TRUST_PAGE, defaults.MAX_TRUST)

        stranger.endpoint.serve(HEAD, head)
        stranger.endpoint.serve(TRUST, trust)
        await stranger.enter()
        await stranger.dht.provide(world.members[0].run.run_id)
        await world.until(lambda: asked[0] >= 3, "members to ask the stranger", 300.0)
        world.start(3)

    world = simulate(scenario(3, 40), script)
    assert asked[1] >= 1
    assert len({member.run.digest() for member in world.live()}) == 1
    assert len(world.live()) == 4
    for member in world.live():
        assert not events(member, "step-aside")
        assert member.run.membership.head.record.total < 1 << 40
    doubts = [detail for member in world.live() for detail in events(member, "doubted")]
    assert doubts
    assert all("its head is not believed" in doubt for doubt in doubts)


def test_a_member_that_writes_more_samples_into_the_head_is_not_even_listened_to() -> None:
    async def script(world: World) -> None:
        await known_round(world, 2)
        liar = world.members[1].run

        async def head(call: Call[AskHead]) -> HeadInfo:
            true = await liar.membership._on_head(call)
            return attrs.evolve(true, record=attrs.evolve(true.record, total=1 << 50))

        liar.endpoint.serve(HEAD, head)
        world.start(3)
        await known_round(world, 10, 3)

    world = simulate(scenario(3, 25), script)
    assert len({member.run.digest() for member in world.live()}) == 1
    assert not any(events(member, "step-aside") for member in world.live())


def test_a_late_joiner_is_convinced_by_members_the_founder_never_knew() -> None:
    """The founder and all of the first roster have left: what remains is the chain of rosters."""
    lengths: list[int] = []

    async def script(world: World) -> None:
        for number in range(2, 6):
            world.start(number)
            await known_round(world, 3, number)
            world.stop(number - 2)
            await world.until(lambda n=number: world.members[n - 2].ended, "a goodbye")  # type: ignore[misc]
            del world.members[number - 2]
            roster = world.members[number].run.membership.head.record.round
            await known_round(world, roster + 3, number)
        lengths.append(len(world.members[5].run.membership.proofs.trust.own))  # type: ignore[attr-defined]
        world.start(6)
        await known_round(world, 3, 6)

    world = simulate(scenario(2, 70), script)
    assert sorted(world.members) == [4, 5, 6]
    assert len({member.run.digest() for member in world.live()}) == 1
    assert 2 <= lengths[0] <= 6
    for member in world.live():
        assert member.run.store.load_trust()


# --- holders of the state ---------------------------------------------------------------------------------------------

Lie = Callable[[World, Member], None]


def stalls(world: World, member: Member) -> None:
    async def chunks(call: Call[AskChunks]) -> Sent:
        await call.write(bytes(4))
        await trio.sleep_forever()
        raise AssertionError

    member.node.endpoint.serve(CHUNKS, chunks)


def sends(change: Callable[[bytes], bytes]) -> Lie:
    def lie(world: World, member: Member) -> None:
        async def chunks(call: Call[AskChunks]) -> Sent:
            source = member.run.blobs.offered(call.request.blob)
            assert source is not None
            for index in call.request.chunks:
                await call.write(change(bytes(await source.read(index) or b"")))
            return Sent()

        member.node.endpoint.serve(CHUNKS, chunks)

    return lie


def answers(change: Callable[[BlobInfo], BlobInfo]) -> Lie:
    def lie(world: World, member: Member) -> None:
        async def info(call: Call[AskBlob]) -> BlobInfo:
            return change(await member.run.blobs._on_info(call))

        member.node.endpoint.serve(INFO, info)

    return lie


def outlines(**changes: object) -> Lie:
    return answers(lambda info: attrs.evolve(info, outline=attrs.evolve(info.outline, **changes)))


def invents_leaves(world: World, member: Member) -> None:
    async def leaves(call: Call[AskLeaves]) -> Leaves:
        honest = await member.run.blobs._on_leaves(call)
        return Leaves(bytes(len(honest.leaves)))

    member.node.endpoint.serve(LEAVES, leaves)


def lacks_what_it_claims(world: World, member: Member) -> None:
    async def chunks(call: Call[AskChunks]) -> Sent:
        raise RemoteRefused("missing-chunk", "not today")

    member.node.endpoint.serve(CHUNKS, chunks)


def claims_another_digest(world: World, member: Member) -> None:
    async def head(call: Call[AskHead]) -> HeadInfo:
        return attrs.evolve(await member.run.membership._on_head(call), digest=b"x" * 32)

    member.node.endpoint.serve(HEAD, head)


@pytest.mark.parametrize(
    ("lie", "said"),
    [
        (stalls, ""),
        (sends(lambda b: b"\0\0\xc0\x7f" * (len(b) // 4)), "not what its hash says"),
        (sends(lambda b: bytes([b[0] ^ 1]) + b[1:]), "not what its hash says"),
        (sends(lambda b: b[: len(b) // 2]), "a body shorter|not what its hash says"),
        (sends(lambda b: b + b), "longer body|not what its hash says"),
        (outlines(chunk=0), "an outline with chunks of 0 bytes"),
        (outlines(parts=(Part("round", "U8", 8), Part("weights", "F32", 1 << 60))), "an outline with"),
        (outlines(parts=(Part("weights", "F32", 256),) * 2), "repeated label"),
        (outlines(parts=(Part("weights", "F32", -8),)), "a part of -8 bytes"),
        (outlines(parts=(Part("round", "U8", 8), Part("weights", "F32", 128))), "the outline of another blob"),
        (outlines(pages=b"x" * 32), "the outline of another blob"),
        (answers(lambda info: attrs.evolve(info, outline=None)), "no outline, which was asked for"),
        (answers(lambda info: attrs.evolve(info, complete=False, bits=b"\xff" * 9)), "a bitmap of 9 bytes"),
        (invents_leaves, "leaves that are not page 0"),
        (lacks_what_it_claims, ""),
        (claims_another_digest, ""),
    ],
)
def test_a_joiner_leaves_a_holder_that_lies_or_stalls_for_another_one(lie: Lie, said: str) -> None:
    async def script(world: World) -> None:
        await known_round(world, 2)
        # The founder is nearest: its answers come first.
        for number in (1, 2):
            world.network.set_route(f"node{number}", "node3", Route(latency=0.1))
        lie(world, world.members[0])
        joiner = world.start(3)
        await world.until(lambda: joiner.node.run_here is not None and events(joiner, "loaded") != [], "a state", 300.0)

    world = simulate(scenario(3, 30), script)
    joiner = world.members[3]
    # It cost nobody a second try, and no more than a stalled request.
    (loaded,) = events(joiner, "loaded")
    assert float(loaded.split(" in ")[1].split()[0]) < 5.0
    told = [*events(joiner, "state-failed"), *events(joiner, "liar")]
    if said:
        assert any(part in " ".join(told) for part in said.split("|")), told
    assert len({member.run.digest() for member in world.live()}) == 1


# --- branches ---------------------------------------------------------------------------------------------------------


def test_nobody_is_taken_into_a_branch_that_strangers_signed() -> None:
    told: list[str] = []

    async def script(world: World) -> None:
        await known_round(world, 3)
        stranger = Stranger(world)
        await stranger.enter()
        target = world.members[1]
        me, chain = target.node.identity.peer_id, target.run.membership
        helper = Identity(b"h" * 32)
        roster = tuple(sorted([me, stranger.me, helper.peer_id]))
        record = chain._branch_record(roster)  # type: ignore[attr-defined]
        key = instance_key(record.run, record.round, record.prev, roster)
        accepts = tuple(
            Signed(i.peer_id, sign_accept(i, key, 0, record.digest).signature)
            for i in sorted([stranger.endpoint.identity, helper], key=lambda i: i.peer_id)
        )
        commit = Commit(key, record, Certificate(key, 0, accepts))
        await stranger.endpoint.call(me, SAY[Commit], commit)
        assert chain.head.record.kind != "branch"
        # Nor does it sign one, for strangers or for members, while the majority is there.
        other = world.members[2]
        fair = chain._branch_record(tuple(sorted([me, other.node.identity.peer_id])))  # type: ignore[attr-defined]
        for endpoint, wanted in (
            (stranger.endpoint, record),
            (other.node.endpoint, record),
            (other.node.endpoint, fair),
            (other.node.endpoint, attrs.evolve(fair, total=1 << 50)),
            (other.node.endpoint, attrs.evolve(fair, branch=77)),
        ):
            with pytest.raises(RemoteRefused) as caught:
                await endpoint.call(me, BRANCH, AskBranch(wanted))
            told.append(caught.value.code)

    world = simulate(scenario(3, 8), script)
    assert set(told) <= {"bad-branch", "not-stalled", "other-head"}
    assert told[0] in ("bad-branch", "other-head")
    assert not any(events(member, "branch") for member in world.live())
    assert len({member.run.digest() for member in world.live()}) == 1


# --- floods -----------------------------------------------------------------------------------------------------------


def test_wishes_of_many_are_bounded_and_cannot_take_the_majority() -> None:
    """Forty keys wish to join and then do nothing at all."""
    sizes: list[int] = []

    async def script(world: World) -> None:
        await known_round(world, 3)
        run = world.members[0].run
        roster = run.membership.members()
        for number in range(40):
            stranger = Stranger(world, f"evil{number}")
            await stranger.enter(dht=False)
            wish = Wish(run.run_id, False, stranger.endpoint.record())
            goodbye = Wish(run.run_id, True, stranger.endpoint.record())
            for peer in roster:
                await stranger.endpoint.call(peer, WISH, goodbye)
                await stranger.endpoint.call(peer, WISH, wish)
        assert not run.membership.leaving()
        sizes.append(len(run.membership.wishes()))
        before = run.round
        await known_round(world, before + 10)

        def hook(member: Member, event: object) -> None:
            sizes.append(len(member.run.membership.members()))

        world.hooks.append(hook)

    world = simulate(scenario(3, 30), script)
    assert max(sizes) <= defaults.MAX_WISHES
    assert len({member.run.digest() for member in world.live()}) == 1
    assert not any(events(member, "branch") for member in world.live())


def test_a_flood_of_invented_members_in_a_gossip_swarm_is_bounded_and_rounds_go_on() -> None:
    async def script(world: World) -> None:
        await known_round(world, 3)
        stranger = Stranger(world)
        await stranger.enter()
        run = world.members[0].run
        for wave in range(4):
            seen = tuple(
                Seen(Identity(wave.to_bytes(16, "big") + n.to_bytes(16, "big")).peer_id, 1 << 39) for n in range(600)
            )
            for member in world.live():
                view = View(run.run_id, seen, ())
                await stranger.endpoint.call(member.node.identity.peer_id, VIEW, view)
        huge = View(run.run_id, seen * 2, ())
        with pytest.raises(RemoteRefused, match="too-large"):
            await stranger.endpoint.call(world.members[0].node.identity.peer_id, VIEW, huge)
        for member in world.live():
            assert len(member.run.membership.members()) <= defaults.MAX_VIEW

    founding = Founding(strategy="noloco", min_peers=4, rounds=12)
    scenario = Scenario(4, founding, make_task=tiny.Pull, route=Route(latency=tiny.LATENCY), limit=36_000.0)
    world = simulate(scenario, script)
    assert all(member.run.round >= 12 for member in world.live())


def test_a_joiner_of_a_gossip_swarm_follows_the_many_and_not_the_one_that_is_far_ahead() -> None:
    asked: list[PeerId] = []

    async def script(world: World) -> None:
        await known_round(world, 2)
        stranger = Stranger(world)
        lie = attrs.evolve(invented(world, stranger.endpoint.identity, []), settled=10_000)
        prev = lie.record.run
        record = attrs.evolve(lie.record, prev=prev)
        key = instance_key(prev, record.round, prev, lie.voters)
        accept = sign_accept(stranger.endpoint.identity, key, 0, record.digest)
        certificate = Certificate(key, 0, (Signed(stranger.me, accept.signature),))
        lie = attrs.evolve(lie, record=record, certificate=certificate, view=(Seen(stranger.me, 10_000),))
        assert check_head(lie, prev, True) is None

        async def head(call: Call[AskHead]) -> HeadInfo:
            asked.append(call.peer)
            return attrs.evolve(lie, digest=digest)

        poison = torch.full((tiny.SIZE,), 666.0)
        parts = state_parts(10_000, {"weights": poison})
        tree = build_tree(parts)
        digest = tree.id
        Blobs(stranger.endpoint, stranger.dht, Store(None)).offer(MemorySource(tree, [data for _, _, data in parts]))
        stranger.endpoint.serve(HEAD, head)
        await stranger.enter()
        await stranger.dht.provide(prev)
        joiner = world.start(4)
        await world.until(lambda: joiner.node.run_here is not None and joiner.run.round > 0, "a round", 600.0)
        assert joiner.run.round < 100

    founding = Founding(strategy="noloco", min_peers=4, rounds=15)
    world = simulate(Scenario(4, founding, make_task=Slow, route=Route(latency=tiny.LATENCY), limit=36_000.0), script)
    assert world.members[4].node.identity.peer_id in asked
    assert all(15 <= member.run.round < 100 for member in world.live())


def test_calls_that_some_peers_leave_hanging_keep_nobody_else_from_being_heard() -> None:
    async def script(world: World) -> None:
        await known_round(world, 2)
        victim = world.members[0]
        run, me = victim.run, victim.node.identity.peer_id

        async def hang(stranger: Stranger) -> None:
            try:
                await stranger.endpoint.call(me, WANT, Want(b"?" * 32, 0, 0, 0, 1, b""), timeout=1000.0)
            except RemoteRefused:
                pass

        strangers = [Stranger(world, f"evil{n}") for n in range(10)]
        for stranger in strangers:
            await stranger.enter(dht=False)
        async with trio.open_nursery() as nursery:
            for stranger in strangers:
                for _ in range(transport_defaults.MAX_CALLS_PER_PEER):
                    nursery.start_soon(hang, stranger)
            await trio.sleep(1.0)
            active = victim.node.endpoint._server.active()
            assert active >= transport_defaults.MAX_CALLS - 10
            honest = Stranger(world, "honest")
            await honest.enter(dht=False)
            info = await honest.endpoint.call(me, HEAD, AskHead(run.run_id), timeout=2.0)
            assert info.record.run == run.run_id

    simulate(scenario(3, 15), script)


# --- silence ----------------------------------------------------------------------------------------------------------


def test_who_connects_and_says_nothing_is_shut_out_after_the_deadline_of_a_handshake(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "shoal.transport")
    closed: list[float] = []

    async def script(world: World) -> None:
        await known_round(world, 2)
        network = VirtualHost("mute", world.network, seed=1).network
        began = trio.current_time()
        stream = await network.dial(world.members[0].node.endpoint.addresses()[0])
        try:
            heard = await stream.receive_some()
        except trio.BrokenResourceError:
            heard = b""
        assert heard == b""
        closed.append(trio.current_time() - began)
        await stream.aclose()

    simulate(scenario(3, 12), script)
    assert transport_defaults.HANDSHAKE_FLOOR <= closed[0] <= transport_defaults.HANDSHAKE_FLOOR + 1.0
    assert "no handshake: it connected and says nothing within 8.0 s" in caplog.text
