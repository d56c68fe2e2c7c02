"""PCP (RFC 6887) and NAT-PMP (RFC 6886) messages, sans-IO: one UDP datagram asks the router for a port, one answers.

    NAT-PMP   public address   version 0, op 0                      -> version, op+128, result, epoch, address
              map TCP          0, 2, 0, internal, external, seconds -> 0, 130, result, epoch, and the same three
    PCP MAP   version 2, op 1, seconds, our address; nonce, protocol, internal, suggested external port and address
              -> 2, 129, result, seconds, epoch; the same nonce, protocol, internal, and what was assigned

Routers are strangers too: an answer counts only from the router that was asked, for the port (and nonce) that was asked
for, with a lifetime of at most what was asked.
"""

from __future__ import annotations

import ipaddress
import struct
from typing import Literal
from urllib.parse import quote, urlsplit

import attrs

from . import defaults

#: Where routers listen, UDP.
PORT = 5351

Protocol = Literal["tcp", "udp"]
_IP_NUMBER: dict[Protocol, int] = {"tcp": 6, "udp": 17}
_OPCODE: dict[Protocol, int] = {"tcp": 2, "udp": 1}

_PMP_MAP = struct.Struct("!BBHHHI")
_PMP_MAPPED = struct.Struct("!BBHIHHI")
_PMP_PUBLIC = struct.Struct("!BBHI4s")
_PCP_HEAD = struct.Struct("!BBHI16s")
_PCP_MAP = struct.Struct("!12sB3xHH16s")
_PCP_ANSWER = struct.Struct("!BBBBII12x")

_PMP_RESULTS = {
    1: "does not speak this version",
    2: "refuses: port mapping is switched off in its settings, or this machine may not use it",
    3: "has no connection to the internet itself",
    4: "has no more ports to give",
    5: "does not know this request",
}
_PCP_RESULTS = {
    1: "does not speak this version",
    2: "refuses: port mapping is switched off in its settings, or this machine may not use it",
    3: "calls the request malformed",
    4: "does not know this request",
    5: "does not know an option",
    6: "calls an option malformed",
    7: "has no connection to the internet itself",
    8: "has no more ports to give",
    9: "cannot map this protocol",
    10: "has given this machine as many ports as one may have",
    11: "cannot give that external port",
    12: "sees another address than ours: there is a NAT between us and it",
    13: "has no more room for peers",
}


@attrs.frozen
class Granted:
    """``external_port`` at ``external_address`` (None: not said) leads to our port, for ``lifetime`` seconds."""

    external_address: str | None
    external_port: int
    lifetime: int


@attrs.frozen
class Refused:
    """The router says no. ``unsupported``: it speaks another version of the protocol, so the older one may do."""

    reason: str
    unsupported: bool = False


Answer = Granted | Refused | None


def pmp_map_request(protocol: Protocol, port: int, external: int, lifetime: int) -> bytes:
    """NAT-PMP; ``lifetime`` 0 (and ``external`` 0) takes the mapping back."""
    return _PMP_MAP.pack(0, _OPCODE[protocol], 0, port, external, lifetime)


def pmp_public_request() -> bytes:
    """NAT-PMP: what is the router's external address?"""
    return b"\0\0"


def read_pmp_map(data: bytes, protocol: Protocol, port: int, lifetime: int) -> Answer:
    """The answer to :func:`pmp_map_request`; None: it is something else."""
    refused = _pmp_refusal(data, _OPCODE[protocol])
    if refused is not None or len(data) != _PMP_MAPPED.size:
        return refused
    _, op, _, _, internal, external, granted = _PMP_MAPPED.unpack(data)
    if op != 128 + _OPCODE[protocol] or internal != port:
        return None
    return _granted(None, external, granted, lifetime)


def read_pmp_public(data: bytes) -> str | Refused | None:
    """The answer to :func:`pmp_public_request`: an IPv4 address."""
    refused = _pmp_refusal(data, 0)
    if refused is not None or len(data) != _PMP_PUBLIC.size or data[1] != 128:
        return refused
    return str(ipaddress.IPv4Address(_PMP_PUBLIC.unpack(data)[4]))


def _pmp_refusal(data: bytes, op: int) -> Refused | None:
    if len(data) < 4 or data[0] != 0 or data[1] not in (128 + op, 128):
        return None
    code = int.from_bytes(data[2:4], "big")
    if code == 0:
        return None
    return Refused(_PMP_RESULTS.get(code, f"refuses with code {code}"), unsupported=code == 1)


