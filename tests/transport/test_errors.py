"""The exception tree: what its docstring draws is what stands, and each error says what a user needs."""

from __future__ import annotations

import re

import pytest

from shoal.transport import errors


def drawn_tree() -> dict[str, str]:
    """Child → parent, read from the drawing in the module's docstring."""
    stack: list[tuple[int, str]] = []
    tree: dict[str, str] = {}
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^    ([│├└─ ]*)([A-Z]\w+)(\s|$)", line)
        if match is None:
            continue
        depth, name = len(match[1]), match[2]
        while stack and stack[-1][0] >= depth:
            stack.pop()
        if stack:
            tree[name] = stack[-1][1]
        stack.append((depth, name))
    return tree


def test_the_drawing_in_the_docstring_is_the_tree() -> None:
    classes = {
        name: kind
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.ShoalError) and kind is not errors.ShoalError
    }
    assert drawn_tree() == {name: kind.__bases__[0].__name__ for name, kind in classes.items()}


def test_every_error_is_either_local_or_remote() -> None:
    for parent in (errors.LocalError, errors.RemoteError):
        assert issubclass(parent, errors.ShoalError)
    assert not issubclass(errors.LocalError, errors.RemoteError)
    assert not issubclass(errors.RemoteError, errors.LocalError)


def test_a_remote_error_names_the_peer() -> None:
    error = errors.LinkClosed("end of file", peer="abcdefgh", goodbye=True)
    assert str(error) == "abcdefgh: end of file"
    assert (error.peer, error.message, error.goodbye) == ("abcdefgh", "end of file", True)
    assert str(errors.RemoteError("nobody known")) == "nobody known"


def test_an_expired_wait_names_the_peer_the_awaited_and_the_seconds() -> None:
    error = errors.WaitExpired("handshake", 2.5, peer="abcdefgh")
    assert str(error) == "abcdefgh: no handshake within 2.5 s"
    assert (error.awaited, error.seconds) == ("handshake", 2.5)


def test_an_unreachable_peer_says_what_each_way_answered() -> None:
    attempts = (("tcp://10.0.0.1:1", "refused"), ("tcp://[::1]:1", "no route"))
    error = errors.PeerUnreachable("no way worked", peer="abcdefgh", attempts=attempts)
    assert str(error) == "abcdefgh: no way worked (tcp://10.0.0.1:1: refused; tcp://[::1]:1: no route)"
    assert error.attempts == attempts


def test_a_refusal_carries_a_code_for_machines_and_a_reason_for_people() -> None:
    error = errors.RemoteRefused("full", "64 links are open", peer="abcdefgh")
    assert str(error) == "abcdefgh: refused (full): 64 links are open"
    assert (error.code, error.reason) == ("full", "64 links are open")


@pytest.mark.parametrize("kind", [errors.DecodeError, errors.HandshakeError, errors.RecordError])
def test_bytes_that_break_the_protocol_are_the_peers_fault(kind: type[errors.RemoteError]) -> None:
    assert issubclass(kind, errors.RemoteProtocolError)
