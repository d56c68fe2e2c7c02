"""What stands in the documents of a run, and how it is read: by anybody, whatever the authors wrote. Loads no torch.

Five documents, all of the scope "run id"; each author writes its own part, so nobody can change what another one said:

========  ==========  ==================================================================================================
name      authors     what each author writes
========  ==========  ==================================================================================================
spec      founder     the signed spec of the run
roster    members     since when it is here, when it was last, in which round, with which version
commits   members     the last rounds that fell to it to write down: digest, members, samples, hash of the certificate;
                      of rounds that gathered bytes the whole record, which makes it the ledger (:mod:`.replay`)
metrics   members     its loss and metric by round; old points are thinned out
bans      members     whom it has a proof against, with the proof: two histories of a document, a lie in a round
========  ==========  ==================================================================================================

A reader believes nothing: what has not the right shape is left out, a ban counts only with a proof that verifies.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from ..dht.documents.envelope import Evidence
from ..dht.documents.policy import DocumentSpec, Members, Owner
from ..transport.errors import ConfigError, DecodeError
from ..transport.identity import PeerId
from ..transport.wire import pack, printable, unpack
from . import defaults
from .spec import SignedSpec

if TYPE_CHECKING:
    from .rounds.lies import Lie
    from .rounds.messages import CommitRecord

#: What a document says: author → root types by name.
Content = Mapping[PeerId, Mapping[str, Any]]

NAMES = ("spec", "roster", "commits", "metrics", "bans")


def run_document(name: str, run: bytes, founder: PeerId) -> DocumentSpec:
    """The document ``name`` of a run. Raises :class:`ConfigError` for a name that is none of :data:`NAMES`."""
    if name not in NAMES:
        raise ConfigError(f"a run has no document {name!r}; it has {', '.join(NAMES)}")
    return DocumentSpec(name, run, Owner(founder) if name == "spec" else Members("of the run"))


def run_documents(run: bytes, founder: PeerId) -> dict[str, DocumentSpec]:
    """All documents of a run, by name."""
    return {name: run_document(name, run, founder) for name in NAMES}


# --- shapes -----------------------------------------------------------------------------------------------------------


def _dict(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float | None:
    """A finite number, None for anything else. (An integer and a float of the same value are the same in a
    document.)
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _count(value: Any) -> int | None:
    """A whole number from 0 on, None for anything else."""
    number = _number(value)
    return int(number) if number is not None and number.is_integer() and 0 <= number < 1 << 62 else None


def _text(value: Any) -> str:
    return printable(value, defaults.MAX_DOCUMENT_TEXT) if isinstance(value, str) else ""


def _peer(value: Any) -> PeerId | None:
    try:
        return PeerId.parse(value) if isinstance(value, str) and len(value) == 52 else None
    except ConfigError:
        return None


# --- spec -------------------------------------------------------------------------------------------------------------


def spec_entry(signed: SignedSpec) -> dict[str, Any]:
    spec = signed.open()
    return {"spec": pack(signed), "task": spec.task, "strategy": spec.strategy, "mode": spec.mode}


def read_spec(content: Content, run: bytes) -> SignedSpec | None:
    """The run's spec, if somebody wrote down the one whose hash is ``run``."""
    for roots in content.values():
        data = _dict(roots.get("run")).get("spec")
        if not isinstance(data, bytes):
            continue
        try:
            signed = unpack(SignedSpec, data)
            if signed.run_id == run:
                signed.open()
                return signed
        except DecodeError:
            continue
    return None


# --- roster -----------------------------------------------------------------------------------------------------------


@attrs.frozen
class Present:
    """A member's own word. ``joined``, ``seen``: Unix seconds of its clock; ``beat``: seconds until it says so again.

    ``state``: ``training``, ``finished`` or ``left``. ``round``: the last one it committed.
    """

    peer: PeerId
    joined: float
    seen: float
    beat: float
    round: int
    version: str
    state: str

    def alive(self, wall: float) -> tuple[bool, str]:
        """Is it there, at Unix time ``wall``? Returns (decision, reason)."""
        if self.state == "left":
            return False, "said goodbye"
        ago = wall - self.seen
        if ago < -defaults.BEAT_SLACK:
            return False, "its clock is ahead"
        allowed = defaults.BEATS_MISSED * self.beat + defaults.BEAT_SLACK
        return (ago <= allowed, "heard of lately" if ago <= allowed else f"silent for {ago:.0f} s")


