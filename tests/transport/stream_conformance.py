"""What every byte stream, listener and network of ours must do; run against kernel TCP and the memory network.

Test modules subclass :class:`StreamConformance` and say how to make a network; its tests then run in their world.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from shoal.transport.address import Address
from shoal.transport.errors import ConfigError, PeerUnreachable
from shoal.transport.network import ByteStream, Listener, Network


class StreamConformance(ABC):
    """Two hosts, here and there, that can reach each other."""

    @abstractmethod
    def networks(self) -> tuple[Network, Network]:
        """The network as seen from here and from there."""

    @abstractmethod
    def bind(self) -> Address:
        """Where a listener there binds, with port 0."""

    #: Whether a stream that takes no more bytes stays so until they are read.
    clogs = True
    #: More bytes than a pair can hold while nobody reads.
    flood = 16 << 20

    @asynccontextmanager
    async def pair(self) -> AsyncIterator[tuple[ByteStream, ByteStream]]:
        """A connected pair: dialled here, accepted there."""
        ours, theirs = await self.make_pair()
        async with ours, theirs:
            yield ours, theirs

    async def make_pair(self) -> tuple[ByteStream, ByteStream]:
        here, there = self.networks()
        async with await there.listen(self.bind()) as listener:
            return await self.join(here, listener)

    async def join(self, here: Network, listener: Listener) -> tuple[ByteStream, ByteStream]:
        accepted: list[ByteStream] = []

        async def accept() -> None:
            accepted.append(await listener.accept())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept)
            dialled = await here.dial(listener.address)
        return dialled, accepted[0]

    async def make_clogged_pair(self) -> tuple[ByteStream, ByteStream]:
        """A pair on which neither end can send another byte."""
        ours, theirs = await self.make_pair()
        for stream in (ours, theirs):
            with trio.move_on_after(0.1):
                while True:
                    await stream.send_all(bytes(1 << 20))
        return ours, theirs

    # trio's own conformance suite

    async def test_it_is_a_half_closeable_stream_as_trio_defines_it(self) -> None:
        await trio.testing.check_half_closeable_stream(self.make_pair, self.make_clogged_pair if self.clogs else None)

    # ours

    async def test_both_ends_name_each_other(self) -> None:
        async with self.pair() as (ours, theirs):
            assert ours.remote == theirs.local
            assert ours.local == theirs.remote

    async def test_bytes_arrive_in_order_however_they_are_cut(self) -> None:
        sent = bytes(range(256)) * 4096
        async with self.pair() as (ours, theirs), trio.open_nursery() as nursery:

            async def send() -> None:
                at, size = 0, 1
                while at < len(sent):
                    await ours.send_all(sent[at : at + size])
                    at, size = at + size, size * 2
                await ours.send_eof()

            nursery.start_soon(send)
            received = bytearray()
            while chunk := await theirs.receive_some(1000):
                assert len(chunk) <= 1000
                received += chunk
            assert received == sent

    @pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
    async def test_a_buffer_may_be_reused_after_sending(self, kind: type) -> None:
        buffer = bytearray(b"first message")
        async with self.pair() as (ours, theirs):
            await ours.send_all(kind(buffer))
            if kind is bytearray:
                mine = bytearray(buffer)
                await ours.send_all(mine)
                mine[:] = bytes(len(mine))
            else:
                await ours.send_all(memoryview(buffer))
                buffer[:] = bytes(len(buffer))
            await ours.send_eof()
            received = b""
            while chunk := await theirs.receive_some():
                received += chunk
        assert received == b"first messagefirst message"

    async def test_wide_views_travel_as_their_bytes(self) -> None:
        async with self.pair() as (ours, theirs):
            await ours.send_all(memoryview(bytes(range(16))).cast("I").cast("B"))
            await ours.send_eof()
            received = b""
            while chunk := await theirs.receive_some(5):
                received += chunk
        assert received == bytes(range(16))

    async def test_what_is_sent_without_waiting_comes_before_what_is_sent_later(self) -> None:
        async with self.pair() as (ours, theirs):
            at = ours.send_now(b"at once, ")
            await ours.send_all(b"at once, "[at:] + b"later")
            got = b""
            while len(got) < 14:
                got += await theirs.receive_some(100)
            assert got == b"at once, later"

    async def test_nothing_goes_without_waiting_once_a_stream_takes_no_more(self) -> None:
        if not self.clogs:
            return
        ours, theirs = await self.make_clogged_pair()
        async with ours, theirs:
            assert ours.send_now(b"no room") == 0

    async def test_after_half_close_the_other_direction_goes_on(self) -> None:
        async with self.pair() as (ours, theirs):
            await ours.send_all(b"question")
            await ours.send_eof()
            question = b""
            while chunk := await theirs.receive_some():
                question += chunk
            await theirs.send_all(b"answer to " + question)
            await theirs.aclose()
            answer = b""
            while chunk := await ours.receive_some():
                answer += chunk
        assert answer == b"answer to question"

    async def test_a_sender_waits_for_a_reader_that_does_not_read(self) -> None:
        async with self.pair() as (ours, theirs):
            sent = 0
            with trio.move_on_after(1) as scope:
                while sent < self.flood:
                    await ours.send_all(bytes(64 << 10))
                    sent += 64 << 10
            assert scope.cancelled_caught

            async def drain() -> None:
                while await theirs.receive_some():
                    pass

            with trio.fail_after(10):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(drain)
                    await ours.wait_send_all_might_not_block()
                    nursery.cancel_scope.cancel()

    async def test_bytes_sent_before_closing_arrive(self) -> None:
        async with self.pair() as (ours, theirs):
            await ours.send_all(b"goodbye")
            await ours.aclose()
            received = b""
            while chunk := await theirs.receive_some():
                received += chunk
        assert received == b"goodbye"

    async def test_a_peer_that_closes_with_bytes_unread_breaks_the_stream(self) -> None:
        async with self.pair() as (ours, theirs):
            await ours.send_all(b"never read")
            await theirs.wait_send_all_might_not_block()
            await trio.sleep(0.2)
            await theirs.aclose()

            async def send_on() -> None:
                while True:
                    await ours.send_all(b"more")
                    await trio.sleep(0.05)

            with trio.fail_after(10), pytest.raises(trio.BrokenResourceError):
                await send_on()

    async def test_a_receiver_that_waits_is_told_when_its_own_end_closes(self) -> None:
        async with self.pair() as (ours, _), trio.open_nursery() as nursery:

            async def receive() -> None:
                with pytest.raises(trio.ClosedResourceError):
                    await ours.receive_some()

            nursery.start_soon(receive)
            await trio.testing.wait_all_tasks_blocked()
            await ours.aclose()

    async def test_a_cancelled_receive_loses_no_bytes(self) -> None:
        async with self.pair() as (ours, theirs):
            with trio.move_on_after(0.05):
                await theirs.receive_some()
            await ours.send_all(b"still here")
            assert await theirs.receive_some(5) == b"still"
            assert await theirs.receive_some(5) == b" here"

    async def test_a_port_nobody_listens_on_refuses_and_says_so(self) -> None:
        here, there = self.networks()
        async with await there.listen(self.bind()) as listener:
            address = listener.address
        with pytest.raises(PeerUnreachable, match="connection refused") as caught:
            await here.dial(address)
        assert caught.value.attempts[0][0] == str(address)

    async def test_a_port_in_use_is_an_error_of_configuration_that_names_it(self) -> None:
        _, there = self.networks()
        async with await there.listen(self.bind()) as listener:
            with pytest.raises(ConfigError, match=str(listener.address.port)):
                await there.listen(listener.address)

    async def test_a_closed_port_can_be_listened_on_again(self) -> None:
        here, there = self.networks()
        async with await there.listen(self.bind()) as listener:
            ours, theirs = await self.join(here, listener)
        await theirs.aclose()
        await ours.aclose()
        async with await there.listen(listener.address) as again:
            assert again.address == listener.address

    async def test_port_0_picks_a_port_and_a_specific_address_is_reachable_as_itself(self) -> None:
        _, there = self.networks()
        async with await there.listen(self.bind()) as listener:
            assert listener.address.port > 0
            assert there.reachable_addresses(listener) == (listener.address,)

    async def test_accept_tells_when_its_listener_closes(self) -> None:
        _, there = self.networks()
        listener = await there.listen(self.bind())

        async def accept() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await listener.accept()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept)
            await trio.testing.wait_all_tasks_blocked()
            await listener.aclose()

    async def test_a_listener_can_accept_later_what_was_dialled_before(self) -> None:
        here, there = self.networks()
        async with await there.listen(self.bind()) as listener, await here.dial(listener.address) as ours:
            await ours.send_all(b"early")
            async with await listener.accept() as theirs:
                assert await theirs.receive_some() == b"early"

    async def test_addresses_of_another_kind_are_refused(self) -> None:
        here, there = self.networks()
        foreign = Address("mem", "n", 1) if self.bind().kind == "tcp" else Address("tcp", "127.0.0.1", 1)
        with pytest.raises(ConfigError):
            await there.listen(foreign)
        with pytest.raises(PeerUnreachable):
            await here.dial(foreign)
