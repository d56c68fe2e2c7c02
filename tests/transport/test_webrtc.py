"""WebRTC connections over loopback: real engines in child processes, and what happens when anything of it fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import pytest
import trio
import trio.testing

from shoal.transport import defaults
from shoal.transport.errors import DecodeError, PeerUnreachable, RemoteRefused
from shoal.transport.host import RealHost
from shoal.transport.network import ByteStream
from shoal.transport.webrtc import WebRtcAnswerer, WebRtcStream, offer
from shoal.transport.webrtc_process import ChildEngine, ChildProcess
from shoal.transport.webrtc_signal import Description, IceCandidate, IceServers
from shoal.transport.wire import pack, unpack

LOOPBACK = ("127.0.0.1",)

pytestmark = pytest.mark.process


class Pair:
    """Two hosts and the common peer between them, which is a function call."""

    def __init__(self) -> None:
        self.here, self.there = RealHost(), RealHost()
        self.arrived: trio.MemorySendChannel[ByteStream]
        self.arrived, self._arrivals = trio.open_memory_channel[ByteStream](8)
        self.answerer = WebRtcAnswerer(self.there, self.arrived.send, IceServers, interfaces=LOOPBACK)

    async def ask(self, kind: str, body: bytes) -> bytes:
        assert kind == "webrtc"
        assert len(body) <= defaults.MAX_WEBRTC_MESSAGE
        return await self.answerer.answer(body)

    async def connect(self) -> tuple[WebRtcStream, WebRtcStream]:
        ours = await offer(self.here, self.ask, IceServers(), interfaces=LOOPBACK)
        theirs = await self._arrivals.receive()
        assert isinstance(theirs, WebRtcStream)
        return ours, theirs


def engine_of(stream: WebRtcStream) -> ChildProcess:
    assert isinstance(stream.engine, ChildProcess)
    return stream.engine


def exists(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")


@asynccontextmanager
async def pair() -> AsyncIterator[Pair]:
    made = Pair()
    engines = [made.here.webrtc, made.there.webrtc]
    async with trio.open_nursery() as nursery:
        await nursery.start(made.answerer.run)
        yield made
        nursery.cancel_scope.cancel()
    for engine in engines:
        assert isinstance(engine, ChildEngine)
        assert engine.running == 0


async def test_two_ends_connect_and_bytes_arrive_in_order_both_ways() -> None:
    async with pair() as made:
        ours, theirs = await made.connect()
        async with ours, theirs:
            assert ours.remote == theirs.local
            assert ours.local == theirs.remote
            assert ours.how == "host to host"
            sent = os.urandom(3 << 20)

            async def send(stream: WebRtcStream, data: bytes) -> None:
                await stream.send_all(data)
                await stream.send_eof()

            async def receive(stream: WebRtcStream) -> bytes:
                got = bytearray()
                async for chunk in stream:
                    got += chunk
                return bytes(got)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(send, ours, sent)
                nursery.start_soon(send, theirs, sent[::-1])
                assert await receive(theirs) == sent
                assert await receive(ours) == sent[::-1]
            pids = [engine_of(ours).pid, engine_of(theirs).pid]
        assert not any(exists(pid) for pid in pids)


async def send_forever(stream: ByteStream) -> None:
    while True:
        await stream.send_all(bytes(64 << 10))


async def receive_forever(stream: ByteStream) -> None:
    while True:
        await stream.receive_some()


async def make_pair() -> tuple[WebRtcStream, WebRtcStream]:
    """Two ends whose engines live as long as they do."""
    async with pair() as made:
        ends = await made.connect()
        for host in (made.here, made.there):
            assert isinstance(host.webrtc, ChildEngine)
            host.webrtc.running = 0  # they outlive this block on purpose
    return ends


@pytest.mark.slow  # 20 connections, two engines each
async def test_it_is_a_half_closeable_stream_as_trio_defines_it() -> None:
    await trio.testing.check_half_closeable_stream(make_pair, None)


async def test_half_an_end_leaves_the_other_direction_open() -> None:
    async with pair() as made:
        ours, theirs = await made.connect()
        async with ours, theirs:
            await ours.send_all(b"question")
            await ours.send_eof()
            assert await theirs.receive_some() == b"question"
            assert await theirs.receive_some() == b""
            assert await theirs.receive_some() == b""
            await theirs.send_all(b"answer")
            assert await ours.receive_some() == b"answer"
            await theirs.send_eof()
            assert await ours.receive_some() == b""


async def test_bytes_are_received_into_a_buffer_until_the_end_and_not_after_a_close() -> None:
    async with pair() as made:
        ours, theirs = await made.connect()
        async with ours, theirs:
            ours.allow_unsent(32 << 10)
            await ours.send_all(b"abcdef")
            await ours.send_eof()
            buffer = bytearray(4)
            assert await theirs.receive_into(memoryview(buffer)) == 4
            assert await theirs.receive_into(memoryview(buffer)) == 2
            assert bytes(buffer) == b"efcd"
            assert await theirs.receive_into(memoryview(buffer)) == 0
        with pytest.raises(trio.ClosedResourceError):
            await theirs.receive_into(memoryview(buffer))
        with pytest.raises(trio.ClosedResourceError):
            await theirs.receive_some()
        with pytest.raises(trio.ClosedResourceError):
            await theirs.send_all(b"x")


async def test_what_was_sent_before_a_close_still_arrives() -> None:
    async with pair() as made:
        ours, theirs = await made.connect()
        async with theirs:
            await ours.send_all(bytes(300_000))
            await ours.aclose()
            got = 0
            async for chunk in theirs:
                got += len(chunk)
            assert got == 300_000
            with pytest.raises(trio.BrokenResourceError):
                await send_forever(theirs)


async def test_a_reader_that_does_not_read_makes_the_sender_wait_and_nothing_is_lost() -> None:
    async with pair() as made:
        ours, theirs = await made.connect()
        async with ours, theirs:
            sent = 0
            with trio.move_on_after(3) as patience:
                while True:
                    await ours.send_all(bytes(64 << 10))
                    sent += 64 << 10
            assert patience.cancelled_caught
            # The window, two socket pairs and the queues between; not a byte more however long it takes.
            assert sent < defaults.WEBRTC_WINDOW + (4 << 20)
            with trio.fail_after(20):
                got = 0
                while got < sent:
                    got += len(await theirs.receive_some())


async def test_an_engine_killed_in_mid_transfer_is_one_error_on_each_side() -> None:
    async with pair() as made:
        ours, theirs = await made.connect()
        async with ours, theirs:
            errors: list[trio.BrokenResourceError] = []

            async def flood() -> None:
                try:
                    await send_forever(ours)
                except trio.BrokenResourceError as error:
                    errors.append(error)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(flood)
                for _ in range(20):
                    await theirs.receive_some()
                os.kill(engine_of(ours).pid, signal.SIGKILL)
            assert "killed (SIGKILL)" in str(errors[0])
            with pytest.raises(trio.BrokenResourceError, match="SIGKILL"):
                await ours.receive_some()
            os.kill(engine_of(theirs).pid, signal.SIGKILL)
            with pytest.raises(trio.BrokenResourceError, match="SIGKILL"):
                await receive_forever(theirs)


async def test_an_offer_that_is_cancelled_leaves_no_process_behind() -> None:
    async with pair() as made:
        asked = trio.Event()

        async def ask(kind: str, body: bytes) -> bytes:
            asked.set()
            await trio.sleep_forever()
            raise AssertionError("unreachable")

        async with trio.open_nursery() as nursery:

            async def offering() -> None:
                await offer(made.here, ask, IceServers(), interfaces=LOOPBACK)

            nursery.start_soon(offering)
            await asked.wait()
            assert isinstance(made.here.webrtc, ChildEngine)
            assert made.here.webrtc.running == 1
            nursery.cancel_scope.cancel()
        assert made.here.webrtc.running == 0


async def test_an_answerer_that_is_cancelled_leaves_no_process_behind() -> None:
    made = Pair()
    pids: list[int] = []
    assert isinstance(made.there.webrtc, ChildEngine)
    async with trio.open_nursery() as nursery:
        await nursery.start(made.answerer.run)
        silent = IceCandidate("host", "127.0.0.1", 9, 1, "1")
        nobody = Description("abcd", "p" * 22, bytes(32), (silent,))
        await made.answerer.answer(pack(nobody))
        pids = children_of(os.getpid())
        assert len(pids) == 1
        nursery.cancel_scope.cancel()
    assert made.there.webrtc.running == 0
    assert not any(exists(pid) for pid in pids)


def children_of(pid: int) -> list[int]:
    """Engines among the children of a process; each hangs on the thread that started it."""
    found = " ".join(task.read_text("ascii") for task in Path(f"/proc/{pid}/task").glob("*/children"))
    return [int(child) for child in found.split() if b"webrtc_child" in Path(f"/proc/{child}/cmdline").read_bytes()]


async def test_engines_end_when_their_parent_is_killed() -> None:
    code = (
        "import trio\n"
        "from tests.transport.test_webrtc import *\n"
        "async def main():\n"
        "    async with pair() as made:\n"
        "        ours, theirs = await made.connect()\n"
        "        print(engine_of(ours).pid, engine_of(theirs).pid, flush=True)\n"
        "        await trio.sleep_forever()\n"
        "trio.run(main)\n"
    )
    root = str(Path(__file__).parents[2])
    process = await trio.lowlevel.open_process([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=root)
    try:
        assert process.stdout is not None
        line = b""
        while not line.endswith(b"\n"):
            line += await process.stdout.receive_some()
        pids = [int(word) for word in line.split()]
        assert len(pids) == 2
        assert all(exists(pid) for pid in pids)
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
    with trio.fail_after(5):
        while any(exists(pid) for pid in pids):
            await trio.sleep(0.02)


@pytest.mark.parametrize("body", [b"", b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\n", bytes(9000), b"\x80"])
async def test_an_offer_of_garbage_is_refused_before_a_process_starts(body: bytes) -> None:
    async with pair() as made:
        with pytest.raises(DecodeError):
            await made.answerer.answer(body)
        assert children_of(os.getpid()) == []


async def test_an_answer_of_garbage_ends_the_offer_and_its_process() -> None:
    async with pair() as made:

        async def ask(kind: str, body: bytes) -> bytes:
            return b"v=0\r\n" + bytes(100)

        with pytest.raises(DecodeError):
            await offer(made.here, ask, IceServers(), interfaces=LOOPBACK)
        assert children_of(os.getpid()) == []


async def test_an_impostor_with_another_certificate_is_found_out() -> None:
    async with pair() as made:

        async def ask(kind: str, body: bytes) -> bytes:
            answer = unpack(Description, await made.ask(kind, body))
            return pack(attrs.evolve(answer, fingerprint=bytes(32)))

        with pytest.raises(PeerUnreachable, match="DTLS"):
            await offer(made.here, ask, IceServers(), interfaces=LOOPBACK)


async def test_without_a_candidate_in_common_the_error_says_so() -> None:
    async with pair() as made:

        async def ask(kind: str, body: bytes) -> bytes:
            return pack(Description("abcd", "p" * 22, bytes(32), ()))

        with pytest.raises(PeerUnreachable, match="ICE found no pair"):
            await offer(made.here, ask, IceServers(), interfaces=LOOPBACK)


@pytest.mark.slow  # ten seconds of checks
async def test_candidates_that_lead_nowhere_are_named_in_the_error() -> None:
    async with pair() as made:

        async def ask(kind: str, body: bytes) -> bytes:
            silent = IceCandidate("host", "127.0.0.1", 9, 1, "1")
            return pack(Description("abcd", "p" * 22, bytes(32), (silent,)))

        with pytest.raises(PeerUnreachable, match="host 127.0.0.1:9") as raised:
            await offer(made.here, ask, IceServers(), interfaces=LOOPBACK)
        assert "ICE found no pair" in str(raised.value)


async def test_more_offers_than_engines_are_refused_as_busy() -> None:
    async with pair() as made:
        made.there.webrtc = ChildEngine(limit=0)
        with pytest.raises(RemoteRefused) as refused:
            await offer(made.here, made.ask, IceServers(), interfaces=LOOPBACK)
        assert refused.value.code == "busy"


async def test_a_host_without_webrtc_says_so() -> None:
    async with pair() as made:
        made.here.webrtc = None
        with pytest.raises(PeerUnreachable, match="no WebRTC"):
            await offer(made.here, made.ask, IceServers(), interfaces=LOOPBACK)


async def test_a_host_loads_nothing_of_webrtc_itself() -> None:
    code = (
        "import sys\nfrom shoal.transport.host import RealHost\nimport shoal.transport.webrtc\nRealHost()\n"
        "print([name for name in ('aiortc', 'aioice', 'av', 'asyncio', 'OpenSSL') if name in sys.modules])"
    )
    done = await trio.run_process([sys.executable, "-c", code], capture_stdout=True)
    assert done.stdout.strip() == b"[]"
