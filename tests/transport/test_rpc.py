"""Calls: bodies both ways, deadlines and cancellation that travel, codes instead of tracebacks, limits."""

from __future__ import annotations

import logging
import struct
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

import attrs
import pytest
import trio

from shoal.transport import defaults
from shoal.transport.errors import (
    LinkClosed,
    PeerUnreachable,
    ProtocolMisuse,
    RemoteProtocolError,
    RemoteRefused,
    StreamReset,
    WaitExpired,
)
from shoal.transport.frames import ResetCode
from shoal.transport.link import Link, Priority
from shoal.transport.rpc import PROTOCOL, Body, Call, CallError, Head, Method, Part, call, exchange
from shoal.transport.serving import RpcServer
from shoal.transport.stream import LinkStream
from shoal.transport.wire import pack

from .harness import Real, Virtual, World, link_pair


@attrs.frozen
class Text:
    text: str


@attrs.frozen
class Size:
    bytes: int


ECHO = Method("echo", Text, Text)
UPLOAD = Method("upload", Size, Size, Priority.BULK)
DOWNLOAD = Method("download", Size, Size, Priority.BULK)


class Bench:
    """A link whose far side serves calls."""

    def __init__(self, link: Link, far: Link, server: RpcServer) -> None:
        self.link = link
        self.far = far
        self.server = server

    async def echo(self, text: str = "hi", timeout: float = 5.0) -> str:
        return (await call(self.link, ECHO, Text(text), timeout=timeout)).text


@asynccontextmanager
async def bench(world: World | None = None) -> AsyncIterator[Bench]:
    async with link_pair(world or Virtual()) as pair, trio.open_nursery() as nursery:
        server = RpcServer(pair.b._host)

        def on_stream(stream: LinkStream) -> None:
            scope = trio.CancelScope()
            stream.on_broken = scope.cancel
            nursery.start_soon(server.handle, stream, scope)

        pair.b.on_stream = on_stream
        pair.b.on_call = lambda link, asked, data: server.accept(link, asked, data, nursery)

        async def echo(call: Call[Text]) -> Text:
            return call.request

        server.serve(ECHO, echo)
        yield Bench(pair.a, pair.b, server)
        nursery.cancel_scope.cancel()


async def test_a_call_is_answered() -> None:
    async with bench() as b:
        assert await b.echo("hello") == "hello"
        assert b.link.idle
        await trio.sleep(1)
        assert b.far.idle
        assert b.server.active() == 0


async def test_a_call_costs_one_round_trip() -> None:
    async with bench() as b:
        before = trio.current_time()
        await b.echo()
        assert trio.current_time() - before == pytest.approx(0.02, abs=0.001)


