"""Small swarms in virtual time: joining, records, providers, refusals, restarts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, suppress
from typing import Any

import attrs
import pytest
import trio

from shoal.dht.kademlia import defaults, messages
from shoal.dht.kademlia.keys import digest
from shoal.dht.kademlia.node import _is_lasting
from shoal.dht.kademlia.records import Announcement, SignedRecord, owned_key
from shoal.dht.kademlia.store import Store
from shoal.transport import defaults as transport
from shoal.transport.address import Address, SignedPeerRecord
from shoal.transport.errors import DecodeError, PeerUnreachable, ProtocolMisuse, RemoteRefused
from shoal.transport.identity import Identity

OpenSwarm = Callable[..., AbstractAsyncContextManager[Any]]


def record_of(node: Any, value: bytes = b"value", *, seq: int = 1, life: float = 3600.0) -> SignedRecord:
    key = owned_key(node.identity.peer_id, b"x")
    return SignedRecord.sign(node.identity, "owned", key, value, seq=seq, expires=node.host.wall() + life)


def run_spec(node: Any, spec: bytes) -> SignedRecord:
    return SignedRecord.sign(node.identity, "run", digest(spec), spec, seq=0, expires=node.host.wall() + 3600)


# -- joining ---------------------------------------------------------------------------------------------------------


async def test_one_address_is_enough_to_find_everybody(open_swarm: OpenSwarm) -> None:
    async with open_swarm() as swarm:
        founder = await swarm.add("founder")
        assert await founder.dht.bootstrap() == 0
        for number in range(7):
            assert await (await swarm.add(f"n{number}")).dht.bootstrap([founder.address]) == number + 1
        await trio.sleep(60)
        assert [len(node.dht.table) for node in swarm.nodes.values()] == [7] * 8


async def test_when_nobody_answers_every_address_is_named_with_its_reason(open_swarm: OpenSwarm) -> None:
    async with open_swarm() as swarm:
        node = await swarm.add("n")
        with pytest.raises(PeerUnreachable) as caught:
            await node.dht.bootstrap([Address("mem", "gone", 1), Address("mem", "gone", 2)])
        assert {address for address, reason in caught.value.attempts if reason} == {"mem://gone:1", "mem://gone:2"}


async def test_one_live_address_among_dead_ones_suffices(open_swarm: OpenSwarm) -> None:
    async with open_swarm() as swarm:
        founder, node = await swarm.add("founder"), await swarm.add("n")
        assert await node.dht.bootstrap([Address("mem", "gone", 1), founder.address]) == 1


async def test_a_founder_started_with_its_own_ticket_is_alone_and_that_is_fine(open_swarm: OpenSwarm) -> None:
    async with open_swarm() as swarm:
        founder = await swarm.add("founder")
        assert await founder.dht.bootstrap([founder.address]) == 0


async def test_an_address_that_was_dead_at_first_is_tried_again(open_swarm: OpenSwarm) -> None:
    async with open_swarm() as swarm:
        node = await swarm.add("n")
        with pytest.raises(PeerUnreachable):
            await node.dht.bootstrap([Address("mem", "late", 1)])
        late = await swarm.add("late")
        await trio.sleep(90)
        assert late.identity.peer_id in node.dht.table


async def test_a_client_finds_all_and_is_listed_by_nobody(open_swarm: OpenSwarm) -> None:
    async with open_swarm() as swarm:
        founder = await swarm.add("founder")
        server = await swarm.add("server", founder)
        client = await swarm.add("client", founder, serve=False)
        assert await client.dht.put(record_of(client)) == 2
        assert await server.dht.get("owned", owned_key(client.identity.peer_id, b"x")) is not None
        assert client.identity.peer_id not in founder.dht.table
        assert client.identity.peer_id not in server.dht.table
        assert len(client.dht.table) == 2


async def test_a_peer_is_found_by_its_id(open_swarm: OpenSwarm) -> None:
    async with open_swarm() as swarm:
        founder = await swarm.add("founder")
        nodes = [await swarm.add(f"n{number}", founder) for number in range(5)]
        late = await swarm.add("late", founder)
        found = await nodes[0].dht.find_peer(late.identity.peer_id)
        assert found is not None
        assert found.open(founder.host.wall()).addresses == (late.address,)
        assert await late.dht.find_peer(Identity(b"?" * 32).peer_id) is None
        own = await late.dht.find_peer(late.identity.peer_id)
        assert own is not None
        assert own.open(late.host.wall()).peer == late.identity.peer_id


async def test_dead_peers_leave_the_tables_of_the_living(open_swarm: OpenSwarm) -> None:
    async with open_swarm() as swarm:
        founder = await swarm.add("founder")
        for number in range(5):
            await swarm.add(f"n{number}", founder)
        await trio.sleep(30)
        victim = swarm.nodes["n3"].identity.peer_id
        assert victim in founder.dht.table
        swarm.kill("n3")
        await trio.sleep(2 * defaults.LIVENESS_INTERVAL)
        assert all(victim not in node.dht.table for node in swarm.nodes.values())
        assert len(founder.dht.table) == 4


async def test_a_healed_partition_becomes_one_swarm_again(open_swarm: OpenSwarm) -> None:
    async with open_swarm() as swarm:
        founder = await swarm.add("founder")
        for number in range(5):
            await swarm.add(f"n{number}", founder)
        await trio.sleep(30)
        names = list(swarm.nodes)
        swarm.world.partition(names[:3], names[3:])
        await trio.sleep(900)
        assert all(len(node.dht.table) == 2 for node in swarm.nodes.values())
        swarm.world.heal()
        await trio.sleep(300)
        assert all(len(node.dht.table) == 5 for node in swarm.nodes.values())


async def test_contacts_are_kept_fresh_beyond_the_life_of_their_records(open_swarm: OpenSwarm) -> None:
    async with open_swarm() as swarm:
        founder = await swarm.add("founder")
        await swarm.add("n", founder)
        await trio.sleep(4 * 3600)
        late = await swarm.add("late", founder)
        assert len(late.dht.table) == 2


# -- records ---------------------------------------------------------------------------------------------------------


async def test_alone_a_record_is_kept_and_found_by_those_who_come(open_swarm: OpenSwarm) -> None:
    async with open_swarm() as swarm:
        founder = await swarm.add("founder")
        spec = run_spec(founder, b"spec")
        assert await founder.dht.put(spec) == 0
        node = await swarm.add("n", founder)
        assert await node.dht.get("run", spec.key) == spec
        assert await node.dht.get("run", digest(b"other")) is None


async def test_the_newest_record_is_found_and_an_older_one_refused(open_swarm: OpenSwarm) -> None:
    async with open_swarm() as swarm:
        author = await swarm.add("author")
        nodes = [await swarm.add(f"n{number}", author) for number in range(4)]
        first, second = record_of(author, b"1", seq=1), record_of(author, b"2", seq=2)
        assert await author.dht.put(first) == 4
        assert await author.dht.put(second) == 4
        assert await nodes[2].dht.get("owned", first.key) == second
        with pytest.raises(RemoteRefused) as caught:
            await nodes[3].dht.put(first)
        assert caught.value.code == "stale"


async def test_a_replayed_record_is_refused_by_those_who_hold_the_newer(open_swarm: OpenSwarm) -> None:
    async with open_swarm() as swarm:
        author = await swarm.add("author")
        node = await swarm.add("n", author)
        old, new = record_of(author, b"1", seq=1), record_of(author, b"2", seq=2)
        await author.dht.put(new)
        with pytest.raises(RemoteRefused, match="sequence number 2"):
            await author.endpoint.call(node.identity.peer_id, messages.PUT, messages.PutRecord(old, True))
        fresh = await swarm.add("fresh", node, serve=False)
        with pytest.raises(RemoteRefused) as caught:
            await fresh.dht.put(old)
        assert caught.value.code == "stale"


async def test_a_holder_that_was_behind_is_given_the_newest(open_swarm: OpenSwarm) -> None:
    async with open_swarm() as swarm:
        author = await swarm.add("author")
        nodes = [await swarm.add(f"n{number}", author) for number in range(3)]
        old, new = record_of(author, b"1", seq=1), record_of(author, b"2", seq=2)
        nodes[0].dht.store.put(old, author.host.wall())
        nodes[1].dht.store.put(new, author.host.wall())
        assert await nodes[2].dht.get("owned", old.key) == new
        assert nodes[0].dht.store.get("owned", old.key, author.host.wall()) == new


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"value": b"forged"}, "wrong signature"),
        ({"namespace": "nonsense"}, "unknown namespace 'nonsense'"),
        ({"value": bytes(defaults.MAX_VALUE + 1)}, "at most 4096"),
        ({"expires": 1.6e9}, "expired"),
        ({"expires": 1.8e9}, "live longer"),
        ({"key": bytes(64)}, "does not belong to the author"),
    ],
    ids=["forged", "unknown namespace", "oversized", "expired", "immortal", "foreign key"],
)
async def test_a_bad_record_is_refused_here_and_by_every_other_peer(
    open_swarm: OpenSwarm, change: dict[str, Any], reason: str
) -> None:
    async with open_swarm() as swarm:
        holder = await swarm.add("holder")
        node = await swarm.add("n", holder)
        bad = attrs.evolve(record_of(node), **change)
        with pytest.raises(ProtocolMisuse, match=reason):
            await node.dht.put(bad)
        with pytest.raises(RemoteRefused, match=reason) as caught:
            await node.endpoint.call(holder.identity.peer_id, messages.PUT, messages.PutRecord(bad, True))
        assert caught.value.code == "invalid"
        assert holder.dht.store.record_count == 0
        assert holder.dht.counters.rejected == 1


async def test_reading_an_unknown_namespace_is_refused(open_swarm: OpenSwarm) -> None:
    async with open_swarm() as swarm:
        holder = await swarm.add("holder")
        node = await swarm.add("n", holder)
        with pytest.raises(ProtocolMisuse, match="unknown namespace"):
            await node.dht.get("nonsense", b"k")
        with pytest.raises(RemoteRefused, match="unknown namespace"):
            await node.endpoint.call(holder.identity.peer_id, messages.GET, messages.GetRecord("nonsense", b"k", False))


async def test_a_liars_record_is_not_believed(open_swarm: OpenSwarm) -> None:
    async with open_swarm() as swarm:
        author = await swarm.add("author")
        liar = await swarm.add("liar", author)
        node = await swarm.add("n", author)
        good = record_of(author, b"good", seq=1)
        await author.dht.put(good)
        forged = attrs.evolve(good, value=b"forged", seq=9)
        liar.dht.store._records["owned", good.key].record = forged
        assert await node.dht.get("owned", good.key) == good
        node.dht.store.expire(9e9)
        assert await node.dht.get("owned", good.key) == good
        assert node.dht.counters.lies >= 1


async def test_records_end_everywhere_when_they_expire(open_swarm: OpenSwarm) -> None:
    async with open_swarm() as swarm:
        author = await swarm.add("author")
        node = await swarm.add("n", author)
        record = record_of(author, life=600.0)
        await author.dht.put(record)
        await trio.sleep(590)
        assert await node.dht.get("owned", record.key) == record
        await trio.sleep(30)
        assert await node.dht.get("owned", record.key) is None
        assert author.dht.store.record_count == node.dht.store.record_count == 0


async def test_a_record_outlives_its_author_and_its_first_holders(open_swarm: OpenSwarm) -> None:
    async with open_swarm() as swarm:
        founder = await swarm.add("founder")
        old = [await swarm.add(f"old{number}", founder) for number in range(2)]
        spec = SignedRecord.sign(
            founder.identity, "run", digest(b"spec"), b"spec", seq=0, expires=founder.host.wall() + 80_000
        )
        assert await founder.dht.put(spec) == 2
        await swarm.leave("founder")
        new = [await swarm.add(f"new{number}", old[0]) for number in range(2)]
        await trio.sleep(1.6 * defaults.REPLICATE_INTERVAL)
        for node in old:
            swarm.kill(node.name)
        await trio.sleep(2 * defaults.LIVENESS_INTERVAL)
        late = await swarm.add("late", new[1])
        assert await late.dht.get("run", spec.key) == spec


# -- providers -------------------------------------------------------------------------------------------------------


async def test_the_founder_leaves_and_newcomers_still_find_the_run(open_swarm: OpenSwarm) -> None:
    async with open_swarm() as swarm:
        founder = await swarm.add("founder")
        spec = run_spec(founder, b"spec")
        await founder.dht.put(spec)
        assert await founder.dht.provide(spec.key) == 0
        members = []
        for number in range(5):
            member = await swarm.add(f"m{number}", founder)
            found = await member.dht.providers(spec.key)
            assert founder.identity.peer_id in [r.open(member.host.wall()).peer for r in found]
            await member.dht.provide(spec.key)
            members.append(member)
        await trio.sleep(60)
        await swarm.leave("founder")
        for member in members:
            newcomer = await swarm.add(f"via {member.name}".replace(" ", "-"), member)
            assert await newcomer.dht.get("run", spec.key) == spec
            found = await newcomer.dht.providers(spec.key)
            peers = [r.open(newcomer.host.wall()).peer for r in found]
            assert {m.identity.peer_id for m in members} <= set(peers)
            assert newcomer.endpoint.contact(members[0].identity.peer_id) is not None


async def test_announcements_are_renewed_until_they_are_withdrawn(open_swarm: OpenSwarm) -> None:
    async with open_swarm() as swarm:
        founder = await swarm.add("founder")
        provider, asker = await swarm.add("p", founder), await swarm.add("a", founder)
        assert await provider.dht.provide(b"run", ttl=120.0) == 2
        await trio.sleep(1000)
        assert len(await asker.dht.providers(b"run")) == 1
        assert await provider.dht.providers(b"run") == []
        await provider.dht.unprovide(b"run")
        assert await asker.dht.providers(b"run") == []
        await trio.sleep(1000)
        assert asker.dht.store.announcement_count == 0


async def test_a_dead_provider_is_forgotten_within_its_lifetime(open_swarm: OpenSwarm) -> None:
    async with open_swarm() as swarm:
        founder = await swarm.add("founder")
        provider = await swarm.add("p", founder)
        await provider.dht.provide(b"run", ttl=120.0)
        swarm.kill("p")
        assert len(await founder.dht.providers(b"run")) == 1
        await trio.sleep(121)
        assert await founder.dht.providers(b"run") == []


async def test_nobody_announces_another_peer(open_swarm: OpenSwarm) -> None:
    async with open_swarm() as swarm:
        holder, victim = await swarm.add("holder"), await swarm.add("victim")
        mallory = await swarm.add("mallory", holder)
        wall = mallory.host.wall()
        contact: SignedPeerRecord = victim.endpoint.record()
        mine = Announcement.sign(mallory.identity, b"run", contact, issued=1, expires=wall + 60)
        forged = attrs.evolve(mine, provider=victim.identity.peer_id)
        for announcement, reason in ((mine, "another peer's contact"), (forged, "announces itself")):
            with pytest.raises(RemoteRefused, match=reason):
                await mallory.endpoint.call(
                    holder.identity.peer_id, messages.ANNOUNCE, messages.PutProvider(announcement, True)
                )
        # Nor by passing on what another one signed: keys are free, links are not.
        other = Identity(bytes(32))
        record = SignedPeerRecord.sign(other, (mallory.address,), seq=1, expires=wall + 60)
        true = Announcement.sign(other, b"run", record, issued=1, expires=wall + 60)
        with pytest.raises(RemoteRefused, match="announces itself"):
            await mallory.endpoint.call(holder.identity.peer_id, messages.ANNOUNCE, messages.PutProvider(true, True))
        assert holder.dht.store.announcement_count == 0


@pytest.mark.parametrize("topic", [b"", bytes(65)])
async def test_a_topic_out_of_bounds_is_misuse(open_swarm: OpenSwarm, topic: bytes) -> None:
    async with open_swarm() as swarm:
        node = await swarm.add("n")
        with pytest.raises(ProtocolMisuse, match="1 to 64 bytes"):
            await node.dht.provide(topic)
        with pytest.raises(ProtocolMisuse, match="up to 7200 s"):
            await node.dht.provide(b"t", ttl=7201.0)


# -- limits and restarts ---------------------------------------------------------------------------------------------


async def test_a_stranger_that_asks_too_much_gets_a_typed_refusal(open_swarm: OpenSwarm) -> None:
    async with open_swarm(latency=0.001) as swarm:
        holder = await swarm.add("holder")
        stranger = await swarm.add("stranger")
        await stranger.endpoint.identify(holder.address)
        request, codes = messages.Ping(False), []
        for _ in range(int(3 * defaults.STRANGER_BURST)):
            try:
                await stranger.endpoint.call(holder.identity.peer_id, messages.PING, request)
            except RemoteRefused as refusal:
                codes.append(refusal.code)
        assert set(codes) == {"rate"}
        assert holder.dht.counters.limited == len(codes)


async def test_a_node_rejoins_from_its_snapshot_without_any_address(open_swarm: OpenSwarm) -> None:
    async with open_swarm() as swarm:
        founder = await swarm.add("founder")
        nodes = [await swarm.add(f"n{number}", founder) for number in range(4)]
        record = record_of(nodes[0], life=80_000.0)
        await nodes[0].dht.put(record)
        snapshot = nodes[0].dht.snapshot()
        identity = nodes[0].identity
        await swarm.leave("n0")
        await swarm.leave("founder")
        await trio.sleep(3 * 3600)
        again = await swarm.add("n0")
        assert again.identity.peer_id == identity.peer_id
        again.dht.restore(snapshot)
        assert await again.dht.bootstrap() == 3
        assert await again.dht.get("owned", record.key) == record


async def test_a_damaged_snapshot_is_refused_and_nothing_taken(open_swarm: OpenSwarm) -> None:
    async with open_swarm() as swarm:
        founder = await swarm.add("founder")
        node = await swarm.add("n", founder)
        snapshot = node.dht.snapshot()
        other = await swarm.add("other")
        for damaged in (snapshot[:-1], b"", b"\xc1", snapshot.replace(b"version\x01", b"version\x02", 1)):
            with pytest.raises(DecodeError):
                other.dht.restore(damaged)
        assert await other.dht.bootstrap() == 0


async def test_other_addresses_get_a_moment_once_one_has_answered(open_swarm: OpenSwarm) -> None:
    """A ticket names the founder's private addresses too; where nobody says no, a dial takes 10 s to give up."""
    async with open_swarm() as swarm:
        founder, silent, node = await swarm.add("founder"), await swarm.add("silent"), await swarm.add("n")
        swarm.world.set_nat("silent", "blocked")
        began = trio.current_time()
        assert await node.dht.bootstrap([silent.address, founder.address]) == 1
        assert trio.current_time() - began < 2.0


