"""The kernel's TCP and UDP as a :class:`Network`: IPv4 and IPv6 sockets under trio."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import os
import socket
import struct
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

import trio

from . import defaults
from .address import Address, scope_of
from .errors import ConfigError, PeerUnreachable
from .interfaces import local_addresses
from .network import ByteStream, Datagrams, Listener, Network, remaining
from .pump import NOTHING

if TYPE_CHECKING:
    from .pump import Lane, Run, Stretch
    from .records import Record, RecordOpener, RecordSealer, SealedRun

log = logging.getLogger(__name__)

#: What ``accept`` answers while this process or machine is out of sockets; it passes when others close theirs.
_OUT_OF_SOCKETS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)

#: What ``accept`` answers about a connection that is gone already (accept(2), "Error handling").
_VANISHED = (
    errno.ECONNABORTED, errno.ECONNRESET, errno.EPROTO, errno.EPERM, errno.ENETDOWN, errno.ENETUNREACH,
    errno.EHOSTUNREACH, errno.EOPNOTSUPP, errno.ENOPROTOOPT, errno.ETIMEDOUT,
)  # fmt: skip
#: SO_LINGER for 0 s: a close resets, and no port stays taken for a minute.
_RESET = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)

#: Whether the descriptor of a socket is one for ``os.read`` and ``os.write``.
_DIRECT = os.name != "nt"

_REASONS = {
    errno.ECONNREFUSED: "connection refused (nobody listens there)",
    errno.ETIMEDOUT: "timed out (no answer at all: host down, or a firewall drops it)",
    errno.EHOSTUNREACH: "no route to host",
    errno.ENETUNREACH: "no route to that network from here",
    errno.ECONNRESET: "connection reset",
    errno.EADDRNOTAVAIL: "no local address or port is left to connect from",
    errno.EAFNOSUPPORT: "this machine does not speak that IP version",
    errno.EMFILE: "this process has too many open files (see ulimit -n)",
    errno.ENFILE: "this machine has too many open files",
    errno.EPERM: "a firewall of this machine forbids it",
    errno.EMSGSIZE: "too long for one datagram",
}

#: What keeps one dial from coming from the listening port: the same two ports are connected already (or were a moment
#: ago), the listener's address is no way out (127.0.0.1), or this system does not share ports.
_NOT_SHARED = (errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EEXIST, errno.EINVAL, errno.EACCES)
#: Where Linux's struct tcp_info has tcpi_min_rtt, in µs (since 4.6).
_MIN_RTT = slice(148, 152)
#: struct linger: close at once, with a reset where the other side knows of the connection; close as usual.
_RESET_ON_CLOSE, _GOODBYE_ON_CLOSE = struct.pack("ii", 1, 0), struct.pack("ii", 0, 0)
_SHARES_PORTS = os.name != "nt" and hasattr(socket, "SO_REUSEPORT")


def _family(address: Address) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address.host else socket.AF_INET


def _sockaddr(address: Address) -> tuple[str, int] | tuple[str, int, int, int]:
    """What ``bind`` and ``connect`` take. Raises OSError for the scope of an interface that is not here."""
    if ":" not in address.host:
        return address.host, address.port
    host, _, scope = address.host.partition("%")
    # A number is an interface's index, everything else its name.
    index = 0 if not scope else int(scope) if scope.isdecimal() else socket.if_nametoindex(scope)
    return host, address.port, 0, index


def _address(sockaddr: tuple[str, int] | tuple[str, int, int, int]) -> Address:
    host, port = sockaddr[0], sockaddr[1]
    # A link-local address reaches nobody without its interface. Some systems append it themselves.
    if len(sockaddr) == 4 and sockaddr[3] and "%" not in host:
        host = f"{host}%{sockaddr[3]}"
    return Address("tcp", host, port)


class TcpStream(ByteStream):
    """One TCP connection. Nagle is off: the link above batches its writes itself."""

    run = defaults.RUN_BYTES if _DIRECT else 0

    def __init__(self, connected: trio.socket.SocketType) -> None:
        """Takes a connected socket. Raises OSError if it is not connected any more."""
        self.remote = _address(connected.getpeername())
        self.local = _address(connected.getsockname())
        self._drained = False  # the last read took all there was
        self._stream = trio.SocketStream(connected)  # sets TCP_NODELAY, and keeps little unsent in the kernel
        if hasattr(socket, "TCP_CONGESTION") and scope_of(self.remote) == "loopback":
            with contextlib.suppress(OSError):
                # Within a machine there is no line to spare, and BBR, where it is the default, waits for its pacing.
                connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(data)

    async def send_run(self, wires: Sequence[bytes | bytearray | memoryview]) -> bool:
        """Without a turn of the loop for each of them, and a layer of Python less."""
        if not _DIRECT:
            return await super().send_run(wires)
        await trio.lowlevel.checkpoint_if_cancelled()
        left, connected = wires, self._stream.socket
        waited = False
        while left:
            try:
                sent = os.writev(connected.fileno(), left)
            except BlockingIOError:
                await trio.lowlevel.wait_writable(connected)
                waited = True
                continue
            except OSError as error:
                raise self._broken(error) from error
            left = remaining(left, sent)
        return waited

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        size = defaults.READ_SIZE if max_bytes is None else max_bytes
        if self._drained and size > 0 and await self._readable():
            try:
                data = os.read(self._stream.socket.fileno(), size)
                self._drained = len(data) < size
                return data
            except BlockingIOError:
                pass  # a false alarm
            except OSError as error:
                raise trio.BrokenResourceError(f"{self.remote}: {error.strerror}") from error
        data = bytes(await self._stream.receive_some(size))
        self._drained = len(data) < size and _DIRECT
        return data

    async def receive_into(self, buffer: memoryview) -> int:
        if self._drained and await self._readable():
            try:
                size = os.readv(self._stream.socket.fileno(), [buffer])
                self._drained = size < len(buffer)
                return size
            except BlockingIOError:
                pass
            except OSError as error:
                raise trio.BrokenResourceError(f"{self.remote}: {error.strerror}") from error
        try:
            size = await self._stream.socket.recv_into(buffer)
            self._drained = size < len(buffer) and _DIRECT
            return size
        except OSError as error:
            if error.errno in (errno.EBADF, errno.ENOTSOCK):
                raise trio.ClosedResourceError("this stream was already closed") from None
            raise trio.BrokenResourceError(f"{self.remote}: {error.strerror}") from error

    def launch(self, sealer: RecordSealer, head: tuple[int, int, int], stretch: Stretch) -> tuple[SealedRun, int, int]:
        return sealer.launch(self._stream.socket.fileno(), head, stretch)

    def receive_now(self, buffer: memoryview) -> int | None:
        if self._drained or not _DIRECT:
            return None
        try:
            size = os.readv(self._stream.socket.fileno(), [buffer])
        except BlockingIOError:
            self._drained = True
            return None
        except OSError as error:
            raise self._broken(error) from error
        self._drained = size < len(buffer)
        return size

    def land(self, opener: RecordOpener, lane: Lane, most: int) -> tuple[Run, list[Record]]:
        if self._drained:
            return NOTHING, []
        run, records = opener.land(self._stream.socket.fileno(), lane, most)
        self._drained = run.drained
        return run, records

    def failed(self, error: int) -> NoReturn:
        raise self._broken(OSError(error, os.strerror(error)))

    async def wait_receivable(self) -> None:
        socket = self._stream.socket
        if self._drained and socket.fileno() >= 0:
            await trio.lowlevel.wait_readable(socket)
            self._drained = False
        else:
            await trio.lowlevel.checkpoint()  # of a closed one, what trio says when it is read is right

    def _broken(self, error: OSError) -> trio.BrokenResourceError | trio.ClosedResourceError:
        if error.errno in (errno.EBADF, errno.ENOTSOCK):
            return trio.ClosedResourceError("this stream was already closed")
        return trio.BrokenResourceError(f"{self.remote}: {error.strerror}")

    async def _readable(self) -> bool:
        """Wait for bytes when there were fewer than asked for last time, instead of asking the kernel in vain first."""
        socket = self._stream.socket
        if socket.fileno() < 0:
            return False  # closed: what trio says of it is right
        await trio.lowlevel.wait_readable(socket)
        return True

    def send_now(self, data: bytes | bytearray | memoryview) -> int:
        if not _DIRECT:
            return 0
        try:
            return os.write(self._stream.socket.fileno(), data)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise trio.BrokenResourceError(f"{self.remote}: {error.strerror}") from error

    def round_trip(self) -> float | None:
        if sys.platform != "linux":
            return None
        try:
            info = self._stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _MIN_RTT.stop)
        except OSError:
            return None  # closed meanwhile
        micros = int.from_bytes(info[_MIN_RTT], sys.byteorder)
        return None if len(info) < _MIN_RTT.stop or micros in (0, 0xFFFFFFFF) else micros * 1e-6

    def allow_unsent(self, size: int) -> None:
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):  # Windows has none
            with contextlib.suppress(OSError):  # a hint, for a socket that may have been closed meanwhile
                self._stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, size)

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def aclose(self) -> None:
        await self._stream.aclose()


class TcpListener(Listener):
    """A listening socket that survives a shortage of sockets and clients that vanish while they connect.

    Connections that are not admitted are taken from the kernel and reset many at a time, at about 10 µs each: left
    there, or taken one for each turn of the loop, a flood of them would fill the backlog and keep others out.
    """

    def __init__(self, listening: socket.socket, network: TcpNetwork) -> None:
        """Takes a listening socket that does not block."""
        self.address = _address(listening.getsockname())
        self._network = network
        self._socket = listening
        self._listener = trio.SocketListener(trio.socket.from_stdlib_socket(listening))
        self._short = False

    async def accept(self) -> TcpStream:
        """The next connection. Raises :class:`trio.ClosedResourceError` once the listener is closed.

        Out of file descriptors or buffers it waits and tries again, and logs when that begins and ends.
        Cancellation loses no connection.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        dropped = 0
        while True:
            if dropped == defaults.REFUSED_AT_ONCE:
                dropped = 0
                await trio.lowlevel.checkpoint()
            try:
                accepted, source = self._socket.accept()
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._socket)
                continue
            except OSError as error:
                if error.errno in (errno.EBADF, errno.ENOTSOCK):
                    raise trio.ClosedResourceError("this listener was already closed") from None
                if error.errno in _VANISHED:
                    dropped += 1
                    continue
                if error.errno not in _OUT_OF_SOCKETS:
                    raise
                if not self._short:
                    log.warning("%s: cannot accept connections for now: %s", self.address, error.strerror)
                self._short = True
                await trio.sleep(defaults.ACCEPT_RETRY)
                continue
            if self._short:
                log.warning("%s: accepts connections again", self.address)
                self._short = False
            try:
                if self.admit(source[0]):
                    stream = TcpStream(trio.socket.from_stdlib_socket(accepted))
                    await trio.lowlevel.cancel_shielded_checkpoint()
                    return stream
                accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            except OSError:  # reset by the peer while it waited for us
                pass
            accepted.close()
            dropped += 1

    async def aclose(self) -> None:
        self._network.listeners.pop(self, None)
        await self._listener.aclose()


