"""What a replica says of what it is offered, whose fault it is, and what an author may write."""

from __future__ import annotations

from typing import Any

import attrs
import pycrdt
import pytest

from shoal.dht.documents import defaults
from shoal.dht.documents.envelope import Evidence
from shoal.dht.documents.policy import DocumentSpec, Listed, Members, Owner
from shoal.dht.documents.replica import Blame, Code, Replica
from shoal.transport.errors import ConfigError, DecodeError, ProtocolMisuse

from .swarm import IDS, SPEC, WALL, Writer, put, replica, signed
from .updates import encode

ALICE, BOB = IDS[0], IDS[1]
ME = ALICE.peer_id


def offered(held: Replica, *args: Any, **fields: Any) -> tuple[Code, Blame]:
    verdict = held.offer(signed(ALICE, *args, **fields), WALL, 0.0)
    assert verdict.reason or verdict.kept
    return verdict.code, verdict.blame


def test_what_follows_is_kept_and_what_comes_again_is_nobodys_fault() -> None:
    held = replica()
    first = signed(ALICE, b"\0\0", 0)
    assert held.offer(first, WALL, 0.0).kept
    assert held.offer(first, WALL, 0.0).code is Code.DUPLICATE
    assert offered(held, b"\0\0", 2, bytes(31) + b"\1") == (Code.GAP, Blame.NOBODY)
    assert offered(held, b"\0\0", 1, first.id) == (Code.KEPT, Blame.NOBODY)


def test_forged_altered_and_oversized_envelopes_are_the_senders_fault() -> None:
    held = replica()
    made = signed(ALICE, b"\0\0", 0)
    for change in (
        {"signature": bytes(64)},
        {"signature": b""},
        {"update": b"\0"},
        {"expires": made.expires + 1},
        {"author": BOB.peer_id},
        {"counter": 1},
        {"snapshot": True},
        {"previous": b"\1" * 32},
        {"document": bytes(32)},
        {"incarnation": -1},
        {"counter": -1},
        {"update": bytes(defaults.MAX_UPDATE + 1)},
    ):
        verdict = held.offer(attrs.evolve(made, **change), WALL, 0.0)
        assert (verdict.code, verdict.blame) == (Code.INVALID, Blame.SENDER), change
    assert offered(held, bytes(defaults.MAX_UPDATE + 1), 0) == (Code.INVALID, Blame.SENDER)
    assert held.summary() == ()


def test_signed_garbage_is_its_authors_fault_and_cannot_be_taken_back() -> None:
    held = replica()
    first = signed(ALICE, b"\0\0", 0)
    held.offer(first, WALL, 0.0)
    bomb = encode(5, 0, [])[:-1] + b"\x75\1" * 1000
    assert offered(held, bomb, 1, first.id) == (Code.GARBAGE, Blame.AUTHOR)
    assert offered(held, bomb, 1, first.id) == (Code.GARBAGE, Blame.SENDER)  # an honest peer passes on no garbage
    verdict = held.offer(signed(ALICE, b"\0\0", 1, first.id), WALL, 0.0)
    assert verdict.code is Code.FORK and verdict.evidence is not None
    verdict.evidence.check()


@pytest.mark.parametrize("kind", ["another one at a counter", "another predecessor"])
def test_a_fork_is_proven_to_anybody_and_voids_the_incarnation(kind: str) -> None:
    held, other = replica(), replica()
    first = signed(ALICE, b"\0\0", 0)
    held.offer(first, WALL, 0.0)
    fork = (
        signed(ALICE, b"\0\0", 0, expires=WALL + 7)
        if kind == "another one at a counter"
        else signed(ALICE, b"\0\0", 1, bytes(31) + b"\1")
    )
    verdict = held.offer(fork, WALL, 0.0)
    assert (verdict.code, verdict.blame, verdict.kept) == (Code.FORK, Blame.AUTHOR, False)
    proof = held.evidence(ME)
    assert proof is not None and proof == verdict.evidence and proof.author == ME
    assert held.read() == {} and held.summary()[0].frozen
    assert offered(held, b"\0\0", 1, first.id) == (Code.FROZEN, Blame.NOBODY)
    assert other.accuse(proof, WALL).kept and other.digest() == held.digest()
    assert other.accuse(proof, WALL).code is Code.DUPLICATE
    assert offered(held, b"\0\0", 0, incarnation=2) == (Code.KEPT, Blame.NOBODY)
    assert held.accuse(proof, WALL).code is Code.STALE


