"""Links in bad company: stalled pipes, hostile peers that ask for pipes, garbage that trickles, nodes that stop."""

from __future__ import annotations

import gc
import math
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial

import attrs
import pytest
import trio

from shoal.transport import defaults
from shoal.transport.address import Address
from shoal.transport.aead import NOMINAL_CIPHERS
from shoal.transport.callmux import CallMux
from shoal.transport.deadlines import LoopLag
from shoal.transport.dialback import DIAL_BACK, DIAL_FOR, DialBack, DialFor
from shoal.transport.endpoint import Endpoint
from shoal.transport.errors import HandshakeError, RemoteError, RemoteProtocolError, RemoteRefused
from shoal.transport.establish import join_pipe, open_pipe
from shoal.transport.frames import HEADER, Frame
from shoal.transport.link import Link, LinkStream, Priority
from shoal.transport.meeting import hand_in
from shoal.transport.memory import Route
from shoal.transport.mux import Mux
from shoal.transport.network import ByteStream
from shoal.transport.pipe import Pipe
from shoal.transport.pipehello import _PREAMBLE as PREAMBLE
from shoal.transport.pipehello import BAD_PROOF, PipeRefused, SessionSecrets
from shoal.transport.race import Race
from shoal.transport.records import Record, RecordOpener, RecordSealer
from shoal.transport.rpc import Call, Method, exchange
from shoal.transport.session import Session
from shoal.transport.traversal import Traversal
from shoal.transport.widening import WIDEN, Widen

from .harness import Virtual, connect_bytes, nodes
from .link_conformance import pattern, read_all
from .test_pipes import ends, lab, opening, settled


@attrs.frozen
class Text:
    text: str


CIPHER = NOMINAL_CIPHERS[-1].name
ECHO = Method("faults.echo", Text, Text)


async def echo(call: Call[Text]) -> Text:
    return call.request


# Records


@pytest.mark.parametrize("size", [1, 30_000])
async def test_a_stalled_pipe_among_several_ends_no_honest_link(size: int) -> None:
    """However small or many the records that the other pipes carry meanwhile."""
    async with lab(Virtual(Route(latency=0.02))) as bench:
        for _ in range(2):
            await bench.add(bulk_only=True)
        await settled(bench.pair.a, 3)
        await settled(bench.pair.b, 3)
        bench.raw[1][0]._out.stall()  # type: ignore[attr-defined]
        count = 30_000 if size == 1 else 2_000
        ours = await bench.pair.a.open_stream("x", Priority.BULK)
        got: list[bytes] = []

        async def receive() -> None:
            got.append(await read_all(await bench.pair.accept()))

        data = pattern(size * count)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            for at in range(0, len(data), size):
                await ours.send_all(memoryview(data)[at : at + size])
            await ours.send_eof()
        assert got == [data]
        assert bench.pair.a.alive
        assert bench.pair.b.alive


async def test_control_that_overtakes_what_a_slow_pipe_still_holds_ends_no_honest_link() -> None:
    async with lab(Virtual(Route(latency=0.02))) as bench:
        bench.pair.a.best.way = bench.pair.b.best.way = "relay"
        ours = await bench.pair.a.open_stream("x")
        theirs = await bench.pair.accept()
        got: list[bytes] = []
        count = 3 * defaults.MAX_EARLY_RECORDS

        async def receive() -> None:
            got.append(await read_all(theirs))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            bench.raw[0][0]._out.stall()  # type: ignore[attr-defined]
            await ours.send_all(b"x")
            await bench.add("punch")
            for _ in range(count):
                await ours.send_all(b"x")
            await ours.send_eof()
        assert got == [b"x" * (count + 1)]


# Pipes


async def test_pipes_that_one_side_gives_back_are_given_up_by_the_other_and_count_as_no_loss() -> None:
    async with lab(Virtual()) as bench:
        for _ in range(4):
            await bench.add(bulk_only=True)
        await settled(bench.pair.a, 5)
        await settled(bench.pair.b, 5)
        bench.pair.a.narrow(1)
        await trio.sleep(1)
        assert len(bench.pair.a.pipes) == len(bench.pair.b.pipes) == 2
        assert bench.pair.a.pipes_lost == bench.pair.b.pipes_lost == 0


