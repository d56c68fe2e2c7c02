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
