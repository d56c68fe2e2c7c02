"""Typed calls: request, optional body up, optional body down, response or refusal. This is the caller's side.

A call with a bulk method, a body, or a request above some KiB takes a stream; lengths big-endian::

    caller    u32 length, Head (method, seconds left, body bytes) · u32 length, request · the body's raw bytes · end
    server    any number of BODY parts, then one RESULT or ERROR part · end        part = u8 kind, u32 length, bytes

Any other is a small one, without a stream (:mod:`callmux`)::

    request   f64 seconds left, u8 length of the method's name, name, request        answer   u8 kind, message

The seconds left travel with the call: the server cancels its handler when they are over. A caller that gives up resets
the stream or cancels the call, which cancels the handler too. A server that answers before it has read the body stops
the stream; the caller then reads the answer. What goes wrong in a handler travels as a code, never as a traceback:

    unknown_method, bad_request, busy, expired, failed (with the text of a ShoalError), internal (without any)
    and whatever code a handler gives a RemoteRefused of its own.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from enum import IntEnum
from typing import Any, Generic, TypeAlias, TypeVar

import attrs
import trio

from . import defaults
from .callmux import NOT_SERVED
from .errors import (
    ProtocolMisuse,
    RemoteProtocolError,
    RemoteRefused,
    StreamReset,
    WaitExpired,
)
from .frames import Buffer, Priority, ResetCode
from .identity import PeerId
from .link import Link
from .stream import LinkStream
from .wire import pack, printable, unpack

Q = TypeVar("Q")
R = TypeVar("R")

#: The protocol name of every RPC stream.
PROTOCOL = "shoal-rpc/1"

LENGTH = struct.Struct(">I")
PART = struct.Struct(">BI")
#: Head of a small call: seconds left, length of the method's name.
SMALL_HEAD = struct.Struct(">dB")


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


@attrs.frozen
class Body:
    """A body that is still being made when its call begins.

    ``size``: bytes of all of it. ``parts``: begins it, once for each attempt; a part may change as soon as the next one
    is asked for. ``patience``: seconds that the making may take beyond the sending.
    """

    size: int
    parts: Callable[[], AsyncGenerator[Buffer, None]]
    patience: float = 0.0


class Call(Generic[Q]):
    """One call, on the server's side. ``deadline`` is on the scale of ``host.now()``. A small one has no ``stream``."""

    __slots__ = ("_stream", "body_left", "deadline", "link", "request")

    def __init__(
        self, link: Link, request: Q, deadline: float, body: int = 0, stream: LinkStream | None = None
    ) -> None:
        self.link = link
        self.request = request
        self.deadline = deadline
        #: Bytes of body that the caller announced and that are still to be read.
        self.body_left = body
        self._stream = stream

    @property
    def peer(self) -> PeerId:
        return self.link.peer

    async def read_into(self, buffer: memoryview) -> None:
        """Fill ``buffer`` with the next bytes of the caller's body.

        Raises :class:`RemoteProtocolError` when the body is shorter. Cancellation ends the call.
        """
        size = buffer.nbytes
        if size > self.body_left:
            raise RemoteProtocolError(f"a body with {self.body_left} bytes left, {size} expected", peer=self.peer.short)
        self.body_left -= size
        if self._stream is not None:
            await self._stream.read_exactly_into(buffer)

    async def write(self, data: Buffer) -> None:
        """Send bytes to the caller, before the response. ``data`` must not change until this returns.

        Raises :class:`RemoteRefused`, which is then the answer, when the caller made a call that takes none.
        """
        if self._stream is None:
            raise RemoteRefused("body_refused", "the answer has a body, which a call without a stream cannot take")
        view = memoryview(data).cast("B")
        for at in range(0, len(view), defaults.MAX_BODY_PART):
            part = view[at : at + defaults.MAX_BODY_PART]
            await self._stream.send_all(PART.pack(Part.BODY, len(part)))
            await self._stream.send_all(part)


Handler: TypeAlias = Callable[[Call[Q]], Awaitable[R]]

