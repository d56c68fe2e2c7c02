"""Two secure channels back to back: identities, versions, swarm keys, refusals, chunking, and altered bytes."""

from __future__ import annotations

import itertools
import random
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.transport import credentials, defaults
from shoal.transport.aead import NOMINAL_CIPHERS, CipherOffer
from shoal.transport.credentials import Credentials
from shoal.transport.errors import HandshakeError, ProtocolMisuse, RecordError, RemoteProtocolError
from shoal.transport.identity import Identity
from shoal.transport.secure import MAGIC, Established, Record, SecureChannel

ALICE, BOB, EVE = (Identity(bytes([n]) * 32) for n in (1, 2, 3))
NOW = 1_800_000_000.0
PSK = bytes(range(32))
DAY = 86_400.0


def _channel(initiator: bool, identity: Identity | None = None, *, seed: int = 0, **settings: Any) -> SecureChannel:
    settings = {"wall": NOW, "ciphers": NOMINAL_CIPHERS, **settings}
    identity = identity or (ALICE if initiator else BOB)
    entropy = random.Random(seed * 2 + initiator).randbytes
    return SecureChannel(initiator=initiator, identity=identity, entropy=entropy, **settings)


class Wire:
    """Carries bytes between two channels in pieces of ``cut`` bytes; ``flip`` alters one byte on the way."""

    def __init__(self, initiator: SecureChannel, responder: SecureChannel, cut: int | None = None) -> None:
        self.sides = (initiator, responder)
        self.cut = cut
        self.events: tuple[list[Any], list[Any]] = ([], [])
        self.errors: list[RemoteProtocolError | None] = [None, None]
        self.sent = [bytearray(), bytearray()]
        self.flip: tuple[int, int, int] | None = None  # direction, position, mask

    def carry(self, direction: int, data: bytes | bytearray) -> None:
        """Bytes from side ``direction`` to the other, which may answer."""
        if not data:
            return
        data = bytearray(data)
        if self.flip is not None and self.flip[0] == direction:
            at = self.flip[1] - len(self.sent[direction])
            if 0 <= at < len(data):
                data[at] ^= self.flip[2]
        self.sent[direction] += data
        to = 1 - direction
        step = self.cut or len(data)
        for at in range(0, len(data), step):
            if self.errors[to] is None:
                try:
                    self.events[to].extend(self.sides[to].receive(bytes(data[at : at + step])))
                except RemoteProtocolError as error:
                    self.errors[to] = error
            if self.errors[to] is None or at + step >= len(data):
                self.carry(to, self.sides[to].outgoing())

    def shake_hands(self) -> Wire:
        starts = [side.start() for side in self.sides]
        assert starts[1] == b""
        self.carry(0, starts[0])
        return self

    def end(self) -> None:
        """Both pipes end."""
        for n, side in enumerate(self.sides):
            if self.errors[n] is None:
                try:
                    side.eof()
                except RemoteProtocolError as error:
                    self.errors[n] = error

    def texts(self, side: int) -> list[str]:
        return [str(error) for error in [self.errors[side]] if error is not None]


def _meet(initiator: SecureChannel | None = None, responder: SecureChannel | None = None, **more: Any) -> Wire:
    return Wire(initiator or _channel(True), responder or _channel(False), **more).shake_hands()


def _records(events: list[Any]) -> list[bytes]:
    return [bytes(event.data) for event in events if isinstance(event, Record)]


@pytest.mark.parametrize("psk", [None, PSK])
def test_both_sides_learn_who_the_other_is_and_exchange_records(psk: bytes | None) -> None:
    wire = _meet(_channel(True, psk=psk, expected=BOB.peer_id), _channel(False, psk=psk))
    a, b = wire.sides
    assert wire.errors == [None, None]
    assert wire.events == ([Established(BOB.peer_id, "aegis-128l")], [Established(ALICE.peer_id, "aegis-128l")])
    assert (a.established, a.peer, a.cipher) == (True, BOB.peer_id, "aegis-128l")
    assert (b.established, b.peer, b.cipher) == (True, ALICE.peer_id, "aegis-128l")
    assert a.cipher_reason == b.cipher_reason
    assert len(a.exporter) == 32
    assert a.exporter == b.exporter
    wire.carry(0, a.seal([b"to ", bytearray(b"bob")]))
    wire.carry(1, b.seal([memoryview(b"to alice")]) + b.seal([]))
    assert _records(wire.events[1]) == [b"to bob"]
    assert _records(wire.events[0]) == [b"to alice", b""]
    wire.end()
    assert wire.errors == [None, None]


