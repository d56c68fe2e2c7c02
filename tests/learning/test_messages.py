"""Messages of a round: certificates, digests, keys, and what does not decode."""

from __future__ import annotations

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.learning.reduce.slices import Slice
from shoal.learning.rounds.claims import Accuse, Denied, Missing, Proof, Receipt, Receipts
from shoal.learning.rounds.messages import (
    MESSAGES,
    Accept,
    Accepted,
    Ask,
    Certificate,
    Commit,
    CommitRecord,
    Convene,
    Decided,
    Fetch,
    Freeze,
    Held,
    OnTrial,
    Plan,
    Products,
    Progress,
    Propose,
    Ready,
    Reject,
    Seal,
    Signed,
    Waiting,
    held_bytes,
    instance_key,
    members_hash,
    sign_accept,
    sign_held,
    verify_certificate,
)
from shoal.learning.rounds.payloads import Payload
from shoal.transport.errors import DecodeError
from shoal.transport.identity import Identity, PeerId
from shoal.transport.wire import pack, unpack

IDENTITIES = sorted((Identity(bytes([n]) * 32) for n in range(1, 6)), key=lambda i: i.peer_id)
VOTERS: tuple[PeerId, ...] = tuple(identity.peer_id for identity in IDENTITIES)
STRANGER = Identity(b"\x63" * 32)
KEY = instance_key(b"r" * 32, 1, b"p" * 32, VOTERS)

RECORD = CommitRecord(
    run=b"r" * 32,
    round=1,
    kind="reduce",
    prev=b"p" * 32,
    members=VOTERS[:3],
    samples=(10, 20, 30),
    weights=(1, 1, 1),
    roster=VOTERS,
    total=60,
    branch=0,
    state=b"s" * 32,
    nonces=(b"n" * 16,),
    algorithm="blake3",
    fingerprint=b"f" * 32,
    reason="all voters are ready",
)

EVERY = (
    Ready(KEY, 1, 0, True, 10, 1, 100, Accepted(0, RECORD), True, ""),
    Ready(KEY, 1, 0, True, 10, 1, 0, None, False, "", payload=Payload.sign(IDENTITIES[0], KEY, b"a few bytes")),
    Waiting(KEY, 0, VOTERS[:2], "waiting"),
    Convene(KEY, 1, 3),
    Plan(KEY, 0, 0, VOTERS[:1], (1,), (1,), VOTERS, (Slice(0, 100, VOTERS[0]),), 100, "why"),
    sign_held(IDENTITIES[0], KEY, 0, 0, VOTERS[:2]),
    Freeze(KEY, 0, 0, VOTERS[:2]),
    Products(KEY, 0, 1, b"m" * 16, b"t" * 24),
    Decided(KEY, 0, 1, b"m" * 16, (b"t" * 24, b"u" * 24), b"c" * 16),
    Ask(KEY, 0, 0),
    Progress(KEY, 0, 0, (0, 1), b"n" * 16, ("blake3",)),
    Fetch(KEY, 0, 0, 1, VOTERS[1]),
    Seal(KEY, 0, 1, (b"a" * 16, b"b" * 16), "aegis128l"),
    Propose(KEY, 0, RECORD, VOTERS[:1]),
    sign_accept(IDENTITIES[0], KEY, 0, RECORD.digest),
    Reject(KEY, 0, 4, "no"),
    Commit(KEY, RECORD, Certificate(KEY, 0, (Signed(VOTERS[0], b"x" * 64),))),
    Accuse(KEY, 0, 1, 2, 3),
    Proof(KEY, b"p" * 1000),
    Missing(KEY, 0, 1, VOTERS[0]),
    Receipts(KEY, 0, 1, VOTERS[0], (Receipt(0, 16, "fp32", b"r" * 32, b"s" * 64),)),
    Denied(KEY, 0, 1, VOTERS[0], VOTERS[1]),
    Plan(
        KEY,
        0,
        0,
        VOTERS,
        (1,) * len(VOTERS),
        (1,) * len(VOTERS),
        VOTERS,
        (Slice(0, 100, VOTERS[0]),),
        100,
        "why",
        ring=VOTERS,
    ),
)


def certificate(signers: list[Identity], *, key: bytes = KEY, attempt: int = 0) -> Certificate:
    accepts = [Signed(i.peer_id, sign_accept(i, key, attempt, RECORD.digest).signature) for i in signers]
    return Certificate(key, attempt, tuple(accepts))


# -- certificates ---------------------------------------------------------------------------------------


def test_a_majority_of_signed_accepts_proves_a_commit() -> None:
    assert verify_certificate(RECORD, certificate(IDENTITIES[:3]), VOTERS, 3) is None


def test_too_few_accepts_prove_nothing() -> None:
    assert verify_certificate(RECORD, certificate(IDENTITIES[:2]), VOTERS, 3) == "2 accepts, 3 needed"


def test_a_signer_that_stands_twice_counts_once() -> None:
    signers = [IDENTITIES[0], IDENTITIES[0], IDENTITIES[1]]
    assert verify_certificate(RECORD, certificate(signers), VOTERS, 3) == "2 accepts, 3 needed"


def test_an_accept_of_a_stranger_is_named_and_refused() -> None:
    wrong = verify_certificate(RECORD, certificate([*IDENTITIES[:3], STRANGER]), VOTERS, 3)
    assert wrong == f"an accept by {STRANGER.peer_id.short}, who is no voter"


