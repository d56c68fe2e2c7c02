"""SPSA with shared seeds: the byte, the directions, the arithmetic, and swarms in virtual time that replay a ledger."""

from __future__ import annotations

import hashlib
import math
import struct
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import attrs
import pytest
import torch
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from shoal.learning import defaults, replay
from shoal.learning.directions import Direction, Move, Moved, descend, moved, moved_rows, seed_of, trainable_of
from shoal.learning.events import Event
from shoal.learning.onebyte import decode, encode
from shoal.learning.placing import rule_of
from shoal.learning.replay import AskLedger, Ledger, LedgerPage, Replayer, worth_it
from shoal.learning.rounds.messages import CommitRecord
from shoal.learning.rounds.payloads import said
from shoal.learning.run import Run
from shoal.learning.rundocs_content import read_ledger
from shoal.learning.state import Layout
from shoal.learning.strategies import BUILTIN, LEDGERS, resolve
from shoal.learning.strategies.spsa import SPSA, Master
from shoal.node.node import Founding
from shoal.sim.world import Member, Scenario, World, simulate
from shoal.transport.errors import ConfigError, RemoteError
from shoal.transport.identity import PeerId
from shoal.transport.rpc import Call

from ..sim.tiny import Pull

RUN, PEERS = b"r" * 32, tuple(bytes([65 + i]) * 32 for i in range(4))

# -- the byte -------------------------------------------------------------------------------------------


def test_a_byte_means_the_same_on_every_machine() -> None:
    table = struct.pack("<256f", *map(decode, range(256)))
    assert hashlib.sha256(table).hexdigest()[:16] == "fbddf257303d090b"
    assert (decode(0), decode(73), decode(73 | 128), decode(128)) == (0.0, 1.0, -1.0, 0.0)
    assert decode(1) == pytest.approx(1.2341e-4, rel=1e-4) and decode(127) == pytest.approx(854.06, rel=1e-4)


@given(st.floats(1.2e-4, 854, allow_nan=False), st.booleans())
def test_a_byte_is_within_six_and_a_half_per_cent_of_what_was_meant(size: float, negative: bool) -> None:
    gradient = -size if negative else size
    assert abs(decode(encode(gradient)) / gradient - 1) <= math.exp(1 / 16) - 1 + 1e-6


def test_what_a_byte_cannot_say_is_zero_or_the_largest() -> None:
    assert [encode(g) for g in (0.0, -0.0, 1e-5, -1e-5, math.nan)] == [0, 0, 0, 0, 0]
    assert [decode(encode(g)) for g in (1e9, -1e9, math.inf, -math.inf)] == [decode(127), decode(255)] * 2
    assert all(encode(decode(byte)) == byte for byte in range(256) if byte % 128)


# -- directions -----------------------------------------------------------------------------------------


def drawn(direction: Direction, size: int, name: str = "w") -> Tensor:
    vector = torch.zeros(size)
    descend([(name, vector)], [Move(direction, -1.0)])
    return vector


def test_directions_have_the_known_answers() -> None:
    torch.manual_seed(20240101)
    assert hashlib.sha256(torch.randn(1000).numpy().tobytes()).hexdigest()[:16] == "d529961fd645f834"
    seed = seed_of(RUN, 1, b"p" * 32, 0)
    signs = drawn(Direction(seed), 100_003)
    assert hashlib.sha256(signs.numpy().tobytes()).hexdigest()[:16] == "0e2608abd8d8c4bf"
    assert set(signs.tolist()) == {-1.0, 1.0} and abs(float(signs.mean())) < 0.01
    normal = drawn(Direction(seed, "normal"), 100_003)
    assert abs(float(normal.mean())) < 0.02 and abs(float(normal.std()) - 1) < 0.02


