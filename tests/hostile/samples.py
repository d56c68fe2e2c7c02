"""Valid values of any message class, drawn at random, and bytes bent out of shape: what hostile tests feed to decoders.

Every draw comes from a ``random.Random``: hypothesis gives one that it can shrink, the fuzzer one with a seed.
"""

from __future__ import annotations

import enum
import random
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

import attrs
import msgpack

from shoal.dht.documents.messages import Accused, Advert, Node, Want
from shoal.dht.documents.policy import DocumentSpec, Listed, Members, Owner
from shoal.learning.pipeline.messages import STATES, Beat, Hop, Kept, Key, Look, Pull, Push, Seat, Shape
from shoal.learning.reduce.codecs import NAMES
from shoal.learning.rounds.lies import Lie
from shoal.learning.rounds.messages import Signed
from shoal.learning.rounds.payloads import Payload
from shoal.learning.rounds.statements import Combined
from shoal.learning.shard import Shard
from shoal.learning.spec import Pipeline, StageOf
from shoal.learning.sync import HeadInfo
from shoal.transport.address import Address, SignedPeerRecord
from shoal.transport.identity import Identity, PeerId
from shoal.transport.webrtc_signal import Description, IceCandidate

#: Unix seconds at which hostile tests play.
WALL = 1.7e9

IDENTITIES = tuple(Identity(bytes([number]) * 32) for number in range(1, 5))

_INTS = (0, 1, 2, 3, 17, 127, 128, 255, 256, 65535, 65536, (1 << 31) - 1, 1 << 32, (1 << 63) - 1)
_ODD_INTS = (-1, -128, -(1 << 63), 1 << 63, (1 << 64) - 1)
_FLOATS = (0.0, 1.0, -1.0, 0.5, WALL + 3600, 1e-300, 1e300, -1e300)
_TEXTS = (
    "",
    "a",
    "mem",
    "tcp",
    "run",
    "owned",
    "reduce",
    "α",
    "x" * 64,
    "x" * 300,
    "\0",
    "\x1b[2J",
    "a/b:c.d",
    "shoal1",
)


_NAMED = {
    "codec": NAMES,
    "aggregator": ("mean", "flag", "nnm+median:f=1", "x+y"),
    "audit": (0.0, 0.5, 1.0, 16.0),
    "admission": (0, 3),
    "topology": ("", "ring", "regular:4", "x:y"),
}

#: Values by their type that mean something where a message is going: rounds, keys, peers.
Known = Mapping[Any, Sequence[Any]]


def sample(kind: Any, rng: random.Random, *, tame: bool = False, known: Known | None = None, depth: int = 0) -> Any:
    """A value that :func:`wire.pack` takes and that is of exactly the type ``kind``.

    ``tame``: no odd numbers. ``known``: values that are drawn more often than others.
    """
    if known and kind in known and rng.random() < 0.7:
        return rng.choice(known[kind])
    special = _SPECIAL.get(kind)
    if special is not None:
        return special(rng)
    if kind is int:
        return rng.choice(_INTS if tame or rng.random() < 0.8 else _ODD_INTS)
    if kind is float:
        return rng.choice(_FLOATS)
    if kind is bool:
        return rng.random() < 0.5
    if kind is str:
        return rng.choice(_TEXTS)
    if kind is bytes:
        return rng.randbytes(rng.choice((0, 1, 16, 32, 32, 32, 33, 64, 64, 200)))
    if kind in (None, type(None)):
        return None
    if kind is Any:
        return rng.choice((None, 1, "x", b"x", True, [1, [2]], {"a": {"b": 1}}))
    origin, inner = get_origin(kind), get_args(kind)
    few = rng.choice((0, 1, 1, 2, 3)) if depth < 4 else 0
    if origin is Literal:
        return rng.choice(inner)
    if origin in (Union, types.UnionType):
        return sample(rng.choice(inner), rng, tame=tame, known=known, depth=depth + 1)
    if origin is tuple and inner[-1:] != (Ellipsis,):
        return tuple(sample(each, rng, tame=tame, known=known, depth=depth + 1) for each in inner)
    if origin in (tuple, list):
        return origin(sample(inner[0], rng, tame=tame, known=known, depth=depth + 1) for _ in range(few))
    if origin is dict:
        return {
            sample(inner[0], rng, tame=tame, known=known, depth=depth + 1): sample(
                inner[1], rng, tame=tame, known=known, depth=depth + 1
            )
            for _ in range(few)
        }
    if isinstance(kind, enum.EnumMeta):
        return rng.choice(list(kind))
    if isinstance(kind, type) and attrs.has(kind):
        return _instance(kind, rng, tame, known, depth)
    raise TypeError(f"no samples of {kind}: teach tests/hostile/samples.py")


