"""Attacks on the way to a link and on a link, each with its figure. Virtual time: a second here is exact."""

from __future__ import annotations

import random
from collections.abc import Callable

import attrs
import pytest
import trio

from shoal.transport import defaults
from shoal.transport.address import Address, PeerRecord, SignedPeerRecord
from shoal.transport.aead import NOMINAL_CIPHERS, CipherOffer, choose
from shoal.transport.endpoint import HELLO, Endpoint, Hello
from shoal.transport.errors import DecodeError, HandshakeError, PeerUnreachable, RemoteError, RemoteRefused
from shoal.transport.identity import Identity
from shoal.transport.memory_flow import Route
from shoal.transport.network import ByteStream
from shoal.transport.rpc import Call, Method
from shoal.transport.secure import SecureChannel
from shoal.transport.wire import pack

from ..transport.harness import Nodes, Virtual, nodes
from .decoders import ALICE, BOB, channel, transcript
from .samples import WALL


@attrs.frozen
class Echo:
    text: str


ECHO = Method("hostile.echo", Echo, Echo)


async def echo(call: Call[Echo]) -> Echo:
    return call.request


async def victim(n: Nodes, **options: object) -> Endpoint:
    endpoint = await n.add("victim", **options)  # type: ignore[arg-type]
    endpoint.serve(ECHO, echo)
    return endpoint


async def served(endpoint: Endpoint, by: Endpoint) -> float:
    """An echo of ``by``, connecting first if need be; virtual seconds."""
    began = trio.current_time()
    if endpoint.link(by.peer_id) is None:
        await endpoint.connect(by.peer_id, by.own_addresses())
    assert (await endpoint.call(by.peer_id, ECHO, Echo("hello"), timeout=10.0)).text == "hello"
    return trio.current_time() - began


class Middle:
    """Whoever sits on the path: listens as ``middle``, dials the victim, passes on what ``change`` makes of the bytes.

    ``change(to_victim, data)``. ``heard``: all that passed, by direction (True: to the victim).
    """

    def __init__(self, n: Nodes, target: Endpoint, change: Callable[[bool, bytes], bytes]) -> None:
        self.network = n.world.host("middle").network
        self.target, self.change = target, change
        self.heard: dict[bool, bytearray] = {True: bytearray(), False: bytearray()}
        self.streams: list[tuple[ByteStream, ByteStream]] = []

    address = Address("mem", "middle", 1)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as nursery, await self.network.listen(self.address) as listener:
            task_status.started()
            while True:
                here = await listener.accept()
                there = await self.network.dial(self.target.own_addresses()[0])
                self.streams.append((here, there))
                nursery.start_soon(self._pass_on, here, there, True)
                nursery.start_soon(self._pass_on, there, here, False)

    async def _pass_on(self, source: ByteStream, sink: ByteStream, to_victim: bool) -> None:
        try:
            while data := await source.receive_some():
                self.heard[to_victim] += data
                await sink.send_all(self.change(to_victim, data))
            await sink.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            await trio.aclose_forcefully(source)
            await trio.aclose_forcefully(sink)


def unchanged(to_victim: bool, data: bytes) -> bytes:
    return data


# --- who connects and wastes time --------------------------------------------------------------------------------


async def _dribble(stream: ByteStream, data: bytes, every: float) -> None:
    try:
        for byte in data:
            await stream.send_all(bytes([byte]))
            await trio.sleep(every)
        await trio.sleep_forever()
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass


async def _until_hung_up(stream: ByteStream) -> float:
    try:
        while await stream.receive_some():
            pass
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass
    return trio.current_time()


async def test_a_thousand_slow_loris_connections_hold_256_places_for_8_seconds_and_keep_nobody_out() -> None:
    """Each says a correct handshake at one byte per second. An honest stranger needs four one-way trips of 10 ms."""
    async with nodes(Virtual()) as n:
        target, honest = await victim(n), await n.add("honest")
        network = n.world.host("loris").network
        words = channel(True).start()
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            streams = [await network.dial(target.own_addresses()[0]) for _ in range(1000)]
            for stream in streams:
                nursery.start_soon(_dribble, stream, words, 1.0)
            await trio.sleep(1.0)
            assert len(target._acceptor._half_open) == defaults.MAX_HALF_OPEN
            assert await served(honest, target) < 0.2
            assert trio.current_time() - began < 60
            ended = 0.0
            for stream in streams:
                ended = max(ended, await _until_hung_up(stream))
            dialled = began + 1000 * 0.02
            assert ended - dialled < defaults.HANDSHAKE_FLOOR + 2.0
            nursery.cancel_scope.cancel()
        assert len(target._acceptor._half_open) == 0
        assert target.counters["half_open_dropped"] + target.counters["handshakes_expired"] == 1000
        assert [link.peer for link in target.links()] == [honest.peer_id]