def test_evidence_that_proves_nothing_is_refused() -> None:
    one, two = signed(ALICE, b"\0\0", 0), signed(ALICE, b"\0\0", 0, expires=WALL + 7)
    good = Evidence.of(one.header, two.header)
    good.check()
    follows = signed(ALICE, b"\0\0", 1, one.id)
    for bad in (
        Evidence(one.header, one.header),
        Evidence(one.header, follows.header),
        Evidence(one.header, signed(BOB, b"\0\0", 0).header),
        Evidence(one.header, signed(ALICE, b"\0\0", 0, incarnation=2).header),
        Evidence(one.header, attrs.evolve(two.header, expires=WALL + 8)),
        Evidence(one.header, signed(ALICE, b"\0\0", 5, bytes(31) + b"\1").header),
    ):
        with pytest.raises(DecodeError):
            bad.check()
        verdict = replica().accuse(bad, WALL)
        assert (verdict.code, verdict.blame) == (Code.INVALID, Blame.SENDER)
    assert replica().accuse(good, WALL + 30 * 86400).code is Code.EXPIRED


def test_expired_envelopes_and_those_that_live_too_long_are_refused() -> None:
    held = replica()
    assert offered(held, b"\0\0", 0, expires=WALL - 3600) == (Code.EXPIRED, Blame.NOBODY)
    assert offered(held, b"\0\0", 0, expires=WALL + 1e9) == (Code.EXPIRED, Blame.NOBODY)
    assert offered(held, b"\0\0", 0, expires=WALL + 60) == (Code.KEPT, Blame.NOBODY)
    assert held.expire(WALL + 30) == [] and held.expire(WALL + 3600) == [ME]
    assert held.summary() == () and held.size == 0


def test_policies_decide_who_writes() -> None:
    envelope = signed(ALICE, b"\0\0", 0)
    for policy, allowed in (
        (Owner(ME), True),
        (Owner(BOB.peer_id), False),
        (Listed(tuple(sorted((ME, BOB.peer_id)))), True),
        (Listed((BOB.peer_id,)), False),
    ):
        spec = DocumentSpec("metrics", b"run", policy)
        held = Replica(spec)
        made = attrs.evolve(envelope, document=spec.id)
        assert (held.offer(made, WALL, 0.0).code is not Code.UNWELCOME) == allowed
        if not allowed:
            held.begin(ME, 1)
            with pytest.raises(ConfigError, match="we may not write"):
                held.write(put("a", 1), ALICE, WALL)
    members = {ME}
    held = Replica(SPEC, lambda peer: peer in members)
    assert held.offer(envelope, WALL, 0.0).kept
    assert held.offer(signed(BOB, b"\0\0", 0), WALL, 0.0).code is Code.UNWELCOME
    with pytest.raises(ValueError, match="ascending"):
        Listed((ME, ME)) and DocumentSpec("x", b"", Listed((ME, ME)))
    with pytest.raises(ValueError, match="name"):
        DocumentSpec("", b"", Members("run"))


def test_an_author_is_bounded_in_rate_number_and_bytes() -> None:
    held, last = replica(), signed(ALICE, b"\0\0", 0)
    assert held.offer(last, WALL, 0.0).kept
    codes = []
    for counter in range(1, defaults.MAX_ENVELOPES + 1):
        following = signed(ALICE, b"\0\0", counter, last.id)
        codes.append(held.offer(following, WALL, 0.0).code)
        last = following if codes[-1] is Code.KEPT else last
    assert codes[-1] is Code.FULL and set(codes[:-1]) == {Code.KEPT}
    burst = replica()
    made = [signed(ALICE, b"\0\0", n, b"\1" * 32, snapshot=True) for n in range(2, 802, 2)]
    codes = [burst.offer(each, WALL, 0.0).code for each in made]
    assert codes.count(Code.KEPT) == defaults.AUTHOR_BURST and codes[-1] is Code.RATE
    assert burst.offer(made[-1], WALL, 1.0).kept  # time brings tokens, the wall clock does not matter


def test_authors_compact_by_themselves_and_others_follow() -> None:
    writer, reader = Writer(ALICE), Writer(BOB)
    for number in range(300):
        assert reader.offer(writer.must_write(put(f"k{number % 5}", number))).kept
    held = reader.replica.range_of(ME)
    assert held is not None and held.next == 300 and held.next - held.first <= defaults.COMPACT_ENVELOPES
    assert reader.replica.view(ME) == {"m": {f"k{number % 5}": number for number in range(295, 300)}}
    late = Writer(IDS[2])
    envelopes = reader.replica.envelopes(ME, held.incarnation, held.first, held.next)
    assert all(late.offer(envelope).kept for envelope in envelopes)
    assert late.replica.digest() == reader.replica.digest()


