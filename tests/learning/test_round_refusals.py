"""What a voter and a leader refuse: a leader is a peer like any other, and so is everybody it leads."""

from __future__ import annotations

from typing import Any

import attrs
import pytest

from shoal.learning.reduce.slices import Slice, split
from shoal.learning.rounds.actions import Action, Combine, Persist, Pull, Push, Send, Verify
from shoal.learning.rounds.messages import (
    Accept,
    CommitRecord,
    Convene,
    Fetch,
    Freeze,
    Held,
    Message,
    Plan,
    Progress,
    Propose,
    Ready,
    Reject,
    members_hash,
    sign_accept,
    sign_held,
)
from shoal.transport.identity import Identity, PeerId

from .round_table import Seat, Table

LENGTH = 100


class Scene:
    """A voter of five that is ready, its leader, and what the voter answers."""

    def __init__(self) -> None:
        self.table = Table(5, seed=1, length=LENGTH)
        self.voters = self.table.voters
        self.leader = self.table.seats[self.voters[0]].voter.leader(0)
        self.seat: Seat = next(s for s in self.table.seats.values() if s.me != self.leader)
        self.voter, self.me = self.seat.voter, self.seat.me
        self.voter.begin(0.0, Ready(self.table.key, 1, 0, True, 10, 1, LENGTH, None, False, ""))
        self.now = 0.0

    def plan(self, **changes: Any) -> Plan:
        plan = Plan(
            key=self.table.key,
            attempt=0,
            epoch=0,
            members=self.voters,
            samples=(10,) * 5,
            weights=(1,) * 5,
            receivers=self.voters,
            slices=split(0, LENGTH, self.voters),
            length=LENGTH,
            reason="all voters are ready",
        )
        return attrs.evolve(plan, **changes)

    def record(self, **changes: Any) -> CommitRecord:
        draft = self.table.terms().draft(self.voters, (10,) * 5, (1,) * 5, self.voters, (b"n" * 16,), "why")
        return attrs.evolve(draft, fingerprint=b"f", **changes)

    def tell(self, message: Message, sender: PeerId | None = None) -> list[Action]:
        self.now += 0.01
        return self.voter.receive(self.now, sender or self.leader, message)

    def in_gather(self) -> Plan:
        plan = self.plan()
        self.tell(plan)
        for start, stop in [piece.range for piece in plan.slices if piece.owner == self.me]:
            for member in self.voters:
                self.voter.slice_received(self.now, member, start, stop)
        self.tell(Freeze(self.table.key, 0, 0, self.voters))
        return plan


@pytest.fixture
def scene() -> Scene:
    return Scene()


def sent(actions: list[Action]) -> list[object]:
    return [action.message for action in actions if isinstance(action, Send)]


# -- plans ----------------------------------------------------------------------------------------------


def test_a_sound_plan_is_followed(scene: Scene) -> None:
    actions = scene.tell(scene.plan())
    assert [a.owner for a in actions if isinstance(a, Push)] == list(scene.voters)


def wrong_plans(scene: Scene) -> dict[str, Plan]:
    me, stranger = scene.me, Identity(b"\x07" * 32).peer_id
    whole = (Slice(0, LENGTH, scene.leader),)
    return {
        "members, samples and weights differ in number": scene.plan(weights=(1,) * 4),
        "members are not voters in order": scene.plan(members=tuple(reversed(scene.voters))),
        "members are not voters in order ": scene.plan(members=(*scene.voters[:4], scene.voters[3])),
        "members are not voters in order  ": scene.plan(members=(*scene.voters[:4], stranger)),
        "receivers are not voters": scene.plan(receivers=(*scene.voters, stranger)),
        "receivers are not voters ": scene.plan(receivers=scene.voters * 2),
        "weights are not above zero": scene.plan(weights=(1, 1, 0, 1, 1)),
        "a vector of 0 elements": scene.plan(length=0, slices=()),
        "a vector of 4611686018427387904 elements": scene.plan(
            length=1 << 62, slices=(Slice(0, 1 << 62, scene.leader),)
        ),
        "slices do not cover the vector": scene.plan(slices=(Slice(0, LENGTH - 1, me),)),
        "slices do not cover the vector ": scene.plan(slices=(Slice(16, LENGTH, me),)),
        "slices do not cover the vector  ": scene.plan(slices=(*whole, Slice(50, LENGTH, me))),
        "slices do not cover the vector   ": scene.plan(slices=()),
        "slices do not cover the vector    ": scene.plan(
            slices=tuple(Slice(n, n + 1, me) for n in range(101)), length=101
        ),
        "an owner that is no receiver": scene.plan(receivers=tuple(v for v in scene.voters if v != scene.leader)),
        "we contribute nothing of that length, codec and layout": scene.plan(
            length=64, slices=(Slice(0, 64, scene.leader),)
        ),
    }


