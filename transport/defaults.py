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

# Waiting (deadlines.py, link.py)

#: Seconds without a byte from the peer after which a link is pinged. With PING_FLOOR: a frozen or silently vanished
#: peer is found after about 10 s.
KEEPALIVE_IDLE = 5.0

#: Least seconds for the answer to a ping: covers a lost packet's retransmissions (1 + 2 s) and a busy peer.
PING_FLOOR = 5.0

#: Most seconds that bytes queued before a ping may add to its deadline.
MAX_QUEUE_ALLOWANCE = 60.0

#: Overshoot in seconds of our own sleep above which an expired wait says more about us (suspended, starved) than
#: about the peer; it gets another go.
LAG_TOLERANCE = 1.0

#: Seconds: half-life of the loop lag that is added to deadlines.
LAG_HALF_LIFE = 30.0

#: Seconds of loop lag that count at most. A laptop that slept a night must not wait a night for an answer.
MAX_LAG = 10.0

#: Bytes per second assumed on a line not measured yet: a slow home uplink (1 Mbit/s).
ASSUMED_BANDWIDTH = 125_000.0

#: Bytes per second below which a measurement is not believed.
MIN_BANDWIDTH = 10_000.0

#: Seconds for one attempt to open a byte stream: a SYN is repeated after 1, 3 and 7 s.
DIAL_FLOOR = 10.0

#: Seconds for a handshake: a peer that connects and says nothing is shut out after this.
HANDSHAKE_FLOOR = 8.0

#: Seconds between two dials of one race; RFC 8305 (happy eyeballs) recommends 0.25.
DIAL_HEAD_START = 0.25

#: Seconds for a call whose caller names no timeout.
CALL_FLOOR = 30.0

#: Seconds for the head of a request after its stream was opened.
HEADER_FLOOR = 10.0

#: Seconds a stopping node spends on saying goodbye.
GOODBYE_TIME = 0.8

#: Bytes of data that a stream takes over by copy instead of making its sender wait.
SMALL_SEND = 16 << 10

#: Bytes of such copies queued on one stream at most.
SMALL_QUEUE = 64 << 10

#: Bytes asked of the kernel at once: one record and its header mostly arrive in one piece.
READ_SIZE = 256 << 10

# Kernel sockets (tcp.py)

#: Connections the kernel completes while we are busy; the system's own limit applies too (Linux: 4096).
TCP_BACKLOG = 1024

#: Seconds until the next try while accept() fails for want of sockets.
ACCEPT_RETRY = 0.1
