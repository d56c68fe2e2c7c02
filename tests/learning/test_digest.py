"""Fingerprints tell any two results apart."""

from __future__ import annotations

import pytest

from shoal.learning import defaults
from shoal.learning.digest import (
    AEGIS,
    BLAKE3,
    choose_fingerprint,
    fingerprint,
    local_fingerprints,
)
from shoal.transport.errors import ProtocolMisuse

KEY = bytes(range(32))
ALGORITHMS = [AEGIS, BLAKE3]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_fingerprint_depends_on_key_and_every_byte(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "FINGERPRINT_PIECE", 64)
    data = bytes(range(200))
    seen = {fingerprint(algorithm, KEY, data), fingerprint(algorithm, bytes(32), data)}
    for position in (0, 63, 64, 127, 199):
        changed = bytearray(data)
        changed[position] ^= 1
        seen.add(fingerprint(algorithm, KEY, changed))
    swapped = data[64:128] + data[:64] + data[128:]
    seen |= {fingerprint(algorithm, KEY, d) for d in (data + b"\0", data[:-1], data[:128], b"", swapped)}
    assert len(seen) == 12
    assert all(len(tag) == 32 for tag in seen)
    assert fingerprint(algorithm, KEY, memoryview(data)) == fingerprint(algorithm, KEY, data)


def test_algorithms_differ_and_unknown_ones_are_refused() -> None:
    assert fingerprint(AEGIS, KEY, b"data") != fingerprint(BLAKE3, KEY, b"data")
    with pytest.raises(ProtocolMisuse, match="crc32"):
        fingerprint("crc32", KEY, b"data")
    with pytest.raises(ProtocolMisuse, match="32 bytes"):
        fingerprint(BLAKE3, b"short", b"data")


def test_known_fingerprints_stay_what_they_are() -> None:
    aegis = "a5f4b784882abf3cf16898ac9f0693747b01be237ea6a9aefbf58bdaf18e0d10"
    assert fingerprint(AEGIS, KEY, b"shoal").hex() == aegis
    assert (
        fingerprint(BLAKE3, KEY, b"shoal").hex() == "f8d0fd708ac6a8caf62c416035aef5b86ce48dda4a579f68d03c9c4b92d1ee0a"
    )


def test_the_round_uses_what_all_members_offer_and_says_why() -> None:
    assert choose_fingerprint([(AEGIS, BLAKE3), (AEGIS, BLAKE3)]) == (AEGIS, "every member has AES in hardware")
    assert choose_fingerprint([(AEGIS, BLAKE3), (BLAKE3,)]) == (BLAKE3, "1 of 2 members have no AES in hardware")
    assert choose_fingerprint([])[0] == BLAKE3
    assert local_fingerprints()[-1] == BLAKE3
