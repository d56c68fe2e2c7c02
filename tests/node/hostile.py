"""Peers that mean harm, and the real node they try it on."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from shoal.learning.sync import HEAD, AskHead, HeadInfo
from shoal.node.node import Founding, Node, NodeConfig
from shoal.transport import defaults
from shoal.transport.address import Address
from shoal.transport.endpoint import Endpoint
from shoal.transport.frames import HEADER, Frame
from shoal.transport.host import RealHost
from shoal.transport.identity import Identity
from shoal.transport.network import ByteStream
from shoal.transport.rpc import PROTOCOL
from shoal.transport.secure import Record, SecureChannel
from shoal.transport.session import PIPE, Session

from ..sim import tiny

#: Seconds for anything on a busy machine.
PATIENCE = 20.0


class Victim:
    """A running node on real sockets that trains alone, and what it must still do whatever happens."""

    def __init__(self, node: Node) -> None:
        self.node = node

    @property
    def address(self) -> Address:
        return self.node.endpoint.addresses()[0]

    async def goes_on(self) -> None:
        """It still trains, and an honest stranger still gets an answer from it at once."""
        run = self.node.run_here
        assert run is not None
        before = run.round
        with trio.fail_after(PATIENCE):
            info = await ask(self.address, run.run_id)
            assert info.record.roster == (self.node.identity.peer_id,)
            while run.round <= before:
                await trio.sleep(0.02)

    async def counts(self, what: str, least: int = 1) -> None:
        """Wait until the endpoint has counted ``what`` often enough."""
        with trio.fail_after(PATIENCE):
            while self.node.endpoint.counters.get(what, 0) < least:
                await trio.sleep(0.02)


async def ask(address: Address, run: bytes) -> HeadInfo:
    """What an honest newcomer hears when it asks there."""
    endpoint = Endpoint(RealHost(), Identity(os.urandom(32)))
    async with trio.open_nursery() as nursery:
        await nursery.start(endpoint.run)
        link = await endpoint.identify(address)
        info = await endpoint.call(link.peer, HEAD, AskHead(run), timeout=5.0)
        nursery.cancel_scope.cancel()
    return info


@asynccontextmanager
async def victim() -> AsyncIterator[Victim]:
    """A node on 127.0.0.1 that has founded a run."""
    config = NodeConfig(
        bind=(Address("tcp", "127.0.0.1", 0),),
        founding=Founding(strategy_args=tiny.PLAIN),
        time_budget=0.05,
        evaluate_every=0,
        linger=0.0,
    )
    node = Node(RealHost(), Identity(os.urandom(32)), config, task=tiny.Pull())
    async with trio.open_nursery() as nursery:
        await nursery.start(node.run)
        yield Victim(node)
        nursery.cancel_scope.cancel()


class RawPeer:
    """A peer that shakes hands as it should, and then says whatever it likes."""

    def __init__(self, stream: ByteStream, channel: SecureChannel) -> None:
        self.stream, self.channel = stream, channel
        self.session = Session((1 << 26, 1 << 26))

    @classmethod
    async def connect(cls, address: Address) -> RawPeer:
        stream = await RealHost().network.dial(address)
        channel = SecureChannel(initiator=True, identity=Identity(os.urandom(32)), entropy=os.urandom, wall=time.time())
        await stream.send_all(channel.start())
        while not channel.established:
            channel.receive(await stream.receive_some())
            await stream.send_all(channel.outgoing())
        return cls(stream, channel)

    async def say(self, *parts: bytes) -> None:
        """One record of control with these bytes."""
        wire = self.session.compose(0, 0, self.channel.sealer, lambda: parts)
        assert wire is not None
        await self.stream.send_all(wire)

    async def say_of_the_pipe(self, frames: bytes) -> None:
        """One record that concerns the pipe alone."""
        await self.stream.send_all(self.session.seal(self.channel.sealer, frames))

    async def request(self, stream: int, data: bytes, *, end: bool = True) -> None:
        """Open call stream number ``stream`` (1, 2, …) and send ``data`` on it."""
        id = stream << 2 | 1
        await self.say(frame(Frame.OPEN, id, PROTOCOL.encode()))
        for at in range(0, len(data), defaults.MAX_RECORD // 2):
            await self.say(frame(Frame.DATA, id, data[at : at + defaults.MAX_RECORD // 2]))
        if end:
            await self.say(HEADER.pack(Frame.EOF, id, 0))

    async def hear(self) -> list[tuple[int, int, bytes]] | None:
        """The next frames that the other side says, kind, stream and payload; None once it has hung up."""
        try:
            data = await self.stream.receive_some()
        except trio.BrokenResourceError:
            return None
        if not data:
            return None
        found = []
        for event in self.channel.receive(data):
            assert isinstance(event, Record)
            kind, payloads = self.session.receive(event)
            at, record = 0, b"" if kind == PIPE else b"".join(map(bytes, payloads))
            while at < len(record):
                kind, id, value = HEADER.unpack_from(record, at)
                at += HEADER.size
                size = value if kind in (Frame.DATA, Frame.OPEN, Frame.GOODBYE) else 0
                found.append((kind, id, record[at : at + size]))
                at += size
        return found

    async def farewell(self) -> str:
        """Waits until the other side hangs up; the reason that it gave."""
        reason = ""
        with trio.fail_after(PATIENCE):
            while (frames := await self.hear()) is not None:
                reason = next((payload.decode() for kind, _, payload in frames if kind == Frame.GOODBYE), reason)
        await self.stream.aclose()
        return reason

    async def answer(self, stream: int) -> bytes:
        """All that the other side sends on a stream, until it ends that."""
        got = b""
        with trio.fail_after(PATIENCE):
            while (frames := await self.hear()) is not None:
                for kind, id, payload in frames:
                    if id == stream << 2 | 1 and kind == Frame.DATA:
                        got += payload
                    elif id == stream << 2 | 1 and kind in (Frame.EOF, Frame.RESET):
                        return got
        raise AssertionError(f"it hung up instead of answering: {got!r}")


def frame(kind: int, id: int, payload: bytes) -> bytes:
    return HEADER.pack(kind, id, len(payload)) + payload