@pytest.mark.parametrize("kind", ["signs", "normal"])
def test_tensors_samples_peers_rounds_and_runs_have_streams_of_their_own(kind: Any) -> None:
    seeds = [seed_of(RUN, 1, PEERS[0], 0), seed_of(RUN, 1, PEERS[0], 1), seed_of(RUN, 1, PEERS[1], 0)]
    seeds += [seed_of(RUN, 2, PEERS[0], 0), seed_of(b"q" * 32, 1, PEERS[0], 0)]
    found = [drawn(Direction(seed, kind), 640).numpy().tobytes() for seed in seeds]
    found.append(drawn(Direction(seeds[0], kind), 640, "v").numpy().tobytes())
    assert len({*found}) == 6


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 70_000), st.integers(0, 3), st.sampled_from(["signs", "normal"]))
def test_a_look_and_a_step_use_the_same_direction(size: int, sample: int, kind: Any) -> None:
    direction, theta = Direction(seed_of(RUN, 1, PEERS[0], sample), kind), torch.linspace(-1, 1, size)
    stepped = theta.clone()
    descend([("w", stepped)], [Move(direction, -0.25)])
    assert torch.equal(moved("w", theta, direction, 0.25), stepped)


@pytest.mark.parametrize("kind", ["signs", "normal"])
@pytest.mark.parametrize("shape", [(2000, 300), (700, 1001), (65, 20_000)])
def test_a_large_layer_is_moved_row_by_row_as_it_is_moved_whole(shape: tuple[int, int], kind: Any) -> None:
    assert shape[0] * shape[1] > defaults.LOOK_BLOCK
    direction, layer = Direction(seed_of(RUN, 1, PEERS[0], 0), kind), nn.Linear(shape[1], shape[0])
    whole = moved("weight", layer.weight, direction, 0.25)
    rows = list(moved_rows("weight", layer.weight, direction, 0.25))
    assert len(rows) > 1 and torch.equal(torch.cat(rows), whole)
    x, parameters = torch.randn(3, 2, shape[1]), trainable_of(layer)
    with torch.inference_mode(), Moved(parameters, direction, 0.25):
        seen = layer(x)
    bias = moved("bias", layer.bias, direction, 0.25)
    torch.testing.assert_close(seen, nn.functional.linear(x, whole, bias), rtol=1e-5, atol=1e-4)


