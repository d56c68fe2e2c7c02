"""One node's blobs: who is told that it has them, and what it answers when much is asked."""

from __future__ import annotations

import pytest
import trio

from shoal.dht.blobs import defaults
from shoal.dht.blobs.messages import CHUNKS, INFO, LEAVES, AskBlob, AskChunks, AskLeaves
from shoal.dht.blobs.store import Store
from shoal.transport.errors import PeerUnreachable, RemoteRefused

from .swarm import Node, content, offer, swarm


async def test_a_blob_is_found_through_the_dht_while_it_is_held_and_no_longer() -> None:
    tree, parts = content(2)
    async with swarm() as s:
        first = await s.add(announce=True)
        keeper = await s.add(announce=True)
        keeper.blobs.store.put(tree, parts)
        await trio.sleep(2 * defaults.ANNOUNCE_EVERY)
        assert await first.blobs.holders(tree.id) == (keeper.peer,)
        done, buffers = await s.fetch(tree, [], search=True)
        assert [bytes(b) for b in buffers] == parts
        assert [peer for peer, _ in done.received] == [keeper.peer]
        keeper.blobs.store.remove(tree.id)
        await trio.sleep(2 * defaults.ANNOUNCE_EVERY)
        assert await first.blobs.holders(tree.id) == ()


async def test_an_announcement_is_renewed_as_long_as_the_blob_is_held() -> None:
    tree, parts = content(1)
    async with swarm() as s:
        first = await s.add(announce=True)
        keeper = await s.add(announce=True)
        keeper.blobs.store.put(tree, parts)
        await trio.sleep(3 * 3600)
        assert await first.blobs.holders(tree.id) == (keeper.peer,)


async def test_a_partial_blob_is_announced_from_some_chunks_on_and_what_it_has_can_be_had() -> None:
    tree, parts = content(40)
    async with swarm() as s:
        first = await s.add(announce=True)
        source, partial = await s.add(announce=True), await s.add(announce=True)
        offer(source, tree, parts)  # from memory: announced to nobody
        s.world.set_uplink(source.name, 2e6)
        with trio.move_on_after(14.0):
            await partial.blobs.fetch_to_store(tree.id, peers=[source.peer])
        entry = partial.blobs.store.entry(tree.id)
        assert entry is not None and defaults.ANNOUNCE_CHUNKS < entry.had < entry.chunks
        await trio.sleep(2 * defaults.ANNOUNCE_EVERY)
        assert await first.blobs.holders(tree.id) == (partial.peer,)
        done, buffers = await s.fetch(tree, [source], search=True)
        assert [bytes(b) for b in buffers] == parts
        received = dict(done.received)
        # The one with the fast line gives all it has, the other one what only it has.
        assert received[partial.peer] > (entry.had - 5) << 20


async def test_what_is_held_is_announced_again_after_a_restart() -> None:
    tree, parts = content(1)
    store = Store(None)
    store.put(tree, parts)
    async with swarm() as s:
        first = await s.add(announce=True)
        again = await s.add(store.copy(), announce=True)
        await trio.sleep(2 * defaults.ANNOUNCE_EVERY)
        assert await first.blobs.holders(tree.id) == (again.peer,)


# --- limits -----------------------------------------------------------------------------------------------------------


async def occupy(node: Node, by: Node, blob: bytes, count: int) -> None:
    """``count`` requests for chunks whose answers nobody reads."""

    async def ask() -> None:
        try:
            async with by.blobs.endpoint.stream(node.peer, CHUNKS, AskChunks(blob, (1,) * 60), timeout=1000.0):
                await trio.sleep_forever()
        except RemoteRefused:
            return

    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(ask)


