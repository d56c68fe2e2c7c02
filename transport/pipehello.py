"""The hello by which a further pipe joins a session, sans-IO: both ends prove that they share it, and get fresh keys.

::

    opener    preamble · session id 16 · index u32 · way u8 · flags u8 · fresh bytes 32 · proof 16
    other     preamble · status u8 · fresh bytes 32 · proof 16

The preamble is that of :mod:`secure` with the name ``shoal-pipe``. All secrets derive from the session's exporter:
the session id (which shows nothing of it), the key of the proofs, and the two keys of the pipe, which also take in
everything both hellos hold. An index is used once in a session (the initiator's are odd, the responder's even), so
neither a retry nor a rekey repeats a key and nonce, and a recorded hello opens nothing. A refusal carries no proof: it
ends only what was ending anyway, and is shown as one of our own texts.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Callable

from . import defaults
from .errors import HandshakeError, LinkClosed
from .records import Buffer, Record, RecordOpener, RecordSealer
from .secure import MAGIC, PIPE_NAME, VERSION

_PREAMBLE = MAGIC + VERSION.pack(defaults.WIRE_VERSION) + bytes([len(PIPE_NAME)]) + PIPE_NAME
_BODY = struct.Struct(">16sIBB32s")
_ANSWER = struct.Struct(">B32s")
_PROOF = 16
#: Bytes of a whole hello, and of a whole answer, preamble included.
HELLO_BYTES = len(_PREAMBLE) + _BODY.size + _PROOF
ANSWER_BYTES = len(_PREAMBLE) + _ANSWER.size + _PROOF

#: The ways by which a pipe can come about, best first; their places travel.
WAYS = ("direct", "reversal", "punch", "webrtc", "relay")

#: Flag: this pipe is for bulk, beside one of the same way.
BULK_ONLY = 1

_REFUSALS = {
    1: "it does not know this session (it has restarted, or closed the link)",
    2: "this pipe's number was used before",
    3: "the proof that we share the session does not hold",
    4: "it has as many pipes as it allows",
}
UNKNOWN_SESSION, USED_INDEX, BAD_PROOF, TOO_MANY = _REFUSALS


class SessionSecrets:
    """What pipes need of a session, from its exporter secret (32 bytes)."""

    def __init__(self, exporter: bytes, cipher: str, *, initiator: bool) -> None:
        self.id = hashlib.blake2b(key=exporter, person=b"shoal session id", digest_size=16).digest()
        self.cipher = cipher
        self.initiator = initiator
        self._exporter = exporter
        self._proof_key = hashlib.blake2b(key=exporter, person=b"shoal pipe proof", digest_size=32).digest()
        self._next = 1 if initiator else 2
        self._highest = 0  # index of the other side so far
        self._used = 1  # a bit for that one, and one for each before it

    def next_index(self) -> int:
        """One above all that were used so far, by either side: of pipes that are alike the highest counts.

        Raises :class:`LinkClosed`: a link that has used them all up gets no further pipe.
        """
        index = self._next
        if index < self._highest:
            index = self._highest + 1
        if index > defaults.MAX_PIPE_INDEX:
            raise LinkClosed("this link has used up the numbers of its pipes")
        self._next = index + 2
        return index

    def use(self, index: int) -> bool:
        """Note the other side's ``index``; False when it is not one of theirs, or was used, or is too old to tell."""
        if index & 1 == (1 if self.initiator else 0) or not 0 < index <= defaults.MAX_PIPE_INDEX:
            return False
        ahead = index - self._highest
        if ahead > 0:
            kept = self._used << ahead if ahead < defaults.PIPE_INDEX_WINDOW else 0
            self._used = (kept | 1) & ((1 << defaults.PIPE_INDEX_WINDOW) - 1)
            self._highest = index
            return True
        if -ahead >= defaults.PIPE_INDEX_WINDOW or self._used >> -ahead & 1:
            return False
        self._used |= 1 << -ahead
        return True

    def proof(self, data: bytes) -> bytes:
        return hashlib.blake2b(data, key=self._proof_key, person=b"shoal pipe hello", digest_size=_PROOF).digest()

    def channel(self, transcript: bytes, *, opener: bool) -> PipeChannel:
        """The records of the pipe that ``transcript`` (hello and answer) opened."""

        def secret(direction: bytes) -> bytes:
            return hashlib.blake2b(
                transcript + direction, key=self._exporter, person=b"shoal pipe keys\0", digest_size=32
            ).digest()

        ours, theirs = (b">", b"<") if opener else (b"<", b">")
        return PipeChannel(RecordSealer(self.cipher, secret(ours)), RecordOpener(self.cipher, secret(theirs)))


