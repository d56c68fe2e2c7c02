"""Who lied in a run, as this peer saw it itself or was shown proof of: they are members no more."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..transport.identity import PeerId
from . import defaults
from .standing import Verdict

if TYPE_CHECKING:
    from .rounds.lies import Lie
    from .run import Run


class Liars:
    """``reasons``: who is led no more, gets no place in a roster that we propose, and why. Forgotten when this node
    ends, but for those against whom there is a proof in the documents of the run."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.reasons: dict[PeerId, str] = {}
        #: Called with a proof that was found here.
        self.on_proof: Callable[[Lie], None] = lambda lie: None
        #: Proofs found before somebody asked for them.
        self.proofs: dict[PeerId, Lie] = {}

    def audited(self, peer: PeerId, verdict: Verdict, why: str) -> None:
        """A look at a slice that ``peer`` owned has ended."""
        self._run.standings.audited(peer, verdict)
        if verdict == "lied":
            self.expel(peer, why)

    def proven(self, lie: Lie) -> None:
        """There is a proof, made or checked here, of a lie of ``lie.owner`` in a round."""
        self.expel(lie.owner, lie.reason)
        if lie.owner not in self.proofs and len(self.proofs) < defaults.MAX_ROSTER:
            self.proofs[lie.owner] = lie
            self.on_proof(lie)

    def expel(self, peer: PeerId, why: str) -> None:
        """``peer`` lied."""
        if peer not in self.reasons and peer != self._run.me:
            self.reasons[peer] = why
            self._run.emit("run", "expelled", peer, why)

    def heeds(self, peer: PeerId) -> bool:
        """Whether accusations of ``peer`` are looked into."""
        standing = self._run.standings.of(peer)
        return standing is None or standing.false_accusations < defaults.MAX_FALSE_ACCUSATIONS
