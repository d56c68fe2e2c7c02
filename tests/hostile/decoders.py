"""Every decoder of bytes from outside behind one face: samples of what it takes, and ``feed`` for any bytes.

``feed`` returns what it made of the bytes. It may raise the errors of :data:`TYPED` and nothing else; the tests here
and ``scripts/fuzz`` hold every decoder to that. ``sealed``: the bytes are signed or carry a checksum, so what is
accepted after a change must be equal to what was there before.
"""

from __future__ import annotations

import random
import struct
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch

from shoal.dht.blobs.bits import Bits
from shoal.dht.blobs.files import header, read_header
from shoal.dht.blobs.store import Store as BlobStore
from shoal.dht.blobs.tree import Outline, Tree, build_tree, check_outline, outline_fault
from shoal.dht.documents.envelope import Envelope, Evidence, client_id
from shoal.dht.documents.guard import Guard
from shoal.dht.documents.marks import Marks
from shoal.dht.documents.policy import DocumentSpec, Owner, unpack_spec
from shoal.dht.documents.replica import Replica
from shoal.dht.kademlia.keys import node_key
from shoal.dht.kademlia.records import VALIDATORS, Announcement, SignedRecord, digest, owned_key
from shoal.dht.kademlia.store import Store
from shoal.learning import defaults as learning_defaults
from shoal.learning.aggregate import resolve as resolve_aggregator
from shoal.learning.aggregate.products import pack_triangle, triangle_fault, triangle_size
from shoal.learning.events import Standing
from shoal.learning.pipeline.cargo import pack_batch, pack_tensor, unpack_batch, unpack_tensor
from shoal.learning.pipeline.messages import Shape
from shoal.learning.reduce.codecs import resolve as resolve_codec
from shoal.learning.reduce.leaves import bounds, build, leaf_elements
from shoal.learning.replay import Ledger
from shoal.learning.rounds.lies import Lie
from shoal.learning.rounds.messages import CommitRecord, instance_key
from shoal.learning.rounds.payloads import GATHER, Payload
from shoal.learning.rounds.statements import Combined, combined_bytes, context_of, inputs_of
from shoal.learning.rounds.trials import Opinion
from shoal.learning.rounds.weighing import decide
from shoal.learning.rundocs_content import CommitNote, read_ledger
from shoal.learning.spec import SignedSpec
from shoal.learning.standing import Standings, fault
from shoal.learning.store import Head, RunStore, Vote
from shoal.learning.strategies.spsa import SPSA
from shoal.node import control, swarm_key
from shoal.node.datadir import DataDir, NodeRecord
from shoal.node.ticket import Ticket
from shoal.transport import defaults, portmap_wire, punch, stun
from shoal.transport.address import Address, SignedPeerRecord
from shoal.transport.aead import NOMINAL_CIPHERS
from shoal.transport.callmux import CallReceived
from shoal.transport.errors import ConfigError, DecodeError, RemoteError
from shoal.transport.frames import MuxStream, Priority
from shoal.transport.identity import PeerId
from shoal.transport.mux import Mux
from shoal.transport.network import ByteStream
from shoal.transport.pipe import Pipe
from shoal.transport.pipehello import PipeGreeting, PipeOpening, SessionSecrets
from shoal.transport.punch import Answers, Offer
from shoal.transport.records import Record, RecordOpener, RecordSealer
from shoal.transport.secure import Established, PipeKnock, SecureChannel
from shoal.transport.session import PIPE, Session
from shoal.transport.webrtc_flow import ChannelFlow
from shoal.transport.wire import pack, unpack

from . import registry
from .samples import IDENTITIES, WALL, sample

#: What hostile bytes may cause: the peer's fault, or (for what a user types and what lies on disk) a named setting.
TYPED = (RemoteError, ConfigError)

RULE = resolve_aggregator("nnm+multikrum:f=1,definition=byzfl")

ALICE, BOB = IDENTITIES[:2]


@attrs.frozen
class Decoder:
    name: str
    seed: Callable[[random.Random], bytes]
    feed: Callable[[bytes], Any]
    sealed: bool = False


# --- messages ----------------------------------------------------------------------------------------------------


def _message(kind: type[Any]) -> Decoder:
    def feed(data: bytes) -> Any:
        message = unpack(kind, data)
        assert unpack(kind, pack(message)) == message
        return message

    return Decoder(f"message {kind.__module__.removeprefix('shoal.')}.{kind.__name__}", partial(_packed, kind), feed)