@pytest.mark.parametrize("why", list(wrong_plans(Scene())))
def test_a_plan_that_makes_no_sense_is_refused_with_the_reason(scene: Scene, why: str) -> None:
    actions = scene.tell(wrong_plans(scene)[why])
    assert sent(actions) == [Reject(scene.table.key, 0, 0, why.rstrip())]
    assert scene.voter.plan is None
    assert not any(isinstance(action, Push) for action in actions)


def test_a_voter_that_does_not_contribute_is_no_member_of_a_plan_it_follows() -> None:
    scene = Scene()
    scene.voter.offer = attrs.evolve(scene.voter.offer, contributes=False)
    assert isinstance(sent(scene.tell(scene.plan()))[0], Reject)


def test_a_plan_of_somebody_who_does_not_lead_is_ignored(scene: Scene) -> None:
    other = next(v for v in scene.voters if v not in (scene.leader, scene.me))
    assert scene.tell(scene.plan(), other) == []
    assert scene.voter.plan is None


def test_a_plan_of_an_attempt_that_was_left_is_answered_with_the_promise(scene: Scene) -> None:
    scene.voter.peer_lost(1.0, scene.leader, "gone")
    promised = scene.voter.promised
    assert promised > 0
    assert sent(scene.tell(scene.plan())) == [Reject(scene.table.key, 0, promised, "promised a later attempt")]


def test_an_older_epoch_is_ignored(scene: Scene) -> None:
    scene.tell(scene.plan(epoch=2))
    assert scene.tell(scene.plan(epoch=1)) == []
    assert scene.voter.plan is not None and scene.voter.plan.epoch == 2


def test_nobody_moves_a_voter_to_attempts_beyond_all_bounds(scene: Scene) -> None:
    far = next(a for a in range(10**6, 10**6 + 5) if scene.voter.leader(a) == scene.leader)
    for message in (
        Convene(scene.table.key, 1, far),
        Reject(scene.table.key, 0, far, "no"),
        scene.plan(attempt=far),
        Propose(scene.table.key, far, scene.record(), ()),
    ):
        assert scene.tell(message) == []
    assert scene.voter.attempt == scene.voter.promised == 0


# -- freezes and slices ---------------------------------------------------------------------------------


def test_members_that_were_not_planned_cannot_be_frozen(scene: Scene) -> None:
    scene.tell(scene.plan(members=scene.voters[:4], samples=(10,) * 4, weights=(1,) * 4))
    for members in (scene.voters, tuple(reversed(scene.voters[:4])), (scene.voters[0], scene.voters[0]), ()):
        answer = sent(scene.tell(Freeze(scene.table.key, 0, 0, members)))
        assert answer == [Reject(scene.table.key, 0, 0, "frozen members are not the plan's")]
    assert scene.voter.frozen is None


def test_an_owner_refuses_to_combine_what_it_does_not_hold(scene: Scene) -> None:
    scene.tell(scene.plan())
    (answer,) = sent(scene.tell(Freeze(scene.table.key, 0, 0, scene.voters)))
    assert isinstance(answer, Reject) and answer.reason.endswith("slice is not held here")


def test_a_freeze_of_somebody_who_does_not_lead_is_ignored(scene: Scene) -> None:
    scene.tell(scene.plan())
    other = next(v for v in scene.voters if v not in (scene.leader, scene.me))
    assert scene.tell(Freeze(scene.table.key, 0, 0, ()), other) == []


def test_a_combined_slice_counts_only_from_its_owner_and_of_the_frozen_members(scene: Scene) -> None:
    plan = scene.in_gather()
    index = next(i for i, piece in enumerate(plan.slices) if piece.owner != scene.me)
    owner, good = plan.slices[index].owner, members_hash(scene.voters)
    other = next(v for v in scene.voters if v not in (owner, scene.me))
    for sender, epoch, which, members in (
        (other, 0, index, good),
        (owner, 0, index, members_hash(scene.voters[:4])),
        (owner, 0, len(plan.slices), good),
        (owner, 0, -1, good),
    ):
        scene.voter.combined_received(1.0, sender, 0, epoch, which, members)
    assert scene.voter._combined == {}
    scene.voter.combined_received(1.0, owner, 0, 0, index, good)
    assert scene.voter._combined == {index: None}


