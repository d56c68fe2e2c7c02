"""Identity: the text forms of a PeerId, signatures, and a key file that is whole, private and never replaced."""

from __future__ import annotations

import base64
import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.transport.errors import ConfigError
from shoal.transport.identity import Identity, PeerId

keys = st.binary(min_size=32, max_size=32)


@given(keys)
def test_a_peer_id_survives_its_text_form(key: bytes) -> None:
    peer = PeerId(key)
    assert PeerId.parse(peer.text) == peer
    assert PeerId.parse(f"  {peer.text.upper()}\n") == peer
    assert len(peer.text) == 52
    assert peer.text.startswith(peer.short)
    assert len(peer.short) == 8
    assert str(peer) == peer.text
    assert repr(peer) == f"PeerId({peer.short})"


@given(keys, keys)
def test_peer_ids_are_ordered_as_their_keys(one: bytes, other: bytes) -> None:
    assert (PeerId(one) < PeerId(other)) == (one < other)


@given(st.text(max_size=60))
def test_a_text_that_is_no_peer_id_is_refused_by_quoting_it(text: str) -> None:
    # 60 arbitrary characters do not hit a canonical base32 text
    with pytest.raises(ConfigError, match="is not a peer id"):
        PeerId.parse(text)


def test_a_peer_has_one_text_only() -> None:
    text = PeerId(bytes(32)).text
    assert text == "a" * 52
    with pytest.raises(ConfigError):
        PeerId.parse("a" * 51 + "b")  # decodes to the same key: the last 4 bits are not part of it
    with pytest.raises(ConfigError):
        PeerId.parse(text + "====")
    with pytest.raises(ConfigError):
        PeerId.parse(text[:-1])


@pytest.mark.parametrize("key", [b"", bytes(31), bytes(33), bytearray(32), "a" * 32])
def test_a_peer_id_is_32_bytes(key: object) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        PeerId(key)  # type: ignore[arg-type]


@given(keys, st.binary(max_size=300))
def test_a_signature_verifies_under_its_signer_only(seed: bytes, message: bytes) -> None:
    identity = Identity(seed)
    signature = identity.sign(message)
    assert len(signature) == 64
    assert identity.peer_id.verify(message, signature)
    assert not identity.peer_id.verify(message + b"\0", signature)
    assert not Identity(bytes(b ^ 1 for b in seed)).peer_id.verify(message, signature)


@given(st.integers(0, 511))
def test_a_flipped_bit_of_a_signature_is_noticed(bit: int) -> None:
    identity = Identity(b"s" * 32)
    signature = bytearray(identity.sign(b"message"))
    signature[bit // 8] ^= 1 << bit % 8
    assert not identity.peer_id.verify(b"message", bytes(signature))


@given(keys, st.binary(max_size=80), st.binary(max_size=130))
def test_verifying_arbitrary_bytes_answers_false_and_never_raises(key: bytes, message: bytes, signature: bytes) -> None:
    assert PeerId(key).verify(message, signature) is False


def test_a_key_of_small_order_verifies_nothing() -> None:
    # the neutral element: with it R = B·s, A = 1 would verify any message where libsodium did not refuse such keys
    neutral = b"\x01" + bytes(31)
    assert not PeerId(neutral).verify(b"any message", neutral + bytes(32))


def test_a_seed_gives_the_key_of_rfc_8032() -> None:
    seed = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    identity = Identity(seed)
    assert identity.peer_id.key.hex() == "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    assert identity.sign(b"").hex() == (
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
        "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b"
    )


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_seed_is_32_bytes(size: int) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        Identity(bytes(size))


def test_a_new_key_file_is_private_and_gives_the_same_peer_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "key"
    first = Identity.load_or_create(path, os.urandom)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert Identity.load_or_create(path, os.urandom).peer_id == first.peer_id
    assert [p.name for p in path.parent.iterdir()] == ["key"]  # no draft left beside it


def test_the_key_comes_from_the_given_entropy(tmp_path: Path) -> None:
    made = Identity.load_or_create(tmp_path / "key", lambda n: b"e" * n)
    assert made.peer_id == Identity(b"e" * 32).peer_id


@pytest.mark.skipif(os.name != "posix", reason="file modes of POSIX")
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o666, 0o610, 0o601])
def test_a_key_file_that_others_can_touch_is_refused_with_the_remedy(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key"
    Identity.load_or_create(path, os.urandom)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=rf"mode 0{mode:o}.*chmod 600") as caught:
        Identity.load_or_create(path, os.urandom)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"shoal-key-v1 ",
        b"shoal-key-v2 " + base64.b32encode(bytes(32)),
        b"shoal-key-v1 " + base64.b32encode(bytes(31)),
        b"shoal-key-v1 not base 32!",
        b"shoal-key-v1 \xff\xfe\x00",
        bytes(range(3, 255, 5)),
    ],
)
def test_a_damaged_key_file_is_refused_and_kept(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="damaged") as caught:
        Identity.load_or_create(path, os.urandom)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == content


def test_a_key_path_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the key file"):
        Identity.load_or_create(tmp_path, os.urandom)


def test_a_folder_that_cannot_be_made_is_an_error_of_the_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="cannot write the key file"):
        Identity.load_or_create(tmp_path / "file" / "below" / "key", os.urandom)


def test_a_key_that_appears_meanwhile_wins(tmp_path: Path) -> None:
    path = tmp_path / "key"
    faster: list[Identity] = []

    def entropy(n: int) -> bytes:
        if not faster:  # another process creates the key after we saw that there is none
            faster.append(Identity(b"f" * 32))
            assert Identity.load_or_create(path, lambda n: b"f" * n).peer_id == faster[0].peer_id
        return b"s" * n

    assert Identity.load_or_create(path, entropy).peer_id == faster[0].peer_id


def test_what_a_crash_left_behind_does_not_stop_the_next_start(tmp_path: Path) -> None:
    (tmp_path / f"key.{os.getpid()}.new").write_text("shoal-key-v1 half a ke")
    identity = Identity.load_or_create(tmp_path / "key", os.urandom)
    assert Identity.load_or_create(tmp_path / "key", os.urandom).peer_id == identity.peer_id


@given(st.binary(min_size=32, max_size=32))
def test_the_short_form_is_how_the_text_begins(key: bytes) -> None:
    assert PeerId(key).short == PeerId(key).text[:8]
    assert len(PeerId(key).short) == 8