async def test_many_pipes_opened_at_the_same_moment_are_no_more_than_allowed() -> None:
    async with lab(Virtual()) as bench:

        async def greet(task: Callable[[], Awaitable[Pipe]]) -> None:
            try:
                await task()
            except RemoteError as error:
                refused.append(error)

        refused: list[RemoteError] = []
        here, there = bench.pair.a, bench.pair.b
        streams = [await connect_bytes(bench.world) for _ in range(3 * defaults.MAX_PIPES)]
        async with trio.open_nursery() as nursery:
            for host, other, out, into in streams:
                find = {there.secrets.id: there}.get
                nursery.start_soon(greet, partial(join_pipe, other, into, b"", "direct", find, LoopLag()))
                nursery.start_soon(greet, partial(open_pipe, host, here, out, "direct", bulk_only=True))
        for link in (here, there):
            assert len(link.pipes) <= defaults.MAX_PIPES
            assert link.alive
        assert refused


async def test_a_pipe_for_control_finds_room_beside_all_those_for_bulk() -> None:
    """The path of all of them may have died, and nobody knows yet."""
    async with lab(Virtual()) as bench:
        for _ in range(defaults.MAX_PIPES - 1):
            await bench.add(bulk_only=True)
        await bench.add()
        assert bench.pair.a.alive


async def test_a_peer_that_asks_for_pipes_again_and_again_gets_no_more_dials_than_pipes() -> None:
    async with nodes(Virtual()) as n:
        victim, hostile = await n.add("victim"), await n.add("hostile")
        link = await victim.connect(hostile.peer_id, hostile.addresses())
        dials = most = 0
        dial = victim._widening._dial

        async def counted(address: Address) -> object:
            nonlocal dials, most
            dials += 1
            most = max(most, dials)
            try:
                return await dial(address)
            finally:
                dials -= 1

        victim._widening._dial = counted  # type: ignore[assignment]
        back = hostile.link(victim.peer_id)
        assert back is not None

        async def ask() -> None:
            try:
                async with exchange(back, WIDEN, Widen(15), timeout=20.0) as reply:
                    await reply.result()
            except RemoteError:
                pass

        async with trio.open_nursery() as nursery:
            for _ in range(200):
                nursery.start_soon(ask)
        assert most < defaults.MAX_PIPES
        assert len(link.pipes) <= defaults.MAX_PIPES


async def test_garbage_that_trickles_is_no_sign_of_life() -> None:
    """Whoever passes the bytes on drops them, and sends the head of a record that never ends, a byte per second."""
    async with lab(Virtual()) as bench:
        bench.pair.a._pipes.look_after = lambda *_, **__: math.inf  # type: ignore[method-assign]
        await trio.sleep(1)
        out = bench.raw[0][0]
        await out.send_all((512 << 10).to_bytes(4, "big"))
        began = trio.current_time()
        with trio.move_on_after(3600):
            async with trio.open_nursery() as nursery:

                async def trickle() -> None:
                    try:
                        while True:
                            await out.send_all(b"\0")
                            await trio.sleep(1)
                    except (trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError):
                        pass

                nursery.start_soon(trickle)
                await bench.pair.b.closed.wait()
                nursery.cancel_scope.cancel()
        assert trio.current_time() - began < 120
        assert "sign of life" in str(bench.pair.b.close_reason)


def test_two_hellos_that_cross_on_one_connection_are_no_refusal() -> None:
    """Both dialled from their listening ports at the same moment; each reads the other's hello for an answer."""
    a, b = ends()
    ours, theirs = opening(a), opening(b)
    with pytest.raises(HandshakeError, match="same moment") as caught:
        ours.receive(theirs.hello[: ours.missing])
    assert not isinstance(caught.value, PipeRefused)


def test_a_link_may_have_more_pipes_in_its_life_than_a_day_of_training_opens_and_each_number_counts_once() -> None:
    ours = SessionSecrets(bytes(32), "ChaCha20-Poly1305", initiator=True)
    theirs = SessionSecrets(bytes(32), "ChaCha20-Poly1305", initiator=False)
    overtaken = ours.next_index()
    for _ in range(100_000):
        index = ours.next_index()
        assert theirs.use(index)
        assert not theirs.use(index)
    assert not theirs.use(overtaken)
    assert not theirs.use(index - 1000)
    late, later = ours.next_index(), ours.next_index()
    assert theirs.use(later)
    assert theirs.use(late)
    assert not theirs.use(late)
    assert not theirs.use(index + 1)  # one of its own
    assert not theirs.use(1 << 32)
    ours._next = defaults.MAX_PIPE_INDEX + 2
    with pytest.raises(RemoteError, match="used up"):
        ours.next_index()


