"""A hostile peer over the real RPC: what it sends is refused, counted against it, and nobody else notices."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import attrs
import pycrdt
import pytest
import trio

from shoal.dht.documents import defaults, messages
from shoal.dht.documents.envelope import NOTHING, Envelope, Evidence, client_id
from shoal.dht.documents.messages import (
    Advert,
    Branches,
    Compare,
    Compared,
    Fetched,
    FetchRanges,
    FollowPeer,
    Leaves,
    Node,
    Proofs,
    PushEnvelopes,
    PushEvidence,
    Sent,
    TellEnvelopes,
    Told,
    Want,
)
from shoal.dht.documents.replica import Range
from shoal.transport.address import Address
from shoal.transport.endpoint import Endpoint
from shoal.transport.errors import RemoteError, RemoteRefused
from shoal.transport.identity import Identity, PeerId
from shoal.transport.rpc import Call

from ..kademlia.conftest import VirtualHost
from .doc_swarm import SCOPE, SPEC, DocNode, DocSwarm, doc_swarm, put

LIFE = 86400.0


class Enemy:
    """An endpoint with a key, linked with all nodes, and with whatever it wants to say."""

    def __init__(self, swarm: DocSwarm, name: str = "enemy") -> None:
        self.host = VirtualHost(swarm.world.network(name), f"{swarm.seed} {name}")
        self.identity = Identity(random.Random(name).randbytes(32))
        self.endpoint = Endpoint(self.host, self.identity)
        self.swarm = swarm
        self.address = Address("mem", name, 1)

    @property
    def peer(self) -> PeerId:
        return self.identity.peer_id

    async def enter(self, *, member: bool) -> None:
        await self.swarm._nursery.start(self.endpoint.run, [self.address])
        if member:
            self.swarm.known[self.peer] = None
        for node in self.swarm.nodes.values():
            self.endpoint.learn(node.endpoint.record())
            node.endpoint.learn(self.endpoint.record())

    def update(self, incarnation: int = 1, *, author: PeerId | None = None, **values: Any) -> bytes:
        doc: pycrdt.Doc[Any] = pycrdt.Doc(client_id=client_id(author or self.peer, SPEC.id, incarnation))
        put(**(values or {"x": 1}))(doc)
        return doc.get_update()

    def envelope(self, update: bytes | None = None, **fields: Any) -> Envelope:
        given: dict[str, Any] = {
            "incarnation": 1,
            "counter": 0,
            "previous": NOTHING,
            "expires": self.host.wall() + LIFE,
        }
        return Envelope.sign(self.identity, SPEC.id, self.update() if update is None else update, **(given | fields))

    async def push(self, node: DocNode, *envelopes: Envelope, hop: int = 1) -> tuple[str, ...]:
        sent = tuple(Sent(envelope, hop) for envelope in envelopes)
        answer = await self.endpoint.call(node.peer, messages.PUSH, PushEnvelopes(SCOPE, sent), timeout=10)
        return answer.codes


def faults(node: DocNode, peer: PeerId) -> dict[str, int]:
    return {str(fault): count for fault, count in node.documents.faults().get(peer, {}).items()}


async def still_well(swarm: DocSwarm, nodes: Sequence[DocNode]) -> None:
    """Writes of honest nodes reach all, nothing is lost, and nobody honest is blamed."""
    before = {node.name: node.document.read() for node in nodes}
    for number, node in enumerate(nodes):
        await node.document.write(put(well=number))
    await swarm.until(
        lambda: all(node.value(author, "well") == number for number, author in enumerate(nodes) for node in nodes)
    )
    await swarm.until(lambda: swarm.agree(nodes))
    for node in nodes:
        now = node.document.read()
        assert all(author in now for author in before[node.name] if author in swarm.known and author != ENEMY)
        assert not any(node.documents.faults().get(other.peer) for other in nodes)


ENEMY = Identity(random.Random("enemy").randbytes(32)).peer_id


async def three(swarm: DocSwarm, *, member: bool) -> tuple[list[DocNode], Enemy]:
    nodes = await swarm.grow(3)
    await trio.sleep(5)
    for node in nodes:
        await node.document.write(put(x=0))
    await swarm.until(swarm.agree)
    enemy = Enemy(swarm)
    await enemy.enter(member=member)
    await trio.sleep(5)
    return nodes, enemy


async def test_forged_envelopes_are_refused_and_counted_against_their_sender() -> None:
    async with doc_swarm() as swarm:
        nodes, enemy = await three(swarm, member=True)
        victim = nodes[1]
        real = nodes[0].document.replica.envelopes(nodes[0].peer, *_span(nodes[0]))[0]
        forged = [
            attrs.evolve(enemy.envelope(incarnation=1 << 50), author=victim.peer),
            attrs.evolve(real, update=enemy.update(author=nodes[0].peer), counter=1),
            attrs.evolve(real, expires=real.expires + 1),
            attrs.evolve(enemy.envelope(), signature=bytes(64)),
        ]
        for number, envelope in enumerate(forged):
            assert await enemy.push(nodes[0], envelope) == ("invalid",), number
        assert faults(nodes[0], enemy.peer) == {"invalid": len(forged)}
        assert faults(nodes[0], victim.peer) == {}
        await still_well(swarm, nodes)


def _span(node: DocNode) -> tuple[int, int, int]:
    held = node.document.replica.range_of(node.peer)
    assert held is not None
    return held.incarnation, held.first, held.next


async def test_a_peer_that_keeps_forging_is_not_heard_any_more_and_is_nobodys_neighbour() -> None:
    async with doc_swarm() as swarm:
        nodes, enemy = await three(swarm, member=True)
        forged = attrs.evolve(enemy.envelope(), signature=bytes(64))
        for _ in range(defaults.STRIKES):
            assert await enemy.push(nodes[0], forged) == ("invalid",)
        assert faults(nodes[0], enemy.peer)["invalid"] == defaults.STRIKES
        assert enemy.peer not in nodes[0].documents.neighbours(SCOPE)
        with pytest.raises(RemoteRefused, match="misbehaved"):
            await enemy.push(nodes[0], enemy.envelope())
        await still_well(swarm, nodes)
        await trio.sleep(defaults.MUTED_FOR)
        assert await enemy.push(nodes[0], enemy.envelope()) == ("kept",), "but not for ever: it may have been a bug"


async def test_replayed_envelopes_are_refused_and_counted() -> None:
    async with doc_swarm() as swarm:
        nodes, enemy = await three(swarm, member=True)
        mine = enemy.envelope()
        assert await enemy.push(nodes[0], mine) == ("kept",)
        for _ in range(5):
            assert await enemy.push(nodes[0], mine) == ("duplicate",)
        assert faults(nodes[0], enemy.peer) == {"replay": 5}
        for turn in range(defaults.COMPACT_ENVELOPES + 1):
            await nodes[1].document.write(put(turn=turn))
            if turn == 0:
                old = nodes[1].document.replica.envelopes(nodes[1].peer, *_span(nodes[1]))[-1]
            await trio.sleep(0.6)
        await swarm.until(lambda: swarm.agree(nodes))
        assert await enemy.push(nodes[2], old) in (("stale",), ("duplicate",))
        assert nodes[2].value(nodes[1], "turn") == defaults.COMPACT_ENVELOPES
        await still_well(swarm, nodes)


async def test_oversized_envelopes_and_calls_are_refused() -> None:
    async with doc_swarm() as swarm:
        nodes, enemy = await three(swarm, member=True)
        huge = enemy.envelope(bytes(defaults.MAX_UPDATE + 1))
        assert await enemy.push(nodes[0], huge) == ("invalid",)
        with pytest.raises(RemoteRefused, match="too-large"):
            await enemy.push(nodes[0], *[enemy.envelope()] * (defaults.MAX_SENT + 1))
        advert = Advert(SPEC.id, enemy.peer, 1, 0, bytes(32))
        with pytest.raises(RemoteRefused, match="too-large"):
            await enemy.endpoint.call(
                nodes[0].peer, messages.TELL, TellEnvelopes(SCOPE, (advert,) * (defaults.MAX_ADVERTS + 1)), timeout=10
            )
        assert faults(nodes[0], enemy.peer) == {"invalid": 1, "nonsense": 2}
        await still_well(swarm, nodes)


async def test_an_author_who_may_not_write_is_refused() -> None:
    async with doc_swarm() as swarm:
        nodes, enemy = await three(swarm, member=False)
        assert await enemy.push(nodes[0], enemy.envelope()) == ("unwelcome",)
        assert faults(nodes[0], enemy.peer) == {"foreign": 1}
        assert enemy.peer not in nodes[0].document.read()
        await still_well(swarm, nodes)


async def test_changes_in_the_name_of_another_and_bombs_are_garbage() -> None:
    bomb: Any = 1
    for _ in range(500):
        bomb = [bomb]
    async with doc_swarm() as swarm:
        nodes, enemy = await three(swarm, member=True)
        foreign = enemy.envelope(enemy.update(author=nodes[1].peer))
        assert await enemy.push(nodes[0], foreign) == ("garbage",)
        nested = enemy.envelope(enemy.update(2, bomb=bomb), incarnation=2)
        assert await enemy.push(nodes[0], nested) == ("garbage",)
        noise = enemy.envelope(random.Random(1).randbytes(400), incarnation=3)
        assert await enemy.push(nodes[0], noise) == ("garbage",)
        assert faults(nodes[0], enemy.peer) == {"garbage": 3}
        await still_well(swarm, nodes)


async def test_a_fork_sent_to_two_sides_is_proven_to_everybody() -> None:
    async with doc_swarm() as swarm:
        nodes, enemy = await three(swarm, member=True)
        proofs: dict[str, list[Evidence]] = {node.name: [] for node in nodes}
        for node in nodes:
            node.documents.on_evidence(SCOPE, lambda document, evidence, name=node.name: proofs[name].append(evidence))
        one, other = enemy.envelope(enemy.update(x=1)), enemy.envelope(enemy.update(x=2))
        codes = await enemy.push(nodes[0], one) + await enemy.push(nodes[1], other)
        assert "kept" in codes
        await swarm.until(lambda: all(proofs.values()))
        for node in nodes:
            (evidence, *_) = proofs[node.name]
            evidence.check()
            assert evidence.author == enemy.peer
            assert enemy.peer not in node.document.read()
        assert sum(faults(node, enemy.peer).get("fork", 0) for node in nodes) >= 1
        assert await enemy.push(nodes[2], one) in (("frozen",), ("duplicate",))
        await still_well(swarm, nodes)


async def test_both_branches_of_a_fork_at_once_count_against_the_sender_and_a_false_proof_does_too() -> None:
    async with doc_swarm() as swarm:
        nodes, enemy = await three(swarm, member=True)
        one, other = enemy.envelope(enemy.update(x=1)), enemy.envelope(enemy.update(x=2))
        assert await enemy.push(nodes[0], one, other) == ("kept", "fork")
        assert faults(nodes[0], enemy.peer) == {"fork": 1}
        real = nodes[1].document.replica.envelopes(nodes[1].peer, *_span(nodes[1]))[0]
        lie = Evidence(real.header, attrs.evolve(real.header, content=bytes(32)))
        answer = await enemy.endpoint.call(nodes[0].peer, messages.ACCUSE, PushEvidence(SCOPE, (lie,)), timeout=10)
        assert answer.codes == ("invalid",)
        assert faults(nodes[0], enemy.peer) == {"fork": 1, "false-proof": 1}
        await still_well(swarm, nodes)


async def test_a_flood_is_limited_and_others_are_served() -> None:
    async with doc_swarm() as swarm:
        nodes, enemy = await three(swarm, member=True)
        refused = served = 0

        async def ask_and_ask() -> None:
            nonlocal refused, served
            for _ in range(100):
                try:
                    await enemy.endpoint.call(
                        nodes[0].peer, messages.COMPARE, Compare(SCOPE, (Node(SPEC.id, b"", b""),)), timeout=10
                    )
                    served += 1
                except RemoteRefused as error:
                    assert error.code == "rate"
                    refused += 1

        async with trio.open_nursery() as nursery:
            for _ in range(15):
                nursery.start_soon(ask_and_ask)
        assert refused > served
        assert faults(nodes[0], enemy.peer) == {"flood": refused}
        await still_well(swarm, nodes)


async def test_a_flood_of_envelopes_of_ever_new_authors_is_limited() -> None:
    async with doc_swarm() as swarm:
        nodes, enemy = await three(swarm, member=True)
        codes: list[str] = []
        for number in range(50):
            crowd = []
            for each in range(defaults.MAX_SENT):
                enemy.identity = Identity(random.Random(f"{number} {each}").randbytes(32))
                crowd.append(enemy.envelope(b""))
            codes += await enemy.push(nodes[0], *crowd)
        assert codes.count("limit") > 500
        assert set(codes) == {"unwelcome", "limit"}
        await still_well(swarm, nodes)


async def test_what_is_promised_and_not_given_is_counted_and_fetched_elsewhere() -> None:
    async with doc_swarm() as swarm:
        nodes, enemy = await three(swarm, member=True)

        async def nothing(call: Call[Any]) -> Fetched:
            return Fetched((), False)

        enemy.endpoint.serve(messages.FETCH, nothing)
        lies = tuple(
            Advert(SPEC.id, nodes[1].peer, _span(nodes[1])[0], 5 + number, bytes([number]) * 32) for number in range(9)
        )
        await enemy.endpoint.call(nodes[0].peer, messages.TELL, TellEnvelopes(SCOPE, lies), timeout=10)
        await swarm.until(lambda: bool(faults(nodes[0], enemy.peer)))
        assert faults(nodes[0], enemy.peer) == {"empty-promise": 1}
        await still_well(swarm, nodes)


LIES: list[Compared | Proofs | Fetched] = [
    Compared((), (Leaves(bytes(32), b"", ()),), False),
    Compared((Branches(SPEC.id, b"", (b"",) * 16),), (), False),
    Compared((Branches(SPEC.id, b"\3", (b"x",) * 99),), (), True),
    Compared((), (), True),
]


@pytest.mark.parametrize("lie", LIES, ids=range(len(LIES)))
async def test_a_liar_that_is_reconciled_with_is_counted_or_believed_to_be_equal(lie: Compared) -> None:
    async with doc_swarm() as swarm:
        nodes, enemy = await three(swarm, member=True)

        async def compare(call: Call[Compare]) -> Compared:
            return lie

        enemy.endpoint.serve(messages.COMPARE, compare)
        for node in nodes:
            with trio.move_on_after(60):
                try:
                    await node.documents.reconcile(SCOPE, enemy.peer)
                except RemoteError:
                    assert set(faults(node, enemy.peer)) == {"nonsense"}
        await still_well(swarm, nodes)


async def test_a_liar_that_claims_ever_more_and_gives_junk_costs_a_bounded_time() -> None:
    async with doc_swarm() as swarm:
        nodes, enemy = await three(swarm, member=True)
        asked = 0

        async def compare(call: Call[Compare]) -> Compared:
            claims = tuple(Range(node.peer, 1 << 60, 0, 1 << 30, bytes(32), False) for node in nodes)
            return Compared((), (Leaves(SPEC.id, b"", claims),), False)

        async def ranges(call: Call[FetchRanges]) -> Fetched:
            nonlocal asked
            asked += 1
            return Fetched((enemy.envelope(),), True)

        enemy.endpoint.serve(messages.COMPARE, compare)
        enemy.endpoint.serve(messages.RANGES, ranges)
        with pytest.raises(RemoteError, match="not asked for"):
            await nodes[0].documents.reconcile(SCOPE, enemy.peer)
        assert asked == 1
        assert faults(nodes[0], enemy.peer) == {"nonsense": 1}
        await still_well(swarm, nodes)


async def test_a_banned_author_is_forgotten_refused_and_not_served() -> None:
    async with doc_swarm() as swarm:
        nodes, enemy = await three(swarm, member=True)
        await enemy.push(nodes[0], enemy.envelope())
        await swarm.until(lambda: all(enemy.peer in node.document.read() for node in nodes))
        for node in nodes:
            await node.documents.ban(SCOPE, enemy.peer, "it lied")
        assert all(enemy.peer not in node.document.read() for node in nodes)
        with pytest.raises(RemoteRefused, match="banned"):
            await enemy.push(nodes[0], enemy.envelope(incarnation=2))
        await nodes[0].documents.ban(SCOPE, nodes[2].peer, "only here")
        kept = nodes[2].document.replica.envelopes(nodes[2].peer, *_span(nodes[2]))
        sent = PushEnvelopes(SCOPE, (Sent(kept[0], 1),))
        answer = await nodes[1].endpoint.call(nodes[0].peer, messages.PUSH, sent, timeout=10)
        assert answer.codes == ("banned",)
        loaded = nodes[0].store.load(SPEC.id, nodes[0].peer)
        assert all(envelope.author not in (enemy.peer, nodes[2].peer) for envelope in loaded.envelopes)
        assert nodes[0].documents.banned(SCOPE) == {enemy.peer: "it lied", nodes[2].peer: "only here"}


async def test_strangers_cannot_crowd_out_members_as_followers_nor_learn_of_other_scopes() -> None:
    async with doc_swarm() as swarm:
        nodes, enemy = await three(swarm, member=False)
        with pytest.raises(RemoteRefused, match="unknown-scope"):
            await enemy.endpoint.call(nodes[0].peer, messages.FOLLOW, FollowPeer(b"other", True, False), timeout=10)
        await enemy.endpoint.call(nodes[0].peer, messages.FOLLOW, FollowPeer(SCOPE, True, False), timeout=10)
        assert enemy.peer in nodes[0].documents.neighbours(SCOPE)
        await enemy.endpoint.call(nodes[0].peer, messages.FOLLOW, FollowPeer(SCOPE, True, True), timeout=10)
        assert enemy.peer not in nodes[0].documents.neighbours(SCOPE)
        want = Want(SPEC.id, nodes[0].peer, 1, 0, 1 << 62)
        found = await enemy.endpoint.call(nodes[0].peer, messages.RANGES, FetchRanges(SCOPE, (want,) * 64), timeout=10)
        assert len(found.envelopes) <= defaults.MAX_SENT


async def test_a_neighbour_that_only_swallows_what_it_is_sent_hides_nothing() -> None:
    async with doc_swarm(seed=5) as swarm:
        nodes, enemy = await three(swarm, member=True)

        async def swallow(call: Call[Any]) -> Any:
            return Told() if call.request.__class__ is TellEnvelopes else messages.Followed()

        enemy.endpoint.serve(messages.FOLLOW, swallow)
        enemy.endpoint.serve(messages.TELL, swallow)
        await trio.sleep(130)
        await still_well(swarm, nodes)


async def test_a_liar_that_takes_its_time_with_every_answer_does_not_keep_others_from_being_compared_with() -> None:
    """Each of its answers comes just in time and claims one more difference: an exchange with it would take hours."""
    async with doc_swarm() as swarm:
        author = await swarm.add("author")
        await author.document.write(put(x=1))
        enemies = [Enemy(swarm, f"enemy{number}") for number in range(3)]
        digest = 0

        async def compare(call: Call[Compare]) -> Compared:
            nonlocal digest
            await trio.sleep(defaults.ANSWER_DEADLINE - 1)
            digest += 1
            made_up = tuple(bytes([half, digest % 256]) * 8 for half in range(16))
            short = [node for node in call.request.nodes if len(node.prefix) < defaults.TREE_DEPTH]
            return Compared(tuple(Branches(node.document, node.prefix, made_up) for node in short), (), False)

        for enemy in enemies:
            await enemy.enter(member=True)
            enemy.endpoint.serve(messages.COMPARE, compare)
        await trio.sleep(600)
        assert author.documents.counters.exchanges >= 8
        late = await swarm.add("late")
        await swarm.until(lambda: late.value(author, "x") == 1, 240)