@settings(max_examples=40, deadline=None)
@given(cut=st.integers(1, 200), psk=st.sampled_from([None, PSK]))
def test_any_chunking_gives_the_same_session(cut: int, psk: bytes | None) -> None:
    wires = [_meet(_channel(True, psk=psk), _channel(False, psk=psk), cut=c) for c in (cut, None)]
    for wire in wires:
        for n, side in enumerate(wire.sides):
            wire.carry(n, side.seal([b"x" * 500]) + side.seal([b"y"]))
        assert wire.errors == [None, None]
    assert wires[0].events[0] == wires[1].events[0]
    assert wires[0].events[1] == wires[1].events[1]
    assert wires[0].sent == wires[1].sent


def test_the_last_handshake_message_and_records_may_come_in_one_piece() -> None:
    a, b = _channel(True), _channel(False)
    b.start()
    b.receive(a.start())
    a.receive(b.outgoing())
    events = b.receive(a.outgoing() + a.seal([b"at once"]))
    assert [type(event) for event in events] == [Established, Record]


def test_sessions_of_the_same_peers_share_no_secret() -> None:
    exporters = {_meet(_channel(True, seed=n)).sides[0].exporter for n in range(5)}
    assert len(exporters) == 5


def test_identities_do_not_travel_in_the_clear() -> None:
    wire = _meet()
    for sent, key in itertools.product(wire.sent, (ALICE.peer_id.key, BOB.peer_id.key)):
        assert key not in sent


# --- refused, and told why ---------------------------------------------------------------------------------------


def test_dialling_one_peer_and_reaching_another_fails_with_both_names() -> None:
    wire = _meet(_channel(True, expected=EVE.peer_id))
    assert f"expected peer {EVE.peer_id.short}, but {BOB.peer_id.short} answered" in str(wire.errors[0])
    assert "refused the handshake: it expected another peer than us" in str(wire.errors[1])
    assert isinstance(wire.errors[1], HandshakeError)
    assert wire.errors[0].peer == EVE.peer_id.short
    assert not wire.sides[0].established
    assert not wire.sides[1].established


def test_a_node_does_not_connect_to_itself() -> None:
    wire = _meet(_channel(True, ALICE), _channel(False, ALICE))
    assert "this is ourselves" in str(wire.errors[0])
    assert "it is ourselves" in str(wire.errors[1])


@pytest.mark.parametrize("initiator", [True, False])
@pytest.mark.parametrize("step", [1, -1, 300])
def test_another_wire_version_is_named_on_both_sides(
    monkeypatch: pytest.MonkeyPatch, initiator: bool, step: int
) -> None:
    theirs, ours = 400, 400 + step
    monkeypatch.setattr(defaults, "WIRE_VERSION", theirs)
    other = _channel(not initiator)
    hello = other.start() or other._preamble
    monkeypatch.setattr(defaults, "WIRE_VERSION", ours)
    channel = _channel(initiator)
    first = channel.start()
    with pytest.raises(HandshakeError, match=f"it speaks wire version {theirs}, we speak version {ours}"):
        channel.receive(hello)
    answer = first + channel.outgoing()
    monkeypatch.setattr(defaults, "WIRE_VERSION", theirs)
    with pytest.raises(HandshakeError, match=f"it speaks wire version {ours}, we speak version {theirs}"):
        other.receive(answer)


def test_members_of_a_private_swarm_and_strangers_hear_why_they_do_not_meet() -> None:
    wire = _meet(_channel(True, psk=PSK), _channel(False, psk=bytes(32)))
    assert "not a member of this private swarm, or has another key" in str(wire.errors[1])
    assert "we are not a member of its private swarm, or have another key" in str(wire.errors[0])

    wire = _meet(_channel(True), _channel(False, psk=PSK))
    assert "it belongs to an open swarm, we to a private swarm" in str(wire.errors[1])
    assert "it belongs to a private swarm, we to an open swarm" in str(wire.errors[0])

    wire = _meet(_channel(True, psk=PSK), _channel(False))
    assert "it belongs to a private swarm, we to an open swarm" in str(wire.errors[1])
    assert "it belongs to an open swarm, we to a private swarm" in str(wire.errors[0])


