"""Downloads a blob from many peers at once: the trio adapter around :mod:`.scheduler`."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeAlias

import attrs
import trio

from ...transport import deadlines
from ...transport.endpoint import Endpoint
from ...transport.errors import (
    LinkClosed,
    LocalError,
    Overloaded,
    PeerUnreachable,
    RemoteError,
    RemoteProtocolError,
    RemoteRefused,
    WaitExpired,
)
from ...transport.identity import PeerId
from ...transport.rpc import Reply
from . import defaults
from .bits import Bits
from .ends import Sink
from .messages import BUSY, CHUNKS, INFO, LEAVES, MISSING, UNKNOWN, AskBlob, AskChunks, AskLeaves, BlobInfo, Sent
from .scheduler import Ask, Cancel, Scheduler
from .tree import Outline, Tree, check_outline, chunk_count, page_count, page_fault

#: Makes the place for a blob once its tree is known and checked.
OpenSink: TypeAlias = Callable[[Tree], Awaitable[Sink]]
#: Looks for further peers that hold the blob.
Find: TypeAlias = Callable[[], Awaitable[Sequence[PeerId]]]
#: What happened, to whom, in words: ``liar``, ``lost``.
Tell: TypeAlias = Callable[[str, PeerId, str], None]


@attrs.frozen
class Fetched:
    """A download that is complete. ``received``: right bytes by peer. ``liars`` and ``lost``: who, and why.

    ``spare``: bytes that came in vain: twice, as the end was asked of several peers, or wrong. ``had``: chunks that
    were here before.
    """

    tree: Tree
    seconds: float
    had: int
    received: tuple[tuple[PeerId, int], ...]
    liars: tuple[tuple[PeerId, str], ...]
    lost: tuple[tuple[PeerId, str], ...]
    spare: int


class Download:
    """One download of ``blob``. ``peers``: to begin with; ``find``: called again and again for more.

    ``accept``: what is wrong with an outline that is the blob's (too large, say), None if nothing. ``tree``: where it
    is known already. ``patience``: seconds without any holder after which it fails.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        blob: bytes,
        open_sink: OpenSink,
        *,
        peers: Sequence[PeerId] = (),
        find: Find | None = None,
        accept: Callable[[Outline], str | None] = lambda outline: None,
        tell: Tell = lambda what, peer, detail: None,
        tree: Tree | None = None,
        patience: float = defaults.PATIENCE,
    ) -> None:
        self._endpoint, self._host, self.blob = endpoint, endpoint.host, blob
        self._open_sink, self._find, self._accept, self._tell = open_sink, find, accept, tell
        self._patience = patience
        self._given = dict.fromkeys(peers)
        self._outline: Outline | None = None if tree is None else tree.outline
        self._tree = tree
        self._pages: dict[int, bytes] = {}
        self._open_pages: list[int] = []
        self._infos: dict[PeerId, BlobInfo] = {}
        self._meeting: dict[PeerId, None] = {}
        self._failures: dict[PeerId, str] = {}
        self._liars: dict[PeerId, str] = {}
        self._received: dict[PeerId, int] = {}
        self._bytes = 0
        self._hope = self._came = 0.0  # when somebody was to bring something, and when something came
        self._sink: Sink | None = None
        self._sched: Scheduler | None = None
        self._scopes: dict[int, trio.CancelScope] = {}
        self._claims: dict[int, int] = {}  # chunk → the request that writes to its final place
        self._scratch: list[bytearray] = []
        self._wake, self._members = trio.Event(), trio.Event()
        self._error: BaseException | None = None

    # -- life --------------------------------------------------------------------------------------------------------

    async def run(self) -> Fetched:
        """Fetch the blob. Cancelled, what the sink has kept stays.

        Raises :class:`PeerUnreachable`, naming each peer and why, when nobody brings the rest for ``patience`` seconds;
        :class:`RemoteProtocolError` when the blob is not acceptable; what the sink raises (a full disk).
        """
        begin = self._hope = self._came = self._host.now()
        had = 0
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                for peer in self._given:
                    self.add(peer)
                nursery.start_soon(self._search)
                sink = await self._prepare()
                had = sink.have.count
                await self._transfer(sink)
                await sink.finish()
            except (LocalError, RemoteError) as error:
                self._error = error
            nursery.cancel_scope.cancel()
        if self._error is not None:
            raise self._error
        assert self._tree is not None
        return Fetched(
            self._tree,
            self._host.now() - begin,
            had,
            tuple(sorted(self._received.items())),
            tuple(sorted(self._liars.items())),
            tuple(sorted(self._failures.items())),
            self._bytes - sum(self._received.values()),
        )

    @property
    def left(self) -> int | None:
        """Chunks still to come; None before the blob's size is known."""
        return None if self._sched is None else self._sched.left

    def add(self, peer: PeerId) -> None:
        """Another peer that may hold the blob. Does not wait."""
        if peer == self._endpoint.peer_id or peer in self._liars or peer in self._meeting:
            return
        if len(self._meeting) < defaults.MAX_HOLDERS:
            if peer not in self._failures and len(self._liars) + len(self._failures) >= defaults.MAX_NAMES:
                # Names are free: those that led nowhere must not keep a holder out. Liars come last.
                names = self._failures or self._liars
                del names[next(iter(names))]
            self._meeting[peer] = None
            self._nursery.start_soon(self._meet, peer)

    async def _search(self) -> None:
        """Look for more holders, and try those again that were lost or had nothing yet, now and then."""
        due = -math.inf
        while True:
            now = self._host.now()
            for peer in self._given:
                self.add(peer)
            if self._find is not None and (now >= due or not self._meeting):
                due = now + defaults.SEARCH_EVERY
                try:
                    for peer in await self._find():
                        self.add(peer)
                except (RemoteError, Overloaded) as error:
                    self._failures.setdefault(self._endpoint.peer_id, f"no search: {error}")
            await trio.sleep(defaults.REFRESH if self._meeting else defaults.SEARCH_AGAIN)

    def _poke(self, *, members: bool = False) -> None:
        """Something happened; ``members``: to holders or pages, not only to chunks."""
        event, self._wake = self._wake, trio.Event()
        event.set()
        if members:
            event, self._members = self._members, trio.Event()
            event.set()

    async def _pause(self, until: float) -> None:
        """Until something happens, or ``until``. Raises when it is hopeless, or a task of ours has failed."""
        now = self._host.now()
        # Holders that say they have it all, and bring nothing, take turns: they are hope for so long only.
        stalled = now >= self._came + defaults.PATIENCE
        if not stalled and (self._scopes or (self._sched is None and self._meeting)):
            self._hope = now
        give_up = self._hope + self._patience
        with trio.move_on_after(max(0.0, min(until, give_up) - now)):
            await self._wake.wait()
        if self._error is not None:
            raise self._error
        if (stalled or not self._scopes) and self._host.now() >= give_up:
            attempts = {**self._failures, **{peer: f"lied: {why}" for peer, why in self._liars.items()}}
            raise PeerUnreachable(
                f"nobody brings {'' if self.left is None else f'the last {self.left} chunks of '}blob "
                f"{self.blob.hex()[:16]}",
                attempts=tuple((peer.short, why) for peer, why in sorted(attempts.items())),
            )

    def _failed(self, peer: PeerId, why: str, *, lied: bool = False) -> None:
        if lied:
            self._failures.pop(peer, None)
            self._liars[peer] = why
        else:
            self._failures[peer] = why
        self._tell("liar" if lied else "lost", peer, why)

    # -- who holds what ----------------------------------------------------------------------------------------------

    async def _meet(self, peer: PeerId) -> None:
        """Ask ``peer`` what it holds, again while that is not all; ends when it is of no use any more."""
        try:
            while True:
                info = self._infos[peer] = await self._ask_info(peer)
                self._failures.pop(peer, None)
                await self._learn_leaves(peer)
                self._admit(peer)
                self._poke()
                if not await self._stay(peer, info):
                    return
        except (RemoteError, Overloaded) as error:
            lied = isinstance(error, RemoteProtocolError)
            why = error.message if isinstance(error, RemoteError) else str(error)
            if lied or self._failures.get(peer) != why:
                self._failed(peer, why, lied=lied)
            if self._sched is not None:
                self._cancel(self._sched.drop(peer, why, lied=lied))
        finally:
            self._meeting.pop(peer, None)
            self._infos.pop(peer, None)
            self._poke(members=True)

    async def _stay(self, peer: PeerId, info: BlobInfo) -> bool:
        """Wait until ``peer`` is not asked any more (False), or may hold more than it did (True)."""
        with trio.move_on_after(math.inf if info.complete else defaults.REFRESH):
            while self._sched is None or peer in self._sched.holders:
                await self._members.wait()
            why = self._sched.lost.get(peer)
            if why is not None:
                self._failed(peer, why)
            return False
        return True

    async def _ask_info(self, peer: PeerId) -> BlobInfo:
        wanted = self._outline is None
        info = await self._endpoint.call(peer, INFO, AskBlob(self.blob, wanted))
        if info.outline is not None:
            check_outline(info.outline, self.blob, peer.short)
            if self._outline is None:
                self._outline, self._came = info.outline, self._host.now()
                self._open_pages = list(range(page_count(info.outline)))
        elif wanted:
            raise RemoteProtocolError("no outline, which was asked for", peer=peer.short)
        assert self._outline is not None
        if not info.complete:
            Bits.decode(info.bits, chunk_count(self._outline))
        return info

    async def _learn_leaves(self, peer: PeerId) -> None:
        """Fetch pages of leaves, together with the other holders, until all are here."""
        outline = self._outline
        assert outline is not None
        while self._tree is None and len(self._pages) < page_count(outline):
            if not self._open_pages:
                await self._members.wait()
                continue
            page = self._open_pages.pop(0)
            try:
                leaves = (await self._endpoint.call(peer, LEAVES, AskLeaves(self.blob, page))).leaves
                fault = page_fault(outline, page, leaves)
                if fault is not None:
                    raise RemoteProtocolError(fault, peer=peer.short)
                self._pages[page], self._came = leaves, self._host.now()
            finally:
                if page not in self._pages:
                    self._open_pages.append(page)
                self._poke(members=True)
        if self._tree is None:
            joined = b"".join(leaves for _, leaves in sorted(self._pages.items()))
            self._tree = Tree(outline, joined, self.blob)

    def _admit(self, peer: PeerId) -> None:
        info = self._infos.get(peer)
        if self._sched is None or self._tree is None or info is None:
            return
        link = self._endpoint.link(peer)
        bits = None if info.complete else Bits.decode(info.bits, len(self._tree))
        self._sched.add(peer, bits, link.rtt if link is not None else 0.0, self._host.now())

    async def _prepare(self) -> Sink:
        while self._tree is None:
            await self._pause(math.inf)
            if self._outline is not None and (why := self._accept(self._outline)) is not None:
                raise RemoteProtocolError(f"blob {self.blob.hex()[:16]} is not what was expected: {why}")
        return await self._open_sink(self._tree)

    # -- the transfer ------------------------------------------------------------------------------------------------

    async def _transfer(self, sink: Sink) -> None:
        self._sink = sink
        wanted = list(sink.have.missing())
        # Each download has an order of its own, so that several at once soon have something for each other.
        self._host.random.shuffle(wanted)
        lag = self._endpoint.lag
        self._sched = sched = Scheduler(sink.tree.chunk_size, wanted, lambda: lag.value(self._host.now()))
        for peer in list(self._infos):
            self._admit(peer)
        self._poke(members=True)
        while not sched.done:
            now = self._host.now()
            for action in sched.poll(now):
                match action:
                    case Ask():
                        self._nursery.start_soon(self._carry, action)
                    case Cancel():
                        self._cancel([action])
            await self._pause(sched.due(now))

    def _cancel(self, cancels: Sequence[Cancel]) -> None:
        for cancel in cancels:
            if cancel.number in self._scopes:
                self._scopes[cancel.number].cancel()

    async def _carry(self, ask: Ask) -> None:
        """One request, from asking to its end."""
        sched, number = self._sched, ask.number
        assert sched is not None
        scope = self._scopes[number] = trio.CancelScope()
        now = self._host.now
        try:
            with scope:
                await self._receive(ask)
            sched.ended(number)
        except RemoteRefused as error:
            if error.code == MISSING:
                self._cancel(sched.lacks(number, now()))
            else:
                pause = defaults.BUSY_PAUSE if error.code == BUSY else 0.0
                self._cancel(sched.failed(number, error.message, now(), pause=pause, lasting=error.code == UNKNOWN))
        except RemoteProtocolError as error:
            self._cancel(sched.lied(number, error.message))
            self._failed(ask.peer, error.message, lied=True)
        except RemoteError as error:
            gone = isinstance(error, LinkClosed | PeerUnreachable)
            self._cancel(sched.failed(number, error.message, now(), lasting=gone))
        except LocalError as error:
            self._error = error
        finally:
            del self._scopes[number]
            self._release(number)
            self._poke(members=True)

    async def _receive(self, ask: Ask) -> None:
        sched, sink, number = self._sched, self._sink, ask.number
        assert sched is not None and sink is not None
        request = AskChunks(self.blob, ask.chunks)
        size = sum(map(sink.tree.chunk_size, ask.chunks))
        link = await self._endpoint.connect(ask.peer)
        whole = deadlines.bulk_phase(defaults.PATIENCE, size, link.rtt, None, link.lag)
        async with self._endpoint.stream(ask.peer, CHUNKS, request, timeout=whole) as reply:
            for chunk in ask.chunks:
                if not sched.needs(number):
                    # The rest has come from elsewhere; leaving breaks the request off.
                    return
                view, scratch = self._place(chunk, number)
                try:
                    await self._read(reply, view, ask, link.rtt, link.lag)
                    await self._take(chunk, view, ask)
                finally:
                    self._release(number)
                    if scratch is not None:
                        self._scratch.append(scratch)
            await reply.result()

    def _place(self, chunk: int, number: int) -> tuple[memoryview, bytearray | None]:
        """Where request ``number`` reads ``chunk`` to: its final place if nobody else does and it is not done yet."""
        assert self._sched is not None and self._sink is not None
        size = self._sink.tree.chunk_size(chunk)
        if self._sched.wants(chunk) and chunk not in self._claims:
            final = self._sink.buffer(chunk)
            if final is not None:
                self._claims[chunk] = number
                return final, None
        scratch = self._scratch.pop() if self._scratch else bytearray(self._sink.tree.outline.chunk)
        return memoryview(scratch)[:size], scratch

    def _release(self, number: int) -> None:
        held = [chunk for chunk, owner in self._claims.items() if owner == number]
        for chunk in held:
            del self._claims[chunk]
        if held:
            self._poke()

    async def _read(self, reply: Reply[Sent], view: memoryview, ask: Ask, rtt: float, lag: float) -> None:
        sched, at = self._sched, 0
        assert sched is not None
        while at < len(view):
            piece = view[at : at + sched.piece(ask.peer)]
            holder = sched.holders.get(ask.peer)
            rate = holder.rate if holder is not None else None
            seconds = deadlines.bulk_phase(defaults.GIVE_UP, len(piece), rtt, rate, lag)
            with trio.move_on_after(seconds) as scope:
                await reply.read_into(piece)
            if scope.cancelled_caught:
                raise WaitExpired(f"more of blob {self.blob.hex()[:8]}", seconds, peer=ask.peer.short)
            at += len(piece)
            self._bytes += len(piece)
            self._came = self._host.now()
            sched.progressed(ask.number, len(piece), self._came)
            if at < len(view):
                self._poke()

    async def _take(self, chunk: int, view: memoryview, ask: Ask) -> None:
        """A chunk was read: check and keep it."""
        sched, sink, number = self._sched, self._sink, ask.number
        assert sched is not None and sink is not None
        owner = self._claims.get(chunk, number)
        if owner != number and sched.wants(chunk):
            # Another request is writing to the final place, more slowly: it must be out of there first.
            if not sink.tree.verify(chunk, view):
                raise RemoteProtocolError(f"chunk {chunk} is not what its hash says", peer=ask.peer.short)
            while (held := self._claims.get(chunk)) is not None:
                self._scopes[held].cancel()
                await self._wake.wait()
        if not sched.wants(chunk):
            sched.skipped(number)
            return
        if owner != number:
            self._claims[chunk] = number
        if not await sink.keep(chunk, view):
            raise RemoteProtocolError(f"chunk {chunk} is not what its hash says", peer=ask.peer.short)
        if sched.wants(chunk):
            self._received[ask.peer] = self._received.get(ask.peer, 0) + len(view)
        self._cancel(sched.arrived(number, chunk, self._host.now()))
        self._poke()