def _packed(kind: type[Any], rng: random.Random) -> bytes:
    return pack(sample(kind, rng))


# --- what is signed ----------------------------------------------------------------------------------------------


def _peer_record(data: bytes) -> Any:
    return unpack(SignedPeerRecord, data).open(WALL)


def _dht_record(rng: random.Random) -> bytes:
    value = rng.randbytes(rng.choice((0, 1, 100)))
    if rng.random() < 0.5:
        return pack(SignedRecord.sign(ALICE, "run", digest(value), value, seq=0, expires=WALL + 60))
    key = owned_key(ALICE.peer_id, rng.randbytes(rng.choice((0, 1, 32))))
    return pack(SignedRecord.sign(ALICE, "owned", key, value, seq=rng.randrange(1 << 63), expires=WALL + 60))


def _check_dht_record(data: bytes) -> Any:
    record = unpack(SignedRecord, data)
    record.check(WALL, VALIDATORS)
    assert 0 <= record.place < 1 << 256
    Store(node_key(BOB.peer_id)).put(record, WALL)
    return record


def _announcement(rng: random.Random) -> bytes:
    contact = SignedPeerRecord.sign(ALICE, (Address("tcp", "192.0.2.1", 1),), seq=1, expires=WALL + 60)
    made = Announcement.sign(ALICE, rng.randbytes(32), contact, issued=rng.randrange(9), expires=WALL + 60)
    return pack(made)


def _check_announcement(data: bytes) -> Any:
    announcement = unpack(Announcement, data)
    announcement.check(WALL)
    store = Store(node_key(BOB.peer_id))
    store.announce(announcement, WALL)
    store.providers(announcement.topic, WALL)
    return announcement


def _spec(rng: random.Random) -> bytes:
    from shoal.learning.spec import RunSpec

    spec = attrs.evolve(sample(RunSpec, rng, tame=True), founder=ALICE.peer_id, task="digits", mode="available")
    if spec.pipeline is None:
        spec = attrs.evolve(spec, part=None)
    return pack(SignedSpec.sign(ALICE, spec))


def _open_spec(data: bytes) -> Any:
    return unpack(SignedSpec, data).open()


def _tensor(rng: random.Random) -> bytes:
    shape, data = pack_tensor(torch.randn(3, rng.randrange(5)), rng.choice(("fp32", "bf16", "int8")))
    head = pack(shape)
    return len(head).to_bytes(4, "big") + head + bytes(data)


def _read_tensor(data: bytes) -> Any:
    size = int.from_bytes(data[:4], "big")
    return unpack_tensor(unpack(Shape, data[4 : 4 + size]), bytearray(data[4 + size :]))


def _nest(rng: random.Random) -> bytes:
    x = torch.zeros(2)
    batch = rng.choice((x, (x, x), [x, (x, {"a": x})], {"a": [x], "b": (x, x)}))
    return pack_batch(batch, rng.choice((None, x)))[1].encode()


def _read_nest(data: bytes) -> Any:
    return unpack_batch([torch.zeros(2)] * 4, data.decode("utf-8", "replace"))


def _products(rng: random.Random) -> bytes:
    """An owner's inner products of four members, and the coefficients that follow from them."""
    vectors = np.random.default_rng(rng.randrange(1 << 32)).standard_normal((4, 9))
    part = pack_triangle(vectors @ vectors.T)
    return part + decide(RULE, b"key", (part, part), 4).data


def _weigh(data: bytes) -> Any:
    """What a leader sees of an owner, and a member of a leader."""
    part, coefficients = data[: triangle_size(4)], data[triangle_size(4) :]
    wrong = decide(RULE, b"key", (part, part), 4, said=coefficients).wrong
    if wrong is None:
        assert np.isfinite(np.frombuffer(coefficients, "<f8")).all()
    if triangle_fault(part, 4, 9) is None:
        made = decide(RULE, b"key", (part, part), 4)
        assert made.wrong is not None or decide(RULE, b"key", (part, part), 4, said=made.data).wrong is None
    return wrong


# --- the secure channel ------------------------------------------------------------------------------------------


def channel(initiator: bool, *, psk: bytes | None = None, seed: str = "") -> SecureChannel:
    """One side between ALICE (initiator) and BOB, with the same keys every time."""
    keys = random.Random(f"{initiator}{seed}")
    return SecureChannel(
        initiator=initiator,
        identity=ALICE if initiator else BOB,
        entropy=keys.randbytes,
        wall=WALL,
        psk=psk,
        ciphers=NOMINAL_CIPHERS,
    )


