"""Typed calls, one stream each: request, optional body up, optional body down, response or refusal.

On the stream, lengths big-endian::

    caller    u32 length, Head (method, seconds left, body bytes) · u32 length, request · the body's raw bytes · end
    server    any number of BODY parts, then one RESULT or ERROR part · end        part = u8 kind, u32 length, bytes

The seconds left travel with the call: the server cancels its handler when they are over. A caller that gives up resets
the stream, which cancels the handler too. A server that answers before it has read the body stops the stream; the
caller then reads the answer. What goes wrong in a handler travels as a code, never as a traceback:

    unknown_method, bad_request, busy, expired, failed (with the text of a ShoalError), internal (without any)
    and whatever code a handler gives a RemoteRefused of its own.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from enum import IntEnum
from typing import Any, Generic, TypeAlias, TypeVar

import attrs
import trio

from . import deadlines, defaults
from .errors import (
    DecodeError,
    ProtocolMisuse,
    RemoteProtocolError,
    RemoteRefused,
    ShoalError,
    StreamReset,
    WaitExpired,
)
from .frames import Buffer, Priority, ResetCode
from .host import Host
from .identity import PeerId
from .link import Link
from .stream import LinkStream
from .wire import pack, printable, unpack

Q = TypeVar("Q")
R = TypeVar("R")

#: The protocol name of every RPC stream.
PROTOCOL = "shoal-rpc/1"

_LENGTH = struct.Struct(">I")
_PART = struct.Struct(">BI")

log = logging.getLogger(__name__)


class Part(IntEnum):
    BODY = 1
    RESULT = 2
    ERROR = 3


_KINDS = tuple(Part)


@attrs.frozen
class Method(Generic[Q, R]):
    """A callable thing: its name on the wire and the attrs classes that travel. Both sides hold the same constant."""

    name: str
    request: type[Q]
    response: type[R]
    priority: Priority = Priority.CONTROL


@attrs.frozen
class Head:
    """What a server must know before it decodes a request. ``timeout``: seconds left; ``body``: bytes that follow."""

    method: str
    timeout: float
    body: int


@attrs.frozen
class CallError:
    code: str
    message: str


class Call(Generic[Q]):
    """One call, on the server's side. ``deadline`` is on the scale of ``host.now()``."""

    def __init__(self, stream: LinkStream, request: Q, deadline: float, body: int) -> None:
        self.request = request
        self.deadline = deadline
        #: Bytes of body that the caller announced and that are still to be read.
        self.body_left = body
        self._stream = stream

    @property
    def peer(self) -> PeerId:
        return self._stream.peer

    @property
    def link(self) -> Link:
        return self._stream.link

    async def read_into(self, buffer: memoryview) -> None:
        """Fill ``buffer`` with the next bytes of the caller's body.

        Raises :class:`RemoteProtocolError` when the body is shorter. Cancellation ends the call.
        """
        size = buffer.nbytes
        if size > self.body_left:
            raise RemoteProtocolError(f"a body with {self.body_left} bytes left, {size} expected", peer=self.peer.short)
        self.body_left -= size
        await self._stream.read_exactly_into(buffer)

    async def write(self, data: Buffer) -> None:
        """Send bytes to the caller, before the response. ``data`` must not change until this returns."""
        view = memoryview(data).cast("B")
        for at in range(0, len(view), defaults.MAX_BODY_PART):
            part = view[at : at + defaults.MAX_BODY_PART]
            await self._stream.send_all(_PART.pack(Part.BODY, len(part)))
            await self._stream.send_all(part)


Handler: TypeAlias = Callable[[Call[Q]], Awaitable[R]]


