"""Which heads of a run to believe: those whose voters trace back, signature by signature, to the founder's key.

Theory of operation. The root of trust is the run id: it names the founder, whose key alone is the first roster. A head
*hangs* on a roster that is believed already when a majority of that roster signed it; its own roster is then believed
too. A branch (survivors of a lost majority) hangs on a roster that all its members belong to, signed by every one of
them; a ``strict`` run has none, but for rosters of up to 3.

Only heads that change the roster are kept, and of these only the shortest way from the founder: while a majority of an
old roster is still among the voters, nothing in between is needed. So the proof of a head grows with the turnover of
the members, not with the number of rounds. A stranger can copy proofs but not extend them: it would need the signatures
of a majority of a roster that was one.
"""

from __future__ import annotations

import attrs

from ..transport.errors import RemoteProtocolError
from ..transport.identity import PeerId
from ..transport.rpc import Method
from ..transport.wire import pack
from . import defaults
from .rounds.messages import instance_key, quorum, verify_certificate
from .store import Head

#: Voters of a run that may go on as a branch in every mode: a majority of so few is too easily lost.
SMALL = 3


@attrs.frozen
class AskTrust:
    """The proof of the head of run ``run`` from its link ``start`` on."""

    run: bytes
    start: int


@attrs.frozen
class TrustPage:
    """Some links of a proof, in order, and how many it has in all."""

    links: tuple[Head, ...]
    total: int


TRUST = Method("run.trust", AskTrust, TrustPage)


def page_of(links: tuple[Head, ...], start: int) -> TrustPage:
    """As many ``links`` from ``start`` on as fit into a message, one at least if there is one."""
    found: list[Head] = []
    size = 0
    for link in links[start : start + defaults.TRUST_PAGE]:
        size += len(pack(link))
        if found and size > defaults.TRUST_BYTES:
            break
        found.append(link)
    return TrustPage(tuple(found), len(links))


@attrs.frozen
class _Known:
    """A roster that is believed, and the links that lead to it."""

    roster: tuple[PeerId, ...]
    path: tuple[Head, ...]


class Trust:
    """What one peer believes of one run. ``strict``: the run's mode. Sans-IO; signatures are checked in
    :meth:`find`, which takes 0.1 ms for each and changes nothing: it may run in a thread."""

    def __init__(self, run: bytes, founder: PeerId, strict: bool) -> None:
        self._run, self._strict = run, strict
        self._root = _Known((founder,), ())
        self._known: tuple[_Known, ...] = (self._root,)
        #: The links that lead to our own roster.
        self.own: tuple[Head, ...] = ()

    def path(self, roster: tuple[PeerId, ...]) -> tuple[Head, ...]:
        """The links that lead to ``roster``; empty for the founder's, and for one that is not believed."""
        return next((known.path for known in self._known if known.roster == roster), ())

    def believes(self, roster: tuple[PeerId, ...]) -> bool:
        return any(known.roster == roster for known in self._known)

    def find(self, head: Head) -> tuple[tuple[Head, ...] | None, str]:
        """The links that lead to ``head``'s roster, ``head`` the last of them, or None; and the reason."""
        record, certificate, voters = head.record, head.certificate, head.voters
        if record.run != self._run:
            return None, "it is of another run"
        if certificate.key != instance_key(record.run, record.round, record.prev, voters):
            return None, "its certificate is of another round"
        branch = record.kind == "branch"
        if branch and voters != record.roster:
            return None, "a branch that others than its members agreed on"
        base = self._base(head, branch)
        if base is None:
            return None, f"no majority of a roster known to be the run's signed round {record.round}"
        wrong = verify_certificate(record, certificate, voters, len(voters) if branch else quorum(len(voters)))
        if wrong is not None:
            return None, wrong
        return (*base.path, head), f"{len(base.path) + 1} links from the founder"

    def _base(self, head: Head, branch: bool) -> _Known | None:
        """The believed roster nearest to the founder that ``head`` hangs on, if its signatures are what they seem."""
        signers = {accept.peer for accept in head.certificate.accepts[: len(head.voters)]}
        for known in self._known:
            if branch:
                if self._strict and len(known.roster) > SMALL:
                    continue
                if signers and signers == set(head.voters) and signers <= set(known.roster):
                    return known
            elif len(signers.intersection(known.roster)) >= quorum(len(known.roster)):
                return known
        return None

    def believe(self, path: tuple[Head, ...]) -> None:
        """Take over what :meth:`find` found. Kept: what leads there or to our own roster, and the last few others."""
        roster, needed = path[-1].record.roster, (*path, *self.own)
        if self.believes(roster):
            return
        kept = [known for known in self._known[1:] if known.path[-1] in needed]
        others = [known for known in self._known[1:] if known.path[-1] not in needed]
        others = others[1 - defaults.REMEMBERED_ROSTERS :]
        found = sorted([*kept, *others, _Known(roster, path)], key=lambda known: len(known.path))
        self._known = (self._root, *found)

    def add(self, head: Head) -> str | None:
        """Believe ``head``'s roster if it hangs on one that is believed; else says why not."""
        if self.believes(head.record.roster) and self.believes(head.voters):
            # The usual commit: nothing new, and whoever hands it to us has checked its certificate.
            return None
        path, why = self.find(head)
        if path is None:
            return why
        self.believe(path)
        return None

    def belong(self, head: Head) -> bool:
        """We hold the state after ``head``: believe its roster, whatever leads there. True when :attr:`own` changed."""
        before = self.own
        if self.add(head) is not None:
            self.believe((head,))
        self.own = self.path(head.record.roster)
        return self.own != before

    def check_page(self, page: TrustPage, start: int) -> None:
        """Raises :class:`RemoteProtocolError` for a page of a foreign proof that makes no sense."""
        if not 0 <= page.total <= defaults.MAX_TRUST or len(page.links) > defaults.TRUST_PAGE:
            raise RemoteProtocolError(f"a proof of {page.total} links, {len(page.links)} of them at once")
        if not page.links or start + len(page.links) > page.total:
            raise RemoteProtocolError("a proof that ends early")