def _instance(kind: type, rng: random.Random, tame: bool, known: Known | None, depth: int) -> Any:
    attrs.resolve_types(kind)
    for attempt in range(20):
        careful = tame or attempt > 2
        try:
            return kind(
                **{
                    # Few texts are the name of a codec, or of a rule.
                    field.alias: rng.choice(_NAMED[field.name])
                    if field.name in _NAMED and (careful or rng.random() < 0.8)
                    else sample(field.type, rng, tame=careful, known=known, depth=depth + 1)
                    for field in attrs.fields(kind)
                    if field.init
                }
            )
        except ValueError:  # the class refuses such a value
            continue
    raise TypeError(f"no sample of {kind.__name__} passes its own checks: teach tests/hostile/samples.py")


def _combined(rng: random.Random) -> Combined:
    context, inputs, output = (rng.randbytes(32) for _ in range(3))
    return Combined(context, inputs, output, rng.choice((b"", rng.randbytes(32))), rng.randbytes(64))


def _lie(rng: random.Random) -> Lie:
    """One whose numbers fit together, and nothing else."""
    voters = tuple(identity.peer_id for identity in IDENTITIES[: rng.randrange(2, 4)])
    count = len(voters)
    return Lie(
        run=rng.randbytes(32), round=rng.randrange(99), prev=rng.randbytes(32), voters=voters, attempt=0, epoch=1,
        start=16, stop=16 + rng.randrange(1, 999), codec=rng.choice(("fp32", "int8")), owner=voters[0], members=voters,
        weights=(1,) * count, decision=rng.choice((b"", bytes(8 * count))), combined=_combined(rng),
        roots=tuple(rng.randbytes(32) for _ in voters), leaf=rng.randrange(3),
        parts=tuple(rng.randbytes(8) for _ in voters), paths=((rng.randbytes(32),),) * count, result=rng.randbytes(8),
        result_path=(rng.randbytes(32),),
    )  # fmt: skip


def _shard(rng: random.Random) -> Shard:
    count = rng.randrange(1, 9)
    return Shard(rng.randrange(99), rng.randbytes(32), rng.randrange(99), rng.randrange(count), count, rng.randrange(9))


def _address(rng: random.Random) -> Address:
    kind, host = rng.choice(
        (("tcp", "127.0.0.1"), ("tcp", "192.0.2.255"), ("tcp", "2001:db8::7"), ("tcp", "fe80::1%eth0"), ("mem", "n7"))
    )
    return Address(kind, host, rng.choice((0, 1, 4001, 65535)))


def _signed_peer_record(rng: random.Random) -> SignedPeerRecord:
    addresses = tuple(_address(rng) for _ in range(rng.randrange(4)))
    return SignedPeerRecord.sign(rng.choice(IDENTITIES), addresses, seq=rng.choice(_INTS), expires=WALL + 3600)


def _candidate(rng: random.Random) -> IceCandidate:
    host = rng.choice(("192.0.2.7", "127.0.0.1", "2001:db8::7"))
    return IceCandidate(rng.choice(("host", "srflx", "relay")), host, rng.choice((1, 4001, 65535)), 1 << 24, "abc1")


def _document_spec(rng: random.Random) -> DocumentSpec:
    peers = sorted(identity.peer_id for identity in rng.sample(IDENTITIES, rng.randrange(1, 4)))
    policy = rng.choice((Owner(peers[0]), Listed(tuple(peers)), Members("run")))
    return DocumentSpec(rng.choice(("metrics", "α")), rng.randbytes(rng.choice((0, 32))), policy)


def _description(rng: random.Random) -> Description:
    candidates = tuple(_candidate(rng) for _ in range(rng.randrange(4)))
    return Description("ufrag", "p" * 22, rng.randbytes(32), candidates)


def _named(kind: Any) -> Callable[[random.Random], Any]:
    """A message that refuses hashes of another size than 32 bytes and numbers below 0."""

    def draw(rng: random.Random) -> Any:
        values = {
            "document": rng.randbytes(32),
            "id": rng.randbytes(32),
            "author": rng.choice(IDENTITIES).peer_id,
            "prefix": rng.randbytes(rng.choice((0, 1, 16, 300))),
            "digest": rng.randbytes(rng.choice((0, 16, 32))),
        } | {name: rng.choice(_INTS) for name in ("incarnation", "counter", "first", "next")}
        return kind(**{field.name: values[field.name] for field in attrs.fields(kind)})

    return draw


def _beat(rng: random.Random) -> Beat:
    seats = tuple(Seat(each.peer_id, rng.randrange(4)) for each in IDENTITIES[: rng.randrange(4)])
    part, numbers = rng.choice((b"", rng.randbytes(32))), [rng.choice(_INTS) for _ in range(5)]
    measured = {name: rng.choice(_INTS) for name in ("into", "out", "line")}
    return Beat(rng.randbytes(32), rng.choice(STATES), rng.randrange(64), part, *numbers, plan=seats, **measured)


def _shape(rng: random.Random) -> Shape:
    dims = tuple(rng.randrange(5) for _ in range(rng.randrange(4)))
    return Shape(
        dims, rng.choice(("float32", "int64", "x")), rng.choice(("", "bf16", "x")), rng.choice((0, 4, 64, 999))
    )