def transcript(psk: bytes | None = None, records: Sequence[bytes] = (b"hello", b"x" * 300)) -> tuple[bytes, bytes]:
    """All bytes that ALICE and BOB send each other, handshake and some records: (hers, his)."""
    a, b = channel(True, psk=psk), channel(False, psk=psk)
    b.start()
    one = a.start()
    b.receive(one)
    two = b.outgoing()
    a.receive(two)
    three = a.outgoing()
    b.receive(three)
    hers, his = one + three, two
    for text in records:
        hers += a.seal([text])
        his += b.seal([text])
    return hers, his


def _secure(initiator: bool, psk: bytes | None) -> Decoder:
    def seed(rng: random.Random) -> bytes:
        hers, his = transcript(psk)
        return his if initiator else hers

    def feed(data: bytes) -> Any:
        side = channel(initiator, psk=psk)
        side.start()
        try:
            events = side.receive(data)
        except PipeKnock as knock:
            assert knock.got == data and not initiator
            return None
        side.eof()
        return [bytes(event.data) if isinstance(event, Record) else event for event in events]

    name = f"secure {'initiator' if initiator else 'responder'}{' psk' if psk else ''}"
    return Decoder(name, seed, feed, sealed=True)


def _hello(initiator: bool) -> Decoder:
    """What stands, encrypted, in the handshake of one who holds all keys: ``initiator`` sends it."""

    def seed(rng: random.Random) -> bytes:
        return channel(initiator)._hello

    def feed(data: bytes) -> Any:
        if len(data) > 3000:  # more does not fit in a handshake frame
            data = data[:3000]

        a, b = channel(True), channel(False)
        (a if initiator else b)._hello = data
        b.start()
        b.receive(a.start())
        events = a.receive(b.outgoing())
        if initiator:
            events = b.receive(a.outgoing())
        assert events == [Established((ALICE if initiator else BOB).peer_id, events[0].cipher)]
        return events

    return Decoder(f"secure hello of the {'initiator' if initiator else 'responder'}", seed, feed)


_SECRET = bytes(range(32))


def _records_seed(rng: random.Random) -> bytes:
    sealer = RecordSealer("aegis-128l", _SECRET, rekey_after=2)
    return b"".join(sealer.seal([rng.randbytes(rng.choice((0, 1, 40, 5000)))]) for _ in range(4))


def _records(data: bytes) -> Any:
    opener = RecordOpener("aegis-128l", _SECRET, rekey_after=2)
    records, at = [], 0
    while at < len(data):
        room = opener.room()
        if room is None:
            records += opener.feed(data[at : at + 977])
            at += 977
        else:
            piece = data[at : at + len(room)]
            room[: len(piece)] = piece
            records += opener.fill(len(piece))
            at += len(piece)
    opener.eof()
    return [bytes(record) for record in records]


# --- the mux -----------------------------------------------------------------------------------------------------


def _link_seed(rng: random.Random) -> bytes:
    """Records as a real link sends them that does a bit of everything, each behind its length."""
    mux, session, out = Mux(initiator=True), Session((1 << 20, 1 << 20)), b""
    sealer, opener = RecordSealer("aegis-128l", _SECRET), RecordOpener("aegis-128l", _SECRET)
    streams = []
    for _ in range(rng.randrange(2, 12)):
        match rng.randrange(9):
            case 6 | 7 | 8 if mux.calls.can_call:
                call = mux.calls.call(rng.randbytes(rng.choice((0, 30, 900))))
                if rng.random() < 0.3:
                    mux.calls.cancel(call)
            case 0 | 1 if mux.can_open:
                streams.append(mux.open(rng.choice(("shoal-rpc/1", "x")), rng.choice(list(Priority))))
            case 2 if streams:
                stream = rng.choice(streams)
                if stream.sending.value == "open":
                    mux.send(stream, rng.randbytes(rng.choice((1, 100, 6000))))
            case 3 if streams:
                mux.end(rng.choice(streams))
            case 4 if streams:
                mux.stop(rng.choice(streams))
            case 5 if streams:
                mux.reset(rng.choice(streams), rng.randrange(9))
        wires = [session.compose(each, 0, sealer, partial(mux.next_record, each, 4096)) for each in Priority]
        wires.append(session.seal(sealer, rng.choice((b"", Pipe.retirement(), b"\1\0\0\0\7"))))
        for wire in wires:
            if wire is not None:
                (record,) = opener.feed(wire)
                out += struct.pack(">H", len(record)) + bytes(record)
    return out


