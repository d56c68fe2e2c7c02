"""STUN messages against the published vectors and against any bytes; what two observers say about a NAT."""

from __future__ import annotations

import hashlib
import hmac
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.transport import defaults, stun
from shoal.transport.address import Address
from shoal.transport.errors import DecodeError
from shoal.transport.stun import Observation, StunMessage, classify_mapping

# RFC 5769 "Test Vectors for Session Traversal Utilities for NAT (STUN)", sections 2.1 to 2.4.
TRANSACTION = bytes.fromhex("b7e7a701bc34d686fa87dfae")
REQUEST = bytes.fromhex(
    "000100582112a442b7e7a701bc34d686fa87dfae"
    "802200105354554e207465737420636c69656e74"
    "002400046e0001ff"
    "80290008932ff9b151263b36"
    "000600096576746a3a68367659202020"
    "000800149aeaa70cbfd8cb56781ef2b5b2d3f249c1b571a2" + "80280004e57a3bcf"
)
IPV4_RESPONSE = bytes.fromhex(
    "0101003c2112a442b7e7a701bc34d686fa87dfae"
    "8022000b7465737420766563746f7220"
    "002000080001a147e112a643"
    "000800142b91f599fd9e90c38c7489f92af9ba53f06be7d7"
    "80280004c07d4c96"
)
IPV6_RESPONSE = bytes.fromhex(
    "010100482112a442b7e7a701bc34d686fa87dfae"
    "8022000b7465737420766563746f7220"
    "002000140002a1470113a9faa5d3f179bc25f4b5bed2b9d9"
    "00080014a382954e4be67bf11784c97c8292c275bfe3ed41"
    "80280004c8fb0b4c"
)
LONG_TERM_REQUEST = bytes.fromhex(
    "000100602112a44278ad3433c6ad72c029da412e"
    "00060012e3839ee38388e383aae38383e382afe382b90000"
    "0015001c662f2f3439396b39353464364f4c33346f4c39465354767936347341"
    "0014000b6578616d706c652e6f726700"
    "00080014f67024656dd64a3e02b8e0712e85c9a28ca89666"
)

A, B = Address("tcp", "192.0.2.1", 3478), Address("tcp", "198.51.100.7", 3478)
SOURCES = st.builds(
    lambda host, port: Address("tcp", str(host), port), st.ip_addresses(), st.integers(min_value=0, max_value=65535)
)


def integrity(data: bytes, key: bytes) -> bytes:
    """MESSAGE-INTEGRITY as RFC 8489 14.5 counts it: over all before it, the length up to its own end."""
    at = data.index(b"\x00\x08\x00\x14")
    head = data[:2] + struct.pack("!H", at + 24 - 20) + data[4:at]
    return hmac.new(key, head, hashlib.sha1).digest()


def test_the_published_request_is_read_attribute_by_attribute() -> None:
    message = stun.decode(REQUEST)
    assert (message.kind, message.method, message.transaction) == ("request", stun.BINDING, TRANSACTION)
    assert message.first(0x8022) == b"STUN test client"
    assert message.first(0x0006) == b"evtj:h6vY"
    assert message.first(0x0024) == bytes.fromhex("6e0001ff")
    # The vector stands here as published: its HMAC holds under the published password.
    assert message.first(0x0008) == integrity(REQUEST, b"VOkJxbRl1RmTxUk/WvJxBt")


@pytest.mark.parametrize(
    ("data", "mapped"),
    [
        (IPV4_RESPONSE, Address("tcp", "192.0.2.1", 32853)),
        (IPV6_RESPONSE, Address("tcp", "2001:db8:1234:5678:11:2233:4455:6677", 32853)),
    ],
)
def test_the_published_responses_carry_the_published_addresses(data: bytes, mapped: Address) -> None:
    message = stun.decode(data)
    assert message.kind == "success"
    assert message.first(0x8022) == b"test vector"
    assert stun.mapped_address(message) == mapped
    assert stun.read_answer(data, TRANSACTION) == mapped
    # What we send for that address holds the same bytes in the same attribute.
    assert stun.xor_address(mapped, TRANSACTION) == (0x0020, message.first(0x0020))


def test_the_published_long_term_request_has_no_fingerprint_and_is_read() -> None:
    message = stun.decode(LONG_TERM_REQUEST)
    assert message.first(0x0006) == "マトリックス".encode()
    assert message.first(0x0014) == b"example.org"
    key = hashlib.md5("マトリックス:example.org:TheMatrIX".encode()).digest()
    assert message.first(0x0008) == integrity(LONG_TERM_REQUEST, key)
    # A server that asks for no authentication passes over it and answers.
    answered = stun.answer(LONG_TERM_REQUEST, A)
    assert answered is not None
    assert stun.read_answer(answered, message.transaction) == A


def test_an_attribute_that_must_be_understood_and_is_not_is_refused_by_number() -> None:
    # PRIORITY (0x0024) of ICE means nothing to a plain server. SOFTWARE and others above 0x8000 are passed over.
    answered = stun.answer(REQUEST, A)
    assert answered is not None
    message = stun.decode(answered)
    assert (message.kind, message.transaction) == ("error", TRANSACTION)
    assert message.first(stun.ERROR_CODE) == b"\x00\x00\x04\x14"
    assert message.first(stun.UNKNOWN_ATTRIBUTES) == b"\x00\x24"
    assert stun.read_answer(answered, TRANSACTION) == "refused with code 420"