class Reply(Generic[R]):
    """The answer to one call, on the caller's side: first its body, then its result."""

    def __init__(self, stream: LinkStream, method: Method[Any, R]) -> None:
        self._stream = stream
        self._method = method
        self._left = 0  # bytes of the current BODY part not yet read
        self._first: tuple[Part, int] | None = None
        self._finished = False

    async def read_into(self, buffer: memoryview) -> None:
        """Fill ``buffer`` with the next bytes of the server's body.

        Raises :class:`RemoteRefused` when the server gives up, :class:`RemoteProtocolError` when its body is shorter.
        """
        view = buffer.cast("B")
        while len(view):
            if not self._left:
                kind, length = await self._part()
                if kind is not Part.BODY:
                    await self._error_or(kind, length)
                    raise RemoteProtocolError(f"a body shorter by {len(view)} bytes than expected", peer=self._peer)
                self._left = length
            n = min(self._left, len(view))
            await self._stream.read_exactly_into(view[:n])
            self._left -= n
            view = view[n:]

    async def result(self) -> R:
        """The response. Raises :class:`RemoteRefused` with the server's code, :class:`RemoteProtocolError`."""
        if self._finished:
            raise ProtocolMisuse("the result of a call is read once")
        kind, length = (Part.BODY, self._left) if self._left else await self._part()
        if kind is Part.BODY:
            raise RemoteProtocolError("its answer has a longer body than was asked for", peer=self._peer)
        await self._error_or(kind, length)
        data = await self._message(length, defaults.MAX_MESSAGE)
        self._finished = True
        return unpack(self._method.response, data)

    @property
    def _peer(self) -> str:
        return self._stream.peer.short

    async def begin(self) -> None:
        """Wait until the answer begins. Raises :class:`RemoteRefused` when it is a refusal."""
        if self._first is None:
            kind, length = await self._part()
            await self._error_or(kind, length)
            self._first = kind, length

    async def _part(self) -> tuple[Part, int]:
        if self._first is not None:
            first, self._first = self._first, None
            return first
        kind, length = _PART.unpack(await self._stream.read_exactly(_PART.size))
        if kind not in _KINDS:
            raise RemoteProtocolError(f"an answer with a part of unknown kind {kind}", peer=self._peer)
        return Part(kind), length

    async def _error_or(self, kind: Part, length: int) -> None:
        if kind is Part.ERROR:
            error = unpack(CallError, await self._message(length, defaults.MAX_CALL_ERROR))
            self._finished = True
            raise RemoteRefused(printable(error.code), printable(error.message, 512), peer=self._peer)

    async def _message(self, length: int, limit: int) -> bytearray:
        if length > limit:
            raise RemoteProtocolError(f"an answer of {length} bytes, at most {limit} allowed", peer=self._peer)
        return await self._stream.read_exactly(length)


@asynccontextmanager
async def exchange(
    link: Link,
    method: Method[Q, R],
    request: Q,
    *,
    body: Sequence[Buffer] | None = None,
    timeout: float,
) -> AsyncIterator[Reply[R]]:
    """One call over ``link``: sends ``request`` and ``body``, yields the :class:`Reply`.

    Leaving the block without having read the result, by an exception or cancellation, cancels the handler on the other
    side. Raises :class:`WaitExpired` when ``timeout`` seconds are over (also inside the block), :class:`LinkClosed`
    as soon as the link is lost, :class:`StreamReset`, :class:`RemoteRefused`, :class:`RemoteProtocolError`.
    """
    views = [memoryview(part).cast("B") for part in body or ()]
    message = pack(request)
    if len(message) > defaults.MAX_MESSAGE:
        raise ProtocolMisuse(f"a request of {len(message)} bytes for {method.name}: bulk travels in the body")
    peer = link.peer.short
    with trio.move_on_after(timeout) as scope:
        # A small call goes out whole in one record: nothing here waits before it is queued.
        await trio.lowlevel.checkpoint_if_cancelled()
        stream = link.try_open_stream(PROTOCOL, method.priority)
        if stream is None:
            stream = await link.open_stream(PROTOCOL, method.priority)
        reply = Reply(stream, method)
        try:
            left = max(0.001, scope.deadline - trio.current_time())
            head = pack(Head(method.name, left, sum(len(view) for view in views)))
            try:
                start = b"".join((_LENGTH.pack(len(head)), head, _LENGTH.pack(len(message)), message))
                if not stream.post(start, end=not views):
                    await stream.send_all(start)
                for view in views:
                    await stream.send_all(view)
                if not stream.ended:
                    await stream.send_eof()
            except StreamReset:
                if not stream.stopped:
                    raise
                # It answered without reading everything; the answer says why.
            yield reply
        except StreamReset as error:
            if error.code == ResetCode.TOO_MANY_STREAMS:
                raise RemoteRefused("busy", "too many streams on this link", peer=peer) from None
            if error.code == ResetCode.UNKNOWN_PROTOCOL:
                raise RemoteRefused("unknown_protocol", "it serves no calls", peer=peer) from None
            raise
        except RemoteRefused as error:
            if error.code == "expired" and reply._finished:
                raise WaitExpired(f"answer to {method.name}", timeout, peer=peer) from None
            raise
        finally:
            if reply._finished:
                stream.close()
            else:
                stream.reset(ResetCode.CANCELLED)
    if scope.cancelled_caught:
        raise WaitExpired(f"answer to {method.name}", timeout, peer=peer)


