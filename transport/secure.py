"""The secure channel, sans-IO: a Noise handshake that proves both identities, then encrypted records.

On the wire::

    preamble   magic (8 bytes), wire version (2, big-endian), length (1), Noise protocol name; each side's first bytes
    frames     kind (1), length (3, big-endian), body:   1 = Noise message   2 = refusal (body: one code)
    records    see records.py; their first byte is 0, or above 127

    initiator                                   responder
    preamble, e                         ->
                                        <-      preamble, e ee s es + Hello
    s se + Hello                        ->
    records                            <->      records

Two that dial each other from their listening ports at the same moment may get one pipe that both have opened (TCP's
simultaneous open). Both then say message 1; who said the smaller one goes on as the initiator, the other answers it.

The preamble is in the clear so that two versions can tell each other which they speak; the prologue of the handshake
holds it too, so nobody changes it unnoticed. A :class:`Hello` certifies the X25519 key of its sender with the peer's
identity key, and offers ciphers. A refusal says why the handshake ends; nobody vouches for it (it may come before any
key is shared), so it is only ever shown, as one of our own texts, and ends what was ending anyway.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable, Sequence
from functools import partial

import attrs

from . import defaults
from .aead import CipherOffer, choose, local_ciphers
from .credentials import Credentials, read_hello
from .errors import DecodeError, HandshakeError, ProtocolMisuse, RecordError, RemoteProtocolError
from .identity import Identity, PeerId
from .noise import HandshakeState, protocol_name
from .records import Buffer, Record, RecordOpener, RecordSealer

#: No text protocol and no TLS begins like this; the line break shows pipes that alter line breaks.
MAGIC = b"\xf5shoal\r\n"

VERSION = struct.Struct(">H")
_FRAME = 4
_EXPORTER_LABEL = b"shoal exporter v1\0"
#: What stands in the preamble of a further pipe instead of the name of a Noise protocol.
PIPE_NAME = b"shoal-pipe"
_PATTERNS = {protocol_name("XX"): "an open swarm", protocol_name("XXpsk0"): "a private swarm"}
_STRANGERS = {
    b"GET ": "HTTP",
    b"POST": "HTTP",
    b"HEAD": "HTTP",
    b"PUT ": "HTTP",
    b"OPTI": "HTTP",
    b"HTTP": "HTTP",
    b"PRI ": "HTTP/2",
    b"\x16\x03": "TLS",
    b"SSH-": "SSH",
}


@attrs.frozen
class Established:
    """The peer has proved to be ``peer``; records travel under ``cipher``."""

    peer: PeerId
    cipher: str


class PipeKnock(Exception):
    """Not a new link begins here but a further pipe of one (:mod:`pipehello`). ``got``: all bytes that have come."""

    def __init__(self, got: bytes) -> None:
        super().__init__("a pipe's hello")
        self.got = got


class _Frame(enum.IntEnum):
    MESSAGE = 1
    REFUSAL = 2


class _Refusal(enum.IntEnum):
    """Why a handshake ends, as told to the other side. The texts are for the one who is refused."""

    MALFORMED = 1
    NOT_A_MEMBER = 2
    OTHER_PEER = 3
    OURSELVES = 4
    CERTIFICATE = 5
    EXPIRED = 6
    NO_CIPHER = 7


_REFUSAL_TEXTS = {
    _Refusal.MALFORMED: "it could not read our handshake",
    _Refusal.NOT_A_MEMBER: "we are not a member of its private swarm, or have another key",
    _Refusal.OTHER_PEER: "it expected another peer than us",
    _Refusal.OURSELVES: "it is ourselves",
    _Refusal.CERTIFICATE: "the certificate of our session key is not valid",
    _Refusal.EXPIRED: "by its clock our certificate is out of date; one of the two clocks is wrong",
    _Refusal.NO_CIPHER: "no cipher in common",
}


class SecureChannel:
    """One side of a secure channel over one ordered byte pipe.

    ``entropy``: source of the session's keys. ``wall``: now, Unix seconds. ``expected``: the only peer to accept.
    ``psk``: the 32-byte key of a private swarm. ``credentials``: of the node, to be used again; default: some for this
    channel alone. ``ciphers``: what to offer; default: what this machine measured, which
    differs between machines and runs (give :data:`aead.NOMINAL_CIPHERS` where that must not be).

    Use: send :meth:`start`; feed received bytes to :meth:`receive` and send :meth:`outgoing` after each call, also
    after one that raised: it then tells the peer why, if anything can. Once ``established``, :meth:`seal` records.
    Feed :meth:`eof` with the end of the pipe.
    """

    def __init__(
        self,
        *,
        initiator: bool,
        identity: Identity,
        entropy: Callable[[int], bytes],
        wall: float,
        expected: PeerId | None = None,
        psk: bytes | None = None,
        ciphers: tuple[CipherOffer, ...] | None = None,
        credentials: Credentials | None = None,
    ) -> None:
        if psk is not None and len(psk) != 32:
            raise ProtocolMisuse(f"the key of a private swarm has 32 bytes, not {len(psk)}")
        self.initiator = initiator
        #: Why ``cipher`` was chosen.
        self.cipher_reason = ""
        self._identity = identity
        self._wall = wall
        self._expected = expected
        self._ciphers = local_ciphers() if ciphers is None else ciphers
        self._private = psk is not None
        pattern = "XXpsk0" if self._private else "XX"
        name = protocol_name(pattern).encode()
        self._preamble = MAGIC + VERSION.pack(defaults.WIRE_VERSION) + bytes([len(name)]) + name
        credentials = credentials or Credentials(identity, entropy)
        static = credentials.at(wall)
        self._hello = credentials.hello(self._ciphers)
        self._new_noise = partial(
            HandshakeState, pattern, prologue=self._preamble, static=static, entropy=entropy, psk=psk
        )
        self._noise = self._new_noise(initiator=initiator)
        self._first: bytes | None = None  # our message 1, until the other side's first has come
        self._started = False
        self._preamble_sent = False
        self._preamble_read = False
        #: A responder has read message 1: in a private swarm the peer has shown that it knows the key.
        self._greeted = False
        self._failure: RemoteProtocolError | None = None
        self._buffer = bytearray()
        self._out = bytearray()
        self._peer: PeerId | None = None
        self._cipher = ""
        self._exporter = b""
        self._sealer: RecordSealer | None = None
        self._opener: RecordOpener | None = None
        #: Ours was the last word of the handshake, and the peer has not yet shown that it liked it.
        self._unconfirmed = False

    # What is known once established

    @property
    def established(self) -> bool:
        """True once the peer has proved who it is and records can be sealed; also after a later error."""
        return self._sealer is not None

    @property
    def peer(self) -> PeerId:
        """Who is at the other end."""
        if self._peer is None or not self.established:
            raise ProtocolMisuse("the handshake has not finished")
        return self._peer

    @property
    def cipher(self) -> str:
        """Name of the suite of the records."""
        return self._cipher

    @property
    def exporter(self) -> bytes:
        """32 secret bytes of this session, the same on both sides, bound to the whole handshake."""
        if not self.established:
            raise ProtocolMisuse("the handshake has not finished")
        return self._exporter

    @property
    def sealer(self) -> RecordSealer:
        """What seals the records of this pipe."""
        if self._sealer is None:
            raise ProtocolMisuse("the handshake has not finished")
        return self._sealer

    # Bytes out

    def start(self) -> bytes:
        """The bytes to send first: the initiator's preamble and message 1, nothing for a responder."""
        if self._started:
            raise ProtocolMisuse("started twice")
        self._started = True
        if self.initiator:
            self._say_preamble()
            self._first = self._noise.write_message()
            self._send(_Frame.MESSAGE, self._first)
        return self.outgoing()

    def outgoing(self) -> bytes:
        """Handshake bytes that are now due; empty when there are none."""
        due = bytes(self._out)
        self._out.clear()
        return due

    def seal(self, parts: Sequence[Buffer]) -> bytearray | memoryview:
        """One record for the wire from the concatenation of ``parts`` (see :meth:`RecordSealer.seal`)."""
        if self._sealer is None:
            raise ProtocolMisuse("the handshake has not finished")
        return self._sealer.seal(parts)

    def _say_preamble(self) -> None:
        if not self._preamble_sent:
            self._out += self._preamble
            self._preamble_sent = True

    def _send(self, kind: _Frame, body: bytes) -> None:
        self._out += bytes([kind]) + len(body).to_bytes(3, "big") + body

    def _refuse(self, why: _Refusal, message: str, *, peer: str = "") -> HandshakeError:
        """Leave word for the peer; returns the error to raise here."""
        self._say_preamble()
        self._send(_Frame.REFUSAL, bytes([why]))
        return HandshakeError(message, peer=peer or self._expected_name)

    @property
    def _expected_name(self) -> str:
        return self._expected.short if self._expected is not None else ""

    # Bytes in

    def receive(self, data: Buffer) -> list[Established | Record]:
        """Take bytes as they come and return what they complete. ``data`` is not kept.

        Raises :class:`HandshakeError` or :class:`RecordError`, from then on always: the channel is dead. A responder
        raises :class:`PipeKnock` for the hello of a further pipe.
        """
        if not self._started:
            raise ProtocolMisuse("receive before start")
        if self._failure is not None:
            raise self._failure
        try:
            return self._receive(data)
        except RemoteProtocolError as failure:
            self._failure = failure
            raise

    @property
    def opener(self) -> RecordOpener | None:
        """What bytes may be given to directly, from when on only records come."""
        return None if self._unconfirmed else self._opener

    def eof(self) -> None:
        """The pipe has ended. Raises :class:`HandshakeError` or :class:`RecordError` when that cuts something short."""
        if self._failure is not None:
            raise self._failure
        if self._opener is None:
            self._failure = HandshakeError("the connection ended during the handshake", peer=self._expected_name)
            raise self._failure
        try:
            self._opener.feed(self._buffer)  # what was held back in case it was a refusal
            self._opener.eof()
        except RecordError as failure:
            self._failure = RecordError(failure.message, peer=self.peer.short)
            raise self._failure from None

    def _receive(self, data: Buffer) -> list[Established | Record]:
        events: list[Established | Record] = []
        if not self.established:
            self._buffer += data
            if not self._shake_hands():
                return events
            events.append(Established(self.peer, self._cipher))
            data, self._buffer = self._buffer, bytearray()
        if self._unconfirmed:
            self._buffer += data
            if not self._confirmed():
                return events
            self._unconfirmed = False
            data, self._buffer = self._buffer, bytearray()
        assert self._opener is not None
        try:
            events.extend(self._opener.feed(data))
        except RecordError as failure:
            raise RecordError(failure.message, peer=self.peer.short) from None
        return events

    def _shake_hands(self) -> bool:
        """Work on what is in the buffer; True when that completes the handshake."""
        if not self._preamble_read:
            self._read_preamble()
        while self._preamble_read and not self.established:
            frame = self._next_frame()
            if frame is None:
                break
            self._read_frame(*frame)
        return self.established

    def _read_preamble(self) -> None:
        got = bytes(self._buffer[:300])
        if got[: len(MAGIC)] != MAGIC[: len(got)]:
            raise HandshakeError(_stranger(got), peer=self._expected_name)
        at = len(MAGIC) + VERSION.size
        if len(got) < at:
            return
        (version,) = VERSION.unpack_from(got, len(MAGIC))
        if version != defaults.WIRE_VERSION:
            self._say_preamble()  # enough for the other side to say the same
            raise HandshakeError(
                f"it speaks wire version {version}, we speak version {defaults.WIRE_VERSION}; "
                f"update the one with the lower version",
                peer=self._expected_name,
                lasting=True,
            )
        if len(got) <= at or len(got) < at + 1 + got[at]:
            return
        name = got[at + 1 : at + 1 + got[at]]
        if name == PIPE_NAME and not self.initiator:
            raise PipeKnock(bytes(self._buffer))
        if got[: at + 1 + got[at]] != self._preamble:
            self._say_preamble()
            theirs = _PATTERNS.get(name.decode("ascii", "replace"))
            raise HandshakeError(
                "it speaks another handshake than we do"
                if theirs is None
                else f"it belongs to {theirs}, we to {'a private' if self._private else 'an open'} swarm",
                peer=self._expected_name,
                lasting=True,
            )
        del self._buffer[: len(self._preamble)]
        self._say_preamble()
        self._preamble_read = True

    def _next_frame(self) -> tuple[int, bytes] | None:
        if len(self._buffer) < _FRAME:
            return None
        kind, length = self._buffer[0], int.from_bytes(self._buffer[1:_FRAME], "big")
        if kind not in (_Frame.MESSAGE, _Frame.REFUSAL) or length > defaults.MAX_HANDSHAKE:
            raise self._refuse(
                _Refusal.MALFORMED, f"a broken handshake: a frame of kind {kind} that announces {length} bytes"
            )
        if len(self._buffer) < _FRAME + length:
            return None
        body = bytes(self._buffer[_FRAME : _FRAME + length])
        del self._buffer[: _FRAME + length]
        return kind, body

    def _read_frame(self, kind: int, body: bytes) -> None:
        if kind == _Frame.REFUSAL:
            raise self._refused(body)
        if self._first is not None and self._crossed(body):
            return
        try:
            payload = self._noise.read_message(body)
        except HandshakeError as error:
            if self._private and not self.initiator and not self._greeted:
                raise self._refuse(
                    _Refusal.NOT_A_MEMBER, "it is not a member of this private swarm, or has another key"
                ) from None
            raise self._refuse(_Refusal.MALFORMED, f"a broken handshake: {error.message}") from None
        if self.initiator:
            self._check_hello(payload)
            self._send(_Frame.MESSAGE, self._noise.write_message(self._hello))
            self._finish()
        elif not self._greeted:
            self._greeted = True
            if payload:
                raise self._refuse(_Refusal.MALFORMED, "a broken handshake: message 1 holds data")
            self._send(_Frame.MESSAGE, self._noise.write_message(self._hello))
        else:
            self._check_hello(payload)
            self._finish()

    def _crossed(self, body: bytes) -> bool:
        """The first message that comes to us, who have said message 1: is it a message 1 that we need not answer?"""
        first, self._first = self._first, None
        if first is None or len(body) != len(first):
            return False
        if body == first:
            raise self._refuse(_Refusal.OURSELVES, "this is ourselves: our own bytes come back")
        if body < first:
            self.initiator = False
            self._noise = self._new_noise(initiator=False)
        return self.initiator

    def _refused(self, body: bytes) -> HandshakeError:
        try:
            why: _Refusal | None = _Refusal(int.from_bytes(body, "big"))
        except ValueError:
            why = None
        text = "for a reason unknown to this version" if why is None else _REFUSAL_TEXTS[why]
        lasting = why in (_Refusal.NOT_A_MEMBER, _Refusal.NO_CIPHER)
        return HandshakeError(f"it refused the handshake: {text}", peer=self._expected_name, lasting=lasting)

    def _confirmed(self) -> bool:
        """Has the peer taken our last handshake message? What it sends first is a record, or a refusal of it."""
        if self._buffer[:1] != bytes([_Frame.REFUSAL]):
            return bool(self._buffer)
        if len(self._buffer) <= _FRAME:
            return False
        if self._buffer[1:_FRAME] == b"\0\0\1":
            raise self._refused(bytes(self._buffer[_FRAME : _FRAME + 1]))
        return True  # not a refusal of ours: the record layer will say what is wrong

    # Proofs

    def _check_hello(self, payload: bytes) -> None:
        """Check who the peer is, and choose the cipher."""
        assert self._noise.remote_static is not None
        try:
            hello = read_hello(payload, self._noise.remote_static)
        except DecodeError as error:
            raise self._refuse(_Refusal.MALFORMED, f"a broken handshake: {error.message}") from None
        except HandshakeError as error:
            raise self._refuse(_Refusal.CERTIFICATE, error.message) from None
        peer = hello.peer
        if peer == self._identity.peer_id:
            raise self._refuse(_Refusal.OURSELVES, "this is ourselves: a node does not connect to itself")
        if self._expected is not None and peer != self._expected:
            raise self._refuse(_Refusal.OTHER_PEER, f"expected peer {self._expected.short}, but {peer.short} answered")
        ahead = hello.expires - self._wall
        if not -defaults.CLOCK_SKEW <= ahead <= 2 * defaults.CERTIFICATE_LIFETIME:
            off = ahead - defaults.CERTIFICATE_LIFETIME
            raise self._refuse(
                _Refusal.EXPIRED,
                f"the certificate of its session key is out of date: its clock is {abs(off):.0f} s "
                f"{'ahead of' if off > 0 else 'behind'} ours, or this is an old recording",
                peer=peer.short,
            )
        self._check_offers(peer, hello.ciphers)
        try:
            self._cipher, self.cipher_reason = choose(self._ciphers, hello.ciphers)
        except HandshakeError as error:
            raise self._refuse(_Refusal.NO_CIPHER, error.message, peer=peer.short) from None
        self._peer = peer

    def _check_offers(self, peer: PeerId, offers: tuple[CipherOffer, ...]) -> None:
        names = [offer.name for offer in offers]
        if len(names) > defaults.MAX_CIPHER_OFFERS or len(dict.fromkeys(names)) != len(names):
            raise self._refuse(
                _Refusal.MALFORMED, "a broken handshake: too many ciphers, or one offered twice", peer=peer.short
            )
        if any(offer.mb_per_s < 1 for offer in offers):
            raise self._refuse(_Refusal.MALFORMED, "a broken handshake: a cipher without a speed", peer=peer.short)

    def _finish(self) -> None:
        sending, receiving = self._noise.split()
        self._exporter = self._noise.export(_EXPORTER_LABEL)
        self._sealer = RecordSealer(self._cipher, sending)
        self._opener = RecordOpener(self._cipher, receiving)
        self._unconfirmed = self.initiator
        # From here on a stolen memory must not give away how the first keys came about.
        del self._noise, self._new_noise


def _stranger(got: bytes) -> str:
    """What to say of one whose first bytes are not Shoal's."""
    kind = next((name for start, name in _STRANGERS.items() if got.startswith(start)), None)
    if kind is not None:
        return f"not a Shoal peer: it speaks {kind}"
    begin = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in got[:16])
    return f"not a Shoal peer: its first bytes are {begin!r}"