class UdpDatagrams(Datagrams):
    """One UDP socket."""

    def __init__(self, bound: trio.socket.SocketType) -> None:
        self.local = _address(bound.getsockname())
        self._socket = bound

    async def send(self, data: bytes, to: Address) -> None:
        try:
            await self._socket.sendto(data, _sockaddr(to))
        except OSError as error:
            if error.errno in (errno.EBADF, errno.ENOTSOCK):
                raise trio.ClosedResourceError("these datagrams were already closed") from None
            reason = _REASONS.get(error.errno or 0, error.strerror or str(error))
            raise PeerUnreachable("cannot send a datagram", attempts=((str(to), reason),)) from error

    async def receive(self) -> tuple[bytes, Address]:
        while True:
            try:
                data, source = await self._socket.recvfrom(defaults.MAX_DATAGRAM + 1)
            except ConnectionError:  # an earlier datagram was answered by ICMP (Windows says so unasked)
                continue
            except OSError as error:
                if error.errno in (errno.EBADF, errno.ENOTSOCK):
                    raise trio.ClosedResourceError("these datagrams were already closed") from None
                log.debug("%s: cannot receive for now: %s", self.local, error.strerror)
                await trio.sleep(defaults.ACCEPT_RETRY)
                continue
            if len(data) <= defaults.MAX_DATAGRAM:
                return data, _address(source)

    async def aclose(self) -> None:
        self._socket.close()
        await trio.lowlevel.checkpoint()


