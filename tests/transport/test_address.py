"""Addresses: one text form, hostile host names refused; peer records: signed, bounded, expiring."""

from __future__ import annotations

import attrs
import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.transport import defaults
from shoal.transport.address import Address, PeerRecord, RelayAddress, SignedPeerRecord
from shoal.transport.errors import ConfigError, DecodeError
from shoal.transport.identity import Identity
from shoal.transport.wire import pack, unpack

ME = Identity(b"m" * 32)
NOW = 1_800_000_000.0

names = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,30}[A-Za-z0-9])?", fullmatch=True)
ports = st.integers(0, 65535)
addresses = st.one_of(
    st.builds(Address, st.just("tcp"), st.ip_addresses().map(str), ports),
    st.builds(Address, st.just("mem"), names, ports),
)


@given(addresses)
def test_an_address_survives_its_text_form(address: Address) -> None:
    assert Address.parse(str(address)) == address


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1:4001", Address("tcp", "127.0.0.1", 4001)),
        ("tcp://127.0.0.1:0", Address("tcp", "127.0.0.1", 0)),
        ("[::1]:4001", Address("tcp", "::1", 4001)),
        ("tcp://[0:0::0001]:1", Address("tcp", "::1", 1)),
        ("tcp://[FE80::1%eth0]:1", Address("tcp", "fe80::1%eth0", 1)),
        ("mem://n7:1", Address("mem", "n7", 1)),
    ],
)
def test_the_text_forms_of_addresses(text: str, expected: Address) -> None:
    assert Address.parse(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "127.0.0.1",
        "127.0.0.1:",
        ":4001",
        "127.0.0.1:65536",
        "127.0.0.1:-1",
        "127.0.0.1:99999999",
        "127.0.0.1:４００１",
        "127.0.0.1:4001\n",
        " 127.0.0.1:4001",
        "01.2.3.4:1",
        "1.2.3:1",
        "::1:4001",
        "[::1]",
        "[]:1",
        "[127.0.0.1]:1",
        "[::1%a b]:1",
        "[::1%\n]:1",
        "localhost:4001",
        "quic://127.0.0.1:1",
        "TCP://127.0.0.1:1",
        "mem://-n:1",
        "mem://a_b:1",
        "mem://:1",
        "tcp://user@127.0.0.1:1",
        "tcp://127.0.0.1:1/",
    ],
)
def test_a_text_that_is_no_address_is_refused_by_quoting_it(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Address.parse(text)
    assert repr(text) in str(caught.value)


@given(st.text(max_size=40))
def test_parsing_any_text_gives_an_address_or_a_config_error(text: str) -> None:
    try:
        address = Address.parse(text)
    except ConfigError:
        return
    assert Address.parse(str(address)) == address


@pytest.mark.parametrize(
    ("kind", "host", "port"),
    [
        ("quic", "127.0.0.1", 1),
        ("tcp", "127.0.0.1", 65536),
        ("tcp", "127.0.0.1", -1),
        ("tcp", "example", 1),
        ("tcp", "::1%\x1b[31m", 1),
        ("tcp", "::1%" + "x" * 33, 1),
        ("tcp", "", 1),
        ("mem", "", 1),
        ("mem", "a\nb", 1),
        ("mem", "a" * 255, 1),
    ],
)
def test_a_hostile_address_in_a_message_does_not_decode(kind: str, host: str, port: int) -> None:
    data = msgpack.packb({"kind": kind, "host": host, "port": port})
    with pytest.raises(DecodeError) as caught:
        unpack(Address, data)
    assert str(caught.value).isprintable()


@given(st.lists(addresses, max_size=20), st.integers(0, 2**63 - 1))
def test_a_signed_record_opens_to_what_was_signed(places: list[Address], seq: int) -> None:
    signed = SignedPeerRecord.sign(ME, tuple(places), seq=seq, expires=NOW + 60)
    record = unpack(SignedPeerRecord, pack(signed)).open(NOW)
    assert record == PeerRecord(ME.peer_id, seq, NOW + 60, tuple(places)[: len(record.addresses)])
    assert len(record.addresses) == min(len(places), defaults.MAX_ADDRESSES)


def test_a_record_holds_as_many_addresses_as_fit_and_still_opens() -> None:
    longest = tuple(Address("mem", "n" * 254, port) for port in range(16))
    record = SignedPeerRecord.sign(ME, longest, seq=1, expires=NOW).open(NOW)
    assert 0 < len(record.addresses) < 16
    assert record.addresses == longest[: len(record.addresses)]


@given(st.data())
def test_a_changed_byte_of_a_record_or_its_signature_is_refused(data: st.DataObject) -> None:
    signed = SignedPeerRecord.sign(ME, (Address("tcp", "10.0.0.1", 4001),), seq=3, expires=NOW + 60)
    field = data.draw(st.sampled_from(["record", "signature"]))
    content = bytearray(getattr(signed, field))
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(DecodeError):
        attrs.evolve(signed, **{field: bytes(content)}).open(NOW)


@given(st.binary(max_size=200), st.binary(max_size=80))
def test_opening_arbitrary_bytes_raises_nothing_but_decode_errors(record: bytes, signature: bytes) -> None:
    with pytest.raises(DecodeError):
        SignedPeerRecord(record, signature).open(NOW)


def test_a_record_signed_by_another_peer_is_refused_and_names_the_claimed_one() -> None:
    record = pack(PeerRecord(ME.peer_id, 1, NOW + 60, ()))
    forged = SignedPeerRecord(record, Identity(b"f" * 32).sign(b"shoal peer record v1\0" + record))
    with pytest.raises(DecodeError, match="wrong signature") as caught:
        forged.open(NOW)
    assert caught.value.peer == ME.peer_id.short


def test_a_signature_over_another_kind_of_bytes_does_not_pass_for_a_record() -> None:
    record = pack(PeerRecord(ME.peer_id, 1, NOW + 60, ()))
    with pytest.raises(DecodeError, match="wrong signature"):
        SignedPeerRecord(record, ME.sign(record)).open(NOW)


def test_a_record_expires_but_clocks_may_differ() -> None:
    signed = SignedPeerRecord.sign(ME, (), seq=1, expires=NOW)
    signed.open(NOW + defaults.CLOCK_SKEW)
    with pytest.raises(DecodeError, match="expired"):
        signed.open(NOW + defaults.CLOCK_SKEW + 1)


def test_too_many_addresses_are_refused_even_when_signed() -> None:
    record = pack(PeerRecord(ME.peer_id, 1, NOW, tuple(Address("tcp", "1.1.1.1", port) for port in range(17))))
    signed = SignedPeerRecord(record, ME.sign(b"shoal peer record v1\0" + record))
    with pytest.raises(DecodeError, match="17 addresses"):
        signed.open(NOW)


def test_a_record_too_large_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(DecodeError, match="at most"):
        SignedPeerRecord(bytes(defaults.MAX_PEER_RECORD + 1), bytes(64)).open(NOW)


RELAY = Identity(b"r" * 32).peer_id


def test_a_record_names_relays_and_services() -> None:
    places = tuple(Address("tcp", "10.0.0.1", port) for port in range(1, 4))
    relays = tuple(RelayAddress(Identity(bytes([n]) * 32).peer_id, places) for n in range(1, 5))
    signed = SignedPeerRecord.sign(ME, places, seq=1, expires=NOW, relays=relays, services=("relay", "stun"))
    record = unpack(SignedPeerRecord, pack(signed)).open(NOW)
    assert record.addresses == places
    assert [relay.peer for relay in record.relays] == [relay.peer for relay in relays[:3]]
    assert all(relay.addresses == places[:2] for relay in record.relays)
    assert record.services == ("relay", "stun")


def test_what_does_not_fit_beside_the_relays_are_addresses() -> None:
    longest = tuple(Address("mem", "n" * 254, port) for port in range(16))
    relays = tuple(RelayAddress(Identity(bytes([n]) * 32).peer_id, longest[:2]) for n in range(1, 4))
    record = SignedPeerRecord.sign(ME, longest, seq=1, expires=NOW, relays=relays).open(NOW)
    assert record.addresses == ()
    assert len(record.relays) == 3


PLACES = tuple(Address("tcp", "10.0.0.1", port) for port in range(4))


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (PeerRecord(ME.peer_id, 1, NOW, (), tuple(RelayAddress(RELAY, ()) for _ in range(4))), "4 relays"),
        (PeerRecord(ME.peer_id, 1, NOW, (), (RelayAddress(RELAY, PLACES[:3]),)), "3 addresses of a relay"),
        (PeerRecord(ME.peer_id, 1, NOW, (), (RelayAddress(ME.peer_id, PLACES[:1]),)), "its own relay"),
        (PeerRecord(ME.peer_id, 1, NOW, (), (), ("stun", "stun")), "a service twice"),
        (PeerRecord(ME.peer_id, 1, NOW, (), (), ("bank",)), "expected one of 'relay', 'stun'"),  # type: ignore[arg-type]
    ],
)
def test_relays_and_services_have_bounds_even_when_signed(record: PeerRecord, words: str) -> None:
    packed = pack(record)
    with pytest.raises(DecodeError, match=words):
        SignedPeerRecord(packed, ME.sign(b"shoal peer record v1\0" + packed)).open(NOW)
