"""What the NAT lab and its node processes tell each other: one JSON object per line."""

from __future__ import annotations

import json
from typing import Any, TypeAlias

import attrs
import cattrs
from cattrs.strategies import configure_tagged_union

from ..transport.errors import DecodeError

# From the lab to a node


@attrs.frozen
class Attach:
    """Connect to the common peer. ``peer``: its id; ``addresses``: in text form."""

    peer: str
    addresses: tuple[str, ...]


@attrs.frozen
class Learn:
    """Keep a peer's signed record (hexadecimal), as if it came from the DHT."""

    record: str
    signature: str


@attrs.frozen
class Describe:
    """Answer with :class:`Account` as it is now."""


@attrs.frozen
class Meet:
    """Connect to ``peer`` and exchange a byte, then watch the link's way for ``watch`` seconds.

    Earlier when the way is among ``enough``. Answers: :class:`Met` or :class:`Failed`, then :class:`Watched`.
    """

    peer: str
    watch: float
    enough: tuple[str, ...]


@attrs.frozen
class Pull:
    """Fetch ``size`` bytes from a peer over the link; answer: :class:`Pulled` or :class:`Failed`."""

    peer: str
    size: int


@attrs.frozen
class Beat:
    """Exchange a byte with a peer every ``interval`` seconds for ``seconds``; answer: :class:`Beaten`.

    ``after``: once a beat was late or lost and then this many seconds went well, that is enough; 0: go on.
    """

    peer: str
    seconds: float
    interval: float
    after: float


Command: TypeAlias = Attach | Learn | Describe | Meet | Pull | Beat

# From a node to the lab


@attrs.frozen
class Account:
    """Who the node is: its signed record in hexadecimal, and what it knows of its own reachability."""

    peer: str
    addresses: tuple[str, ...]
    record: str
    signature: str
    relays: tuple[str, ...]
    reach: str
    reason: str


@attrs.frozen
class Linked:
    """The common peer is there. ``observed``: the address under which it sees us."""

    seconds: float
    observed: str


@attrs.frozen
class Met:
    """A byte went to the peer and back. ``seconds`` since the command; ``way`` of the link at that moment."""

    seconds: float
    way: str


@attrs.frozen
class Watched:
    """``changes``: (seconds since :class:`Meet`, way), the first entry is the way at the first byte."""

    changes: tuple[tuple[float, str], ...]


@attrs.frozen
class Pulled:
    seconds: float
    bytes: int


@attrs.frozen
class Beaten:
    """How a link fared. ``answered`` of ``asked`` beats; ``gap``: longest time without an answer, seconds.

    ``recovered``: the last beats were answered. ``links``: how many links served. ``ways``: (seconds, way) at each
    change. ``errors``: what failed calls said, each text once.
    """

    asked: int
    answered: int
    gap: float
    recovered: bool
    links: int
    ways: tuple[tuple[float, str], ...]
    errors: tuple[str, ...]


@attrs.frozen
class Failed:
    """The command could not be done, and why."""

    reason: str


Answer: TypeAlias = Account | Linked | Met | Watched | Pulled | Beaten | Failed

_converter = cattrs.Converter(forbid_extra_keys=True)
configure_tagged_union(Command, _converter, tag_name="what")
configure_tagged_union(Answer, _converter, tag_name="what")


def write_command(message: Command) -> bytes:
    return json.dumps(_converter.unstructure(message, unstructure_as=Command)).encode() + b"\n"


def write_answer(message: Answer) -> bytes:
    return json.dumps(_converter.unstructure(message, unstructure_as=Answer)).encode() + b"\n"


def read_command(line: bytes) -> Command:
    """Raises :class:`DecodeError`."""
    command: Command = _read(line, Command)
    return command


def read_answer(line: bytes) -> Answer:
    """Raises :class:`DecodeError`."""
    answer: Answer = _read(line, Answer)
    return answer


def _read(line: bytes, kind: Any) -> Any:
    try:
        return _converter.structure(json.loads(line), kind)
    except (ValueError, KeyError, TypeError, cattrs.BaseValidationError) as error:
        raise DecodeError(f"{line[:200]!r} is no message of the lab: {error}") from None
