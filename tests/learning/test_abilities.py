"""What the planner of stages is told: medians of what peers say, within bounds, and lines where they are measured."""

from __future__ import annotations

import math

import attrs
import pytest

from shoal.learning.pipeline import abilities, defaults
from shoal.learning.pipeline.messages import Beat, Shape
from shoal.learning.pipeline.planner import assign
from shoal.learning.state import Layout
from shoal.learning.task import ParameterSpec
from shoal.transport.identity import Identity, PeerId

PEERS = sorted(Identity(bytes([n]) * 32).peer_id for n in range(8))


@attrs.define
class Crew:
    """Beats, without a network."""

    stages: int
    beats: dict[PeerId, Beat]

    def peers(self) -> list[PeerId]:
        return list(self.beats)

    def holders(self, stage: int) -> list[PeerId]:
        return [peer for peer, beat in self.beats.items() if beat.stage == stage and beat.state == "ready"]

    def beat(self, peer: PeerId) -> Beat:
        return self.beats[peer]


def beat(stage: int, rate: float = 0.0, *, into: int = 0, out: int = 0, line: int = 0) -> Beat:
    return Beat(bytes(32), "ready", stage, bytes(32), 0, 0, 0, round(1000 * rate), 0, into=into, out=out, line=line)


def crew(stages: int, *beats: Beat) -> Crew:
    return Crew(stages, dict(zip(PEERS, beats, strict=False)))


def layouts(*sizes: int) -> list[Layout]:
    return [Layout.of_signature((ParameterSpec("weight", (size,), "float32"),)) for size in sizes]


def test_a_sample_makes_a_stage_send_its_activations_on_and_the_gradient_of_its_input_back() -> None:
    known = abilities.usual(
        crew(
            3,
            beat(0, 10, out=100),
            beat(1, 10, into=100, out=40),
            beat(1, 20, into=100, out=40),
            beat(2, 30, into=40),
            beat(2, 20),
        )
    )
    assert known.rates == (10, 10, 20)
    assert known.traffic == (100, 140, 40)


def test_before_all_stages_are_measured_nothing_is_said_of_lines() -> None:
    known = abilities.usual(crew(2, beat(0, 10, out=100, line=50), beat(1)))
    assert known.rates == ()
    assert [cost.bytes for cost in abilities.costs(layouts(3, 5), known)] == [0, 0]
    assert [cost.flops for cost in abilities.costs(layouts(3, 5), known)] == [3, 5]


def test_a_line_that_nobody_measured_limits_nothing() -> None:
    there = crew(2, beat(0, 10, out=100), beat(1, 10), beat(1, 10, line=500))
    known = abilities.usual(there)
    assert [abilities.able(there, peer, known).bandwidth for peer in there.peers()] == [math.inf, math.inf, 500]


@pytest.mark.parametrize("claim", [1, 1 << 60])
def test_what_one_peer_claims_of_its_line_is_believed_within_bounds(claim: int) -> None:
    there = crew(2, beat(0, 10, line=claim), *(beat(n, 10, line=1000) for n in (0, 1, 1)))
    known = abilities.usual(there)
    assert known.line == 1000
    first = abilities.able(there, PEERS[0], known)
    assert 1000 / defaults.MAX_RATIO <= first.bandwidth <= 1000 * defaults.MAX_RATIO


def test_who_holds_a_stage_alone_cannot_make_it_look_like_a_wall() -> None:
    honest = [beat(0, 10, out=100), beat(1, 10, into=100, out=100), beat(2, 10, into=100)]
    for stage in range(3):
        liar = attrs.evolve(honest[stage], into=(1 << 60) * (stage > 0), out=(1 << 60) * (stage < 2))
        said = [liar if at == stage else each for at, each in enumerate(honest)]
        assert abilities.usual(crew(3, *said)).traffic == (100, 200, 100)


def test_who_has_a_thin_line_goes_where_little_is_sent() -> None:
    """Peers alike but for their lines, much travels between the first two stages: the last one is for thin lines."""
    thin, wide = 4_000, 40_000
    there = crew(
        3,
        beat(0, 100, out=400, line=thin),
        beat(0, 100, out=400, line=thin),
        beat(1, 100, into=400, out=20, line=wide),
        beat(2, 100, into=20, line=wide),
        beat(2, 100, into=20, line=wide),
    )
    known = abilities.usual(there)
    assert known.traffic == (400, 420, 20)
    held = {bytes(peer): there.beat(peer).stage for peer in there.peers()}
    peers = [abilities.able(there, peer, known) for peer in there.peers()]
    seats, reason = assign(peers, abilities.costs(layouts(10, 10, 10), known), held=held)
    by_line = {
        line: sorted(seats[bytes(p)] for p in there.peers() if there.beat(p).line == line) for line in (thin, wide)
    }
    # Two thin lines carry 20 samples a second at the first stage; one wide line there carries 95 and more.
    assert 2 in by_line[thin]
    assert 0 in by_line[wide], reason
    without = [attrs.evolve(peer, bandwidth=math.inf) for peer in peers]
    stay, _ = assign(without, abilities.costs(layouts(10, 10, 10), known), held=held)
    assert stay == held


def test_a_speed_is_said_anew_when_it_has_changed_by_a_quarter() -> None:
    assert [abilities.worth_saying(100, now) for now in (0, 80, 100, 125, 126)] == [0, 100, 100, 100, 126]
    assert abilities.worth_saying(0, 1) == 1
    assert abilities.worth_saying(5, 1 << 80) == 1 << 62


@pytest.mark.parametrize(
    ("dims", "samples", "bytes_each"),
    [((8, 16), 8, 64), ((8, 4, 16), 8, 256), ((8, 16), 1, 64), ((), 1, 512), ((0, 16), 1, 512), ((8, 16), 1 << 60, 0)],
)
def test_a_feeder_that_counts_wrong_does_not_make_its_rows_look_wide(
    dims: tuple[int, ...], samples: int, bytes_each: int
) -> None:
    shape = Shape(dims, "float32", "fp32", 2048 if len(dims) == 3 else 512)
    assert abilities.bytes_of_sample(shape, samples) == bytes_each
