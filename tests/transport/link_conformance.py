"""What every link must do, whatever network carries it; run in virtual time and over TCP."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from shoal.transport import defaults
from shoal.transport.errors import LinkClosed, RemoteError, RemoteProtocolError, StreamReset
from shoal.transport.frames import MuxLimits, ResetCode
from shoal.transport.link import LinkStream, Priority

from .harness import LinkPair, World, link_pair


def pattern(size: int, seed: int = 0) -> bytes:
    block = bytes((seed + 7 * i + (i >> 8)) % 256 for i in range(65_537))
    return (block * (size // len(block) + 1))[:size]


async def read_all(stream: LinkStream) -> bytes:
    got = bytearray()
    while data := await stream.receive_some():
        got += data
    return bytes(got)


class LinkConformance(ABC):
    """Tests of a link between two hosts of a world."""

    @abstractmethod
    def world(self) -> World: ...

    @asynccontextmanager
    async def pair(self, limits: MuxLimits | None = None) -> AsyncIterator[LinkPair]:
        async with link_pair(self.world(), limits) as pair:
            yield pair

    async def test_both_ends_know_each_other(self) -> None:
        async with self.pair() as pair:
            assert pair.a.initiator
            assert not pair.b.initiator
            assert pair.a.cipher == pair.b.cipher
            assert pair.a.exporter == pair.b.exporter
            assert pair.a.peer != pair.b.peer
            assert pair.a.bytes_sent > 0
            assert pair.a.rtt >= 0

    async def test_a_stream_is_a_half_closeable_stream_as_trio_defines_it(self) -> None:
        async with self.pair() as pair:

            async def make() -> tuple[LinkStream, LinkStream]:
                ours = await pair.a.open_stream("check")
                return ours, await pair.accept()

            async def make_clogged() -> tuple[LinkStream, LinkStream]:
                ours, theirs = await make()
                for stream in (ours, theirs):  # send until the credit is used up and the queue is full
                    while stream._stream._credit or stream._stream.queued < defaults.SMALL_QUEUE:
                        if stream._stream.queued < defaults.SMALL_QUEUE:
                            await stream.send_all(bytes(defaults.SMALL_SEND))
                        else:
                            await trio.sleep(0.01)
                return ours, theirs

            await trio.testing.check_half_closeable_stream(make, make_clogged)

    async def test_bulk_arrives_unchanged_in_both_directions_at_once(self) -> None:
        data = pattern(5_000_000)
        async with self.pair() as pair:
            ours = await pair.a.open_stream("bulk", Priority.BULK)
            theirs = await pair.accept()
            assert theirs.protocol == "bulk"
            assert theirs.priority is Priority.BULK
            got = {}

            async def send(stream: LinkStream) -> None:
                for at in range(0, len(data), 777_777):
                    await stream.send_all(memoryview(data)[at : at + 777_777])
                await stream.send_eof()

            async def receive(stream: LinkStream, name: str) -> None:
                buffer = bytearray(len(data))
                await stream.read_exactly_into(memoryview(buffer))
                assert await stream.receive_some() == b""
                got[name] = bytes(buffer)

            async with trio.open_nursery() as nursery:
                for stream, name in ((ours, "a"), (theirs, "b")):
                    nursery.start_soon(send, stream)
                    nursery.start_soon(receive, stream, name)
            assert got == {"a": data, "b": data}
            assert pair.a.idle
            assert pair.b.idle

    async def test_a_slow_reader_bounds_what_its_sender_may_have_under_way(self) -> None:
        async with self.pair() as pair:
            ours = await pair.a.open_stream("flood", Priority.BULK)
            theirs = await pair.accept()
            sent = 0

            async def flood() -> None:
                nonlocal sent
                chunk = bytes(1 << 20)
                while True:
                    await ours.send_all(chunk)
                    sent += len(chunk)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(flood)
                before = -1
                while sent != before:
                    before = sent
                    await trio.sleep(0.3)
                assert defaults.BULK_WINDOW - (2 << 20) <= sent <= defaults.BULK_WINDOW
                assert theirs._stream.unread <= defaults.BULK_WINDOW
                # It reads again, and the flood goes on.
                buffer = memoryview(bytearray(4 << 20))
                await theirs.read_exactly_into(buffer)
                await theirs.read_exactly_into(buffer)
                while sent == before:
                    await trio.sleep(0.05)
                nursery.cancel_scope.cancel()

    async def test_control_is_answered_while_bulk_saturates_the_link(self) -> None:
        async with self.pair() as pair:
            bulk = await pair.a.open_stream("bulk", Priority.BULK)
            sink = await pair.accept()

            async def flood() -> None:
                chunk = bytes(4 << 20)
                while True:
                    await bulk.send_all(chunk)

            async def swallow() -> None:
                buffer = memoryview(bytearray(1 << 20))
                while True:
                    await sink.read_exactly_into(buffer)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(flood)
                nursery.start_soon(swallow)
                while pair.a.bytes_sent < 16 << 20:
                    await trio.sleep(0.01)
                control = await pair.a.open_stream("control")
                other = await pair.accept()
                for _ in range(5):
                    moved = pair.a.bytes_sent
                    await control.send_all(b"?")
                    assert await other.receive_some() == b"?"
                    await other.send_all(b"!")
                    assert await control.receive_some() == b"!"
                    # Only what was in the pipe already goes before it: a window's worth would be 8 MiB more,
                    # and in a round trip itself goes at most a window
                    assert pair.a.bytes_sent - moved < 12 << 20
                nursery.cancel_scope.cancel()

    async def test_a_reset_reaches_both_halves_with_its_code_and_the_link_lives(self) -> None:
        async with self.pair() as pair:
            ours = await pair.a.open_stream("x")
            theirs = await pair.accept()
            broken = trio.Event()
            theirs.on_broken = broken.set
            ours.reset(4711)
            await broken.wait()
            with pytest.raises(StreamReset, match="4711") as caught:
                await theirs.receive_some()
            assert caught.value.code == 4711
            with pytest.raises(trio.BrokenResourceError):
                await theirs.send_all(b"x")
            with pytest.raises(trio.ClosedResourceError):
                await ours.send_all(b"x")
            again = await pair.a.open_stream("y")
            await again.send_all(b"fine")
            assert await (await pair.accept()).receive_some() == b"fine"

    async def test_a_protocol_that_nobody_serves_is_refused_with_a_code(self) -> None:
        async with self.pair() as pair:
            pair.b.on_stream = None
            stream = await pair.a.open_stream("unheard-of")
            with pytest.raises(StreamReset) as caught:
                await stream.receive_some()
            assert caught.value.code == ResetCode.UNKNOWN_PROTOCOL
            assert pair.a.alive

    async def test_a_short_stream_is_an_error_of_the_reader_only(self) -> None:
        async with self.pair() as pair:
            ours = await pair.a.open_stream("x")
            theirs = await pair.accept()
            await ours.send_all(b"short")
            await ours.send_eof()
            with pytest.raises(RemoteProtocolError, match="ended after 5 of 10 bytes"):
                await theirs.read_exactly_into(memoryview(bytearray(10)))
            await theirs.send_all(b"still talking")
            assert await ours.receive_some() == b"still talking"

    async def test_last_words_of_any_size_end_their_stream(self) -> None:
        # Small enough to be copied, in one record with its end, of one sealed where it lies, of many.
        sizes = [1, defaults.SMALL_SEND + 1, defaults.DIRECT_BODY, 2 * defaults.DIRECT_BODY, 5_000_000]
        async with self.pair() as pair:
            for priority in Priority:
                for size in sizes:
                    data = pattern(size)
                    ours = await pair.a.open_stream("x", priority)
                    theirs = await pair.accept()
                    got = bytearray(size)
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(theirs.read_exactly_into, memoryview(got))
                        await ours.send_last(data)
                    assert bytes(got) == data
                    assert await theirs.receive_some() == b""
                    with pytest.raises(trio.ClosedResourceError):
                        await ours.send_all(b"more")
                    await theirs.send_all(b"the other half goes on")
                    assert await ours.receive_some() == b"the other half goes on"
                    ours.close()
                    theirs.close()
            assert pair.a.alive
            assert pair.b.alive

    async def test_cancelled_last_words_reset_their_stream(self) -> None:
        async with self.pair() as pair:
            ours = await pair.a.open_stream("x", Priority.BULK)
            theirs = await pair.accept()
            with trio.move_on_after(0.2):
                await ours.send_last(bytes(64 << 20))
            with pytest.raises(StreamReset):
                await theirs.read_exactly_into(memoryview(bytearray(64 << 20)))
            assert pair.a.alive
            assert pair.b.alive

    async def test_a_cancelled_send_resets_the_stream_instead_of_ending_it(self) -> None:
        async with self.pair() as pair:
            ours = await pair.a.open_stream("x", Priority.BULK)
            theirs = await pair.accept()
            with trio.move_on_after(0.3) as scope:
                await ours.send_all(bytes(100 << 20))
            assert scope.cancelled_caught
            with pytest.raises(StreamReset):
                await read_all(theirs)
            assert pair.a.alive

    async def test_streams_beyond_our_limit_wait_for_a_slot(self) -> None:
        limits = MuxLimits(max_outgoing=2, max_incoming=4)
        async with self.pair(limits) as pair:
            first = await pair.a.open_stream("1")
            await pair.a.open_stream("2")
            with trio.move_on_after(0.2) as scope:
                await pair.a.open_stream("3")
            assert scope.cancelled_caught
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pair.a.open_stream, "4")
                await trio.sleep(0.1)
                first.reset()
            assert [(await pair.accept()).protocol for _ in range(3)] == ["1", "2", "4"]

    async def test_goodbye_is_heard_and_breaks_what_was_open(self) -> None:
        async with self.pair() as pair:
            ours = await pair.a.open_stream("x")
            theirs = await pair.accept()
            await theirs.send_all(b"last words")
            while not ours._stream.unread:
                await trio.sleep(0.01)
            with trio.fail_after(2):
                await pair.b.aclose("we stop here")
                await pair.a.closed.wait()
            reason = pair.a.close_reason
            assert isinstance(reason, LinkClosed)
            assert reason.goodbye
            assert "we stop here" in str(reason)
            assert await ours.receive_some() == b"last words"
            with pytest.raises(LinkClosed, match="we stop here"):
                await ours.receive_some()
            with pytest.raises(LinkClosed, match="we stop here"):
                await ours.send_all(b"x")
            with pytest.raises(LinkClosed):
                await pair.a.open_stream("y")

    async def test_both_sides_may_say_goodbye_at_once(self) -> None:
        async with self.pair() as pair:
            with trio.fail_after(2):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(pair.a.aclose, "a goes")
                    nursery.start_soon(pair.b.aclose, "b goes")
            assert pair.a.closed.is_set()
            assert pair.b.closed.is_set()
            assert "closed by us: a goes" in str(pair.a.close_reason)

    async def test_a_goodbye_gets_through_while_the_peer_floods_us(self) -> None:
        async with self.pair() as pair:
            bulk = await pair.a.open_stream("bulk", Priority.BULK)
            await pair.accept()

            async def flood() -> None:
                with pytest.raises(LinkClosed, match="enough"):
                    await bulk.send_all(bytes(64 << 20))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(flood)
                await trio.sleep(0.1)
                await pair.b.aclose("enough")
            await pair.a.closed.wait()
            assert isinstance(pair.a.close_reason, LinkClosed)
            assert pair.a.close_reason.goodbye

    async def test_a_broken_connection_is_noticed_at_once(self) -> None:
        async with self.pair() as pair:
            ours = await pair.a.open_stream("x")
            await pair.accept()
            async with trio.open_nursery() as nursery:

                async def wait() -> None:
                    with pytest.raises(LinkClosed):
                        await ours.receive_some()

                nursery.start_soon(wait)
                await trio.sleep(0.05)
                with trio.fail_after(1):
                    await trio.aclose_forcefully(pair.raw_b)
                    await pair.a.closed.wait()
            assert isinstance(pair.a.close_reason, RemoteError)

    async def test_altered_bytes_end_the_link_with_a_typed_error(self) -> None:
        async with self.pair() as pair:
            stream = await pair.a.open_stream("x")
            await pair.accept()
            pair.a._mux._frames[0].append(b"\x63" + bytes(8))  # a frame of kind 99
            pair.a._changed()
            with trio.fail_after(2):
                await pair.b.closed.wait()
                await pair.a.closed.wait()
            assert isinstance(pair.b.close_reason, RemoteProtocolError)
            assert "unknown kind of frame, 99" in str(pair.b.close_reason)
            # and the one that did it is told
            assert "unknown kind of frame, 99" in str(pair.a.close_reason)
            with pytest.raises(LinkClosed):
                await stream.receive_some()

    async def test_a_record_that_announces_four_gigabytes_ends_the_link(self) -> None:
        async with self.pair() as pair:
            await pair.raw_a.send_all(b"\xff\xff\xff\xff" + bytes(100))
            with trio.fail_after(2):
                await pair.b.closed.wait()
            assert isinstance(pair.b.close_reason, RemoteProtocolError)
