"""Reduces of a round as a strategy sees them, on peers in virtual time: lists, futures, overlap, what goes wrong."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, ClassVar

import attrs
import pytest
import torch
import trio
from torch import Tensor, nn

from shoal.learning import exact
from shoal.learning.exchange import Reducing
from shoal.learning.peer import Peer, Round
from shoal.learning.strategies import BUILTIN
from shoal.learning.strategies.base import Strategy
from shoal.node.node import Founding
from shoal.sim.world import Scenario, World, simulate
from shoal.transport.errors import ConfigError
from shoal.transport.identity import PeerId
from shoal.transport.memory import Route

from ..sim.tiny import Pull, target

LATENCY = 0.02


@attrs.frozen
class Scripted(Strategy):
    """What a test wants a peer to do."""

    script: ClassVar[Callable[[Peer], Awaitable[None]]]

    async def run(self, peer: Peer) -> None:
        await type(self).script(peer)


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[..., World]:
    """Let ``peers`` follow a script for ``rounds`` rounds."""

    def play(
        script: Callable[[Peer], Awaitable[None]],
        *,
        peers: int = 4,
        rounds: int = 2,
        task: type = Pull,
        uplink: float | None = None,
    ) -> World:
        async def throttle(world: World) -> None:
            for number in range(peers):
                world.network.set_uplink(f"node{number}", uplink or 1e9)

        monkeypatch.setitem(BUILTIN, "scripted", (__name__, "Scripted"))  # type: ignore[arg-type]
        monkeypatch.setattr(Scripted, "script", staticmethod(script), raising=False)
        founding = Founding(strategy="scripted", min_peers=peers, rounds=rounds)
        world = simulate(Scenario(peers, founding, make_task=task, route=Route(latency=LATENCY)), throttle)
        assert len({member.run.digest() for member in world.live()}) == 1
        assert all(member.run.round == rounds for member in world.live())
        return world

    return play


def own(peer: bytes, *shape: int) -> Tensor:
    """Values that differ from peer to peer."""
    seed = int.from_bytes(peer[:4], "big")
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mean_of(members: tuple[str, ...], value: Callable[[bytes], Tensor]) -> Tensor:
    """Of what each of the members gives, in the order in which the round names them."""
    parts = [value(PeerId.parse(member).key).float().reshape(-1) for member in members]
    return exact.weighted_mean(parts, [1.0] * len(parts))


async def train_a_step(peer: Peer) -> None:
    """Only who has trained contributes. The weights stay what all agree on."""
    start = await peer.weights()
    await peer.train(1)
    await peer.load(start)


Play = Callable[..., World]


# -- what comes back ---------------------------------------------------------------------------------------------------


def test_a_list_of_tensors_of_several_dtypes_is_reduced_at_once_with_the_same_bits_everywhere(play: Play) -> None:
    found: dict[bytes, list[dict[str, Tensor]]] = {}

    def mine(peer: bytes) -> dict[str, Tensor]:
        return {
            "matrix": own(peer, 5, 4).T,
            "half": own(peer, 7).half(),
            "scalar": own(peer)[()],
            "none": torch.empty(0, 3),
            "brain": own(peer, 2, 3).bfloat16(),
        }

    async def script(peer: Peer) -> None:
        async for round in peer.rounds():
            await train_a_step(peer)
            found.setdefault(peer.id, []).append(await round.reduce(mine(peer.id)))

    world = play(script)
    members = world.members[0].run.reports[0].members
    assert len(members) == 4
    for results in found.values():
        assert len(results) == 2
        for key, tensor in mine(b"\0" * 32).items():
            expected = mean_of(members, lambda peer, key=key: mine(peer)[key]).to(tensor.dtype)  # type: ignore[misc]
            assert results[0][key].shape == tensor.shape and results[0][key].dtype == tensor.dtype
            assert torch.equal(results[0][key].reshape(-1), expected), key


def test_a_result_may_be_written_to_the_tensors_that_were_given(play: Play) -> None:
    found: list[Tensor] = []

    async def script(peer: Peer) -> None:
        async for round in peer.rounds():
            await train_a_step(peer)
            parameter, half = nn.Parameter(own(peer.id, 3, 3)), own(peer.id, 4).half()
            result = await round.reduce([parameter, half], out=[parameter, half])
            assert result[0] is parameter and result[1] is half
            found.append(torch.cat([parameter.detach().reshape(-1), half.float()]))

    play(script, rounds=1)
    assert len(found) == 4 and all(torch.equal(found[0], other) for other in found)


def test_who_reduces_tensors_of_other_shapes_is_left_out_by_name_and_is_given_no_result(play: Play) -> None:
    """Two tensors of the same total: the mean of a 3 and a 5 with a 5 and a 3 would be one of unlike things."""
    found: dict[bytes, dict[int, Tensor]] = {}
    odd: list[bytes] = []

    def mine(peer: bytes) -> list[Tensor]:
        return list(own(peer, 8).split([3, 5]))

    async def script(peer: Peer) -> None:
        results = found.setdefault(peer.id, {})
        async for round in peer.rounds():
            await train_a_step(peer)
            given = mine(peer.id)
            if round.index == 1 and peer.id in (*odd, peer.id)[:1]:
                odd.append(peer.id)
                given.reverse()
            results[round.index] = torch.cat(await round.reduce(given))

    world = play(script, peers=4, rounds=3)
    (other,) = odd
    assert {peer: sorted(results) for peer, results in found.items()} == {
        peer: [2, 3] if peer == other else [1, 2, 3] for peer in found
    }
    by_peer = {member.run.me.key: member for member in world.live()}
    report = next(member.run.reports[0] for peer, member in by_peer.items() if peer != other)
    assert len(report.members) == 3 and PeerId(other).text not in report.members
    assert "other tensors: 5, 3 instead of 3, 5" in report.reason
    mean = mean_of(report.members, lambda peer: own(peer, 8))
    assert all(torch.equal(results[1], mean) for peer, results in found.items() if peer != other)
    told = [event.detail for event in by_peer[other].events]
    assert "we reduced other tensors: 5, 3 instead of 3, 5" in told
    assert len({tuple(results[3].tolist()) for results in found.values()}) == 1


# -- several in flight -------------------------------------------------------------------------------------------------


def test_several_reduces_of_a_round_share_one_membership_and_one_commit(play: Play) -> None:
    times: list[float] = []
    results: dict[bytes, list[Tensor]] = {}

    async def script(peer: Peer) -> None:
        async for round in peer.rounds():
            await train_a_step(peer)
            handles: list[Reducing[Tensor]] = [round.reduce_async(own(peer.id, 8), of=24)]
            began = trio.current_time()
            for _ in range(2):
                await trio.sleep(0.3)
                handles.append(round.reduce_async(own(peer.id, 8)))
            assert not any(handle.done() for handle in handles)
            results[peer.id] = [await handle for handle in handles]
            assert all(handle.done() for handle in handles)
            assert torch.equal(await handles[1], results[peer.id][1]), "as often as one likes"
            if round.index > 1:  # to the first one they come one after the other
                times.append(trio.current_time() - began)

    world = play(script, rounds=2)
    for member in world.live():
        assert [report.round for report in member.run.reports] == [1, 2]
        assert all(len(report.members) == 4 and report.retries == 0 for report in member.run.reports)
    expected = mean_of(world.members[0].run.reports[0].members, lambda peer: own(peer, 8))
    assert all(torch.equal(result, expected) for several in results.values() for result in several)
    # Convened while the rest was being computed: after the last one only scatter, gather and commit.
    assert 0.6 < max(times) < 0.6 + 0.3


class Wide(Pull):
    """A model of 2 MiB, for exchanges that take a while."""

    step_seconds: ClassVar[float] = 0.1

    def model(self) -> nn.Module:
        model = super().model()
        model.rest = nn.Parameter(torch.zeros((1 << 19) - 64))
        return model

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return super().loss(model, batch) + 0.0 * model.rest.sum()


SIZE = 1 << 19
#: Bytes per second that a peer can send: three quarters of 2 MiB to the owners, and as much from each, take 3 s.
SLOW = 1e6
STEPS = 30


def spent(play: Play, work: Callable[[Peer, Round, Tensor], Awaitable[Tensor]]) -> float:
    """Virtual seconds of ``work`` in a round, the longest of all peers; it has to give the mean."""
    seconds: list[float] = []
    results: list[Tensor] = []

    async def script(peer: Peer) -> None:
        async for round in peer.rounds():
            start = await peer.weights()
            await peer.train(1)
            if round.index == 1:
                # Peers come to the first round one after the other: they load the state.
                await round.reduce(torch.zeros(1))
            else:
                began = trio.current_time()
                results.append(await work(peer, round, own(peer.id, SIZE)))
                seconds.append(trio.current_time() - began)
            await peer.load(start)

    play(script, rounds=2, task=Wide, uplink=SLOW)
    assert all(torch.equal(result, results[0]) for result in results)
    return max(seconds)


def test_lines_are_measured_while_peers_train(play: Play) -> None:
    """The vector that is reduced is small: whatever is known of lines comes from probes, or from loading the state."""

    async def script(peer: Peer) -> None:
        async for round in peer.rounds():
            start = await peer.weights()
            await peer.train(STEPS)
            await round.reduce(torch.zeros(1))
            await peer.load(start)

    world = play(script, rounds=2, task=Wide, uplink=SLOW)
    lines = [member.run.endpoint.line.up for member in world.live()]
    assert [line.rate(line.windows[-1][0]) for line in lines] == [pytest.approx(SLOW, rel=0.1)] * 4


def test_training_goes_on_while_a_reduce_is_in_flight(play: Play) -> None:
    async def only_reduce(peer: Peer, round: Round, values: Tensor) -> Tensor:
        return await round.reduce(values)

    async def one_after_the_other(peer: Peer, round: Round, values: Tensor) -> Tensor:
        await peer.train(STEPS)
        return await round.reduce(values)

    async def at_the_same_time(peer: Peer, round: Round, values: Tensor) -> Tensor:
        handle = round.reduce_async(values)
        await peer.train(STEPS)
        return await handle

    train, exchange = STEPS * Wide.step_seconds, spent(play, only_reduce)
    assert exchange > 3.0
    assert spent(play, one_after_the_other) > 0.95 * (train + exchange)
    assert spent(play, at_the_same_time) < 1.1 * max(train, exchange)


def test_what_is_there_travels_while_the_rest_is_computed(play: Play) -> None:
    half = SIZE // 2

    async def late(peer: Peer, round: Round, values: Tensor) -> Tensor:
        await peer.train(STEPS)
        return await round.reduce(values)

    async def in_halves(peer: Peer, round: Round, values: Tensor) -> Tensor:
        first = round.reduce_async(values[:half], of=SIZE)
        await peer.train(STEPS)
        second = round.reduce_async(values[half:])
        return torch.cat([await first, await second])

    # Who owns a slice of the first half sends one of its three early, of six on the way in and out, the others two.
    whole, halves = spent(play, late), spent(play, in_halves)
    exchange = whole - STEPS * Wide.step_seconds
    assert halves < whole - 0.1 * exchange


def test_samples_trained_while_a_reduce_is_in_flight_count_for_the_next_round(play: Play) -> None:
    async def script(peer: Peer) -> None:
        async for round in peer.rounds():
            start = await peer.weights()
            await peer.train(2)
            handle = round.reduce_async(own(peer.id, 4))
            await peer.train(3)
            await handle
            await peer.load(start)

    world = play(script, rounds=3)
    assert [report.samples for report in world.members[1].run.reports] == [4 * 2, 4 * 5, 4 * 5]


# -- giving up ---------------------------------------------------------------------------------------------------------


class Chosen:
    """One of the peers: the first that asks."""

    def __init__(self) -> None:
        self.key = b""

    def __call__(self, peer: Peer) -> bool:
        self.key = self.key or peer.id
        return self.key == peer.id


def the(chosen: Chosen) -> str:
    return PeerId(chosen.key).text


def refusals(world: World) -> list[str]:
    return [event.detail for member in world.live() for event in member.events if event.what == "refused"]


def test_a_cancelled_reduce_leaves_the_round_of_the_others_alone(play: Play) -> None:
    chosen, results, scopes = Chosen(), list[Tensor](), list[bool]()

    async def script(peer: Peer) -> None:
        async for round in peer.rounds():
            await train_a_step(peer)
            if chosen(peer):
                with trio.move_on_after(0.05) as scope:
                    await round.reduce(own(peer.id, 8))
                scopes.append(scope.cancelled_caught)
            else:
                results.append(await round.reduce(own(peer.id, 8)))

    world = play(script, rounds=2)
    assert scopes == [True, True]
    assert len(results) == 6
    # What it gave had left already: it is among the members, in the same round as all others.
    expected = mean_of(world.members[0].run.reports[0].members, lambda peer: own(peer, 8))
    assert all(torch.equal(result, expected) for result in results)
    assert all(len(report.members) == 4 for member in world.live() for report in member.run.reports)


def test_a_reduce_cancelled_before_all_of_it_was_there_takes_the_contribution_back(play: Play) -> None:
    chosen, results, waited = Chosen(), list[tuple[Tensor, Tensor]](), list[float]()

    async def script(peer: Peer) -> None:
        async for round in peer.rounds():
            await train_a_step(peer)
            handle = round.reduce_async(own(peer.id, 8), of=16)
            await trio.sleep(0.3)
            began = trio.current_time()
            if chosen(peer):
                handle.cancel()
                with pytest.raises(ConfigError, match="this reduce was cancelled"):
                    await handle
            else:
                second = round.reduce_async(own(peer.id, 8))
                results.append((await handle, await second))
                waited.append(trio.current_time() - began)

    world = play(script, rounds=1)
    for member in world.live():
        (report,) = member.run.reports
        assert the(chosen) not in report.members and len(report.members) == 3
    expected = mean_of(world.members[0].run.reports[0].members, lambda peer: own(peer, 8))
    assert all(torch.equal(result, expected) for pair in results for result in pair)
    # Told so, and not left to find out when the time for the scatter is over.
    assert max(waited) < 2.0


def test_values_that_are_not_finite_take_the_whole_contribution_back_and_the_result_is_that_of_the_others(
    play: Play,
) -> None:
    chosen, results = Chosen(), list[tuple[Tensor, Tensor]]()

    async def script(peer: Peer) -> None:
        async for round in peer.rounds():
            await train_a_step(peer)
            handle = round.reduce_async({"w": own(peer.id, 8)}, of=16)
            await trio.sleep(0.2)
            values = own(peer.id, 2, 4)
            if chosen(peer):
                values[1, 2] = float("nan")
            second = round.reduce_async({"v": values})
            results.append(((await handle)["w"], (await second)["v"]))

    world = play(script, rounds=1)
    members = world.members[0].run.reports[0].members
    assert len(members) == 3 and the(chosen) not in members
    expected = mean_of(members, lambda peer: own(peer, 8))
    assert len(results) == 4 and all(torch.equal(one, expected) for one, _ in results)
    assert "our own contribution is not sent: NaN at 14 (tensor 'v'); 1 of 8 values are not finite" in refusals(world)


def test_a_contribution_that_is_never_completed_is_left_out_in_time(play: Play) -> None:
    chosen, results, waited = Chosen(), list[Tensor](), list[float]()

    async def script(peer: Peer) -> None:
        async for round in peer.rounds():
            await train_a_step(peer)
            began = trio.current_time()
            handle = round.reduce_async(own(peer.id, 8), of=16)
            if not chosen(peer):
                await round.reduce_async(own(peer.id, 8))
            results.append(await handle)
            waited.append(trio.current_time() - began)

    world = play(script, rounds=1)
    members = world.members[0].run.reports[0].members
    assert len(members) == 3 and the(chosen) not in members
    expected = mean_of(members, lambda peer: own(peer, 8))
    assert len(results) == 4 and all(torch.equal(result, expected) for result in results)
    assert max(waited) < 15.0
    assert any("only 8 of 16 elements were given to reduce within" in detail for detail in refusals(world))


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_reduces_that_do_not_fit_into_the_round_are_refused_and_the_round_goes_on(play: Play) -> None:
    async def script(peer: Peer) -> None:
        last: list[Round] = []
        async for round in peer.rounds():
            for before in last:
                with pytest.raises(ConfigError, match="round 1 is not open"):
                    before.reduce_async(torch.zeros(2))
            last.append(round)
            await train_a_step(peer)
            with pytest.raises(ConfigError, match="257 elements are too many for one round of this run: at most 256"):
                round.reduce_async(torch.zeros(257))
            with pytest.raises(ConfigError, match="its dtype is int64"):
                await round.reduce(torch.zeros(3, dtype=torch.int64))
            with pytest.raises(ConfigError, match="room for 4 elements in all its reduces, and this one makes it 5"):
                round.reduce_async(torch.zeros(5), of=4)
            first = round.reduce_async(torch.zeros(3), of=4)
            with pytest.raises(ConfigError, match="of=5: the first reduce of round . said 4"):
                round.reduce_async(torch.zeros(1), of=5)
            with pytest.raises(ConfigError, match="room for 4 elements in all its reduces, and this one makes it 6"):
                round.reduce_async(torch.zeros(3))
            second = round.reduce_async(torch.ones(1))
            with pytest.raises(ConfigError, match="say of= in the first one to have several"):
                round.reduce_async(torch.ones(1))
            assert (await first).tolist() == [0.0] * 3 and (await second).tolist() == [1.0]
            with pytest.raises(ConfigError, match="room for 4 elements"):
                await round.reduce(torch.ones(1))

    world = play(script, rounds=2)
    assert all(len(report.members) == 4 for report in world.members[0].run.reports)


def test_a_reduce_that_nobody_awaited_is_an_error_at_the_end_of_the_round(play: Play) -> None:
    async def script(peer: Peer) -> None:
        rounds = peer.rounds()
        round = await anext(rounds)
        await train_a_step(peer)
        first, second = round.reduce_async(torch.zeros(3), of=4), round.reduce_async(torch.zeros(1))
        await first
        with pytest.raises(ConfigError, match="1 of the 2 reduces of round 1 were never awaited: await the handle"):
            await anext(rounds)
        await second
        async for round in rounds:
            await train_a_step(peer)
            await round.reduce(torch.zeros(3))

    play(script, rounds=2)


def test_a_reduce_outside_of_a_round_is_refused(play: Play) -> None:
    async def script(peer: Peer) -> None:
        last: Round | None = None
        async for round in peer.rounds():
            await train_a_step(peer)
            await round.reduce(torch.zeros(3))
            last = round
        assert last is not None
        with pytest.raises(ConfigError, match="round 1 is not open: reduce within the loop over peer.rounds"):
            await last.reduce(torch.zeros(3))

    play(script, rounds=1)


# -- the examples of the documentation ---------------------------------------------------------------------------------

PAGE = Path(__file__).parents[2] / "docs" / "tensors.md"


def example(name: str, strategy: str) -> Strategy:
    found = re.search(rf"<!-- test: {name} -->\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert found is not None, f"{PAGE.name} has no example marked {name}"
    names: dict[str, Any] = {"attrs": attrs, "Strategy": Strategy, "Peer": Peer}
    exec(found.group(1), names)
    made: Strategy = names[strategy](inner_steps=4)
    return made


@pytest.mark.parametrize(("name", "strategy"), [("list", "Measured"), ("overlap", "InHalves")])
def test_the_examples_of_the_page_train_a_swarm(
    play: Play, name: str, strategy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    world = play(example(name, strategy).run, rounds=6)
    targets = torch.stack([target(member.node.identity.peer_id.key) for member in world.live()])
    weights = world.members[0].run.weights()
    # Every peer pulls towards a target of its own; together they end at the middle of these.
    assert (weights - targets.mean(0)).norm() < 0.1 * (targets[0] - targets.mean(0)).norm()
    assert all(len(report.members) == 4 for report in world.members[0].run.reports)
    assert ("round 6: peers moved by" in capsys.readouterr().out) == (name == "list")