def test_a_responder_in_a_private_swarm_sends_nothing_of_itself_to_a_stranger() -> None:
    b = _channel(False, psk=PSK)
    b.start()
    stranger = _channel(True, psk=bytes(32))
    with pytest.raises(HandshakeError):
        b.receive(stranger.start())
    assert b.outgoing() == b._preamble + bytes([2, 0, 0, 1, 2])


@pytest.mark.parametrize(
    ("begin", "what"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "it speaks HTTP"),
        (b"HTTP/1.1 400 Bad Request\r\n", "it speaks HTTP"),
        (b"\x16\x03\x01\x02\x00\x01", "it speaks TLS"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "it speaks SSH"),
        (b"\x00\x01\xffhello\n", "its first bytes are '...hello.'"),
        (MAGIC[:-2] + b"\n\n", "not a Shoal peer"),
    ],
)
@pytest.mark.parametrize("initiator", [True, False])
def test_one_who_does_not_speak_shoal_is_named_and_gets_no_answer(begin: bytes, what: str, initiator: bool) -> None:
    channel = _channel(initiator)
    channel.start()
    with pytest.raises(HandshakeError, match=what):
        channel.receive(begin)
    assert channel.outgoing() == b""


@pytest.mark.parametrize("off", [3 * DAY, 1.5 * DAY, -1.5 * DAY, -400 * DAY])
def test_clocks_a_day_apart_are_reported_as_clocks(off: float) -> None:
    wire = _meet(_channel(True, wall=NOW + off))
    direction = ("behind", "ahead of")
    if off > 0:
        assert f"its clock is {off:.0f} s behind ours" in str(wire.errors[0])
        assert "one of the two clocks is wrong" in str(wire.errors[1])
    else:
        assert f"its clock is {-off:.0f} s {direction[1]} ours" in str(wire.errors[0])


@pytest.mark.parametrize("off", [0.9 * DAY, -0.9 * DAY, 7200.0, -7200.0])
def test_clocks_hours_apart_still_connect(off: float) -> None:
    assert _meet(_channel(True, wall=NOW + off)).errors == [None, None]


@pytest.mark.parametrize("initiator_forges", [True, False])
@pytest.mark.parametrize(
    ("forge", "what"),
    [
        ({"signature": bytes(64)}, "not certified"),
        ({"signature": b""}, "not certified"),
        ({"peer": EVE.peer_id}, "not certified"),
        ({"expires": NOW + 1.0}, "not certified"),
        ({"ciphers": ()}, "no cipher in common"),
        ({"ciphers": (CipherOffer("rot13", 10**9),)}, "no cipher in common"),
        ({"ciphers": NOMINAL_CIPHERS * 2}, "offered twice"),
        ({"ciphers": tuple(CipherOffer(f"c{n}", 1) for n in range(17))}, "too many ciphers"),
        ({"ciphers": (CipherOffer("aegis-256", 0),)}, "without a speed"),
    ],
)
def test_a_false_hello_is_refused_on_either_side_and_the_liar_hears_it(
    monkeypatch: pytest.MonkeyPatch, forge: dict[str, Any], what: str, initiator_forges: bool
) -> None:
    real = credentials.pack
    liar = (ALICE if initiator_forges else BOB).peer_id

    def forged(message: Any) -> bytes:
        return real(attrs.evolve(message, **forge) if message.peer == liar else message)

    monkeypatch.setattr(credentials, "pack", forged)
    wire = _meet()
    honest = 1 if initiator_forges else 0
    assert isinstance(wire.errors[honest], HandshakeError)
    assert what in str(wire.errors[honest])
    if initiator_forges:  # it believes to be done after its last message: the refusal reaches it all the same
        assert wire.events[0] == [Established(BOB.peer_id, "aegis-128l")]
    assert isinstance(wire.errors[1 - honest], HandshakeError)
    assert "it refused the handshake: " in str(wire.errors[1 - honest])


