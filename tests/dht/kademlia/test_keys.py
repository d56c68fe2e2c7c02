"""Places and distances in the key space."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.dht.kademlia import keys
from shoal.transport.identity import PeerId

places = st.integers(0, 2**256 - 1)


@given(places, places, places)
def test_xor_distance_is_a_metric_with_one_peer_per_distance(a: int, b: int, c: int) -> None:
    assert (a ^ b == 0) == (a == b)
    assert a ^ c <= (a ^ b) + (b ^ c)


@given(places, st.integers(0, 255), st.integers(0, 2**32))
def test_a_random_key_of_a_bucket_lies_in_that_bucket(own: int, index: int, seed: int) -> None:
    assert keys.bucket_index(own, keys.random_key(own, index, random.Random(seed))) == index


@given(places)
def test_keys_survive_their_wire_form(key: int) -> None:
    assert keys.from_bytes(keys.to_bytes(key)) == key


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_key_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        keys.from_bytes(bytes(size))


def test_nodes_records_and_topics_of_the_same_bytes_stand_in_different_places() -> None:
    data = bytes(range(32))
    assert len({keys.node_key(PeerId(data)), keys.topic_key(data), keys.record_key("run", data)}) == 3


def test_namespace_and_key_cannot_be_shifted_into_each_other() -> None:
    assert keys.record_key("run", b"x") != keys.record_key("ru", b"nx")