def test_an_author_whose_keys_come_and_go_can_write_for_ever() -> None:
    def turn(doc: pycrdt.Doc[Any], number: int) -> None:
        rounds = doc.get("rounds", type=pycrdt.Map)
        for key in range(number * 40, number * 40 + 40):
            rounds[f"{key}.0123456789abcdef"] = {"at": key}
            rounds.pop(f"{key - 40}.0123456789abcdef", None)

    writer, reader = Writer(ALICE), Writer(BOB)
    for number in range(150):  # 6,000 keys: what Yjs keeps of the deleted ones is twice what an update may hold
        assert reader.offer(writer.must_write(lambda doc, number=number: turn(doc, number))).kept
    assert len(reader.replica.view(ME)["rounds"]) == 40
    assert reader.replica.digest() == writer.replica.digest()
    held = reader.replica.range_of(ME)
    assert held is not None and 2 < held.incarnation < 10


def test_a_write_counts_only_once_it_is_offered_and_there_is_one_at_a_time() -> None:
    held = replica()
    assert held.must_begin(ME)
    with pytest.raises(ProtocolMisuse, match="incarnation"):
        held.write(put("a", 1), ALICE, WALL)
    held.begin(ME, 1)
    assert held.write(lambda doc: None, ALICE, WALL) is None
    draft = held.write(put("a", 1), ALICE, WALL)
    assert draft is not None and held.read() == {}
    with pytest.raises(ProtocolMisuse, match="neither offered nor discarded"):
        held.write(put("b", 1), ALICE, WALL)
    assert held.offer(draft, WALL, 0.0).kept and held.read() == {ME: {"m": {"a": 1}}}
    assert not held.must_begin(ME)


def test_a_change_that_fails_or_is_too_large_changes_nothing() -> None:
    writer = Writer(ALICE)
    writer.must_write(put("a", 1))

    def fail(doc: pycrdt.Doc[Any]) -> None:
        put("b", 2)(doc)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        writer.write(fail)
    with pytest.raises(ConfigError, match="at most 131072 allowed"):
        writer.write(put("b", "x" * 200_000))
    with pytest.raises(ConfigError, match="others would refuse"):
        writer.write(lambda doc: doc.get("x", type=pycrdt.XmlFragment).children.append(pycrdt.XmlText("no")))
    writer.must_write(put("c", 3))
    assert writer.replica.view(ME) == {"m": {"a": 1, "c": 3}}


def test_what_an_author_wrote_is_renewed_before_it_expires() -> None:
    writer = Writer(ALICE)
    first = writer.must_write(put("a", 1))
    assert not writer.replica.renewal_due(ME, WALL) and writer.replica.renewal_due(ME, WALL + 5 * 86400)
    again = writer.write(None, WALL + 5 * 86400)
    assert again is not None and again.snapshot and again.expires > first.expires
    assert writer.replica.expire(WALL + 8 * 86400) == [] and writer.replica.view(ME) == {"m": {"a": 1}}


def test_a_dead_authors_part_stays_until_it_expires() -> None:
    reader = Writer(BOB)
    reader.offer(Writer(ALICE).must_write(put("a", 1)))
    assert reader.replica.expire(WALL + 6 * 86400) == [] and reader.replica.read() == {ME: {"m": {"a": 1}}}
    assert reader.replica.expire(WALL + 8 * 86400) == [ME]


def test_an_author_that_lost_everything_takes_its_content_back_and_says_it_anew() -> None:
    writer, reader = Writer(ALICE), Writer(BOB)
    nested = pycrdt.Map({"list": pycrdt.Array([1, b"x", {"a": [None]}]), "text": pycrdt.Text("hi")})
    for change in (put("a", 1), put("deep", nested)):
        reader.offer(writer.must_write(change))
    before = reader.replica.view(ME)
    writer.lose_everything()
    for envelope in reader.replica.envelopes(ME, 2, 0, 9):
        assert writer.offer(envelope).kept
    assert writer.replica.must_begin(ME)  # it does not go on with a chain of which it may not know the end
    envelope = writer.must_write(put("b", 2))
    assert reader.offer(envelope).kept and envelope.counter == 0
    assert reader.replica.view(ME) == {"m": {**before["m"], "b": 2}}


def test_reading_gives_plain_python_in_one_form() -> None:
    writer = Writer(ALICE)

    def change(doc: pycrdt.Doc[Any]) -> None:
        doc.get("m", type=pycrdt.Map).update({"int": 3, "float": 0.5, "bytes": b"x", "none": None, "big": 1 << 52})
        doc.get("a", type=pycrdt.Array).extend([1, {"b": 1, "a": [2.0]}])
        doc.get("t", type=pycrdt.Text).insert(0, "text")
        doc.get("empty", type=pycrdt.Map)

    writer.must_write(change)
    view = writer.replica.view(ME)
    assert view == {
        "a": [1, {"a": [2], "b": 1}],
        "m": {"big": 1 << 52, "bytes": b"x", "float": 0.5, "int": 3, "none": None},
        "t": "text",
    }
    assert type(view["m"]["int"]) is int and type(view["m"]["bytes"]) is bytes and list(view["a"][1]) == ["a", "b"]