def test_a_certificate_of_another_session_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    hellos: list[bytes] = []
    real = credentials.pack
    monkeypatch.setattr(credentials, "pack", lambda message: hellos.append(real(message)) or hellos[-1])
    _meet()
    stolen = hellos[0]  # Bob's, with his valid signature
    monkeypatch.setattr(credentials, "pack", lambda message: stolen if message.peer == EVE.peer_id else real(message))
    wire = _meet(_channel(True, seed=5), _channel(False, EVE, seed=5))
    assert "not certified by the identity it claims" in str(wire.errors[0])


@pytest.mark.parametrize("hello", [b"", b"\x80", b"\xff" * 100, bytes(4000)])
def test_a_hello_that_does_not_decode_is_a_handshake_error(monkeypatch: pytest.MonkeyPatch, hello: bytes) -> None:
    monkeypatch.setattr(credentials, "pack", lambda _: hello)
    wire = _meet()
    assert "a broken handshake: Hello " in str(wire.errors[0])
    assert "it could not read our handshake" in str(wire.errors[1])


def test_a_handshake_frame_is_bounded_before_it_is_buffered() -> None:
    for head in (b"\x01\xff\xff\xff", b"\x01\x00\x10\x01", b"\x02\x01\x00\x00", b"\x03\x00\x00\x01", bytes(4)):
        b = _channel(False)
        b.start()
        with pytest.raises(HandshakeError, match="a broken handshake: a frame of kind"):
            b.receive(b._preamble + head)
        assert b.outgoing().endswith(bytes([2, 0, 0, 1, 1]))


def test_data_in_message_1_is_refused() -> None:
    a, b = _channel(True), _channel(False)
    b.start()
    with pytest.raises(HandshakeError, match="message 1 holds data"):
        b.receive(a._preamble + b"\x01\x00\x00\x28" + bytes([9]) * 40)


def test_a_refusal_with_an_unknown_code_or_length_is_still_a_handshake_error() -> None:
    for body in (b"", b"\xff", b"\x02\x02"):
        a = _channel(True)
        a.start()
        with pytest.raises(HandshakeError, match="a reason unknown to this version"):
            a.receive(a._preamble + b"\x02" + len(body).to_bytes(3, "big") + body)


# --- altered, cut short, misused ---------------------------------------------------------------------------------

_HANDSHAKE = [len(sent) for sent in _meet().sent]


@settings(max_examples=400, deadline=None)
@given(
    direction=st.integers(0, 1),
    where=st.integers(0, 10_000),
    flip=st.integers(1, 255),
    psk=st.sampled_from([None, PSK]),
    cut=st.sampled_from([None, 1, 7, 100]),
)
def test_one_altered_byte_anywhere_ends_in_a_typed_error_and_no_altered_record(
    direction: int, where: int, flip: int, psk: bytes | None, cut: int | None
) -> None:
    wire = Wire(_channel(True, psk=psk), _channel(False, psk=psk), cut=cut)
    wire.flip = (direction, where % (_HANDSHAKE[direction] + 60), flip)
    wire.shake_hands()
    for n, side in enumerate(wire.sides):
        if side.established:
            wire.carry(n, side.seal([b"one"]) + side.seal([b"two"]))
    wire.end()
    altered = len(wire.sent[direction]) > wire.flip[1]
    assert any(isinstance(error, HandshakeError | RecordError) for error in wire.errors) == altered
    for events in wire.events:
        assert _records(events) in ([], [b"one"], [b"one", b"two"])
        for event in events:
            if isinstance(event, Established):
                assert event.peer in (ALICE.peer_id, BOB.peer_id)
    if altered and wire.errors[1 - direction] is None:
        assert wire.errors[direction] is not None


@settings(max_examples=200, deadline=None)
@given(initiator=st.booleans(), data=st.binary(max_size=300), good=st.integers(0, 3), cut=st.integers(1, 300))
def test_arbitrary_bytes_raise_nothing_but_typed_errors(initiator: bool, data: bytes, good: int, cut: int) -> None:
    channel = _channel(initiator)
    channel.start()
    prefix = [b"", MAGIC, channel._preamble, channel._preamble + b"\x01\x00\x00\x20"][good]
    stream = prefix + data

    def feed() -> None:
        for at in range(0, len(stream), cut):
            channel.receive(stream[at : at + cut])
        channel.eof()

    with pytest.raises(HandshakeError):
        feed()
    assert not channel.established