@settings(deadline=None)  # the strategy for IP addresses is slow to begin
@given(SOURCES, st.binary(min_size=12, max_size=12))
def test_every_source_is_told_its_own_address(source: Address, transaction: bytes) -> None:
    data = stun.request(transaction)
    answered = stun.answer(data, source)
    assert answered is not None
    assert stun.read_answer(answered, transaction) == source
    assert len(answered) <= len(data) + defaults.STUN_GROWTH
    assert stun.read_answer(answered, bytes(12) if any(transaction) else b"\1" * 12) is None


@given(st.lists(st.tuples(st.integers(0, 0xFFFF), st.binary(max_size=40)), max_size=20))
def test_no_request_is_answered_with_more_than_the_constant_above_its_own_length(
    attributes: list[tuple[int, bytes]],
) -> None:
    attributes = [(kind, value) for kind, value in attributes if kind != stun.FINGERPRINT]
    data = stun.encode(StunMessage("request", TRANSACTION, tuple(attributes)), fingerprint=False)
    for source in (A, Address("tcp", "2001:db8::1", 1)):
        answered = stun.answer(data, source)
        assert answered is not None
        assert len(answered) <= len(data) + defaults.STUN_GROWTH


KINDS = st.sampled_from(["request", "indication", "success", "error"])


@given(
    KINDS,
    st.integers(0, 0xFFF),
    st.lists(st.tuples(st.integers(0, 0xFFFF).filter(lambda kind: kind != 0x8028), st.binary(max_size=30)), max_size=8),
    st.booleans(),
)
def test_what_is_encoded_is_decoded(
    kind: stun.Kind, method: int, attributes: list[tuple[int, bytes]], fingerprint: bool
) -> None:
    message = StunMessage(kind, TRANSACTION, tuple(attributes), method)
    data = stun.encode(message, fingerprint=fingerprint)
    assert len(data) % 4 == 0
    assert stun.decode(data) == message


@given(st.binary(max_size=200), st.sampled_from([REQUEST, IPV4_RESPONSE, IPV6_RESPONSE]), st.data())
def test_no_bytes_do_more_than_not_decode(junk: bytes, good: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(good)))
    for candidate in (junk, good[:at], good[:at] + junk, good[:at] + junk + good[at + len(junk) :]):
        try:
            stun.decode(candidate)
        except DecodeError:
            pass
        answered = stun.answer(candidate, A)
        assert answered is None or len(answered) <= len(candidate) + defaults.STUN_GROWTH
        assert stun.read_answer(candidate, bytes(12)) is None or candidate[8:20] == bytes(12)


@pytest.mark.parametrize("at", range(len(IPV4_RESPONSE)))
def test_a_changed_byte_is_noticed_by_the_fingerprint(at: int) -> None:
    changed = bytearray(IPV4_RESPONSE)
    changed[at] ^= 0x04
    try:
        message = stun.decode(bytes(changed))
    except DecodeError:
        return
    # Only where FINGERPRINT itself became another attribute does nothing check any more.
    assert at in (len(IPV4_RESPONSE) - 8, len(IPV4_RESPONSE) - 7)
    assert message.first(0x0020) is not None


@pytest.mark.parametrize("kind", ["indication", "success", "error"])
def test_only_requests_are_answered(kind: stun.Kind) -> None:
    assert stun.answer(stun.encode(StunMessage(kind, TRANSACTION)), A) is None


def test_another_method_gets_silence() -> None:
    allocate = 0x003  # TURN
    assert stun.answer(stun.encode(StunMessage("request", TRANSACTION, method=allocate)), A) is None


def test_an_answer_in_the_form_before_xor_is_understood() -> None:
    plain = StunMessage("success", TRANSACTION, ((stun.MAPPED_ADDRESS, bytes.fromhex("00018055c0000201")),))
    assert stun.read_answer(stun.encode(plain), TRANSACTION) == Address("tcp", "192.0.2.1", 32853)


# --- NAT ----------------------------------------------------------------------------------------------------------

OWN = (Address("tcp", "10.0.0.5", 4001),)
OUTSIDE = Address("tcp", "203.0.113.9", 40001)
ELSEWHERE = Address("tcp", "203.0.113.9", 40002)
A2 = Address("tcp", "192.0.2.1", 3479)


@pytest.mark.parametrize(
    ("seen", "mapping", "word"),
    [
        ([(A, OUTSIDE), (B, OUTSIDE)], "endpoint-independent", "both see"),
        ([(A, OUTSIDE), (B, ELSEWHERE)], "address-dependent", "198.51.100.7:3478 sees tcp://203.0.113.9:40002"),
        ([(A, OUTSIDE), (A2, ELSEWHERE)], "address-dependent", "3479"),
        ([(A, OUTSIDE), (A2, OUTSIDE)], "unknown", "one host cannot tell"),
        ([(A, OUTSIDE), (B, None)], "unknown", "only 192.0.2.1 answered"),
        ([(A, OWN[0]), (B, OWN[0])], "none", "own address"),
        ([(A, OWN[0]), (B, OUTSIDE)], "address-dependent", "203.0.113.9"),
        ([(A, None), (B, None)], "unknown", "no observer answered"),
        ([], "unknown", "nobody was asked"),
    ],
)
def test_the_mapping_of_a_nat_follows_from_what_two_observers_see(
    seen: list[tuple[Address, Address | None]], mapping: str, word: str
) -> None:
    observations = tuple(
        Observation(observer, mapped, "" if mapped else "no answer in 3.5 s") for observer, mapped in seen
    )
    decided, reason = classify_mapping(OWN, observations)
    assert decided == mapping, reason
    assert word in reason
