"""A node composed of its parts, in virtual time: found, join, leave, tickets, and what it says when it cannot."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import pytest
import torch
import trio
from torch import Tensor, nn

from shoal.learning.events import Event, RoundReport
from shoal.learning.shard import Shard
from shoal.learning.task import Task
from shoal.node.node import Founding, Node, NodeConfig
from shoal.node.reach import reach
from shoal.node.ticket import Ticket
from shoal.sim.determinism import run_virtual
from shoal.sim.virtual import VirtualHost
from shoal.transport.address import Address
from shoal.transport.aead import NOMINAL_CIPHERS
from shoal.transport.errors import ConfigError, PeerUnreachable
from shoal.transport.identity import Identity
from shoal.transport.memory import MemoryWorld

FOUNDING = Founding(strategy_args=(("inner_steps", 5.0),))


class Line(Task):
    """A plane through the origin: learnt in no time."""

    metric: ClassVar[str] = "error"
    higher_is_better: ClassVar[bool] = False

    def model(self) -> nn.Module:
        return nn.Linear(3, 1)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.02)

    def batches(self, shard: Shard) -> Iterator[Tensor]:
        generator = shard.generator("data")
        while True:
            yield torch.randn(8, 3, generator=generator)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return (model(batch) - batch.sum(1, keepdim=True)).square().mean()

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"error": float(sum((p - 1).abs().max() for p in model.parameters()))}


class Somewhere:
    """Nodes on one memory network, each on a host of its own name."""

    def __init__(self, nursery: trio.Nursery) -> None:
        import random

        self.network = MemoryWorld(random.Random(7))
        self._nursery = nursery

    def node(self, name: str, task: Task | None = None, **settings: object) -> Node:
        host = VirtualHost(name, self.network, seed=7)
        host.ciphers = NOMINAL_CIPHERS
        identity = Identity(name.encode().ljust(32, b"."))
        self.notes: list[str] = []
        self.rounds: list[tuple[RoundReport, int]] = []
        self.events: list[Event] = []
        config = NodeConfig(bind=(Address("mem", name, 4001),), **settings)  # type: ignore[arg-type]
        return Node(
            host, identity, config, task=task,
            on_event=self.events.append,
            on_round=lambda report, samples: self.rounds.append((report, samples)),
            on_note=self.notes.append,
        )  # fmt: skip

    async def start(self, name: str, **settings: object) -> Node:
        node = self.node(name, Line(), **settings)
        await self._nursery.start(node.run)
        return node


async def members(node: Node, count: int) -> None:
    with trio.fail_after(120):
        while (status := node.status()) is None or len(status.members) != count:
            await trio.sleep(0.05)


def ticket(node: Node) -> Ticket:
    found = node.ticket()
    assert found is not None
    return found


async def test_a_founder_alone_trains_to_the_end_and_leaves() -> None:
    async with trio.open_nursery() as nursery:
        here = Somewhere(nursery)
        node = here.node("alice", Line(), founding=Founding(strategy_args=(("inner_steps", 5.0),), rounds=4))
        await node.run()
        assert node.outcome == "finished"
        assert [report.round for report, _ in here.rounds] == [1, 2, 3, 4]
        assert [samples for _, samples in here.rounds] == [40] * 4
        assert node.endpoint.links() == []


async def test_a_node_that_is_stopped_says_goodbye_and_the_others_go_on() -> None:
    async with trio.open_nursery() as nursery:
        here = Somewhere(nursery)
        alice = await here.start("alice", founding=FOUNDING)
        seen = here.events
        others = [await here.start(name, ticket=ticket(alice)) for name in ("bob", "carol")]
        await members(alice, 3)
        others[0].stop()
        await members(alice, 2)
        assert others[0].outcome == "left"
        assert [event.detail for event in seen if event.what == "lost"] == ["said goodbye"]
        assert sum(others[0].traffic()) > 0
        nursery.cancel_scope.cancel()


async def test_the_founder_may_go_and_a_ticket_from_any_member_still_leads_in() -> None:
    async with trio.open_nursery() as nursery:
        here = Somewhere(nursery)
        alice = await here.start("alice", founding=FOUNDING)
        bob = await here.start("bob", ticket=ticket(alice))
        carol = await here.start("carol", ticket=ticket(alice))
        await members(carol, 3)
        invitation = ticket(bob)
        assert {address.host for address in invitation.addresses} == {"alice", "bob", "carol"}
        assert invitation.founder == alice.identity.peer_id
        alice.stop()
        await members(carol, 2)
        dave = await here.start("dave", ticket=Ticket.parse(invitation.encode()))
        await members(dave, 3)
        nursery.cancel_scope.cancel()


async def test_a_run_of_a_task_of_ones_own_asks_the_joiner_to_name_it() -> None:
    async with trio.open_nursery() as nursery:
        here = Somewhere(nursery)
        alice = await here.start("alice", founding=FOUNDING)
        stranger = here.node("bob", ticket=ticket(alice))
        with pytest.RaisesGroup(pytest.RaisesExc(ConfigError, match=r"trains the task 'Line'.*--task module:Class")):
            await stranger.run()
        nursery.cancel_scope.cancel()


async def test_joining_nobody_gives_up_and_says_what_was_tried() -> None:
    async with trio.open_nursery() as nursery:
        here = Somewhere(nursery)
        nobody = Ticket(b"r" * 32, Identity(b"a" * 32).peer_id, (Address("mem", "alice", 4001),))
        node = here.node("bob", Line(), ticket=nobody, join_timeout=20.0)
        began = trio.current_time()
        with pytest.RaisesGroup(pytest.RaisesExc(PeerUnreachable, match=r"could not join the run .*mem://alice:4001")):
            await node.run()
        assert trio.current_time() - began < 40.0
        assert here.notes[0].startswith("not joined yet: ")
        nursery.cancel_scope.cancel()


async def test_a_ticket_of_another_founders_run_is_not_believed() -> None:
    async with trio.open_nursery() as nursery:
        here = Somewhere(nursery)
        alice = await here.start("alice", founding=FOUNDING)
        true = ticket(alice)
        forged = Ticket(true.run_id, Identity(b"m" * 32).peer_id, true.addresses)
        node = here.node("bob", Line(), ticket=forged, join_timeout=5.0)
        with pytest.RaisesGroup(pytest.RaisesExc(PeerUnreachable, match="another run than the ticket's")):
            await node.run()
        nursery.cancel_scope.cancel()


async def test_a_node_without_anything_to_do_is_refused() -> None:
    async with trio.open_nursery() as nursery:
        node = Somewhere(nursery).node("alice", Line())
        with pytest.RaisesGroup(pytest.RaisesExc(ConfigError, match="needs a run to found, a ticket, or a folder")):
            await node.run()


async def test_a_taken_port_of_an_earlier_life_is_replaced_and_said() -> None:
    async with trio.open_nursery() as nursery:
        here = Somewhere(nursery)
        await here.start("alice", founding=FOUNDING)
        second = here.node(
            "alice", Line(), founding=FOUNDING, fallback=(Address("mem", "alice", 5002),)
        )  # fmt: skip
        await nursery.start(second.run)
        assert [address.port for address in second.endpoint.addresses()] == [5002]
        assert "taking another port" in here.notes[0]
        nursery.cancel_scope.cancel()


def test_names_that_cannot_travel_are_refused_by_the_founder() -> None:
    class Odd(Line):
        name: ClassVar[str] = "my.task:v2"

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            node = Somewhere(nursery).node("alice", Odd(), founding=FOUNDING)
            with pytest.RaisesGroup(pytest.RaisesExc(ConfigError, match=r"'my\.task:v2' cannot travel")):
                await node.run()

    run_virtual(main, seed=1)


@pytest.mark.parametrize(
    ("addresses", "scope"),
    [
        ([], "nobody"),
        (["127.0.0.1:1", "[::1]:1"], "machine"),
        (["192.168.1.4:1", "127.0.0.1:1"], "network"),
        (["10.0.0.1:1"], "network"),
        (["8.8.8.8:1", "127.0.0.1:1"], "internet"),
        (["[2a00:1450:4001:81b::200e]:1"], "internet"),
    ],
)
def test_reach_is_judged_by_the_addresses(addresses: list[str], scope: str) -> None:
    found, sentence = reach([Address.parse(text) for text in addresses])
    assert found == scope
    assert sentence
