"""A ticket survives copying by people, and says what is wrong when it does not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.node import defaults
from shoal.node.ticket import PREFIX, Ticket, _checksum
from shoal.transport.address import Address
from shoal.transport.errors import ConfigError
from shoal.transport.identity import Identity, PeerId

FOUNDER = Identity(bytes(range(32))).peer_id
TICKET = Ticket(b"r" * 32, FOUNDER, (Address.parse("192.168.1.7:4001"), Address.parse("[2001:db8::7]:4001")))
TEXT = TICKET.encode()

ports = st.integers(0, 65535)
addresses = st.one_of(
    st.builds(lambda ip, port: Address("tcp", str(ip), port), st.ip_addresses(), ports),
    st.builds(
        lambda name, port: Address("mem", name, port), st.from_regex(r"[a-z][a-z0-9]{0,40}", fullmatch=True), ports
    ),
)
keys = st.binary(min_size=32, max_size=32)
tickets = st.builds(
    Ticket,
    keys,
    keys.map(PeerId),
    st.lists(addresses, max_size=defaults.MAX_TICKET_ADDRESSES).map(tuple),
    st.none() | keys,
)


@given(tickets)
def test_a_ticket_reads_back_as_it_was_written(ticket: Ticket) -> None:
    assert Ticket.parse(ticket.encode()) == ticket


def test_a_ticket_is_one_lower_case_word_short_enough_to_paste() -> None:
    text = Ticket(b"r" * 32, FOUNDER, (Address.parse("192.168.1.7:4001"),)).encode()
    assert text.startswith(PREFIX)
    assert text.isalnum()
    assert text == text.lower()
    assert len(text) < 140


def test_upper_case_and_line_breaks_do_no_harm() -> None:
    assert Ticket.parse(f"  {TEXT[:40].upper()}\n   {TEXT[40:]}\n") == TICKET


@given(st.integers(0, len(TEXT) - 1))
def test_a_truncated_ticket_is_called_cut_short(length: int) -> None:
    with pytest.raises(ConfigError) as caught:
        Ticket.parse(TEXT[:length])
    if length > len(PREFIX):
        assert "cut short" in str(caught.value)
    if length > len(PREFIX) + 4:
        assert f"{length} of {len(TEXT)} characters" in str(caught.value)
        assert "copy it again" in str(caught.value)


@given(st.data())
def test_any_altered_character_is_noticed(data: st.DataObject) -> None:
    place = data.draw(st.integers(len(PREFIX), len(TEXT) - 1))
    character = data.draw(st.sampled_from("abcdefghijklmnopqrstuvwxyz234567").filter(lambda c: c != TEXT[place]))
    with pytest.raises(ConfigError, match=r"altered|cut short|too many"):
        Ticket.parse(TEXT[:place] + character + TEXT[place + 1 :])


def test_an_altered_character_in_the_middle_is_called_altered() -> None:
    other = "a" if TEXT[60] != "a" else "b"
    with pytest.raises(ConfigError, match="was altered: its checksum does not match"):
        Ticket.parse(TEXT[:60] + other + TEXT[61:])


def test_a_character_no_ticket_contains_is_shown_with_its_place() -> None:
    with pytest.raises(ConfigError, match="'1' at character 21"):
        Ticket.parse(TEXT[:20] + "1" + TEXT[21:])


def test_characters_after_the_end_are_counted() -> None:
    with pytest.raises(ConfigError, match="3 characters too many"):
        Ticket.parse(TEXT + "abc")


def test_a_ticket_of_another_version_names_both_versions() -> None:
    with pytest.raises(ConfigError, match="version 2; the Shoal on this machine reads version 1"):
        Ticket.parse("shoal2" + TEXT[len(PREFIX) :])


def test_something_else_is_not_a_ticket() -> None:
    with pytest.raises(ConfigError, match="'digits' is not a ticket: a ticket begins with 'shoal1'"):
        Ticket.parse("digits")


def test_an_empty_ticket_is_called_empty() -> None:
    with pytest.raises(ConfigError, match="the ticket is empty"):
        Ticket.parse(" \n")


def test_a_flag_of_a_newer_shoal_asks_for_an_upgrade() -> None:
    import base64

    payload = bytearray(base64.b32decode(TEXT[len(PREFIX) :].upper() + "=" * (-len(TEXT[len(PREFIX) :]) % 8)))
    payload[2] |= 0x80
    payload[-4:] = _checksum(bytes(payload[:-4]))
    with pytest.raises(ConfigError, match="upgrade Shoal"):
        Ticket.parse(PREFIX + base64.b32encode(bytes(payload)).decode().rstrip("=").lower())


def test_the_key_of_a_private_swarm_does_not_show_in_the_repr() -> None:
    ticket = Ticket(b"r" * 32, FOUNDER, (), b"s" * 32)
    assert Ticket.parse(ticket.encode()).psk == b"s" * 32
    assert "ssss" not in repr(ticket)


@given(st.text(max_size=300))
def test_any_text_either_parses_or_is_a_config_error(text: str) -> None:
    with pytest.raises(ConfigError):
        Ticket.parse(PREFIX + text)
