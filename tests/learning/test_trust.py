"""Heads are believed when their voters trace back to the founder's key, and on no other ground."""

from __future__ import annotations

import attrs
import pytest

from shoal.learning import defaults
from shoal.learning.rounds.messages import Certificate, CommitRecord, Signed, instance_key, sign_accept
from shoal.learning.store import Head, RunStore
from shoal.learning.trust import Trust, TrustPage
from shoal.transport.errors import RemoteProtocolError
from shoal.transport.identity import Identity, PeerId

RUN = b"r" * 32
PEOPLE = tuple(Identity(bytes([n]) * 32) for n in range(1, 40))
FOUNDER, A, B, C, D, E, F, G = PEOPLE[:8]
STRANGERS = PEOPLE[30:]


def ids(*who: Identity) -> tuple[PeerId, ...]:
    return tuple(sorted(identity.peer_id for identity in who))


def head(
    voters: tuple[Identity, ...],
    roster: tuple[Identity, ...],
    *,
    round: int = 1,
    signers: tuple[Identity, ...] | None = None,
    kind: str = "reduce",
    total: int = 100,
    run: bytes = RUN,
) -> Head:
    record = CommitRecord(
        run=run, round=round, kind=kind, prev=b"p" * 32, members=ids(*voters), samples=(1,) * len(voters),
        weights=(1,) * len(voters), roster=ids(*roster), total=total, branch=0, state=b"", nonces=(),
        algorithm="blake3", fingerprint=b"f" * 16, reason="",
    )  # fmt: skip
    key = instance_key(run, round, record.prev, ids(*voters))
    accepts = [Signed(i.peer_id, sign_accept(i, key, 0, record.digest).signature) for i in signers or voters]
    return Head(record, Certificate(key, 0, tuple(accepts)), ids(*voters))


def trust(*, strict: bool = False) -> Trust:
    return Trust(RUN, FOUNDER.peer_id, strict)


def test_the_founders_enrolment_and_what_its_roster_signs_is_believed() -> None:
    t = trust()
    assert t.add(head((FOUNDER,), (FOUNDER, A, B), kind="enrol", round=0)) is None
    assert t.add(head((FOUNDER, A, B), (A, B, C), signers=(A, B))) is None
    assert t.believes(ids(A, B, C))


def test_a_history_that_strangers_invented_is_not_believed_whatever_it_claims() -> None:
    t = trust()
    assert t.add(head((FOUNDER,), (FOUNDER, A, B), kind="enrol", round=0)) is None
    invented = head(STRANGERS[:3], (*STRANGERS[:3], A), total=10**18, round=900)
    assert "no majority of a roster known" in (t.add(invented) or "")
    assert not t.believes(invented.record.roster)


def test_members_names_among_the_voters_are_not_their_signatures() -> None:
    t = trust()
    t.add(head((FOUNDER,), (FOUNDER, A, B), kind="enrol", round=0))
    posing = head((FOUNDER, A, *STRANGERS), STRANGERS, signers=STRANGERS)
    assert t.add(posing) is not None
    genuine = posing.certificate.accepts
    forged = tuple(Signed(who.peer_id, accept.signature) for who, accept in zip((FOUNDER, A), genuine, strict=False))
    false = attrs.evolve(posing, certificate=attrs.evolve(posing.certificate, accepts=(*forged, *genuine[2:])))
    assert "wrong signature" in (t.add(false) or "")


def test_a_minority_of_a_known_roster_proves_nothing() -> None:
    t = trust()
    t.add(head((FOUNDER,), (A, B, C, D), kind="enrol", round=0))
    assert t.add(head((A, B, *STRANGERS), STRANGERS, signers=(A, B, *STRANGERS))) is not None
    assert t.add(head((A, B, C, *STRANGERS), (A, E), signers=(A, B, C, *STRANGERS[:5]))) is None


def test_a_certificate_of_another_run_or_round_is_not_believed() -> None:
    t = trust()
    assert t.add(head((FOUNDER,), (A,), run=b"x" * 32)) == "it is of another run"
    good = head((FOUNDER,), (A,), round=3)
    other = attrs.evolve(good, record=attrs.evolve(good.record, round=4))
    assert t.add(other) == "its certificate is of another round"
    fewer = attrs.evolve(good, certificate=attrs.evolve(good.certificate, accepts=()))
    assert t.add(fewer) is not None


