"""The planner: slice sizes that no others beat, orders of a ring that no others beat, claims that change little."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.learning.reduce import ring, sizing, topology
from shoal.learning.reduce.rates import MAX_PATHS, Path, Rates
from shoal.learning.reduce.sizing import Lines
from shoal.learning.reduce.slices import covers
from shoal.transport.identity import Identity, PeerId

PEERS = tuple(sorted(Identity(bytes([n]) * 32).peer_id for n in range(1, 18)))
LENGTH = 1 << 20
INF = math.inf

rates = st.one_of(st.just(INF), st.floats(0.01, 100.0))


@st.composite
def any_lines(draw: st.DrawFn, least: int = 1, most: int = 5) -> Lines:
    count = draw(st.integers(least, most))

    def each() -> tuple[float, ...]:
        return tuple(draw(st.lists(rates, min_size=count, max_size=count)))

    gives = tuple(draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    owned = draw(st.sampled_from((1.0, max(1.0 / count, 0.5))))
    return Lines(each(), each(), each(), each(), gives, (True,) * count, (owned,) * count)


def simplex(count: int, steps: int) -> list[tuple[float, ...]]:
    """All shares in multiples of 1/steps."""
    return [
        tuple((b - a - 1) / steps for a, b in itertools.pairwise((-1, *cuts, steps + count - 1)))
        for cuts in itertools.combinations(range(steps + count - 1), count - 1)
    ]


@given(any_lines(2, 4))
@settings(deadline=None, max_examples=60)
def test_no_shares_on_a_grid_beat_the_optimum_and_some_come_close(lines: Lines) -> None:
    best = sizing.optimal(lines)
    assert sum(best.shares) == pytest.approx(1.0)
    assert all(-1e-9 <= share <= most + 1e-6 for share, most in zip(best.shares, lines.most, strict=True))
    steps = 24
    allowed = [s for s in simplex(len(lines.up), steps) if all(a <= m for a, m in zip(s, lines.most, strict=True))]
    grid = min(sizing.predict(lines, shares).seconds for shares in allowed)
    assert best.seconds <= grid * (1 + 1e-6) + 1e-9
    # Rounding the optimum to the grid moves no share by more than one step, which costs that much on the slowest line.
    slowest = min(*lines.up, *lines.down, *lines.into, *lines.out)
    assert grid <= best.seconds + 2 * len(lines.up) / steps / slowest + 1e-9


@given(any_lines(1, 12))
@settings(deadline=None, max_examples=60)
def test_the_optimum_is_that_of_the_linear_programme(lines: Lines) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    count = len(lines.up)
    rows: list[list[float]] = []
    limits: list[float] = []

    def require(peer: int, factor: float, phase: int, rate: float, limit: float) -> None:
        if rate < INF:
            row = [0.0] * (count + 2)
            row[peer], row[count + phase] = factor, -rate
            rows.append(row)
            limits.append(limit)

    for i in range(count):
        senders, receivers = lines.senders[i], lines.receivers[i]
        if lines.gives[i]:
            require(i, -1.0, 0, lines.up[i], -1.0)
        require(i, -1.0, 1, lines.down[i], -1.0)
        if senders:
            require(i, senders, 0, lines.down[i], 0.0)
            require(i, 1.0, 0, lines.into[i], 0.0)
        if receivers:
            require(i, receivers, 1, lines.up[i], 0.0)
            require(i, 1.0, 1, lines.out[i], 0.0)
    solved = optimize.linprog(
        [0.0] * count + [1.0, 1.0], A_ub=rows or None, b_ub=limits or None, A_eq=[[1.0] * count + [0.0, 0.0]],
        b_eq=[1.0], bounds=[(0.0, most) for most in lines.most] + [(0.0, None)] * 2,
    )  # fmt: skip
    assert sizing.optimal(lines).seconds == pytest.approx(solved.fun, rel=1e-5, abs=1e-6)


def test_equal_lines_own_equally_and_take_the_known_bound() -> None:
    for count in (2, 3, 16, 64):
        best = topology.bound(64 << 20, (12.5e6,) * count)
        assert best.shares == pytest.approx((1.0 / count,) * count)
        assert best.seconds == pytest.approx(2 * (count - 1) / count * (64 << 20) / 12.5e6)


def test_a_line_far_slower_than_the_others_owns_next_to_nothing() -> None:
    best = topology.bound(1, (1.0, *(20.0,) * 7))
    assert best.shares[0] < 0.01


@given(st.integers(2, 7), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=40)
def test_small_rings_are_the_best_of_all_orders(count: int, rng: random.Random) -> None:
    cost = [[rng.uniform(1.0, 100.0) for _ in range(count)] for _ in range(count)]
    orders = [(0, *rest) for rest in itertools.permutations(range(1, count))]
    assert ring.total(ring.shortest(cost), cost) == pytest.approx(min(ring.total(o, cost) for o in orders))
    assert ring.slowest(ring.widest(cost), cost) == max(ring.slowest(o, cost) for o in orders)


def test_the_search_for_large_rings_comes_close_to_the_best_order(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(3)
    for _ in range(10):
        cost = [[rng.uniform(1.0, 100.0) for _ in range(9)] for _ in range(9)]
        exact, wide = ring.shortest(cost), ring.widest(cost)
        monkeypatch.setattr(ring, "EXACT", 0)
        found, found_wide = ring.shortest(cost), ring.widest(cost)
        monkeypatch.undo()
        assert sorted(found) == sorted(found_wide) == list(range(9))
        assert ring.total(exact, cost) <= ring.total(found, cost) * (1 + 1e-9)
        assert ring.total(found, cost) <= 1.3 * ring.total(exact, cost)
        assert 0.6 * ring.slowest(wide, cost) <= ring.slowest(found_wide, cost) <= ring.slowest(wide, cost)


def test_a_ring_of_equal_paths_takes_its_bytes_and_its_latencies() -> None:
    count = 8
    rate = [[2.0] * count for _ in range(count)]
    late = [[0.1] * count for _ in range(count)]
    expected = 2 * (count - 1) * (1 / count / 2.0 + 0.1)
    assert ring.seconds(tuple(range(count)), rate, late) == pytest.approx(expected)


def plan(reports: dict[PeerId, Rates], peers: tuple[PeerId, ...] = PEERS, **more: object) -> topology.Topology:
    return topology.plan(peers, peers, LENGTH, reports, **more)  # type: ignore[arg-type]


def test_without_measurements_all_own_equally_and_the_reason_says_so() -> None:
    found = plan({})
    assert found.seconds is None
    assert "too few uplinks are measured" in found.reason
    sizes = [piece.stop - piece.start for piece in found.slices]
    assert max(sizes) - min(sizes) <= 32


def test_unequal_lines_are_sized_and_the_reason_names_what_it_saves() -> None:
    reports = {peer: Rates(up=1_000_000 * (1 + 3 * (n % 2))) for n, peer in enumerate(PEERS)}
    found = plan(reports)
    assert "slices sized for" in found.reason and "17 of 17 uplinks measured, 1 to 4 MB/s" in found.reason
    assert dict(found.compared)["sized"] < 0.8 * dict(found.compared)["equal"]
    assert found.seconds is not None


def test_a_slow_path_alone_is_given_to_a_ring_only_where_a_ring_can_be_executed() -> None:
    peers = PEERS[:6]
    slow = {(a, b) for n, a in enumerate(peers) for b in peers if (peers.index(b) - n) % 6 in (4, 5)}
    reports = {
        peer: Rates(up=10_000_000, paths=tuple(Path(b, 20_000) for a, b in sorted(slow) if a == peer)) for peer in peers
    }
    # Three of five senders are fast: no receiver is slow for most.
    assert plan(reports, peers).schedule == "butterfly"
    found = plan(reports, peers, schedules=("butterfly", "ring"))
    assert found.schedule == "ring" and sorted(found.order) == sorted(peers)
    assert not any(edge in slow for edge in zip(found.order, (*found.order[1:], found.order[0]), strict=True))


def test_a_receiver_that_is_slow_for_most_is_taken_for_a_slow_downlink() -> None:
    peers = PEERS[:8]
    reports = {p: Rates(up=8_000_000, paths=(Path(peers[0], 50_000),) if p != peers[0] else ()) for p in peers}
    mesh = topology.Mesh.of(peers, reports)
    assert mesh is not None
    assert mesh.down[0] == pytest.approx(7 * 8_000_000 / 16 / 8) or mesh.down[0] == pytest.approx(7 * 62_500)
    assert mesh.paths == {}


@pytest.mark.parametrize("down", [1_000_000, 10_000_000])
def test_slow_senders_are_no_slow_downlink_where_much_more_has_come_over_it(down: int) -> None:
    peers = PEERS[:8]
    slow = (Path(peers[0], 200_000),)
    reports = {p: Rates(up=8_000_000, paths=slow if p in peers[1:6] else ()) for p in peers}
    mesh = topology.Mesh.of(peers, {**reports, peers[0]: Rates(up=8_000_000, down=down)})
    assert mesh is not None
    assert (mesh.down[0], len(mesh.paths)) == ((1e6, 0) if down == 1_000_000 else (math.inf, 5))


def test_no_ring_goes_over_what_is_said_to_be_slow_whatever_explains_it() -> None:
    """Five of seven say that they are slow to one peer, which is taken for its downlink; the other two are not."""
    peers = PEERS[:8]
    slow = Path(peers[0], 400_000)
    reports = {p: Rates(up=8_000_000, paths=(slow,) if p in peers[1:6] else ()) for p in peers}
    mesh = topology.Mesh.of(peers, reports)
    assert mesh is not None and mesh.down[0] == 2e6 and mesh.paths == {}
    order, _, _ = topology.best_ring(mesh.matrix(1 << 20), 0.02)
    me = mesh.peers.index(peers[0])
    assert mesh.peers[order[order.index(me) - 1]] in peers[6:]


claims = st.builds(
    Rates,
    up=st.integers(0, 10**12),
    down=st.integers(0, 10**12),
    rtt=st.integers(0, 600 * 10**6),
    paths=st.lists(st.builds(Path, st.sampled_from(PEERS), st.integers(1, 10**12)), max_size=MAX_PATHS).map(tuple),
)


@given(st.dictionaries(st.sampled_from(PEERS), claims), st.integers(1, 1 << 22), st.integers(1, len(PEERS)))
@settings(deadline=None, max_examples=100)
def test_whatever_is_claimed_the_slices_cover_and_nobody_owns_more_than_it_may(
    reports: dict[PeerId, Rates], length: int, count: int
) -> None:
    peers = PEERS[:count]
    found = topology.plan(peers, peers, length, reports)
    assert covers(found.slices, length)
    assert found == topology.plan(peers, peers, length, dict(reversed(reports.items())))
    most = min(1.0, topology.MOST / count)
    assert all(share <= most + 1e-6 for _, share in found.shares)
    assert sum(share for _, share in found.shares) == pytest.approx(1.0)
    assert found.seconds is None or 0.0 <= found.seconds < INF
    assert len(found.reason) < 300


@given(claims, st.integers(0, 15))
@settings(deadline=None, max_examples=60)
def test_one_liar_makes_no_round_longer_than_its_own_line_could(claim: Rates, liar: int) -> None:
    """What it says of itself moves only its own share within limits; what it says of paths hardly moves the others'."""
    peers = PEERS[:16]
    honest = {peer: Rates(up=1_000_000) for peer in peers}
    found = topology.plan(peers, peers, LENGTH, {**honest, peers[liar]: claim})
    shares = dict(found.shares)
    assert shares[peers[liar]] <= topology.MOST / 16 + 1e-6
    others = [share for peer, share in shares.items() if peer != peers[liar]]
    assert max(others) <= 2.0 / 16


