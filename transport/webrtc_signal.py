"""What two ends of a WebRTC connection tell each other, and what a parent and its engine do: strict messages.

Browsers exchange SDP, a text of a hundred kinds of lines. We exchange what a data channel needs of it as a typed
message through :mod:`shoal.transport.wire`: ICE credentials, UDP candidates that are IP literals, and the SHA-256 of
the DTLS certificate (ORTC's model of WebRTC, RFC 8839 without the text). So no SDP of a stranger is ever parsed. One
offer and one answer with all candidates gathered ("non-trickle"): one exchange through the common peer.

    parent                      engine (child process)
    Setup(interfaces, servers, remote or None) →
                                ← Local(description)
    Remote(description) →       (offerer only: the answerer had it in Setup)
                                ← Opened(local, remote, how)
    …bytes on the data socket, both ways…
                                ← Ended: the far side sent all it had; then end of file on the data socket
    Close →                     (flush, then exit)
                                ← Failed(reason, tried) at any time, then exit
"""

from __future__ import annotations

import ipaddress
import re
from typing import Literal

import attrs

from . import defaults
from .address import Address

#: ``ice-char`` of RFC 8839 5.4, with its bounds; the upper ones are ours (256 there).
_UFRAG = re.compile(r"[A-Za-z0-9+/]{4,32}")
_PASSWORD = re.compile(r"[A-Za-z0-9+/]{22,64}")
_FOUNDATION = re.compile(r"[A-Za-z0-9+/]{1,32}")

CandidateKind = Literal["host", "srflx", "prflx", "relay"]


@attrs.frozen
class IceCandidate:
    """One UDP address at which an end may be reached (RFC 8839 5.1). Raises ValueError for what nobody can dial."""

    kind: CandidateKind
    host: str
    port: int
    priority: int
    foundation: str

    def __attrs_post_init__(self) -> None:
        address = ipaddress.ip_address(self.host)
        if str(address) != self.host or getattr(address, "scope_id", None) is not None:
            raise ValueError("a candidate's host is an IP literal in its usual form, without a scope")
        # A stranger chooses where our checks go: not to groups, and not to what listens only on the machine itself.
        if address.is_multicast or address.is_unspecified or (address.is_reserved and not address.is_loopback):
            raise ValueError("a candidate at an address that is no host's")
        if not 1 <= self.port <= 65535 or not 1 <= self.priority < 1 << 31:
            raise ValueError("a candidate's port or priority is out of range")
        if not _FOUNDATION.fullmatch(self.foundation):
            raise ValueError("a candidate's foundation has other characters than ICE allows")

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.kind} {host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        return ipaddress.ip_address(self.host).is_loopback


@attrs.frozen
class Description:
    """One end's half: what the other needs to reach and recognise it. ``fingerprint``: SHA-256 of its certificate."""

    ufrag: str
    password: str
    fingerprint: bytes
    candidates: tuple[IceCandidate, ...]

    def __attrs_post_init__(self) -> None:
        if not _UFRAG.fullmatch(self.ufrag) or not _PASSWORD.fullmatch(self.password):
            raise ValueError("ICE credentials of another form than RFC 8839 gives them")
        if len(self.fingerprint) != 32:
            raise ValueError(f"a fingerprint of {len(self.fingerprint)} bytes, not 32")
        if len(self.candidates) > defaults.MAX_ICE_CANDIDATES:
            raise ValueError(f"{len(self.candidates)} candidates, at most {defaults.MAX_ICE_CANDIDATES} allowed")

    def without_loopback(self) -> Description:
        """Candidates of this very machine taken out: a stranger could aim our checks at what listens there."""
        return attrs.evolve(self, candidates=tuple(one for one in self.candidates if not one.is_loopback))


@attrs.frozen
class TurnServer:
    """A TURN server (RFC 8656) the user has an account at, over UDP."""

    host: str
    port: int
    user: str
    password: str

    _TEXT = re.compile(
        r"turn:(?P<user>[^:@\s]+):(?P<password>[^@\s]+)@(?:\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<host>[^:\[\]@\s]+)):(?P<port>[0-9]{1,5})"
    )

    @classmethod
    def parse(cls, text: str) -> TurnServer:
        """Read ``turn:user:password@host:port``. Raises ValueError, which does not quote the password."""
        match = cls._TEXT.fullmatch(text)
        if match is None or not 1 <= int(match["port"]) <= 65535:
            raise ValueError("a TURN server is written turn:user:password@host:port")
        return cls(match["six"] or match["host"], int(match["port"]), match["user"], match["password"])


@attrs.frozen
class IceServers:
    """Who may be asked for our outside addresses: STUN servers of public peers (UDP), and TURN if configured."""

    stun: tuple[Address, ...] = ()
    turn: TurnServer | None = None


# --- between parent and engine ------------------------------------------------------------------------------------


@attrs.frozen
class Setup:
    """``interfaces``: addresses of this machine to gather at; none: all but loopback. ``remote``: the answerer's."""

    interfaces: tuple[str, ...]
    servers: IceServers
    remote: Description | None
    #: Only for comparison: aiortc as it comes, without what webrtc_sctp.py changes.
    plain: bool = False


@attrs.frozen
class Remote:
    description: Description


@attrs.frozen
class Close:
    close: bool


@attrs.frozen
class ToEngine:
    message: Setup | Remote | Close


@attrs.frozen
class Local:
    local: Description


@attrs.frozen
class Opened:
    """The channel is open, over the pair of addresses that ICE chose. ``how``: their kinds, for people."""

    ours: Address
    theirs: Address
    how: str


@attrs.frozen
class Ended:
    """The far side has sent all it had; end of file follows on the data socket."""

    ended: bool


@attrs.frozen
class Failed:
    """No connection, or it is lost. ``tried``: the pairs of candidates that were checked."""

    reason: str
    tried: tuple[str, ...] = ()


@attrs.frozen
class FromEngine:
    message: Local | Opened | Ended | Failed
