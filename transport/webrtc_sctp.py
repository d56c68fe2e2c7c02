"""aiortc's SCTP in batches: many datagrams per system call, wake-up and acknowledgement, no search of what is sent.

As aiortc comes, every datagram costs a system call, a turn of the event loop and an acknowledgement, and every
acknowledgement a walk over all chunks in flight. Here (scripts/benchmarks/webrtc.py compares both):

- Linux splits and joins datagrams itself (UDP_SEGMENT, UDP_GRO): up to 64 leave and arrive in one call. Elsewhere they
  are read until there are no more;
- one acknowledgement per batch that arrived (RFC 9260 6.2 wants one for every second packet at least; receive offload
  makes TCP do the same), so bursts are as long as batches, and slow start grows by what was acknowledged (RFC 3465);
- CUBIC instead of one more packet per round trip, which takes minutes to fill a long path after a loss;
- chunks are looked through only while some are missing; three acknowledged ones above a missing one mean it is lost
  (RFC 9002 6.1.1), as acknowledgements are too few to be counted.

This leans on the insides of aiortc 1.16 and aioice 0.13, which pyproject.toml therefore pins to their minor versions.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
import sys
from collections.abc import Callable

from aioice.ice import StunProtocol
from aiortc import RTCDtlsTransport, RTCIceTransport, RTCSctpTransport
from aiortc.rtcsctptransport import (
    SCTP_DATA_LAST_FRAG,
    SCTP_TSN_MODULO,
    USERDATA_MAX_LENGTH,
    Chunk,
    DataChunk,
    InitChunk,
    SackChunk,
    parse_packet,
    serialize_packet,
)
from aiortc.utils import uint32_gt, uint32_gte
from OpenSSL import SSL

from . import defaults

# linux/udp.h; Python has no names for them.
_SOL_UDP, _UDP_SEGMENT, _UDP_GRO = 17, 103, 104
_MAX_SEGMENTS = 64
_MAX_DATAGRAM = 65_000
#: A later TSN that was acknowledged by this many makes a missing one lost (RFC 9002 6.1.1).
_REORDERING = 3
#: RFC 9438 4.1 and 4.6: how fast CUBIC grows (segments per s³), and what is left of a window after a loss.
_C, _BETA = 0.4, 0.7


class BatchedDatagrams:
    """The socket of a connection's nominated pair, read and written in batches past asyncio's transport.

    ``on_packets``: gets the decrypted packets of a batch. ``on_lost``: the connection is over, and why.
    """

    def __init__(self, protocol: StunProtocol, remote: tuple[str, int], dtls: RTCDtlsTransport) -> None:
        self._loop = asyncio.get_running_loop()
        self._protocol = protocol
        self._remote = remote
        assert dtls._ssl is not None  # it is connected
        self._ssl = dtls._ssl
        transport_socket = protocol.transport.get_extra_info("socket")
        self._transport_fd = transport_socket.fileno()
        self._socket = transport_socket.dup()
        self._out: list[bytes] = []
        self._flushing = False
        self._waiting = False
        self._segments = sys.platform == "linux"
        self.on_packets: Callable[[list[bytes]], None] = lambda packets: None
        self.on_lost: Callable[[str], None] = lambda reason: None

    @classmethod
    def take_over(cls, ice: RTCIceTransport, dtls: RTCDtlsTransport) -> BatchedDatagrams | None:
        """The socket of the pair that ICE nominated; None where that is no plain UDP socket (TURN, another loop)."""
        pair = ice._connection._nominated[1]
        loop = asyncio.get_running_loop()
        if pair.local_candidate.type == "relay" or not isinstance(loop, asyncio.SelectorEventLoop):
            return None
        made = cls(pair.protocol, pair.remote_addr, dtls)
        # The transport must not read any more: it would take joined datagrams for one.
        loop._remove_reader(made._transport_fd)  # type: ignore[attr-defined]
        loop.add_reader(made._socket.fileno(), made._readable)
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            made._socket.setsockopt(socket.SOL_SOCKET, option, defaults.WEBRTC_SOCKET_BUFFER)
        if made._segments:
            try:
                made._socket.setsockopt(_SOL_UDP, _UDP_GRO, 1)
            except OSError:  # before Linux 5.0
                made._segments = False
        return made

    def close(self) -> None:
        """Send what waits, as far as the kernel takes it, and read no more."""
        self.flush()
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket.fileno())
            self._loop.remove_writer(self._socket.fileno())
            self._socket.close()

    def _readable(self) -> None:
        packets: list[bytes] = []
        # Bounded, so that a flood from outside leaves time for our own side.
        for _ in range(4 if self._segments else _MAX_SEGMENTS):
            try:
                data, ancillary, _, source = self._socket.recvmsg(1 << 16, 64)
            except (BlockingIOError, InterruptedError):
                break
            except OSError:
                break  # an ICMP error of an earlier datagram: ICE's consent checks decide what it means
            size = len(data)
            for level, kind, value in ancillary:
                if level == _SOL_UDP and kind == _UDP_GRO:
                    size = struct.unpack_from("=i", value)[0]
            for at in range(0, len(data), size or 1):
                self._datagram(data[at : at + size], source, packets)
        if packets:
            self.on_packets(packets)

    def _datagram(self, data: bytes, source: tuple[str, int], packets: list[bytes]) -> None:
        if not 19 < data[0] < 64:
            if data[0] < 4:  # STUN (RFC 7983)
                self._protocol.datagram_received(data, source)
            return
        ssl = self._ssl
        try:
            ssl.bio_write(data)
            packets.append(ssl.recv(1500))
        except SSL.ZeroReturnError:
            self.on_lost("the far side ended the connection")
        except SSL.Error:
            pass  # forged or repeated
        try:
            self._out.append(ssl.bio_read(1500))  # a handshake message that was lost and is asked for again
        except SSL.Error:
            return
        self.flush_soon()

    def send(self, packet: bytes) -> None:
        """Encrypt a packet; it leaves with the others of this turn of the loop. Raises :class:`ConnectionError`."""
        ssl = self._ssl
        try:
            ssl.send(packet)
            self._out.append(ssl.bio_read(1500))
        except SSL.Error as error:
            raise ConnectionError(f"DTLS: {error}") from None
        self.flush_soon()

    def flush_soon(self) -> None:
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self.flush)

    def flush(self) -> None:
        """Hand the waiting datagrams to the kernel."""
        self._flushing = False
        out, at = self._out, 0
        try:
            while at < len(out):
                at += self._send_run(out, at)
        except (BlockingIOError, InterruptedError):
            if not self._waiting:
                self._waiting = True
                self._loop.add_writer(self._socket.fileno(), self._writable)
        except OSError:
            at = len(out)  # no route just now, or closed: they count as lost
        del out[:at]

    def _writable(self) -> None:
        self._waiting = False
        self._loop.remove_writer(self._socket.fileno())
        self.flush()

    def _send_run(self, out: list[bytes], at: int) -> int:
        """Send datagrams from ``at`` on in one call: those of one length and a shorter one after them. How many."""
        size = len(out[at])
        end = at + 1
        if self._segments:
            most = min(len(out), at + min(_MAX_SEGMENTS, _MAX_DATAGRAM // size))
            while end < most and len(out[end]) == size:
                end += 1
            if end < most and len(out[end]) < size:
                end += 1
        if end - at == 1:
            self._socket.sendto(out[at], self._remote)
            return 1
        try:
            control = [(_SOL_UDP, _UDP_SEGMENT, struct.pack("=H", size))]
            self._socket.sendmsg([b"".join(out[at:end])], control, 0, self._remote)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EIO, errno.EMSGSIZE, errno.ENOPROTOOPT):
                raise
            self._segments = False  # this path's device cannot; one by one from now on
            return 0
        return end - at


class Cubic:
    """Congestion avoidance of RFC 9438, sans-IO: back to the window of the last loss quickly, past it slowly."""

    def __init__(self) -> None:
        self._most = 0.0
        self._began: float | None = None
        self._period = 0.0
        self._friendly = 0.0

    def lost(self, window: int) -> None:
        """A packet was lost with ``window`` bytes allowed in flight (4.6, and 4.7: fast convergence)."""
        self._most = window * (1 + _BETA) / 2 if window < self._most else window
        self._began = None

    def window(self, window: int, acknowledged: int, now: float, rtt: float) -> int:
        """The window after ``acknowledged`` bytes (4.2 to 4.4, in bytes instead of segments)."""
        if self._began is None:
            self._began = now
            self._most = max(self._most, window)
            self._period = ((self._most - window) / USERDATA_MAX_LENGTH / _C) ** (1 / 3)
            self._friendly = window
        since = now - self._began + rtt - self._period
        target = self._most + _C * since**3 * USERDATA_MAX_LENGTH
        target = min(max(target, window), 1.5 * window)
        alpha = 3 * (1 - _BETA) / (1 + _BETA) if self._friendly < self._most else 1.0
        self._friendly += alpha * USERDATA_MAX_LENGTH * acknowledged / window
        grown = window + (target - window) * acknowledged / window
        return int(max(grown, self._friendly))


class BatchedSctp(RTCSctpTransport):
    """aiortc's association, its sending and acknowledging replaced as this module says."""

    def __init__(self, transport: RTCDtlsTransport) -> None:
        super().__init__(transport)
        self._datagrams: BatchedDatagrams | None = None
        self._advertised_rwnd = defaults.WEBRTC_MAX_FLIGHT
        self._cwnd = defaults.WEBRTC_FIRST_PACKETS * USERDATA_MAX_LENGTH
        self._cubic = Cubic()
        #: When the chunk that was sent last among those acknowledged was sent.
        self._newest = 0.0
        #: Whether any chunk in flight is marked for retransmission.
        self._marked = False
        self._clock = asyncio.get_running_loop().time

    def use(self, datagrams: BatchedDatagrams) -> None:
        """Send and receive through ``datagrams`` from now on."""
        self._datagrams = datagrams
        datagrams.on_packets = self._on_packets

    def _on_packets(self, packets: list[bytes]) -> None:
        # None of what is awaited within suspends once packets leave through `_datagrams`: no task is needed.
        batch = self._receive_batch(packets)
        try:
            batch.send(None)
        except StopIteration:
            return
        except Exception as error:  # noqa: BLE001  # boundary: aiortc asserts what the far side sends to be right
            if self._datagrams is not None:
                self._datagrams.on_lost(f"the far side broke SCTP: {type(error).__name__} {error}")
            return
        batch.close()
        raise RuntimeError("aiortc waits for something in the middle of a batch")

    async def _receive_batch(self, packets: list[bytes]) -> None:
        for data in packets:
            try:
                _, _, tag, chunks = parse_packet(data)
            except ValueError:
                continue
            first = isinstance(chunks[0], InitChunk) if chunks else False
            if tag != (0 if first else self._local_verification_tag) or (first and len(chunks) != 1):
                continue
            for chunk in chunks:
                await self._receive_chunk(chunk)
        if self._sack_needed:
            await self._send_sack()

    async def _send_chunk(self, chunk: Chunk) -> None:
        if self._datagrams is None:
            await super()._send_chunk(chunk)
            return
        self._datagrams.send(
            serialize_packet(self._local_port, self._remote_port or 0, self._remote_verification_tag, chunk)
        )

    def _mark_received(self, tsn: int) -> bool:
        last, waiting = self._last_received_tsn, self._sack_misordered
        if last is None:
            return super()._mark_received(tsn)
        if uint32_gte(last, tsn) or tsn in waiting:
            self._sack_duplicates.append(tsn)
            return True
        waiting.add(tsn)
        while (after := (last + 1) % SCTP_TSN_MODULO) in waiting:
            waiting.remove(after)
            last = after
        self._last_received_tsn = last
        return False

    async def _receive_data_chunk(self, chunk: DataChunk) -> None:
        last = self._last_received_tsn
        if last is None or self._sack_misordered or chunk.tsn != (last + 1) % SCTP_TSN_MODULO:
            await super()._receive_data_chunk(chunk)
            return
        # In order, and nothing waits for it: no message can be whole before its last fragment is here.
        self._sack_needed = True
        self._last_received_tsn = chunk.tsn
        stream = self._get_inbound_stream(chunk.stream_id)
        stream.add_chunk(chunk)
        self._advertised_rwnd -= len(chunk.user_data)
        if chunk.flags & SCTP_DATA_LAST_FRAG:
            for message in stream.pop_messages():
                self._advertised_rwnd += len(message[2])
                await self._receive(*message)
        await self._reset_deferred_streams()

    async def _receive_sack_chunk(self, chunk: SackChunk) -> None:
        if uint32_gt(self._last_sacked_tsn, chunk.cumulative_tsn):
            return
        now = self._clock()
        self._last_sacked_tsn = chunk.cumulative_tsn
        limited = self._flight_size + USERDATA_MAX_LENGTH > self._cwnd
        done = acknowledged = 0
        sent = self._sent_queue
        while sent and uint32_gte(self._last_sacked_tsn, sent[0].tsn):
            first = sent.popleft()
            done += 1
            if not first._acked:
                acknowledged += first._book_size
                self._newest = max(self._newest, first._sent_time or 0.0)
            self._flight_size_decrease(first)
            if done == 1 and first._sent_count == 1:
                self._update_rto(now - (first._sent_time or now))
        loss, more = self._strike(chunk) if chunk.gaps else (False, 0)
        self._adjust(chunk.cumulative_tsn, acknowledged + more if limited else 0, loss)
        if not sent:
            self._t3_cancel()
        elif done:
            self._t3_restart()
        self._update_advanced_peer_ack_point()
        await self._data_channel_flush()
        await self._transmit()

    def _strike(self, chunk: SackChunk) -> tuple[bool, int]:
        """Chunks that arrived beyond a gap are acknowledged, those missing well below them lost: (any?, bytes)."""
        base = chunk.cumulative_tsn
        acknowledged, loss, gap = 0, False, 0
        highest = chunk.gaps[-1][1]
        # What was sent again is lost again when something sent a while later arrived (RFC 8985: RACK, 6.2).
        overdue = self._newest - (self._srtt or 1.0) / 4
        for sent in self._sent_queue:
            at = (sent.tsn - base) % SCTP_TSN_MODULO
            if at > highest:
                break
            while gap < len(chunk.gaps) and at > chunk.gaps[gap][1]:
                gap += 1
            if gap < len(chunk.gaps) and at >= chunk.gaps[gap][0]:
                if not sent._acked:
                    acknowledged += sent._book_size
                    sent._acked = True
                    sent._retransmit = False
                    self._newest = max(self._newest, sent._sent_time or 0.0)
                    self._flight_size_decrease(sent)
            elif (
                not sent._acked
                and not sent._retransmit
                and highest - at >= _REORDERING
                and (sent._sent_count == 1 or (sent._sent_time or 0.0) < overdue)
            ):
                sent._retransmit = True
                self._flight_size_decrease(sent)
                self._marked = loss = True
        return loss, acknowledged

    def _adjust(self, cumulative: int, acknowledged: int, loss: bool) -> None:
        """The congestion window: slow start by bytes (RFC 9260 7.2.1, RFC 3465), then CUBIC."""
        recovery: int | None = self._fast_recovery_exit
        if recovery is not None:
            if uint32_gte(cumulative, recovery):
                self._fast_recovery_exit = None
            return
        if loss:
            self._cubic.lost(self._cwnd)
            self._ssthresh = max(int(self._cwnd * _BETA), 4 * USERDATA_MAX_LENGTH)
            self._cwnd = self._ssthresh
            self._partial_bytes_acked = 0
            self._fast_recovery_exit = self._sent_queue[-1].tsn
            self._fast_recovery_transmit = True
        elif self._cwnd <= self._ssthresh:
            self._cwnd = min(self._cwnd + acknowledged, defaults.WEBRTC_MAX_FLIGHT)
        elif acknowledged:
            grown = self._cubic.window(self._cwnd, acknowledged, self._clock(), self._srtt or 0.0)
            self._cwnd = min(grown, defaults.WEBRTC_MAX_FLIGHT)

    def _t3_expired(self) -> None:
        self._cubic.lost(self._cwnd)
        super()._t3_expired()
        self._marked = True

    async def _transmit(self) -> None:
        if self._forward_tsn_chunk is not None:
            await super()._transmit()
            return
        cwnd = min(self._flight_size + defaults.WEBRTC_BURST * USERDATA_MAX_LENGTH, self._cwnd)
        now = self._clock()
        if self._marked and not await self._retransmit(cwnd):
            return
        while self._outbound_queue and self._flight_size < cwnd:
            chunk = self._outbound_queue.popleft()
            self._sent_queue.append(chunk)
            self._flight_size_increase(chunk)
            chunk._sent_count += 1
            chunk._sent_time = now
            await self._send_chunk(chunk)
            if not self._t3_handle:
                self._t3_start()

    async def _retransmit(self, cwnd: int) -> bool:
        """Send marked chunks again, as far as the window allows. Whether that was all of them."""
        earliest = True
        for chunk in self._sent_queue:
            if chunk._retransmit:
                if self._fast_recovery_transmit:
                    self._fast_recovery_transmit = False
                elif self._flight_size >= cwnd:
                    return False
                self._flight_size_increase(chunk)
                chunk._retransmit = False
                chunk._sent_count += 1
                chunk._sent_time = self._clock()
                await self._send_chunk(chunk)
                if earliest:
                    self._t3_restart()
            earliest = False
        self._marked = False
        return True