def read_roster(content: Content) -> list[Present]:
    """Everybody who said that it takes part, by peer."""
    found = []
    for peer in sorted(content):
        entry = _dict(content[peer].get("entry"))
        joined, seen, beat = (_number(entry.get(key)) for key in ("joined", "seen", "beat"))
        round = _count(entry.get("round"))
        if joined is None or seen is None or beat is None or round is None or not 0 < beat <= defaults.MAX_BEAT:
            continue
        state = _text(entry.get("state"))
        found.append(Present(peer, joined, seen, beat, round, _text(entry.get("version")), state))
    return found


# --- commits ----------------------------------------------------------------------------------------------------------


@attrs.frozen
class CommitNote:
    """A round as ``writer`` noted it. ``members``: who contributed, at most the first ones of ``count``.

    ``digest``, ``certificate``: the first 16 hex digits of hashes; whoever doubts them asks a member for the record.
    ``record``: packed, of a round that gathered bytes.
    """

    writer: PeerId
    round: int
    branch: int
    at: float
    digest: str
    members: tuple[PeerId, ...]
    count: int
    samples: int
    total: int
    certificate: str
    record: bytes = b""

    def entry(self) -> dict[str, Any]:
        known = {"record": self.record} if self.record else {}
        return {
            "round": self.round,
            "branch": self.branch,
            "at": self.at,
            "digest": self.digest,
            "members": [member.text for member in self.members],
            "count": self.count,
            "samples": self.samples,
            "total": self.total,
            "certificate": self.certificate,
            **known,
        }

    @property
    def key(self) -> str:
        return f"{self.round}.{self.digest}"


def writers(digest: bytes, members: Sequence[PeerId]) -> list[PeerId]:
    """In which order the members of a round are to write it down: the first does, the second if the first does not.

    Rendezvous hashing, so that the work is shared and needs no word.
    """
    return sorted(members, key=lambda peer: hashlib.blake2b(peer.key, key=digest, digest_size=16).digest())


def read_commits(content: Content) -> list[CommitNote]:
    """All rounds that were written down, by round; what several wrote of one commit counts once."""
    found: dict[tuple[int, str], CommitNote] = {}
    for writer in sorted(content):
        entries = _dict(content[writer].get("commits"))
        for key in sorted(entries)[: 2 * defaults.COMMITS_KEPT]:
            entry = _dict(entries[key])
            round, branch, count, samples, total = (
                _count(entry.get(name)) for name in ("round", "branch", "count", "samples", "total")
            )
            at = _number(entry.get("at"))
            if round is None or branch is None or count is None or samples is None or total is None or at is None:
                continue
            named = entry.get("members")
            listed = named[: defaults.COMMIT_MEMBERS] if isinstance(named, list) else []
            members = tuple(peer for peer in map(_peer, listed) if peer is not None)
            digest, certificate = _text(entry.get("digest"))[:16], _text(entry.get("certificate"))[:16]
            data = entry.get("record")
            record = data if isinstance(data, bytes) and len(data) <= defaults.NOTE_RECORD else b""
            note = CommitNote(writer, round, branch, at, digest, members, count, samples, total, certificate, record)
            found.setdefault((round, digest), note)
    return [found[key] for key in sorted(found)]


def read_ledger(content: Content, known: Collection[bytes] = ()) -> dict[bytes, CommitRecord]:
    """The records in what was written down, by digest, but those ``known``. Nothing proves them but that others name
    their digest."""
    from .rounds.messages import CommitRecord  # loads torch

    found: dict[bytes, CommitRecord] = {}
    seen = {digest.hex()[:16] for digest in known}
    for note in read_commits(content)[-defaults.LEDGER_RECORDS :]:
        if not note.record or note.digest in seen:
            continue
        try:
            record = unpack(CommitRecord, note.record)
        except DecodeError:
            continue
        found[record.digest] = record
    return found


# --- metrics ----------------------------------------------------------------------------------------------------------


@attrs.frozen
class Point:
    """What one member measured in one round. ``at``: Unix seconds; ``metric``: of the task, None when not evaluated."""

    round: int
    at: float
    loss: float | None
    metric: float | None
    samples: int

    def entry(self) -> list[Any]:
        return [self.at, self.loss, self.metric, self.samples]


@attrs.frozen
class History:
    """One member's points, by round."""

    peer: PeerId
    metric_name: str
    points: tuple[Point, ...]


