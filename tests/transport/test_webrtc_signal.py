"""What strangers may say about how to reach them by WebRTC, and what is refused before anything acts on it."""

from __future__ import annotations

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.transport import defaults
from shoal.transport.errors import DecodeError
from shoal.transport.webrtc_signal import Description, IceCandidate, TurnServer
from shoal.transport.wire import pack, unpack

GOOD = IceCandidate("host", "192.0.2.7", 40000, 2130706431, "1")
DESCRIPTION = Description("abcd", "p" * 22, bytes(32), (GOOD,))


def test_a_description_travels_as_it_is() -> None:
    assert unpack(Description, pack(DESCRIPTION)) == DESCRIPTION


def test_the_largest_description_fits_a_message() -> None:
    host = "2001:db8:1111:2222:3333:4444:5555:6666"
    candidates = tuple(
        IceCandidate("srflx", host, 65535 - n, (1 << 31) - 1, "f" * 32) for n in range(defaults.MAX_ICE_CANDIDATES)
    )
    largest = Description("u" * 32, "p" * 64, bytes(32), candidates)
    assert len(pack(largest)) <= defaults.MAX_WEBRTC_MESSAGE


@pytest.mark.parametrize(
    "change",
    [
        {"host": "example.org"},
        {"host": "printer.local"},
        {"host": "224.0.0.251"},
        {"host": "255.255.255.255"},
        {"host": "0.0.0.0"},
        {"host": "240.0.0.1"},
        {"host": "::"},
        {"host": "ff02::1"},
        {"host": "::ffff:192.0.2.1"},
        {"host": "fe80::1%eth0"},
        {"host": "2001:DB8::1"},
        {"port": 0},
        {"port": 65536},
        {"priority": 0},
        {"priority": 1 << 31},
        {"foundation": ""},
        {"foundation": "a b"},
        {"foundation": "a\r\n"},
        {"kind": "hostess"},
    ],
)
def test_a_candidate_that_no_check_may_go_to_is_refused(change: dict[str, object]) -> None:
    raw = {**attrs.asdict(GOOD), **change}
    packed = pack(DESCRIPTION).replace(pack(GOOD), pack(Raw(**raw)))  # type: ignore[arg-type]
    assert packed != pack(DESCRIPTION)
    with pytest.raises(DecodeError):
        unpack(Description, packed)


@attrs.frozen
class Raw:
    """A candidate without its checks."""

    kind: str
    host: str
    port: int
    priority: int
    foundation: str


@pytest.mark.parametrize(
    "change",
    [
        {"ufrag": "abc"},
        {"ufrag": "a" * 33},
        {"ufrag": "ab:cd"},
        {"password": "p" * 21},
        {"password": "p" * 65},
        {"password": "p" * 22 + "\n"},
        {"fingerprint": bytes(31)},
        {"candidates": (GOOD,) * (defaults.MAX_ICE_CANDIDATES + 1)},
    ],
)
def test_a_description_out_of_bounds_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        attrs.evolve(DESCRIPTION, **change)


@given(st.binary(max_size=300), st.integers(0, 150))
def test_no_bytes_do_more_than_not_decode(junk: bytes, at: int) -> None:
    packed = pack(DESCRIPTION)
    for candidate in (junk, packed[:at], packed[:at] + junk, packed[:at] + junk + packed[at + len(junk) :]):
        try:
            unpack(Description, candidate, limit=defaults.MAX_WEBRTC_MESSAGE)
        except DecodeError:
            pass


def test_a_stranger_cannot_aim_our_checks_at_this_machine() -> None:
    here = IceCandidate("host", "127.0.0.1", 631, 1, "1")
    here_too = IceCandidate("host", "::1", 631, 1, "2")
    described = attrs.evolve(DESCRIPTION, candidates=(here, GOOD, here_too))
    assert described.without_loopback().candidates == (GOOD,)


def test_a_turn_server_is_read_from_its_text() -> None:
    assert TurnServer.parse("turn:ann:s3cret:x@turn.example.org:3478") == TurnServer(
        "turn.example.org", 3478, "ann", "s3cret:x"
    )
    assert TurnServer.parse("turn:a:b@[2001:db8::1]:1").host == "2001:db8::1"


@pytest.mark.parametrize(
    "text", ["turn:host:1", "stun:a:b@host:1", "turn:a:b@host:0", "turn:a:b@host:99999", "turn:a:b@h o:1"]
)
def test_a_turn_server_in_another_form_is_refused_without_quoting_its_password(text: str) -> None:
    with pytest.raises(ValueError, match="turn:user:password@host:port"):
        TurnServer.parse(text)
