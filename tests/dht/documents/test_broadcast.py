"""The epidemic broadcast: a thousand members, one write, how many rounds and copies; then what one member decides."""

from __future__ import annotations

import random
from collections.abc import Callable

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.dht.documents.broadcast import Broadcast, Fetch, Follow, Push, Settings, Tell, wide_hops
from shoal.dht.documents.messages import Advert

from .epidemic import DOCUMENT, ROUNDS, Spread, Swarm, peer, plain_push

MEMBERS = 1000
SEEDS = (1, 2)
WRITES = 3


def spreads(prepare: Callable[[Swarm], None] = lambda swarm: None, loss: float = 0.0, liars: int = 0) -> list[Spread]:
    found = []
    for seed in SEEDS:
        swarm = Swarm(MEMBERS, seed, liars=liars)
        prepare(swarm)
        found += [swarm.write(loss=loss) for _ in range(WRITES)]
    return found


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


# --- a thousand members ---------------------------------------------------------------------------------------------


def test_one_write_reaches_all_of_a_thousand_members_within_six_rounds_at_four_redundant_copies() -> None:
    found = spreads()
    assert all(spread.complete for spread in found)
    assert mean([spread.last for spread in found]) <= 6, "rounds until the last member has it, mean over writes"
    assert mean([spread.redundant for spread in found]) <= 4
    # How far below: these are the numbers of docs/gossip.md.
    assert max(spread.last for spread in found) <= 6
    assert mean([spread.mean for spread in found]) <= 3.5


def test_plain_push_needs_twice_as_many_copies_to_reach_everybody() -> None:
    ours = Swarm(MEMBERS, 1).write().redundant
    same = [plain_push(MEMBERS, 5, seed) for seed in range(12)]
    assert mean([spread.redundant for spread in same]) >= ours, "as many copies as we take, and more"
    assert sum(spread.complete for spread in same) <= 3, "leave members out nearly always"
    sure = next(
        fanout for fanout in range(5, 20) if all(plain_push(MEMBERS, fanout, seed).complete for seed in range(12))
    )
    assert sure - 1 >= 2 * ours


def test_with_a_fifth_of_the_members_silent_all_others_have_it_within_seven_rounds() -> None:
    found = spreads(lambda swarm: swarm.fall_silent(0.2))
    assert all(spread.complete for spread in found)
    assert mean([spread.last for spread in found]) <= 6
    assert mean([spread.redundant for spread in found]) <= 4


def test_once_the_silent_ones_are_noticed_it_is_as_before() -> None:
    def vanish(swarm: Swarm) -> None:
        swarm.fall_silent(0.2)
        swarm.notice()
        for name in swarm.honest():
            assert len(swarm.cores[name].partners) == 8
            assert not any(other in swarm.silent for other in swarm.cores[name].neighbours())

    found = spreads(vanish)
    assert all(spread.complete for spread in found)
    assert max(spread.last for spread in found) <= 6


def test_lost_messages_cost_rounds_and_no_member() -> None:
    found = spreads(lambda swarm: swarm.fall_silent(0.2), loss=0.05)
    assert all(spread.complete for spread in found)
    assert mean([spread.last for spread in found]) <= 8