def test_a_new_pipe_has_a_higher_number_than_any_before_whoever_opened_them() -> None:
    ours = SessionSecrets(bytes(32), "ChaCha20-Poly1305", initiator=True)
    theirs = SessionSecrets(bytes(32), "ChaCha20-Poly1305", initiator=False)
    last = 0
    for opener, other in [(ours, theirs)] * 3 + [(theirs, ours)] * 4 + [(ours, theirs), (theirs, ours)] * 2:
        index = opener.next_index()
        assert other.use(index)
        assert index > last
        last = index


def test_a_number_far_ahead_costs_no_memory() -> None:
    secrets = SessionSecrets(bytes(32), "ChaCha20-Poly1305", initiator=True)
    assert secrets.use(2)
    assert secrets.use(defaults.MAX_PIPE_INDEX - 1)
    assert not secrets.use(2)
    assert secrets._used.bit_length() <= defaults.PIPE_INDEX_WINDOW


# Calls


def test_calls_that_are_given_up_unsent_do_not_pile_up() -> None:
    calls = CallMux(RemoteProtocolError)
    made = 0
    while calls.can_call and made < 100_000:
        calls.cancel(calls.call(bytes(1000)))
        made += 1
    assert made < 10_000
    while calls.take([], 1 << 16):
        pass
    assert calls.can_call


# Dial-backs


async def test_a_dial_back_tells_nobody_what_listens_at_an_address_that_is_no_peers() -> None:
    async with nodes(Virtual()) as n:
        node, curious = await n.add("node", traversal=Traversal()), await n.add("curious")
        await curious.connect(node.peer_id, node.addresses())
        shop = await n.world.host("shop").network.listen(Address("mem", "shop", 1))

        async def serve() -> None:
            while True:
                await (await shop.accept()).send_all(b"220 secret 9.1\r\n")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            asked = DialFor(n.make("stranger").peer_id, (shop.address,))
            answer = await curious.call(node.peer_id, DIAL_FOR, asked)
            nursery.cancel_scope.cancel()
        assert answer.dialled[0].outcome == "failed"
        assert "secret" not in answer.dialled[0].reason
        assert "somebody else" in answer.dialled[0].reason
        await shop.aclose()


async def test_many_names_at_one_address_do_not_use_up_the_dial_backs_of_others() -> None:
    async with nodes(Virtual()) as n:
        node, honest = await n.add("node", traversal=Traversal(dial_back=False)), await n.add("honest")
        assert node.traversal is not None
        service = node.traversal.reachability._service
        refused = 0
        for i in range(100):
            try:
                service._admit(n.make(f"name{i}").peer_id, Address("mem", "crowd", 100 + i), ())
            except RemoteRefused:
                refused += 1
        assert 60 <= refused < 100
        await honest.connect(node.peer_id, node.addresses())
        answer = await honest.call(node.peer_id, DIAL_BACK, DialBack(honest.addresses()))
        assert answer.dialled[0].outcome == "reached"


# Nodes that stop


async def test_a_hole_that_opens_as_the_node_stops_is_closed() -> None:
    async with nodes(Virtual()) as n:
        node = await n.add("node")
        streams = [(await connect_bytes(n.world))[2:] for _ in range(2)]
        await n.stop("node")
        await hand_in(node, streams[0][0], "punch")
        await hand_in(node, streams[1][0], "webrtc")
        for _, far in streams:
            with trio.fail_after(1):
                assert await hung_up(far)


async def hung_up(stream: ByteStream) -> bool:
    try:
        return not await stream.receive_some()
    except trio.BrokenResourceError:
        return True