def _key(rng: random.Random) -> Key:
    return Key(rng.choice(IDENTITIES).peer_id, rng.randrange(9), rng.randrange(9))


def _order(rng: random.Random) -> tuple[int, ...]:
    return tuple(rng.sample(range(4), 4))


def _push(rng: random.Random) -> Push:
    shapes = tuple(_shape(rng) for _ in range(rng.randrange(1, 4)))
    nest = rng.choice(("0", "[0,1]", '{"tuple":[0]}', "", "x"))
    return Push(
        rng.randbytes(32), _key(rng), rng.choice(_INTS), _order(rng), rng.randrange(1, 4), rng.randrange(1, 9), shapes,
        nest,
    )  # fmt: skip


def _pull(rng: random.Random) -> Pull:
    path = tuple(Hop(each.peer_id, rng.choice(_INTS)) for each in IDENTITIES[: rng.randrange(1, 4)])
    return Pull(rng.randbytes(32), _key(rng), rng.choice(_INTS), path, _shape(rng), rng.choice(_FLOATS))


def _kept(rng: random.Random) -> Kept:
    head = attrs.evolve(sample(HeadInfo, rng), contacts=(), view=(), settled=rng.choice((0, 1, 1 << 40)))
    return Kept(head, tuple(sample(Signed, rng) for _ in range(rng.randrange(3))), rng.choice((0.0, 0.5, 1e9)))


_SPECIAL: dict[Any, Callable[[random.Random], Any]] = {
    Payload: lambda rng: Payload(rng.randbytes(rng.choice((0, 1, 8, 1024))), rng.randbytes(64)),
    Combined: _combined,
    Shard: _shard,
    Pipeline: lambda rng: Pipeline(rng.randrange(2, 65), rng.randrange(1, 257), rng.random() < 0.5, "bf16", "copy"),
    StageOf: lambda rng: StageOf(rng.randbytes(32), rng.randrange(2), rng.randrange(9), 1.1, rng.randrange(99)),
    Beat: _beat,
    Shape: _shape,
    Push: _push,
    Pull: _pull,
    Kept: _kept,
    Look: lambda rng: Look(rng.randbytes(32), _order(rng), rng.randrange(1, 4), _shape(rng)),
    Lie: _lie,
    **{kind: _named(kind) for kind in (Advert, Node, Want, Accused)},
    PeerId: lambda rng: rng.choice(IDENTITIES).peer_id,
    Address: _address,
    SignedPeerRecord: _signed_peer_record,
    IceCandidate: _candidate,
    DocumentSpec: _document_spec,
    Description: _description,
}


# --- bent bytes ------------------------------------------------------------------------------------------------------


def bent(data: bytes, rng: random.Random) -> bytes:
    """``data`` with one thing wrong: bits, bytes left out, doubled, swapped, cut off or put in, lengths made huge."""
    out = bytearray(data)
    at = rng.randrange(len(out) + 1) if out else 0
    match rng.randrange(8):
        case 0 if at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        case 1:
            del out[at : at + rng.choice((1, 2, 4, 16))]
        case 2:
            out[at:at] = out[at : at + rng.choice((1, 4, 16, 64))]
        case 3:
            del out[at:]
        case 4:
            out[at:at] = rng.randbytes(rng.choice((1, 2, 4, 9)))
        case 5:
            out[at : at + 4] = rng.choice((b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\x80\0\0\0"))
        case 6:
            other = rng.randrange(len(out) + 1)
            out = out[min(at, other) :] + out[: min(at, other)]
        case _:
            out[at : at + 1] = rng.choice((b"\xc0", b"\xcf", b"\xdd", b"\xdf", b"\xc6", b"\x90", b"\x80", b"\xc1"))
    return bytes(out)


_VALUES = (
    None, True, 0, -1, 1 << 63, 1.5, float("nan"), float("inf"), "", "\x1b]0;x\x07", "x" * 5000, b"", b"\0" * 5000, [],
    {}, [[[[[[]]]]]], {"peer": 1}, list(range(300)), {str(number): number for number in range(300)},
)  # fmt: skip


def retyped(packed: bytes, rng: random.Random) -> bytes:
    """A packed message in which one value, somewhere, was replaced by one of another kind, dropped, or made many."""
    message = msgpack.unpackb(packed, raw=False, strict_map_key=False)
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, item in inner:
            places.append((value, key))
            walk(item)

    walk(message)
    if not places:
        return bytes(msgpack.packb(rng.choice(_VALUES)))
    container, key = rng.choice(places)
    match rng.randrange(4):
        case 0 if isinstance(container, dict):
            del container[key]
        case 1 if isinstance(container, list):
            container.extend([container[key]] * rng.choice((1, 20, 1000)))
        case 2 if isinstance(container, dict):
            container["surplus"] = rng.choice(_VALUES)
        case _:
            container[key] = rng.choice(_VALUES)
    return bytes(msgpack.packb(message, use_bin_type=True))
