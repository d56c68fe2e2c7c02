"""A peer whose state is not that of the others: found at the next commit, healed from the majority, said in the log."""

from __future__ import annotations

import logging
from functools import partial

import attrs
import pytest
import torch

from shoal.learning.divergence import judge
from shoal.learning.events import Event
from shoal.learning.faults import Faults
from shoal.learning.rounds.decisions import candidates, never_decided
from shoal.learning.rounds.messages import Accepted
from shoal.learning.state import bytes_view
from shoal.learning.sync import state_digest
from shoal.sim.world import Member, World, simulate
from shoal.transport.identity import Identity, PeerId

from ..sim import tiny

FLIPPED, ROUNDS = 3, 8
PEERS = tuple(sorted(Identity(bytes([n]) * 32).peer_id for n in range(1, 6)))


def events(member: Member, what: str) -> list[Event]:
    return [event for event in member.events if event.what == what]


def check_healed(world: World, *wrong: int) -> None:
    """All end with the same bits, after all rounds; those who were ``wrong`` said so, were healed, and took part again.

    What they held from round FLIPPED on was shown to be wrong by the record of the round after it.
    """
    live = world.live()
    assert [member.run.round for member in live] == [ROUNDS] * len(live)
    assert len({member.run.digest() for member in live}) == 1
    assert len({member.run.weights().numpy().tobytes() for member in live}) == 1
    for member in live:
        diverged, healed = events(member, "diverged"), events(member, "healed")
        assert (len(diverged), len(healed)) == ((1, 1) if member.number in wrong else (0, 0)), member.name
        for event in diverged:
            assert event.detail.startswith(f"our state after round {FLIPPED} is ")
            assert event.detail.endswith(": loading theirs")
    last = live[0].run.reports[-1]
    assert {member.peer for member in live} == set(last.members)


# -- in a swarm --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", range(4))
def test_a_peer_whose_weights_lost_a_bit_is_found_at_the_next_commit_and_heals(
    wrong: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="shoal.learning.divergence"):
        # Of four peers one leads the round after, and then its state is the one that is proposed.
        world = simulate(tiny.scenario(4, ROUNDS, faults={wrong: Faults(flip=(FLIPPED,))}))
    check_healed(world, wrong)
    said = [record.getMessage() for record in caplog.records]
    assert any("3 of 4 voters hold the state " in line and line.endswith("loading theirs") for line in said)
    (diverged,) = events(world.members[wrong], "diverged")
    (healed,) = events(world.members[wrong], "healed")
    assert diverged.round == FLIPPED + 1
    assert healed.t - diverged.t < 2.0
    for member in world.live():
        if member.number != wrong:
            assert not events(member, "step-aside"), "those who are right train on"
            assert [report.round for report in member.run.reports] == list(range(1, ROUNDS + 1))


def test_the_round_after_is_the_mean_over_its_members_from_the_state_of_the_majority() -> None:
    watches: list[tiny.Watch] = []

    async def script(world: World) -> None:
        watches.append(tiny.Watch(world))

    world = simulate(tiny.scenario(5, ROUNDS, faults={2: Faults(flip=(FLIPPED,))}), script)
    check_healed(world, 2)
    mine = {key: weights for key, weights in watches[0].weights.items() if key[0] == 0}
    members = {report.round: report.members for report in world.members[0].run.reports}
    for round in (FLIPPED + 2, ROUNDS):
        start = mine[0, round - 1]
        assert torch.equal(mine[0, round], start - tiny.mean_of(start, members[round], tiny.STEPS))


def test_two_of_five_that_differ_from_each_other_as_well_both_heal() -> None:
    check_healed(simulate(tiny.scenario(5, ROUNDS, faults=dict.fromkeys((1, 3), Faults(flip=(FLIPPED,))))), 1, 3)


@pytest.mark.parametrize("wrong", range(2))
def test_of_two_peers_that_differ_one_gives_way_and_not_both(wrong: int) -> None:
    world = simulate(tiny.scenario(2, ROUNDS, faults={wrong: Faults(flip=(FLIPPED,))}))
    live = world.live()
    assert len({member.run.digest() for member in live}) == 1
    assert [member.run.round for member in live] == [ROUNDS] * 2
    assert sorted(len(events(member, "healed")) for member in live) == [0, 1]
    assert any("as many as hold another one" in e.detail for member in live for e in events(member, "diverged"))


def test_three_peers_with_three_states_agree_on_one_of_them() -> None:
    world = simulate(tiny.scenario(3, ROUNDS, faults=dict.fromkeys((1, 2), Faults(flip=(FLIPPED,)))))
    assert len({member.run.digest() for member in world.live()}) == 1
    assert [member.run.round for member in world.live()] == [ROUNDS] * 3


