"""Whole nodes in virtual time, of which one returns wrong combinations: it is expelled, and everybody can prove why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import attrs
import pytest
import torch
import trio
from torch import Tensor, nn

from shoal.learning import defaults
from shoal.learning.faults import Faults
from shoal.learning.rounds.lies import Lie
from shoal.learning.rundocs_content import LIES, BanReader, ban_entry
from shoal.learning.shard import Shard, frozen_random
from shoal.learning.task import Task
from shoal.node.commands import render_peers
from shoal.node.control import PeerList
from shoal.node.node import Founding
from shoal.sim.world import World, simulate
from shoal.transport.wire import pack, unpack

from . import tiny

PEERS, LIAR = 5, 3

#: Numbers in the model: several leaves in every slice.
SIZE = 5000


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.zeros(SIZE))


class Drift(Task):
    """Every peer pulls ``SIZE`` numbers towards a target of its own. Rounds of one virtual second."""

    name: ClassVar[str] = "drift"
    step_seconds: ClassVar[float] = 0.5

    def model(self) -> nn.Module:
        return Wide()

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.25)

    def batches(self, shard: Shard) -> Iterator[Tensor]:
        values = frozen_random(int.from_bytes(shard.peer[:8], "big"), "target").standard_normal(SIZE)
        while True:
            yield torch.from_numpy(values).float()[None]

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        assert isinstance(model, Wide)
        return 0.5 * (model.at - batch[0]).square().sum()

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        assert isinstance(model, Wide)
        return {"norm": float(model.at.norm())}


def distort(result: Tensor) -> None:
    result *= -2.0


def founding(aggregator: str = "median", audit: float | None = None) -> Founding:
    return Founding(
        strategy_args=tiny.PLAIN, aggregator=aggregator, audit=audit, min_peers=PEERS, rounds=50, mode="strict"
    )


def swarm(liar: int = LIAR, late: tuple[int, ...] = (), **fields: object) -> object:
    faults = {liar: Faults(distort=distort)}
    scenario = tiny.scenario(PEERS + len(late), 50, faults=faults)
    return attrs.evolve(
        scenario,
        founding=founding(**fields),
        make_task=Drift,
        late=late,
        limit=600.0,
        evaluate_every=0,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(("liar", "aggregator"), [(0, "nnm+trimmed_mean:f=1"), (LIAR, "median")])
def test_a_lying_owner_is_expelled_with_a_proof_in_the_documents_and_never_let_in_again(
    aggregator: str, liar: int
) -> None:
    async def script(world: World) -> None:
        honest = [member for number, member in world.members.items() if number != liar and number < PEERS]
        await world.until(
            lambda: all(m.node.run_here is not None and m.run.round >= 12 for m in honest), "twelve rounds"
        )
        await trio.sleep(20)
        lying = world.members[liar]
        for member in honest:
            members = {peer.text for peer in member.run.membership.members()}
            assert lying.peer not in members and len(members) == PEERS - 1
            assert lying.peer in {peer.text for peer in member.run.liars.reasons}
            assert member.node.documents is not None
            (ban,) = member.node.documents.bans()
            assert ban.peer.text == lying.peer and ban.lied and "signed a wrong combination" in ban.reason
            digests = {report.round: report.digest for report in member.run.reports}
            assert all(digests[r] == honest[0].run.reports[r - 1].digest for r in digests)
        shown = render_peers(PeerList(honest[0].node.peers(), honest[0].node.standings()))
        (row,) = [line for line in shown.splitlines() if line.strip().startswith(lying.peer[:8])]
        assert row.endswith(" 1 lied") or "lied" not in row, "who did not look itself has it from the documents"
        # A newcomer, which saw nothing of it, takes no word for it, either: it checks the proof.
        late = world.start(PEERS)
        await world.until(lambda: late.node.run_here is not None and late.run.round >= 14, "the newcomer's rounds")
        await trio.sleep(20)
        assert lying.peer in {peer.text for peer in late.run.liars.reasons}
        assert lying.peer not in {peer.text for peer in late.run.membership.members()}
        assert any(e.what == "unwelcome" and "expelled" in e.detail for e in lying.events)
        world.kill(liar)

    simulate(swarm(liar, (PEERS,), aggregator=aggregator), script)  # type: ignore[arg-type]


def test_without_audits_the_lie_stands() -> None:
    """What a swarm gets that trusts its owners: the same liar, and nobody notices."""

    async def script(world: World) -> None:
        await world.until(
            lambda: all(m.node.run_here is not None and m.run.round >= 6 for m in world.members.values()), "six rounds"
        )
        assert len(world.members[0].run.membership.members()) == PEERS
        world.kill(LIAR)

    simulate(swarm(audit=0.0), script)  # type: ignore[arg-type]


def test_a_ban_without_a_proof_that_holds_is_not_read() -> None:
    proofs: list[tuple[bytes, Lie]] = []

    async def script(world: World) -> None:
        await world.until(
            lambda: any(m.node.run_here is not None and m.run.liars.proofs for m in world.members.values()), "a proof"
        )
        run = next(m.run for m in world.members.values() if m.node.run_here is not None and m.run.liars.proofs)
        world.kill(LIAR)
        proofs.extend((run.run_id, lie) for lie in run.liars.proofs.values())

    simulate(swarm(), script)  # type: ignore[arg-type]
    run, lie = proofs[0]
    author = next(voter for voter in lie.voters if voter != lie.owner)
    victim = next(voter for voter in lie.voters if voter not in (lie.owner, author))
    right = ban_entry(lie)
    assert unpack(Lie, right, limit=defaults.MAX_LIE) == lie

    def read(entries: dict[str, object], aggregator: str = "median", run_id: bytes = run) -> list[str]:
        bans = BanReader([], run_id, aggregator).read({author: {LIES: entries}})
        return [ban.peer.text for ban in bans]

    assert read({lie.owner.text: right}) == [lie.owner.text]
    assert read({victim.text: right}) == []
    assert read({lie.owner.text: right[:-1]}) == []
    assert read({lie.owner.text: b"\xc1" * 100}) == []
    assert read({lie.owner.text: "words"}) == []
    assert read({lie.owner.text: right}, run_id=bytes(32)) == []
    assert read({lie.owner.text: right}, aggregator="no such rule") == []
    assert read({victim.text: pack(attrs.evolve(lie, owner=victim))}) == []
    # No author makes us check more than a few: they cost milliseconds each.
    many = {f"{index}": right for index in range(defaults.MAX_LIES)}
    assert read({**many, lie.owner.text: right}) == []