async def call(
    link: Link, method: Method[Q, R], request: Q, *, body: Sequence[Buffer] | None = None, timeout: float
) -> R:
    """One call without a body in its answer; see :func:`exchange` for errors and cancellation."""
    result: R
    async with exchange(link, method, request, body=body, timeout=timeout) as reply:
        result = await reply.result()
    return result


class RpcServer:
    """Serves the calls that peers make: looks up handlers, holds limits, turns errors into codes."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._handlers: dict[str, tuple[Method[Any, Any], Handler[Any, Any]]] = {}
        self._active: dict[PeerId, int] = {}
        self._total = 0

    def serve(self, method: Method[Q, R], handler: Handler[Q, R]) -> None:
        """Answer calls of ``method`` with ``handler``, which replaces an earlier one."""
        self._handlers[method.name] = (method, handler)

    def active(self, peer: PeerId | None = None) -> int:
        """Calls being served now, of one peer or of all."""
        return self._total if peer is None else self._active.get(peer, 0)

    async def handle(self, stream: LinkStream, scope: trio.CancelScope) -> None:
        """Serve one stream from its opening to its end. ``scope`` is cancelled when the stream breaks; here it holds
        every deadline of the call as well, as each scope more would cost as much as the rest of a small call."""
        peer = stream.peer
        try:
            with scope:
                if stream.protocol != PROTOCOL:
                    stream.reset(ResetCode.UNKNOWN_PROTOCOL)
                    return
                active = self._active.get(peer, 0)
                # However many calls some peers make, every other one still gets a few through.
                crowded = self._total >= defaults.MAX_CALLS and active >= defaults.FAIR_CALLS
                if active >= defaults.MAX_CALLS_PER_PEER or crowded:
                    seconds = deadlines.request_header(stream.link.rtt, stream.link.lag)
                    scope.deadline = trio.current_time() + seconds
                    whose = "your" if active >= defaults.MAX_CALLS_PER_PEER else "other peers'"
                    await self._refuse(stream, "busy", f"{whose} calls use up what is allowed at once")
                    return
                self._active[peer] = active + 1
                self._total += 1
                try:
                    await self._serve(stream, scope)
                finally:
                    self._total -= 1
                    self._active[peer] -= 1
                    if not self._active[peer]:
                        del self._active[peer]
        except (StreamReset, trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the caller has gone; nobody is left to tell
        except RemoteProtocolError as error:
            log.info("%s broke off a call: %s", peer.short, error)
        finally:
            if not stream.ended:  # the last words may still be queued: they must arrive
                stream.reset(ResetCode.CANCELLED)

    async def _serve(self, stream: LinkStream, scope: trio.CancelScope) -> None:
        link, now = stream.link, trio.current_time  # a scope's deadlines are on trio's clock
        seconds = deadlines.request_header(link.rtt, link.lag)
        head: Head | None = None
        scope.deadline = now() + seconds
        try:
            head = unpack(Head, await self._message(stream, defaults.MAX_CALL_HEAD))
        except DecodeError as error:
            await self._refuse(stream, "bad_request", error.message)
            return
        finally:
            if head is None and not stream.ended and not stream.broken and now() >= scope.deadline:
                stream.reset(ResetCode.EXPIRED)
        timeout = min(max(head.timeout, 0.0), defaults.MAX_CALL_TIME)
        scope.deadline = deadline = now() + timeout
        answer: tuple[str, str, bytes] | None = None
        try:
            answer = await self._answer(stream, head, self._host.now() + timeout)
        finally:
            if answer is None and not stream.ended and not stream.broken and now() >= deadline:
                # Cancelled, so this must not wait.
                late = f"{head.method} took more than the {timeout:.1f} s it was given"
                if stream.post(_error_part("expired", late), end=True):
                    stream.stop_receiving()
        code, message, result = answer
        scope.deadline = max(deadline, now()) + seconds
        if code:
            await self._refuse(stream, code, message)
        else:
            await self._finish(stream, _PART.pack(Part.RESULT, len(result)) + result)

    async def _answer(self, stream: LinkStream, head: Head, deadline: float) -> tuple[str, str, bytes]:
        """``(code, message, result)``; an empty code means success."""
        found = self._handlers.get(head.method)
        if found is None:
            return "unknown_method", f"no method {head.method[:64]!r} here", b""
        method, handler = found
        try:
            request = unpack(method.request, await self._message(stream, defaults.MAX_MESSAGE))
        except DecodeError as error:
            return "bad_request", error.message, b""
        try:
            response = await handler(Call(stream, request, deadline, head.body))
            if not isinstance(response, method.response):
                raise ProtocolMisuse(f"the handler of {method.name} returned {type(response).__name__}")
            result = pack(response)
            if len(result) > defaults.MAX_MESSAGE:
                raise ProtocolMisuse(f"the handler of {method.name} returned {len(result)} bytes")
        except RemoteRefused as error:
            return error.code, error.reason, b""
        except ProtocolMisuse:
            log.exception("our handler of %s broke a contract", method.name)
            return "internal", "an error inside the node that was asked", b""
        except ShoalError as error:
            log.info("%s for %s failed: %s", method.name, stream.peer.short, error)
            return "failed", str(error), b""
        except Exception as error:  # boundary: a bug in a handler must not reach the link
            failure = _only_shoal_errors(error)
            if failure is not None:
                return "failed", str(failure), b""
            log.exception("our handler of %s failed for %s", method.name, stream.peer.short)
            return "internal", "an error inside the node that was asked", b""
        return "", "", result

    async def _message(self, stream: LinkStream, limit: int) -> bytearray:
        (length,) = _LENGTH.unpack(await stream.read_exactly(_LENGTH.size))
        if length > limit:
            raise DecodeError(f"a message of {length} bytes, at most {limit} allowed")
        return await stream.read_exactly(length)

    async def _refuse(self, stream: LinkStream, code: str, message: str) -> None:
        await self._finish(stream, _error_part(code, message))

    async def _finish(self, stream: LinkStream, part: bytes) -> None:
        """Send the last part: in one record with the stream's end if it is small."""
        if not stream.post(part, end=True):
            await stream.send_all(part)
            await stream.send_eof()
        stream.stop_receiving()


def _error_part(code: str, message: str) -> bytes:
    error = pack(CallError(code[:64], message[:512]))
    return _PART.pack(Part.ERROR, len(error)) + error


def _only_shoal_errors(error: Exception) -> ShoalError | None:
    """The first of a group of errors when all of them are Shoal's (a handler with a nursery raises groups)."""
    if isinstance(error, ExceptionGroup):
        ours, rest = error.split(ShoalError)
        if ours is not None and rest is None:
            first: BaseException = ours
            while isinstance(first, BaseExceptionGroup):
                first = first.exceptions[0]
            return first if isinstance(first, ShoalError) else None
    return None
