"""The suites in place against libsodium's plain calls, measuring, and the choice of a cipher."""

from __future__ import annotations

import itertools

import nacl.bindings as sodium
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.transport.aead import NOMINAL_CIPHERS, SUITES, Aead, CipherOffer, choose, local_ciphers, measure
from shoal.transport.errors import HandshakeError

PLAIN = {
    "aegis-256": (sodium.crypto_aead_aegis256_encrypt, 0),
    "aegis-128l": (sodium.crypto_aead_aegis128l_encrypt, 0),
    "chacha20-poly1305": (sodium.crypto_aead_chacha20poly1305_ietf_encrypt, 4),
}
NAMES = list(SUITES)


def _key(name: str) -> bytes:
    return bytes(range(SUITES[name].key))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(
    size=st.one_of(st.integers(0, 300), st.sampled_from([4096, 65537])),
    start=st.integers(0, 9),
    counter=st.integers(0, 2**64 - 1),
    ad=st.binary(max_size=40),
)
def test_sealing_in_place_gives_what_libsodium_gives_in_two_buffers(
    name: str, size: int, start: int, counter: int, ad: bytes
) -> None:
    suite = SUITES[name]
    message = bytes(i * 7 % 251 for i in range(size))
    buffer = bytearray(bytes(start) + message + bytes(suite.tag) + b"rest")
    Aead(suite, _key(name)).seal(buffer, start, start + size, counter, ad)
    encrypt, counter_at = PLAIN[name]
    nonce = (bytes(counter_at) + counter.to_bytes(8, "little")).ljust(suite.nonce, b"\0")
    assert buffer[start:-4] == encrypt(message, ad, nonce, _key(name))
    assert (buffer[:start], buffer[-4:]) == (bytes(start), b"rest")

    assert Aead(suite, _key(name)).open(buffer, start, start + size + suite.tag, counter, ad)
    assert buffer[start : start + size] == message
    assert (buffer[:start], buffer[-4:]) == (bytes(start), b"rest")


@pytest.mark.parametrize("name", NAMES)
def test_anything_but_what_was_sealed_does_not_open(name: str) -> None:
    suite = SUITES[name]
    aead = Aead(suite, _key(name))
    sealed = bytearray(100 + suite.tag)
    aead.seal(sealed, 0, 100, 5, b"ad")
    assert aead.open(bytearray(sealed), 0, len(sealed), 5, b"ad")
    assert not aead.open(bytearray(sealed), 0, len(sealed), 6, b"ad")
    assert not aead.open(bytearray(sealed), 0, len(sealed), 5, b"AD")
    assert not aead.open(bytearray(sealed), 0, len(sealed) - 1, 5, b"ad")
    assert not aead.open(bytearray(sealed), 0, suite.tag - 1, 5, b"ad")
    for at in range(0, len(sealed), 11):
        altered = bytearray(sealed)
        altered[at] ^= 1
        assert not aead.open(altered, 0, len(altered), 5, b"ad")


@pytest.mark.parametrize("name", NAMES)
def test_a_place_beyond_the_buffer_is_our_bug_and_touches_nothing(name: str) -> None:
    suite = SUITES[name]
    aead = Aead(suite, _key(name))
    buffer = bytearray(10 + suite.tag)
    for start, stop in ((0, 11), (-1, 5), (6, 5)):
        with pytest.raises(ValueError, match="tag"):
            aead.seal(buffer, start, stop, 0, b"")
    for start, stop in ((0, len(buffer) + 1), (-1, len(buffer)), (6, 5)):
        with pytest.raises(ValueError, match="buffer"):
            aead.open(buffer, start, stop, 0, b"")
    with pytest.raises(ValueError, match="bytes"):
        Aead(suite, b"short")
    assert buffer == bytes(len(buffer))


def test_every_suite_is_measured_and_offered_once_per_process() -> None:
    offers = local_ciphers()
    assert [offer.name for offer in offers] == NAMES
    assert all(offer.mb_per_s >= 1 for offer in offers)
    assert local_ciphers() is offers
    assert [offer.name for offer in NOMINAL_CIPHERS] == NAMES


def test_measuring_ends_early_on_a_slow_cipher_and_takes_its_best_run() -> None:
    suite = SUITES["chacha20-poly1305"]
    ticks = iter([0.0, 0.0, 16384e-6, 99.0])  # one run at 1 MB/s is longer than measuring may take
    assert measure(suite, clock=lambda: next(ticks)) == 1
    times = itertools.accumulate([0.0, *[0.0, 16384e-9] * 8, *[0.0, 2 * 16384e-9] * 8])
    assert measure(suite, clock=lambda: next(times)) == 1000


offers = st.lists(
    st.builds(CipherOffer, st.sampled_from([*NAMES, "from-the-future"]), st.integers(1, 5)),
    unique_by=lambda offer: offer.name,
    max_size=4,
).map(tuple)


@given(ours=offers, theirs=offers)
def test_both_peers_choose_the_same_cipher_for_the_same_reason(
    ours: tuple[CipherOffer, ...], theirs: tuple[CipherOffer, ...]
) -> None:
    speeds = [{offer.name: offer.mb_per_s for offer in side if offer.name in SUITES} for side in (ours, theirs)]
    common = [name for name in NAMES if name in speeds[0] and name in speeds[1]]
    if not common:
        with pytest.raises(HandshakeError, match="no cipher in common"):
            choose(ours, theirs)
        return
    name, reason = choose(ours, theirs)
    assert (name, reason) == choose(theirs, ours) == choose(ours[::-1], theirs[::-1])
    best = max(min(side[other] for side in speeds) for other in common)
    assert name == min(other for other in common if min(side[other] for side in speeds) == best)


def test_one_side_without_aes_hardware_makes_both_use_chacha() -> None:
    slow = (CipherOffer("aegis-128l", 11), CipherOffer("aegis-256", 9), CipherOffer("chacha20-poly1305", 300))
    name, reason = choose(NOMINAL_CIPHERS, slow)
    assert name == "chacha20-poly1305"
    assert reason == "300 MB/s on the slower side; aegis-128l 11, aegis-256 9"