class Odd(nn.Module):
    """Tied, transposed, frozen, sliced and looked at: whatever a model does with its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.attend = nn.MultiheadAttention(6, 2, batch_first=True)
        self.frozen = nn.Linear(6, 6)
        self.frozen.requires_grad_(False)
        self.gain = nn.Parameter(torch.randn(2, 6))
        self.drop = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        h = h + self.attend(h, h, h, need_weights=False)[0] + self.frozen(h)
        h = self.drop(h * self.gain[0] + self.gain.T[:, 1].view(1, 1, self.gain.size(1)))
        return self.norm(h.transpose(1, 2)).transpose(1, 2) @ self.embed.weight.t()


@pytest.mark.parametrize("kind", ["signs", "normal"])
def test_a_look_sees_every_parameter_moved_and_leaves_the_model_as_it_is(kind: Any) -> None:
    torch.manual_seed(3)
    model, x = Odd().eval(), torch.randint(0, 11, (4, 5))
    direction, parameters = Direction(seed_of(RUN, 1, PEERS[0], 0), kind), trainable_of(model)
    assert "frozen.weight" not in parameters and len(parameters) == 8
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.inference_mode(), Moved(parameters, direction, 0.1):
        seen = model(x)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with torch.inference_mode():
        plain = model(x)
    descend([(name, p.detach()) for name, p in parameters.items()], [Move(direction, -0.1)])
    with torch.inference_mode():
        stepped = model(x)
    torch.testing.assert_close(seen, stepped, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(plain, seen, atol=1e-2)


def ratio_of(gradient: Tensor, kind: Any, count: int, trials: int = 4000) -> float:
    """E|g|² / |∇|² of the mean of ``count`` estimates, each along a direction of its own."""
    size, found = len(gradient), torch.zeros(trials, len(gradient))
    for sample in range(count):
        z = drawn(Direction(seed_of(RUN, count, PEERS[0], sample), kind), trials * size).view(trials, size)
        found += z * (z @ gradient)[:, None] / count
    return float((found.square().sum(1) / gradient.square().sum()).mean())


@pytest.mark.parametrize(("kind", "extra"), [("signs", 0), ("normal", 2)])
def test_the_estimate_has_the_variance_of_theory_and_own_directions_lower_it(kind: Any, extra: int) -> None:
    size, n = 24, 4
    gradient = torch.randn(size, generator=torch.Generator().manual_seed(5))
    # (d + extra) of one direction, and of the same one for all; (d + extra - 1 + n) / n of n of them.
    assert ratio_of(gradient, kind, 1) == pytest.approx(size + extra, rel=0.1)
    assert ratio_of(gradient, kind, n) == pytest.approx((size + extra - 1 + n) / n, rel=0.1)


# -- the strategy ---------------------------------------------------------------------------------------


def test_ledgers_are_the_strategies_that_say_so() -> None:
    assert {name for name in BUILTIN if resolve(name, {}).ledger} == LEDGERS


def test_the_two_sided_difference_is_exact_on_a_quadratic_for_any_eps() -> None:
    generator = torch.Generator().manual_seed(2)
    h, theta = torch.randn(8, 8, dtype=torch.float64, generator=generator), torch.randn(8, dtype=torch.float64)
    loss = lambda at: float(0.5 * at @ (h @ h.T) @ at)  # noqa: E731
    z = drawn(Direction(seed_of(RUN, 1, PEERS[0], 0)), 8).double()
    slope = float((h @ h.T @ theta) @ z)
    for eps in (1e-3, 1.0, 10.0):
        assert (loss(theta + eps * z) - loss(theta - eps * z)) / (2 * eps) == pytest.approx(slope, rel=1e-9)


def test_moves_are_those_of_the_paper_in_canonical_order() -> None:
    rule = SPSA(grads=2, lr=0.5, root=1)
    told = {PEERS[2]: bytes([73, 0]), PEERS[0]: bytes([73 | 128, 81])}
    moves = rule.moves(RUN, 7, PEERS, told)
    # What says nothing moves nothing, and counts.
    assert [m.direction.seed for m in moves] == [
        seed_of(RUN, 7, PEERS[0], 0), seed_of(RUN, 7, PEERS[0], 1), seed_of(RUN, 7, PEERS[2], 0),
    ]  # fmt: skip
    assert [m.step for m in moves] == pytest.approx([-0.25, 0.25 * math.e, 0.25])
    assert next(m.step for m in attrs.evolve(rule, root=0).moves(RUN, 7, PEERS, told)) == pytest.approx(-0.125)
    # Not as many bytes as there are gradients: nothing of that peer counts.
    assert rule.moves(RUN, 7, PEERS, {PEERS[0]: b"\x49"}) == [] == rule.moves(RUN, 7, PEERS, {})


def test_two_peers_that_look_at_one_side_each_find_what_one_that_looks_at_both_finds() -> None:
    alone, pair = SPSA(grads=3), SPSA(grads=3, pairs=1)
    losses = [(1.5, 1.25), (0.5, 0.75), (2.0, 2.0)]
    told = {PEERS[0]: pair.payload([(p,) for p, _ in losses]), PEERS[1]: pair.payload([(m,) for _, m in losses])}
    assert len(told[PEERS[0]]) == 12 and len(alone.payload(losses)) == 3
    assert pair.teams(PEERS[:3]) == [PEERS[:2], PEERS[2:3]]
    assert pair.gradients(PEERS[:2], told) == pytest.approx([125.0, -125.0, 0.0])
    assert alone.gradients(PEERS[:1], {PEERS[0]: alone.payload(losses)}) == pytest.approx([125, -125, 0], rel=0.065)
    assert pair.gradients(PEERS[:2], {PEERS[0]: told[PEERS[0]]}) is None
    # Nobody moves a model further than a byte could.
    wild = {PEERS[0]: struct.pack("<3f", 1e30, math.inf, math.nan), PEERS[1]: struct.pack("<3f", 0, 0, 0)}
    assert pair.gradients(PEERS[:2], wild) == [decode(127), 0.0, 0.0]


def test_shared_directions_average_the_gradients_of_all_data() -> None:
    rule = SPSA(grads=1, lr=1.0, shared=1)
    (move,) = rule.moves(RUN, 1, PEERS[:2], {PEERS[0]: bytes([73]), PEERS[1]: bytes([0])})
    assert move.step == 0.5 and move.direction.seed == seed_of(RUN, 1, b"", 0)
    both = SPSA(grads=1, lr=1.0, shared=1, pairs=1, eps=0.5)
    told = {peer: struct.pack("<f", loss) for peer, loss in zip(PEERS, (3.0, 2.0, 2.0, 2.0), strict=True)}
    (move,) = both.moves(RUN, 1, PEERS, told)
    assert move.step == 0.5


def test_numbers_that_cannot_be_are_refused() -> None:
    for args in ({"grads": 1025.0}, {"grads": 257.0, "pairs": 1.0}, {"pairs": 2.0}, {"lr": 0.0}, {"eps": -1.0}):
        with pytest.raises(ConfigError):
            resolve("spsa", args)


def test_a_run_of_one_byte_gradients_has_no_other_rule_than_the_mean() -> None:
    with pytest.raises(ConfigError, match="combines nothing"):
        rule_of(attrs.make_class("Spec", ["aggregator", "strategy", "min_peers"])("median", "spsa", 7), SPSA())


def test_bfloat16_keeps_a_master_and_does_not_drift() -> None:
    model = nn.Linear(64, 64).bfloat16()
    layout, start = Layout.of(model), torch.randn(64 * 64 + 64).bfloat16().float()
    master, exact = Master(layout), start.clone()
    directions = [Direction(seed_of(RUN, r, PEERS[0], 0)) for r in range(200)]
    at = start
    for direction in directions:
        # Each step is a thousandth of what bfloat16 resolves.
        at = master.descend(at, layout.names, [Move(direction, 1e-5)])
        descend(layout.parts(exact, layout.names), [Move(direction, 1e-5)])
    assert torch.equal(master.vectors()["weights"], exact)
    assert torch.equal(at, exact.bfloat16().float()) and not torch.equal(at, start)
    again = Master(layout)
    again.restore(master.vectors())
    assert torch.equal(again.descend(at, layout.names, []), at)
    assert not Master(Layout.of(nn.Linear(2, 2))).needed


def test_a_replay_that_is_longer_than_a_download_is_not_worth_it() -> None:
    assert worth_it(10, 320, 10_000, 40_000)[0]
    assert not worth_it(5000, 320, 10_000, 40_000)[0]
    assert not worth_it(100, 100_000, 50_000_000, 200_000_000)[0]


# -- swarms in virtual time -----------------------------------------------------------------------------

ROUNDS, GRADS = 10, 4


class Near(Pull):
    """The mean of quadratics."""

    step_seconds: ClassVar[float] = 0.3


class Half(Near):
    """In bfloat16."""

    def model(self) -> nn.Module:
        return super().model().bfloat16()


def swarm(
    nodes: int = 4, rounds: int = ROUNDS, *, task: type = Near, late: tuple[int, ...] = (), **args: float
) -> Scenario:
    rule = {"grads": float(GRADS), "lr": 0.01, "eps": 0.01, **args}
    founding = Founding(strategy="spsa", strategy_args=tuple(rule.items()), min_peers=nodes - len(late), rounds=rounds)
    return Scenario(nodes, founding, make_task=task, late=late)


def same_bits(world: World, rounds: int = ROUNDS) -> Tensor:
    live = world.live()
    assert [member.run.round for member in live] == [rounds] * len(live)
    assert len({member.run.digest() for member in live}) == 1
    assert len({member.run.weights().numpy().tobytes() for member in live}) == 1
    return live[0].run.weights()


def details(member: Member, what: str) -> list[str]:
    return [event.detail for event in member.events if event.what == what]


@pytest.mark.parametrize("args", [{}, {"pairs": 1.0}, {"pairs": 1.0, "shared": 1.0}, {"normal": 1.0}])
def test_replicas_that_exchange_bytes_alone_stay_bit_identical(args: dict[str, float]) -> None:
    world = simulate(swarm(rounds=4, **args))
    weights = same_bits(world, 4)
    run = world.members[0].run
    size = 4 * GRADS if "pairs" in args else GRADS
    assert [report.payload for report in run.reports] == [4 * size] * 4
    # And they are what the ledger says, replayed by hand from the beginning.
    ledger, at, records = run.ledger, run.membership.head.record, []
    while at.kind == "gather":
        records.append(at)
        at = ledger.back(at.prev, b"", 1)[0]
    vectors = {"weights": fresh(world)}
    for record in records[::-1]:
        voters = tuple(peer.key for peer in record.roster)
        run.strategy.replay(run.run_id, run.layout, ("at",), vectors, record.round, voters, said(record))
    assert torch.equal(vectors["weights"], weights)


def fresh(world: World) -> Tensor:
    """What the run began with."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(world.members[0].run.spec.seed % (1 << 63))
        model = world.scenario.make_task().model()  # type: ignore[misc]
    return torch.cat([p.detach().float().reshape(-1) for p in model.parameters()])


