"""How a peer learns where a run is, and loads the state: heads, wishes, and state transfer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs
import torch
import trio
from torch import Tensor

from ..transport import deadlines
from ..transport.address import SignedPeerRecord
from ..transport.endpoint import Endpoint
from ..transport.errors import DecodeError, RemoteError, RemoteProtocolError, WaitExpired
from ..transport.identity import PeerId
from ..transport.mux import Priority
from ..transport.rpc import Method
from . import exact
from .digest import tree_digest
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
class AskState:
    """The state after round ``round`` of run ``run``."""

    run: bytes
    round: int


@attrs.frozen
class StateInfo:
    """Names and sizes (fp32 elements) of the vectors of a state, in the order in which they travel, and its digest."""

    round: int
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    digest: bytes


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
DESCRIBE = Method("run.describe", AskState, StateInfo)
STATE = Method("run.state", AskState, Ack, Priority.BULK)
BRANCH = Method("run.branch", AskBranch, BranchSigned)

#: Bytes of a state that are waited for at a time: a holder that stalls is left soon, a slow one is not.
STATE_PIECE = 256 << 10

#: Vectors of a state beside the weights that a joiner accepts, and their size in multiples of the weights'.
MAX_VECTORS = 4096
MAX_STATE_FACTOR = 8


def state_digest(round: int, vectors: Mapping[str, Tensor]) -> bytes:
    """32 bytes that name a state. Blocking."""
    parts: list[tuple[str, memoryview | bytes]] = [("round", round.to_bytes(8, "big"))]
    parts += [(name, bytes_view(vectors[name])) for name in sorted(vectors)]
    return tree_digest(parts)


@attrs.define
class Snapshot:
    """A final state: fp32 CPU vectors by name, never written to again. ``digest`` is set when ``ready``."""

    round: int
    vectors: dict[str, Tensor]
    head: Head
    digest: bytes = b""
    ready: trio.Event = attrs.field(factory=trio.Event)

    def info(self) -> StateInfo:
        names = tuple(sorted(self.vectors))
        return StateInfo(self.round, names, tuple(self.vectors[n].numel() for n in names), self.digest)


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


async def load_state(endpoint: Endpoint, holder: PeerId, run: bytes, round: int, size: int) -> dict[str, Tensor]:
    """The state after ``round`` from ``holder``; ``size``: elements of the weights. Raises :class:`RemoteError`."""
    info = await endpoint.call(holder, DESCRIBE, AskState(run, round))
    sizes = dict(zip(info.names, info.sizes, strict=False))
    if len(info.names) != len(info.sizes) or len(sizes) != len(info.names) or len(sizes) > MAX_VECTORS:
        raise RemoteProtocolError("a state whose list of vectors makes no sense", peer=holder.short)
    if sizes.get("weights") != size or min(sizes.values()) < 0 or sum(sizes.values()) > MAX_STATE_FACTOR * size + 4096:
        raise RemoteProtocolError(f"a state of {sum(sizes.values())} elements for a model of {size}", peer=holder.short)
    vectors = {name: torch.empty(count, dtype=torch.float32) for name, count in sizes.items()}
    link = await endpoint.connect(holder)
    whole = deadlines.call(link.rtt, link.lag, 4 * sum(sizes.values()))
    async with endpoint.stream(holder, STATE, AskState(run, info.round), timeout=whole) as reply:
        for name in info.names:
            view = bytes_view(vectors[name])
            for at in range(0, len(view), STATE_PIECE):
                piece = view[at : at + STATE_PIECE]
                seconds = deadlines.progress(link.rtt, link.lag, len(piece))
                with trio.move_on_after(seconds) as scope:
                    await reply.read_into(piece)
                if scope.cancelled_caught:
                    raise WaitExpired(f"more of the state after {at} bytes of {name}", seconds, peer=holder.short)
        await reply.result()
    for name, vector in vectors.items():
        wrong = exact.check_finite(vector)
        if wrong is not None:
            raise RemoteProtocolError(f"a state with {wrong} in {name}", peer=holder.short)
    return vectors
