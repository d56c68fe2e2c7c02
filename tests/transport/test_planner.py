"""Tables of what is known, and the order of ways that follows from it."""

from __future__ import annotations

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.transport import defaults
from shoal.transport.address import Address, PeerRecord, RelayAddress
from shoal.transport.identity import Identity
from shoal.transport.planner import QUALITY, Outcome, OwnReach, Plan, Reach, Step, plan

ME = Identity(b"m" * 32).peer_id
IT = Identity(b"i" * 32).peer_id
R1, R2, R3 = (Identity(bytes([n]) * 32).peer_id for n in (1, 2, 3))
ALL = ("direct", "reversal", "punch", "webrtc", "relay")


def at(text: str) -> Address:
    return Address.parse(text)


PUBLIC = at("198.51.100.7:4001")
PUBLIC6 = at("[2001:db8::7]:4001")
HOME = at("192.168.1.7:4001")
LOOP = at("127.0.0.1:4001")
RELAYS = (RelayAddress(R1, (at("203.0.113.1:4001"),)), RelayAddress(R2, (at("203.0.113.2:4001"),)))


def record(*addresses: Address, relays: tuple[RelayAddress, ...] = ()) -> PeerRecord:
    return PeerRecord(IT, 1, 1e10, addresses, relays)


def own(state: Reach = Reach.UNREACHABLE, **more: object) -> OwnReach:
    return OwnReach(ME, state, "as three peers found", ways=ALL, **more)  # type: ignore[arg-type]


def ways(found: Plan) -> list[str]:
    return [step.way for step in found.steps]


def targets(found: Plan) -> list[str]:
    return [step.target for step in found.steps]


def test_a_peer_that_can_be_dialled_is_dialled_with_the_head_starts_of_rfc_8305() -> None:
    found = plan(own(), IT, record(PUBLIC, PUBLIC6))
    assert [(step.way, step.address, step.head_start) for step in found.steps] == [
        ("direct", PUBLIC, 0.0),
        ("direct", PUBLIC6, defaults.DIAL_HEAD_START),
    ]


def test_ip_versions_take_turns() -> None:
    four = [at(f"198.51.100.{n}:4001") for n in range(1, 4)]
    six = [at(f"[2001:db8::{n}]:4001") for n in range(1, 3)]
    found = plan(own(), IT, record(*four, *six))
    assert [step.address for step in found.steps] == [four[0], six[0], four[1], six[1], four[2]]


@pytest.mark.parametrize(
    ("state", "relays", "expected"),
    [
        (Reach.UNREACHABLE, RELAYS, ["direct", "punch", "relay", "relay", "webrtc"]),
        (Reach.UNKNOWN, RELAYS, ["direct", "punch", "relay", "relay", "webrtc"]),
        (Reach.REACHABLE, RELAYS, ["reversal", "direct", "punch", "relay", "relay", "webrtc"]),
        (Reach.REACHABLE, (), ["direct"]),
        (Reach.UNREACHABLE, (), ["direct"]),
    ],
)
def test_what_both_sides_can_do_decides_the_ways(
    state: Reach, relays: tuple[RelayAddress, ...], expected: list[str]
) -> None:
    assert ways(plan(own(state), IT, record(HOME, relays=relays))) == expected


@pytest.mark.parametrize("addresses", [(), (HOME,), tuple(at(f"192.168.1.{n}:1") for n in range(1, 17))])
@pytest.mark.parametrize("state", list(Reach))
def test_a_relay_is_asked_well_within_a_second(state: Reach, addresses: tuple[Address, ...]) -> None:
    found = plan(own(state), IT, record(*addresses, relays=RELAYS))
    first = ways(found).index("relay")
    assert sum(step.head_start for step in found.steps[: first + 1]) < 0.8


def test_without_a_common_peer_only_dialling_is_left_and_each_other_way_says_why() -> None:
    found = plan(own(), IT, record(PUBLIC))
    assert dict(found.skipped) == {
        "reversal": "we cannot be dialled either: as three peers found",
        "hole punching": "no common peer is known that could carry the signals",
        "WebRTC": "its record names no relay, so it does not count itself hidden",
        "relay": "its record names no relay",
    }