async def reach(world: World, round: int) -> None:
    await world.until(lambda: all(m.node.run_here and m.run.round >= round for m in world.live()), f"round {round}")


@pytest.mark.parametrize("task", [Near, Half])
def test_whoever_never_was_in_the_run_replays_all_of_it_and_loads_nothing(task: type) -> None:
    async def script(world: World) -> None:
        await reach(world, 4)
        world.start(3)

    world = simulate(swarm(task=task, late=(3,)), script)
    same_bits(world)
    joiner = world.members[3]
    (found,) = details(joiner, "replayed")
    assert found.startswith("rounds 1 to ") and not details(joiner, "loaded")
    assert sum(joiner.peer in report.members for report in world.members[0].run.reports) >= 3


@pytest.mark.parametrize("step", [0.3, 0.02])
def test_whoever_cannot_replay_loads_the_state_that_is_the_model_of_another_one(
    step: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "worth_it", lambda *numbers: (False, "it is a test"))
    monkeypatch.setattr(Near, "step_seconds", step)

    async def script(world: World) -> None:
        await reach(world, 4)
        assert all(member.run.snapshots[-1].live for member in world.live())
        world.start(3)

    world = simulate(swarm(rounds=40, late=(3,)), script)
    same_bits(world, 40)
    joiner = world.members[3]
    assert details(joiner, "loaded") and not details(joiner, "replayed") and not details(joiner, "liar")
    assert sum(joiner.peer in report.members for report in world.members[0].run.reports) >= 3