def _link(data: bytes) -> Any:
    """Take records as a link does; read, answer, stop and go on as an application would."""
    mux, session, at = Mux(initiator=False), Session((1 << 20, 1 << 20)), 0
    sealer, pipe = RecordSealer("aegis-128l", _SECRET), _pipe()
    while at + 2 <= len(data):
        (size,) = struct.unpack_from(">H", data, at)
        record = Record(memoryview(data)[at + 2 : at + 2 + size])
        at += 2 + size
        kind, payloads = session.receive(record)
        for payload in payloads:
            if kind == PIPE:
                pipe.receive_frames(payload.whole(), 1.0)
                continue
            for event in mux.receive(payload, Priority(kind)):
                if isinstance(event, CallReceived) and not event.call.number % 3:
                    mux.calls.answer(event.call, bytes(event.request))
                _react(mux, getattr(event, "stream", None))
        for each in Priority:
            while (wire := session.compose(each, 0, sealer, partial(mux.next_record, each, 2048))) is not None:
                assert len(wire) <= 2048 + 100
        pipe.take_frames()
        mux.take_drained()
    assert sum(stream.unread for stream in mux.live_streams()) <= len(data)
    return None


def _react(mux: Mux, stream: MuxStream | None) -> None:
    if stream is None:
        return
    match (stream.id >> 2) & 3:
        case 0:
            while mux.read(stream, 1000):
                pass
        case 1:
            mux.stop(stream)
        case 2 if stream.sending.value == "open":
            mux.send(stream, b"answer" * 100)
            mux.end(stream)
        case 3:
            mux.reset(stream)


class _NoStream(ByteStream):
    """A pipe's byte stream that nobody reads or writes."""

    remote = local = Address("mem", "n1", 1)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        raise AssertionError

    async def wait_send_all_might_not_block(self) -> None:
        raise AssertionError

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        raise AssertionError

    async def send_eof(self) -> None:
        raise AssertionError

    async def aclose(self) -> None:
        raise AssertionError


def _pipe() -> Pipe:
    return Pipe(_NoStream(), channel(False), now=0.0)


# --- a pipe's hello ----------------------------------------------------------------------------------------------


def secrets(initiator: bool) -> SessionSecrets:
    return SessionSecrets(_SECRET, "aegis-128l", initiator=initiator)


def _opening() -> PipeOpening:
    return PipeOpening(secrets(True), "punch", bulk_only=True, entropy=random.Random(1).randbytes, peer="n1")


def _greet(data: bytes) -> Any:
    greeting = PipeGreeting(data)
    greeting.answer(secrets(False), random.Random(2).randbytes)
    return (greeting.session, greeting.index, greeting.way, greeting.bulk_only)


def _answer_seed(rng: random.Random) -> bytes:
    answer, _ = PipeGreeting(_opening().hello).answer(secrets(False), random.Random(2).randbytes)
    return answer


def _answer(data: bytes) -> Any:
    opening, at = _opening(), 0
    while at < len(data) and opening.missing:
        if opening.receive(data[at : at + min(7, opening.missing)]) is not None:
            return "open"
        at += min(7, opening.missing) or 7
    return None


# --- WebRTC's own control messages -------------------------------------------------------------------------------


def _flow_seed(rng: random.Random) -> bytes:
    window = defaults.WEBRTC_WINDOW
    texts = [f"c{window}", f"c{window + 5}", f"c{window + 10}", "e", "r"]
    return " ".join(text for text in texts if rng.random() < 0.7).encode() or b"e"


def _flow(data: bytes) -> Any:
    flow = ChannelFlow()
    flow.sending(10)
    flow.end()
    for text in data.decode(errors="surrogateescape").split(" "):
        flow.text(text)
        assert flow.credit >= 0
    return None


# --- texts and files ---------------------------------------------------------------------------------------------


def _text(name: str, texts: Callable[[random.Random], str], parse: Callable[[str], Any], sealed: bool) -> Decoder:
    def feed(data: bytes) -> Any:
        value = parse(data.decode(errors="surrogateescape"))
        assert parse(str(value)) == value
        return value

    return Decoder(name, lambda rng: texts(rng).encode(), feed, sealed=sealed)


def _ticket(rng: random.Random) -> str:
    addresses = tuple(sample(Address, rng) for _ in range(rng.randrange(4)))
    return str(Ticket(rng.randbytes(32), ALICE.peer_id, addresses, rng.choice((None, rng.randbytes(32)))))


