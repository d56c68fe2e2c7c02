"""Documents on the network in virtual time: writes spread, partitions heal, changes are waited for, restarts go on."""

from __future__ import annotations

import logging
import random
from pathlib import Path

import pytest
import trio

from shoal.dht.documents import defaults, messages
from shoal.dht.documents.envelope import Envelope
from shoal.dht.documents.policy import DocumentSpec, Members, Owner
from shoal.dht.documents.service import Documents
from shoal.dht.documents.store import DocumentStore
from shoal.transport.errors import ConfigError, RemoteRefused
from shoal.transport.identity import PeerId

from .doc_swarm import SCOPE, SPEC, doc_swarm, put


async def test_a_write_reaches_everybody_at_once_and_reads_the_same_everywhere() -> None:
    async with doc_swarm() as swarm:
        nodes = await swarm.grow(20)
        await swarm.until(lambda: all(node.documents.neighbours(SCOPE) for node in nodes))
        await trio.sleep(5)
        await nodes[3].document.write(put(loss=0.5))
        seconds = await swarm.until(lambda: all(node.value(nodes[3], "loss") == 0.5 for node in nodes))
        assert seconds < 1.0, "the broadcast brings it, not anti-entropy"
        assert swarm.agree()


async def test_writes_of_all_at_once_converge() -> None:
    async with doc_swarm(seed=1) as swarm:
        nodes = await swarm.grow(12)
        await trio.sleep(10)
        async with trio.open_nursery() as nursery:
            for number, node in enumerate(nodes):
                for turn in range(5):
                    nursery.start_soon(node.document.write, put(number=number, turn=turn))
        await swarm.until(swarm.agree)
        for number, author in enumerate(nodes):
            assert all(node.value(author, "number") == number for node in nodes)
        assert all(node.documents.faults() == {} for node in nodes)


async def test_a_newcomer_gets_what_was_written_before() -> None:
    async with doc_swarm() as swarm:
        nodes = await swarm.grow(5)
        for turn in range(10):
            await nodes[0].document.write(put(turn=turn))
        late = await swarm.add("late")
        assert await swarm.until(lambda: late.value(nodes[0], "turn") == 9) < 15


async def test_a_partition_heals_to_one_state_on_both_sides() -> None:
    async with doc_swarm(seed=2) as swarm:
        nodes = await swarm.grow(16)
        left, right = nodes[:8], nodes[8:]
        await trio.sleep(10)
        await nodes[0].document.write(put(before=1))
        await swarm.until(swarm.agree)
        swarm.world.partition([node.name for node in left], [node.name for node in right])
        for turn in range(8):
            for number, node in enumerate(nodes):
                await node.document.write(put(**{f"key{turn}": number}))
            await trio.sleep(7)
        await swarm.until(lambda: swarm.agree(left) and swarm.agree(right))
        assert not swarm.agree()
        assert all(node.value(right[0], "key0") is None for node in left)
        swarm.world.heal()
        await swarm.until(swarm.agree, 600)
        for number, author in enumerate(nodes):
            for node in nodes:
                assert node.value(author, "key7") == number
        for one in nodes:
            assert one.document.read() == nodes[0].document.read()
            assert one.documents.faults() == {}, "nobody did anything wrong"


async def test_what_is_lost_on_the_way_comes_by_anti_entropy() -> None:
    async with doc_swarm(seed=3) as swarm:
        nodes = await swarm.grow(6)
        await trio.sleep(10)
        lost = nodes[5]
        swarm.world.partition([lost.name])
        await nodes[0].document.write(put(x=1))
        await trio.sleep(3)
        swarm.world.heal()
        await swarm.until(lambda: lost.value(nodes[0], "x") == 1, 300)


async def test_a_document_of_another_is_read_and_not_written() -> None:
    async with doc_swarm() as swarm:
        one, other = await swarm.grow(2)
        spec = DocumentSpec("spec", SCOPE, Owner(one.peer))
        ours, theirs = await one.open(spec), await other.open(spec)
        await trio.sleep(5)
        await ours.write(put(rounds=5))
        await swarm.until(lambda: other.value(one, "rounds", theirs) == 5)
        with pytest.raises(ConfigError, match="may not write"):
            await theirs.write(put(rounds=6))
        assert ours.read() == theirs.read()


async def test_a_document_needs_a_scope_that_was_joined_and_opens_once() -> None:
    async with doc_swarm() as swarm:
        (node,) = await swarm.grow(1)
        assert await node.open(SPEC) is node.document
        with pytest.raises(ConfigError, match="not joined"):
            await node.open(DocumentSpec("facts", b"elsewhere", Members("of it")))