def test_a_linked_helper_carries_signals_for_a_peer_that_names_no_relay() -> None:
    found = plan(own(Reach.REACHABLE), IT, record(HOME), helpers=RELAYS[:1])
    assert ways(found) == [
        "direct",
        "reversal",
        "punch",
    ]  # no process is started for one that is not known to be hidden
    assert {step.via for step in found.steps if step.via} == {RELAYS[0]}
    assert "relay" in dict(found.skipped)


def test_an_unknown_peer_without_addresses_gives_no_steps_and_reasons() -> None:
    found = plan(own(), IT, None)
    assert found.steps == ()
    assert dict(found.skipped)["direct"] == "no address of it is known"


def test_relays_that_we_are_linked_with_come_first() -> None:
    found = plan(own(linked=(R3, R2)), IT, record(relays=RELAYS))
    assert [step.via.peer for step in found.steps if step.way == "relay" and step.via] == [R2, R1]
    assert found.steps[0].via == RELAYS[1]


def test_we_are_no_relay_to_ourselves_and_it_is_none_for_itself() -> None:
    relays = (RelayAddress(ME, ()), RelayAddress(R1, ()))
    found = plan(own(), IT, record(relays=relays))
    assert [step.via.peer for step in found.steps if step.via] == [R1] * 3
    assert any("this node itself" in reason for _, reason in found.skipped)
    assert plan(own(), IT, record(), helpers=[RelayAddress(IT, ()), RelayAddress(ME, ())]).steps == ()


def test_given_addresses_come_before_published_ones() -> None:
    given_one = at("198.51.100.9:1")
    found = plan(own(), IT, record(PUBLIC), [given_one])
    assert targets(found) == [str(given_one), str(PUBLIC)]


def test_what_worked_last_time_comes_first_and_what_failed_comes_last() -> None:
    three = [at(f"198.51.100.{n}:4001") for n in range(1, 4)]
    past = [Outcome(str(three[0]), False, 50.0, "timed out"), Outcome(str(three[2]), True, 60.0)]
    found = plan(own(), IT, record(*three), past=past, now=70.0)
    assert [step.address for step in found.steps] == [three[2], three[1], three[0]]
    assert found.steps[2].reason == "it failed last time: timed out"
    # and is forgotten after a while
    later = plan(own(), IT, record(*three), past=past, now=70.0 + defaults.OUTCOME_LIFETIME)
    assert [step.address for step in later.steps] == three


def test_the_local_network_comes_before_the_public_address() -> None:
    mine = own(addresses=(at("192.168.1.2:4001"),))
    found = plan(mine, IT, record(PUBLIC, at("10.9.9.9:1"), HOME))
    assert [step.address for step in found.steps] == [HOME, PUBLIC, at("10.9.9.9:1")]
    assert found.steps[0].reason == "it seems to be on our local network"


@pytest.mark.parametrize(
    ("ours", "theirs", "tried"),
    [
        (("192.168.1.2:1", "127.0.0.1:1"), ("192.168.1.7:2", "127.0.0.1:2"), False),  # another machine
        (("192.168.1.7:1", "127.0.0.1:1"), ("192.168.1.7:2", "127.0.0.1:2"), True),  # this machine
        (("127.0.0.1:1",), ("192.168.1.7:2", "127.0.0.1:2"), True),  # nobody knows
        ((), ("192.168.1.7:2", "127.0.0.1:2"), True),
        (("192.168.1.2:1",), ("127.0.0.1:2",), True),  # it has nothing else
    ],
)
def test_loopback_is_dialled_only_where_it_may_mean_that_peer(
    ours: tuple[str, ...], theirs: tuple[str, ...], tried: bool
) -> None:
    found = plan(own(addresses=tuple(map(at, ours))), IT, record(*map(at, theirs)))
    assert (at("127.0.0.1:2") in [step.address for step in found.steps]) is tried
    if tried:
        assert found.steps[-1].address == at("127.0.0.1:2")
    else:
        assert (str(at("127.0.0.1:2")), "that is another machine's own loopback") in found.skipped


