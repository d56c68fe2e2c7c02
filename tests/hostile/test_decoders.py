"""Whatever the bytes, a decoder raises only typed errors; what is signed or sealed never means something else."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from . import registry
from .decoders import TYPED, decoders
from .samples import bent

ALL = decoders()
#: Messages have tests of their own (test_messages.py).
OTHERS = [name for name in ALL if not name.startswith("message ")]
EVERY = pytest.mark.parametrize("name", OTHERS)
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


#: Modules that take bytes apart themselves → the decoder, or the file of tests, that feeds them hostile ones.
FED_BY = {
    "dht.documents.envelope": "no bytes from outside: its own digests",
    "dht.documents.marks": "file marks",
    "dht.blobs.files": "blob file",
    "dht.kademlia.keys": "no bytes from outside: its own digests",
    "learning.checkpoint_index": "no bytes from outside: a chunk that was checked against its hash",
    "learning.checkpoints": "no bytes from outside: a chunk that was checked against its hash",
    "learning.apart": "no bytes from outside: our own child's",
    "learning.apart_child": "no bytes from outside: our own parent's",
    "learning.directions": "no bytes from outside: its own digests",
    "learning.onebyte": "payload of gradients",
    "learning.pipeline.looking": "stage's tensor",
    "learning.rounds.trials": "opinion",
    "learning.strategies.scaffold": "no bytes from outside: its own digests",
    "learning.strategies.spsa": "payload of gradients",
    "transport.tcp": "no bytes from outside: what the kernel says of a socket",
    "learning.topologies": "no bytes from outside: its own digests",
    "learning.rounds.weighing": "inner products",
    "learning.shard": "no bytes from outside: seeds",
    "learning.store": "file trust",
    "learning.sync": "no bytes from outside: a chunk that was checked against its hash",
    "node.control": "control",
    "node.ticket": "ticket",
    "transport.address": "test_messages.py",
    "transport.interfaces": "no bytes from outside: the kernel's",
    "transport.muxinput": "link",
    "transport.pipe": "link",
    "transport.pipehello": "pipe hello",
    "transport.portmap_wire": "port mapping",
    "transport.records": "records",
    "transport.relay": "message transport.relay.Circuit",
    "transport.secure": "secure responder",
    "learning.faults": "no bytes from outside: our own key",
    "transport.serving": "test_calls.py",
    "transport.rpc": "test_calls.py",
    "transport.session": "link",
    "transport.stun": "stun",
    "transport.webrtc_child": "no bytes from outside: our own parent's",
    "transport.webrtc_process": "no bytes from outside: our own child's; what it passes on is a message",
    "transport.webrtc_sctp": "aiortc's, in a process of its own",
    "transport.wire": "test_messages.py",
}


def test_every_module_that_takes_bytes_apart_is_fed_hostile_ones() -> None:
    found = registry.parsing()
    assert [name for name in found if name not in FED_BY] == [], "give these a Decoder, and say here which"
    assert [name for name in FED_BY if name not in found] == [], "these no longer do"
    for fed_by in FED_BY.values():
        known = fed_by in ALL or (Path(__file__).parent / fed_by).exists()
        assert known or fed_by.startswith(("no bytes from outside: ", "aiortc's"))


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