@pytest.mark.parametrize("after", [0.0, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.1, 0.5])
async def test_whoever_connects_through_a_node_that_stops_gets_a_typed_error(after: float) -> None:
    async with nodes(Virtual()) as n:
        node, other = await n.add("node"), await n.add("other")
        nobody = (Address("mem", "nowhere", 1),)
        strangers = [n.make(f"stranger{i}").peer_id for i in range(5)]
        errors: list[BaseException] = []

        async def connect(peer: object, addresses: tuple[Address, ...]) -> None:
            for _ in range(100):
                try:
                    await node.connect(peer, addresses, timeout=5.0)  # type: ignore[arg-type]
                    await trio.sleep(0.001)
                except RemoteError as error:
                    errors.append(error)
                    await trio.sleep(0.001)

        async def identify() -> None:
            for _ in range(100):
                try:
                    link = await node.identify(other.addresses()[0])
                    await link.aclose()
                except RemoteError as error:
                    errors.append(error)
                    await trio.sleep(0.001)

        async def hand_in() -> None:
            for _ in range(50):
                raw = await other.host.network.dial(node_address)
                try:
                    node.incoming(raw, "punch")
                except RemoteError as error:
                    errors.append(error)
                    await trio.aclose_forcefully(raw)
                await trio.sleep(0.003)

        quiet = await n.world.host("quiet").network.listen(Address("mem", "quiet", 1))
        node_address = quiet.address
        async with trio.open_nursery() as nursery:
            for stranger in strangers:
                nursery.start_soon(connect, stranger, nobody)
            nursery.start_soon(connect, other.peer_id, other.addresses())
            nursery.start_soon(identify)
            nursery.start_soon(hand_in)
            await trio.sleep(after)
            await n.stop("node")
        assert errors
        await quiet.aclose()


@pytest.mark.parametrize("after", [0.0, 0.01, 0.02, 0.03, 0.04])
async def test_a_pipe_that_comes_while_its_link_ends_is_refused_with_a_typed_error(after: float) -> None:
    async with lab(Virtual()) as bench:
        refused: list[RemoteError] = []
        here, there = bench.pair.a, bench.pair.b
        streams = [await connect_bytes(bench.world) for _ in range(100)]

        async def greet(task: Callable[[], Awaitable[Pipe]]) -> None:
            try:
                await task()
            except RemoteError as error:
                refused.append(error)

        async with trio.open_nursery() as nursery:
            for host, other, out, into in streams:
                find = {there.secrets.id: there}.get
                nursery.start_soon(greet, partial(join_pipe, other, into, b"", "direct", find, LoopLag()))
                nursery.start_soon(greet, partial(open_pipe, host, here, out, "direct"))
                await trio.sleep(0.0005)
                if trio.current_time() > after and here.alive:
                    nursery.start_soon(here.aclose)
        assert refused
        assert not here.alive


# Nothing grows


def census() -> Counter[str]:
    gc.collect()
    kinds = (Link, LinkStream, Pipe, Race, trio.lowlevel.Task, trio.CancelScope)
    return Counter(type(thing).__name__ for thing in gc.get_objects() if issubclass(type(thing), kinds))


async def cycle(a: Endpoint, b: Endpoint, i: int) -> None:
    link = await a.connect(b.peer_id, b.addresses())
    assert (await a.call(b.peer_id, ECHO, Text(str(i)))).text == str(i)
    if i % 2:
        raw = link.best.stream
        await trio.aclose_forcefully(raw)  # both ends look for another pipe
        assert (await b.call(a.peer_id, ECHO, Text(str(i)), timeout=20.0)).text == str(i)
        assert link.alive
    if i % 3 == 0:
        other = b.link(a.peer_id)
        assert other is not None
        await other.aclose()
    else:
        await link.aclose()
    with trio.fail_after(30):
        while a.link(b.peer_id) or b.link(a.peer_id):
            await trio.sleep(0.01)


@pytest.mark.parametrize("cycles", [150, pytest.param(2000, marks=pytest.mark.slow)])
async def test_links_that_come_break_go_on_and_end_leave_nothing_behind(cycles: int) -> None:
    async with nodes(Virtual(Route(latency=0.005))) as n:
        a, b, c = [await n.add(name, traversal=Traversal(reservations=0, stun=False)) for name in "abc"]
        for endpoint in (a, b, c):
            endpoint.serve(ECHO, echo)
            endpoint._acceptor.throttle = None
        pairs = ((a, b), (b, c), (c, a), (b, a))
        for i in range(20):
            await cycle(*pairs[i % 4], i)
        await trio.sleep(300)
        before = census()
        sizes = [sizes_of(endpoint) for endpoint in (a, b, c)]
        for i in range(cycles):
            await cycle(*pairs[i % 4], i)
        await trio.sleep(300)
        after = census()
        assert {kind: after[kind] - before[kind] for kind in after if after[kind] > before[kind] + 2} == {}
        assert [sizes_of(endpoint) for endpoint in (a, b, c)] == sizes
        assert after["Link"] == 0