def test_what_a_stranger_at_a_loopback_address_says_counts_only_where_there_is_nothing_else() -> None:
    assert not _is_lasting([("tcp://10.0.0.1:1", False), ("tcp://127.0.0.1:1", True)])
    assert _is_lasting([("tcp://10.0.0.1:1", True), ("tcp://127.0.0.1:1", False)])
    assert _is_lasting([("tcp://127.0.0.1:1", True), ("tcp://[::1]:1", False)])
    assert not _is_lasting([])


async def test_a_write_asks_who_is_near_and_to_store_in_one_question(open_swarm: OpenSwarm) -> None:
    async with open_swarm() as swarm:
        founder = await swarm.add("founder")
        for number in range(24):
            await (await swarm.add(f"n{number}")).dht.bootstrap([founder.address])
        await trio.sleep(60)
        writer = swarm.nodes["n3"]
        before = writer.dht.counters.queries
        record = record_of(writer)
        assert await writer.dht.put(record) >= 20
        # 20 store; asked one after the other, another 20 would have been asked who is near.
        assert writer.dht.counters.queries - before <= 32
        holders = [n for n in swarm.nodes.values() if n.dht.store.get("owned", record.key, n.host.wall()) is not None]
        assert len(holders) >= 21


async def test_holders_name_others_only_to_who_does_not_know_the_next_ones(
    open_swarm: OpenSwarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_swarm() as swarm:
        founder = await swarm.add("founder")
        for number in range(24):
            await (await swarm.add(f"n{number}")).dht.bootstrap([founder.address])
        await trio.sleep(60)
        record = record_of(swarm.nodes["n3"])
        await swarm.nodes["n3"].dht.put(record)
        holders = [n for n in swarm.nodes.values() if n.dht.store.get("owned", record.key, n.host.wall()) is not None]
        reader = next(n for n in swarm.nodes.values() if n not in holders)
        answers: list[messages.FoundRecord] = []
        walker = reader.dht.values._walker
        ask = walker.ask

        async def spy(*arguments: Any) -> Any:
            answer = await ask(*arguments)
            answers.append(answer)
            return answer

        monkeypatch.setattr(walker, "ask", spy)
        assert await reader.dht.get("owned", record.key) == record
        named = [len(answer.closer) for answer in answers if answer.record is not None]
        assert named == [0] * defaults.READ_QUORUM

        # Most copies are lost: those that seemed to be holders are none, so who is left is asked whom it knows.
        for holder in holders[2:]:
            holder.dht.store._records.clear()
        answers.clear()
        assert await reader.dht.get("owned", record.key) == record
        named = [len(answer.closer) for answer in answers if answer.record is not None]
        assert named == [0, 0, defaults.HOLDER_NAMES, defaults.HOLDER_NAMES]

        # Who cannot tell how far holders stand is told whom they know.
        walker.size.value = None
        answers.clear()
        assert await reader.dht.get("owned", record.key) == record
        assert {len(answer.closer) for answer in answers if answer.record is not None} == {defaults.HOLDER_NAMES}


async def test_a_lost_peer_that_comes_by_itself_while_it_waits_for_its_turn_does_no_harm(open_swarm: OpenSwarm) -> None:
    """A node with many contacts of an earlier life tries ten at a time; one of those that wait joins through it."""
    async with open_swarm() as swarm:
        gone = [await swarm.add(f"gone{number}") for number in range(defaults.ALPHA_MAX)]
        late, node = await swarm.add("late"), await swarm.add("n")
        records = [other.endpoint.record() for other in (*gone, late)]
        for other in gone:
            swarm.world.freeze(other.name)

        async def come() -> None:
            await trio.sleep(0.1)
            await late.dht.bootstrap([node.address])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(come)
            assert await node.dht.bootstrap(peers=records) == 1


async def test_an_announcement_whose_contact_runs_out_hides_no_other_and_blames_no_holder(
    open_swarm: OpenSwarm,
) -> None:
    """What a holder took in good time is too old when it is asked for: the holder did not lie."""
    async with open_swarm() as swarm:
        nodes = await swarm.grow(6)
        provider, mallory, asker = nodes[1], nodes[2], nodes[3]
        assert await provider.dht.provide(b"run") == 5
        wall = mallory.host.wall()
        contact = SignedPeerRecord.sign(
            mallory.identity, (mallory.address,), seq=1, expires=wall - transport.CLOCK_SKEW + 1
        )
        trap = Announcement.sign(mallory.identity, b"run", contact, issued=1, expires=wall + 7200)
        for other in nodes:
            if other is not mallory:
                with suppress(RemoteRefused):
                    await mallory.endpoint.call(
                        other.identity.peer_id, messages.ANNOUNCE, messages.PutProvider(trap, True)
                    )
        await trio.sleep(5)
        asker.dht.store = asker.dht.values.store = Store(0)
        found = [record.open(0).peer for record in await asker.dht.providers(b"run")]
        assert provider.identity.peer_id in found
        assert asker.dht.counters.lies == 0


async def test_a_record_that_would_live_too_long_by_our_clock_blames_no_holder(open_swarm: OpenSwarm) -> None:
    async with open_swarm() as swarm:
        holder = await swarm.add("holder", skew=20)
        asker = await swarm.add("asker", holder)
        expires = holder.host.wall() + defaults.RECORD_LIFETIME + transport.CLOCK_SKEW - 1
        spec = SignedRecord.sign(holder.identity, "run", digest(b"spec"), b"spec", seq=0, expires=expires)
        assert holder.dht.store.put(spec, holder.host.wall()).kept
        found = await asker.dht.get("run", digest(b"spec"))
        assert found is None or found.value == b"spec"
        assert asker.dht.counters.lies == 0
        assert len(asker.dht.table) == 1