def test_an_early_slice_of_a_stranger_to_it_does_not_shadow_the_owners(scene: Scene) -> None:
    plan = scene.plan()
    index = next(i for i, piece in enumerate(plan.slices) if piece.owner != scene.me)
    owner = plan.slices[index].owner
    other = next(v for v in scene.voters if v not in (owner, scene.me))
    scene.voter.combined_received(0.1, owner, 0, 0, index, members_hash(scene.voters))
    scene.voter.combined_received(0.1, other, 0, 0, index, b"evil")
    scene.in_gather()
    assert index in scene.voter._combined


def test_early_slices_are_bounded_for_each_sender(scene: Scene) -> None:
    one, other = scene.voters[:2]
    for n in range(10_000):
        scene.voter.combined_received(0.1, one, n, 0, 0, b"")
    scene.voter.combined_received(0.1, other, 0, 0, 0, b"")
    assert len(scene.voter._early) <= 4 * len(scene.voters) + 1
    assert any(key[0] == other for key in scene.voter._early)


def test_only_the_leader_of_the_plan_sends_us_fetching_and_only_what_is_missing(scene: Scene) -> None:
    plan = scene.in_gather()
    index = next(i for i, piece in enumerate(plan.slices) if piece.owner != scene.me)
    other = next(v for v in scene.voters if v not in (scene.leader, scene.me))
    fetch = Fetch(scene.table.key, 0, 0, index, other)
    assert scene.tell(fetch) == [Pull(other, 0, 0, index)]
    assert scene.tell(fetch, other) == []
    assert scene.tell(attrs.evolve(fetch, index=len(plan.slices))) == []
    assert scene.tell(attrs.evolve(fetch, epoch=1)) == []
    scene.voter.combined_received(1.0, plan.slices[index].owner, 0, 0, index, members_hash(scene.voters))
    assert scene.tell(fetch) == []


# -- proposals ------------------------------------------------------------------------------------------


def accept(scene: Scene, record: CommitRecord, attempt: int = 0) -> list[Action]:
    scene.tell(Propose(scene.table.key, attempt, record, ()))
    return scene.voter.verified(scene.now, attempt, record, None)


def test_a_vote_is_stored_before_it_is_said(scene: Scene) -> None:
    actions = accept(scene, scene.record())
    assert isinstance(actions[0], Persist) and actions[0].accepted is not None
    assert actions[0].accepted.record == scene.record()
    assert isinstance(sent(actions)[0], Accept)
    kinds = [type(action) for action in actions]
    assert kinds.index(Persist) < kinds.index(Send)


def test_a_voter_never_accepts_two_values_at_one_ballot(scene: Scene) -> None:
    accept(scene, scene.record())
    other = scene.record(reason="another")
    (answer,) = sent(scene.tell(Propose(scene.table.key, 0, other, ())))
    assert isinstance(answer, Reject) and answer.reason == "another value was accepted at this attempt"
    assert scene.voter.verified(scene.now, 0, other, None) == []
    assert isinstance(sent(accept(scene, scene.record()))[0], Accept)


def test_a_proposal_whose_verification_ends_after_a_later_promise_is_not_accepted(scene: Scene) -> None:
    record = scene.record()
    scene.tell(Propose(scene.table.key, 0, record, ()))
    scene.voter.peer_lost(scene.now, scene.leader, "gone")
    assert scene.voter.verified(scene.now, 0, record, None) == []
    assert scene.voter.accepted is None


def test_a_proposal_that_the_run_or_the_bits_contradict_is_refused_with_the_reason(scene: Scene) -> None:
    scene.tell(Propose(scene.table.key, 0, scene.record(), ()))
    (answer,) = sent(scene.voter.verified(scene.now, 0, scene.record(), "another fingerprint"))
    assert isinstance(answer, Reject) and answer.reason == "another fingerprint"
    scene.voter._check = lambda record: "its samples do not add up"
    (answer,) = sent(scene.tell(Propose(scene.table.key, 0, scene.record(total=99), ())))
    assert isinstance(answer, Reject) and answer.reason == "its samples do not add up"


def test_a_proposal_of_somebody_who_does_not_lead_is_ignored(scene: Scene) -> None:
    other = next(v for v in scene.voters if v not in (scene.leader, scene.me))
    assert scene.tell(Propose(scene.table.key, 0, scene.record(), ()), other) == []


