"""What a peer has seen of others: counted right, bounded whatever happens, there again in the next life."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.learning import defaults
from shoal.learning.events import Standing
from shoal.learning.standing import Standings, fault, witnessed
from shoal.learning.store import RunStore
from shoal.sim.virtual import VirtualHost
from shoal.transport.errors import ConfigError
from shoal.transport.identity import Identity, PeerId
from shoal.transport.memory import MemoryWorld

ME, ALICE, BOB, CAROL = (Identity(bytes([number]) * 32).peer_id for number in range(1, 5))


@asynccontextmanager
async def living(store: RunStore) -> AsyncIterator[Standings]:
    """One life with ``store``: what was seen before is read at its beginning, what is new is written by its end."""
    host = VirtualHost("here", MemoryWorld(random.Random(1)), seed=1)
    async with trio.open_nursery() as nursery:
        standings = Standings(ME)
        await nursery.start(standings.run, host, store)
        yield standings
        nursery.cancel_scope.cancel()


def known(standings: Standings, peer: PeerId) -> Standing:
    found = standings.of(peer)
    assert found is not None
    return found


# --- what is counted --------------------------------------------------------------------------------------------------


def test_rounds_contributions_and_quality_are_counted_for_each_voter() -> None:
    standings = Standings(ME)
    standings.committed(1, (ME, ALICE, BOB), (ME, ALICE, BOB), (1.0, 0.5, 0.0))
    standings.committed(2, (ME, ALICE, BOB), (ME, ALICE), (1.0, 1.0))
    standings.committed(3, (ME, ALICE), (ME, ALICE))
    assert known(standings, ALICE) == Standing(ALICE.text, 3, 3, 3, 1.0, 2, 0.75, 0.75)
    assert known(standings, BOB) == Standing(BOB.text, 2, 2, 1, 0.5, 1, 0.0, 0.0)


def test_a_round_that_combined_nothing_says_nothing_of_anybody() -> None:
    standings = Standings(ME)
    standings.committed(1, (ME, ALICE), ())
    assert standings.all() == ()


def test_nothing_is_kept_of_oneself() -> None:
    standings = Standings(ME)
    standings.committed(1, (ME,), (ME,), (1.0,))
    standings.audited(ME, "lied")
    standings.accused_falsely(ME)
    assert standings.all() == ()


def test_audits_and_false_accusations_are_counted_apart() -> None:
    standings = Standings(ME)
    for verdict in ("passed", "passed", "lied", "unanswered", "unanswered", "unanswered"):
        standings.audited(ALICE, verdict)  # type: ignore[arg-type]
    standings.accused_falsely(BOB)
    assert known(standings, ALICE) == Standing(ALICE.text, passed=2, lied=1, unanswered=3)
    assert known(standings, BOB) == Standing(BOB.text, false_accusations=1)
    with pytest.raises(AssertionError):
        standings.audited(ALICE, "rounds")  # type: ignore[arg-type]


def test_whoever_was_seen_last_stands_first() -> None:
    standings = Standings(ME)
    standings.committed(1, (ALICE, BOB, CAROL), (ALICE, BOB, CAROL))
    standings.audited(ALICE, "passed")
    assert [found.peer for found in standings.all()] == [ALICE.text, CAROL.text, BOB.text]


def test_lately_follows_a_peer_that_turns_bad_while_the_mean_remembers() -> None:
    found = Standing(ALICE.text)
    for round in range(1, 201):
        found = witnessed(found, round, True, 1.0)
    for round in range(201, 221):
        found = witnessed(found, round, round % 2 == 0, 0.0)
    assert found.quality == pytest.approx(200 / 210)
    assert found.quality_lately == pytest.approx(0.95**10)
    assert found.lately is not None and 0.6 < found.lately < 0.75
    assert (found.contributed, found.rounds) == (210, 220)


def test_the_first_values_are_plainly_averaged() -> None:
    found = Standing(ALICE.text)
    for round in range(1, 11):
        found = witnessed(found, round, round > 5, 0.1 * round)
    assert found.lately == pytest.approx(0.5)
    assert found.quality == pytest.approx(0.8) == found.quality_lately


def test_a_quality_that_is_no_number_is_not_measured_and_one_out_of_range_is_cut() -> None:
    found = witnessed(Standing(ALICE.text), 1, True, math.nan)
    assert found.measured == 0 and found.quality is None and found.contributed == 1
    assert witnessed(found, 2, True, 7.0).quality == 1.0
    assert witnessed(found, 2, True, -math.inf).quality == 0.0


# --- bounds -----------------------------------------------------------------------------------------------------------

PEERS = [Identity(number.to_bytes(2, "big") * 16).peer_id for number in range(1, 31)]
_peers = st.sampled_from(PEERS)


@attrs.frozen
class Committed:
    round: int
    voters: tuple[PeerId, ...]
    members: tuple[PeerId, ...]
    quality: tuple[float, ...]


@st.composite
def _rounds(draw: st.DrawFn) -> Committed:
    voters = draw(st.lists(_peers, max_size=6, unique=True))
    members = [peer for peer in voters if draw(st.booleans())]
    quality = draw(st.none() | st.lists(st.floats(), min_size=len(members), max_size=len(members)))
    return Committed(draw(st.integers(-5, 1 << 70)), tuple(voters), tuple(members), tuple(quality or ()))


_audits = st.tuples(_peers, st.sampled_from(["passed", "lied", "unanswered", "false"]))
_happenings = st.lists(_rounds() | _audits, max_size=40)


def happen(standings: Standings, happenings: Sequence[Committed | tuple[PeerId, str]]) -> None:
    for happening in happenings:
        match happening:
            case Committed():
                standings.committed(happening.round, happening.voters, happening.members, happening.quality)
            case (peer, "false"):
                standings.accused_falsely(peer)
            case (peer, verdict):
                standings.audited(peer, verdict)  # type: ignore[arg-type]


@settings(deadline=None)
@given(_happenings, st.integers(1, 8))
def test_whatever_happens_all_values_stay_in_their_bounds_and_come_back_from_the_store(
    happenings: list[Committed | tuple[PeerId, str]], room: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(defaults, "MAX_STANDINGS", room)
        store = RunStore(None)
        standings = Standings(ME)
        happen(standings, happenings)
        found = standings.all()
        assert len(found) <= room and len({each.peer for each in found}) == len(found)
        assert [fault(each) for each in found] == [None] * len(found)
        store.save_standings(found)
        after = Standings(ME)
        after.restore(store.load_standings())
        assert after.all() == found


@settings(deadline=None)
@given(_happenings)
def test_with_room_for_all_what_is_counted_is_what_happened(
    happenings: list[Committed | tuple[PeerId, str]],
) -> None:
    standings = Standings(ME)
    happen(standings, happenings)
    rounds = [one for one in happenings if isinstance(one, Committed) and one.members]
    for peer in PEERS:
        seen = standings.of(peer) or Standing(peer.text)
        mine = [one for one in rounds if peer in one.voters]
        given = [one for one in mine if peer in one.members]
        said = [one.quality[one.members.index(peer)] for one in given if one.quality]
        said = [min(1.0, max(0.0, value)) for value in said if not math.isnan(value)]
        assert (seen.rounds, seen.contributed, seen.measured) == (len(mine), len(given), len(said))
        if said:
            assert seen.quality == pytest.approx(sum(said) / len(said)) == seen.quality_lately
        for verdict in ("passed", "lied", "unanswered"):
            assert getattr(seen, verdict) == happenings.count((peer, verdict))
        assert seen.false_accusations == happenings.count((peer, "false"))


def test_counts_end_at_their_bound() -> None:
    full = Standing(ALICE.text, 1, *[defaults.MAX_STANDING_COUNT] * 2, 1.0, defaults.MAX_STANDING_COUNT, 1.0, 1.0)
    full = attrs.evolve(full, **dict.fromkeys(("passed", "lied", "unanswered", "false_accusations"), full.rounds))
    standings = Standings(ME)
    standings.restore((full,))
    standings.committed(1 << 60, (ALICE,), (ALICE,), (1.0,))
    for verdict in ("passed", "lied", "unanswered"):
        standings.audited(ALICE, verdict)  # type: ignore[arg-type]
    standings.accused_falsely(ALICE)
    assert known(standings, ALICE) == attrs.evolve(full, round=defaults.MAX_STANDING_COUNT)


def test_who_was_not_seen_for_the_longest_time_is_forgotten_and_liars_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "MAX_STANDINGS", 6)
    standings = Standings(ME)
    liars, others = PEERS[:2], PEERS[2:]
    for liar in liars:
        standings.audited(liar, "lied")
    for round, peer in enumerate(others):
        standings.committed(round, (peer,), (peer,))
        assert known(standings, peer).rounds == 1
    assert {found.peer for found in standings.all()} == {peer.text for peer in [*liars, *others[-4:]]}


def test_a_crowd_of_liars_leaves_room_for_those_who_come_after(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "MAX_STANDINGS", 6)
    standings = Standings(ME)
    for liar in PEERS[:20]:
        standings.accused_falsely(liar)
    for round in range(3):
        standings.committed(round, PEERS[20:23], PEERS[20:23])
    assert [known(standings, peer).rounds for peer in PEERS[20:23]] == [3, 3, 3]
    assert {found.peer for found in standings.all()[3:]} == {peer.text for peer in PEERS[17:20]}


# --- on disk ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["folder", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> RunStore:
    return RunStore(tmp_path / "run" if request.param == "folder" else None)


async def test_the_next_life_goes_on_counting(store: RunStore) -> None:
    async with living(store) as first:
        first.committed(1, (ALICE, BOB), (ALICE,), (0.5,))
    async with living(RunStore(store.folder) if store.folder is not None else store) as second:
        second.committed(2, (ALICE, BOB), (ALICE, BOB), (1.0, 1.0))
        second.audited(BOB, "unanswered")
        assert known(second, ALICE) == Standing(ALICE.text, 2, 2, 2, 1.0, 2, 0.75, 0.75)
        assert known(second, BOB) == Standing(BOB.text, 2, 2, 1, 0.5, 1, 1.0, 1.0, unanswered=1)


class Counting(RunStore):
    """``writes``: when it wrote."""

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__(folder)
        self.writes: list[float] = []

    def save_standings(self, peers: tuple[Standing, ...]) -> None:
        self.writes.append(trio.current_time())
        super().save_standings(peers)


async def test_many_rounds_cost_few_writes_quiet_ones_none_and_a_crash_costs_only_the_last_seconds() -> None:
    store = Counting()
    async with living(store) as standings:
        begin = trio.current_time()
        for round in range(1, 1001):
            standings.committed(round, (ALICE,), (ALICE,))
            await trio.sleep(0.1)
        during = len(store.writes)
        assert 9 <= during <= 100 / defaults.STANDINGS_EVERY
        (stored,) = store.copy().load_standings()
        assert stored.rounds >= 1000 - defaults.STANDINGS_EVERY / 0.1 - 1
        await trio.sleep(3600)
        assert len(store.writes) == during + 1
        assert store.writes[-1] <= begin + 100 + defaults.STANDINGS_EVERY
    assert len(store.writes) == during + 1, "at the end nothing was new"
    assert store.load_standings() == standings.all()


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "count", "share", "peer", "sum", "crowd", "half"])
async def test_a_damaged_file_costs_the_history_and_is_told_of(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = witnessed(Standing(ALICE.text), 1, True, 0.5)
    store, path = RunStore(tmp_path), tmp_path / "standings"
    store.save_standings((good,))
    data = path.read_bytes()
    match damage:
        case "cut":
            path.write_bytes(data[: len(data) // 2])
        case "empty":
            path.write_bytes(b"")
        case "garbage":
            path.write_bytes(b"\xc1" * len(data))
        case "count":
            store.save_standings((good, attrs.evolve(good, peer=BOB.text, lied=-1)))
        case "share":
            store.save_standings((good, attrs.evolve(good, peer=BOB.text, quality=1.5)))
        case "peer":
            store.save_standings((good, attrs.evolve(good, peer="x" * 300)))
        case "sum":
            store.save_standings((good, attrs.evolve(good, peer=BOB.text, contributed=2)))
        case "half":
            store.save_standings((good, attrs.evolve(good, peer=BOB.text, quality=None)))
        case "crowd":
            monkeypatch.setattr(defaults, "MAX_STANDINGS", 1)
            store.save_standings((good, attrs.evolve(good, peer=BOB.text)))
    caplog.set_level(logging.WARNING)
    async with living(RunStore(tmp_path)) as standings:
        assert standings.all() == ()
        assert "what was known of other peers is left aside" in caplog.text
        assert ("standings is damaged" in caplog.text) == (damage in ("cut", "empty", "garbage"))
        # It begins anew, and in place of the damaged file.
        standings.committed(5, (BOB,), (BOB,))
    (found,) = RunStore(tmp_path).load_standings()
    assert (found.peer, found.rounds) == (BOB.text, 1)


class Full(RunStore):
    """A disk without room, until it has some."""

    room = False

    def save_standings(self, peers: tuple[Standing, ...]) -> None:
        if not self.room:
            raise ConfigError("cannot write standings: No space left on device")
        super().save_standings(peers)


async def test_a_full_disk_ends_nothing_and_what_was_seen_is_written_once_there_is_room(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = Full(None)
    async with living(store) as standings:
        standings.committed(1, (ALICE,), (ALICE,))
        with caplog.at_level(logging.WARNING):
            await trio.sleep(2 * defaults.STANDINGS_EVERY)
        assert "No space left on device" in caplog.text
        store.room = True
    assert store.load_standings() == standings.all() != ()


def test_a_thousand_peers_fit_into_a_file_that_can_be_read(tmp_path: Path) -> None:
    peers = [Identity(number.to_bytes(32, "big")).peer_id for number in range(1, defaults.MAX_STANDINGS + 1)]
    store = RunStore(tmp_path)
    standings = Standings(ME)
    standings.committed(1 << 40, peers, peers, [1 / 3] * len(peers))
    store.save_standings(standings.all())
    assert len(store.load_standings()) == defaults.MAX_STANDINGS
    assert (tmp_path / "standings").stat().st_size < 400_000
