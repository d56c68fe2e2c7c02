"""A running node, and peers that break every protocol below the run: it names what is wrong and goes on."""

from __future__ import annotations

import logging
import resource
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import msgpack
import pytest
import trio

from shoal.node import node as node_module
from shoal.node.cli import FAILED, main
from shoal.node.ticket import Ticket
from shoal.transport import defaults
from shoal.transport.address import Address
from shoal.transport.defaults import WIRE_VERSION
from shoal.transport.frames import HEADER, Frame
from shoal.transport.host import RealHost
from shoal.transport.identity import Identity
from shoal.transport.rpc import Head
from shoal.transport.secure import MAGIC
from shoal.transport.wire import pack

from .hostile import PATIENCE, RawPeer, frame, victim

pytestmark = pytest.mark.real


def memory() -> int:
    """Bytes of memory of this process, now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


async def until_closed(address: Address, data: bytes) -> bytes:
    """Connect, say ``data``, return what comes back until the other side hangs up."""
    stream = await RealHost().network.dial(address)
    got = b""
    with trio.fail_after(PATIENCE):
        try:
            await stream.send_all(data)
            while part := await stream.receive_some():
                got += part
        except trio.BrokenResourceError:
            pass
    await stream.aclose()
    return got


# --- before the handshake ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\x00\xff garbage of some kind \x13\x37" * 40, "not a Shoal peer: its first bytes are"),
        (b"GET / HTTP/1.1\r\nHost: shoal\r\n\r\n", "HTTP"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500), "TLS"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "SSH"),
        (MAGIC + struct.pack(">H", defaults.WIRE_VERSION) + b"\xff" + b"N" * 255, "it speaks another handshake"),
        (MAGIC + struct.pack(">H", 77), f"it speaks wire version 77, we speak version {WIRE_VERSION}"),
    ],
)
async def test_a_peer_that_speaks_something_else_is_named_and_shut_out(
    data: bytes, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "shoal.transport")
    async with victim() as node:
        answer = await until_closed(node.address, data)
        await node.counts("handshakes_refused")
        assert reason in caplog.text
        # Another version hears ours; strangers to the protocol hear nothing of it.
        assert answer[: len(MAGIC)] in (b"", MAGIC)
        await node.goes_on()


async def test_a_handshake_that_announces_16_mb_is_refused_before_it_comes(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "shoal.transport")
    async with victim() as node:
        stream = await RealHost().network.dial(node.address)
        from shoal.transport.secure import SecureChannel

        channel = SecureChannel(initiator=True, identity=Identity(b"i" * 32), entropy=lambda n: bytes(n), wall=0.0)
        preamble = channel.start()[: len(MAGIC) + 3 + len("Noise_XX_25519_ChaChaPoly_BLAKE2b")]
        await stream.send_all(preamble + b"\x01\xff\xff\xff")
        await node.counts("handshakes_refused")
        assert "a frame of kind 1 that announces 16777215 bytes" in caplog.text
        await stream.aclose()
        await node.goes_on()


async def test_200_peers_that_connect_and_say_nothing_keep_nobody_out() -> None:
    async with victim() as node:
        network = RealHost().network
        silent = [await network.dial(node.address) for _ in range(200)]
        await node.goes_on()
        # Beyond the bound the oldest has had its chance.
        silent += [await network.dial(node.address) for _ in range(defaults.MAX_HALF_OPEN)]
        await node.counts("half_open_dropped", 200)
        await node.goes_on()
        assert len(node.node.endpoint.links()) <= 2
        for stream in silent:
            await stream.aclose()


# --- records and frames -----------------------------------------------------------------------------------------------


async def test_a_record_that_announces_4_gb_ends_that_link_only(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "shoal.transport")
    async with victim() as node:
        before = memory()
        peer = await RawPeer.connect(node.address)
        await peer.stream.send_all(b"\x00\x0f\xff\xff")  # 1 MB, twice the most
        await peer.farewell()
        peer = await RawPeer.connect(node.address)
        await peer.stream.send_all(b"\xff\xff\xff\xff" + bytes(1000))
        await peer.farewell()
        with trio.fail_after(PATIENCE):
            while "announces 4194303 bytes" not in caplog.text:  # it may have come with the end of the handshake
                await trio.sleep(0.02)
        assert "announces 1048575 bytes, expected" in caplog.text
        assert memory() - before < 64 << 20
        await node.goes_on()


HUGE = 0xFFFFFFFF


BAD_FRAMES: list[tuple[list[bytes], str]] = [
    ([HEADER.pack(Frame.DATA, 5, HUGE)], "a frame announces 4294967295 bytes, its record holds 0"),
    ([HEADER.pack(Frame.OPEN, 5, HUGE) + b"x"], "a frame announces 4294967295 bytes"),
    ([frame(Frame.DATA, 400, b"x")], "stream 400, which was never opened"),
    ([HEADER.pack(Frame.EOF, 1 << 31, 0)], "which was never opened"),
    ([frame(Frame.OPEN, 4, b"shoal-rpc/1")], "whose number is ours to give"),
    ([frame(Frame.OPEN, 5, b"shoal-rpc/1")] * 2, "it opened stream 5 again"),
    ([frame(Frame.OPEN, 5, b"x" * 65)], "a protocol name of 65 bytes"),
    ([frame(Frame.OPEN, 5, b"\xff\xfe")], "not UTF-8"),
    ([HEADER.pack(Frame.LINK_CREDIT, 0, HUGE)], "more than it was sent"),
    ([HEADER.pack(Frame.LINK_CREDIT, 9, 1)], "credit for priority 9"),
    ([HEADER.pack(99, 0, 0)], "an unknown kind of frame, 99"),
    ([b"\x01\x00"], "a record ends within a frame's header"),
    ([HEADER.pack(Frame.DATA, 5, 0)], "an empty DATA frame"),
]


async def test_frames_that_make_no_sense_end_that_link_with_their_reason() -> None:
    async with victim() as node:
        for frames, reason in BAD_FRAMES:
            peer = await RawPeer.connect(node.address)
            for item in frames:
                await peer.say(item)
            assert reason in await peer.farewell()
        peer = await RawPeer.connect(node.address)
        await peer.say_of_the_pipe(b"\x02" + bytes(4))
        assert "an answer to no ping" in await peer.farewell()
        await node.counts("protocol_errors", len(BAD_FRAMES) + 1)
        await node.goes_on()


async def test_data_beyond_the_credit_ends_that_link() -> None:
    async with victim() as node:
        peer = await RawPeer.connect(node.address)
        await peer.say(frame(Frame.OPEN, 5, b"shoal-rpc/1"))
        # It waits for a round of that name before it reads any of the body.
        scatter = pack_request(key=RUN, start=0, stop=16)
        await peer.say(frame(Frame.DATA, 5, call("round.scatter", scatter, body=1 << 40)))
        try:
            for _ in range(1 + defaults.CONTROL_WINDOW // (200 << 10)):
                await peer.say(frame(Frame.DATA, 5, bytes(200 << 10)))
        except trio.BrokenResourceError:
            pass
        assert "its credit is" in await peer.farewell()
        await node.goes_on()


async def test_10000_streams_are_refused_beyond_the_limit_and_cost_the_others_nothing() -> None:
    async with victim() as node:
        peer = await RawPeer.connect(node.address)
        refused: set[int] = set()

        async def listen() -> None:
            while (frames := await peer.hear()) is not None:
                refused.update(id for kind, id, _ in frames if kind in (Frame.EOF, Frame.RESET))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen)
            for start in range(1, 10_001, 100):
                await peer.say(*(frame(Frame.OPEN, n << 2 | 1, b"shoal-rpc/1") for n in range(start, start + 100)))
                await trio.sleep(0.01)
            with trio.fail_after(PATIENCE):
                while len(refused) < 10_000 - defaults.MAX_INCOMING_STREAMS:
                    await trio.sleep(0.02)
            (link,) = [link for link in node.node.endpoint.links() if link.streams]
            assert link.streams <= defaults.MAX_INCOMING_STREAMS
            assert node.node.endpoint._server.active() <= defaults.MAX_CALLS_PER_PEER
            await node.goes_on()
            nursery.cancel_scope.cancel()
        await peer.stream.aclose()


async def test_who_keeps_opening_streams_and_never_reads_is_cut_off() -> None:
    async with victim() as node:
        peer = await RawPeer.connect(node.address)
        with trio.fail_after(PATIENCE):
            try:
                for start in range(1, 10_000_000, 500):
                    await peer.say(*(frame(Frame.OPEN, n << 2 | 1, b"shoal-rpc/1") for n in range(start, start + 500)))
            except trio.BrokenResourceError:
                pass
        await node.counts("protocol_errors")
        await peer.stream.aclose()
        await node.goes_on()


async def test_who_asks_and_never_reads_makes_the_node_hold_next_to_nothing() -> None:
    async with victim() as node:
        run = node.node.run_here
        assert run is not None
        peer = await RawPeer.connect(node.address)
        before = memory()
        request = call("run.head", pack_request(run=run.run_id))
        for number in range(1, 301):
            await peer.request(number, request)
        await node.goes_on()
        assert memory() - before < 32 << 20
        assert node.node.endpoint._server.active() <= defaults.MAX_CALLS_PER_PEER
        await peer.stream.aclose()


# --- calls ------------------------------------------------------------------------------------------------------------


def call(method: str, request: bytes, *, body: int = 0, timeout: float = 10.0) -> bytes:
    head = pack(Head(method, timeout, body))
    return struct.pack(">I", len(head)) + head + struct.pack(">I", len(request)) + request


def pack_request(**fields: object) -> bytes:
    return msgpack.packb(fields, use_bin_type=True)  # type: ignore[no-any-return]


def nested(depth: int) -> bytes:
    return b"\x91" * depth + b"\xc0"


RUN = b"r" * 32

BAD_CALLS = {
    "an unknown method": (call("run.format_disk", b"\x80"), b"no method 'run.format_disk' here"),
    "another run": (call("run.head", pack_request(run=RUN)), b"this peer takes no part in that run"),
    "a missing field": (call("run.head", pack_request()), b"missing field 'run'"),
    "an unknown field": (call("run.head", pack_request(run=RUN, admin=True)), b"unknown field 'admin'"),
    "another type": (call("run.head", pack_request(run="text")), b"run: "),
    "a number for bytes": (call("blob.leaves", pack_request(blob=RUN, page=1.5)), b"page: "),
    "no map at all": (call("run.head", b"\x93\x01\x02\x03"), b"does not decode"),
    "deep nesting": (call("run.head", nested(5000)), b"is not a valid message"),
    "an array of 4 billion": (call("run.head", b"\xdd\xff\xff\xff\xff"), b"is not a valid message"),
    "a map of 4 billion": (call("run.head", b"\xdf\xff\xff\xff\xff"), b"is not a valid message"),
    "bytes of 4 GB": (call("run.head", b"\x81\xa3run\xc6\xff\xff\xff\xff"), b"is not a valid message"),
    "many arrays of 65,535": (call("run.head", b"\xdc\xff\xff" * 3000), b"is not a valid message"),
    "a key twice": (call("run.head", b"\x82\xa3run\xc0\xa3run\xc0"), b"is not a valid message"),
    "an extension type": (call("run.head", b"\x81\xa3run\xd4\x01\x00"), b"is not a valid message"),
    "a request of 2 MB": (
        call("run.head", b"")[:-4] + struct.pack(">I", 2 << 20),
        b"a message of 2097152 bytes, at most 1048576 allowed",
    ),
    "a head of 4 GB": (b"\xff\xff\xff\xff", b"a message of 4294967295 bytes, at most 1024 allowed"),
    "a blob that is not here": (call("blob.leaves", pack_request(blob=RUN, page=-(1 << 62))), b"is not held here"),
    "numbers out of range": (
        call("round.convene", pack_request(key=RUN, round=1 << 63, attempt=0)),
        b"is out of range",
    ),
    "a text that clears the screen": (
        call("round.reject", pack_request(key=RUN, attempt=0, promised=0, reason="\x1b[2J")),
        b"control characters",
    ),
}


async def test_calls_that_make_no_sense_are_refused_in_words_and_the_link_lives() -> None:
    async with victim() as node:
        run = node.node.run_here
        assert run is not None
        peer, before = await RawPeer.connect(node.address), memory()
        for number, (name, (request, reason)) in enumerate(BAD_CALLS.items()):
            await peer.request(2 * number + 1, request)
            answer = await peer.answer(2 * number + 1)
            assert reason in answer, f"{name}: {answer!r}"
            await peer.request(2 * number + 2, call("run.head", pack_request(run=run.run_id)))
            assert run.run_id in await peer.answer(2 * number + 2)
        assert memory() - before < 32 << 20
        await peer.stream.aclose()
        await node.goes_on()


# --- another version, on the command line -----------------------------------------------------------------------------


@contextmanager
def answering(data: bytes) -> Iterator[Address]:
    """A server that says ``data`` to whoever connects."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:

        def serve() -> None:
            while True:
                try:
                    client, _ = server.accept()
                except OSError:
                    return
                with client:
                    client.sendall(data)
                    client.shutdown(socket.SHUT_WR)
                    client.settimeout(PATIENCE)
                    try:
                        while client.recv(4096):
                            pass
                    except OSError:
                        pass

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield Address("tcp", "127.0.0.1", server.getsockname()[1])
        server.shutdown(socket.SHUT_RDWR)
    thread.join(PATIENCE)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (MAGIC + struct.pack(">H", 9), f"it speaks wire version 9, we speak version {WIRE_VERSION}"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "HTTP"),
        (b"", "it hung up during the handshake"),
    ],
)
def test_joining_through_a_peer_of_another_version_or_protocol_says_so(
    data: bytes, reason: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = node_module.NodeConfig
    monkeypatch.setattr(node_module, "NodeConfig", lambda **fields: real(**{**fields, "join_timeout": 0.3}))
    with answering(data) as address:
        ticket = Ticket(RUN, Identity(b"f" * 32).peer_id, (address,)).encode()
        assert main(["join", ticket, "--host", "127.0.0.1", "--data-dir", str(tmp_path / "b")]) == FAILED
    error = capsys.readouterr().err
    assert reason in error
    assert str(address.port) in error
    assert "Traceback" not in error
