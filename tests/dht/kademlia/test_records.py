"""Signed records and announcements: what is accepted, and why the rest is refused."""

from __future__ import annotations

import tracemalloc
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.dht.kademlia import defaults
from shoal.dht.kademlia.keys import digest
from shoal.dht.kademlia.records import VALIDATORS, Announcement, SignedRecord, owned_key
from shoal.transport.address import Address, SignedPeerRecord
from shoal.transport.errors import DecodeError
from shoal.transport.identity import Identity
from shoal.transport.wire import pack, unpack

ALICE, MALLORY = Identity(b"a" * 32), Identity(b"m" * 32)
NOW = 1.7e9


def owned(value: bytes = b"v", *, seq: int = 1, expires: float = NOW + 60, identity: Identity = ALICE) -> SignedRecord:
    return SignedRecord.sign(identity, "owned", owned_key(identity.peer_id, b"x"), value, seq=seq, expires=expires)


def contact(identity: Identity = ALICE, *, expires: float = NOW + 600) -> SignedPeerRecord:
    return SignedPeerRecord.sign(identity, (Address.parse("mem://a:1"),), seq=1, expires=expires)


def announcement(topic: bytes = b"run", **changes: object) -> Announcement:
    values = {"issued": 1, "expires": NOW + 60, "withdrawn": False, "contact": contact(), **changes}
    return Announcement.sign(ALICE, topic, **values)  # type: ignore[arg-type]


@given(st.binary(max_size=200), st.integers(0, 2**63 - 1))
def test_a_signed_record_survives_the_wire(value: bytes, seq: int) -> None:
    record = unpack(SignedRecord, pack(owned(value, seq=seq)))
    record.check(NOW, VALIDATORS)
    assert record.value == value


@pytest.mark.parametrize(
    "change",
    [{"value": b"other"}, {"seq": 2}, {"expires": NOW + 61}, {"key": owned_key(ALICE.peer_id, b"y")}],
    ids=lambda change: next(iter(change)),
)
def test_a_record_altered_in_any_field_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(DecodeError, match="wrong signature"):
        attrs.evolve(owned(), **change).check(NOW, VALIDATORS)


def test_a_record_moved_to_another_namespace_is_refused() -> None:
    validators = {**VALIDATORS, "other": lambda record: None}
    with pytest.raises(DecodeError, match="wrong signature"):
        attrs.evolve(owned(), namespace="other").check(NOW, validators)


def test_an_unknown_namespace_is_refused_by_name() -> None:
    record = SignedRecord.sign(ALICE, "nonsense", b"k", b"v", seq=0, expires=NOW + 60)
    with pytest.raises(DecodeError, match="unknown namespace 'nonsense'"):
        record.check(NOW, VALIDATORS)


def test_a_key_owned_by_another_author_is_refused() -> None:
    record = SignedRecord.sign(MALLORY, "owned", owned_key(ALICE.peer_id), b"v", seq=1, expires=NOW + 60)
    with pytest.raises(DecodeError, match="does not belong to the author"):
        record.check(NOW, VALIDATORS)


def test_a_record_signed_by_another_in_the_owners_name_is_refused() -> None:
    forged = attrs.evolve(owned(identity=MALLORY), author=ALICE.peer_id, key=owned_key(ALICE.peer_id, b"x"))
    with pytest.raises(DecodeError, match="wrong signature"):
        forged.check(NOW, VALIDATORS)


