"""Every message that is decoded from bytes: strict, bounded, and found without being listed anywhere."""

from __future__ import annotations

import random
import time
import tracemalloc
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.transport import defaults
from shoal.transport.errors import DecodeError
from shoal.transport.wire import pack, unpack

from . import registry
from .samples import bent, retyped, sample

EVERY = pytest.mark.parametrize("kind", list(registry.messages().values()), ids=list(registry.messages()))
#: 120 classes times so many examples take some seconds; the fuzzer outside CI goes on for minutes.
QUICK = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))


def test_every_method_and_every_class_that_is_unpacked_is_found() -> None:
    assert len(registry.methods()) >= 30
    assert {"dht.put", "blob.chunks", "round.ready", "transport.hello"} <= set(registry.methods())
    named = {(module, text) for module, text, _ in registry.unpacked()}
    assert set(registry.DYNAMIC) <= named, "remove from registry.DYNAMIC what is no longer there"
    unknown = [
        (module, text)
        for module, text, kind in registry.unpacked()
        if not isinstance(kind, type) and (module, text) not in registry.DYNAMIC
    ]
    assert unknown == [], (
        "say in registry.DYNAMIC which classes these decode, and see that registry.messages holds them"
    )


@EVERY
@QUICK
@given(rng=st.randoms(use_true_random=False))
def test_what_is_packed_comes_back_equal(kind: type[Any], rng: random.Random) -> None:
    message = sample(kind, rng)
    assert unpack(kind, pack(message)) == message


@EVERY
@QUICK
@given(rng=st.randoms(use_true_random=False), many=st.integers(1, 3))
def test_bent_bytes_are_refused_or_mean_something_that_travels_again(
    kind: type[Any], rng: random.Random, many: int
) -> None:
    data = pack(sample(kind, rng))
    for _ in range(many):
        data = bent(data, rng)
    _refused_or_canonical(kind, data)


@EVERY
@QUICK
@given(rng=st.randoms(use_true_random=False))
def test_a_value_of_another_kind_anywhere_is_refused_or_travels_again(kind: type[Any], rng: random.Random) -> None:
    _refused_or_canonical(kind, retyped(pack(sample(kind, rng)), rng))


def _refused_or_canonical(kind: type[Any], data: bytes) -> None:
    try:
        message = unpack(kind, data)
    except DecodeError as error:
        text = str(error)
        assert len(text) < 1000 and text.isprintable()
        return
    assert type(message) is kind
    assert unpack(kind, pack(message)) == message


def _bombs(limit: int) -> dict[str, bytes]:
    """The dearest well-formed messages of ``limit`` bytes, by what they are made of."""
    count = min(limit // 2, defaults.MAX_ITEMS - 10)
    head = b"\xdd" + count.to_bytes(4, "big")
    return {
        "empty arrays": head + b"\x90" * count,
        "empty maps": head + b"\x80" * count,
        "floats": b"\xdd" + (limit // 9).to_bytes(4, "big") + (b"\xcb" + bytes(8)) * (limit // 9),
        "one long text": b"\xdb" + (limit - 5).to_bytes(4, "big") + b"x" * (limit - 5),
        "wide characters": b"\xdb" + (limit // 4 * 4).to_bytes(4, "big") + "🐟".encode() * (limit // 4),
        "many keys": b"\xdf" + (count // 2).to_bytes(4, "big")
        + b"".join(b"\xce" + number.to_bytes(4, "big") + b"\xc0" for number in range(count // 2)),
        "keys that collide": b"\xdf" + (count // 2).to_bytes(4, "big")
        + b"".join(b"\xcf" + (number * ((1 << 61) - 1)).to_bytes(8, "big") + b"\xc0" for number in range(8))
        + b"".join(b"\xce" + number.to_bytes(4, "big") + b"\xc0" for number in range(count // 2 - 8)),
        "deep": b"\x91" * 20 + b"\xdd" + count.to_bytes(4, "big") + b"\xa1x" * count,
    }  # fmt: skip


@pytest.mark.parametrize("name", list(_bombs(1000)))
def test_the_dearest_megabyte_costs_less_than_a_second_and_bounded_memory(name: str) -> None:
    """What 2^20 bytes may cost before a class is even looked at. Measured: 0.1 s and 15 MB at most."""
    bomb = _bombs(defaults.MAX_MESSAGE)[name]
    assert len(bomb) <= defaults.MAX_MESSAGE + 16
    kind = registry.methods()["round.plan"].request
    tracemalloc.start()
    try:
        with pytest.raises(DecodeError):
            unpack(kind, bomb)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 * defaults.MAX_MESSAGE
    began = time.thread_time()
    with pytest.raises(DecodeError):
        unpack(kind, bomb)
    assert time.thread_time() - began < 1.0


@pytest.mark.parametrize("name", list(registry.methods()))
def test_the_longest_lists_a_method_may_carry_decode_in_bounded_time_and_memory(name: str) -> None:
    """Each list of a request as long as a message may be, of the cheapest valid items."""
    kind, rng = registry.methods()[name].request, random.Random(name)
    plain = msgpack.unpackb(pack(sample(kind, rng, tame=True)), strict_map_key=False)
    for field, value in plain.items():
        if not isinstance(value, list):
            continue
        item = next((i for i in (_first(kind, field, rng),) if i is not None), 0)
        each = len(msgpack.packb(item, use_bin_type=True))
        values = defaults.MAX_ITEMS // max(1, _values(item)) - 64
        data = msgpack.packb({**plain, field: [item] * min(values, (defaults.MAX_MESSAGE - 4096) // each)})
        tracemalloc.start()
        try:
            _refused_or_nothing(kind, data)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 64 * defaults.MAX_MESSAGE, f"{name}.{field}: {peak >> 20} MiB"
        began = time.thread_time()
        _refused_or_nothing(kind, data)
        assert time.thread_time() - began < 2.0, f"{name}.{field}"


def _refused_or_nothing(kind: type[Any], data: bytes) -> None:
    try:
        unpack(kind, data)
    except DecodeError:
        pass


def _first(kind: type[Any], field: str, rng: random.Random) -> Any:
    for _ in range(50):
        plain = msgpack.unpackb(pack(sample(kind, rng, tame=True)), strict_map_key=False)
        if plain[field]:
            return plain[field][0]
    return None


def _values(item: Any) -> int:
    if isinstance(item, dict):
        return 1 + sum(1 + _values(value) for value in item.values())
    return 1 + sum(map(_values, item)) if isinstance(item, list) else 1
