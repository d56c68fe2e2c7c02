"""One peer of a field: what conducts its strategy, as :class:`shoal.learning.run.Run` does in a swarm."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import trio
from torch import Tensor

from ..learning.peer import Group, Peer, Round, Tally
from ..learning.shard import Shard
from ..learning.state import Layout
from ..learning.worker import Worker
from ..transport.errors import ConfigError
from ..transport.identity import PeerId
from .field_rounds import FieldExchange
from .virtual import VirtualHost

if TYPE_CHECKING:
    from .field import Field


class FieldRun:
    """One life of peer ``number``; satisfies :class:`shoal.learning.peer.Conduct`. ``owned``: of its earlier lives."""

    def __init__(
        self, field: Field, number: int, me: PeerId, host: VirtualHost, trainer: Worker, owned: dict[str, Tensor]
    ) -> None:
        self.field, self.number, self.me, self.host, self.trainer = field, number, me, host, trainer
        self.layout: Layout = trainer.layout
        self.restored: dict[str, Tensor] = {}
        self.owned = owned
        self.run_id = hashlib.blake2b(b"field %d" % field.case.seed, digest_size=32).digest()
        self.time_budget = field.case.time_budget
        self.codec = field.case.codec
        self.peer = Peer(self, trainer)
        self.exchange: FieldExchange | None = None
        self.round = field.first - 1
        #: Where it came in, if it joined; whoever was there from the beginning has a state before the first round.
        self.entered = self.round
        self.began = 0.0
        self.loss: float | None = None
        self.scope = trio.CancelScope()
        self.done = self._open = False
        self.opened: Round | None = None

    @property
    def nursery(self) -> trio.Nursery:
        """Where what outlives a strategy's own waits goes on."""
        return self.field.nursery

    @property
    def name(self) -> bytes:
        """32 bytes that name this peer."""
        return self.me.key

    def over(self) -> bool:
        """Whether all rounds are done."""
        return self.round >= self.field.last

    async def settle(self) -> None:
        """The state after the last round is final."""
        await trio.lowlevel.checkpoint()
        self.field.settled(self)

    async def moving(self) -> None:
        """States are copies here."""

    async def end_round(self) -> None:
        """The strategy is done with its round."""
        if self._open:
            assert self.exchange is not None
            await self.exchange.settle()
            if self.exchange.given is None:
                raise ConfigError(f"round {self.round + 1} ended without a reduce and without skip()")
            self.exchange.close("the next round has begun")
            self._ended()

    def _ended(self) -> None:
        self.round += 1
        self._open, self.exchange = False, None

    async def open_round(self) -> Round:
        """Begin the next round."""
        round = self.round + 1
        place = self.field.place(self, round)
        self.began = trio.current_time()
        self.trainer.set_shard(Shard(self.field.case.seed, self.me.key, round, place.index, place.count))
        self.exchange, self._open = FieldExchange(self, place.meeting), True
        prev = hashlib.blake2b(f"{self.field.case.seed} {round - 1}".encode(), digest_size=32).digest()
        peers = tuple(peer.key for peer in place.meeting.everybody)
        self.opened = Round(self, Group(round, self.me.key, peers, prev))
        return self.opened

    def open_exchange(self, round: int) -> FieldExchange:
        """The exchange of ``round``. Raises :class:`ConfigError` when that is not the round we are in."""
        if self.exchange is None or not self._open or round != self.round + 1 or self.field.group == 1:
            raise ConfigError(f"round {round} is not open: reduce within the loop over peer.rounds()")
        return self.exchange

    async def skip(self) -> None:
        """End a round without exchange."""
        self.take_tally()
        self._ended()
        await trio.lowlevel.checkpoint()

    def take_tally(self) -> Tally:
        """What was trained for the contribution of this round; what follows is for the next one."""
        tally, self.peer.tally = self.peer.tally, Tally()
        return tally

    def when_decided(self, then: Callable[[], None]) -> None:
        """Call ``then`` once the present round is decided without us: before we began its exchange."""
        exchange = self.exchange
        if exchange is None or exchange.given is not None or len(exchange.meeting.everybody) == 1:
            return

        async def wait() -> None:
            await exchange.meeting.decided.wait()
            if exchange.given is None:
                then()

        self.nursery.start_soon(wait)

    def note_loss(self, tally: Tally) -> None:
        """Training came this far."""
        if tally.loss is not None:
            self.loss = tally.loss

    def withdrawn(self, why: str, broken: bool) -> None:
        """Our contribution is taken back. ``broken``: its numbers are not finite."""
        self.field.note(self, why)
        if broken and not self.peer.shares_optimizer:
            self.trainer.reset_optimizer()