def thin(rounds: Sequence[int], keep: int = defaults.POINTS_KEPT) -> list[int]:
    """Which of ``rounds`` (ascending) to leave out when there are more than ``keep``: every second one of the older
    half.

    Done again and again, the history stays bounded and gets coarser the further back it goes; the first one stays.
    """
    if len(rounds) <= keep:
        return []
    return list(rounds[1 : len(rounds) // 2 : 2])


def read_metrics(content: Content) -> list[History]:
    """All histories, by peer."""
    found = []
    for peer in sorted(content):
        entries = _dict(content[peer].get("points"))
        points: dict[int, Point] = {}
        for key, entry in list(entries.items())[: 2 * defaults.POINTS_KEPT]:
            if not key.isascii() or not key.isdigit() or len(key) > 18 or not isinstance(entry, list):
                continue
            if len(entry) != 4:
                continue
            at, samples = _number(entry[0]), _count(entry[3])
            if at is not None and samples is not None:
                points[int(key)] = Point(int(key), at, _number(entry[1]), _number(entry[2]), samples)
        name = _text(_dict(content[peer].get("about")).get("metric"))
        if points:
            found.append(History(peer, name, tuple(points[round] for round in sorted(points))))
    return found


# --- bans -------------------------------------------------------------------------------------------------------------


@attrs.frozen
class Ban:
    """A peer against whom there is a proof, checked. ``by``: who wrote it down, in ascending order. ``lied``: as an
    owner of a slice in a round, for which it also loses its membership."""

    peer: PeerId
    reason: str
    by: tuple[PeerId, ...]
    lied: bool = False


def ban_entry(proof: Evidence | Lie) -> bytes:
    return pack(proof)


def _forked(evidence: Evidence) -> str:
    first, second = evidence.first, evidence.second
    return (
        f"signed two histories: envelopes {first.counter} ({first.id.hex()[:8]}) and {second.counter} "
        f"({second.id.hex()[:8]}) contradict each other"
    )


#: Where an author writes its proofs of forks, and of lies.
FORKS, LIES = "bans", "lies"


class BanReader:
    """Reads bans and checks each proof once. ``documents``: ids of those whose forks count.

    ``run``, ``aggregator``: of the run whose rounds are lied about. Proofs of forks are small and come first, so that
    nobody pays for more than :data:`defaults.MAX_LIES` others of one author.
    """

    def __init__(self, documents: Sequence[bytes], run: bytes = b"", aggregator: str = "mean") -> None:
        self._documents, self._run, self._aggregator = dict.fromkeys(documents), run, aggregator
        self._checked: dict[bytes, tuple[PeerId, str] | None] = {}

    def _check(self, root: str, data: bytes) -> tuple[PeerId, str] | None:
        key = hashlib.blake2b(data, digest_size=32, person=root.encode()).digest()
        if key not in self._checked:
            try:
                self._checked[key] = self._fork(data) if root == FORKS else self._lie(data)
            except DecodeError:
                self._checked[key] = None
            if len(self._checked) > defaults.PROOFS_CHECKED:
                del self._checked[next(iter(self._checked))]
        return self._checked[key]

    def _fork(self, data: bytes) -> tuple[PeerId, str]:
        evidence = unpack(Evidence, data, limit=defaults.MAX_EVIDENCE)
        if evidence.first.document not in self._documents:
            raise DecodeError("evidence about a document of another run")
        evidence.check()
        return evidence.author, _forked(evidence)

    def _lie(self, data: bytes) -> tuple[PeerId, str]:
        from .aggregate.names import resolve  # these load torch, and there is rarely a lie
        from .rounds.lies import Lie

        lie = unpack(Lie, data, limit=defaults.MAX_LIE)
        try:
            lie.check(self._run, resolve(self._aggregator))
        except ConfigError as error:
            raise DecodeError(str(error)) from None
        return lie.owner, lie.reason

    def read(self, content: Content) -> list[Ban]:
        """The bans that count, by peer."""
        found: dict[PeerId, Ban] = {}
        for author in sorted(content):
            for root, most in ((FORKS, defaults.MAX_BANS), (LIES, defaults.MAX_LIES)):
                entries = _dict(content[author].get(root))
                for name in sorted(entries)[:most]:
                    data, peer = entries[name], _peer(name)
                    proven = self._check(root, data) if isinstance(data, bytes) and peer is not None else None
                    if proven is None or proven[0] != peer:
                        continue
                    before = found.get(peer)
                    if before is None:
                        found[peer] = Ban(peer, proven[1], (author,), root == LIES)
                    else:
                        by = before.by if author in before.by else (*before.by, author)
                        found[peer] = attrs.evolve(before, by=by, lied=before.lied or root == LIES)
        return [found[peer] for peer in sorted(found)]