def test_an_end_of_the_pipe_is_an_error_in_the_handshake_and_inside_a_record_only() -> None:
    a = _channel(True, expected=BOB.peer_id)
    a.start()
    with pytest.raises(HandshakeError, match=f"{BOB.peer_id.short}: the connection ended during the handshake"):
        a.eof()
    wire = _meet()
    record = wire.sides[0].seal([b"abc"])
    wire.carry(0, record[:7])
    with pytest.raises(RecordError, match=f"{ALICE.peer_id.short}: the connection ended inside record 0"):
        wire.sides[1].eof()


@pytest.mark.parametrize("begin", [b"\x00", b"\x02", b"\x02\x00\x00\x01"])
def test_an_end_inside_the_first_record_is_noticed_whatever_it_began_with(begin: bytes) -> None:
    wire = _meet()
    wire.carry(1, begin)
    assert wire.errors[0] is None
    with pytest.raises(RecordError):
        wire.sides[0].eof()


def test_a_replayed_record_ends_the_link_and_names_the_peer() -> None:
    wire = _meet()
    record = wire.sides[0].seal([b"abc"])
    wire.carry(0, record)
    wire.carry(0, record)
    assert str(wire.errors[1]) == f"{ALICE.peer_id.short}: record 1 was altered, replayed or reordered"
    # the other direction still works, so that a goodbye can say why
    wire.carry(1, wire.sides[1].seal([b"goodbye"]))
    assert _records(wire.events[0]) == [b"goodbye"]


def test_a_record_sent_back_to_its_sender_does_not_open() -> None:
    wire = _meet()
    with pytest.raises(RecordError):
        wire.sides[0].receive(wire.sides[0].seal([b"mirror"]))


def test_a_recorded_handshake_played_again_fails() -> None:
    wire = _meet()
    again = _channel(False, seed=7)
    again.start()
    with pytest.raises(HandshakeError):
        again.receive(wire.sent[0])


def test_after_an_error_the_channel_stays_dead() -> None:
    channel = _channel(False)
    channel.start()
    with pytest.raises(HandshakeError) as first:
        channel.receive(b"garbage")
    for again in (lambda: channel.receive(_channel(True).start()), channel.eof):
        with pytest.raises(HandshakeError) as second:
            again()
        assert second.value is first.value


def test_using_a_channel_against_its_contract_is_our_bug() -> None:
    channel = _channel(True)
    for misuse in (
        lambda: channel.receive(b""),
        lambda: channel.seal([b""]),
        lambda: channel.peer,
        lambda: channel.exporter,
        lambda: _channel(True, psk=b"short"),
    ):
        with pytest.raises(ProtocolMisuse):
            misuse()
    channel.start()
    with pytest.raises(ProtocolMisuse):
        channel.start()


def test_the_measured_ciphers_of_this_machine_are_offered_by_default() -> None:
    wire = _meet(_channel(True, ciphers=None), _channel(False, ciphers=(CipherOffer("chacha20-poly1305", 1),)))
    assert wire.errors == [None, None]
    assert (wire.sides[0].cipher, wire.sides[0].cipher_reason) == ("chacha20-poly1305", "the only cipher in common")


def test_the_session_forgets_how_its_keys_came_about() -> None:
    a = _meet().sides[0]
    assert not hasattr(a, "_noise")


def _sessions(credentials: Credentials, *walls: float) -> list[SecureChannel]:
    """Alice's sides of sessions at these times, all with the same credentials."""
    channels = [_channel(True, seed=n, wall=wall, credentials=credentials) for n, wall in enumerate(walls)]
    for n, channel in enumerate(channels):
        assert _meet(channel, _channel(False, seed=n)).errors == [None, None]
    return channels


