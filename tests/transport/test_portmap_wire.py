"""PCP and NAT-PMP messages: as the RFCs lay them out, and nothing else whatever a router sends."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.transport import portmap_wire as wire
from shoal.transport.gateway import gateway_in, gateway_of
from shoal.transport.portmap_wire import Granted, Refused

NONCE = bytes(range(12))


def pcp_answer(code: int = 0, external: str = "203.0.113.9", port: int = 4001, lifetime: int = 3600) -> bytes:
    address = b"\0" * 10 + b"\xff\xff" + bytes(map(int, external.split(".")))
    head = struct.pack("!BBBBII12x", 2, 129, 0, code, lifetime, 77)
    return head + struct.pack("!12sB3xHH16s", NONCE, 6, 4001, port, address)


def test_nat_pmp_is_laid_out_as_rfc_6886_says() -> None:
    assert wire.pmp_public_request() == b"\0\0"
    request = wire.pmp_map_request("tcp", 0x0FA1, 0x0FA2, 3600)
    assert request == bytes.fromhex("0002 0000 0fa1 0fa2 00000e10".replace(" ", ""))
    assert wire.pmp_map_request("udp", 1, 0, 0)[1] == 1
    answer = bytes.fromhex("0082 0000 00000001 0fa1 1388 00000708".replace(" ", ""))
    assert wire.read_pmp_map(answer, "tcp", 0x0FA1, 3600) == Granted(None, 5000, 1800)
    assert wire.read_pmp_public(bytes.fromhex("00800000000000011e000102")) == "30.0.1.2"


def test_pcp_is_laid_out_as_rfc_6887_says() -> None:
    request = wire.pcp_map_request(NONCE, "tcp", "192.168.1.7", 4001, 5000, None, 3600)
    assert len(request) == 60
    assert request[:8] == b"\2\1\0\0" + (3600).to_bytes(4, "big")
    assert request[8:24] == b"\0" * 10 + b"\xff\xff" + bytes([192, 168, 1, 7])
    assert request[24:36] == NONCE
    assert request[36:44] == b"\6\0\0\0" + (4001).to_bytes(2, "big") + (5000).to_bytes(2, "big")
    assert wire.read_pcp_map(pcp_answer(), NONCE, "tcp", 4001, 3600) == Granted("203.0.113.9", 4001, 3600)


def test_an_answer_to_somebody_else_is_no_answer() -> None:
    assert wire.read_pcp_map(pcp_answer(), b"x" * 12, "tcp", 4001, 3600) is None
    assert wire.read_pcp_map(pcp_answer(), NONCE, "tcp", 4002, 3600) is None
    assert wire.read_pcp_map(pcp_answer(), NONCE, "udp", 4001, 3600) is None
    answer = bytes.fromhex("00820000000000010fa1138800000708")
    assert wire.read_pmp_map(answer, "tcp", 1, 3600) is None
    assert wire.read_pmp_map(answer, "udp", 0x0FA1, 3600) is None


def test_a_router_that_refuses_is_quoted_and_one_of_the_older_protocol_known() -> None:
    refused = wire.read_pcp_map(pcp_answer(code=2), NONCE, "tcp", 4001, 3600)
    assert isinstance(refused, Refused) and "switched off" in refused.reason
    older = wire.read_pcp_map(bytes.fromhex("0080000100000001"), NONCE, "tcp", 4001, 3600)
    assert older == Refused("speaks NAT-PMP only", unsupported=True)
    assert wire.read_pmp_public(bytes.fromhex("0080000300000001")) == Refused(
        "has no connection to the internet itself"
    )
    assert isinstance(wire.read_pcp_map(pcp_answer(code=99), NONCE, "tcp", 4001, 3600), Refused)


def test_a_lifetime_is_believed_within_bounds() -> None:
    for granted, taken in ((2**32 - 1, 3600), (1, 120), (900, 900)):
        answer = wire.read_pcp_map(pcp_answer(lifetime=granted), NONCE, "tcp", 4001, 3600)
        assert answer == Granted("203.0.113.9", 4001, taken)
    for bad in (pcp_answer(lifetime=0), pcp_answer(port=0)):
        assert isinstance(wire.read_pcp_map(bad, NONCE, "tcp", 4001, 3600), Refused)


@given(st.binary(max_size=1200), st.sampled_from([b"", b"\0\x82", b"\0\x80", b"\2\x81\0\0", b"\0\x80\0\0"]))
def test_no_bytes_of_a_router_do_harm(data: bytes, head: bytes) -> None:
    for answer in (
        wire.read_pcp_map(head + data, NONCE, "tcp", 4001, 3600),
        wire.read_pmp_map(head + data, "tcp", 4001, 3600),
    ):
        assert answer is None or isinstance(answer, Refused) or 0 < answer.external_port <= 65535
    found = wire.read_pmp_public(head + data)
    assert found is None or isinstance(found, Refused) or wire.judge_external(found) is not None


@pytest.mark.parametrize(
    ("external", "word"),
    [
        ("8.8.8.8", ""),
        ("100.64.3.2", "carrier-grade NAT"),
        ("192.168.0.5", "double NAT"),
        ("127.0.0.1", "not public"),
        ("0.0.0.0", "no external address"),
        ("fe80::1", "not public"),
        ("<xml>", "gives no address"),
        ("", "gives no address"),
    ],
)
def test_the_external_address_is_judged(external: str, word: str) -> None:
    trouble = wire.judge_external(external)
    assert word in trouble
    assert bool(trouble) == bool(word)


def test_taking_back_by_upnp_asks_only_for_our_port() -> None:
    request = wire.upnp_delete_request("http://192.168.1.1:5000/ctl/IP\r\nX: y", 4001)
    head, _, body = request.partition(b"\r\n\r\n")
    assert b"<NewExternalPort>4001</NewExternalPort>" in body
    assert b"Content-Length: %d" % len(body) in head
    assert b"\r\nX: y" not in head


ROUTES = """\
Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
wlan0\t00000000\t0101A8C0\t0003\t0\t0\t600\t00000000\t0\t0\t0
eth0\t00000000\t0100000A\t0003\t0\t0\t100\t00000000\t0\t0\t0
eth0\t0000000A\t00000000\t0001\t0\t0\t100\t000000FF\t0\t0\t0
"""


def test_the_gateway_is_that_of_the_default_route_with_the_least_metric() -> None:
    assert gateway_of(ROUTES) == "10.0.0.1"
    assert gateway_of("\n".join(ROUTES.splitlines()[:1])) is None
    assert gateway_of("nonsense\nx y z\n") is None
    assert gateway_in("   route to: default\n    gateway: 192.168.1.1\n  interface: en0\n") == "192.168.1.1"
    assert gateway_in("    gateway: link#5\n") is None