def test_whoever_was_away_replays_the_rounds_it_missed() -> None:
    async def script(world: World) -> None:
        # States are saved every five seconds.
        await reach(world, 8)
        world.kill(2)
        await reach(world, 10)
        world.restart(2)

    world = simulate(swarm(rounds=15), script)
    same_bits(world, 15)
    (found,) = details(world.members[2], "replayed")
    assert not details(world.members[2], "loaded") and not found.startswith("rounds 1 to")


def test_the_ledger_is_a_document_that_every_member_holds() -> None:
    async def script(world: World) -> None:
        await reach(world, ROUNDS)
        await trio.sleep(20.0)

    world = simulate(swarm(3), script)
    record, ledger = world.members[0].run.membership.head.record, Ledger()
    for member in world.live():
        assert member.node.documents is not None
        found = read_ledger(member.node.documents.document("commits").read())
        ledger.note(found)
        assert set(found) == set(ledger.noted) and len(found) == ROUNDS
        # What it says leads back to the beginning, by the digests of the records themselves.
        chain = ledger.back(record.digest, b"", 100)
        assert [each.round for each in chain] == list(range(ROUNDS, 0, -1))
        assert member.run.ledger.noted


PEER = PeerId(PEERS[0])


def chained(count: int) -> list[CommitRecord]:
    """Records, each of which names the one before."""
    record = CommitRecord(
        run=RUN, round=0, kind="gather", prev=RUN, members=(), samples=(), weights=(), roster=(), total=0, branch=0,
        state=b"", nonces=(), algorithm="", fingerprint=b"", reason="",
    )  # fmt: skip
    chain = [record]
    while len(chain) < count:
        chain.append(attrs.evolve(record, round=len(chain), prev=chain[-1].digest))
    return chain


