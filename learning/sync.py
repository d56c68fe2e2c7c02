"""How a peer learns where a run is, and loads the state: heads, wishes, and state transfer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs
import torch
import trio
from torch import Tensor

from ..dht.blobs.ends import MemorySink, Sink
from ..dht.blobs.fetch import Fetched, Tell
from ..dht.blobs.node import Blobs
from ..dht.blobs.tree import Buffer, Outline, Part, Tree, build_tree
from ..transport.address import SignedPeerRecord
from ..transport.endpoint import Endpoint
from ..transport.errors import DecodeError, RemoteError, RemoteProtocolError
from ..transport.identity import PeerId
from ..transport.rpc import Method
from . import defaults, exact
from .rounds.messages import Certificate, CommitRecord, instance_key, verify_certificate
from .rounds.methods import Ack
from .rounds.terms import accepts_needed
from .spec import SignedSpec
from .state import bytes_view
from .store import Head


@attrs.frozen
class AskHead:
    """Where is run ``run``?"""

    run: bytes


@attrs.frozen
class Seen:
    """A member of a gossip swarm and the round it was last heard to be in."""

    peer: PeerId
    round: int


@attrs.frozen
class HeadInfo:
    """Where a run is, according to one peer: its last commit with proof, and the state it holds.

    ``contacts``: records of some of the roster. ``settled``: the round after which the sender's state is final, with
    its ``digest``. ``view``: the members it knows, in a gossip swarm.
    """

    spec: SignedSpec
    record: CommitRecord
    certificate: Certificate
    voters: tuple[PeerId, ...]
    contacts: tuple[SignedPeerRecord, ...]
    settled: int
    digest: bytes
    view: tuple[Seen, ...]

    def head(self) -> Head:
        return Head(self.record, self.certificate, self.voters)


@attrs.frozen
class Wish:
    """The sender (known from the link) wishes to join run ``run``, or to ``leave`` it."""

    run: bytes
    leave: bool
    contact: SignedPeerRecord


@attrs.frozen
class View:
    """What a member of a gossip swarm knows of the others; answered in kind."""

    run: bytes
    seen: tuple[Seen, ...]
    contacts: tuple[SignedPeerRecord, ...]


@attrs.frozen
class AskBranch:
    """Go on together as a branch: sign ``record``, whose roster are its voters."""

    record: CommitRecord


@attrs.frozen
class BranchSigned:
    signature: bytes


HEAD = Method("run.head", AskHead, HeadInfo)
WISH = Method("run.wish", Wish, Ack)
VIEW = Method("run.view", View, View)
BRANCH = Method("run.branch", AskBranch, BranchSigned)


def state_parts(round: int, vectors: Mapping[str, Tensor]) -> list[tuple[str, str, Buffer]]:
    """A state as the parts of a blob: the round, then the vectors by name."""
    parts: list[tuple[str, str, Buffer]] = [("round", "U8", round.to_bytes(8, "big"))]
    return parts + [(name, "F32", bytes_view(vectors[name])) for name in sorted(vectors)]


def state_digest(round: int, vectors: Mapping[str, Tensor]) -> bytes:
    """32 bytes that name a state: the id of its blob. Blocking."""
    return build_tree(state_parts(round, vectors)).id


def check_head(info: HeadInfo, run: bytes, gossip: bool) -> str | None:
    """None when ``info`` is of this run and its commit is proven by its voters; else what is wrong."""
    record = info.record
    if info.spec.run_id != run or record.run != run:
        return "it is about another run"
    if not 1 <= len(record.roster) <= 4096 or len(info.voters) > 4096 or len(info.contacts) > 64:
        return "its lists are too long"
    if gossip and record.kind == "genesis" and record.round == 0 == record.total and info.settled <= 0:
        # Claims nothing that the spec does not say: in a gossip swarm everybody begins from the same weights.
        return None
    if info.certificate.key != instance_key(run, record.round, record.prev, info.voters):
        return "its certificate is of another round"
    founder = info.spec.open().founder
    if record.kind in ("genesis", "enrol") and info.voters != (founder,):
        return "its founding record is not the founder's"
    needed = accepts_needed(len(info.voters), gossip)
    return verify_certificate(record, info.certificate, info.voters, needed)


async def ask_heads(
    endpoint: Endpoint, run: bytes, peers: Sequence[PeerId], gossip: bool, timeout: float
) -> dict[PeerId, HeadInfo]:
    """Ask ``peers`` in parallel where the run is; those that answer soundly, in the order of ``peers``."""
    found: dict[PeerId, HeadInfo] = {}

    async def ask(peer: PeerId) -> None:
        try:
            info = await endpoint.call(peer, HEAD, AskHead(run), timeout=timeout)
            if check_head(info, run, gossip) is None:
                found[peer] = info
                for contact in info.contacts:
                    endpoint.learn(contact)
        except (RemoteError, DecodeError):
            return

    with trio.move_on_after(timeout):
        async with trio.open_nursery() as nursery:
            for peer in peers:
                nursery.start_soon(ask, peer)
    return {peer: found[peer] for peer in peers if peer in found}


def agreed_digest(infos: Mapping[PeerId, HeadInfo], head: Head) -> tuple[bytes | None, tuple[PeerId, ...], str]:
    """The digest of the state after ``head`` that most of its holders report, those holders, and the reason.

    Only voters of that commit and of the next round have a say: anybody else can copy a head.
    """
    reports: dict[bytes, list[PeerId]] = {}
    for peer, info in infos.items():
        if peer not in head.voters and peer not in head.record.roster:
            continue
        if info.record == head.record and info.settled == head.record.round and info.digest:
            reports.setdefault(info.digest, []).append(peer)
    if not reports:
        return None, (), "waiting for the members to settle the state of the last round"
    digest, holders = max(reports.items(), key=lambda item: (len(item[1]), item[0]))
    total = sum(len(peers) for peers in reports.values())
    if 2 * len(holders) <= total:
        return None, (), f"holders of the state disagree: {len(reports)} different digests of {total} peers"
    return digest, tuple(holders), f"{len(holders)} of {total} holders agree"


def state_fault(outline: Outline, size: int) -> str | None:
    """What is wrong with a blob as a state of a model of ``size`` elements; None when it may be one."""
    parts = outline.parts
    if not parts or parts[0] != Part("round", "U8", 8) or len(parts) > defaults.MAX_VECTORS:
        return f"{len(parts)} parts that are no state"
    sizes = {part.label: part.size for part in parts[1:]}
    if any(part.kind != "F32" for part in parts[1:]) or sizes.get("weights") != 4 * size:
        return f"a state for another model than one of {size} elements"
    if sum(sizes.values()) > defaults.MAX_STATE_FACTOR * 4 * size + 16384:
        return f"a state of {sum(sizes.values())} bytes for a model of {size} elements"
    return None


class StateBuffers:
    """Where a state goes that is loaded: one fp32 vector per part, allocated once its outline is checked."""

    def __init__(self, size: int) -> None:
        self._size, self._round = size, bytearray(8)
        self.vectors: dict[str, Tensor] = {}

    def fault(self, outline: Outline) -> str | None:
        return state_fault(outline, self._size)

    async def open(self, tree: Tree) -> Sink:
        self.vectors = {p.label: torch.empty(p.size // 4, dtype=torch.float32) for p in tree.outline.parts[1:]}
        views = [memoryview(self._round), *map(bytes_view, self.vectors.values())]
        return MemorySink(tree, views)

    @property
    def round(self) -> int:
        return int.from_bytes(self._round, "big")

    def check(self) -> str | None:
        """What is wrong with the numbers; None when they are a state."""
        for name, vector in self.vectors.items():
            wrong = exact.check_finite(vector)
            if wrong is not None:
                return f"{wrong} in {name}"
        return None


async def load_state(
    blobs: Blobs, digest: bytes, round: int, size: int, holders: Sequence[PeerId], tell: Tell
) -> tuple[dict[str, Tensor], Fetched]:
    """The state after ``round`` whose digest is ``digest``, bit for bit, from all ``holders`` at once.

    ``size``: elements of the weights. ``tell``: who of them was lost or lied, and why. Raises :class:`RemoteError` when
    nobody brings it, or when it is no state that we can go on from.
    """
    buffers = StateBuffers(size)
    done = await blobs.fetch(
        digest,
        buffers.open,
        peers=holders,
        search=False,
        accept=buffers.fault,
        tell=tell,
        patience=defaults.STATE_PATIENCE,
    )
    wrong = await blobs.host.run_blocking(buffers.check)
    if wrong is not None or buffers.round != round:
        raise RemoteProtocolError(f"the agreed state has {wrong or f'round {buffers.round} instead of {round}'}")
    return buffers.vectors, done


def describe_load(done: Fetched, digest: bytes) -> str:
    """How a state came, for people."""
    peers = f"{len(done.received)} peer{'' if len(done.received) == 1 else 's'}"
    return f"in {done.seconds:.2f} s from {peers}, digest {digest.hex()[:16]}"