class TcpNetwork(Network):
    """Kernel TCP and UDP of this machine."""

    def __init__(self) -> None:
        #: Open listeners, in order of opening.
        self.listeners: dict[TcpListener, None] = {}

    async def listen(self, bind: Address) -> TcpListener:
        """Listen at an IP literal; ``0.0.0.0`` and ``[::]`` mean all interfaces of that IP version.

        Raises :class:`ConfigError` if the port is taken or the address is not one of ours.
        """
        if bind.kind != "tcp":
            raise ConfigError(f"{bind} is not a TCP address; expected HOST:PORT or tcp://HOST:PORT")
        await trio.lowlevel.checkpoint()
        listening: socket.socket | None = None
        try:
            listening = socket.socket(_family(bind), socket.SOCK_STREAM)
            listening.setblocking(False)
            if os.name != "nt":  # on Windows it would let two processes share the port
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if _family(bind) == socket.AF_INET6:
                # so that [::]:4001 and 0.0.0.0:4001 can both be ours, and no peer looks like ::ffff:1.2.3.4
                listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listening.bind(_sockaddr(bind))
            listening.listen(defaults.TCP_BACKLOG)
            if _SHARES_PORTS:
                # Only now: set before, it would let two processes of one user listen here without an error.
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener = TcpListener(listening, self)
        except OSError as error:
            if listening is not None:
                listening.close()
            raise ConfigError(_bind_trouble(bind, error)) from error
        except BaseException:
            if listening is not None:
                listening.close()
            raise
        self.listeners[listener] = None
        return listener

    async def dial(self, address: Address, *, shared_port: bool = False) -> TcpStream:
        """Connect. Raises :class:`PeerUnreachable`; the kernel gives up by itself after about two minutes."""
        if address.kind != "tcp":
            raise PeerUnreachable("cannot connect", attempts=((str(address), "not a TCP address"),))
        try:
            origin = self._origin(address) if shared_port else None
            if origin is not None:
                try:
                    return await self._connect(address, origin)
                except OSError as error:
                    if error.errno not in _NOT_SHARED:
                        raise
                    log.debug("%s: not from our listening port: %s", address, error.strerror)
            return await self._connect(address, None)
        except OSError as error:
            reason = _REASONS.get(error.errno or 0, error.strerror or str(error))
            raise PeerUnreachable("cannot connect", attempts=((str(address), reason),)) from error

    def _origin(self, address: Address) -> Address | None:
        """Where a dial to ``address`` that shares our listening port comes from; None: nobody listens, or cannot."""
        if not _SHARES_PORTS:
            return None
        target = ipaddress.ip_address(address.host)
        for listener in self.listeners:
            own = ipaddress.ip_address(listener.address.host)
            if own.version == target.version and (own.is_unspecified or own.is_loopback == target.is_loopback):
                return listener.address
        return None

    async def _connect(self, address: Address, origin: Address | None) -> TcpStream:
        connecting = trio.socket.socket(_family(address), socket.SOCK_STREAM)
        try:
            if origin is not None:
                connecting.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                connecting.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                if connecting.family == socket.AF_INET6:
                    connecting.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # as its listener
                await connecting.bind(_sockaddr(origin))
                # Given up half open, it would say goodbye for a minute, and keep these ports from the next attempt.
                connecting.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            await connecting.connect(_sockaddr(address))
            if origin is not None:
                connecting.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _GOODBYE_ON_CLOSE)
            if connecting.getsockname() == connecting.getpeername():
                # A dial to a dead port of this machine may be given that very port as its own, and meet itself; one
                # that shares our listening port does so at our own address.
                raise ConnectionRefusedError(errno.ECONNREFUSED, "met itself")
            return TcpStream(connecting)
        except BaseException:
            connecting.close()
            raise

    async def open_datagrams(self, bind: Address) -> UdpDatagrams:
        """A UDP socket at an IP literal, its port its own. Raises :class:`ConfigError` as :meth:`listen` does."""
        if bind.kind == "mem":
            raise ConfigError(f"{bind} is not a UDP address; expected HOST:PORT")
        await trio.lowlevel.checkpoint()
        bound: trio.socket.SocketType | None = None
        try:
            bound = trio.socket.socket(_family(bind), socket.SOCK_DGRAM)
            if _family(bind) == socket.AF_INET6:
                bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            await bound.bind(_sockaddr(bind))
            return UdpDatagrams(bound)
        except OSError as error:
            if bound is not None:
                bound.close()
            raise ConfigError(_bind_trouble(bind, error)) from error
        except BaseException:
            if bound is not None:
                bound.close()
            raise

    def reachable_addresses(self, listener: Listener) -> tuple[Address, ...]:
        address = listener.address
        if not ipaddress.ip_address(address.host).is_unspecified:
            return (address,)
        return tuple(Address("tcp", host, address.port) for host in local_addresses(_family(address)))


def _bind_trouble(bind: Address, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"{bind} is in use by another program; choose another port with --port (0 picks a free one)"
    if error.errno == errno.EACCES:
        return f"{bind} may not be opened by this user; choose a port above 1023 with --port (0 picks a free one)"
    if error.errno in (errno.EADDRNOTAVAIL, errno.ENODEV, errno.ENXIO):
        return f"{bind.host} is not an address of this machine; listen at 0.0.0.0 or [::] for all its interfaces"
    if error.errno == errno.EAFNOSUPPORT:
        return f"{bind}: this machine does not speak that IP version; listen at 0.0.0.0 or [::], whichever it does"
    return f"cannot listen at {bind}: {error.strerror or error}"
