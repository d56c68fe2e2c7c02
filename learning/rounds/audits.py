"""Audits of one round on one peer: marks what it sends, signs what it combines, and looks at what others combined.

Theory of operation. Each peer, once it holds the result and before it says so, draws slices for itself, with
randomness that nobody else knows, and of each a part. It asks the owner for everybody's contribution to that part (or,
where that does not answer, the contributors), checks their signatures, combines them itself and compares with what the
owner has signed. Since this happens before anything is accepted, a lie that is found never gets into a result; and
since the owner has signed by then, it cannot know who will look where. See docs/audits.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

import trio
from torch import Tensor

from ...transport import deadlines
from ...transport.endpoint import Endpoint
from ...transport.errors import DecodeError, RemoteError, RemoteRefused
from ...transport.identity import PeerId
from ...transport.rpc import Call
from ...transport.wire import pack, unpack
from .. import defaults
from ..aggregate.products import add_triangles, pack_triangle, triangle_size
from ..reduce.buffers import Buffers, Part
from ..reduce.codecs import Codec, resolve
from ..reduce.robust import Given, products_of
from ..state import bytes_view
from .actions import Action, Examine, Look, Measure, Note
from .cases import (
    Case,
    Cut,
    Evidence,
    Finding,
    bytes_of,
    cut_of,
    evidence_fault,
    judge,
    opened,
    part_of,
    parts_owned,
)
from .claims import Proof
from .decisions import shares
from .ledger import Ledger
from .lies import Lie
from .messages import Freeze, Plan
from .methods import PART, AskPart, Opened, Scatter
from .passes import Passes
from .setting import Setting
from .statements import UNMARKED, Combined, Mark, context_of, inputs_of, receipt_bytes
from .statements import products_of as products_name
from .voter import Voter


class Auditor:
    """``feed`` tells the voter of what was found, ``convict`` voter and leader of a liar, ``doubt`` both of an owner
    that does not show a part (plan, index of the slice, number, why). Everything may be cancelled."""

    def __init__(
        self,
        endpoint: Endpoint,
        setting: Setting,
        voter: Voter,
        buffers: Buffers,
        passes: Passes,
        feed: Callable[[Callable[[], Sequence[Action]]], None],
        convict: Callable[[PeerId, str], Sequence[Action]],
        doubt: Callable[[Plan, int, int, str], Sequence[Action]],
    ) -> None:
        self._endpoint, self._host, self._setting, self._voter = endpoint, endpoint.host, setting, voter
        self._buffers, self._passes, self._feed, self._convict, self._doubt = buffers, passes, feed, convict, doubt
        self.me = endpoint.peer_id
        self._proofs_of: dict[PeerId, None] = {}  # whose proof was looked at in this round
        self._shown: dict[PeerId, int] = {}
        self._caught: dict[PeerId, None] = {}  # seen to have lied in this round
        self.ledger = Ledger(endpoint.identity, setting.key, len(setting.voters))

    def audits(self, codec: Codec) -> bool:
        """Whether what travels in ``codec`` is signed: a part of a slice must be a part of its code."""
        return self._setting.audit > 0 and codec.elementwise

    # -- what we sign -------------------------------------------------------------------------------

    async def mark(self, start: int, stop: int, part: Part) -> Mark:
        """Our signature of a part that we send."""
        if not self.audits(part.codec):
            return UNMARKED
        return (await self._passes.run(stop - start, self.ledger.mark, start, stop, part)).mark

    async def take(self, contributor: PeerId, start: int, stop: int, part: Part, mark: Mark) -> str | None:
        """Keep what ``contributor`` signed with its part; what is wrong with that."""
        if not self.audits(part.codec):
            return None
        return await self._passes.run(stop - start, self.ledger.take, contributor, start, stop, part, mark)

    def receipt(self, contributor: PeerId, request: Scatter) -> bytes:
        """Our signature that we have a part; empty where nothing is signed."""
        if not self.audits(resolve(request.codec)):
            return b""
        place = request.start, request.stop, request.codec
        data = receipt_bytes(self._setting.key, *place, contributor, request.mark.root)
        return self._endpoint.identity.sign(data)

    async def sign(self, plan: Plan, members: Sequence[PeerId], decision: bytes, indices: Sequence[int]) -> None:
        """Sign what we have combined."""
        codec, result = resolve(plan.codec), self._buffers.result
        if not self.audits(codec) or result is None:
            return
        context = context_of(members, shares(plan, members)[1], decision)
        generation, products = self.ledger.products
        named = products_name(products) if generation == (plan.attempt, plan.epoch) else b""
        for index in indices:
            start, stop = plan.slices[index].range
            roots = []
            for member in members:
                marked = self.ledger.given.get((member, start, stop, codec.name))
                if marked is None and member == self.me:
                    part = self._buffers.parts[member, start, stop, codec.name]
                    marked = await self._passes.run(stop - start, self.ledger.mark, start, stop, part)
                    self.ledger.given[member, start, stop, codec.name] = marked
                if marked is None:
                    return  # the round is over
                roots.append(marked.mark.root)
            await self._passes.run(
                stop - start, self.ledger.sign, plan, index, context, roots, result[start:stop], codec, named
            )

    async def check(
        self, attempt: int, epoch: int, start: int, stop: int, owner: PeerId, result: Tensor, codec: Codec,
        signed: Combined | None,
    ) -> str | None:  # fmt: skip
        """What is wrong with what ``owner`` has signed of a combined slice that came."""
        if not self.audits(codec):
            return None
        return await self._passes.run(
            stop - start, self.ledger.check, attempt, epoch, start, stop, owner, result, codec, signed
        )

    def signed(self, index: int) -> Combined | None:
        """What the owner of a slice of the present plan has signed, for whoever gets the slice from us."""
        return None if self._voter.plan is None else self.ledger.signed(self._voter.plan, index)

    def products(self, action: Measure, plan: Plan) -> Callable[[], bytes]:
        """What computes our inner products part by part, so that a part can be looked at, and keeps them; it returns
        their sum. Blocking; holds what it needs."""
        codec, name = resolve(plan.codec), plan.codec
        pieces: list[tuple[list[Given], int]] = []
        for index in action.indices:
            start, stop = plan.slices[index].range
            cut = self._cut(stop - start, codec)
            given = [self._buffers.parts[member, start, stop, name] for member in action.members]
            for number in range(cut.parts):
                first, last = cut.part(number)
                pieces.append(([part_of(part, first, last) for part in given], last - first))

        def compute() -> bytes:
            triangles = [pack_triangle(products_of([piece])) for piece in pieces]
            self.ledger.products = (action.attempt, action.epoch), b"".join(triangles)
            return pack_triangle(add_triangles(triangles, len(action.members)))

        return compute

    # -- what we look at ----------------------------------------------------------------------------

    async def examine(self, action: Examine) -> None:
        """Look at what all owners signed, and at parts of some slices. It ends in time for the leader to hear of it."""
        plan, frozen = self._voter.plan, self._voter.frozen
        if plan is None or frozen is None or (plan.attempt, plan.epoch) != (action.attempt, action.epoch):
            return
        codec = resolve(plan.codec)
        others = [i for i, piece in enumerate(plan.slices) if piece.owner != self.me]
        unsigned: tuple[int, ...] = ()
        if self.audits(codec):
            unsigned = tuple(index for index in others if self._case(plan, frozen, index, 0) is None)
            for index in unsigned:
                owner = plan.slices[index].owner
                self._setting.note(Note("gather", "unsigned", "not what its owner signed for this plan", owner))
                self._buffers.filled.pop(index, None)
        if self.audits(codec) and not unsigned and frozen.members and others:
            async with trio.open_nursery() as nursery:
                for index in self._drawn(others):
                    nursery.start_soon(self._look, plan, frozen, index, None, None)
        self._feed(lambda: self._voter.examined(self._host.now(), action.attempt, action.epoch, unsigned))

    def _drawn(self, others: Sequence[int]) -> list[int]:
        whole, rest = divmod(self._setting.audit, 1.0)
        random = self._random()
        count = int(whole) + (random.random() < rest)
        return random.sample(list(others), min(count, len(others)))

    def _random(self) -> Random:
        """What nobody else can know, or guess from what they have seen of us."""
        return Random(self._host.entropy(16))

    async def look(self, action: Look) -> tuple[PeerId | None, str]:
        """Somebody accuses an owner: look there ourselves. Returns the owner if it does not show its work, and why."""
        plan, frozen = self._voter.plan, self._voter.frozen
        if plan is None or frozen is None or (plan.attempt, plan.epoch) != (action.attempt, action.epoch):
            return None, ""
        found = await self._look(plan, frozen, action.index, action.number, action.accuser)
        if found is None or found.verdict != "unanswered":
            return None, ""
        return plan.slices[action.index].owner, found.why

    async def _look(
        self, plan: Plan, frozen: Freeze, index: int, number: int | None, accuser: PeerId | None
    ) -> Finding | None:
        """``number``: of the part; None: it is drawn."""
        case = self._case(plan, frozen, index, number)
        if case is None:
            return None
        owner, found = case.owner, Finding("unanswered", f"{case.owner.short} does not show its work in time")
        with trio.move_on_after(plan.phase(self._setting.pace.gather) / 2):
            found = await self._find(case)
        first = owner not in self._caught
        if found.verdict == "lied":
            self._caught[owner] = None
        if first and (accuser is None or found.verdict == "lied"):
            self._setting.audited(owner, found.verdict, found.why)
        match found.verdict:
            case "lied":
                proof = b""
                if found.lie is not None and len(packed := pack(found.lie)) <= defaults.MAX_LIE:
                    proof = packed
                    self._setting.proven(found.lie)
                if accuser is None:
                    self._feed(
                        lambda: self._voter.accuse(
                            self._host.now(), plan.attempt, plan.epoch, index, case.number, found.why, proof
                        )
                    )
                self._feed(lambda: self._convict(owner, found.why))
            case "passed" if accuser is not None:
                why = f"says falsely that {owner.short} lied in slice {index}"
                self._setting.note(Note("gather", "false-accusation", why, accuser))
                self._setting.slandered(accuser)
            case "unanswered":
                self._setting.note(Note("gather", "unanswered", found.why, owner))
                if accuser is None:
                    self._feed(lambda: self._doubt(plan, index, case.number, found.why))
        return found

    async def proof(self, sender: PeerId, message: Proof) -> None:
        """Somebody sends a proof against an owner, of this round or an earlier one: it is checked, not believed."""
        if sender in self._proofs_of or not self._setting.heeded(sender):
            return
        self._proofs_of[sender] = None
        try:
            lie = unpack(Lie, message.lie, limit=defaults.MAX_LIE)
            await self._host.run_blocking(lie.check, self._setting.run, self._setting.rule)
        except DecodeError as error:
            self._setting.note(Note("gather", "false-accusation", str(error), sender))
            self._setting.slandered(sender)
            return
        # Anybody can make keys that lie in rounds that never were: only of those that we vote with it matters.
        if lie.owner != self.me and lie.owner in self._setting.voters and lie.owner not in self._caught:
            self._caught[lie.owner] = None
            self._setting.proven(lie)
            self._feed(lambda: self._convict(lie.owner, lie.reason))

    def _case(self, plan: Plan, frozen: Freeze, index: int, number: int | None) -> Case | None:
        """None where the owner has not signed for this plan, or there is no such part."""
        found = self.ledger.statement(plan, index)
        weights = shares(plan, frozen.members)[1]
        decision = self._voter.decision
        if found is None or found[0].context != context_of(frozen.members, weights, decision):
            return None
        if self._setting.rule.needs_gram and frozen.members and not found[0].products:
            return None
        start, stop = plan.slices[index].range
        codec = resolve(plan.codec)
        cut = self._cut(stop - start, codec)
        if number is None:
            number = self._random().randrange(cut.parts)
        if not 0 <= number < cut.parts:
            return None
        return Case(plan, frozen, index, number, codec, cut, *found, weights, decision)

    def _cut(self, elements: int, codec: Codec) -> Cut:
        return cut_of(elements, len(self._setting.voters), codec)

    async def _find(self, case: Case) -> Finding:
        evidence, why = await self._from_owner(case)
        if evidence is None:
            evidence, silent = await self._from_members(case)
            why = f"{why}; {silent}"
        if evidence is None:
            return Finding("unanswered", why)
        first, last = case.bounds
        result = self._buffers.result
        if result is None or (case.plan.attempt, case.plan.epoch) != self._buffers.generation:
            return Finding("unanswered", "the round went on")
        start, _ = case.range
        theirs = bytes(bytes_view(result[start + first : start + last]))
        work = (last - first) * len(evidence.parts)
        found = await self._passes.run(work, judge, self._setting, case, evidence, theirs, self._voter.parts)
        shown = not case.signed.products or products_name(evidence.products) == case.signed.products
        if found.verdict == "passed" and not shown:
            return Finding("unanswered", why or f"{case.owner.short} does not show its inner products")
        return found

    async def _from_owner(self, case: Case) -> tuple[Evidence | None, str]:
        products = self._setting.rule.needs_gram and bool(case.signed.products)
        count = len(case.frozen.members)
        size = triangle_size(count) * parts_owned(case.plan, case.owner, len(self._setting.voters)) if products else 0
        try:
            evidence = await self._ask(case, case.owner, count, size, own=False)
        except RemoteError as error:
            return None, f"{case.owner.short} does not show what it combined: {error}"
        return self._checked(
            case, case.frozen.members, evidence, f"what {case.owner.short} shows is not what it signed"
        )

    def _checked(
        self, case: Case, members: Sequence[PeerId], evidence: Evidence, otherwise: str
    ) -> tuple[Evidence | None, str]:
        wrong = evidence_fault(self._setting, case, members, evidence)
        if wrong is None and inputs_of([mark.root for mark in evidence.marks]) != case.signed.inputs:
            wrong = "of other parts"
        return (None, f"{otherwise}: {wrong}") if wrong is not None else (evidence, "")

    async def _from_members(self, case: Case) -> tuple[Evidence | None, str]:
        """Everybody's part from itself: the owner is not needed to find it out."""
        found: dict[PeerId, Evidence] = {}
        silent: list[str] = []

        async def ask(member: PeerId) -> None:
            try:
                evidence = self._own(case) if member == self.me else await self._ask(case, member, 1, 0, own=True)
            except RemoteError as error:
                silent.append(f"{member.short} does not show what it sent: {error}")
                return
            wrong = evidence_fault(self._setting, case, (member,), evidence)
            if wrong is not None:
                silent.append(f"{member.short}: {wrong}")
                return
            found[member] = evidence

        async with trio.open_nursery() as nursery:
            for member in case.frozen.members:
                nursery.start_soon(ask, member)
        if silent:
            return None, "; ".join(silent[:2])
        all_of = [found[member] for member in case.frozen.members]
        evidence = Evidence(
            tuple(each.parts[0] for each in all_of),
            tuple(each.marks[0] for each in all_of),
            tuple(each.paths[0] for each in all_of),
            b"",
        )
        return self._checked(case, case.frozen.members, evidence, "what its contributors show is not what it signed")

    async def _ask(self, case: Case, holder: PeerId, count: int, products: int, *, own: bool) -> Evidence:
        first, last = case.bounds
        size = case.codec.wire_size(last) - case.codec.wire_size(first)
        body = memoryview(bytearray(count * size + products))
        request = AskPart(self._setting.key, case.plan.attempt, case.plan.epoch, *case.range, case.number, own=own)
        link = self._endpoint.link(holder)
        rtt, lag = (0.0, 0.0) if link is None else (link.rtt, link.lag)
        async with self._endpoint.stream(holder, PART, request, timeout=deadlines.call(rtt, lag, len(body))) as reply:
            await reply.read_into(body)
            opened = await reply.result()
        if not len(opened.marks) == len(opened.paths) == count:
            raise RemoteError(f"{len(opened.marks)} parts instead of {count}")
        parts = tuple(body[at * size : (at + 1) * size] for at in range(count))
        return Evidence(parts, opened.marks, opened.paths, bytes(body[count * size :]))

    def _own(self, case: Case) -> Evidence:
        marked = self.ledger.sent.get((*case.range, case.codec.name)) or self.ledger.given.get(
            (self.me, *case.range, case.codec.name)
        )
        if marked is None:
            raise RemoteError("our own part is not here any more")
        return Evidence(*opened(marked, case.cut.level, case.number, *case.bounds), b"")

    # -- what others ask ----------------------------------------------------------------------------

    async def on_part(self, call: Call[AskPart]) -> Opened:
        """Show a part of what we combined, or of what we sent."""
        request, plan, frozen = call.request, self._voter.plan, self._voter.frozen
        if call.peer not in self._setting.voters:
            raise RemoteRefused("not-a-voter", f"{call.peer.short} is no voter of round {self._setting.round}")
        self._shown[call.peer] = self._shown.get(call.peer, 0) + 1
        if self._shown[call.peer] > defaults.MAX_LOOKS:
            raise RemoteRefused("busy", f"{defaults.MAX_LOOKS} looks of one peer in a round are enough")
        if plan is None or frozen is None or (plan.attempt, plan.epoch) != (request.attempt, request.epoch):
            raise RemoteRefused("not-held", f"round {self._setting.round} is elsewhere")
        codec, start, stop = resolve(plan.codec), request.start, request.stop
        mine = [p for p in plan.slices if p.range == (start, stop) and (request.own or p.owner == self.me)]
        if not mine or not self.audits(codec):
            raise RemoteRefused("bad-range", f"elements {start}..{stop} are no slice of ours")
        range = start, stop, codec.name
        ours = self.ledger.sent.get(range) or self.ledger.given.get((self.me, *range))
        found = [ours] if request.own else [self.ledger.given.get((m, *range)) for m in frozen.members]
        shown = [marked for marked in found if marked is not None]
        if len(shown) != len(found):
            raise RemoteRefused("not-held", f"round {self._setting.round}: that is not here any more")
        cut = self._cut(stop - start, codec)
        if not 0 <= request.number < cut.parts:
            raise RemoteRefused("bad-range", f"there is no part {request.number}")
        first, last = cut.part(request.number)
        generation, products = self.ledger.products
        for marked in shown:
            await call.write(bytes_of(marked.part, first, last))
        if not request.own and products and generation == (plan.attempt, plan.epoch):
            await call.write(products)
        return Opened(
            tuple(marked.mark for marked in shown),
            tuple(marked.tree.path(cut.level, request.number) for marked in shown),
        )