def test_a_run_spec_stands_under_its_own_hash() -> None:
    spec = b"a run spec"
    good = SignedRecord.sign(ALICE, "run", digest(spec), spec, seq=0, expires=NOW + 60)
    good.check(NOW, VALIDATORS)
    other = SignedRecord.sign(MALLORY, "run", digest(spec), b"another spec", seq=0, expires=NOW + 60)
    with pytest.raises(DecodeError, match="not the hash"):
        other.check(NOW, VALIDATORS)
    later = SignedRecord.sign(MALLORY, "run", digest(spec), spec, seq=5, expires=NOW + 60)
    with pytest.raises(DecodeError, match="sequence number 0"):
        later.check(NOW, VALIDATORS)
    about = SignedRecord.sign(ALICE, "run", owned_key(ALICE.peer_id, b"digits"), b"news", seq=3, expires=NOW + 60)
    about.check(NOW, VALIDATORS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": bytes(defaults.MAX_VALUE + 1)}, "value of 4097 bytes, at most 4096"),
        ({"key": bytes(defaults.MAX_KEY + 1)}, "key of 65 bytes"),
        ({"key": b""}, "key of 0 bytes"),
        ({"namespace": "n" * 33}, "namespace of 33"),
        ({"seq": -1}, "sequence number -1"),
        ({"seq": 1 << 63}, "sequence number 9223372036854775808"),
        ({"expires": NOW - 301}, "has expired"),
        ({"expires": NOW + defaults.RECORD_LIFETIME + 301}, "live longer than 86400 s"),
    ],
)
def test_a_record_out_of_bounds_is_refused_before_its_signature_is_checked(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(DecodeError, match=message):
        attrs.evolve(owned(), **change).check(NOW, VALIDATORS)


def test_a_clock_that_differs_by_minutes_is_no_reason_to_refuse() -> None:
    owned(expires=NOW - 299).check(NOW, VALIDATORS)


def test_expiry_is_in_seconds() -> None:
    with pytest.raises(DecodeError, match="live longer"):
        owned(expires=(NOW + 60) * 1e9).check(NOW, VALIDATORS)


@given(st.integers(0, 5), st.integers(0, 5), st.binary(max_size=2), st.binary(max_size=2))
def test_of_two_records_exactly_one_is_newer_unless_they_are_the_same(a: int, b: int, x: bytes, y: bytes) -> None:
    first, second = owned(x, seq=a), owned(y, seq=b)
    assert first.newer_than(second) + second.newer_than(first) == (first != second)
    if a != b:
        assert first.newer_than(second) == (a > b)


def test_an_announcement_names_its_signer_and_nobody_else() -> None:
    announcement().check(NOW)
    with pytest.raises(DecodeError, match="another peer's contact"):
        announcement(contact=contact(MALLORY)).check(NOW)
    with pytest.raises(DecodeError, match="wrong signature"):
        attrs.evolve(announcement(), provider=MALLORY.peer_id, contact=contact(MALLORY)).check(NOW)


@pytest.mark.parametrize(
    "change",
    [
        {"topic": b"other"},
        {"issued": 2},
        {"expires": NOW + 61},
        {"withdrawn": True},
        {"contact": contact(expires=NOW + 601)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_an_announcement_altered_in_any_field_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(DecodeError, match="wrong signature"):
        attrs.evolve(announcement(), **change).check(NOW)


def test_an_announcement_cannot_outlive_its_bound_or_its_contact() -> None:
    with pytest.raises(DecodeError, match="live longer than 7200 s"):
        announcement(expires=NOW + 7200 + 301).check(NOW)
    with pytest.raises(DecodeError, match="peer record has expired"):
        announcement(contact=contact(expires=NOW - 301)).check(NOW)
    with pytest.raises(DecodeError, match="topic of 65 bytes"):
        announcement(bytes(65)).check(NOW)


def test_a_remembered_peer_record_still_expires() -> None:
    record = contact(expires=NOW + 10)
    assert record.open(NOW).peer == ALICE.peer_id
    with pytest.raises(DecodeError, match="expired"):
        record.open(NOW + 311)


def test_what_was_verified_is_remembered_without_its_bytes() -> None:
    """Strangers fill what is remembered with records as large as they may be: 16,384 of them must not take 70 MB."""
    author = Identity(bytes([9]) * 32)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for number in range(300):
            value = number.to_bytes(2, "big") + bytes(defaults.MAX_VALUE - 2)
            key = owned_key(author.peer_id, b"%d" % number)
            SignedRecord.sign(author, "owned", key, value, seq=1, expires=NOW + 60).check(NOW, VALIDATORS)
        assert tracemalloc.get_traced_memory()[0] - before < 300 * 1024
    finally:
        tracemalloc.stop()