def _file(name: str, write: Callable[[Path, random.Random], None], read: Callable[[Path], Any], file: str) -> Decoder:
    """A decoder of one file in a folder: seeds are what ``write`` writes there."""

    def seed(rng: random.Random) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), rng)
            return (Path(folder) / file).read_bytes()

    def feed(data: bytes) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / file
            path.write_bytes(data)
            path.chmod(0o600)
            return read(Path(folder))

    return Decoder(f"file {name}", seed, feed)


def _write_state(folder: Path, rng: random.Random) -> None:
    import torch

    RunStore(folder).save_state({"weights": torch.arange(8, dtype=torch.float32)}, sample(Head, rng, tame=True))


def _read_state(folder: Path) -> Any:
    loaded = RunStore(folder).load_state()
    return None if loaded is None else (sorted(loaded[0]), loaded[1])


def _identity(folder: Path) -> Any:
    return DataDir(folder).identity(random.Random(1).randbytes).peer_id


def _store_snapshot(rng: random.Random) -> bytes:
    store = Store(node_key(BOB.peer_id))
    for _ in range(rng.randrange(4)):
        store.put(unpack(SignedRecord, _dht_record(rng)), WALL)
        store.announce(unpack(Announcement, _announcement(rng)), WALL)
    return store.save()


def _load_snapshot(data: bytes) -> Any:
    store = Store(node_key(BOB.peer_id))
    store.load(data, WALL)
    assert Store(node_key(BOB.peer_id)).load(store.save(), WALL) == store.record_count + store.announcement_count
    return None


# --- blobs -------------------------------------------------------------------------------------------------------


def _tree(rng: random.Random) -> Tree:
    parts = [(f"part {n}", rng.choice(("U8", "F32")), rng.randbytes(4 * rng.choice((0, 1, 40)))) for n in range(3)]
    return build_tree(parts[: rng.randrange(4)], chunk=64)


_TREE = build_tree([("round", "U8", bytes(8)), ("weights", "F32", bytes(range(200)))], chunk=64)


def _outline(data: bytes) -> Any:
    outline = unpack(Outline, data)
    assert outline_fault(outline) is not None or len(outline.root) == 32
    check_outline(outline, _TREE.id)
    return outline


def _bitmap_seed(rng: random.Random) -> bytes:
    bits = Bits(37)
    for _ in range(rng.randrange(40)):
        bits.add(rng.randrange(37))
    return bits.encode()


def _bitmap(data: bytes) -> Any:
    bits = Bits.decode(data, 37)
    assert len(list(bits)) == bits.count == 37 - len(list(bits.missing()))
    assert Bits.decode(bits.encode(), 37).encode() == bits.encode()
    return None


def _blob_file(data: bytes) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "blob"
        path.write_bytes(data)
        parts, notes, start = read_header(path)
        assert start <= len(data) + 8
        return parts, notes


def _write_index(folder: Path, rng: random.Random) -> None:
    store = BlobStore(folder)
    tree = _tree(rng)
    store.begin(tree, tag="t", note=b"n")
    store.close()


def _read_index(folder: Path) -> Any:
    store = BlobStore(folder)
    assert store.entries() == ()  # the file that it names is not there
    store.close()


# --- the control socket ------------------------------------------------------------------------------------------


def _control_seed(rng: random.Random) -> bytes:
    kinds = list(control.MESSAGES.values())
    return b"".join(control.encode(sample(rng.choice(kinds), rng)) for _ in range(rng.randrange(1, 4)))


def _control(data: bytes) -> Any:
    framer = control.Framer()
    return [message for at in range(0, len(data), 700) for message in framer.feed(data[at : at + 700])]


# --- documents -----------------------------------------------------------------------------------------------------

_DOCUMENT = DocumentSpec("metrics", bytes(32), Owner(ALICE.peer_id))
_CLIENT = client_id(ALICE.peer_id, _DOCUMENT.id, 1)


def _update(rng: random.Random) -> bytes:
    """What an author wrote first: a number, a text, a list, an object in a map."""
    value = rng.choice((b"\x7d\5", b"\x77\2hi", b"\x75\2\x7e\x78", b"\x76\1\1k\x7e"))
    number, head = _CLIENT, bytearray(b"\1\1")
    while number > 0x7F:
        head.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*head, number]) + b"\0\x28\1\1m\1k\1" + value + b"\0"