async def test_too_many_requests_of_one_peer_are_refused_as_busy_and_others_are_served() -> None:
    tree, parts = content(4)
    async with swarm() as s:
        fetcher, greedy, holder = [await s.add() for _ in range(3)]
        offer(holder, tree, parts)
        s.nursery.start_soon(occupy, holder, greedy, tree.id, 20)
        await trio.sleep(1.0)
        assert holder.blobs._reads == {greedy.peer: defaults.READS_PER_PEER}
        with pytest.raises(RemoteRefused) as refused:
            async with greedy.blobs.endpoint.stream(holder.peer, CHUNKS, AskChunks(tree.id, (0,))):
                raise AssertionError
        assert refused.value.code == "busy"
        done, buffers = await s.fetch(tree, [holder])
        assert [bytes(b) for b in buffers] == parts
        assert done.seconds < 2.0
        # Whoever reads nothing is not served for ever.
        await trio.sleep(60.0)
        assert holder.blobs._reads == {}
        assert fetcher.peer not in holder.blobs._reads


async def test_a_crowd_of_slow_readers_leaves_room_for_one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "READS", 8)
    tree, parts = content(4)
    async with swarm() as s:
        _, *crowd, holder = [await s.add() for _ in range(5)]
        offer(holder, tree, parts)
        for slow in crowd:
            s.nursery.start_soon(occupy, holder, slow, tree.id, 4)
        await trio.sleep(1.0)
        assert sum(holder.blobs._reads.values()) >= 8
        _, buffers = await s.fetch(tree, [holder])
        assert [bytes(b) for b in buffers] == parts


@pytest.mark.parametrize("chunks", [(), (99,), (-1,), (1 << 62,), (0,) * 65])
async def test_requests_that_make_no_sense_are_refused_in_words(chunks: tuple[int, ...]) -> None:
    tree, parts = content(1)
    async with swarm() as s:
        fetcher, holder = await s.add(), await s.add()
        offer(holder, tree, parts)
        call = fetcher.blobs.endpoint.call
        for blob in (b"", bytes(32), b"x" * 1000):
            with pytest.raises(RemoteRefused, match="is not held here"):
                await call(holder.peer, INFO, AskBlob(blob, True))
        for page in (-1, 1, 1 << 60):
            with pytest.raises(RemoteRefused, match="no page"):
                await call(holder.peer, LEAVES, AskLeaves(tree.id, page))
        with pytest.raises(RemoteRefused, match="no such"):
            async with fetcher.blobs.endpoint.stream(holder.peer, CHUNKS, AskChunks(tree.id, chunks)):
                raise AssertionError
        assert holder.blobs._reads == {}


async def test_a_chunk_that_is_damaged_on_the_holder_s_disk_is_not_served_and_comes_from_elsewhere() -> None:
    tree, parts = content(6)
    async with swarm() as s:
        nodes = [await s.add() for _ in range(3)]
        for node in nodes[1:]:
            node.blobs.store.put(tree, parts)
        store = nodes[1].blobs.store
        data = store._files.data[tree.id]  # type: ignore[attr-defined]
        data[-3_000_000] ^= 1
        with pytest.raises(PeerUnreachable, match="nobody brings the last 1 chunks"):
            await s.fetch(tree, nodes[1:2], patience=2.0)
        done, buffers = await s.fetch(tree, nodes[1:])
        assert [bytes(b) for b in buffers] == parts
        assert done.liars == ()
        assert all(store.read(tree.id, n) is not None for n in store.bits(tree.id) or ())
        # And it mends itself by fetching what it lost.
        await nodes[1].blobs.fetch_to_store(tree.id, peers=[nodes[2].peer])
        assert store.entry(tree.id).complete  # type: ignore[union-attr]


async def test_what_is_offered_is_known_to_be_in_use_while_it_is_sent() -> None:
    tree, parts = content(4)
    async with swarm() as s:
        fetcher, holder = await s.add(), await s.add()
        offer(holder, tree, parts)
        s.world.set_uplink(holder.name, 1e6)
        assert holder.blobs.idle(tree.id) is None
        s.nursery.start_soon(s.fetch, tree, [holder])
        await trio.sleep(2.0)
        idle = holder.blobs.idle(tree.id)
        assert idle is not None and idle < 0.5
        await trio.sleep(20.0)
        idle = holder.blobs.idle(tree.id)
        assert idle is not None and 10.0 < idle < 20.0
        holder.blobs.withdraw(tree.id)
        with pytest.raises(RemoteRefused, match="is not held here"):
            await fetcher.blobs.endpoint.call(holder.peer, INFO, AskBlob(tree.id, False))