def test_results_are_only_fetched_from_voters(scene: Scene) -> None:
    stranger = Identity(b"\x07" * 32).peer_id
    (verify,) = scene.tell(Propose(scene.table.key, 0, scene.record(), (stranger, scene.leader, scene.me)))
    assert isinstance(verify, Verify) and verify.holders == (scene.leader,)


# -- what a leader ignores ------------------------------------------------------------------------------


class Lead:
    """The leader of three in a phase, with the identities of all."""

    def __init__(self) -> None:
        self.table = Table(3, seed=2, length=LENGTH)
        self.seats = self.table.seats
        me = self.seats[self.table.voters[0]].voter.leader(0)
        self.seat = self.seats[me]
        self.seat.lead(0)
        assert self.seat.leader is not None
        self.leader, self.me = self.seat.leader, me
        self.others = [v for v in self.table.voters if v != me]

    def ready(self, peer: PeerId, **changes: Any) -> list[Action]:
        message = Ready(self.table.key, 1, 0, True, 10, 1, LENGTH, None, False, "")
        return self.leader.receive(0.0, peer, attrs.evolve(message, **changes))

    def convened(self) -> Plan:
        for voter in self.table.voters:
            self.ready(voter)
        assert self.leader.plan is not None
        return self.leader.plan


def test_a_leader_ignores_strangers() -> None:
    lead = Lead()
    assert lead.ready(Identity(b"\x07" * 32).peer_id) == []
    assert not lead.leader._ready


def test_a_contribution_of_another_length_or_without_weight_is_left_out_by_name() -> None:
    lead = Lead()
    lead.ready(lead.others[0], length=LENGTH + 1)
    lead.ready(lead.others[1], weight=0)
    lead.ready(lead.me)
    plan = lead.leader.plan
    assert plan is None or plan.members == (lead.me,)
    lead.leader.tick(100.0)
    plan = lead.leader.plan
    assert plan is not None and plan.members == (lead.me,) and plan.length == LENGTH
    assert "another length" in plan.reason


@pytest.mark.parametrize("forged", ["signer", "epoch", "members"])
def test_a_forged_report_of_what_an_owner_holds_is_ignored(forged: str) -> None:
    lead = Lead()
    plan = lead.convened()
    one, other = (lead.seats[peer].identity for peer in lead.others)
    held = sign_held(one, lead.table.key, 0, 0, plan.members)
    match forged:
        case "signer":
            held = sign_held(other, lead.table.key, 0, 0, plan.members)
        case "epoch":
            held = attrs.evolve(sign_held(one, lead.table.key, 0, 1, plan.members), epoch=0)
        case _:
            held = attrs.evolve(held, holds=plan.members[:1])
    assert lead.leader.receive(0.1, one.peer_id, held) == []
    assert not lead.leader._held
    assert lead.leader.receive(0.1, one.peer_id, sign_held(one, lead.table.key, 0, 0, plan.members)) == []
    assert list(lead.leader._held) == [one.peer_id]


@pytest.mark.parametrize("forged", ["signer", "attempt", "digest", "key"])
def test_a_forged_accept_is_ignored(forged: str) -> None:
    lead = Lead()
    lead.convened()
    record = lead.table.terms().draft((), (), (), lead.table.voters, (), "why")
    lead.leader.phase, lead.leader.record = "propose", record
    one, other = (lead.seats[peer].identity for peer in lead.others)
    match forged:
        case "signer":
            accept = sign_accept(other, lead.table.key, 0, record.digest)
        case "attempt":
            accept = attrs.evolve(sign_accept(one, lead.table.key, 3, record.digest), attempt=0)
        case "digest":
            accept = attrs.evolve(sign_accept(one, lead.table.key, 0, b"d" * 32), digest=record.digest)
        case _:
            accept = attrs.evolve(sign_accept(one, b"k" * 32, 0, record.digest), key=lead.table.key)
    assert lead.leader.receive(0.1, one.peer_id, accept) == []
    assert not lead.leader._accepts
    lead.leader.receive(0.1, one.peer_id, sign_accept(one, lead.table.key, 0, record.digest))
    assert list(lead.leader._accepts) == [one.peer_id]


def test_a_peer_that_claims_to_hold_slices_of_another_epoch_is_ignored() -> None:
    lead = Lead()
    plan = lead.convened()
    for peer in lead.table.voters:
        lead.leader.receive(0.1, peer, sign_held(lead.seats[peer].identity, lead.table.key, 0, 0, plan.members))
    assert lead.leader.phase == "gather"
    lead.leader.receive(0.2, lead.others[0], Progress(lead.table.key, 0, 7, (0, 1, 2), b"n", ()))
    assert not lead.leader._progress