def test_members_far_too_slow_are_left_out_as_long_as_enough_remain() -> None:
    reports = {peer: Rates(up=10_000_000) for peer in PEERS}
    reports[PEERS[3]] = Rates(up=100_000)
    late, why = topology.laggards(PEERS, reports, 9)
    assert late == (PEERS[3],)
    assert PEERS[3].short in why and "0.1 MB/s" in why
    assert topology.laggards(PEERS, reports, len(PEERS)) == ((), "")


@pytest.mark.parametrize(
    "make",
    [
        lambda: Rates(up=-1),
        lambda: Rates(down=10**13),
        lambda: Rates(rtt=10**9),
        lambda: Path(PEERS[0], 0),
        lambda: Rates(paths=(Path(PEERS[0], 1),) * (MAX_PATHS + 1)),
    ],
)
def test_absurd_reports_are_refused(make: object) -> None:
    with pytest.raises(ValueError, match=r"path|rates"):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("count", [10, 12, 16])
def test_the_search_for_a_ring_ends_however_large_the_costs_are(count: int) -> None:
    """All paths of a peer cost the same, so that turning a stretch saves nothing but rounding."""
    for seed in range(25):
        chance = random.Random(seed)
        peers, size = PEERS[:count], 1 << 30
        reports = {peer: Rates(up=int(1e6 * chance.uniform(0.3, 3.0)), rtt=80_000) for peer in peers}
        first = reports[peers[0]].up
        reports[peers[0]] = Rates(up=first, rtt=80_000, paths=(Path(peers[1], first // 10),))
        found = topology.plan(peers, peers, size // 4, reports, schedules=("butterfly", "ring"))
        assert any(name.startswith("ring") for name, _ in found.compared)