def _guard(data: bytes) -> Any:
    guard = Guard(_CLIENT)
    guard.admit(data)
    assert sum(length for _, length in guard.deleted()) <= guard.next
    return guard.next


def _sign(update: bytes, lives: float) -> Envelope:
    return Envelope.sign(
        ALICE, _DOCUMENT.id, update, incarnation=1, counter=0, previous=bytes(32), expires=WALL + lives
    )


def _offer(data: bytes) -> Any:
    envelope = unpack(Envelope, data)
    envelope.check()
    replica = Replica(_DOCUMENT)
    if replica.offer(envelope, WALL, 0.0).kept:
        replica.read()
        return envelope
    return None


def _evidence(rng: random.Random) -> bytes:
    return pack(Evidence.of(_sign(b"\0\0", 1.0).header, _sign(_update(rng), 2.0).header))


def _accuse(data: bytes) -> Any:
    evidence = unpack(Evidence, data)
    evidence.check()
    Replica(_DOCUMENT).accuse(evidence, WALL)
    return evidence.author, evidence.incarnation, evidence.point


def _write_marks(folder: Path, rng: random.Random) -> None:
    marks = Marks(folder / "marks")
    for next in range(rng.randrange(1, 5)):
        marks.put(_DOCUMENT.id, ALICE.peer_id, 1, next)


def _read_marks(folder: Path) -> Any:
    return Marks(folder / "marks").get(_DOCUMENT.id, ALICE.peer_id)


# --- STUN --------------------------------------------------------------------------------------------------------

_TRANSACTION = bytes(range(12))


def _stun_seed(rng: random.Random) -> bytes:
    source = Address("tcp", rng.choice(("192.0.2.1", "2001:db8::1")), 4001)
    asked = stun.request(_TRANSACTION)
    return rng.choice((asked, stun.answer(asked, source) or b""))


def _stun(data: bytes) -> Any:
    source = Address("tcp", "192.0.2.9", 9)
    answered = stun.answer(data, source)
    assert answered is None or len(answered) <= len(data) + 64
    stun.read_answer(data, _TRANSACTION)
    message = stun.decode(data)
    assert stun.decode(stun.encode(message)) == message or len(data) > 512
    return message


# --- what routers and common peers say ---------------------------------------------------------------------------

_NONCE = bytes(range(12))


def _mapping_seed(rng: random.Random) -> bytes:
    """An answer of a router, by PCP or NAT-PMP: granted or refused."""
    code = rng.choice((0, 0, 0, 2, 200))
    address = b"\0" * 10 + b"\xff\xff" + bytes((192, 0, 2, 1))
    return rng.choice(
        (
            struct.pack("!BBHIHHI", 0, 130, code, 7, 4001, 4001, 3600),
            struct.pack("!BBHI4s", 0, 128, code, 7, bytes((192, 0, 2, 1))),
            struct.pack("!BBBBII12x", 2, 129, 0, code, 3600, 7)
            + struct.pack("!12sB3xHH16s", _NONCE, 6, 4001, 4001, address),
        )
    )


def _mapping(data: bytes) -> Any:
    answers = (
        portmap_wire.read_pmp_map(data, "tcp", 4001, 3600),
        portmap_wire.read_pcp_map(data, _NONCE, "tcp", 4001, 3600),
    )
    for answer in answers:
        if isinstance(answer, portmap_wire.Granted):
            assert 0 < answer.external_port < 65536
            assert 0 < answer.lifetime <= 3600
    portmap_wire.read_pmp_public(data)
    return None


def _punch_seed(rng: random.Random) -> bytes:
    offer = Offer(bytes(punch.NONCE_SIZE), [Address("tcp", "192.0.2.1", 1)]).ask(0.0)
    go = pack(punch.PunchGo(bytes(punch.NONCE_SIZE), 0.1))
    return b"".join(struct.pack(">H", len(part)) + part for part in (offer, go)[: rng.randrange(1, 3)])


def _punch(data: bytes) -> Any:
    """Offers and goes of one peer, one after the other; what we would knock at stays few and dialable."""
    answers, at, ours = Answers(), 0, [Address("tcp", "198.51.100.1", 1), Address("tcp", "2001:db8::1", 1)]
    while at + 2 <= len(data):
        (size,) = struct.unpack_from(">H", data, at)
        part, at = data[at + 2 : at + 2 + size], at + 2 + size
        try:
            answers.offered(BOB.peer_id, part, ours, 1.0)
        except RemoteError:
            going = answers.go(BOB.peer_id, part, 1.0)
            assert len(going.targets) <= defaults.MAX_PUNCH_ADDRESSES
            assert 0 <= going.end - going.start < 60
    return None


