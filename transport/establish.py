"""Fresh byte streams become links, or further pipes of one: both handshakes with their deadlines."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from . import deadlines, defaults
from .errors import LinkClosed, RemoteProtocolError, WaitExpired
from .link import Link
from .pipe import Pipe
from .pipehello import (
    ANSWER_BYTES,
    HELLO_BYTES,
    TOO_MANY,
    UNKNOWN_SESSION,
    PipeGreeting,
    PipeOpening,
    PipeRefused,
    refusal,
)
from .records import Record
from .secure import Established, PipeKnock, SecureChannel

if TYPE_CHECKING:
    from collections.abc import Callable

    from .deadlines import LoopLag
    from .frames import MuxLimits
    from .host import Host
    from .network import ByteStream


async def establish(
    host: Host,
    stream: ByteStream,
    channel: SecureChannel,
    lag: LoopLag,
    *,
    limits: MuxLimits | None = None,
    way: str = "direct",
) -> Link:
    """Shake hands over ``stream``, which came about by ``way``, and return the link, not yet running.

    Raises :class:`HandshakeError` (and other :class:`RemoteProtocolError`), :class:`LinkClosed` when the other side
    hangs up, :class:`WaitExpired` when it is silent. ``stream`` is closed on every error, and on cancellation; but not
    when a responder raises :class:`PipeKnock`.
    """
    began = host.now()
    seconds = deadlines.handshake(lag.value(began))
    sent = received = 0
    records: list[Record] = []
    try:
        with trio.move_on_after(seconds) as scope:
            due = channel.start()
            while True:
                if due:
                    await stream.send_all(due)
                    sent += len(due)
                if channel.established:
                    break
                data = await stream.receive_some(defaults.READ_SIZE)
                if not data:
                    raise LinkClosed("it hung up during the handshake")
                received += len(data)
                for event in channel.receive(data):
                    if isinstance(event, Record):
                        records.append(event)
                    else:
                        assert isinstance(event, Established)
                due = channel.outgoing()
        if scope.cancelled_caught:
            what = "complete handshake" if received else "handshake: it connected and says nothing"
            raise WaitExpired(what, seconds)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        await trio.aclose_forcefully(stream)
        raise LinkClosed("the connection broke during the handshake") from None
    except RemoteProtocolError:
        # Our refusal (another version, a wrong identity) may still be worth hearing for the other side.
        due = channel.outgoing()
        with trio.move_on_after(deadlines.goodbye()):
            try:
                if due:
                    await stream.send_all(due)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass
        await trio.aclose_forcefully(stream)
        raise
    except PipeKnock:
        raise
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise
    now = host.now()
    pipe = Pipe(stream, channel, way=way, rtt=now - began, now=now, records=records)
    pipe.bytes_sent, pipe.bytes_received = sent, received
    return Link(host, channel, pipe, lag, limits=limits)


async def open_pipe(host: Host, link: Link, stream: ByteStream, way: str, *, bulk_only: bool = False) -> Pipe:
    """Make ``stream``, which we opened by ``way``, a further pipe of ``link``, and attach it.

    Raises :class:`PipeRefused` with the reason, :class:`LinkClosed`, :class:`WaitExpired`,
    :class:`RemoteProtocolError`. ``stream`` is closed on every error, and on cancellation.
    """
    began = host.now()
    seconds = deadlines.handshake(link.lag)
    pipe: Pipe | None = None
    try:
        opening = PipeOpening(link.secrets, way, bulk_only=bulk_only, entropy=host.entropy, peer=link.peer.short)
        with trio.move_on_after(seconds):
            await stream.send_all(opening.hello)
            channel = None
            while channel is None:
                data = await stream.receive_some(opening.missing)
                if not data:
                    raise LinkClosed("it hung up on a pipe's hello", peer=link.peer.short)
                channel = opening.receive(data)
            now = host.now()
            pipe = Pipe(stream, channel, index=opening.index, way=way, bulk_only=bulk_only, rtt=now - began, now=now)
            pipe.bytes_sent, pipe.bytes_received = len(opening.hello), ANSWER_BYTES
            link.attach(pipe)
        if pipe is None:
            raise WaitExpired("answer to a pipe's hello", seconds, peer=link.peer.short)
        return pipe
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        await trio.aclose_forcefully(stream)
        raise LinkClosed("the connection broke during a pipe's hello", peer=link.peer.short) from None
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise


async def join_pipe(
    host: Host, stream: ByteStream, got: bytes, way: str, find: Callable[[bytes], Link | None], lag: LoopLag
) -> Pipe:
    """Answer the hello of a pipe, of which ``got`` has been read, and attach the pipe to the link that ``find`` names.

    ``find`` takes a session id. Errors as :func:`open_pipe`; the other side is told why.
    """
    began = host.now()
    seconds = deadlines.handshake(lag.value(began))
    try:
        with trio.move_on_after(seconds):
            while len(got) < HELLO_BYTES:
                data = await stream.receive_some(HELLO_BYTES - len(got))
                if not data:
                    raise LinkClosed("it hung up in a pipe's hello")
                got += data
            greeting = PipeGreeting(got)
            link = find(greeting.session)
            try:
                if link is None or not link.alive:
                    raise PipeRefused("a pipe's hello for a session that we do not have", code=UNKNOWN_SESSION)
                if not link.takes_pipe(bulk_only=greeting.bulk_only):
                    raise PipeRefused("it opens too many pipes", code=TOO_MANY, peer=link.peer.short)
                answer, channel = greeting.answer(link.secrets, host.entropy)
            except PipeRefused as refused:
                await stream.send_all(refusal(refused.code))
                raise
            await stream.send_all(answer)
            now = host.now()
            pipe = Pipe(
                stream,
                channel,
                index=greeting.index,
                way=greeting.way if way == "direct" else way,
                bulk_only=greeting.bulk_only,
                rtt=link.rtt,
                now=now,
            )
            pipe.bytes_sent, pipe.bytes_received = len(answer), HELLO_BYTES
            link.attach(pipe)
            return pipe
        raise WaitExpired("complete hello of a pipe", seconds)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        await trio.aclose_forcefully(stream)
        raise LinkClosed("the connection broke during a pipe's hello") from None
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise
