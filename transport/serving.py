"""Serves the calls that peers make: looks up handlers, holds limits, turns errors into codes."""

from __future__ import annotations

import logging
import struct
from typing import Any

import attrs
import trio

from . import deadlines, defaults
from .callmux import IncomingCall
from .errors import DecodeError, ProtocolMisuse, RemoteProtocolError, RemoteRefused, ShoalError, StreamReset
from .frames import ResetCode
from .host import Host
from .identity import PeerId
from .link import Link
from .rpc import LENGTH, PART, PROTOCOL, SMALL_HEAD, Answerer, Call, CallError, Handler, Head, Method, Part, Q, R
from .stream import LinkStream
from .wire import pack, unpack

log = logging.getLogger(__name__)


@attrs.frozen(eq=False)
class Served:
    """A method and who answers it: ``handler`` in a task of its own, or ``answerer``, which never waits, at once."""

    method: Method[Any, Any]
    handler: Handler[Any, Any] | None = None
    answerer: Answerer[Any, Any] | None = None


class RpcServer:
    """Serves the calls that peers make: looks up handlers, holds limits, turns errors into codes."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._handlers: dict[str, Served] = {}
        self._active: dict[PeerId, int] = {}
        self._total = 0

    def serve(self, method: Method[Q, R], handler: Handler[Q, R]) -> None:
        """Answer calls of ``method`` with ``handler``, which replaces an earlier one."""
        self._handlers[method.name] = Served(method, handler)

    def serve_at_once(self, method: Method[Q, R], answerer: Answerer[Q, R]) -> None:
        """Like :meth:`serve` for what never waits: a small call then costs no task."""
        self._handlers[method.name] = Served(method, answerer=answerer)

    def active(self, peer: PeerId | None = None) -> int:
        """Calls being served now, of one peer or of all."""
        return self._total if peer is None else self._active.get(peer, 0)

    def _busy(self, peer: PeerId) -> str | None:
        """Why another call of ``peer`` is refused."""
        active = self._active.get(peer, 0)
        if active >= defaults.MAX_CALLS_PER_PEER:
            return "your calls use up what is allowed at once"
        # However many calls some peers make, every other one still gets a few through.
        if self._total >= defaults.MAX_CALLS and active >= defaults.FAIR_CALLS:
            return "other peers' calls use up what is allowed at once"
        return None

    def _enter(self, peer: PeerId) -> None:
        self._active[peer] = self._active.get(peer, 0) + 1
        self._total += 1

    def _leave(self, peer: PeerId) -> None:
        self._total -= 1
        self._active[peer] -= 1
        if not self._active[peer]:
            del self._active[peer]

    # Small calls

    def accept(self, link: Link, asked: IncomingCall, data: memoryview, nursery: trio.Nursery) -> None:
        """Take a small call: refuse it at once, or serve it in a task of ``nursery``. Keeps nothing of ``data``."""
        try:
            busy = self._busy(link.peer)
            if busy is not None:
                raise RemoteRefused("busy", busy)
            served, request, timeout = self._read(data)
        except RemoteRefused as refusal:
            link.answer(asked, _error(refusal.code, refusal.reason))
            return
        if served.answerer is not None:
            code, message, result = self._answer_at_once(Call(link, request, self._host.now() + timeout), served)
            answer = _error(code, message) if code else bytes((Part.RESULT,)) + result
            if len(answer) > defaults.SMALL_SEND:
                self._enter(link.peer)
                nursery.start_soon(self._answer_when_possible, link, asked, answer, timeout)
            else:
                link.answer(asked, answer)
            return
        scope = trio.CancelScope(deadline=trio.current_time() + timeout)
        asked.on_broken = scope.cancel
        call = Call(link, request, self._host.now() + timeout)
        self._enter(link.peer)  # from here on, as tasks that have not begun count too
        nursery.start_soon(self._serve_small, asked, call, served, scope, timeout)

    def _answer_at_once(self, call: Call[Any], served: Served) -> tuple[str, str, bytes]:
        assert served.answerer is not None
        try:
            return "", "", _packed(served.method, served.answerer(call))
        except Exception as error:  # boundary: a bug must not reach the link  # noqa: BLE001
            return _failure(call, served.method, error)

    async def _answer_when_possible(self, link: Link, asked: IncomingCall, answer: bytes, timeout: float) -> None:
        """For a large answer: not while others wait to be sent. Nobody wants it later than ``timeout`` seconds."""
        try:
            with trio.move_on_after(timeout):
                await link.wait_can_answer()
                link.answer(asked, answer)
            if asked.open:
                link.answer(asked, _error("expired", "the answers to earlier calls were not read in time"))
        finally:
            self._leave(link.peer)

    def _read(self, data: memoryview) -> tuple[Served, Any, float]:
        """Raises :class:`RemoteRefused` with what is wrong."""
        try:
            timeout, length = SMALL_HEAD.unpack_from(data)
            at = SMALL_HEAD.size + length
            name = str(data[SMALL_HEAD.size : at], "utf-8")
        except (struct.error, UnicodeDecodeError):
            raise RemoteRefused("bad_request", "the head of a call that cannot be read") from None
        if not timeout >= 0.0 or len(data) < at:  # not a number: neither
            raise RemoteRefused("bad_request", "the head of a call that makes no sense")
        found = self._handlers.get(name)
        if found is None:
            raise RemoteRefused("unknown_method", f"no method {name[:64]!r} here")
        try:
            request = unpack(found.method.request, data[at:])
        except DecodeError as error:
            raise RemoteRefused("bad_request", error.message) from None
        return found, request, min(timeout, defaults.MAX_CALL_TIME)

    async def _serve_small(
        self,
        asked: IncomingCall,
        call: Call[Any],
        served: Served,
        scope: trio.CancelScope,
        timeout: float,
    ) -> None:
        link = call.link
        try:
            with scope:
                code, message, result = await self._run(call, served)
                answer = _error(code, message) if code else bytes((Part.RESULT,)) + result
                if len(answer) > defaults.SMALL_SEND:
                    await link.wait_can_answer()
                link.answer(asked, answer)
            if asked.open and scope.cancelled_caught:
                link.answer(asked, _error("expired", _late(served.method.name, timeout)))
        finally:
            self._leave(link.peer)
            if asked.open:
                link.answer(asked, _error("cancelled", "the node that was asked stops"))

    # Calls with a stream

    async def handle(self, stream: LinkStream, scope: trio.CancelScope) -> None:
        """Serve one stream from its opening to its end. ``scope`` is cancelled when the stream breaks; here it holds
        every deadline of the call as well, as each scope more would cost as much as the rest of a small call."""
        peer = stream.peer
        try:
            with scope:
                if stream.protocol != PROTOCOL:
                    stream.reset(ResetCode.UNKNOWN_PROTOCOL)
                    return
                if (busy := self._busy(peer)) is not None:
                    seconds = deadlines.request_header(stream.link.rtt, stream.link.lag)
                    scope.deadline = trio.current_time() + seconds
                    await self._refuse(stream, "busy", busy)
                    return
                self._enter(peer)
                try:
                    await self._serve(stream, scope)
                finally:
                    self._leave(peer)
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
                late = _error_part("expired", _late(head.method, timeout))
                if stream.post(late, end=True):  # cancelled, so this must not wait
                    stream.stop_receiving()
        code, message, result = answer
        scope.deadline = max(deadline, now()) + seconds
        if code:
            await self._refuse(stream, code, message)
        else:
            await self._finish(stream, PART.pack(Part.RESULT, len(result)) + result)

    async def _answer(self, stream: LinkStream, head: Head, deadline: float) -> tuple[str, str, bytes]:
        """``(code, message, result)``; an empty code means success."""
        found = self._handlers.get(head.method)
        if found is None:
            return "unknown_method", f"no method {head.method[:64]!r} here", b""
        try:
            request = unpack(found.method.request, await self._message(stream, defaults.MAX_MESSAGE))
        except DecodeError as error:
            return "bad_request", error.message, b""
        return await self._run(Call(stream.link, request, deadline, head.body, stream), found)

    async def _run(self, call: Call[Any], served: Served) -> tuple[str, str, bytes]:
        if served.handler is None:
            return self._answer_at_once(call, served)
        try:
            return "", "", _packed(served.method, await served.handler(call))
        except Exception as error:  # boundary: a bug must not reach the link  # noqa: BLE001
            return _failure(call, served.method, error)

    async def _message(self, stream: LinkStream, limit: int) -> bytearray:
        (length,) = LENGTH.unpack(await stream.read_exactly(LENGTH.size))
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


def _packed(method: Method[Any, Any], response: Any) -> bytes:
    if not isinstance(response, method.response):
        raise ProtocolMisuse(f"the handler of {method.name} returned {type(response).__name__}")
    result = pack(response)
    if len(result) > defaults.MAX_MESSAGE:
        raise ProtocolMisuse(f"the handler of {method.name} returned {len(result)} bytes")
    return result


def _failure(call: Call[Any], method: Method[Any, Any], error: Exception) -> tuple[str, str, bytes]:
    """What the caller is told of an error in a handler: a code and a message, never a traceback."""
    if isinstance(error, RemoteRefused):
        return error.code, error.reason, b""
    known = error if isinstance(error, ShoalError) else _only_shoal_errors(error)
    if isinstance(error, ProtocolMisuse):
        log.error("our handler of %s broke a contract", method.name, exc_info=error)
    elif known is not None:
        log.info("%s for %s failed: %s", method.name, call.peer.short, known)
        return "failed", str(known), b""
    else:
        log.error("our handler of %s failed for %s", method.name, call.peer.short, exc_info=error)
    return "internal", "an error inside the node that was asked", b""


def _error(code: str, message: str) -> bytes:
    """The answer to a small call."""
    return bytes((Part.ERROR,)) + pack(CallError(code[:64], message[:512]))


def _error_part(code: str, message: str) -> bytes:
    """The last part of a stream."""
    error = pack(CallError(code[:64], message[:512]))
    return PART.pack(Part.ERROR, len(error)) + error


def _late(method: str, timeout: float) -> str:
    return f"{method} took more than the {timeout:.1f} s it was given"


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