def test_a_ledger_in_memory_is_bounded() -> None:
    ledger, chain = Ledger(3), chained(6)
    for each in (*chain, chain[-1]):
        ledger.add(each)
    assert [each.round for each in ledger.back(chain[-1].digest, b"", 9)] == [5, 4, 3]
    assert [each.round for each in ledger.back(chain[-1].digest, chain[3].digest, 9)] == [5, 4]
    assert ledger._size == 3000


def test_a_ledger_that_leads_elsewhere_is_not_believed() -> None:
    """The newcomer's beginning is not that of the run: what follows from it is not the state, which it loads then."""

    async def script(world: World) -> None:
        await reach(world, 4)
        joiner = world.start(3)
        await world.until(lambda: joiner.node.run_here is not None, "a run")
        weights = await joiner.run.trainer.weights()
        weights[5] += 1.0
        await joiner.run.trainer.load(weights)

    world = simulate(swarm(late=(3,)), script)
    same_bits(world)
    assert len(details(world.members[3], "loaded")) == 1
    (why,) = details(world.members[3], "not-replayed")
    assert "not the state of the others" in why


def test_a_holder_that_gives_a_record_at_a_time_just_in_time_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def slowly(self: Replayer, call: Call[AskLedger]) -> LedgerPage:
        await trio.sleep(0.9 * defaults.ASK_HEADS)
        return LedgerPage(self._run.ledger.back(call.request.at, call.request.base, 1))

    monkeypatch.setattr(Replayer, "_on_ask", slowly)
    monkeypatch.setattr(Ledger, "note", lambda ledger, records: None)  # the document has them all, and at once
    took: list[float] = []

    async def script(world: World) -> None:
        await reach(world, 15)
        began, joiner = trio.current_time(), world.start(2)
        await world.until(lambda: bool(details(joiner, "not-replayed")), "giving up")
        took.append(trio.current_time() - began)

    world = simulate(swarm(3, 120, late=(2,)), script)
    same_bits(world, 120)
    assert took[0] < 3 * defaults.LEDGER_WAIT
    assert "records within 10 s" in details(world.members[2], "not-replayed")[0]
    assert details(world.members[2], "loaded")


async def test_more_records_than_memory_may_hold_are_not_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = chained(40)
    holder, asked = Ledger(), []
    for record in chain:
        holder.add(record)

    async def call(peer: PeerId, method: object, ask: AskLedger, timeout: float) -> LedgerPage:
        asked.append(ask)
        return LedgerPage(holder.back(ask.at, ask.base, 4))

    endpoint = SimpleNamespace(serve=lambda method, handler: None, call=call)
    replayer = Replayer(cast(Run, SimpleNamespace(endpoint=endpoint, ledger=Ledger(), run_id=chain[0].run)))
    found = [chain[-1]]
    await replayer._fetch(found, chain[0], PEER)
    assert found[::-1] == chain[1:]
    asked.clear()
    monkeypatch.setattr(defaults, "LEDGER_MEMORY", 10_000)
    with pytest.raises(RemoteError, match="are too many to replay"):
        await replayer._fetch([chain[-1]], chain[0], PEER)
    assert len(asked) <= 4


@settings(max_examples=5, deadline=None)
@given(
    st.integers(0, 3), st.integers(1, 4), st.sampled_from(["train", "convene", "commit"]), st.booleans(),
    st.integers(1, 3),
)  # fmt: skip
def test_kill_and_join_at_any_step_keep_replicas_bit_identical(
    victim: int, round: int, phase: str, back: bool, join: int
) -> None:
    """One dies at a step of a round, comes back or not, and another one joins meanwhile."""

    def strike(member: Member, event: Event, world: World) -> None:
        place = (member.number, event.round, event.phase, event.what)
        if place == (victim, round, phase, "begin") and victim not in struck:
            struck[victim] = None
            world.kill(victim)

    struck: dict[int, None] = {}

    async def script(world: World) -> None:
        world.hooks.append(partial(strike, world=world))
        await reach(world, join)
        world.start(4)
        await world.until(lambda: victim in struck, "the blow")
        if back:
            await reach(world, round + 1)
            world.restart(victim)

    world = simulate(swarm(5, 9, late=(4,)), script)
    assert len(world.live()) == 4 + back
    same_bits(world, 9)
    for member in world.live():
        assert not details(member, "not-replayed") and not details(member, "loaded")