def test_a_proof_keeps_only_the_shortest_way() -> None:
    t = trust()
    t.belong(head((FOUNDER,), (A, B, C), kind="enrol", round=0))
    # D comes and goes a hundred times: the first roster's majority signs all the while.
    for round in range(1, 200, 2):
        t.belong(head((A, B, C), (A, B, C, D), round=round))
        t.belong(head((A, B, C, D), (A, B, C), round=round + 1, signers=(A, B, C)))
    assert len(t.own) == 1
    t.belong(head((A, B, C), (B, C, D), round=300))
    t.belong(head((B, C, D), (C, D, E), round=301))
    t.belong(head((C, D, E), (D, E, F), round=302))
    # The second roster shares a majority (B, C) with the first, the third only C: the way goes over the second.
    assert [link.record.roster for link in t.own][-1] == ids(D, E, F)
    fresh = trust()
    for link in t.own:
        assert fresh.add(link) is None
    assert fresh.believes(ids(D, E, F))


def test_rosters_that_are_remembered_are_bounded_and_our_own_way_is_kept() -> None:
    t = trust()
    t.belong(head((FOUNDER,), (A, B, C), kind="enrol", round=0))
    t.belong(head((A, B, C), (D, E, F), round=1))
    own = t.own
    for number in range(200):
        t.add(head((A, B, C), (A, B, C, Identity(bytes([7, number]) * 16)), round=5))
    assert t.own == own
    assert t.believes(ids(D, E, F))
    assert len(t._known) <= 3 + defaults.REMEMBERED_ROSTERS


def test_a_branch_is_believed_when_all_of_it_signed_and_were_members() -> None:
    t = trust()
    t.add(head((FOUNDER,), (A, B, C, D, E), kind="enrol", round=0))
    assert t.add(head((A, B), (A, B), kind="branch", signers=(A,))) is not None
    assert t.add(head((A, STRANGERS[0]), (A, STRANGERS[0]), kind="branch")) is not None
    assert t.add(head((A, B, C), (A, B), kind="branch")) == "a branch that others than its members agreed on"
    assert t.add(head((A, B), (A, B), kind="branch")) is None
    assert t.add(head((A, B), (A, B, F), round=2)) is None


def test_a_strict_run_has_no_branches_but_of_up_to_three() -> None:
    t = trust(strict=True)
    t.add(head((FOUNDER,), (A, B, C, D), kind="enrol", round=0))
    assert t.add(head((A, B), (A, B), kind="branch")) is not None
    small = trust(strict=True)
    small.add(head((FOUNDER,), (A, B, C), kind="enrol", round=0))
    assert small.add(head((A,), (A,), kind="branch")) is None


def test_a_state_of_our_own_is_believed_even_without_a_proof() -> None:
    t = trust()
    ours = head((A, B), (A, B, C))
    assert t.belong(ours)
    assert not t.belong(ours)
    assert t.own == (ours,)
    assert t.add(head((A, B, C), (A, B, D), round=2)) is None


@pytest.mark.parametrize(
    ("links", "total", "start"), [(0, 5, 0), (2, 1, 0), (1, 5, 5), (defaults.TRUST_PAGE + 1, 100, 0), (1, 10**9, 0)]
)
def test_pages_of_a_proof_that_make_no_sense_are_refused(links: int, total: int, start: int) -> None:
    page = TrustPage((head((FOUNDER,), (A,)),) * links, total)
    with pytest.raises(RemoteProtocolError):
        trust().check_page(page, start)


def test_a_proof_survives_on_disk(tmp_path) -> None:  # type: ignore[no-untyped-def]
    links = (head((FOUNDER,), (A, B), kind="enrol", round=0), head((A, B), (A, B, C)))
    for store in (RunStore(tmp_path), RunStore(None)):
        assert store.load_trust() == ()
        store.save_trust(links)
        assert store.load_trust() == links