@pytest.mark.parametrize("size", [0, 1, 1000, 20_000_000])
async def test_a_body_is_uploaded_into_the_servers_buffer(size: int) -> None:
    data = bytes(i % 251 for i in range(min(size, 100_000))) * (size // 100_000 or 1)
    got = bytearray(len(data))

    async def upload(call: Call[Size]) -> Size:
        assert call.body_left == len(got)
        await call.read_into(memoryview(got))
        return Size(call.body_left)

    async with bench() as b:
        b.server.serve(UPLOAD, upload)
        half = len(data) // 2
        body = [memoryview(data)[:half], memoryview(data)[half:]]
        assert await call(b.link, UPLOAD, Size(len(data)), body=body, timeout=20) == Size(0)
    assert got == data


async def test_a_body_is_sent_while_it_is_made_in_memory_that_is_used_again() -> None:
    pieces, size = 40, 50_000
    got, piece = bytearray(pieces * size), bytearray(size)

    async def upload(call: Call[Size]) -> Size:
        await call.read_into(memoryview(got))
        return Size(call.body_left)

    async def parts() -> AsyncGenerator[bytearray, None]:
        for number in range(pieces):
            await trio.sleep(0.1)
            piece[:] = bytes([number]) * size
            yield piece

    async with bench() as b:
        b.server.serve(UPLOAD, upload)
        body = Body(len(got), parts)
        assert await call(b.link, UPLOAD, Size(0), body=body, timeout=20) == Size(0)
    assert got == b"".join(bytes([number]) * size for number in range(pieces))


@pytest.mark.parametrize(("made", "by"), [(2, 300), (5, -300)])
async def test_a_made_body_of_another_size_than_announced_is_the_callers_fault_and_cancels_the_call(
    made: int, by: int
) -> None:
    ended: list[str] = []

    async def upload(call: Call[Size]) -> Size:
        try:
            await call.read_into(memoryview(bytearray(call.body_left)))
        except BaseException as error:
            ended.append(type(error).__name__)
            raise
        return Size(0)

    async def parts() -> AsyncGenerator[bytes, None]:
        await trio.sleep(0.5)  # so that the call has begun over there: one that is reset before it left never does
        for _ in range(made):
            yield bytes(300)

    async with bench() as b:
        b.server.serve(UPLOAD, upload)
        with pytest.raises(ProtocolMisuse, match="differs by"):
            await call(b.link, UPLOAD, Size(0), body=Body(made * 300 + by, parts), timeout=20)
        if by > 0:
            await trio.sleep(1)
            assert ended
        assert await call(b.link, UPLOAD, Size(0), body=[bytes(10)], timeout=20) == Size(0)


async def test_who_fails_to_make_a_body_gets_its_own_error_and_the_link_lives() -> None:
    async def upload(call: Call[Size]) -> Size:
        await call.read_into(memoryview(bytearray(call.body_left)))
        return Size(7)

    async def parts() -> AsyncGenerator[bytes, None]:
        yield bytes(100)
        raise KeyError("lost")

    async with bench() as b:
        b.server.serve(UPLOAD, upload)
        with pytest.raises(KeyError):
            await call(b.link, UPLOAD, Size(0), body=Body(1000, parts), timeout=20)
        assert await call(b.link, UPLOAD, Size(0), body=[bytes(10)], timeout=20) == Size(7)


async def test_a_body_is_downloaded_before_the_result() -> None:
    async def download(call: Call[Size]) -> Size:
        for i in range(3):
            await call.write(bytes([i]) * call.request.bytes)
        return Size(3)

    async with bench() as b:
        b.server.serve(DOWNLOAD, download)
        n = 3_000_000
        async with exchange(b.link, DOWNLOAD, Size(n), timeout=20) as reply:
            first = bytearray(n // 2)
            rest = bytearray(3 * n - n // 2)
            await reply.read_into(memoryview(first))
            await reply.read_into(memoryview(rest))
            assert await reply.result() == Size(3)
        assert bytes(first + rest) == bytes(n) + b"\1" * n + b"\2" * n
        assert b.link.idle


async def test_a_body_of_other_numbers_than_bytes_travels_as_its_bytes() -> None:
    import array

    got = array.array("d", [0.0] * 1000)

    async def upload(call: Call[Size]) -> Size:
        await call.read_into(memoryview(got))
        return Size(0)

    async with bench() as b:
        b.server.serve(UPLOAD, upload)
        sent = array.array("d", [float(i) for i in range(1000)])
        await call(b.link, UPLOAD, Size(0), body=[memoryview(sent)], timeout=5)
        assert got == sent


async def test_a_body_shorter_than_the_handler_wants_is_the_callers_fault() -> None:
    seen: list[Exception] = []

    async def upload(call: Call[Size]) -> Size:
        try:
            await call.read_into(memoryview(bytearray(100)))
        except RemoteProtocolError as error:
            seen.append(error)
            raise
        raise AssertionError

    async with bench() as b:
        b.server.serve(UPLOAD, upload)
        with pytest.raises(RemoteRefused, match=r"failed.*10 bytes left, 100 expected"):
            await call(b.link, UPLOAD, Size(0), body=[bytes(10)], timeout=5)
        assert len(seen) == 1


async def test_a_longer_or_shorter_answer_than_asked_for_is_a_protocol_error() -> None:
    async def download(call: Call[Size]) -> Size:
        await call.write(bytes(100))
        return Size(0)

    async with bench() as b:
        b.server.serve(DOWNLOAD, download)
        with pytest.raises(RemoteProtocolError, match="shorter by 50 bytes"):
            async with exchange(b.link, DOWNLOAD, Size(0), timeout=5) as reply:
                await reply.read_into(memoryview(bytearray(150)))
        with pytest.raises(RemoteProtocolError, match="longer body"):
            await call(b.link, DOWNLOAD, Size(0), timeout=5)
        assert await b.echo() == "hi"


async def test_a_server_may_answer_before_it_has_read_the_body() -> None:
    async def upload(call: Call[Size]) -> Size:
        raise RemoteRefused("full", "no room for 100 MiB")

    async with bench() as b:
        b.server.serve(UPLOAD, upload)
        with pytest.raises(RemoteRefused, match="no room") as caught:
            await call(b.link, UPLOAD, Size(0), body=[bytes(100 << 20)], timeout=20)
        assert caught.value.code == "full"
        assert await b.echo() == "hi"
        await trio.sleep(1)
        assert b.link.idle
        assert b.far.idle


# What goes wrong


async def test_an_unknown_method_is_a_typed_refusal() -> None:
    async with bench() as b:
        with pytest.raises(RemoteRefused, match="no method 'nothing' here") as caught:
            await call(b.link, Method("nothing", Text, Text), Text("?"), timeout=5)
        assert caught.value.code == "unknown_method"
        assert b.link.peer.short in str(caught.value)


async def test_a_request_of_another_shape_is_refused_and_named() -> None:
    async with bench() as b:
        with pytest.raises(RemoteRefused, match="Text") as caught:
            await call(b.link, Method("echo", Size, Text), Size(1), timeout=5)
        assert caught.value.code == "bad_request"


async def test_errors_of_a_handler_travel_as_codes_without_their_traceback(caplog: pytest.LogCaptureFixture) -> None:
    async def fail(call: Call[Text]) -> Text:
        if call.request.text == "shoal":
            raise PeerUnreachable("somebody else is away")
        if call.request.text == "group":
            async with trio.open_nursery():
                raise WaitExpired("slice", 3.0)
        if call.request.text == "contract":
            raise ProtocolMisuse("secret of the contract")
        raise KeyError("secret of the house")

    async with bench() as b:
        b.server.serve(ECHO, fail)
        for text, code, message in (
            ("shoal", "failed", "somebody else is away"),
            ("group", "failed", "no slice within 3.0 s"),
        ):
            with pytest.raises(RemoteRefused) as caught:
                await b.echo(text)
            assert caught.value.code == code
            assert message in caught.value.reason
        for text in ("contract", "bug"):
            with caplog.at_level(logging.ERROR), pytest.raises(RemoteRefused) as caught:
                await b.echo(text)
            assert caught.value.code == "internal"
            assert "secret" not in str(caught.value)
            assert "secret" in caplog.text
        assert b.link.alive


async def test_a_handler_that_returns_another_type_is_our_bug_not_a_wrong_answer() -> None:
    async def wrong(call: Call[Text]) -> Text:
        return Size(1)  # type: ignore[return-value]

    async with bench() as b:
        b.server.serve(ECHO, wrong)
        with pytest.raises(RemoteRefused) as caught:
            await b.echo()
        assert caught.value.code == "internal"


async def test_a_message_too_large_is_refused_before_it_is_sent() -> None:
    async with bench() as b:
        with pytest.raises(ProtocolMisuse, match="bulk travels in the body"):
            await b.echo("x" * (defaults.MAX_MESSAGE + 1))


# Time


async def test_the_deadline_travels_and_the_server_cancels_its_handler() -> None:
    seen: list[str] = []

    async def slow(call: Call[Text]) -> Text:
        assert 1.9 < call.deadline - trio.current_time() <= 2.0
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            seen.append(f"{trio.current_time() - began:.1f}")
            raise
        raise AssertionError

    async with bench() as b:
        b.server.serve(ECHO, slow)
        began = trio.current_time()
        with pytest.raises(WaitExpired, match=r"no answer to echo within 2.0 s") as caught:
            await b.echo(timeout=2.0)
        assert caught.value.awaited == "answer to echo"
        await trio.sleep(1)
        assert seen == ["2.0"]
        assert b.server.active() == 0
        assert b.link.idle
        assert b.far.idle


async def test_a_caller_that_gives_up_cancels_the_handler() -> None:
    cancelled = trio.Event()

    async def slow(call: Call[Text]) -> Text:
        try:
            await trio.sleep_forever()
        finally:
            cancelled.set()
        raise AssertionError

    async with bench() as b:
        b.server.serve(ECHO, slow)
        with trio.move_on_after(1):
            await b.echo(timeout=100)
        with trio.fail_after(0.1):
            await cancelled.wait()
        assert b.link.idle
        assert b.far.idle


async def test_leaving_the_block_without_the_result_cancels_the_handler() -> None:
    cancelled = trio.Event()

    async def endless(call: Call[Size]) -> Size:
        try:
            while True:
                await call.write(bytes(100_000))
        finally:
            cancelled.set()

    async with bench() as b:
        b.server.serve(DOWNLOAD, endless)
        async with exchange(b.link, DOWNLOAD, Size(0), timeout=100) as reply:
            await reply.read_into(memoryview(bytearray(1000)))
        with trio.fail_after(1):
            await cancelled.wait()
        assert await b.echo() == "hi"


async def test_a_link_lost_in_mid_call_ends_the_call_and_the_handler_at_once() -> None:
    cancelled = trio.Event()

    async def slow(call: Call[Text]) -> Text:
        try:
            await trio.sleep_forever()
        finally:
            cancelled.set()
        raise AssertionError

    async with bench() as b:
        b.server.serve(ECHO, slow)
        async with trio.open_nursery() as nursery:

            async def ask() -> None:
                with pytest.raises(LinkClosed):
                    await b.echo(timeout=1000)

            nursery.start_soon(ask)
            await trio.sleep(1)
            began = trio.current_time()
            await trio.aclose_forcefully(b.far.best.stream)
        await cancelled.wait()
        assert trio.current_time() - began < 0.1


async def test_a_timeout_inside_the_block_of_a_download_is_a_named_wait_too() -> None:
    async def stuck(call: Call[Size]) -> Size:
        await call.write(b"x")
        await trio.sleep_forever()
        raise AssertionError

    async with bench() as b:
        b.server.serve(DOWNLOAD, stuck)
        with pytest.raises(WaitExpired, match=r"no answer to download within 3.0 s"):
            async with exchange(b.link, DOWNLOAD, Size(0), timeout=3.0) as reply:
                await reply.read_into(memoryview(bytearray(2)))


# Limits and hostile callers


async def test_calls_beyond_the_limit_per_peer_are_refused_as_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "MAX_CALLS_PER_PEER", 3)
    release = trio.Event()

    async def wait(call: Call[Text]) -> Text:
        await release.wait()
        return call.request

    async with bench() as b:
        b.server.serve(ECHO, wait)
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(b.echo)
            await trio.sleep(0.5)
            assert b.server.active(b.far.peer) == 3
            with pytest.raises(RemoteRefused, match="your calls use up") as caught:
                await b.echo()
            assert caught.value.code == "busy"
            release.set()
        assert await b.echo() == "hi"
        assert b.server.active() == 0


async def send_raw(b: Bench, data: bytes, protocol: str = PROTOCOL) -> LinkStream:
    stream = await b.link.open_stream(protocol)
    await stream.send_all(data)
    return stream


async def refusal(stream: LinkStream) -> bytes:
    head = bytearray(5)
    await stream.read_exactly_into(memoryview(head))
    kind, length = struct.unpack(">BI", head)
    assert kind == Part.ERROR
    data = bytearray(length)
    await stream.read_exactly_into(memoryview(data))
    return bytes(data)


async def test_a_head_that_announces_four_gigabytes_is_refused() -> None:
    async with bench() as b:
        stream = await send_raw(b, b"\xff\xff\xff\xff" + bytes(100))
        assert b"bad_request" in await refusal(stream)
        assert await b.echo() == "hi"


async def test_a_request_that_announces_four_gigabytes_is_refused() -> None:
    async with bench() as b:
        head = pack(Head("echo", 5.0, 0))
        stream = await send_raw(b, struct.pack(">I", len(head)) + head + b"\xff\xff\xff\xff")
        assert b"bad_request" in await refusal(stream)
        assert await b.echo() == "hi"


async def test_a_stream_that_says_nothing_is_reset_after_its_deadline() -> None:
    async with bench() as b:
        stream = await send_raw(b, b"\0")
        began = trio.current_time()
        with pytest.raises(StreamReset) as caught:
            await stream.receive_some()
        assert caught.value.code == ResetCode.EXPIRED
        assert trio.current_time() - began == pytest.approx(defaults.HEADER_FLOOR, abs=0.2)


async def test_a_caller_that_does_not_read_its_answer_holds_it_for_a_bounded_time() -> None:
    async def big(call: Call[Size]) -> Size:
        await call.write(bytes(100 << 20))
        return Size(0)

    async with bench() as b:
        b.server.serve(DOWNLOAD, big)
        head, request = pack(Head("download", 7.0, 0)), pack(Size(0))
        await send_raw(b, struct.pack(">I", len(head)) + head + struct.pack(">I", len(request)) + request)
        await trio.sleep(6)
        assert b.server.active() == 1
        await trio.sleep(2)
        assert b.server.active() == 0
        assert b.far.idle


async def test_an_answer_that_announces_four_gigabytes_is_not_allocated() -> None:
    async with link_pair(Virtual()) as pair:

        async def lie() -> None:
            stream = await pair.accept()
            await stream.receive_some()
            await stream.send_all(struct.pack(">BI", Part.RESULT, 0xFFFFFFFF))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(lie)
            with pytest.raises(RemoteProtocolError, match="answer of 4294967295 bytes"):
                await call(pair.a, DOWNLOAD, Size(1), timeout=5)
        assert pair.a.alive


async def test_an_answer_with_a_part_of_unknown_kind_is_a_protocol_error() -> None:
    async with link_pair(Virtual()) as pair:

        async def lie() -> None:
            stream = await pair.accept()
            await stream.receive_some()
            await stream.send_all(struct.pack(">BI", 9, 0))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(lie)
            with pytest.raises(RemoteProtocolError, match="unknown kind 9"):
                await call(pair.a, DOWNLOAD, Size(1), timeout=5)


async def test_an_error_code_of_the_peer_is_carried_as_it_is() -> None:
    async with link_pair(Virtual()) as pair:

        async def refuse() -> None:
            stream = await pair.accept()
            await stream.receive_some()
            data = pack(CallError("custom", "for people"))
            await stream.send_all(struct.pack(">BI", Part.ERROR, len(data)) + data)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(refuse)
            with pytest.raises(RemoteRefused) as caught:
                await call(pair.a, DOWNLOAD, Size(1), timeout=5)
        assert (caught.value.code, caught.value.reason) == ("custom", "for people")


async def test_another_protocol_than_calls_is_refused() -> None:
    async with bench() as b:
        stream = await send_raw(b, b"", protocol="something else")
        with pytest.raises(StreamReset) as caught:
            await stream.receive_some()
        assert caught.value.code == ResetCode.UNKNOWN_PROTOCOL


async def test_a_thousand_calls_leave_nothing_behind() -> None:
    async with bench() as b:
        for i in range(1000):
            if i % 3 == 0:
                with pytest.raises(RemoteRefused):
                    await call(b.link, Method("nothing", Text, Text), Text("?"), timeout=5)
            elif i % 3 == 1:
                with trio.move_on_after(0.005):
                    await b.echo()
            else:
                await b.echo()
        await trio.sleep(1)
        assert b.link.idle
        assert b.far.idle
        assert b.server.active() == 0
        assert not b.server._active


@pytest.mark.real
async def test_calls_and_bodies_over_tcp() -> None:
    async def download(call: Call[Size]) -> Size:
        got = bytearray(call.body_left)
        await call.read_into(memoryview(got))
        await call.write(got)
        return Size(len(got))

    async with bench(Real()) as b:
        b.server.serve(DOWNLOAD, download)
        data = bytes(range(256)) * 40_000
        async with trio.open_nursery() as nursery:
            for _ in range(50):
                nursery.start_soon(b.echo, "x" * 1000, 60.0)
        async with exchange(b.link, DOWNLOAD, Size(0), body=[data], timeout=60) as reply:
            got = bytearray(len(data))
            await reply.read_into(memoryview(got))
            assert await reply.result() == Size(len(data))
        assert got == data


# Small calls: without a stream


async def test_a_small_call_opens_no_stream_and_a_large_or_bulk_one_does() -> None:
    opened: list[str] = []
    async with bench() as b:
        serve = b.far.on_stream
        assert serve is not None

        def noted(stream: LinkStream) -> None:
            opened.append(stream.protocol)
            serve(stream)

        b.far.on_stream = noted
        assert await b.echo("x" * 3000) == "x" * 3000
        assert opened == []
        assert await b.echo("x" * 5000) == "x" * 5000
        assert opened == [PROTOCOL]


@pytest.mark.parametrize("size", [0, 4000, 4096, 4097, 100_000, 1_000_000])
async def test_a_small_call_may_have_a_large_answer(size: int) -> None:
    async def many(call: Call[Size]) -> Text:
        return Text("x" * call.request.bytes)

    method = Method("many", Size, Text)
    async with bench() as b:
        b.server.serve(method, many)
        assert len((await call(b.link, method, Size(size), timeout=60)).text) == size
        assert b.link.idle


async def test_large_answers_wait_until_earlier_ones_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "ANSWER_WINDOW", 50_000)
    most = 0

    async def many(call: Call[Size]) -> Text:
        nonlocal most
        most = max(most, call.link._mux.calls._queued)
        return Text("x" * call.request.bytes)

    method = Method("many", Size, Text)
    async with bench() as b, trio.open_nursery() as nursery:
        b.server.serve(method, many)

        async def ask() -> None:
            assert len((await call(b.link, method, Size(40_000), timeout=60)).text) == 40_000

        for _ in range(100):
            nursery.start_soon(ask)
    assert most < 50_000 + 41_000


@pytest.mark.parametrize("size", [0, 4000, 100_000, 1_000_000])
async def test_a_handler_that_never_waits_answers_as_one_in_a_task_does(size: int) -> None:
    method = Method("many", Size, Text)
    async with bench() as b:
        b.server.serve_at_once(method, lambda call: Text("x" * call.request.bytes))
        assert len((await call(b.link, method, Size(size), timeout=60)).text) == size
        # By a stream, too.
        async with exchange(b.link, method, Size(size), timeout=60) as reply:
            assert len((await reply.result()).text) == size
        assert b.link.idle
        assert b.server.active() == 0


async def test_what_a_handler_that_never_waits_raises_is_a_code_and_harms_nobody() -> None:
    def answer(call: Call[Size]) -> Text:
        match call.request.bytes:
            case 1:
                raise RemoteRefused("mine", "not now")
            case 2:
                raise ZeroDivisionError
            case 3:
                return Size(3)  # type: ignore[return-value]
        return Text("well")

    method = Method("odd", Size, Text)
    async with bench() as b:
        b.server.serve_at_once(method, answer)
        for size, code in ((1, "mine"), (2, "internal"), (3, "internal")):
            with pytest.raises(RemoteRefused) as caught:
                await call(b.link, method, Size(size), timeout=5)
            assert caught.value.code == code
        assert (await call(b.link, method, Size(0), timeout=5)).text == "well"


async def test_a_large_answer_that_cannot_be_sent_in_time_holds_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    method = Method("many", Size, Text)
    async with bench() as b:
        b.server.serve_at_once(method, lambda call: Text("x" * call.request.bytes))
        monkeypatch.setattr(defaults, "ANSWER_WINDOW", 0)  # as if earlier answers were never read
        with pytest.raises(WaitExpired):
            await call(b.link, method, Size(100_000), timeout=3)
        await trio.sleep(1)
        assert b.server.active() == 0
        assert b.far.idle


async def test_a_small_call_whose_handler_writes_a_body_is_refused() -> None:
    async def download(call: Call[Size]) -> Size:
        await call.write(b"more than asked for")
        return Size(3)

    method = Method("control.download", Size, Size)
    async with bench() as b:
        b.server.serve(method, download)
        with pytest.raises(RemoteRefused) as caught:
            await call(b.link, method, Size(1), timeout=5)
        assert caught.value.code == "body_refused"
        async with exchange(b.link, method, Size(1), timeout=5) as reply:
            await reply.read_into(memoryview(bytearray(19)))
            assert await reply.result() == Size(3)


async def test_more_small_calls_than_allowed_at_once_wait_for_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "MAX_LINK_CALLS", 3)
    now, most = 0, 0

    async def slow(call: Call[Text]) -> Text:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await trio.sleep(1)
        now -= 1
        return call.request

    async with bench() as b, trio.open_nursery() as nursery:
        b.server.serve(ECHO, slow)
        for number in range(10):
            nursery.start_soon(b.echo, str(number), 60.0)
    assert most == 3


