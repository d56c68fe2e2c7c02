"""What this peer has itself seen of every other peer in a run: rounds, quality, audits; kept over restarts.

It is nobody's hearsay and nobody is told: each peer has seen something else, and no decision of a round hangs on it,
but for one: who accused others falsely again and again is not heeded any more (:mod:`.liars`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from typing import Literal, assert_never

import attrs
import trio

from ..transport import deadlines
from ..transport.errors import ConfigError
from ..transport.host import Host
from ..transport.identity import PeerId
from . import defaults
from .events import Standing
from .store import RunStore

log = logging.getLogger(__name__)

#: How an audit ends: the owner's bytes were right; it signed what it did not compute; it did not answer.
Verdict = Literal["passed", "lied", "unanswered"]


def _one_more(count: int) -> int:
    return min(count + 1, defaults.MAX_STANDING_COUNT)


def _towards(mean: float | None, value: float, count: int) -> float:
    """The mean of ``count`` values, of which ``value`` is the last and ``mean`` that of the others."""
    return value if mean is None else min(1.0, max(0.0, mean + (value - mean) / count))


def witnessed(old: Standing, round: int, contributed: bool, quality: float | None) -> Standing:
    """``old`` after a round that combined contributions and of which the peer was a voter.

    ``quality``: what the rule thought of its contribution; None, like NaN, where nothing was measured.
    """
    rounds = _one_more(old.rounds)
    new = attrs.evolve(
        old,
        round=min(max(round, 0), defaults.MAX_STANDING_COUNT),
        rounds=rounds,
        contributed=_one_more(old.contributed) if contributed else old.contributed,
        lately=_towards(old.lately, float(contributed), min(rounds, defaults.STANDING_WINDOW)),
    )
    if quality is None or not contributed or math.isnan(quality):
        return new
    quality, measured = min(1.0, max(0.0, quality)), _one_more(old.measured)
    return attrs.evolve(
        new,
        measured=measured,
        quality=_towards(old.quality, quality, measured),
        quality_lately=_towards(old.quality_lately, quality, min(measured, defaults.STANDING_WINDOW)),
    )


def fault(standing: Standing) -> str | None:
    """What is wrong with a standing that was read; None when it is one that :class:`Standings` can have."""
    try:
        PeerId.parse(standing.peer)
    except ConfigError as error:
        return str(error)
    for field in attrs.fields(Standing):
        value = getattr(standing, field.name)
        if isinstance(value, int) and not 0 <= value <= defaults.MAX_STANDING_COUNT:
            return f"{field.name} is {value}"
        if isinstance(value, float) and not 0 <= value <= 1:
            return f"{field.name} is {value}"
    if not standing.measured <= standing.contributed <= standing.rounds:
        return f"{standing.measured} qualities of {standing.contributed} contributions in {standing.rounds} rounds"
    if not (standing.quality is None) == (standing.quality_lately is None) == (standing.measured == 0):
        return f"the mean of {standing.measured} qualities is {standing.quality}, lately {standing.quality_lately}"
    return None


class Standings:
    """The standing of each peer, of at most :data:`defaults.MAX_STANDINGS` of them: whoever was not seen for the
    longest time is forgotten first. Those who were caught keep up to half of the places, so that a liar is not
    forgotten by bringing many friends, and friends of liars leave room for others.

    ``me``: our own id, of whom nothing is kept.
    """

    def __init__(self, me: PeerId) -> None:
        self._me = me
        self._known: dict[PeerId, Standing] = {}  # who was seen last stands last
        self._version = self._saved = 0
        self._changed = trio.Event()

    # -- what is seen -------------------------------------------------------------------------------

    def committed(
        self, round: int, voters: Iterable[PeerId], members: Sequence[PeerId], quality: Sequence[float] = ()
    ) -> None:
        """``round`` was decided among ``voters``, and combined the contributions of ``members``. A round that combined
        nothing says nothing of anybody. ``quality``: of the members in their order, 0 … 1; empty where the rule says
        none, or did not decide here."""
        if not members:
            return
        said: dict[PeerId, float | None] = dict.fromkeys(members)
        said.update(zip(members, quality, strict=True) if quality else ())
        for peer in voters:
            if peer != self._me:
                self._put(peer, witnessed(self._of(peer), round, peer in said, said.get(peer)))
        self._settle()

    def audited(self, peer: PeerId, verdict: Verdict) -> None:
        """An audit of a slice that ``peer`` owned has ended."""
        old = self._of(peer)
        match verdict:
            case "passed":
                new = attrs.evolve(old, passed=_one_more(old.passed))
            case "lied":
                new = attrs.evolve(old, lied=_one_more(old.lied))
            case "unanswered":
                new = attrs.evolve(old, unanswered=_one_more(old.unanswered))
            case _:
                assert_never(verdict)
        if peer != self._me:
            self._put(peer, new)
            self._settle()

    def accused_falsely(self, peer: PeerId) -> None:
        """``peer`` accused somebody of what did not happen."""
        if peer != self._me:
            old = self._of(peer)
            self._put(peer, attrs.evolve(old, false_accusations=_one_more(old.false_accusations)))
            self._settle()

    # -- what is known ------------------------------------------------------------------------------

    def of(self, peer: PeerId) -> Standing | None:
        """Of one peer; None when nothing is known of it."""
        return self._known.get(peer)

    def all(self) -> tuple[Standing, ...]:
        """Of all peers, the one seen last first. From any thread."""
        return tuple([*self._known.values()][::-1])

    def _of(self, peer: PeerId) -> Standing:
        return self._known.get(peer) or Standing(peer.text)

    def _put(self, peer: PeerId, standing: Standing) -> None:
        self._known.pop(peer, None)
        self._known[peer] = standing

    def _settle(self) -> None:
        while len(self._known) > defaults.MAX_STANDINGS:
            caught = [peer for peer, found in self._known.items() if found.lied or found.false_accusations]
            if len(caught) > defaults.MAX_STANDINGS // 2:
                del self._known[caught[0]]
            else:
                free = set(caught)
                del self._known[next(peer for peer in self._known if peer not in free)]
        self._version += 1
        self._changed.set()

    # -- on disk ------------------------------------------------------------------------------------

    async def run(
        self, host: Host, store: RunStore, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Read what an earlier life saw from ``store`` (then it is started), and write down what is new every
        :data:`defaults.STANDINGS_EVERY` seconds, until cancelled; then once more, bounded like any goodbye.

        A file that is damaged, or cannot be written, is told of in the log and costs the history, never the run.
        """
        try:
            self.restore(await host.run_blocking(store.load_standings))
        except ConfigError as error:
            log.warning("what was known of other peers is left aside: %s", error)
        task_status.started()
        try:
            while True:
                await self._changed.wait()
                await trio.sleep(defaults.STANDINGS_EVERY)
                await self._save(host, store)
        finally:
            with trio.move_on_after(deadlines.goodbye(), shield=True):
                await self._save(host, store)

    def restore(self, found: Sequence[Standing]) -> None:
        """Begin with what :meth:`all` gave in an earlier life. Raises :class:`ConfigError` for what cannot be."""
        if len(found) > defaults.MAX_STANDINGS:
            raise ConfigError(f"{len(found)} peers, at most {defaults.MAX_STANDINGS} can be")
        for standing in found:
            wrong = fault(standing)
            if wrong is not None:
                raise ConfigError(f"of {standing.peer[:8]!r}: {wrong}")
        for standing in reversed(found):
            self._known.setdefault(PeerId.parse(standing.peer), standing)

    async def _save(self, host: Host, store: RunStore) -> None:
        if self._version == self._saved:
            return
        version, self._changed = self._version, trio.Event()
        try:
            await host.run_blocking(store.save_standings, self.all())
        except ConfigError as error:
            log.warning("what is known of other peers is not kept: %s", error)
        else:
            self._saved = version
