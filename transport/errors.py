"""Every error that Shoal raises on purpose.

::

    ShoalError
    ├── LocalError                 ours: a bug or a setting on this machine
    │   ├── ConfigError            an argument, a file, a key, a ticket: names it and says what to do
    │   ├── ProtocolMisuse         a core was driven in a way its contract forbids (our bug)
    │   └── Overloaded             a bounded resource of ours is used up
    └── RemoteError                theirs: a peer, or the network between; ``.peer`` names it when known
        ├── PeerUnreachable        no way to the peer succeeded; ``.attempts`` says what each way answered
        ├── LinkClosed             the link ended (goodbye, reset, end of file)
        ├── StreamReset            the peer reset this one stream, with a code
        ├── WaitExpired            a named wait ran out: peer, what was awaited, seconds
        ├── RemoteRefused          a typed refusal: code and message from the peer
        └── RemoteProtocolError    bytes that break the protocol; the link ends
            ├── DecodeError        a message that does not decode strictly into its type
            ├── HandshakeError     wrong identity, wrong version, wrong key, bad proof
            └── RecordError        an altered, replayed, reordered or truncated record

A ``RemoteError`` ends at most what belongs to that peer; a ``LocalError`` reaches the user.
"""

from __future__ import annotations


class ShoalError(Exception):
    """Base of everything Shoal raises on purpose."""


class LocalError(ShoalError):
    """Our bug, our configuration, our limits."""


class ConfigError(LocalError):
    """Something the user gave (argument, file, key, ticket) is unusable; the text says what to do."""


class ProtocolMisuse(LocalError):
    """A sans-IO core was called against its contract."""


class Overloaded(LocalError):
    """A bounded local resource is used up."""


class RemoteError(ShoalError):
    """A peer's fault, or the network's. ``peer`` is a short name of the peer, empty when unknown.

    ``lasting``: the same again would fail for the same reason (another version, another swarm's key).
    """

    lasting = False

    def __init__(self, message: str, *, peer: str = "") -> None:
        super().__init__(f"{peer}: {message}" if peer else message)
        self.peer = peer
        self.message = message


class PeerUnreachable(RemoteError):
    """No way to the peer succeeded. ``attempts`` holds ``(address, reason)`` pairs."""

    def __init__(
        self, message: str, *, peer: str = "", attempts: tuple[tuple[str, str], ...] = (), lasting: bool = False
    ) -> None:
        detail = "; ".join(f"{address}: {reason}" for address, reason in attempts)
        super().__init__(f"{message} ({detail})" if detail else message, peer=peer)
        self.summary = message
        self.attempts = attempts
        self.lasting = lasting

    @property
    def reason(self) -> str:
        """Why, in short: what the one attempt met, or everything where there were several."""
        return self.attempts[0][1] if len(self.attempts) == 1 else str(self)


class LinkClosed(RemoteError):
    """The link is gone. ``goodbye`` is True when the peer said so before it left."""

    def __init__(self, message: str, *, peer: str = "", goodbye: bool = False) -> None:
        super().__init__(message, peer=peer)
        self.goodbye = goodbye


class StreamReset(RemoteError):
    """The peer reset a stream; ``code`` is the peer's reason."""

    def __init__(self, message: str, *, peer: str = "", code: int = 0) -> None:
        super().__init__(message, peer=peer)
        self.code = code


class WaitExpired(RemoteError):
    """A named wait ran out: ``awaited`` says what for, ``seconds`` how long it was given."""

    def __init__(self, awaited: str, seconds: float, *, peer: str = "") -> None:
        super().__init__(f"no {awaited} within {seconds:.1f} s", peer=peer)
        self.awaited = awaited
        self.seconds = seconds


class RemoteRefused(RemoteError):
    """The peer answered with a typed refusal: ``code`` is machine-readable, the message for people."""

    def __init__(self, code: str, message: str, *, peer: str = "") -> None:
        super().__init__(f"refused ({code}): {message}", peer=peer)
        self.code = code
        self.reason = message


class RemoteProtocolError(RemoteError):
    """Bytes from the peer break the protocol."""


class DecodeError(RemoteProtocolError):
    """A message does not decode strictly into its type."""


class HandshakeError(RemoteProtocolError):
    """The secure handshake failed: identity, version, key or proof."""

    def __init__(self, message: str, *, peer: str = "", lasting: bool = False) -> None:
        super().__init__(message, peer=peer)
        self.lasting = lasting


class RecordError(RemoteProtocolError):
    """An altered, replayed, reordered or truncated record."""
