"""The IP addresses of this machine, from the C library and the routing table; no names are resolved.

``getaddrinfo(gethostname())`` would ask DNS, which may block for seconds and often knows only ``127.0.1.1``.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import ipaddress
import socket
import sys

#: Addresses of the documentation nets: routed like any stranger, answered by nobody, and nothing is sent anyway.
_STRANGERS = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))
_IFF_UP = 1
#: BSD systems keep the length of a sockaddr in its first byte, the others have a two-byte family.
_FAMILY_AT_1 = sys.platform == "darwin" or "bsd" in sys.platform


class _IfAddrs(ctypes.Structure):
    """The first fields of ``struct ifaddrs``, equal on Linux, macOS and the BSDs."""


_IfAddrs._fields_ = [
    ("next", ctypes.POINTER(_IfAddrs)),
    ("name", ctypes.c_char_p),
    ("flags", ctypes.c_uint),
    ("addr", ctypes.c_void_p),
]


def local_addresses(family: socket.AddressFamily) -> tuple[str, ...]:
    """IP literals of the interfaces that are up, the default route's first, loopback last.

    Link-local addresses are left out: they mean nothing to a peer without naming one of *its* interfaces.
    """
    found = dict.fromkeys([*_default_route(family), *_interfaces(family)])
    loopback = "127.0.0.1" if family == socket.AF_INET else "::1"
    usable = [text for text in found if _useful(text)]
    return (*usable, *([loopback] if loopback in found or not usable else []))


def _useful(text: str) -> bool:
    address = ipaddress.ip_address(text)
    return not (address.is_loopback or address.is_link_local or address.is_unspecified or address.is_multicast)


def _default_route(family: socket.AddressFamily) -> list[str]:
    """The address from which we would talk to strangers: connecting a UDP socket only asks the routing table."""
    found = []
    for stranger_family, stranger in _STRANGERS:
        if stranger_family == family:
            # no such family here, or no route: then there is nothing to list
            with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((stranger, 9))
                found.append(str(probe.getsockname()[0]).partition("%")[0])
    return found


def _interfaces(family: socket.AddressFamily) -> list[str]:
    library = None if sys.platform == "win32" else ctypes.CDLL(ctypes.util.find_library("c"), use_errno=True)
    if library is None or not hasattr(library, "getifaddrs"):
        return ["127.0.0.1" if family == socket.AF_INET else "::1"]
    first = ctypes.POINTER(_IfAddrs)()
    if library.getifaddrs(ctypes.byref(first)) != 0:
        return []
    try:
        return _read(first, family)
    finally:
        library.freeifaddrs(first)


def _read(entry: ctypes._Pointer[_IfAddrs], family: socket.AddressFamily) -> list[str]:
    found = []
    while entry:
        fields = entry.contents
        if fields.addr and fields.flags & _IFF_UP:
            head = ctypes.string_at(fields.addr, 2)
            if (head[1] if _FAMILY_AT_1 else int.from_bytes(head, sys.byteorder)) == family:
                # sockaddr_in: port, then the address; sockaddr_in6: port, flow info, then the address
                offset, size = (4, 4) if family == socket.AF_INET else (8, 16)
                found.append(socket.inet_ntop(family, ctypes.string_at(fields.addr + offset, size)))
        entry = fields.next
    return found
