"""Credit and ends of a WebRTC channel: nobody sends more than was asked for, and every end is said once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.transport.errors import ProtocolMisuse, RemoteProtocolError
from shoal.transport.webrtc_flow import ChannelFlow


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 300)), max_size=60))
def test_the_sender_never_has_more_unread_bytes_out_than_the_window(steps: list[tuple[int, int]]) -> None:
    window = 1000
    sender, receiver = ChannelFlow(window), ChannelFlow(window)
    unread = 0
    for send, read in steps:
        size = min(send, sender.credit)
        sender.sending(size)
        receiver.received(size)
        unread += size
        assert unread <= window
        taken = min(read, unread)
        unread -= taken
        credit = receiver.consumed(taken)
        if credit is not None:
            assert sender.text(credit) == ("credit", None)
    # Whatever was read, what is left of the window is at most a quarter short of what is unread.
    assert sender.credit >= window - unread - window // 4


def test_bytes_beyond_the_window_break_the_protocol() -> None:
    flow = ChannelFlow(100)
    flow.received(100)
    with pytest.raises(RemoteProtocolError, match="more bytes"):
        flow.received(1)


def test_bytes_after_the_end_and_a_second_end_break_the_protocol() -> None:
    flow = ChannelFlow(100)
    assert flow.text("e") == ("end", "r")
    with pytest.raises(RemoteProtocolError, match="after the end"):
        flow.received(1)
    with pytest.raises(RemoteProtocolError, match="twice"):
        flow.text("e")


def test_an_end_is_said_once_and_confirmed_only_then() -> None:
    flow = ChannelFlow(100)
    with pytest.raises(RemoteProtocolError, match="before it was said"):
        flow.text("r")
    assert flow.end() == "e"
    assert flow.end() is None
    assert flow.text("r") == ("end received", None)
    with pytest.raises(ProtocolMisuse):
        flow.sending(1)


@pytest.mark.parametrize("text", ["", "c", "c-1", "c99", "c101x", "c201", "c" + "9" * 30, "hello", "c\u0661\u0661"])
def test_texts_that_mean_nothing_and_credit_nobody_can_have_break_the_protocol(text: str) -> None:
    flow = ChannelFlow(100)
    flow.sending(100)
    with pytest.raises(RemoteProtocolError):
        flow.text(text)


@given(st.text(max_size=20))
def test_no_text_does_more_than_break_the_protocol(text: str) -> None:
    flow = ChannelFlow(100)
    try:
        flow.text(text)
    except RemoteProtocolError:
        pass
    assert 0 <= flow.credit <= 200