async def test_a_small_call_to_whoever_serves_none_is_refused() -> None:
    async with link_pair(Virtual()) as pair:
        with pytest.raises(RemoteRefused) as caught:
            await call(pair.a, ECHO, Text("?"), timeout=5)
        assert caught.value.code == "unknown_protocol"
        assert pair.a.alive


async def test_a_small_call_waiting_for_its_turn_ends_with_the_link(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "MAX_LINK_CALLS", 1)

    async def never(call: Call[Text]) -> Text:
        await trio.sleep_forever()

    async with bench() as b, trio.open_nursery() as nursery:
        b.server.serve(ECHO, never)

        async def ask() -> None:
            with pytest.raises(LinkClosed):
                await b.echo(timeout=1000.0)

        nursery.start_soon(ask)
        nursery.start_soon(ask)
        await trio.sleep(1)
        await b.link.aclose()
    assert b.server.active() == 0


@pytest.mark.parametrize(
    "head",
    [b"", bytes(8), bytes(9), struct.pack(">dB", float("nan"), 4) + b"echo", struct.pack(">dB", 5.0, 9) + b"echo"],
)
async def test_a_small_call_with_a_broken_head_is_refused(head: bytes) -> None:
    async with bench() as b:
        answer = await b.link.ask(head)
        assert answer[0] == Part.ERROR
        assert b.link.alive
        assert await b.echo("still") == "still"
