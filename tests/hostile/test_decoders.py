"""Whatever the bytes, a decoder raises only typed errors; what is signed or sealed never means something else."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from .decoders import TYPED, decoders
from .samples import bent

ALL = decoders()
#: Messages have tests of their own (test_messages.py).
OTHERS = [name for name in ALL if not name.startswith("message ")]
EVERY = pytest.mark.parametrize("name", OTHERS)
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@EVERY
def test_what_we_write_ourselves_is_read(name: str) -> None:
    rng = random.Random(name)
    for _ in range(5):
        ALL[name].feed(ALL[name].seed(rng))


@EVERY
@QUICK
@given(data=st.binary(max_size=2000))
@example(b"")
def test_any_bytes_end_in_a_value_or_a_typed_error(name: str, data: bytes) -> None:
    try:
        ALL[name].feed(data)
    except TYPED as error:
        assert 0 < len(str(error)) < 1500


@EVERY
@QUICK
@given(rng=st.randoms(use_true_random=False), many=st.integers(1, 3))
def test_bent_bytes_are_refused_or_mean_the_same(name: str, rng: random.Random, many: int) -> None:
    decoder = ALL[name]
    data = good = decoder.seed(rng)
    for _ in range(many):
        data = bent(data, rng)
    try:
        value = decoder.feed(data)
    except TYPED as error:
        assert 0 < len(str(error)) < 1500
    else:
        if decoder.sealed and value:
            assert value == decoder.feed(good) or _begins(value, decoder.feed(good))


def _begins(value: object, whole: object) -> bool:
    """A list of records may be cut between two of them, which looks like a peer that is silent."""
    return isinstance(value, list) and isinstance(whole, list) and value == whole[: len(value)]