def pcp_map_request(
    nonce: bytes, protocol: Protocol, own: str, port: int, external_port: int, external: str | None, lifetime: int
) -> bytes:
    """PCP MAP from our address ``own``; ``lifetime`` 0 takes the mapping back."""
    head = _PCP_HEAD.pack(2, 1, 0, lifetime, _mapped(own))
    suggested = _mapped(external or ("::" if ":" in own else "0.0.0.0"))
    return head + _PCP_MAP.pack(nonce, _IP_NUMBER[protocol], port, external_port, suggested)


def read_pcp_map(data: bytes, nonce: bytes, protocol: Protocol, port: int, lifetime: int) -> Answer:
    """The answer to :func:`pcp_map_request`; None: it is something else.

    A router that speaks only NAT-PMP says so in its own words.
    """
    if len(data) >= 4 and data[0] == 0 and data[1] >= 128:
        return Refused("speaks NAT-PMP only", unsupported=True)
    if not _PCP_ANSWER.size <= len(data) <= 1100 or len(data) % 4 or data[0] != 2 or data[1] != 129:
        return None
    _, _, _, code, granted, _ = _PCP_ANSWER.unpack_from(data)
    if code:
        return Refused(_PCP_RESULTS.get(code, f"refuses with code {code}"), unsupported=code == 1)
    if len(data) < _PCP_ANSWER.size + _PCP_MAP.size:
        return None
    theirs, number, internal, external, address = _PCP_MAP.unpack_from(data, _PCP_ANSWER.size)
    if theirs != nonce or number != _IP_NUMBER[protocol] or internal != port:
        return None
    return _granted(_plain(address), external, granted, lifetime)


def _granted(address: str | None, external: int, granted: int, asked: int) -> Answer:
    if asked == 0:
        return Granted(address, external, 0)
    if external == 0 or granted == 0:
        return Refused("says yes and gives nothing (port 0, or for 0 s)")
    return Granted(address, external, max(defaults.MIN_MAPPING_LIFETIME, min(granted, asked)))


def _mapped(address: str) -> bytes:
    parsed = ipaddress.ip_address(address)
    return parsed.packed if parsed.version == 6 else b"\0" * 10 + b"\xff\xff" + parsed.packed


def _plain(packed: bytes) -> str:
    six = ipaddress.IPv6Address(packed)
    return str(six.ipv4_mapped or six)


def upnp_delete_request(control: str, external_port: int) -> bytes:
    """HTTP and SOAP for UPnP's DeletePortMapping of a TCP port at the control URL ``control``."""
    parts = urlsplit(control)
    service = "urn:schemas-upnp-org:service:WANIPConnection:1"
    body = (
        '<?xml version="1.0"?><s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/" '
        's:encodingStyle="http://schemas.xmlsoap.org/soap/encoding/"><s:Body>'
        f'<u:DeletePortMapping xmlns:u="{service}"><NewRemoteHost></NewRemoteHost>'
        f"<NewExternalPort>{external_port}</NewExternalPort><NewProtocol>TCP</NewProtocol>"
        "</u:DeletePortMapping></s:Body></s:Envelope>"
    ).encode()
    path = quote(parts.path or "/", safe="/:?=&%")
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n"
        f'Content-Type: text/xml; charset="utf-8"\r\nSOAPAction: "{service}#DeletePortMapping"\r\n'
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode("ascii", "replace") + body


def judge_external(external: str) -> str:
    """What is wrong with an external address that a router gave; empty: nothing."""
    try:
        address = ipaddress.ip_address(external)
    except ValueError:
        return f"the router gives no address for its external side ({external[:60]!r})"
    if address.is_unspecified:
        return "the router has no external address: it has no connection to the internet itself"
    if address in ipaddress.ip_network("100.64.0.0/10"):
        return (
            f"the router's own external address {address} is from 100.64.0.0/10: the provider translates once more "
            "(carrier-grade NAT), so a port at the router leads nowhere from outside"
        )
    if not address.is_global:
        return (
            f"the router's own external address {address} is not public: there is a second router in front of it "
            "(double NAT), so a port at the first one leads nowhere from outside"
        )
    return ""