@pytest.mark.parametrize("what", ["key", "attempt", "record", "signature"])
def test_accepts_hold_for_one_instance_one_ballot_and_one_record(what: str) -> None:
    sound, record = certificate(IDENTITIES[:3]), RECORD
    match what:
        case "key":
            sound = attrs.evolve(sound, key=b"k" * 32)
        case "attempt":
            sound = attrs.evolve(sound, attempt=1)
        case "record":
            record = attrs.evolve(RECORD, roster=VOTERS[:4])
        case _:
            forged = Signed(VOTERS[2], sound.accepts[0].signature)
            sound = attrs.evolve(sound, accepts=(*sound.accepts[:2], forged))
    wrong = verify_certificate(record, sound, VOTERS, 3)
    assert wrong is not None and wrong.startswith("a wrong signature in the name of")


def test_a_flood_of_accepts_is_not_checked_beyond_the_number_of_voters() -> None:
    sound = certificate([IDENTITIES[0]])
    flood = attrs.evolve(sound, accepts=sound.accepts * 10_000)
    assert verify_certificate(RECORD, flood, VOTERS, 3) == "1 accepts, 3 needed"


# -- names ----------------------------------------------------------------------------------------------


def test_the_digest_of_a_record_stays_what_it_is() -> None:
    # A change here breaks the chain of every run there is.
    plain = attrs.evolve(RECORD, members=(), roster=(), samples=(), weights=())
    assert plain.digest.hex() == "074367aced4d243f26139226ce8111feff06aac938891e4c812d65da8c991355"


@pytest.mark.parametrize("field", [f.name for f in attrs.fields(CommitRecord)])
def test_every_field_of_a_record_is_in_its_digest(field: str) -> None:
    record = attrs.evolve(RECORD, trial=(OnTrial(VOTERS[3], 2),), opinions=(b"o",), scores=(1,))
    record = attrs.evolve(record, payloads=(Payload(b"said", b"s" * 64),))
    value = getattr(record, field)
    match value:
        case int():
            changed: object = value + 1
        case str():
            changed = value + "x"
        case bytes():
            changed = value + b"x"
        case _:
            changed = value[:-1]
    assert attrs.evolve(record, **{field: changed}).digest != record.digest


def test_instances_of_other_rounds_rosters_or_histories_have_other_keys() -> None:
    keys = {
        KEY,
        instance_key(b"r" * 32, 2, b"p" * 32, VOTERS),
        instance_key(b"q" * 32, 1, b"p" * 32, VOTERS),
        instance_key(b"r" * 32, 1, b"q" * 32, VOTERS),
        instance_key(b"r" * 32, 1, b"p" * 32, VOTERS[:4]),
    }
    assert len(keys) == 5


def test_a_held_report_is_signed_over_who_and_which_epoch() -> None:
    held = sign_held(IDENTITIES[0], KEY, 2, 1, VOTERS[:2])
    assert VOTERS[0].verify(held_bytes(KEY, 2, 1, VOTERS[:2]), held.signature)
    for other in (
        held_bytes(KEY, 2, 2, VOTERS[:2]),
        held_bytes(KEY, 3, 1, VOTERS[:2]),
        held_bytes(KEY, 2, 1, VOTERS[:3]),
        held_bytes(b"k" * 32, 2, 1, VOTERS[:2]),
    ):
        assert not VOTERS[0].verify(other, held.signature)
    assert members_hash(VOTERS[:2]) != members_hash(VOTERS[:3])


# -- the wire -------------------------------------------------------------------------------------------


def test_every_message_comes_back_as_it_went() -> None:
    assert {type(message) for message in EVERY} == set(MESSAGES)
    for message in EVERY:
        assert unpack(type(message), pack(message)) == message


NUMBERS = ("round", "attempt", "epoch", "index", "samples", "weight", "length", "promised")


@given(st.sampled_from(EVERY), st.data(), st.integers(-(2**63), -1) | st.integers(2**63, 2**64 - 1))
def test_numbers_that_no_signature_or_arithmetic_could_take_do_not_decode(
    message: object, data: st.DataObject, number: int
) -> None:
    fields = [f.name for f in attrs.fields(type(message)) if f.name in NUMBERS]  # type: ignore[arg-type]
    if not fields:
        return
    sound = unpack(type(message), pack(message))
    name = data.draw(st.sampled_from(fields))
    value = (number,) if isinstance(getattr(sound, name), tuple) else number
    object.__setattr__(sound, name, value)
    with pytest.raises(DecodeError, match="out of range"):
        unpack(type(message), pack(sound))


def test_a_certificate_or_record_with_such_numbers_does_not_decode_either() -> None:
    certificate = next(message.certificate for message in EVERY if isinstance(message, Commit))
    for part, name in ((certificate, "attempt"), (RECORD, "total"), (RECORD, "branch"), (RECORD, "round")):
        sound = unpack(type(part), pack(part))
        object.__setattr__(sound, name, -1)
        with pytest.raises(DecodeError, match="out of range"):
            unpack(type(part), pack(sound))


@pytest.mark.parametrize("message", [EVERY[0], EVERY[4]], ids=["Ready", "Plan"])
def test_a_layout_that_is_longer_than_any_of_ours_or_unprintable_does_not_decode(message: object) -> None:
    sound = unpack(type(message), pack(message))
    for layout, wrong in (("3, " * 100, "a layout of 300 characters"), ("3\x1b[2J", "control characters")):
        object.__setattr__(sound, "layout", layout)
        with pytest.raises(DecodeError, match=wrong):
            unpack(type(message), pack(sound))


def test_messages_are_told_apart_by_their_class() -> None:
    with pytest.raises(DecodeError):
        unpack(Accept, pack(EVERY[0]))
    with pytest.raises(DecodeError):
        unpack(Held, pack(EVERY[6]))