def test_an_owner_that_refuses_the_plan_is_planned_without() -> None:
    lead = Lead()
    lead.convened()
    actions = lead.leader.receive(0.1, lead.others[0], Reject(lead.table.key, 0, 0, "slices do not cover"))
    plan = lead.leader.plan
    assert plan is not None and plan.epoch == 1
    assert lead.others[0] not in plan.members
    assert all(piece.owner != lead.others[0] for piece in plan.slices)
    assert "refuses: slices do not cover" in plan.reason
    assert any(isinstance(message, Plan) for message in sent(actions))


def test_a_contributor_that_takes_its_contribution_back_is_planned_without_though_it_owns_nothing() -> None:
    lead = Lead()
    plan = lead.convened()
    # As if the vector were so short that one peer owns all of it.
    lead.leader.plan = attrs.evolve(plan, slices=(Slice(0, LENGTH, lead.me),))
    lead.leader.receive(0.1, lead.others[0], Reject(lead.table.key, 0, 0, "NaN at 3"))
    after = lead.leader.plan
    assert after is not None and after.epoch == 1
    assert after.members == tuple(v for v in lead.table.voters if v != lead.others[0])
    assert after.slices == (Slice(0, LENGTH, lead.me),)


def test_a_proposal_that_can_no_longer_be_agreed_is_given_up() -> None:
    lead = Lead()
    plan = lead.convened()
    for voter in lead.table.voters:
        lead.leader.receive(0.1, voter, sign_held(lead.seats[voter].identity, lead.table.key, 0, 0, plan.members))
        every = tuple(range(len(plan.slices)))
    for voter in lead.table.voters:
        lead.leader.receive(0.2, voter, Progress(lead.table.key, 0, 0, every, b"n" * 16, ()))
    lead.leader.fingerprint(0.3, 0, 0, b"f", "test")
    assert lead.leader.phase == "propose"
    one, other = lead.others
    assert not any(
        isinstance(m, Convene) for m in sent(lead.leader.receive(0.4, one, Reject(lead.table.key, 0, 0, "no")))
    )
    answers = sent(lead.leader.receive(0.5, other, Reject(lead.table.key, 0, 0, "another state")))
    assert [message.attempt for message in answers if isinstance(message, Convene)] == [1, 1, 1]
    assert lead.leader.phase == "aborted"


def test_a_voter_takes_back_what_it_offered_before_and_after_the_plan(scene: Scene) -> None:
    (again,) = sent(scene.voter.withdraw(0.0, "NaN at 3"))
    assert isinstance(again, Ready) and (again.contributes, again.why) == (False, "NaN at 3")
    assert scene.voter.withdraw(0.0, "once more") == []
    (answer,) = sent(scene.tell(scene.plan()))
    assert isinstance(answer, Reject) and answer.reason == "we contribute nothing of that length, codec and layout"


def test_a_voter_takes_back_what_is_planned_already_but_not_what_is_frozen() -> None:
    planned, frozen = Scene(), Scene()
    planned.tell(planned.plan())
    (answer,) = sent(planned.voter.withdraw(0.1, "NaN at 3"))
    assert isinstance(answer, Reject) and answer.reason == "NaN at 3"
    frozen.in_gather()
    assert frozen.voter.withdraw(0.1, "too late") == []


def test_a_held_report_is_only_believed_of_members_of_the_plan() -> None:
    lead = Lead()
    plan = lead.convened()
    extra = (*plan.members, Identity(b"\x07" * 32).peer_id)
    for peer in lead.table.voters:
        held: Held = sign_held(lead.seats[peer].identity, lead.table.key, 0, 0, extra)
        lead.leader.receive(0.1, peer, held)
    assert lead.leader._frozen == plan.members


def test_owners_combine_exactly_the_frozen_members_in_order(scene: Scene) -> None:
    plan = scene.plan()
    scene.tell(plan)
    mine = [i for i, piece in enumerate(plan.slices) if piece.owner == scene.me]
    for index in mine:
        for member in scene.voters:
            scene.voter.slice_received(scene.now, member, *plan.slices[index].range)
    frozen = tuple(v for v in scene.voters if v != scene.leader)
    (combine,) = [a for a in scene.tell(Freeze(scene.table.key, 0, 0, frozen)) if isinstance(a, Combine)]
    assert combine == Combine(0, 0, frozen, (1, 1, 1, 1), tuple(mine))