def test_addresses_of_a_family_that_we_lack_are_skipped_with_that_reason() -> None:
    found = plan(own(families=("IPv4",)), IT, record(PUBLIC6, PUBLIC))
    assert targets(found) == [str(PUBLIC)]
    assert (str(PUBLIC6), "this machine has no IPv6") in found.skipped


def test_who_is_given_a_new_port_for_each_destination_does_not_punch() -> None:
    found = plan(own(varying=True), IT, record(relays=RELAYS))
    assert "punch" not in ways(found)
    assert "another port" in dict(found.skipped)["hole punching"]


def test_a_way_that_failed_is_left_alone_for_longer_each_time() -> None:
    title = f"hole punching through {R1.short}"
    once = [Outcome(title, False, 100.0, "no answer")]
    twice = [*once, Outcome(title, False, 110.0, "no answer")]
    for past, last in ((once, 100.0), (twice, 110.0)):
        wait = defaults.WAY_BACKOFF * len(past)
        soon = plan(own(), IT, record(relays=RELAYS), past=past, now=last + wait - 1)
        assert "punch" not in ways(soon)
        assert "no answer" in dict(soon.skipped)["hole punching"]
        assert "punch" in ways(plan(own(), IT, record(relays=RELAYS), past=past, now=last + wait))


def test_only_better_ways_are_worth_replacing_a_link() -> None:
    found = plan(own(Reach.REACHABLE), IT, record(HOME, relays=RELAYS))
    assert ways(found.better_than("relay")) == ["reversal", "direct", "punch", "webrtc"]
    over_the_link = plan(own(Reach.REACHABLE), IT, record(HOME, relays=RELAYS), linked=True).better_than("relay")
    assert [step.via.peer for step in over_the_link.steps if step.via] == [IT] * 3
    assert ways(found.better_than("webrtc")) == ["reversal", "direct", "punch"]
    for way in ("direct", "reversal", "punch"):
        assert found.better_than(way).steps == ()


def test_ways_that_are_switched_off_are_neither_tried_nor_named() -> None:
    found = plan(OwnReach(ME), IT, record(PUBLIC, relays=RELAYS))
    assert ways(found) == ["direct"]
    assert found.skipped == ()


addresses = st.builds(
    lambda six, a, b, port: at(f"[2001:db8::{a:x}:{b:x}]:{port}" if six else f"198.{a}.{b}.7:{port}"),
    st.booleans(), st.integers(0, 255), st.integers(0, 255), st.integers(1, 65535),
)  # fmt: skip


@given(
    st.sampled_from(Reach),
    st.lists(addresses, max_size=24),
    st.lists(addresses, max_size=4),
    st.integers(0, 2),
    st.lists(st.tuples(st.integers(0, 23), st.booleans(), st.floats(0, 1e4)), max_size=8),
)
def test_every_plan_is_complete(
    state: Reach, known: list[Address], extra: list[Address], relays: int, past: list[tuple[int, bool, float]]
) -> None:
    outcomes = [Outcome(str(known[i]), ok, when) for i, ok, when in past if i < len(known)]
    made = plan(own(state), IT, record(*known, relays=RELAYS[:relays]), extra, outcomes, now=1e4)
    assert made == plan(own(state), IT, record(*known, relays=RELAYS[:relays]), extra, outcomes, now=1e4)
    assert all(step.reason and step.head_start >= 0 and step.way in QUALITY for step in made.steps)
    assert not made.steps or made.steps[0].head_start == 0
    # every address is either dialled or named with a reason, once
    dialled = [str(step.address) for step in made.steps if step.address]
    named = [what for what, reason in made.skipped if reason and "://" in what]
    assert sorted(dialled + named) == sorted({str(address) for address in (*known, *extra)})
    assert len(dialled) <= defaults.MAX_ADDRESSES
    assert all(isinstance(step, Step) and attrs.evolve(step) == step for step in made.steps)