def test_an_outer_state_that_differs_is_found_and_healed_like_weights() -> None:
    args = (("inner_steps", 2.0), ("outer_lr", 0.7), ("momentum", 0.5))
    scenario = tiny.scenario(4, ROUNDS)
    scenario = attrs.evolve(scenario, founding=attrs.evolve(scenario.founding, strategy_args=args))

    def turn(member: Member, event: Event) -> None:
        if member.number == 2 and (event.round, event.phase, event.what) == (FLIPPED, "train", "begin"):
            world_turned.append(event.round)
            if len(world_turned) == 1:
                momentum = member.run._peer.vectors()["outer.momentum"]
                bytes_view(momentum)[2] ^= 0x40

    world_turned: list[int] = []

    async def script(world: World) -> None:
        world.hooks.append(turn)

    world = simulate(scenario, script)
    check_healed(world, 2)
    momenta = [member.run.snapshots[-1].vectors["outer.momentum"] for member in world.live()]
    assert all(torch.equal(momenta[0], other) for other in momenta)


def test_a_peer_that_diverges_again_and_again_heals_again_and_again() -> None:
    world = simulate(tiny.scenario(4, 12, faults={1: Faults(flip=(2, 5, 8))}))
    assert len({member.run.digest() for member in world.live()}) == 1
    assert len(events(world.members[1], "healed")) == 3


# -- what the digest holds ---------------------------------------------------------------------------------------------


def test_the_digest_of_a_state_is_of_weights_outer_state_and_round() -> None:
    state = {"weights": torch.randn(50), "outer.momentum": torch.randn(50)}
    digest = partial(state_digest, 4)
    same = {name: vector.clone() for name, vector in reversed(state.items())}
    assert digest(same) == digest(state)
    assert state_digest(5, state) != digest(state)
    for name in state:
        other = {key: vector.clone() for key, vector in state.items()}
        bytes_view(other[name])[7] ^= 1
        assert digest(other) != digest(state)
    assert digest({"weights": state["weights"]}) != digest(state)
    assert digest({**state, "outer.other": torch.zeros(0)}) != digest(state)


# -- who is right ------------------------------------------------------------------------------------------------------


def test_the_state_that_most_voters_hold_counts() -> None:
    said = dict(zip(PEERS, (b"a", b"b", b"a", b"b", b"a"), strict=True))
    verdict = judge(7, said, PEERS)
    assert (verdict.round, verdict.digest) == (7, b"a")
    assert verdict.holders == (PEERS[0], PEERS[2], PEERS[4])
    assert verdict.reason == "3 of 5 voters hold the state 61"


def test_nothing_counts_while_most_voters_are_silent_or_do_not_know() -> None:
    said = {PEERS[0]: b"a", PEERS[1]: b"a", PEERS[2]: b""}
    verdict = judge(7, said, PEERS)
    assert (verdict.digest, verdict.reason) == (b"", "only 2 of 5 voters say which state they hold")


def test_strangers_have_no_say() -> None:
    said = {PEERS[0]: b"a", PEERS[1]: b"a", PEERS[3]: b"b", PEERS[4]: b"b", PEERS[2]: b"b"}
    assert judge(7, said, PEERS[:3]).digest == b"a"


def test_of_equals_the_first_in_an_order_that_all_know_decides_for_everybody_alike() -> None:
    for round in range(20):
        order = candidates(b"prev", round, PEERS[:4])
        said = dict(zip(PEERS, (b"a", b"b", b"b", b"a"), strict=False))
        shuffled = dict(reversed(said.items()))
        verdict = judge(7, said, order)
        assert verdict.digest == said[order[0]] == judge(7, shuffled, order).digest
        assert f"as many as hold another one; that of {verdict.holders[0].short} counts" in verdict.reason


def test_nothing_was_decided_once_too_many_have_promised_without_an_accept() -> None:
    accepted = Accepted(0, None)  # type: ignore[arg-type]

    def promises(*values: Accepted | None) -> dict[PeerId, Accepted | None]:
        return dict(zip(PEERS, values, strict=False))

    assert never_decided(PEERS[:3], promises(accepted, None, None), 2)
    assert not never_decided(PEERS[:3], promises(accepted, None), 2)  # the third may have accepted it, too
    assert never_decided(PEERS[:4], promises(accepted, None, None), 3)
    assert never_decided(PEERS[:2], promises(accepted, None), 2)
    assert not never_decided(PEERS, promises(accepted, None, accepted, None), 3)