async def test_a_subscription_tells_who_changed_and_forgets_nothing_when_it_is_cancelled() -> None:
    async with doc_swarm() as swarm:
        one, other = await swarm.grow(2)
        await trio.sleep(5)
        changes = other.document.subscribe()
        for _ in range(3):
            with trio.move_on_after(1.0) as patience:
                await changes.changed()
            assert patience.cancelled_caught
        with trio.move_on_after(0):
            await changes.changed()
        await one.document.write(put(x=1))
        await swarm.until(lambda: other.value(one, "x") == 1)
        with trio.move_on_after(0):  # cancelled before it could tell
            await changes.changed()
        assert await changes.changed() == (one.peer,)
        await one.document.write(put(x=2))
        await other.document.write(put(y=2))
        await swarm.until(lambda: other.value(one, "x") == 2)
        assert sorted(await changes.changed()) == sorted([one.peer, other.peer])
        with trio.move_on_after(5.0) as patience:
            await changes.changed()
        assert patience.cancelled_caught, "and each change once"


async def test_a_cancelled_write_has_happened_whole_or_not_at_all() -> None:
    async with doc_swarm() as swarm:
        one, other = await swarm.grow(2)
        await trio.sleep(5)
        for number in range(6):
            with trio.move_on_after(0):
                await one.document.write(put(number=number))
        await one.document.write(put(last=True))
        await swarm.until(lambda: other.value(one, "last") is True)
        assert one.document.read() == other.document.read()
        assert other.documents.faults() == {}


async def test_a_change_that_fails_changes_nothing() -> None:
    async with doc_swarm() as swarm:
        one, other = await swarm.grow(2)

        def fail(doc: object) -> None:
            raise ValueError("no")

        with pytest.raises(ValueError, match="no"):
            await one.document.write(fail)
        assert await one.document.write(lambda doc: None) is None
        await one.document.write(put(x=1))
        await swarm.until(lambda: other.value(one, "x") == 1)


async def test_a_node_that_was_killed_goes_on_with_what_it_had_and_what_others_hold() -> None:
    async with doc_swarm(seed=4) as swarm:
        nodes = await swarm.grow(4)
        await trio.sleep(5)
        await nodes[1].document.write(put(x=1))
        await nodes[0].document.write(put(y=1))
        await swarm.until(swarm.agree)
        swarm.kill("n1")
        await nodes[0].document.write(put(y=2))
        again = await swarm.add("n1")
        assert again.value(again, "x") == 1
        assert again.value(nodes[0], "y") == 1
        await swarm.until(lambda: again.value(nodes[0], "y") == 2)
        await again.document.write(put(x=2))
        await swarm.until(lambda: all(node.value(again, "x") == 2 for node in swarm.nodes.values()))
        assert all(node.documents.faults() == {} for node in swarm.nodes.values())


async def test_an_author_that_writes_much_is_compacted_and_others_follow() -> None:
    async with doc_swarm() as swarm:
        one, other = await swarm.grow(2)
        await trio.sleep(5)
        for number in range(3 * defaults.COMPACT_ENVELOPES):
            await one.document.write(put(number=number))
            await trio.sleep(0.6)
        await swarm.until(swarm.agree)
        assert other.value(one, "number") == 3 * defaults.COMPACT_ENVELOPES - 1
        assert other.document.info().envelopes <= defaults.COMPACT_ENVELOPES
        assert other.documents.faults() == {}


async def test_what_the_living_wrote_is_renewed_and_what_the_dead_wrote_expires() -> None:
    async with doc_swarm() as swarm:
        one, other = await swarm.grow(2)
        spec = DocumentSpec("brief", SCOPE, Members("of the test"))
        short = [await node.documents.open(spec, swarm.is_member, lifetime=7200.0) for node in (one, other)]
        await trio.sleep(5)
        for document in short:
            await document.write(put(x=1))
        await swarm.until(lambda: all(len(document.read()) == 2 for document in short))
        swarm.kill("n1")
        await trio.sleep(6 * 3600)
        assert list(short[0].read()) == [one.peer]


async def test_the_store_is_written_before_others_are_told_that_it_is() -> None:
    async with doc_swarm() as swarm:
        one, other = await swarm.grow(2)
        await trio.sleep(5)
        order: list[str] = []
        append = other.store.append

        def slow(envelopes: list[Envelope], own: object = None) -> None:
            append(envelopes)
            order.append("stored")

        other.store.append = slow  # type: ignore[method-assign, assignment]
        envelope = await one.document.write(put(x=1))
        assert envelope is not None
        await swarm.until(lambda: bool(order))
        loaded = other.store.load(SPEC.id, other.peer)
        assert [kept.id for kept in loaded.envelopes] == [envelope.id]


