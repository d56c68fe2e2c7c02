"""Ways to one peer, raced with head starts: the first byte stream that is finished into a link wins."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import TypeAlias

import attrs
import trio

from . import deadlines, defaults
from .errors import ConfigError, PeerUnreachable, RemoteRefused, ShoalError, WaitExpired
from .identity import PeerId
from .link import Link
from .network import ByteStream
from .planner import Outcome, Plan, Step
from .ways import Way

#: Turns a fresh byte stream, which came about by the named way, into a running link or a further pipe of one.
Finish: TypeAlias = Callable[[ByteStream, str], Awaitable[Link]]


#: Refusals that say nothing about the way itself.
_PASSING = ("busy", "rate", "glare")


class Past:
    """What came of earlier steps, per peer: bounded, least recently noted peer out first."""

    def __init__(self) -> None:
        self._outcomes: dict[PeerId, tuple[Outcome, ...]] = {}

    def note(self, peer: PeerId, outcome: Outcome) -> None:
        kept = (*self._outcomes.pop(peer, ()), outcome)[-defaults.MAX_OUTCOMES :]
        self._outcomes[peer] = kept
        if len(self._outcomes) > defaults.MAX_OUTCOME_PEERS:
            del self._outcomes[next(iter(self._outcomes))]

    def of(self, peer: PeerId) -> tuple[Outcome, ...]:
        """Oldest first."""
        return self._outcomes.get(peer, ())


def reason_of(error: Exception) -> str:
    """What a failed step says of itself, without the names that stand beside it anyway."""
    if isinstance(error, PeerUnreachable):
        return error.attempts[0][1] if error.attempts else error.message
    return str(error)


@attrs.define(eq=False)
class Race:
    """One race for ``peer`` by ``plan``. ``lag``: our loop's, for deadlines; ``note`` hears how each step ended."""

    peer: PeerId
    plan: Plan
    ways: Mapping[str, Way]
    finish: Finish
    note: Callable[[Outcome], None]
    now: Callable[[], float]
    lag: float = 0.0
    #: Hears of each failure. Must not wait.
    on_failure: Callable[[Step, Exception], None] | None = None
    #: The step that won.
    won: Step | None = None
    #: The step by which the peer has agreed to come to us.
    asked: Step | None = None
    #: Why steps failed.
    reasons: dict[Step, str] = attrs.field(factory=dict)
    _came: bool = False
    _opening: dict[Step, trio.CancelScope] = attrs.field(factory=dict)
    _pausing: trio.CancelScope = attrs.field(factory=trio.CancelScope)

    def arrive(self) -> None:
        """The peer has come to us meanwhile: nothing new is begun, and what is still being opened is given up.

        What shakes hands already is finished: when both sides dial at once, each may see the other come.
        """
        self._came = True
        self._pausing.cancel()
        for scope in self._opening.values():
            scope.cancel()

    async def run(self) -> Link | None:
        """The first link; the other attempts are cancelled (one that completed too is a spare). None: the peer came.

        Raises :class:`PeerUnreachable`, which names every step and why it failed or was not taken.
        """
        winner: list[Link] = []
        heads = [step.head_start for step in self.plan.steps[1:]]
        async with trio.open_nursery() as nursery:
            for index, step in enumerate(self.plan.steps):
                if self._came:
                    break
                failed = trio.Event()
                nursery.start_soon(self._attempt, step, failed, winner, nursery.cancel_scope)
                if index < len(heads):
                    with trio.move_on_after(heads[index]) as self._pausing:
                        await failed.wait()
        if winner:
            return winner[0]
        if self._came:
            return None
        raise self.failure()

    async def _attempt(self, step: Step, failed: trio.Event, winner: list[Link], everything: trio.CancelScope) -> None:
        try:
            stream = await self._open(step)
            if stream is not None:
                link = await self.finish(stream, step.way)
                self.note(Outcome(step.target, True, self.now()))
                if not winner:
                    self.won = step
                winner.append(link)
                everything.cancel()
        except ShoalError as error:
            # Ours or theirs: one way that fails does not keep the others from it.
            self.reasons[step] = reason_of(error)
            if not (isinstance(error, RemoteRefused) and error.code in _PASSING):
                self.note(Outcome(step.target, False, self.now(), self.reasons[step]))
            if self.on_failure is not None:
                self.on_failure(step, error)
        failed.set()

    async def _open(self, step: Step) -> ByteStream | None:
        """None when the peer has come to us."""
        way = self.ways.get(step.way)
        if way is None:
            raise ConfigError(f"this node has no means for {step.way}")
        stream: ByteStream | None = None
        with trio.CancelScope() as scope:
            self._opening[step] = scope
            try:
                stream = await way.open(self.peer, step)
                if stream is None:
                    self.asked = step
                    seconds = deadlines.reversal(self.lag)
                    await trio.sleep(seconds)
                    raise WaitExpired("connection from it, though it was asked to dial us", seconds)
            finally:
                del self._opening[step]
        return stream

    def failure(self) -> PeerUnreachable:
        """All that was tried or skipped, with reasons."""
        tried = tuple((step.target, self.reasons.get(step, "not begun")) for step in self.plan.steps)
        message = "no way to it succeeded" if tried else "no address of it is known"
        return PeerUnreachable(message, peer=self.peer.short, attempts=tried + self.plan.skipped)