def _standings(rng: random.Random) -> tuple[Standing, ...]:
    """What a peer may have seen."""
    standings, peers = Standings(ALICE.peer_id), [each.peer_id for each in IDENTITIES]
    for round in range(rng.randrange(6)):
        standings.committed(round, peers, rng.sample(peers, 2), (rng.random(), 1.0))
        standings.audited(rng.choice(peers), rng.choice(("passed", "lied", "unanswered")))
    return standings.all()


def _standings_of(folder: Path) -> Any:
    """What is believed of what was read goes on within its bounds."""
    standings = Standings(ALICE.peer_id)
    standings.restore(RunStore(folder).load_standings())
    for peer in [each.peer_id for each in IDENTITIES]:
        standings.committed(1, [peer], [peer], (0.5,))
        standings.audited(peer, "lied")
    assert all(fault(found) is None for found in standings.all())
    return None


def _opinion(rng: random.Random) -> bytes:
    """A member's word about two peers on trial."""
    members = sorted(identity.peer_id for identity in IDENTITIES[:3])
    author = rng.choice(IDENTITIES[:3])
    return Opinion.sign(author, bytes(32), members, rng.choice((None, 0, 1, 3))).data


def _judge_opinion(data: bytes) -> Any:
    members = sorted(identity.peer_id for identity in IDENTITIES[:3])
    try:
        opinion = Opinion.read(data)
    except ValueError as error:
        raise DecodeError(str(error)) from None
    wrong = opinion.fault(bytes(32), members, 2)
    if wrong is not None:
        raise DecodeError(wrong)
    return opinion