async def test_an_author_that_one_side_does_not_know_yet_costs_nothing_and_is_taken_once_it_is_known() -> None:
    async with doc_swarm() as swarm:
        nodes = await swarm.grow(3)
        doubted: dict[PeerId, None] = {nodes[2].peer: None}
        spec = DocumentSpec("roster", SCOPE, Members("of the test"))
        strict = await nodes[0].documents.open(spec, lambda peer: peer not in doubted)
        others = [await node.open(spec) for node in nodes[1:]]
        await trio.sleep(5)
        await others[1].write(put(x=1))
        await swarm.until(lambda: len(others[0].read()) == 1)
        await trio.sleep(200)
        assert strict.read() == {}
        refused = nodes[0].documents.faults()
        assert sum(count for faults in refused.values() for count in faults.values()) <= 20, refused
        doubted.clear()
        await swarm.until(lambda: nodes[0].value(nodes[2], "x", strict) == 1, defaults.PASS_OVER + 120)


async def test_a_disk_that_fails_costs_no_news_and_no_node() -> None:
    async with doc_swarm() as swarm:
        one, other = await swarm.grow(2)
        await trio.sleep(5)
        append = other.store.append

        def full(envelopes: object, own: object = None) -> None:
            raise ConfigError("no room on the disk")

        other.store.append = full  # type: ignore[method-assign, assignment]
        await one.document.write(put(x=1))
        await swarm.until(lambda: other.value(one, "x") == 1)
        with pytest.raises(ConfigError, match="no room"):
            await other.document.write(put(y=1))
        await trio.sleep(120)
        other.store.append = append  # type: ignore[method-assign]
        await other.document.write(put(y=2))
        await swarm.until(lambda: one.value(other, "y") == 2)
        assert one.documents.faults() == other.documents.faults() == {}


@pytest.mark.parametrize("damage", ["truncated", "overwritten", "gone"])
async def test_a_damaged_database_is_healed_from_the_others(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "documents.sqlite"
    async with doc_swarm(seed=6) as swarm:
        swarm.stores["n1"] = DocumentStore(path)
        nodes = await swarm.grow(3)
        await trio.sleep(5)
        for number, node in enumerate(nodes):
            for turn in range(20):
                await node.document.write(put(number=number, turn=turn, text="x" * 300))
        await swarm.until(swarm.agree)
        swarm.kill("n1")
        await trio.sleep(1)
        swarm.stores["n1"].close()
        data = bytearray(path.read_bytes())
        match damage:
            case "truncated":
                path.write_bytes(data[: len(data) // 2])
            case "overwritten":
                for at in range(8192, len(data), 8192):
                    data[at : at + 3000] = random.Random(at).randbytes(len(data[at : at + 3000]))
                path.write_bytes(data)
            case _:
                path.unlink()
        swarm.stores["n1"] = DocumentStore(path)
        again = await swarm.add("n1")
        await swarm.until(swarm.agree)
        assert all(again.value(author, "turn") == 19 for author in nodes)
        await again.document.write(put(after=1))
        await swarm.until(lambda: all(node.value(again, "after") == 1 for node in swarm.nodes.values()))
        assert again.value(again, "turn") == 19, "and what it wrote before is not lost"
        assert all(node.documents.faults() == {} for node in swarm.nodes.values())
        assert all(node.document.replica.evidence(again.peer) is None for node in swarm.nodes.values())
        again.scope.cancel()
        await again.stopped.wait()
        again.store.close()


async def test_who_has_left_refuses_what_is_told_without_an_alarm(caplog: pytest.LogCaptureFixture) -> None:
    """The endpoint goes on, as where a peer goes from one stage's run to another's; its store is closed by then."""
    async with doc_swarm() as swarm:
        one, other = await swarm.grow(2)
        await trio.sleep(5)
        gone = Documents(other.endpoint, DocumentStore(None))
        gone.join(SCOPE, swarm.members)
        await gone.open(SPEC, swarm.is_member)
        with trio.move_on_after(1):
            await gone.run()
        gone.keeper.store.close()
        with pytest.raises(RemoteRefused, match="takes no part in that"):
            await one.endpoint.call(other.peer, messages.PUSH, messages.PushEnvelopes(SCOPE, ()))
        await one.document.write(put(x=1))
        await trio.sleep(60)
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
