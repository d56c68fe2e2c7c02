"""Flow control and ends inside a data channel, sans-IO: credit both ways, half-close, and word that the end arrived.

SCTP bounds what is in flight, but not what the receiver has not read yet (aiortc delivers at once and never lets its
window shrink). So binary messages carry the bytes, and text messages, in their order among them, carry:

    "c1048576"   credit: you may send up to this offset of your bytes
    "e"          end: no more bytes from me
    "r"          your end arrived, and with it all your bytes
"""

from __future__ import annotations

import re
from typing import Literal

from . import defaults
from .errors import ProtocolMisuse, RemoteProtocolError

Event = Literal["credit", "end", "end received"]
_CREDIT = re.compile(r"c([0-9]{1,18})")


class ChannelFlow:
    """One end of a channel. ``window``: bytes the far side may have sent that nobody here has taken."""

    def __init__(self, window: int = defaults.WEBRTC_WINDOW) -> None:
        self._window = window
        self._sent = 0
        # Both ends begin with the same window: it belongs to the wire version.
        self._may_send = window
        self._received = 0
        self._consumed = 0
        self._granted = window
        self._end_sent = False
        self.end_received = False

    @property
    def credit(self) -> int:
        """Bytes that may be sent now."""
        return self._may_send - self._sent

    def sending(self, size: int) -> None:
        """``size`` bytes are sent. Raises :class:`ProtocolMisuse` beyond the credit or after the end."""
        if size > self.credit or self._end_sent:
            raise ProtocolMisuse("bytes sent without credit or after the end")
        self._sent += size

    def end(self) -> str | None:
        """The text that says we are done; None when it was said before."""
        if self._end_sent:
            return None
        self._end_sent = True
        return "e"

    def received(self, size: int) -> None:
        """``size`` bytes came. Raises :class:`RemoteProtocolError` for more than was granted, or after the end."""
        self._received += size
        if self.end_received:
            raise RemoteProtocolError("bytes after the end of a WebRTC channel")
        if self._received > self._granted:
            raise RemoteProtocolError("more bytes on a WebRTC channel than were asked for")

    def consumed(self, size: int) -> str | None:
        """``size`` bytes were taken by their reader: the credit to send, None while it is not worth a message."""
        self._consumed += size
        if self._consumed + self._window - self._granted < self._window // 4:
            return None
        self._granted = self._consumed + self._window
        return f"c{self._granted}"

    def text(self, message: str) -> tuple[Event, str | None]:
        """What a text message means, and the text to answer. Raises :class:`RemoteProtocolError`."""
        if message == "e":
            if self.end_received:
                raise RemoteProtocolError("a WebRTC channel ended twice")
            self.end_received = True
            return "end", "r"
        if message == "r":
            if not self._end_sent:
                raise RemoteProtocolError("a WebRTC channel's end was confirmed before it was said")
            return "end received", None
        match = _CREDIT.fullmatch(message)
        if match is None or not self._may_send <= int(match[1]) <= self._sent + self._window:
            raise RemoteProtocolError("a message on a WebRTC channel that means nothing")
        self._may_send = int(match[1])
        return "credit", None