def sizes_of(endpoint: Endpoint) -> dict[str, int]:
    """Entries in everything of an endpoint that is kept per link or peer."""
    connector, table = endpoint._connector, endpoint._table
    holders = {
        "connector": connector,
        "table": table,
        "acceptor": endpoint._acceptor,
        "widening": endpoint._widening,
        "server": endpoint._server,
    }
    if connector.mender is not None:
        holders["mender"] = connector.mender
    return {
        f"{name}.{field}": len(value)
        for name, holder in holders.items()
        for field, value in vars(holder).items()
        if isinstance(value, (dict, list))
    }


# Memory


@pytest.mark.parametrize("size", [1 << 10, (64 << 10) - 16, 64 << 10, 100 << 10, 256 << 10, 300 << 10, 512 << 10])
def test_a_record_that_nobody_reads_holds_at_most_twice_its_bytes(size: int) -> None:
    """On both sides: what is received and what waits for its acknowledgement. Limits count bytes, not buffers."""
    sealer, opener = (kind(CIPHER, bytes(32)) for kind in (RecordSealer, RecordOpener))
    opener.feed(sealer.seal((bytes(512 << 10),)))  # it does send large ones
    wire = sealer.seal_to_keep((bytes(size),)).wire
    assert held_by(wire) <= 2 * size + 1024
    (record,) = opener.feed(wire)
    assert held_by(record.data) <= 2 * size + 1024


def held_by(view: bytearray | memoryview) -> int:
    return len(view.obj) if isinstance(view, memoryview) else len(view)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.45, 0.6, 1.0])
def test_a_part_of_a_record_that_nobody_reads_holds_at_most_twice_its_bytes(share: float) -> None:
    """The rest of the record was for a stream that is read, or closed."""
    mux, size = Mux(initiator=False), 400_000
    part = int(size * share)
    opened = b"".join(HEADER.pack(Frame.OPEN, n << 2 | 3, 1) + b"x" for n in (1, 2))
    mux.receive(Record(memoryview(opened)), Priority.BULK)
    frames = HEADER.pack(Frame.DATA, 7, part) + bytes(part)
    if size > part:
        frames += HEADER.pack(Frame.DATA, 11, size - part) + bytes(size - part)
    mux.receive(Record(memoryview(bytearray(frames))), Priority.BULK)
    (chunk,) = mux._streams[7]._chunks
    assert held_by(memoryview(chunk)) <= 2 * part + 1024


@pytest.mark.parametrize("rekey_after", [1, 2, 3, 7])
def test_what_was_sealed_under_keys_that_are_gone_goes_out_again_on_another_pipe(rekey_after: int) -> None:
    """Keys step forward while records wait for their acknowledgement, and step while they are sent again."""
    sender, receiver = Session((1 << 20, 1 << 20)), Session((1 << 20, 1 << 20))
    pipes = [
        (
            RecordSealer(CIPHER, bytes([n]) * 32, rekey_after=rekey_after),
            RecordOpener(CIPHER, bytes([n]) * 32, rekey_after=rekey_after),
        )
        for n in range(4)
    ]
    texts = [bytes([i]) * (i + 1) for i in range(50)]
    waiting = [[text] for text in texts]
    for _ in texts:
        wire = sender.compose(1, 0, pipes[0][0], lambda: waiting.pop(0))
        assert wire is not None
    got: list[bytes] = []
    for pipe in (1, 2, 3):  # each dies after having carried some; only the last one's records arrive
        sender.lost(pipe - 1)
        sealer, opener = pipes[pipe]
        count = 0
        while (wire := sender.compose(1, pipe, sealer, lambda: None)) is not None and (pipe == 3 or count < 20):
            count += 1
            for record in opener.feed(wire):
                if pipe != 2:
                    got += [bytes(payload) for payload in receiver.receive(record)[1]]
    assert got == texts