#: A handler that never waits: it is called where the request is read, without a task of its own.
Answerer: TypeAlias = Callable[[Call[Q]], R]


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
        kind, length = PART.unpack(await self._stream.read_exactly(PART.size))
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
    body: Sequence[Buffer] | Body | None = None,
    timeout: float,
) -> AsyncIterator[Reply[R]]:
    """One call over ``link``: sends ``request`` and ``body``, yields the :class:`Reply`.

    Leaving the block without having read the result, by an exception or cancellation, cancels the handler on the other
    side. Raises :class:`WaitExpired` when ``timeout`` seconds are over (also inside the block), :class:`LinkClosed`
    as soon as the link is lost, :class:`StreamReset`, :class:`RemoteRefused`, :class:`RemoteProtocolError`.
    """
    made = body if isinstance(body, Body) else None
    views = [memoryview(part).cast("B") for part in body or ()] if not isinstance(body, Body) else []
    views = [view for view in views if len(view)]
    size = sum(map(len, views)) if made is None else made.size
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
            head = pack(Head(method.name, left, size))
            try:
                start = b"".join((LENGTH.pack(len(head)), head, LENGTH.pack(len(message)), message))
                if not stream.post(start, end=not size):
                    await stream.send_all(start)
                for view in views[:-1]:
                    await stream.send_all(view)
                if views:
                    await stream.send_last(views[-1])
                if made is not None:
                    await _send_made(stream, made)
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


async def _send_made(stream: LinkStream, body: Body) -> None:
    left = body.size
    async with aclosing(body.parts()) as parts:
        async for part in parts:
            view = memoryview(part).cast("B")
            left -= len(view)
            if left < 0:
                break
            await stream.send_all(view)
    if left:
        raise ProtocolMisuse(f"a body that differs by {left} bytes from the {body.size} that were announced")


async def call(
    link: Link, method: Method[Q, R], request: Q, *, body: Sequence[Buffer] | Body | None = None, timeout: float
) -> R:
    """One call without a body in its answer; see :func:`exchange` for errors and cancellation."""
    result: R
    if not body and method.priority is Priority.CONTROL:
        name, message = _name(method.name), pack(request)
        if SMALL_HEAD.size + len(name) + len(message) <= defaults.CALL_PIECE:
            return unpack(method.response, await _ask(link, method.name, name, message, timeout))
    async with exchange(link, method, request, body=body, timeout=timeout) as reply:
        result = await reply.result()
    return result


@functools.lru_cache(maxsize=1024)
def _name(method: str) -> bytes:
    name = method.encode()
    if len(name) > 255:
        raise ProtocolMisuse(f"the name of a method has {len(name)} bytes")
    return name


async def _ask(link: Link, method: str, name: bytes, message: bytes, timeout: float) -> memoryview:
    """A small call: the packed response."""
    answer: bytes | None = None
    with trio.move_on_after(timeout) as scope:
        await trio.lowlevel.checkpoint_if_cancelled()
        if not link.can_call:
            await link.wait_can_call()
        left = max(0.001, scope.deadline - trio.current_time())
        answer = await link.ask(SMALL_HEAD.pack(left, len(name)) + name + message)
    if answer is not None and answer[0] == Part.RESULT:
        return memoryview(answer)[1:]
    peer = link.peer.short
    if answer is None:
        raise WaitExpired(f"answer to {method}", timeout, peer=peer)
    if answer[0] != Part.ERROR:
        if answer == NOT_SERVED:
            raise RemoteRefused("unknown_protocol", "it serves no calls", peer=peer)
        raise RemoteProtocolError(f"an answer of unknown kind {answer[0]}", peer=peer)
    error = unpack(CallError, memoryview(answer)[1:], limit=defaults.MAX_CALL_ERROR)
    if error.code == "expired":
        raise WaitExpired(f"answer to {method}", timeout, peer=peer)
    raise RemoteRefused(printable(error.code), printable(error.message, 512), peer=peer)
