"""What a run remembers of its voters: in every record the same, checked by all, carried from round to round."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import attrs
import numpy as np
import pytest
import torch
import trio
from torch import Tensor

from shoal.learning.aggregate import resolve
from shoal.learning.rounds import leader as leader_module
from shoal.learning.rounds import remembering
from shoal.learning.rounds.messages import CommitRecord
from shoal.learning.rounds.remembering import NEW, SCALE, carried, disputed, fault, known, read, written
from shoal.learning.shard import Shard
from shoal.node.node import Founding
from shoal.sim.world import World, simulate
from shoal.transport.identity import Identity, PeerId
from tests.learning.round_table import Table
from tests.learning.test_round_machine import check_done
from tests.sim import tiny

PEERS = tuple(sorted(Identity(bytes([i]) * 32).peer_id for i in range(5)))
RULE = resolve("descent:f=1+mean")
RECORD = CommitRecord(
    b"r" * 32, 1, "reduce", b"p" * 32, PEERS[:3], (1, 1, 1), (1, 1, 1), PEERS[:4], 3, 0, b"", (), "", b"", ""
)


def test_scores_travel_as_whole_numbers_to_a_millionth() -> None:
    scores = np.array([-1.0, -0.25, 0.0, 1e-6, 0.999999, 1.0, 7.0])
    assert written(scores) == (0, 750_000, SCALE, SCALE + 1, 2 * SCALE - 1, 2 * SCALE, 2 * SCALE)
    assert np.abs(read(written(scores)) - np.clip(scores, -1, 1)).max() < 1e-6
    assert written(None) == ()


def test_nothing_is_written_while_nothing_is_known() -> None:
    assert carried(PEERS, {}) == () == carried(PEERS, {PEERS[0]: NEW})
    assert carried(PEERS[:2], {PEERS[1]: 3}) == (NEW, 3)
    assert known(RECORD) == {}
    assert known(attrs.evolve(RECORD, scores=(1, 2, 3, 4))) == dict(zip(PEERS, (1, 2, 3, 4), strict=False))


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        ((5, 6, 7, 40), None),
        ((5, 6, 7), "not of its roster"),
        ((5, 6, 7, 40, 50), "not of its roster"),
        ((5, 6, 2 * SCALE + 1, 40), "not of its roster"),
        ((5, 6, 7, 41), f"something new of {PEERS[3].short}, which did not contribute"),
        ((), f"forgotten what is known of {PEERS[3].short}"),
    ],
)
def test_a_record_that_invents_or_forgets_is_refused(scores: tuple[int, ...], words: str | None) -> None:
    found = fault(attrs.evolve(RECORD, scores=scores), {PEERS[3]: 40}, RULE)
    assert found is None if words is None else found is not None and words in found


def test_a_rule_without_a_memory_has_no_scores() -> None:
    found = fault(attrs.evolve(RECORD, scores=(1, 2, 3, NEW)), {}, resolve("median"))
    assert found == "it remembers what the run's rule, median, does not"
    assert fault(RECORD, {}, resolve("median")) is None


def test_what_was_computed_may_differ_by_a_rounding_and_no_more() -> None:
    record = attrs.evolve(RECORD, scores=(5, 6, 7, NEW))
    assert disputed(record, {}) is None
    assert disputed(record, dict(zip(PEERS, (6, 5, 7), strict=False))) is None
    assert disputed(record, {PEERS[0]: 7}) == f"it remembers 5 of {PEERS[0].short}, not 7"
    assert disputed(record, {PEERS[4]: 7}) is None, "who is in the roster no more"
    assert disputed(RECORD, {PEERS[0]: 7}) == f"it remembers {NEW} of {PEERS[0].short}, not 7"


def vectors(table: Table, record: CommitRecord) -> np.ndarray:
    return np.stack([np.asarray(table.seats[m].vector, dtype=np.float64) for m in record.members])


@pytest.mark.parametrize("seed", range(4))
def test_all_voters_agree_on_what_the_vectors_say(seed: int) -> None:
    table = Table(5, seed=seed, rule=RULE, scores=(NEW, NEW - 1000, NEW + 300_000))
    table.run()
    check_done(table, within=10.0)
    record = table.commits()[0].record
    x = vectors(table, record)
    expected = RULE.decide(x @ x.T, len(x), scores=read(remembering.of(record.members, table.scores))).scores
    assert expected is not None and record.members == table.voters
    assert np.abs(np.array(record.scores) - np.array(written(expected))).max() <= 1
    assert {commit.record.digest for commit in table.commits()} == {record.digest}


def test_who_contributes_nothing_keeps_its_score() -> None:
    table = Table(5, seed=1, rule=RULE, scores=(NEW, NEW, NEW, NEW - 77_777))
    silent = table.seats[table.voters[3]]
    silent.contributes = False
    table.run()
    check_done(table, within=10.0)
    record = table.commits()[0].record
    assert silent.me not in record.members
    assert known(record)[silent.me] == NEW - 77_777


@pytest.mark.parametrize("how", ["better", "forgotten"])
def test_a_leader_that_writes_down_something_else_is_refused_and_another_one_leads(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = Table(5, seed=2, rule=RULE)
    liar = table.seats[table.voters[0]].voter.leader(0)
    at = table.voters.index(liar)
    table = Table(5, seed=2, rule=RULE, scores=[NEW] * at + [NEW - 300_000])
    real = leader_module.Leader._maybe_propose

    def proposes(self: Any, now: float, *, late: bool = False) -> Any:
        if self.me == liar:
            self._learnt = {**self._learnt, liar: 2 * SCALE} if how == "better" else {}
            self._scores = self._scores if how == "better" else {}
        return real(self, now, late=late)

    monkeypatch.setattr(leader_module.Leader, "_maybe_propose", proposes)
    table.run()
    check_done(table, within=60.0)
    (commit, *_) = table.commits()
    assert commit.certificate.attempt >= 1
    assert known(commit.record)[liar] < NEW
    told = [n.detail for seat in table.live() for n in seat.notes if (n.phase, n.what) == ("commit", "refused")]
    assert any("it remembers" in detail for detail in told)


# -- whole nodes ----------------------------------------------------------------------------------------


class Opposed(tiny.Pull):
    """All pull to nearly the same place, but for one seat of the first roster, which pulls away from it."""

    name: ClassVar[str] = "opposed"
    step_seconds: ClassVar[float] = 0.5
    liar: ClassVar[bytes] = b""

    def batches(self, shard: Shard) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(int.from_bytes(shard.peer[:7], "big"))
        own = 10.0 + torch.randn(tiny.SIZE, generator=generator)
        while True:
            yield (-own if shard.peer == self.liar else own)[None]


def test_in_a_swarm_a_liar_is_left_out_and_newcomers_know_of_it() -> None:
    scenario = attrs.evolve(
        tiny.scenario(6, 60),
        founding=Founding(
            strategy_args=tiny.PLAIN, aggregator="descent:f=1+mean", admission=2, min_peers=5, rounds=60, mode="strict"
        ),
        make_task=Opposed,
        late=(5,),
        limit=900.0,
        evaluate_every=0,
    )

    async def script(world: World) -> None:
        Opposed.liar = PeerId.parse(world.members[3].peer).key
        first = [world.members[number] for number in range(5)]
        await world.until(lambda: all(m.node.run_here is not None and m.run.round >= 4 for m in first), "four rounds")
        late = world.start(5)
        await world.until(lambda: late.node.run_here is not None and late.run.round >= 10, "the newcomer's rounds")
        await trio.sleep(5)
        lying = PeerId.parse(world.members[3].peer)
        heads = [m.run.membership.head.record for m in (*first, late)]
        latest = max(record.round for record in heads)
        same = [record for record in heads if record.round == latest]
        assert len(same) >= 2 and len({record.digest for record in same}) == 1
        for record in heads:
            numbers = known(record)
            assert numbers[lying] < NEW, "it works against the others"
            assert all(number > NEW for peer, number in numbers.items() if peer != lying and peer.text != late.peer)
        assert known(same[0])[PeerId.parse(late.peer)] > NEW, "admitted, and judged as all others since"
        # Who came later chooses from the same memory: it takes part in rounds that all agree on.
        assert any(PeerId.parse(late.peer) in m.run.membership.head.record.members for m in first)
        (standing,) = [s for s in first[0].node.standings() if s.peer == lying.text]
        assert standing.quality is not None and standing.quality < 0.5

    simulate(scenario, script)