def test_a_certified_key_serves_many_sessions_whose_keys_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    hellos: list[bytes] = []
    real = credentials.pack
    monkeypatch.setattr(credentials, "pack", lambda message: hellos.append(real(message)) or hellos[-1])
    of_alice = Credentials(ALICE, random.Random(1).randbytes)
    first, second = _sessions(of_alice, NOW, NOW + defaults.CERTIFICATE_REUSE - 1)
    assert len([hello for hello in hellos if ALICE.peer_id.key in hello]) == 1
    assert first.exporter != second.exporter
    assert first.seal([b"same"]) != second.seal([b"same"])


@pytest.mark.parametrize("later", [defaults.CERTIFICATE_REUSE, -1.0])
def test_a_certified_key_is_made_anew_when_it_is_old_or_the_clock_was_put_back(later: float) -> None:
    credentials = Credentials(ALICE, random.Random(1).randbytes)
    old = credentials.at(NOW)
    assert credentials.at(NOW + 1) is old
    assert credentials.at(NOW + later).private != old.private


def test_a_remembered_certificate_expires_like_any_other() -> None:
    credentials = Credentials(ALICE, random.Random(1).randbytes)
    credentials.at(NOW)
    for later, fine in ((0.0, True), (DAY, True), (DAY + defaults.CLOCK_SKEW + 1, False)):
        alice = _channel(True, wall=NOW, credentials=credentials)
        bob = _channel(
            False, seed=int(later), wall=NOW + later, credentials=Credentials(BOB, random.Random(3).randbytes)
        )
        wire = _meet(alice, bob)
        assert (wire.errors == [None, None]) == fine, later
    assert "out of date" in str(wire.errors[0])


def test_a_remembered_certificate_vouches_for_nothing_but_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    credentials = Credentials(ALICE, random.Random(1).randbytes)
    _sessions(credentials, NOW)
    other_key = Credentials(ALICE, random.Random(2).randbytes)
    other_key.at(NOW)
    monkeypatch.setattr(other_key, "hello", credentials.hello)  # Alice's valid words for another key of hers
    wire = _meet(_channel(True, credentials=other_key), _channel(False))
    assert "not certified by the identity it claims" in str(wire.errors[1])


# Both have dialled


def _talk(one: SecureChannel, other: SecureChannel) -> None:
    """Carry bytes both ways until nothing is left."""
    pending = {one: one.start(), other: other.start()}
    while any(pending.values()):
        ours, theirs = pending[one], pending[other]
        if ours:
            other.receive(ours)
        if theirs:
            one.receive(theirs)
        pending = {one: one.outgoing(), other: other.outgoing()}


@pytest.mark.parametrize("psk", [None, b"p" * 32])
@pytest.mark.parametrize("seed", range(6))
def test_two_that_both_opened_one_pipe_agree_who_is_the_initiator(seed: int, psk: bytes | None) -> None:
    one = _channel(True, seed=2 * seed, psk=psk, expected=BOB.peer_id)
    other = SecureChannel(
        initiator=True,
        identity=BOB,
        entropy=random.Random(seed + 100).randbytes,
        wall=NOW,
        expected=ALICE.peer_id,
        psk=psk,
        ciphers=NOMINAL_CIPHERS,
    )
    _talk(one, other)
    assert one.established
    assert other.established
    assert one.initiator != other.initiator
    assert one.exporter == other.exporter
    (record,) = other.receive(one.seal([b"hello"]))
    assert isinstance(record, Record)
    assert bytes(record.data) == b"hello"
    (record,) = one.receive(other.seal([b"hello, you"]))
    assert isinstance(record, Record)
    assert bytes(record.data) == b"hello, you"


def test_our_own_first_message_that_comes_back_is_refused() -> None:
    channel = _channel(True)
    with pytest.raises(HandshakeError, match="our own bytes come back"):
        channel.receive(channel.start())


def test_only_one_first_message_of_the_other_side_is_passed_over() -> None:
    one = _channel(True, seed=1)
    start = one.start()
    frames = len(start) - 36
    for seed in range(2, 50):
        rival = _channel(True, seed=seed).start()
        if rival[frames:] > start[frames:]:
            one.receive(rival)
            with pytest.raises(HandshakeError):
                one.receive(rival[frames:])
            return
    raise AssertionError("no larger one in 48")