async def test_a_pipe_of_a_private_swarm_opens_for_its_session_alone() -> None:
    key = bytes(range(32))
    async with nodes(Virtual()) as n:
        a = await n.add("a", psk=key, traversal=Traversal())
        b = await n.add("b", psk=key, traversal=Traversal())
        stranger = await n.add("stranger")
        link = await a.connect(b.peer_id, b.addresses())
        raw = await stranger.host.network.dial(b.addresses()[0])
        guess = SessionSecrets(bytes(32), link.cipher, initiator=True)
        guess.id = link.secrets.id  # it was seen on its way
        await raw.send_all(opening(guess).hello)
        with trio.fail_after(20):
            assert (await raw.receive_some())[len(PREAMBLE)] == BAD_PROOF
        assert len(link.pipes) == 1
        # a dial-back proves its answerer by the swarm's key as well
        stranger_record = DialFor(stranger.peer_id, stranger.addresses())
        answer = await a.call(b.peer_id, DIAL_FOR, stranger_record)
        assert answer.dialled[0].outcome == "failed"
        answer = await a.call(b.peer_id, DIAL_FOR, DialFor(a.peer_id, a.addresses()))
        assert answer.dialled[0].outcome == "reached"
        await trio.aclose_forcefully(link.best.stream)
        b.serve(ECHO, echo)
        assert await a.call(b.peer_id, ECHO, Text("again"), timeout=20.0) == Text("again")
        assert a.link(b.peer_id) is link


async def test_a_pipe_that_was_suspect_and_is_the_last_again_means_trouble_again() -> None:
    async with lab(Virtual()) as bench:
        troubles: list[float] = []
        here = bench.pair.a
        here.on_trouble = lambda: troubles.append(trio.current_time())
        bench.pair.b.on_trouble = lambda: None
        stream = await here.open_stream("x")
        bench.raw[0][0]._out.stall()  # type: ignore[attr-defined]
        bench.raw[0][1]._out.stall()  # type: ignore[attr-defined]
        await stream.send_all(b"?")
        await trio.sleep(2.6)
        assert len(troubles) == 1
        here._pipes.all[0].asked = trio.current_time() + 100  # it stays suspect for as long as this takes
        await bench.add(bulk_only=True)  # for want of a better one, it carries everything
        with trio.fail_after(1):
            while here.best.index == 0:
                await trio.sleep(0.01)
        await bench.cut(1)
        await trio.sleep(0.1)
        assert here.best.index == 0
        assert here.troubled
        assert len(troubles) == 2


@pytest.mark.parametrize("busy", [False, True])
async def test_a_pipe_that_dies_as_it_takes_over_leaves_no_link_half_dead(busy: bool) -> None:
    """One side has retired the old pipe for it, the other has never heard a record on it."""
    async with lab(Virtual()) as bench:
        troubled: dict[str, float] = {}
        for name, link in (("a", bench.pair.a), ("b", bench.pair.b)):
            link.best.way = "relay"
            link.on_trouble = partial(lambda name: troubled.setdefault(name, trio.current_time()), name)
        ours = await bench.pair.a.open_stream("x")
        theirs = await bench.pair.accept()
        here, there, out, into = await connect_bytes(bench.world)
        find = {bench.pair.b.secrets.id: bench.pair.b}.get
        async with trio.open_nursery() as nursery:
            nursery.start_soon(join_pipe, there, into, b"", "direct", find, LoopLag())
            await open_pipe(here, bench.pair.a, out, "direct")
            out._out.stall()  # type: ignore[attr-defined]
        began = trio.current_time()
        await trio.sleep(0.1)
        assert bench.pair.a.way == "direct"
        assert bench.pair.b.best.peer_retired
        if busy:
            await ours.send_all(b"?")
        with trio.fail_after(30):
            while len(troubled) < 2:
                await trio.sleep(0.05)
        # both look for a pipe while the other still waits for one
        assert abs(troubled["a"] - troubled["b"]) < defaults.RESUME_FLOOR
        assert trio.current_time() - began < 12
        bench.raw.append((out, into))
        await bench.cut(1)
        await bench.add()
        if not busy:
            await ours.send_all(b"?")
        with trio.fail_after(2):
            assert await theirs.receive_some() == b"?"
            await theirs.send_all(b"!")
            assert await ours.receive_some() == b"!"
