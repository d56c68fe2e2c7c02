"""Constants of the transport floor, each with unit, reason and source."""

from __future__ import annotations

#: Version of everything on the wire. Another version is refused in the handshake, by name.
WIRE_VERSION = 1

#: Bytes of one RPC message or other control message. Bulk data never travels in messages.
MAX_MESSAGE = 1 << 20

#: Values (numbers, texts, containers, keys) in one message. Bounds the work of decoding: about 50 ms at most.
MAX_ITEMS = 1 << 16

#: Containers within each other in one message. Ours go to 6; a bound far below every recursion limit.
MAX_DEPTH = 24

#: Characters of an error text that may quote bytes of a peer: enough to understand, too little to flood a log.
MAX_ERROR_TEXT = 300

#: Bytes of a packed peer record: 16 addresses of 64 bytes and change.
MAX_PEER_RECORD = 2048

#: Addresses in one peer record: interfaces × (IPv4, IPv6), mapped ports, relays.
MAX_ADDRESSES = 16

#: Seconds two honest clocks may differ. Consumer machines without NTP drift by minutes.
CLOCK_SKEW = 300.0

#: Seconds a peer record lives. Twice the republish interval below.
PEER_RECORD_LIFETIME = 7200.0

# Streams on a link (mux.py). Windows and limits of both ends must agree: they belong to the wire version.

#: Bytes in flight and unread on one control stream: the largest message fits without waiting for credit.
CONTROL_WINDOW = 1 << 20

#: Bytes in flight and unread on one bulk stream: 80 MB/s at 100 ms round trip.
BULK_WINDOW = 8 << 20

#: Bytes unread over all control streams of a link. What one peer can make us hold, with LINK_BULK_WINDOW.
LINK_CONTROL_WINDOW = 8 << 20

#: Bytes unread over all bulk streams of a link. Separate, so that bulk nobody reads never starves control.
LINK_BULK_WINDOW = 32 << 20

#: Streams we hold open at once on one link; further ones wait for a slot.
MAX_OUTGOING_STREAMS = 256

#: Streams a peer may hold open here. Twice the above: its view of what has ended runs ahead of ours.
MAX_INCOMING_STREAMS = 512

#: Bytes of a stream's protocol name.
MAX_PROTOCOL_NAME = 64

#: Bytes of the reason in a goodbye.
MAX_GOODBYE = 256

#: Received chunks below this many bytes are copied together: a view of them would pin their whole record.
SMALL_CHUNK = 4096

#: Refusals queued for a peer that does not read them, before that counts as an attack.
MAX_PENDING_ANSWERS = 1024
