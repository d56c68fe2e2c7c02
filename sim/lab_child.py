"""One node process of the NAT lab: ``python -m shoal.sim.lab_child`` links, meets, measures, as it is told.

It is a real endpoint on real sockets, without a run and without torch. Commands come in as JSON lines on standard
input, answers go out on standard output; the process ends when its input does.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

import attrs
import trio

from ..node.mapping import PortKeeper
from ..transport.address import Address, SignedPeerRecord
from ..transport.endpoint import Endpoint
from ..transport.errors import ConfigError, ProtocolMisuse, RemoteError, ShoalError
from ..transport.frames import Priority
from ..transport.host import Host, RealHost
from ..transport.identity import Identity, PeerId
from ..transport.link import Link
from ..transport.rpc import Call, Method
from ..transport.traversal import Traversal
from . import defaults
from .lab_messages import (
    Account,
    Answer,
    Attach,
    Beat,
    Beaten,
    Command,
    Describe,
    Failed,
    Learn,
    Linked,
    Meet,
    Met,
    Pull,
    Pulled,
    Watched,
    read_command,
    write_answer,
)


@attrs.frozen
class Ping:
    number: int


@attrs.frozen
class Wanted:
    size: int


BYTE = Method("lab.byte", Ping, Ping)
BULK = Method("lab.bulk", Wanted, Wanted, Priority.BULK)


async def _answer_byte(call: Call[Ping]) -> Ping:
    return call.request


async def _answer_bulk(call: Call[Wanted]) -> Wanted:
    if not 0 < call.request.size <= defaults.LAB_BULK_MAX:
        raise ProtocolMisuse(f"{call.request.size} bytes asked for, at most {defaults.LAB_BULK_MAX}")
    part = bytes(1 << 18)
    left = call.request.size
    while left:
        await call.write(memoryview(part)[: min(left, len(part))])
        left -= min(left, len(part))
    return call.request


class Child:
    """Commands, one after the other, on one endpoint. ``say``: where answers go."""

    def __init__(self, host: Host, endpoint: Endpoint, say: Callable[[Answer], None]) -> None:
        self.host, self.endpoint, self._say = host, endpoint, say
        endpoint.serve(BYTE, _answer_byte)
        endpoint.serve(BULK, _answer_bulk)

    async def obey(self, command: Command) -> None:
        try:
            await self._obey(command)
        except (RemoteError, ConfigError) as error:
            self._say(Failed(str(error)))

    async def _obey(self, command: Command) -> None:
        match command:
            case Attach(peer, addresses):
                began = self.host.now()
                link = await self.endpoint.connect(PeerId.parse(peer), _addresses(addresses))
                self._say(Linked(self.host.now() - began, str(link.observed or "")))
            case Learn(record, signature):
                self.endpoint.learn(SignedPeerRecord(bytes.fromhex(record), bytes.fromhex(signature)))
                self._say(self._account())
            case Describe():
                self._say(self._account())
            case Meet(peer, watch, enough):
                await self._meet(PeerId.parse(peer), watch, enough)
            case Pull(peer, size):
                await self._pull(PeerId.parse(peer), size)
            case Beat():
                await self._beat(PeerId.parse(command.peer), command)

    def _account(self) -> Account:
        signed = self.endpoint.record()
        record = signed.open(self.host.wall())
        assert self.endpoint.traversal is not None
        verdict = self.endpoint.traversal.reachability.verdict
        return Account(
            peer=self.endpoint.peer_id.text,
            addresses=tuple(str(address) for address in record.addresses),
            record=signed.record.hex(),
            signature=signed.signature.hex(),
            relays=tuple(relay.peer.text for relay in record.relays),
            reach=verdict.state.value,
            reason=verdict.reason,
        )

    async def _byte(self, peer: PeerId) -> None:
        await self.endpoint.call(peer, BYTE, Ping(1))

    async def _meet(self, peer: PeerId, watch: float, enough: Sequence[str]) -> None:
        began = self.host.now()
        await self.endpoint.connect(peer, timeout=defaults.LAB_MEET)
        await self._byte(peer)
        seconds, way = self.host.now() - began, self._way(peer)
        self._say(Met(seconds, way))
        changes = [(seconds, way)]
        while changes[-1][1] not in enough and self.host.now() - began < watch:
            await trio.sleep(defaults.LAB_LOOK)
            if (way := self._way(peer)) != changes[-1][1]:
                changes.append((self.host.now() - began, way))
        self._say(Watched(tuple(changes)))

    def _way(self, peer: PeerId) -> str:
        """Of the link that calls use; ``none`` without one."""
        link = self.endpoint.link(peer)
        return "none" if link is None else link.way

    async def _pull(self, peer: PeerId, size: int) -> None:
        part = bytearray(1 << 18)
        began = self.host.now()
        async with self.endpoint.stream(peer, BULK, Wanted(size), timeout=defaults.LAB_PULL) as reply:
            left = size
            while left:
                await reply.read_into(memoryview(part)[: min(left, len(part))])
                left -= min(left, len(part))
            await reply.result()
        self._say(Pulled(self.host.now() - began, size))

    async def _beat(self, peer: PeerId, beat: Beat) -> None:
        """Calls at a steady pace; one that fails or is late is a beat lost, and the next one asks again.

        The last one has as long as any: what is left of the time may be less than an answer takes.
        """
        began = answered_at = self.host.now()
        disturbed_at: float | None = None
        asked = answered = 0
        gap = 0.0
        ways: list[tuple[float, str]] = []
        links: list[Link] = []
        errors: list[str] = []
        while (now := self.host.now()) < began + beat.seconds:
            if beat.after and disturbed_at is not None and now - disturbed_at > beat.after:
                break
            asked += 1
            try:
                left = max(began + beat.seconds - now, defaults.LAB_UNDISTURBED)
                await self.endpoint.call(peer, BYTE, Ping(asked), timeout=left)
            except RemoteError as error:
                disturbed_at = self.host.now()
                if str(error) not in errors:
                    errors.append(str(error))
            else:
                answered += 1
                silent, answered_at = self.host.now() - answered_at, self.host.now()
                gap = max(gap, silent)
                if silent > defaults.LAB_UNDISTURBED:
                    disturbed_at = answered_at
            link = self.endpoint.link(peer)
            if link is not None and link not in links:
                links.append(link)
            if not ways or ways[-1][1] != self._way(peer):
                ways.append((self.host.now() - began, self._way(peer)))
            await trio.sleep(max(0.0, now + beat.interval - self.host.now()))
        silent = self.host.now() - answered_at
        recovered = silent < defaults.LAB_UNDISTURBED
        self._say(Beaten(asked, answered, max(gap, silent), recovered, len(links), tuple(ways), tuple(errors[:8])))


def _addresses(texts: Sequence[str]) -> tuple[Address, ...]:
    return tuple(Address.parse(text) for text in texts)


async def _lines(stream: trio.abc.ReceiveStream) -> AsyncGenerator[bytes, None]:
    """Lines until the stream ends."""
    rest = b""
    while data := await stream.receive_some(65536):
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            yield line


async def serve(port: int) -> None:
    """Be a node until standard input ends."""
    host = RealHost()
    endpoint = Endpoint(host, Identity(host.entropy(32)), traversal=Traversal())

    def say(answer: Answer) -> None:
        os.write(1, write_answer(answer))  # short lines: a pipe takes them whole

    child = Child(host, endpoint, say)
    bind = (Address("tcp", "0.0.0.0", port), Address("tcp", "::", port))
    async with trio.open_nursery() as nursery:
        await nursery.start(endpoint.run, bind)
        nursery.start_soon(PortKeeper(endpoint).run)
        say(child._account())
        async with trio.lowlevel.FdStream(os.dup(0)) as stream, aclosing(_lines(stream)) as lines:
            async for line in lines:
                await child.obey(read_command(line))
        nursery.cancel_scope.cancel()


def main() -> None:
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)-7s %(name)s: %(message)s", stream=sys.stderr)
    try:
        trio.run(serve, int(sys.argv[1]))
    except ShoalError as error:
        sys.exit(f"shoal: error: {error}")


if __name__ == "__main__":
    main()
