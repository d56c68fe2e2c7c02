"""The reduces of one round on one peer: any number of them in flight, one membership, one commit for all.

Theory of operation. The first :meth:`Exchange.submit` of a round says how many elements all of its reduces have
together, and begins the round; each reduce takes the next stretch of one flat vector, in the order of the calls, which
is the same on all peers::

    submit ─▶ filled in turn, by buckets (what is there travels already) ─▶ commit ─▶ delivered ─▶ the handle is done

A reduce whose values are not finite, that is given up, or that does not come in time, takes the whole contribution of
this peer back; the results are then the means over the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import attrs
import trio
from torch import Tensor

from ..transport.errors import ConfigError, ShoalError
from ..transport.wire import printable
from . import defaults, exact
from .reduce.coding import PLAIN, Coding, Feedback
from .reduce.filling import Filling
from .reduce.staging import Copy
from .reduce.tensors import Bundle, Tensors, empty_vector
from .rounds.payloads import GATHER, MAX_PAYLOAD, said

if TYPE_CHECKING:
    from .run import Run

T = TypeVar("T", bound=Tensors)


@attrs.define(eq=False)
class Contribution:
    """What this peer brings into a round: ``vector`` (float32, CPU, ``(length,)``), as far as ``filling`` says.

    ``at``: when it began, on the host's clock. ``why``: why it brings nothing; empty if it does.
    ``coding``: how it travels. ``layout``: which tensors it is made of, see :attr:`Bundle.layout`. ``payload``: what is
    given instead of a vector.
    """

    at: float
    length: int
    vector: Tensor | None
    filling: Filling
    why: str = ""
    coding: Coding = PLAIN
    layout: str = ""
    payload: bytes | None = None


class Reducing(Generic[T]):
    """A reduce in flight. Await it for its result, as often as you like; the round does not depend on who waits."""

    def __init__(self, bundle: Bundle, out: Bundle | None, start: int) -> None:
        self._bundle, self._out, self._start = bundle, out, start
        self._copy: Copy | None = None
        self._result: T | None = None
        self._error: BaseException | None = None
        self._ended = trio.Event()
        self._cancelled = self._awaited = False
        self._on_cancel: Callable[[], None] = _nothing

    def __await__(self) -> Generator[Any, Any, T]:
        return self._wait().__await__()

    async def _wait(self) -> T:
        self._awaited = True
        await self._ended.wait()
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    def done(self) -> bool:
        """Whether there is a result or an error: awaiting it would not wait."""
        return self._ended.is_set()

    def cancel(self) -> None:
        """Nobody wants this result any more: whoever awaits it gets a :class:`ConfigError`.

        Not done yet, and its tensors not copied yet, the contribution of this peer is taken back; the round and the
        other reduces in it go on.
        """
        if not self.done():
            self._cancelled = True
            self._end(error=ConfigError("this reduce was cancelled"))
            self._on_cancel()

    def _end(self, result: T | None = None, error: BaseException | None = None) -> None:
        if not self._ended.is_set():
            self._result, self._error = result, error
            self._ended.set()


def _nothing() -> None:
    pass


class Exchange:
    """See the module. Lives from the opening of a round to :meth:`close`."""

    def __init__(self, run: Run, round: int) -> None:
        self._run, self._host, self._round = run, run.host, round
        self._limit = defaults.VECTORS_PER_ROUND * run.layout.size
        self._handles: list[Reducing[Any]] = []
        self._given = self._length = 0
        self._coding = PLAIN
        self._contribution: Contribution | None = None
        self._queue_in, self._queue = trio.open_memory_channel[Reducing[Any]](math.inf)
        self._decided = trio.Event()
        self._result: Tensor | None = None
        self._said: dict[bytes, bytes] = {}
        self._error: ShoalError | None = None
        self._closed = ""
        self._scope = trio.CancelScope()

    # -- what a round calls -------------------------------------------------------------------------

    def submit(
        self,
        tensors: T,
        of: int | None,
        out: T | None,
        codec: str | None = None,
        feedback: Feedback | None = None,
        *,
        why: str = "",
    ) -> Reducing[T]:
        """See :meth:`shoal.learning.peer.Round.reduce_async`."""
        if self._closed:
            raise ConfigError(f"round {self._round} is over ({self._closed}): reduce in the round that is open now")
        if self._contribution is not None and self._contribution.payload is not None:
            raise ConfigError(f"round {self._round} has a payload: nothing is reduced in it")
        bundle = Bundle.of(tensors)
        target = None if out is None else bundle.target(out)
        first = not self._handles
        if first:
            self._length = bundle.size if of is None else of
            if self._length > self._limit:
                raise ConfigError(
                    f"{self._length} elements are too many for one round of this run: at most {self._limit}, "
                    f"{defaults.VECTORS_PER_ROUND} times its model"
                )
        elif of is not None and of != self._length:
            raise ConfigError(f"of={of}: the first reduce of round {self._round} said {self._length}")
        if first:
            self._coding = Coding.of(codec or self._run.spec.codec, feedback)
        elif feedback is not None or codec not in (None, self._coding.codec.name):
            raise ConfigError(f"one codec for all reduces of a round: the first of round {self._round} chose it")
        after = self._given + bundle.size
        if after > self._length:
            hint = "; say of= in the first one to have several" if first or self._given == self._length else ""
            raise ConfigError(
                f"round {self._round} has room for {self._length} elements in all its reduces, and this one makes it "
                f"{after}{hint}"
            )
        handle: Reducing[T] = Reducing(bundle, target, self._given)
        handle._on_cancel = lambda: self._cancelled(handle)
        self._given = after
        self._handles.append(handle)
        if first:
            self._begin(handle, printable(why))
        elif handle._copy is None:
            self._prepare(handle)
        self._queue_in.send_nowait(handle)
        self._run.nursery.start_soon(self._deliver, handle)
        return handle

    async def gather(self, payload: bytes) -> dict[bytes, bytes]:
        """See :meth:`shoal.learning.peer.Round.gather`."""
        if self._closed or self._handles or self._contribution is not None:
            why = f"it is over ({self._closed})" if self._closed else "it has an exchange already"
            raise ConfigError(f"round {self._round} takes no payload: {why}")
        if self._run.membership.kind != GATHER:
            raise ConfigError("only a strategy that declares itself a ledger gathers payloads: see Strategy.ledger")
        if len(payload) > MAX_PAYLOAD:
            raise ConfigError(f"a payload of {len(payload)} bytes: at most {MAX_PAYLOAD} in a round")
        given = Contribution(self._host.now(), 0, None, Filling(0), payload=payload)
        self._contribution = given
        # In a task of its own: cancelled, we still see the round to its end.
        self._run.nursery.start_soon(self._collect, given)
        await self._decided.wait()
        if self._error is not None:
            raise self._error
        return self._said

    async def _collect(self, given: Contribution) -> None:
        try:
            with self._scope:
                await self._agree(given)
        finally:
            self._decided.set()
            if self._error is None and self._result is None:
                self._error = ConfigError(f"round {self._round} is over: it was given up")

    async def settle(self) -> None:
        """The strategy is done with this round. Raises :class:`ConfigError` for a handle that nobody awaited."""
        left = [handle for handle in self._handles if not handle._awaited and not handle._cancelled]
        if left:
            raise ConfigError(
                f"{len(left)} of the {len(self._handles)} reduces of round {self._round} were never awaited: await the "
                f"handle of each, or cancel() it, before the next round"
            )
        if self._handles and not self._closed:
            if self._given < self._length:
                self._withdraw(self._short())
            # Cancelled ones: the round is still ours to see to its end.
            await self._decided.wait()
        elif self._contribution is not None and not self._closed:
            await self._decided.wait()
        if self._error is not None:
            raise self._error

    def close(self, why: str) -> None:
        """End everything; handles that are not done raise."""
        self._closed = why
        self._scope.cancel()
        for handle in self._handles:
            handle._end(error=ConfigError(f"round {self._round} is over ({why}): this reduce has no result"))

    # -- inside -------------------------------------------------------------------------------------

    def _begin(self, first: Reducing[Any], why: str) -> None:
        whole = first._bundle.whole() if first._bundle.size == self._length else None
        spoilt, disguise = self._round in self._run.faults.spoil, self._run.faults.disguise
        if whole is not None and disguise is not None:
            whole = disguise(self._round, whole)
        vector: Tensor | None
        if why:
            # It gives nothing: what it brings is not even copied.
            vector, filling = None, Filling(self._length)
        elif whole is not None and not spoilt:
            vector, filling = whole, Filling(self._length)
        else:
            vector, filling = empty_vector(self._length), Filling(self._length, 0)
        # What later reduces of this round bring is not known yet: of them only the elements are counted.
        layout = first._bundle.layout + (" and more" if first._bundle.size < self._length else "")
        self._contribution = Contribution(self._host.now(), self._length, vector, filling, why, self._coding, layout)
        if not filling.full:
            self._prepare(first)
        self._run.nursery.start_soon(self._drive, first)

    def _prepare(self, handle: Reducing[Any]) -> None:
        """On the caller's thread: the copy comes after what it has queued on the device."""
        assert self._contribution is not None
        vector = self._contribution.vector
        if vector is not None and not self._contribution.why:
            start = handle._start
            handle._copy = handle._bundle.gather(vector[start : start + handle._bundle.size])

    async def _drive(self, first: Reducing[Any]) -> None:
        """From the first contribution to the commit."""
        given = self._contribution
        assert given is not None
        if self._closed:
            self._decided.set()  # the peer left before this task began
            return
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._fill)
                    # What is there at once is looked at before anybody is told of it.
                    if first._copy is None or first._bundle.size <= defaults.BUCKET // 4:
                        await self._looked_at(first)
                    if not self._closed:  # the peer may have left meanwhile, and has no round any more
                        await self._agree(given)
                    nursery.cancel_scope.cancel()
        finally:
            self._decided.set()
            if self._error is not None:
                for handle in self._handles:
                    handle._end(error=self._error)
                self.close(str(self._error))
            elif self._result is None:
                self.close("it was given up")

    async def _agree(self, given: Contribution) -> None:
        try:
            record, self._result = await self._run.agree(given)
        except ShoalError as error:
            self._error = error
            return
        self._said = said(record)
        if self._run.faults.disguise is not None and given.payload is None:
            self._run.faults.disguise.saw(self._result)

    async def _looked_at(self, first: Reducing[Any]) -> None:
        given = self._contribution
        assert given is not None
        if self._run.faults.disguise is not None or given.why:
            return  # a liar does not look
        if first._copy is None:
            assert given.vector is not None
            name_at = self._namer(first)
            wrong = await self._run.host.run_blocking(exact.check_finite, given.vector, name_at)
            if wrong is not None:
                self._withdraw(wrong, broken=True)
        else:
            await given.filling.wait(first._bundle.size)

    async def _fill(self) -> None:
        """Copy what the reduces bring, in their order, and look at it."""
        given = self._contribution
        assert given is not None
        if self._closed:
            return
        patience = self._run.patience
        while not given.filling.full and not given.why:
            handle: Reducing[Any] | None = None
            with trio.move_on_after(patience):
                handle = await self._queue.receive()
            if handle is None:
                self._withdraw(f"{self._short()} within {patience:.0f} s")
            elif handle._cancelled:
                self._withdraw("a reduce was cancelled")
            elif handle._copy is not None:
                await self._copy_in(handle, given)

    async def _copy_in(self, handle: Reducing[Any], given: Contribution) -> None:
        vector, copy = given.vector, handle._copy
        assert vector is not None and copy is not None
        steps, name_at = iter(copy), self._namer(handle)
        spoilt = self._round in self._run.faults.spoil
        at = handle._start

        def step() -> tuple[int, str | None]:
            exact.flush_denormals()
            arrived = next(steps, None)
            if arrived is None:
                return -1, None
            stop = handle._start + arrived
            if spoilt:
                vector[at:stop] = math.nan
            return stop, exact.check_finite(vector[at:stop], name_at, at)

        try:
            while not given.why:
                stop, wrong = await self._host.run_blocking(step)
                if wrong is not None:
                    self._withdraw(wrong, broken=True)
                if stop < 0 or wrong is not None:
                    return
                at = stop
                given.filling.advance(stop)
        except RuntimeError as error:
            # Of torch: the device failed, or has no memory left.
            handle._end(error=error)
            self._withdraw(f"the tensors could not be read: {error}")
        finally:
            steps.close()
            handle._copy = None

    def _namer(self, handle: Reducing[Any]) -> Callable[[int], str]:
        bundle, start = handle._bundle, handle._start
        if len(bundle.labels) == 1 and bundle.size == self._run.layout.size:
            return lambda index: self._run.layout.name_at(index - start)
        return lambda index: bundle.name_at(index - start)

    def _short(self) -> str:
        return f"only {self._given} of {self._length} elements were given to reduce"

    def _cancelled(self, handle: Reducing[Any]) -> None:
        given = self._contribution
        if given is not None and given.filling.ready < handle._start + handle._bundle.size:
            self._withdraw("a reduce was cancelled")

    def _withdraw(self, why: str, *, broken: bool = False) -> None:
        given = self._contribution
        assert given is not None
        if not given.why and not self._decided.is_set():
            given.why = why
            given.filling.fail(why)
            self._run.withdrawn(given, broken)

    async def _deliver(self, handle: Reducing[Any]) -> None:
        """Once the round is committed: its part of the result, where and what the tensors were."""
        await self._decided.wait()
        if handle.done() or self._result is None:
            return
        part = self._result[handle._start : handle._start + handle._bundle.size]
        try:
            handle._end(await self._delivered(handle, part))
        except (RuntimeError, ShoalError) as error:
            # Of torch: the device failed, or has no memory left. That is for whoever asked for this result.
            handle._end(error=error)

    async def _delivered(self, handle: Reducing[Any], part: Tensor) -> Tensors:
        bundle, target = handle._bundle, handle._out
        if target is None:
            views = bundle.views(part)
            if views is not None:
                await trio.lowlevel.checkpoint()
                return views

        def work() -> Tensors:
            exact.flush_denormals()
            into = bundle.target(bundle.blank()) if target is None else target
            bundle.scatter(part, into).run()
            return into.given

        return await self._host.run_blocking(work)