async def test_a_crowd_of_half_open_connections_from_one_address_does_not_push_out_anothers_handshake() -> None:
    """An honest handshake over a path of 2 s one way is under way while one address opens 600 connections."""
    world = Virtual()
    async with nodes(world) as n:
        target, honest = await victim(n), await n.add("honest")
        world.memory.set_route("honest", "victim", Route(latency=0.9))
        network = n.world.host("crowd").network
        took: list[float] = []

        async def connect() -> None:
            took.append(await served(honest, target))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(connect)
            await trio.sleep(1.0)
            crowd = [await network.dial(target.own_addresses()[0]) for _ in range(600)]
        assert target.counters["half_open_dropped"] >= 300
        assert took[0] < 10.0
        assert honest.peer_id in [link.peer for link in target.links()]
        for stream in crowd:
            await stream.aclose()


async def test_a_flood_of_connections_gets_its_rate_and_starts_no_task_beyond_it() -> None:
    """3,000 a second for 3 seconds, all at once in virtual time; another address is served between them."""
    async with nodes(Virtual()) as n:
        target, honest = await victim(n), await n.add("honest")
        network = n.world.host("flood").network
        tasks = waits = 0.0

        async def one() -> None:
            stream = await network.dial(target.own_addresses()[0])
            await stream.aclose()

        for _ in range(30):
            async with trio.open_nursery() as nursery:
                for _ in range(300):
                    nursery.start_soon(one)
                await trio.sleep(0.1)
            tasks = max(tasks, trio.lowlevel.current_statistics().tasks_living)
            waits = max(waits, await served(honest, target))
        admitted = 9000 - target.counters["connections_throttled"]
        passed = trio.current_time()
        assert admitted <= defaults.SOURCE_CONNECTIONS_BURST + defaults.SOURCE_CONNECTIONS * passed + 30
        assert tasks < defaults.MAX_HALF_OPEN + 100
        assert waits < 0.2


# --- who recorded what was said ----------------------------------------------------------------------------------


async def test_a_recorded_handshake_and_link_played_again_open_nothing() -> None:
    async with nodes(Virtual()) as n:
        target, honest = await victim(n), await n.add("honest", listen=False)
        middle = Middle(n, target, unchanged)
        async with trio.open_nursery() as nursery:
            await nursery.start(middle.run)
            await honest.connect(target.peer_id, [middle.address])
            await honest.call(target.peer_id, ECHO, Echo("secret"))
            recorded = bytes(middle.heard[True])
            assert len(recorded) > 600
            nursery.cancel_scope.cancel()
        await n.stop("honest")
        links = len(target.links())
        stream = await n.world.host("evil").network.dial(target.own_addresses()[0])
        with trio.fail_after(defaults.HANDSHAKE_FLOOR + 2):
            await stream.send_all(recorded)
            await _until_hung_up(stream)
        assert target.counters["handshakes_refused"] == 1
        assert len(target.links()) <= links