def _moves(data: bytes) -> Any:
    """Whatever two peers say moves a model by no more than bytes can."""
    peers, found = [identity.peer_id.key for identity in IDENTITIES[:2]], []
    for rule in (SPSA(grads=4), SPSA(grads=2, pairs=1), SPSA(grads=2, pairs=1, shared=1, root=1)):
        for part in (data, data[: len(data) // 2]):
            found += rule.moves(bytes(32), 1, peers, {peers[0]: part, peers[1]: data[len(data) // 2 :]})
    assert all(abs(move.step) <= 10 * 855 for move in found)
    return found


def _noted(rng: random.Random) -> bytes:
    """A record as a member notes it down."""
    members = tuple(sorted(identity.peer_id for identity in IDENTITIES[:2]))
    record = sample(CommitRecord, rng, tame=True)
    record = attrs.evolve(record, kind=GATHER, members=members, payloads=(Payload(b"x", bytes(64)),) * 2)
    return pack(record)


def _read_note(data: bytes) -> Any:
    note = CommitNote(ALICE.peer_id, 1, 0, 1.0, "d" * 16, (), 1, 1, 1, "c" * 16, data)
    found = read_ledger({ALICE.peer_id: {"commits": {note.key: note.entry()}}})
    ledger = Ledger(4)
    ledger.note(found)
    assert all(ledger.back(digest, b"", 9) for digest in found)
    return tuple(found.values())


def _lie(rng: random.Random) -> bytes:
    """A true one, of three voters whose first owns a slice and signed that the median is something else."""
    identities = sorted(IDENTITIES[:3], key=lambda identity: identity.peer_id)
    voters = tuple(identity.peer_id for identity in identities)
    elements, codec = rng.randrange(300, 1500), resolve_codec("fp32")
    leaf = leaf_elements(elements, len(voters), codec)
    rows = [np.random.default_rng(rng.randrange(99)).standard_normal(elements).astype("<f4") for _ in voters]
    wrong = np.median(np.stack(rows), axis=0).astype("<f4") + np.float32(1)
    trees = [build(row.tobytes(), elements, leaf, codec) for row in rows]
    output = build(wrong.tobytes(), elements, leaf, codec)
    key = instance_key(bytes(32), 3, bytes(32), voters)
    context = context_of(voters, (1, 1, 1), b"")
    inputs = inputs_of([tree.root for tree in trees])
    signed = combined_bytes(key, 0, 0, 16, 16 + elements, "fp32", context, inputs, output.root, b"")
    combined = Combined(context, inputs, output.root, b"", identities[0].sign(signed))
    low, high = bounds(elements, leaf, 1)
    lie = Lie(
        run=bytes(32), round=3, prev=bytes(32), voters=voters, attempt=0, epoch=0, start=16, stop=16 + elements,
        codec="fp32", owner=voters[0], members=voters, weights=(1, 1, 1), decision=b"", combined=combined,
        roots=tuple(tree.root for tree in trees), leaf=1, parts=tuple(row[low:high].tobytes() for row in rows),
        paths=tuple(tree.path(0, 1) for tree in trees), result=wrong[low:high].tobytes(),
        result_path=output.path(0, 1),
    )  # fmt: skip
    return pack(lie)


def _convict(data: bytes) -> Any:
    lie = unpack(Lie, data, limit=learning_defaults.MAX_LIE)
    lie.check(bytes(32), resolve_aggregator("median"))
    return lie


def decoders() -> dict[str, Decoder]:
    """All of them by name."""
    psk = bytes(32)
    found = [
        *map(_message, registry.messages().values()),
        Decoder("signed peer record", lambda rng: pack(sample(SignedPeerRecord, rng)), _peer_record, sealed=True),
        Decoder("dht record", _dht_record, _check_dht_record, sealed=True),
        Decoder("dht announcement", _announcement, _check_announcement, sealed=True),
        Decoder("dht store snapshot", _store_snapshot, _load_snapshot),
        Decoder("document update", _update, _guard),
        Decoder("document envelope", lambda rng: pack(_sign(_update(rng), 60.0)), _offer, sealed=True),
        Decoder("document evidence", _evidence, _accuse),
        Decoder("document spec", lambda rng: pack(sample(DocumentSpec, rng)), unpack_spec),
        _file("marks", _write_marks, _read_marks, "marks"),
        Decoder("inner products", _products, _weigh),
        Decoder("lie of an owner", _lie, _convict, sealed=True),
        Decoder("opinion", _opinion, _judge_opinion, sealed=True),
        Decoder("payload of gradients", lambda rng: rng.randbytes(rng.choice((4, 8, 32))), _moves),
        Decoder("ledger note", _noted, _read_note),
        Decoder("run spec", _spec, _open_spec, sealed=True),
        Decoder("stage's tensor", _tensor, _read_tensor),
        Decoder("nest of a batch", _nest, _read_nest),
        _secure(True, None), _secure(False, None), _secure(True, psk), _secure(False, psk),
        _hello(True), _hello(False),
        Decoder("records", _records_seed, _records, sealed=True),
        Decoder("link", _link_seed, _link),
        Decoder("pipe hello", lambda rng: _opening().hello, _greet, sealed=True),
        Decoder("pipe answer", _answer_seed, _answer, sealed=True),
        Decoder("webrtc channel", _flow_seed, _flow),
        _text("ticket", _ticket, Ticket.parse, True),
        _text("address", lambda rng: str(sample(Address, rng)), Address.parse, False),
        _text("peer id", lambda rng: rng.choice(IDENTITIES).peer_id.text, PeerId.parse, False),
        _file("key", lambda folder, rng: _identity(folder) and None, _identity, "key"),
        _file("node", lambda folder, rng: DataDir(folder).write_record(sample(NodeRecord, rng)),
              lambda folder: DataDir(folder).read_record(), "node"),
        _file("swarm key", lambda folder, rng: swarm_key.save(folder / "swarm", rng.randbytes(32)),
              lambda folder: swarm_key.load(folder / "swarm"), "swarm"),
        _file("vote", lambda folder, rng: RunStore(folder).save_vote(sample(Vote, rng)),
              lambda folder: RunStore(folder).load_vote(bytes(32)), "vote"),
        _file("trust", lambda folder, rng: RunStore(folder).save_trust(sample(tuple[Head, ...], rng)),
              lambda folder: RunStore(folder).load_trust(), "trust"),
        _file("standings", lambda folder, rng: RunStore(folder).save_standings(_standings(rng)), _standings_of,
              "standings"),
        Decoder("blob outline", lambda rng: pack(_TREE.outline), _outline, sealed=True),
        Decoder("blob bitmap", _bitmap_seed, _bitmap),
        Decoder("blob file", lambda rng: header(_tree(rng).outline, {"note": "x"}), _blob_file),
        _file("blob index", _write_index, _read_index, "index.sqlite"),
        _file("state", _write_state, _read_state, "state.safetensors"),
        Decoder("control", _control_seed, _control),
        Decoder("stun", _stun_seed, _stun),
        Decoder("port mapping", _mapping_seed, _mapping),
        Decoder("punch", _punch_seed, _punch),
    ]  # fmt: skip
    return {decoder.name: decoder for decoder in found}