def test_liars_who_tell_of_what_they_do_not_have_cost_rounds_and_no_member() -> None:
    found = spreads(liars=MEMBERS // 5)
    assert all(spread.complete for spread in found)
    assert mean([spread.mean for spread in found]) <= 4
    assert mean([spread.last for spread in found]) <= 16


def test_a_large_envelope_is_sent_to_everybody_once() -> None:
    swarm = Swarm(200, 1)
    spread = swarm.write(size=ROUNDS.eager_size + 1)
    assert spread.complete
    assert spread.redundant == 0


def test_the_same_seed_spreads_the_same_way() -> None:
    one, other = (Swarm(300, 7).write(loss=0.1) for _ in range(2))
    assert attrs.astuple(one, recurse=False) == attrs.astuple(other, recurse=False)


# --- one member -----------------------------------------------------------------------------------------------------


def advert(number: int) -> Advert:
    return Advert(DOCUMENT, peer(99), 1, number, number.to_bytes(32, "big"))


class Member:
    """A core, and what it holds."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.has: dict[bytes, None] = {}
        self.core = Broadcast(peer(0), random.Random(0), lambda advert: advert.id in self.has, settings)


def test_partners_are_members_and_some_of_them_feed_us() -> None:
    core = Member().core
    actions = core.set_members([peer(number) for number in range(100)], 0.0)
    follows = [action for action in actions if isinstance(action, Follow)]
    assert sorted(action.peer for action in follows if action.feed) == sorted(core.feeds)
    assert len(core.partners) == 8
    assert len(core.feeds) == 4
    assert peer(0) not in core.partners
    assert core.set_members([peer(number) for number in range(100)], 1.0) == []


def test_a_small_swarm_is_followed_whole() -> None:
    core = Member().core
    core.set_members([peer(1), peer(2), peer(0)], 0.0)
    assert sorted(core.partners) == sorted([peer(1), peer(2)])
    assert core.feeds == core.partners


def test_who_is_no_member_any_more_is_left_and_replaced() -> None:
    core = Member().core
    core.set_members([peer(number) for number in range(1, 9)], 0.0)
    actions = core.set_members([peer(number) for number in range(5, 13)], 1.0)
    left = [action.peer for action in actions if isinstance(action, Follow) and action.leave]
    assert sorted(left) == sorted(peer(number) for number in range(1, 5))
    assert sorted(core.partners) == sorted(peer(number) for number in range(5, 13))
    assert len(core.feeds) == 4


def test_a_silent_partner_is_replaced_and_left_alone_for_a_while() -> None:
    core = Member().core
    core.set_members([peer(number) for number in range(1, 10)], 0.0)
    gone = core.feeds[0]
    core.silent(gone, 1.0)
    assert gone not in core.partners
    assert len(core.partners) == 8
    assert len(core.feeds) == 4
    core.silent(core.partners[0], 2.0)
    assert gone not in core.partners
    core.tick(1000.0)
    assert len(core.partners) == 8


def test_members_push_strangers_out_of_the_followers_and_nobody_else_does() -> None:
    core = Member(Settings(followers=3)).core
    core.set_members([peer(1), peer(2), peer(3)], 0.0)
    for stranger in (11, 12, 13):
        assert core.followed(peer(stranger), False, 0.0)[0]
    assert not core.followed(peer(14), False, 0.0)[0]
    for member in (1, 2, 3):
        assert core.followed(peer(member), True, 0.0)[0]
    assert not core.followed(peer(11), True, 0.0)[0]
    assert sorted(core.followers) == sorted([peer(1), peer(2), peer(3)])


def test_who_does_not_renew_is_no_follower_any_more() -> None:
    core = Member().core
    core.followed(peer(5), True, 0.0)
    core.tick(core.settings.renew * 2)
    assert core.followers == (peer(5),)
    core.tick(core.settings.renew * 3)
    assert core.followers == ()


def test_what_is_young_goes_to_all_neighbours_and_later_only_to_those_that_are_fed() -> None:
    member = Member()
    member.core.set_members([peer(number) for number in range(1, 1000)], 0.0)
    member.core.followed(peer(1001), True, 0.0)
    member.core.followed(peer(1002), False, 0.0)
    young = member.core.kept(advert(1), 100, 1, 0.0, (peer(7),))
    assert len([action for action in young if isinstance(action, Push)]) == len(member.core.neighbours())
    assert all(action.hop == 2 for action in young if isinstance(action, Push))
    old = member.core.kept(advert(2), 100, 3, 0.0, (peer(7),)) + member.core.tick(1.0)
    assert [action.peer for action in old if isinstance(action, Push)] == [peer(1001)]
    told = [action.peer for action in old if isinstance(action, Tell)]
    assert sorted(told) == sorted({*member.core.neighbours()} - {peer(1001)})


def test_nobody_is_sent_or_told_what_it_gave_us() -> None:
    member = Member()
    member.core.set_members([peer(1), peer(2), peer(3)], 0.0)
    member.core.followed(peer(1), True, 0.0)
    assert not member.core.pushed(peer(1), advert(1))
    actions = member.core.kept(advert(1), 100, 9, 0.0, (peer(1),))
    member.core.advertised(peer(2), [advert(1)], 0.0)
    actions += member.core.tick(1.0)
    assert all(action.peer != peer(1) for action in actions)


def test_what_was_caught_up_on_is_told_and_not_pushed() -> None:
    member = Member()
    member.core.set_members([peer(1), peer(2)], 0.0)
    member.core.followed(peer(1), True, 0.0)
    actions = member.core.kept(advert(1), 100, -1, 0.0, (peer(2),), wide=False) + member.core.tick(1.0)
    assert [type(action) for action in actions if not isinstance(action, Follow)] == [Tell]


def test_what_is_told_is_fetched_once_and_from_another_one_when_it_does_not_come() -> None:
    member = Member()
    core = member.core
    core.set_members([peer(1), peer(2), peer(3)], 0.0)
    assert core.advertised(peer(1), [advert(1)], 0.0) == [Fetch(peer(1), (advert(1),))]
    assert core.advertised(peer(2), [advert(1)], 0.1) == []
    actions, missing = core.fetched(peer(1), [advert(1)], 0.5)
    assert missing == 1
    assert actions == [Fetch(peer(2), (advert(1),))]
    slow = core.advertised(peer(3), [advert(1)], 0.6) + core.tick(0.5 + core.settings.fetch_patience)
    assert Fetch(peer(3), (advert(1),)) in slow
    member.has[advert(1).id] = None
    core.kept(advert(1), 10, -1, 3.0, (peer(3),))
    assert core.wanting == 0


def test_one_liar_cannot_fill_the_room_for_what_is_wanted() -> None:
    core = Member().core
    core.set_members([peer(1), peer(2)], 0.0)
    core.advertised(peer(1), [advert(number) for number in range(5000)], 0.0)
    assert core.wanting == core.settings.wanted // 8
    assert core.advertised(peer(2), [advert(9999)], 0.1) == [Fetch(peer(2), (advert(9999),))]
    for _ in range(3):
        core.fetched(peer(1), [advert(number) for number in range(5000)], 0.2)
    assert core.wanting == 1
    assert len(core.advertised(peer(1), [advert(1)], 0.3)) == 1


def test_what_nobody_gives_is_given_up() -> None:
    core = Member().core
    core.set_members([peer(1), peer(2)], 0.0)
    core.advertised(peer(1), [advert(1)], 0.0)
    core.fetched(peer(1), [advert(1)], 0.1)
    assert core.wanting == 0


def test_one_peer_that_makes_up_names_leaves_room_for_what_others_have() -> None:
    core = Member().core
    core.set_members([peer(1), peer(2)], 0.0)
    for first in range(0, 10_000, 500):
        core.advertised(peer(1), [advert(number) for number in range(first, first + 500)], 0.0)
    assert core.wanting < core.settings.wanted / 2
    assert Fetch(peer(2), (advert(20_000),)) in core.advertised(peer(2), [advert(20_000)], 0.1)
    # What it gives, or fails to give, makes room for more of it.
    given = core.wanting
    for action in core.tick(core.settings.fetch_patience):
        assert not isinstance(action, Fetch)
    assert core.wanting == 1
    core.advertised(peer(1), [advert(number) for number in range(given)], 10.0)
    assert core.wanting == given


def test_who_says_that_it_has_an_envelope_is_remembered_for_so_many_only() -> None:
    member = Member()
    member.core.set_members([peer(1), peer(2)], 0.0)
    member.core.pushed(peer(1), advert(1))
    member.core.kept(advert(1), 10, 1, 0.0, (peer(1),))
    for number in range(3, 2000):
        member.core.advertised(peer(number), [advert(1)], 0.0)
        assert member.core.pushed(peer(number), advert(1)) == 1
        member.core.advertised(peer(number), [advert(2)], 0.0)
        member.core.pushed(peer(number), advert(2))
    (seen,) = member.core._seen.values()
    assert len(seen.holders) < 200
    assert len(seen.senders) < 200
    assert len(member.core._wanted[advert(2).id].told) < 200
    assert member.core.pushed(peer(1), advert(1)) == 2


def test_a_copy_says_how_often_this_peer_has_sent_it() -> None:
    member = Member()
    assert member.core.pushed(peer(1), advert(1)) == 0
    member.core.kept(advert(1), 10, 1, 0.0, (peer(1),))
    assert member.core.pushed(peer(2), advert(1)) == 1
    assert member.core.pushed(peer(1), advert(1)) == 2
    assert member.core.redundant == 2


def test_hops_are_wide_while_hardly_anybody_can_have_it() -> None:
    assert [wide_hops(members, 16) for members in (2, 16, 17, 255, 256, 1000, 4095, 4096)] == [1, 1, 1, 1, 2, 2, 2, 3]
    assert wide_hops(10, 0) == 1
    assert wide_hops(10, 1) == 1


SMALL = Settings(partners=3, feeds=2, followers=4, remembered=16, wanted=16)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 32))
def test_whatever_peers_say_memory_stays_bounded(seed: int) -> None:
    rng = random.Random(seed)
    member = Member(SMALL)
    core, now = member.core, 0.0
    core.set_members([peer(number) for number in range(20)], now)
    for _ in range(300):
        now += rng.choice((0.0, 0.01, 1.0, 100.0))
        who = peer(rng.randrange(30))
        what = [advert(rng.randrange(200)) for _ in range(rng.randrange(1, 30))]
        match rng.randrange(9):
            case 0:
                core.set_members([peer(rng.randrange(30)) for _ in range(10)], now)
            case 1:
                core.followed(who, rng.random() < 0.5, now)
            case 2:
                core.unfollowed(who)
            case 3:
                core.silent(who, now)
            case 4:
                core.advertised(who, what, now)
            case 5:
                core.fetched(who, what, now)
            case 6:
                core.refused(what[0])
            case 7:
                core.tick(now)
            case _:
                if not core.pushed(who, what[0]):
                    member.has[what[0].id] = None
                    core.kept(what[0], 10, rng.randrange(-3, 70), now, (who,))
        assert len(core.partners) <= 3
        assert len(core.feeds) <= 2
        assert len(core.followers) <= 4
        assert core.wanting <= 16
        assert len(core._seen) <= 16
        assert all(len(names) <= 16 for names in core._telling.values())
        assert all(wanted.asked is None or wanted.asked in wanted.told for wanted in core._wanted.values())
        assert all(id in core._wanted for id in core._idle)
        assert sum(core._first.values()) == core.wanting
        assert core.due(now) >= now


@pytest.mark.slow
def test_ten_thousand_members_take_a_round_more() -> None:
    swarm = Swarm(10_000, 1)
    found = [swarm.write() for _ in range(3)]
    assert all(spread.complete for spread in found)
    assert mean([spread.last for spread in found]) <= 7.5
    assert mean([spread.redundant for spread in found]) <= 4