async def test_bytes_of_a_link_that_are_doubled_altered_or_left_out_never_reach_a_stream() -> None:
    """Whatever the one in the middle does, an answer is the true one or the call ends in a typed error."""
    for kind in ("doubled", "altered", "left out", "swapped"):
        async with nodes(Virtual()) as n:
            target, honest = await victim(n), await n.add("honest", listen=False)
            armed = [False]

            def change(to_victim: bool, data: bytes, kind: str = kind, armed: list[bool] = armed) -> bytes:
                if not armed[0] or not to_victim or len(data) < 20:
                    return data
                armed[0] = False
                match kind:
                    case "doubled":
                        return data + data
                    case "altered":
                        return data[:10] + bytes([data[10] ^ 1]) + data[11:]
                    case "left out":
                        return data[20:]
                    case _:
                        return data[len(data) // 2 :] + data[: len(data) // 2]

            middle = Middle(n, target, change)
            async with trio.open_nursery() as nursery:
                await nursery.start(middle.run)
                await honest.connect(target.peer_id, [middle.address])
                assert (await honest.call(target.peer_id, ECHO, Echo("one"))).text == "one"
                armed[0] = True
                try:
                    assert (await honest.call(target.peer_id, ECHO, Echo("two"), timeout=20)).text == "two"
                except RemoteError:
                    pass
                assert not armed[0]
                nursery.cancel_scope.cancel()


async def test_our_own_bytes_sent_back_open_no_link() -> None:
    """Reflection: whoever answers with exactly what it hears is nobody, as responder and as initiator."""
    async with nodes(Virtual()) as n:
        target = await victim(n)
        network = n.world.host("mirror").network
        address = Address("mem", "mirror", 1)

        async def mirror(stream: ByteStream) -> None:
            try:
                while data := await stream.receive_some():
                    await stream.send_all(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass

        async with trio.open_nursery() as nursery, await network.listen(address) as listener:

            async def serve() -> None:
                while True:
                    nursery.start_soon(mirror, await listener.accept())

            nursery.start_soon(serve)
            with pytest.raises(PeerUnreachable, match="mirror"):
                await target.identify(address)
            # And towards it: its own first bytes, which it only sends after ours.
            stream = await network.dial(target.own_addresses()[0])
            await stream.send_all(channel(True).start())
            his = await stream.receive_some()
            await stream.send_all(his)
            await _until_hung_up(stream)
            nursery.cancel_scope.cancel()
        assert target.links() == []


# --- who wants a weaker cipher -----------------------------------------------------------------------------------


def test_no_change_to_a_handshake_on_its_way_changes_the_cipher() -> None:
    """Every byte of both sides' handshakes altered in two ways: 1,100 attempts, none ends with another cipher."""
    expected = choose(NOMINAL_CIPHERS, NOMINAL_CIPHERS)[0]
    hers, his = transcript(records=())
    attempts = 0
    for to_victim, whole in ((True, hers), (False, his)):
        for at in range(len(whole)):
            for flip in (1, 0x80):
                attempts += 1
                outcome = _through(to_victim, at, flip)
                assert outcome in ("failed", expected), f"byte {at}: {outcome}"
                # The preamble and every offer are in the transcript: not one changed byte goes unnoticed.
                assert outcome == "failed"
    assert attempts > 1000


def _through(to_victim: bool, at: int, flip: int) -> str:
    """A handshake of ALICE with BOB, byte ``at`` of one direction altered; its cipher when both sides take it."""
    a, b = channel(True), channel(False)
    done = {True: 0, False: 0}

    def altered(direction: bool, data: bytes) -> bytes:
        begin, done[direction] = done[direction], done[direction] + len(data)
        if direction is to_victim and begin <= at < begin + len(data):
            data = bytearray(data)
            data[at - begin] ^= flip
        return bytes(data)

    b.start()
    due = altered(True, a.start())
    try:
        for _ in range(4):
            b.receive(due)
            a.receive(altered(False, b.outgoing()))
            due = altered(True, a.outgoing())
        # The last message has no answer: what follows shows whether it was taken.
        if a.established:
            b.receive(altered(True, bytes(a.seal([b"record"]))))
        if b.established:
            a.receive(altered(False, bytes(b.seal([b"record"]))))
    except RemoteError:
        return "failed"
    if not (a.established and b.established):
        return "failed"
    assert a.cipher == b.cipher
    return a.cipher


def test_offers_are_believed_only_from_the_peer_itself() -> None:
    """BOB truly offers only the slow cipher, but in another session: recorded there and put in here, it is refused."""
    weak = tuple(offer for offer in NOMINAL_CIPHERS if offer.name == "chacha20-poly1305")
    recorded = _answer_of(BOB, weak, to=channel(True, seed="another"))
    alice = channel(True)
    alice.start()
    with pytest.raises(HandshakeError, match="broken handshake"):
        alice.receive(recorded)
    # One in the middle that answers for itself is heard, but it is not BOB.
    alice = _expecting_bob()
    with pytest.raises(HandshakeError, match="expected peer"):
        alice.receive(_answer_of(Identity(b"e" * 32), weak, to=alice))
    # BOB's own word, in this session, is believed, and his offers decide.
    alice = _expecting_bob()
    alice.receive(_answer_of(BOB, weak, to=alice))
    assert alice.cipher == "chacha20-poly1305"


def _expecting_bob() -> SecureChannel:
    draw = random.Random("expecting").randbytes
    return SecureChannel(
        initiator=True, identity=ALICE, entropy=draw, wall=WALL, expected=BOB.peer_id, ciphers=NOMINAL_CIPHERS
    )


def _answer_of(identity: Identity, offers: tuple[CipherOffer, ...], *, to: SecureChannel) -> bytes:
    """What ``identity`` answers to the first message of ``to``."""
    draw = random.Random("answer").randbytes
    side = SecureChannel(initiator=False, identity=identity, entropy=draw, wall=WALL, ciphers=offers)
    side.start()
    side.receive(to.start())
    return side.outgoing()


async def test_one_in_the_middle_cannot_make_a_private_swarm_open() -> None:
    """It rewrites the pattern in the preamble of both sides; neither takes the other for an open node."""
    async with nodes(Virtual()) as n:
        key = bytes(range(32))
        target, honest = await victim(n, psk=key), await n.add("honest", listen=False, psk=key)

        def change(to_victim: bool, data: bytes) -> bytes:
            return data.replace(b"XXpsk0", b"XX" + b"\0" * 4).replace(b"Noise_XXpsk0", b"Noise_XX")

        middle = Middle(n, target, change)
        async with trio.open_nursery() as nursery:
            await nursery.start(middle.run)
            with pytest.raises(PeerUnreachable):
                await honest.connect(target.peer_id, [middle.address])
            nursery.cancel_scope.cancel()
        assert target.links() == []


# --- who forges records ------------------------------------------------------------------------------------------


def _true_record(endpoint: Endpoint) -> PeerRecord:
    return endpoint.record().open(endpoint.host.wall())


async def test_forged_peer_records_replace_nothing_wherever_they_are_offered() -> None:
    async with nodes(Virtual()) as n:
        target, honest, evil = await victim(n), await n.add("honest"), await n.add("evil")
        await honest.connect(target.peer_id, target.own_addresses())
        await evil.connect(target.peer_id, target.own_addresses())
        await trio.sleep(1)
        known = target.contact(honest.peer_id)
        assert known is not None
        wall = target.host.wall()
        true = known.open(wall)
        lures = (Address("mem", "evil", 1),)
        higher = pack(attrs.evolve(true, seq=true.seq + 100, addresses=lures))
        forged = {
            "another's signature": SignedPeerRecord(higher, evil.identity.sign(SignedPeerRecord._LABEL + higher)),
            "its own old signature": SignedPeerRecord(higher, known.signature),
            "signed without the label": SignedPeerRecord(higher, evil.identity.sign(higher)),
            "no signature": SignedPeerRecord(higher, b""),
            "expired": SignedPeerRecord.sign(evil.identity, lures, seq=1 << 40, expires=wall - 1000),
        }
        for name, record in forged.items():
            with pytest.raises(DecodeError):
                target.learn(record)
            with pytest.raises(RemoteRefused):
                await evil.call(target.peer_id, HELLO, Hello(record, "mem://x:1"))
            assert target.contact(honest.peer_id) == known, name


@pytest.mark.parametrize(
    ("name", "size"), [("one address too many", defaults.MAX_ADDRESSES + 1), ("thousands of addresses", 5000)]
)
def test_an_oversized_record_is_refused_though_its_signature_is_right(name: str, size: int) -> None:
    addresses = tuple(Address("mem", f"n{number}", 1) for number in range(size))
    packed = pack(PeerRecord(ALICE.peer_id, 1, WALL + 60, addresses))
    record = SignedPeerRecord(packed, ALICE.sign(SignedPeerRecord._LABEL + packed))
    with pytest.raises(DecodeError, match="peer record"):
        record.open(WALL)


def test_a_record_of_one_peer_is_never_anothers() -> None:
    record = SignedPeerRecord.sign(ALICE, (), seq=1, expires=WALL + 60)
    renamed = pack(attrs.evolve(record.open(WALL), peer=BOB.peer_id))
    with pytest.raises(DecodeError, match="wrong signature"):
        SignedPeerRecord(renamed, record.signature).open(WALL)


async def test_a_node_at_a_forged_address_is_not_taken_for_the_peer() -> None:
    """A true record may name another's address (a lie of its author): the handshake names who answers."""
    async with nodes(Virtual()) as n:
        target, honest, evil = await victim(n), await n.add("honest"), await n.add("evil")
        with pytest.raises(PeerUnreachable, match="expected peer"):
            await honest.connect(target.peer_id, evil.own_addresses())
        assert Identity(b"x" * 32).peer_id not in [link.peer for link in honest.links()]
        assert honest.links() == [] or all(link.peer != target.peer_id for link in honest.links())
