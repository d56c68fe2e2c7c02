"""The aiortc engine of a WebRTC connection: ICE, DTLS, SCTP and one data channel, from typed descriptions. Asyncio.

Runs in the child process only (:mod:`shoal.transport.webrtc_child`). Built from aiortc's ORTC objects, so that no SDP
is written or read. The channel is negotiated (RFC 8831 6.4, stream 0): both ends create it, nothing is announced.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import aioice.ice
from aioice.stun import TransactionError
from aiortc import (
    RTCCertificate,
    RTCDataChannel,
    RTCDataChannelParameters,
    RTCDtlsFingerprint,
    RTCDtlsParameters,
    RTCDtlsTransport,
    RTCIceCandidate,
    RTCIceGatherer,
    RTCIceParameters,
    RTCIceServer,
    RTCIceTransport,
    RTCSctpCapabilities,
    RTCSctpTransport,
)

from . import deadlines, defaults
from .address import Address
from .webrtc_sctp import BatchedDatagrams, BatchedSctp
from .webrtc_signal import Description, Failed, IceCandidate, Local, Opened, Setup

_SCTP_PORT = 5000


class ConnectFailed(Exception):
    """No connection; ``failed`` says why and what was tried."""

    def __init__(self, reason: str, tried: tuple[str, ...] = ()) -> None:
        super().__init__(reason)
        self.failed = Failed(reason, tried)


class AiortcEngine:
    """One connection. :meth:`gather`, then :meth:`connect`; then ``channel`` is open until ``lost`` is set."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        # The asker of STUN servers has one; the others are asked in gather() if that one is silent.
        servers = [RTCIceServer(urls=f"stun:{one.host}:{one.port}") for one in self._stun[:1]]
        if (turn := setup.servers.turn) is not None:
            uri = f"turn:{turn.host}:{turn.port}?transport=udp"
            servers.append(RTCIceServer(urls=uri, username=turn.user, credential=turn.password))
        self._gatherer = RTCIceGatherer(iceServers=servers)
        self._ice = RTCIceTransport(self._gatherer)
        # As aiortc's own RTCPeerConnection does: there is no public setter.
        self._ice._connection.ice_controlling = setup.remote is None
        self._dtls = RTCDtlsTransport(self._ice, [RTCCertificate.generateCertificate()])
        self._sctp = RTCSctpTransport(self._dtls) if setup.plain else BatchedSctp(self._dtls)
        self._datagrams: BatchedDatagrams | None = None
        self.channel = RTCDataChannel(
            self._sctp, RTCDataChannelParameters(label="shoal", protocol="shoal", negotiated=True, id=0)
        )
        #: Set when the connection is gone; ``lost_reason`` says why.
        self.lost = asyncio.Event()
        self.lost_reason = ""
        self._opened = asyncio.Event()
        self._local: Description
        self.channel.on("open", self._opened.set)
        self.channel.on("close", lambda: self.lose("the far side closed the channel"))
        self._dtls.on("statechange", self._on_dtls)
        self._ice.on("statechange", self._on_ice)

    @property
    def _stun(self) -> list[Address]:
        # aioice asks by IPv4 only (gethostbyname).
        return [one for one in self._setup.servers.stun if ":" not in one.host][: defaults.MAX_STUN_ASKED]

    def lose(self, reason: str) -> None:
        """The connection is of no more use, for ``reason``; the first one counts."""
        if not self.lost.is_set():
            self.lost_reason = reason
            self.lost.set()
            self._opened.set()

    def _on_dtls(self) -> None:
        if self._dtls.state in ("failed", "closed"):
            self.lose(f"DTLS {self._dtls.state}")

    def _on_ice(self) -> None:
        if self._ice.state in ("failed", "closed"):
            self.lose("the path died: the far side answers no more checks")

    async def gather(self) -> Local:
        """Our half, all candidates in it. Raises :class:`ConnectFailed` when this machine has no address to offer."""
        if self._setup.interfaces:
            interfaces = list(self._setup.interfaces)
            # aioice has no parameter for it, and leaves loopback out by itself.
            with _replaced(aioice.ice, "get_host_addresses", lambda use_ipv4, use_ipv6: interfaces):
                await self._gatherer.gather()
        else:
            await self._gatherer.gather()
        found = [_candidate(one) for one in self._gatherer.getLocalCandidates()]
        if not any(one is not None and one.kind == "srflx" for one in found):
            found += await self._ask_other_stun()
        candidates = tuple(dict.fromkeys(one for one in found if one is not None))
        if not candidates:
            raise ConnectFailed("no address of this machine to offer")
        parameters = self._gatherer.getLocalParameters()
        print_ = next(one for one in self._dtls.getLocalParameters().fingerprints if one.algorithm == "sha-256")
        self._local = Description(
            parameters.usernameFragment or "",
            parameters.password or "",
            bytes.fromhex(print_.value.replace(":", "")),
            candidates[: defaults.MAX_ICE_CANDIDATES],
        )
        return Local(self._local)

    async def _ask_other_stun(self) -> list[IceCandidate | None]:
        for server in self._stun[1:]:
            for protocol in self._ice._connection._protocols:
                if protocol.local_candidate.type != "host" or ":" in protocol.local_candidate.host:
                    continue
                with contextlib.suppress(TransactionError, OSError):
                    answer = await aioice.ice.server_reflexive_candidate(protocol, (server.host, server.port))
                    found = answer[0]
                    return [_made("srflx", found.host, found.port, found.priority, found.foundation)]
        return []

    async def connect(self, remote: Description) -> Opened:
        """Check candidate pairs, shake DTLS, open the channel. Raises :class:`ConnectFailed`; the caller bounds it."""
        for one in remote.candidates:
            await self._ice.addRemoteCandidate(
                RTCIceCandidate(
                    component=1,
                    foundation=one.foundation,
                    ip=one.host,
                    port=one.port,
                    priority=one.priority,
                    protocol="udp",
                    type=one.kind,
                )
            )
        await self._ice.addRemoteCandidate(None)
        try:
            await asyncio.wait_for(
                self._ice.start(RTCIceParameters(usernameFragment=remote.ufrag, password=remote.password)),
                deadlines.webrtc_ice(),
            )
        except TimeoutError:
            seconds = deadlines.webrtc_ice()
            raise ConnectFailed(f"ICE found no pair of addresses that works in {seconds:.0f} s", self.tried()) from None
        if self._ice.state != "completed":
            raise ConnectFailed("ICE found no pair of addresses that works", self.tried())
        fingerprint = RTCDtlsFingerprint(algorithm="sha-256", value=remote.fingerprint.hex(":").upper())
        await self._dtls.start(RTCDtlsParameters(fingerprints=[fingerprint]))
        if self._dtls.state != "connected":
            raise ConnectFailed("DTLS handshake failed: another certificate than announced, or no answer", self.tried())
        if isinstance(self._sctp, BatchedSctp):
            self._datagrams = BatchedDatagrams.take_over(self._ice, self._dtls)
            if self._datagrams is not None:
                self._datagrams.on_lost = self.lose
                self._sctp.use(self._datagrams)
        await self._sctp.start(RTCSctpCapabilities(maxMessageSize=defaults.WEBRTC_MESSAGE), _SCTP_PORT)
        if self.channel.readyState != "open":
            await self._opened.wait()
        if self.lost.is_set():
            raise ConnectFailed(f"the channel did not open: {self.lost_reason}", self.tried())
        pair = self._ice._connection._nominated[1]
        ours, theirs = pair.local_candidate, pair.remote_candidate
        return Opened(
            Address("tcp", ours.host, ours.port),
            Address("tcp", theirs.host, theirs.port),
            f"{ours.type} to {theirs.type}",
        )

    def _unacknowledged(self) -> bool:
        return bool(self.channel.bufferedAmount or self._sctp._outbound_queue or self._sctp._sent_queue)

    def tried(self) -> tuple[str, ...]:
        """The pairs of candidates that were checked, and how each went, for people."""
        if not self._ice._connection._check_list:
            return tuple(f"{one}: nothing to pair it with" for one in self._local.candidates)
        return tuple(
            f"{pair.local_candidate.type} {pair.local_candidate.host}:{pair.local_candidate.port} to "
            f"{pair.remote_candidate.type} {pair.remote_candidate.host}:{pair.remote_candidate.port}: "
            f"{pair.state.name.lower()}"
            for pair in self._ice._connection._check_list[: defaults.MAX_ICE_CANDIDATES]
        )

    async def aclose(self, *, flush: bool) -> None:
        """Let the last messages arrive (``flush``), tell the far side, and let go of the sockets.

        The caller bounds it.
        """
        while flush and not self.lost.is_set() and self.channel.readyState == "open" and self._unacknowledged():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        await self._sctp.stop()
        if self._datagrams is not None:
            self._datagrams.close()
        await self._dtls.stop()
        await self._ice.stop()


def _candidate(one: RTCIceCandidate) -> IceCandidate | None:
    if one.protocol.lower() != "udp" or one.ip is None:
        return None
    return _made(one.type, one.ip, one.port, one.priority, one.foundation)


def _made(kind: str, host: str, port: int, priority: int, foundation: str) -> IceCandidate | None:
    if kind not in ("host", "srflx", "relay"):
        return None
    try:
        return IceCandidate(kind, host.partition("%")[0], port, priority, foundation)  # type: ignore[arg-type]
    except ValueError:
        return None


@contextlib.contextmanager
def _replaced(module: object, name: str, value: Callable[..., object]):  # type: ignore[no-untyped-def]
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