class PipeChannel:
    """The records of a further pipe; the face of :class:`SecureChannel` that a link uses."""

    def __init__(self, sealer: RecordSealer, opener: RecordOpener) -> None:
        self.sealer = sealer
        self.opener = opener

    def receive(self, data: Buffer) -> list[Record]:
        """Raises :class:`RecordError`."""
        return self.opener.feed(data)

    def eof(self) -> None:
        self.opener.eof()


class PipeOpening:
    """The opener's side: send :attr:`hello`, feed what comes to :meth:`receive`."""

    def __init__(
        self, secrets: SessionSecrets, way: str, *, bulk_only: bool, entropy: Callable[[int], bytes], peer: str
    ) -> None:
        self.index = secrets.next_index()
        flags = BULK_ONLY if bulk_only else 0
        hello = _PREAMBLE + _BODY.pack(secrets.id, self.index, WAYS.index(way), flags, entropy(32))
        self.hello = hello + secrets.proof(hello)
        self._secrets, self._peer = secrets, peer
        self._got = bytearray()

    @property
    def missing(self) -> int:
        """Bytes of the answer that have not come; no more may be read: what follows are records."""
        return ANSWER_BYTES - len(self._got)

    def receive(self, data: Buffer) -> PipeChannel | None:
        """The pipe's channel once the answer is whole. Raises :class:`HandshakeError`: refused, or nonsense."""
        self._got += data
        answer = bytes(self._got)
        if not answer.startswith(_PREAMBLE[: len(answer)]):
            raise HandshakeError("it does not answer like a Shoal peer of our version", peer=self._peer)
        if len(answer) < ANSWER_BYTES:
            return None
        if answer[len(_PREAMBLE) :].startswith(self._secrets.id):
            # TCP's simultaneous open: one connection that both sides dialled. Whoever tries again first has another.
            raise HandshakeError("it dialled us at the same moment, on the same connection", peer=self._peer)
        status, _ = _ANSWER.unpack_from(answer, len(_PREAMBLE))
        if status:
            why = _REFUSALS.get(status, "for a reason that a newer version knows")
            raise PipeRefused(f"the pipe was refused: {why}", code=status, peer=self._peer)
        if not hmac.compare_digest(answer[-_PROOF:], self._secrets.proof(self.hello + answer[:-_PROOF])):
            raise HandshakeError("the answer to a pipe's hello does not prove the session", peer=self._peer)
        return self._secrets.channel(self.hello + answer, opener=True)


class PipeRefused(HandshakeError):
    """The other side does not take the pipe. ``code`` says why; nobody vouches for it."""

    def __init__(self, message: str, *, code: int, peer: str = "") -> None:
        super().__init__(message, peer=peer)
        self.code = code


class PipeGreeting:
    """A whole hello, as the other side reads it. Raises :class:`HandshakeError` when it is not one."""

    def __init__(self, hello: bytes) -> None:
        if len(hello) != HELLO_BYTES or not hello.startswith(_PREAMBLE):
            raise HandshakeError("not a pipe's hello")
        self.session, self.index, way, flags, _ = _BODY.unpack_from(hello, len(_PREAMBLE))
        if way >= len(WAYS) or flags & ~BULK_ONLY:
            raise HandshakeError("a pipe's hello from a newer version")
        self.way = WAYS[way]
        self.bulk_only = bool(flags & BULK_ONLY)
        self._hello = hello

    def answer(self, secrets: SessionSecrets, entropy: Callable[[int], bytes]) -> tuple[bytes, PipeChannel]:
        """The bytes to send and the pipe's channel. Raises :class:`PipeRefused`; then :func:`refusal` is to be sent."""
        proof = secrets.proof(self._hello[:-_PROOF])
        if not hmac.compare_digest(self._hello[-_PROOF:], proof):
            raise PipeRefused("a pipe's hello without proof of its session", code=BAD_PROOF)
        if not secrets.use(self.index):
            raise PipeRefused(f"a pipe's hello whose number {self.index} was used before", code=USED_INDEX)
        answer = _PREAMBLE + _ANSWER.pack(0, entropy(32))
        answer += secrets.proof(self._hello + answer)
        return answer, secrets.channel(self._hello + answer, opener=False)


def refusal(code: int) -> bytes:
    """The answer that refuses a pipe."""
    return _PREAMBLE + _ANSWER.pack(code, bytes(32)) + bytes(_PROOF)


__all__ = [
    "ANSWER_BYTES", "BAD_PROOF", "HELLO_BYTES", "TOO_MANY", "UNKNOWN_SESSION", "USED_INDEX", "WAYS",
    "PipeChannel", "PipeGreeting", "PipeOpening", "PipeRefused", "SessionSecrets", "refusal",
]  # fmt: skip
