"""Constants of the transport floor, each with unit, reason and source."""

from __future__ import annotations

#: Version of everything on the wire. Another version is refused in the handshake, by name.
WIRE_VERSION = 3

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

#: Relays in one peer record: two are kept (:data:`RESERVATIONS`), a third stands in while one of them is replaced.
MAX_RECORD_RELAYS = 3

#: Addresses of each of those relays: one of each IP version.
MAX_RELAY_ADDRESSES = 2

#: Seconds two honest clocks may differ. Consumer machines without NTP drift by minutes.
CLOCK_SKEW = 300.0

#: Seconds a peer record lives. Twice the republish interval below.
PEER_RECORD_LIFETIME = 7200.0

# Sessions over several pipes (session.py, pipehello.py, pipe.py, link.py)

#: Bytes received after which an acknowledgement is sent even if nothing else is. What a sender keeps is what is under
#: way, and this.
ACKNOWLEDGE_BYTES = 1 << 20

#: Records received after which an acknowledgement is sent even if nothing else is: small ones cost memory too.
ACKNOWLEDGE_RECORDS = 64

#: Bytes of records that were sent and not acknowledged, per channel: the bulk window, records of credits and bulk that
#: go the other way, and what the kernels hold. Beyond, the peer grants credit without acknowledging.
MAX_UNACKNOWLEDGED = 64 << 20

#: Records that may be ahead of the one that is missing: a bulk window in the smallest records.
MAX_EARLY_RECORDS = 1 << 13

#: Pipes of one session for bulk, with the one for control. Long fat networks need 8 to 64 connections to fill; one TCP
#: connection of today's kernels fills 1 Gbit/s at 50 ms.
MAX_PIPES = 16

#: Further ones that are not for bulk: when the path of all pipes has died unseen, one must still find a place.
SPARE_PIPES = 4

#: Numbers of the pipes of one session, over its life: as many as its hello can name. A link that moves much every
#: minute, and gives its pipes back in between, uses some ten thousand a day.
MAX_PIPE_INDEX = (1 << 32) - 1

#: Numbers behind the highest that was used, for which is known whether they were (a bit each); older ones are refused.
#: Hellos overtake each other by as many as are dialled at once.
PIPE_INDEX_WINDOW = 4096

#: Seconds after the last whole record for which parts of the next one are a sign of life: 512 KiB at 10 kB/s. Beyond,
#: whoever sits on the path could hold a dead pipe alive with bytes that never become a record.
UNFINISHED_RECORD = 60.0

#: Connections for bulk that are tried one after the other (width.py), the last as many as MAX_PIPES allows.
WIDE_STEPS = (0, 2, 4, 8, 15)

#: Round trip in seconds below which one connection is enough: 4 MiB, what Linux lets a connection have under way, in
#: 4 ms are 1 GB/s.
WIDE_RTT = 0.004

#: Seconds of bulk without a pause that are measured before each step: slow start must be over.
WIDE_WINDOW, WIDE_WINDOW_MAX = 0.5, 4.0

#: Seconds between two records of bulk above which something else than the line held them back.
WIDE_GAP = 0.25

#: A step is kept when it is this much faster; below, it is within what lines vary by themselves.
WIDE_GAIN = 1.15

#: Seconds after which a settled width is tried again: lines change.
WIDE_RETRY = 60.0

#: Paths to one peer that are made use of.
MAX_PATHS = 4

#: Seconds for which an address of a peer that led to no further pipe is left out, and how many are remembered.
DEAD_PATH, MAX_DEAD_PATHS = 600.0, 1024

#: Seconds between tries to dial a peer whose machine took a connection and dropped it: a process that was killed is
#: gone within milliseconds, one with much memory within a second.
KNOCK_PAUSES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.0)

#: Seconds for a link without any pipe to get a new one: several tries by every way, and time for the other side to come
#: to us; beyond, whoever waits for the link is better served by an error.
RESUME_FLOOR = 3.0

#: Seconds after which bytes that were sent and not answered make us ask for a sign of life: an address that changed or
#: a path that died is so found before the keepalive finds it.
PROBE_FLOOR = 1.0

#: Least seconds without an answer to a ping after which another way is tried beside: TCP's first retransmissions come
#: after 0.2 to 1 s, so a lost packet alone is not enough.
SUSPECT_FLOOR = 1.5

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

#: Small calls of each side that may be without an answer on one link; further ones wait. As many as MAX_CALLS_PER_PEER.
MAX_LINK_CALLS = 256

#: Bytes of a call's request, and of a part of its answer, in one frame: two fit into half of the smallest record.
#: Larger requests take a stream.
CALL_PIECE = 4096

#: Bytes of requests that wait to be sent on one link before no more calls are made: all that may be without an answer,
#: twice. More can only be calls that were given up while nothing could be sent.
REQUEST_WINDOW = 2 << 20

#: Bytes of one answer: a message and what is around it.
MAX_ANSWER = MAX_MESSAGE + 16

#: Bytes of answers that wait to be sent on one link before handlers have to wait with theirs: one message.
ANSWER_WINDOW = 1 << 20

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

#: Least seconds for a question that other peers can answer as well: a lost SYN is repeated after 1 s, then come a
#: handshake and the call, four round trips of up to 0.3 s. Who needs longer is no good in a lookup.
QUERY_FLOOR = 2.5

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

#: Bytes asked of the kernel at once, where no large record is under way: each read makes a buffer of this size. Most of
#: what is small fits, and large records are received where they will be decrypted.
READ_SIZE = 16 << 10

#: Bytes of the same where the buffer is one of this thread, used again each time. A body of 64 KiB in pieces of 16 KiB
#: cost a quarter more than in one.
SCRATCH = 128 << 10

#: Bytes from which on a record is received where it will be decrypted, instead of in pieces that are put together. Half
#: a pooled buffer: whoever leaves records unread holds at most twice what is counted.
DIRECT_RECORD = 256 << 10

#: Bytes of data from which on a record is split: sealed from where they lie, opened where they belong, without a copy.
#: Below, a copy in the cache costs less than a second tag.
DIRECT_BODY = 16 << 10

#: What may wait unsent in the kernel: (bytes per second of a line, bytes), ascending. A record may where it is 10 ms
#: of the line, a run of records (RUN_BYTES) likewise. With less the sender is woken for every few segments: with 16 KiB
#: twice the CPU per byte, with one record 220 calls of the kernel instead of 80 for 64 MiB on loopback. A line keeps
#: what it has until it is a quarter as fast.
UNSENT = ((0.0, 16 << 10), (50e6, 512 << 10), (200e6, 2 << 20))

#: Bytes of records that go to the kernel, or come from it, in one turn of their task, and seconds of the line that this
#: may be: control waits behind it, and every turn of the loop costs as much as Python does for several records.
RUN_BYTES, RUN_TIME = 2 << 20, 0.01

#: Turns of the loop in which a link takes in one record of bulk instead of a run, while nobody waits for its data:
#: whoever serves a call needs so many to say where they belong. Who reads as it comes does not say it at all.
READER_TURNS = 4

#: Seconds after which the operating system is asked again for the round trip that it sees.
ASK_SYSTEM = 1.0

#: Bytes of bulk that may always be under way on a link: records of the largest size while their acknowledgement, due
#: after 1 MiB, comes back, and some for a receiver that is late. On several links at once each has its part of so many,
#: but no less than one record more than what is acknowledged at a time: eight peers would keep a third of 64 MiB.
LEAST_UNDER_WAY, SHARED_UNDER_WAY, ONE_UNDER_WAY = 3 << 20, 8 << 20, 3 << 19

# Kernel sockets (tcp.py)

#: Connections the kernel completes while we are busy; the system's own limit applies too (Linux: 4096).
TCP_BACKLOG = 1024

#: Connections refused in one turn of the loop: about half a millisecond, in which nobody else is served.
REFUSED_AT_ONCE = 16

#: Seconds until the next try while accept() fails for want of sockets.
ACCEPT_RETRY = 0.1

#: Bytes of a datagram: more than Ethernet carries in one piece. Longer ones are dropped.
MAX_DATAGRAM = 2048

# Secure channel (noise.py, aead.py, records.py, secure.py)

#: Bytes of plaintext in one record: 512 KiB of data and the heads before them, so that data in powers of two leave no
#: crumbs. A record costs about 30 µs of Python at either end; seen here on loopback for 256 KiB, 512 KiB, 1 MiB: 0.83,
#: 0.65, 0.85 ns of CPU per byte, both ends together (beyond 512 KiB records no longer stay in the cache).
MAX_RECORD = (512 << 10) + 64

#: Buffers for large records kept per thread (16 MiB, when a burst needed them), and how many are looked at for a free
#: one: those in use are mostly few, or most of them.
POOLED_BUFFERS, POOL_TRIES = 32, 12

#: Records under one key, in one direction; then both sides step to the next key, and the old one is erased. At most
#: 32 GiB. Far below every limit of the ciphers, with a counter as nonce: ChaCha20-Poly1305 is bounded by forgeries, and
#: the first one ends a link (RFC 9147, 4.5.3: 2^36 of them; no bound on confidentiality); AEGIS-128L and AEGIS-256
#: have no practical one (draft-irtf-cfrg-aegis-aead: 2^48 messages even with random 128-bit nonces). The reason to step
#: at all: who steals a key from memory reads no older records.
REKEY_RECORDS = 1 << 16

#: Bytes of one handshake message. Ours take about 400; a peer with many more ciphers to offer still fits.
MAX_HANDSHAKE = 4096

#: Ciphers a peer may offer.
MAX_CIPHER_OFFERS = 16

#: Seconds the certificate of a session's key is valid. It is used for an hour, so hours would do; a day lets
#: machines in whose clocks are wrong by hours (time zones), which then show up as clock skew instead of as no link.
CERTIFICATE_LIFETIME = 86_400.0

#: Seconds for which handshakes use the same certified key: long enough to cost nothing, short beside the lifetime.
CERTIFICATE_REUSE = 3600.0

#: Checked certificates that a process remembers, of about 2 KiB each with what they hold: checking one takes 54 µs,
#: and more than a quarter of the time that a handshake takes. More than the links of a node, so that returning peers
#: are known; who fills it with identities of his own makes others' handshakes no slower than they were without it.
KNOWN_CERTIFICATES = 1024

#: Bytes sealed per run when the ciphers are measured at start. A cipher in hardware takes 4 µs, AEGIS in software 2 ms.
MEASURE_BYTES = 16 << 10

#: Seconds after which measuring one cipher ends; together a few ms, once per process.
MEASURE_TIME = 0.002

#: Seconds that one record may take on the line: how long control waits behind bulk at most.
RECORD_TIME = 0.25

#: Bytes of a record before the line is measured: 0.5 s at 1 Mbit/s.
FIRST_RECORD = 64 << 10

#: Bytes of a record on the slowest line: below this, headers and tags begin to count.
MIN_RECORD = 16 << 10

# Calls (rpc.py)

#: Bytes of the head of a call: a method's name and two numbers.
MAX_CALL_HEAD = 1024

#: Bytes of a refusal.
MAX_CALL_ERROR = 4096

#: Bytes of one part of an answer's body. Nothing is allocated for it; the bound keeps lengths in 32 bits.
MAX_BODY_PART = 1 << 30

#: Seconds a handler may run, whatever its caller allows: a day.
MAX_CALL_TIME = 86_400.0

#: Streams of other protocols than calls that are handled at once for one peer: a place at our relay, and circuits in
#: both directions (RELAY_CIRCUITS_PER_PEER).
MAX_HANDLED_STREAMS = 80

#: Calls served at once for one peer; further ones are refused as busy.
MAX_CALLS_PER_PEER = 256

#: Calls served at once for all peers.
MAX_CALLS = 2048

#: Calls served at once for a peer even when there are that many: with 128 links at most 2048 more.
FAIR_CALLS = 16

# Presence of a node (endpoint.py, contacts.py)

#: Links kept at once; the least recently used idle one is closed for a new one.
MAX_LINKS = 64

#: Seconds without a stream after which a link counts as idle when its slot is needed.
IDLE_GRACE = 2.0

#: Contacts kept: 4096 records of at most 2 KiB are 8 MiB.
MAX_CONTACTS = 4096

#: Handshakes of incoming connections at once; when there are more, the oldest has had its chance.
MAX_HALF_OPEN = 256

#: Seconds for a link to a peer by any of its addresses, when the caller names no timeout.
CONNECT_FLOOR = 20.0

#: Seconds between two links to one peer within which they count as dialled at the same time from both sides.
SIMULTANEOUS = 5.0

# STUN (stun.py, stun_service.py)

#: Bytes of a STUN message that is read or sent: with headers it fits the least IPv6 MTU (RFC 8489 6.1: under 1500).
MAX_STUN = 1232

#: Bytes by which an answer may be longer than its request: XOR-MAPPED-ADDRESS of IPv6 (24) and FINGERPRINT (8).
STUN_GROWTH = 32

#: Seconds until a STUN request is first repeated (RFC 8489 6.2.1: 0.5 s or more), and how many are sent: 0.5 + 1 + 2 s.
#: The RFC's seven take 39.5 s, longer than anybody waits for a link.
STUN_RTO = 0.5
STUN_REQUESTS = 3

#: STUN answers a second for one source, and at once: an ICE agent asks from each of its addresses, three times.
STUN_RATE = 5.0
STUN_BURST = 30.0

#: Sources remembered (200 bytes each), and answers a second for all of them: 5000 take about 10 % of a core here.
STUN_SOURCES = 4096
STUN_TOTAL_RATE = 5000.0

# Connections of strangers (throttle.py). A refused one costs accept and close; an admitted one a handshake, 0.6 ms.

#: Connections per second that one source (IPv4 address, IPv6 /64) may make for long: 3 % of a core for handshakes.
SOURCE_CONNECTIONS = 50.0

#: Connections of one source at once: 50 nodes behind one address that found a swarm together, each with a few dials
#: and up to 16 pipes. 0.6 s of handshakes.
SOURCE_CONNECTIONS_BURST = 1024.0

#: Connections per second of all strangers together: a third of a core for handshakes, whoever they are.
STRANGER_CONNECTIONS = 500.0

#: Connections of strangers at once: a crowd that joins after a public announcement.
STRANGER_CONNECTIONS_BURST = 4096.0

#: Connections per second, beyond those, of networks that were not admitted in the last NEWCOMER_AFTER seconds.
NEWCOMER_CONNECTIONS = 50.0
NEWCOMER_CONNECTIONS_BURST = 256.0
NEWCOMER_AFTER = 60.0

#: Sources and networks remembered: about 300 bytes each.
MAX_SOURCES = 4096

#: Sources remembered as useful: several times the links of a node.
MAX_VOUCHED = 512

# Ways to a peer (planner.py, connector.py, signals.py, relay.py, reachability.py)

#: Seconds between two dials of a race when the peer says that strangers cannot dial it: a SYN each costs nothing, and
#: the ways that will work stand behind them.
HIDDEN_HEAD_START = 0.02

#: Seconds that direct dials get before hole punching begins, and everything else before WebRTC, whose engine is a
#: process of 50 MB that takes half a second of CPU to start.
PUNCH_HEAD_START = 0.1
WEBRTC_HEAD_START = 3.0

#: Seconds that better ways get before a relay is asked: a dial across a continent. Small, because a relayed link is
#: replaced later without anybody noticing, while a caller who waits does notice.
RELAY_HEAD_START = 0.15

#: Seconds for which an address that worked, or failed, is remembered as such: most networks last longer than an hour.
OUTCOME_LIFETIME = 3600.0

#: Outcomes remembered per peer, and peers they are remembered for.
MAX_OUTCOMES = 32
MAX_OUTCOME_PEERS = 1024

#: Seconds for which punching or WebRTC with one peer is left alone after it failed; doubles with each failure up to the
#: second figure. An attempt takes seconds and packets of three peers.
WAY_BACKOFF = 5.0
WAY_BACKOFF_MAX = 600.0

#: Bytes of one signal, or its answer: WebRTC's offers with their candidates take 2 to 8 KiB.
MAX_SIGNAL = 16 << 10
MAX_SIGNAL_KIND = 32

#: Signals per second, and at once, that one peer may have forwarded: an attempt to reach a peer takes three or so.
SIGNAL_RATE, SIGNAL_BURST = 2.0, 32.0

#: The same for all senders at one address: half of what we may pass on to one peer, so that nobody with many names
#: keeps others from reaching it through us.
SIGNAL_SOURCE_RATE, SIGNAL_SOURCE_BURST = 8.0, 64.0

#: The same, for what one peer may forward to us: it may be the relay of many.
SIGNALLED_RATE, SIGNALLED_BURST = 16.0, 128.0

#: Peers whose rates are remembered; the ones unheard longest begin anew. More than links can be made to us meanwhile.
MAX_RATED_PEERS = 4096

#: Seconds for the answer to a signal: the handlers answer at once, or within a few round trips (STUN).
SIGNAL_TIME = 10.0

# WebRTC (webrtc*.py)

#: Engines at once: child processes of 71 MB each, of which 32 are theirs alone.
MAX_WEBRTC = 8

#: Candidates of one end: 3 interfaces × (IPv4, IPv6) × (host, reflexive), and some relayed. Pairs are their product.
MAX_ICE_CANDIDATES = 16

#: Bytes of an offer or answer, and of a message between parent and engine: 16 candidates of 100 bytes and change.
MAX_WEBRTC_MESSAGE = 8192

#: STUN servers that are asked in turn until one answers.
MAX_STUN_ASKED = 3

#: Seconds to start an engine (0.5 here, idle) and to gather candidates (aioice gives a STUN server 5).
WEBRTC_SETUP = 15.0

#: Seconds for ICE, DTLS and SCTP, and for ICE alone. Checks of a pair that nobody answers take aioice 32 s; what
#: connects does so in 3, the time of the answer through the common peer included.
WEBRTC_CONNECT = 15.0
WEBRTC_ICE = 10.0

#: Seconds in which a closed connection may still deliver what was sent before.
WEBRTC_CLOSE = 1.0

#: Seconds in which an engine that is given up may tell the far side; it takes 10 ms.
WEBRTC_ABORT = 0.25

#: Bytes sent on a channel that the far side has not read: 20 MB/s (more than this way moves) at 200 ms round trip.
WEBRTC_WINDOW = 4 << 20

#: Bytes of one message of a channel. Larger ones are hardly faster (bench.py webrtc), and more waits behind them.
WEBRTC_MESSAGE = 32 << 10

#: Bytes read from our side at once.
WEBRTC_READ = 64 << 10

#: Bytes waiting in a channel above which no more are read from our side, and below which reading goes on. Little, as
#: what comes later waits behind them, a second for every 125 kB on a slow uplink.
WEBRTC_BUFFER_HIGH, WEBRTC_BUFFER_LOW = 64 << 10, 32 << 10

#: Packets of 1.2 kB in flight at first (RFC 6928), and sent at once at most: 64 fit one call, as in TCP's offload.
WEBRTC_FIRST_PACKETS = 10
WEBRTC_BURST = 64

#: Bytes in flight at most (20 MB/s at 100 ms round trip), and of a socket's buffers, in which they can wait instead of
#: being lost when the far side's process is busy (the kernel counts twice a datagram's size, and may allow less).
WEBRTC_MAX_FLIGHT = 2 << 20
WEBRTC_SOCKET_BUFFER = 4 << 20

#: Bytes of memory that an engine may use above what it has after it was loaded: a far side that breaks SCTP's window
#: ends its engine, not the machine.
WEBRTC_MEMORY = 256 << 20

#: Peers that may be reachable through one relay: each costs it a link and one idle stream.
RELAY_RESERVATIONS = 128

#: Circuits through one relay; each may hold a stream's window (8 MiB) in each direction.
RELAY_CIRCUITS = 256

#: Circuits that end at one peer: it may be linked with as many other hidden peers.
RELAY_CIRCUITS_PER_PEER = 32

#: The same for all peers behind one address: a classroom. Names are free, addresses are not.
RELAY_RESERVATIONS_PER_SOURCE = 64
RELAY_CIRCUITS_PER_SOURCE = 128

#: Bytes per second, and at once, that a relay passes on for one peer: an update of 100 MB of parameters at once, then
#: as much as a good home line has. A swarm that trains must get through a relay, a film service need not.
RELAY_RATE, RELAY_BURST = 16e6, 256e6

#: The same for all peers: what a line of 1 Gbit/s has.
RELAY_TOTAL_RATE, RELAY_TOTAL_BURST = 100e6, 500e6

#: Bytes of one circuit. Then its ends must ask again, and find a better way or the relay's refusal.
RELAY_CIRCUIT_BYTES = 64 << 30

#: Seconds without a byte on a circuit. Links are pinged every KEEPALIVE_IDLE seconds, so both ends are dead.
RELAY_IDLE = 60.0

#: Bytes passed on at once: one piece costs the relay about 50 µs of Python.
RELAY_CHUNK = 64 << 10

#: Bytes of a request to a relay, or its answer.
MAX_RELAY_MESSAGE = 1024

#: Times per second, and at once, that we dial back for one peer that asks, for one common peer, and in all: a few
#: packets each. A relay that starts a swarm passes on the requests of many at once.
REVERSAL_ASKED, REVERSAL_ASKED_VIA, REVERSAL_ASKED_TOTAL = (0.2, 8.0), (2.0, 48.0), (4.0, 64.0)

# Hole punching (punch.py)

#: Addresses offered, and knocked at: what observers saw, and interfaces. With more, an offer could make us knock at
#: many strangers' doors.
MAX_PUNCH_ADDRESSES = 6

#: Seconds of knocking: five requests at each address, each given longer than the one before. Two cones need one or two,
#: more where the direct path is slow; others never succeed.
PUNCH_FLOOR = 4.0

#: Seconds that one request is given, at least: the kernel would repeat it only after 1 s.
PUNCH_ATTEMPT = 0.25

#: Seconds between a refusal and the next request, growing with their number: routers that refuse close the hole, so
#: that the two requests have to cross on the way.
PUNCH_PAUSE = 0.004

#: Refusals after which an address is given up: enough for the two sides to meet, few enough for who is no peer.
MAX_PUNCH_REFUSALS = 60

#: Seconds for the streams beside the first: the offerer chose it when it came, or another a moment before.
PUNCH_REST = 0.5

#: Seconds between the answer to an offer and its go; they are one after the other on the same links.
PUNCH_GO_TIME = 10.0

#: Seconds of round trip by way of the common peer that are believed.
MAX_PUNCH_RTT = 3.0

#: Offers answered, or holes being punched for others, at once.
MAX_PUNCHES = 16

#: The same per second, and at once, for one peer, for one common peer, and in all. An offer of a liar makes us knock at
#: six addresses of somebody else's, up to MAX_PUNCH_REFUSALS times each: 20 kB for a message of 400 bytes.
PUNCH_ASKED, PUNCH_ASKED_VIA, PUNCH_ASKED_TOTAL = (0.2, 4.0), (0.5, 8.0), (1.0, 32.0)

#: Addresses that one dial-back may try.
MAX_DIAL_BACK = 4

#: Other peers that are asked to dial before the one that was asked does it itself.
DIAL_BACK_THIRDS = 2

#: Dial-backs per second, and at once, for one peer that asks, for all at one address, and for all.
DIAL_BACK_RATE, DIAL_BACK_BURST = 0.1, 6.0
DIAL_BACK_SOURCE_RATE, DIAL_BACK_SOURCE_BURST = 0.5, 32.0
DIAL_BACK_TOTAL_RATE, DIAL_BACK_TOTAL_BURST = 2.0, 64.0

#: Seconds for a dial that only finds out whether it can be done: one repetition of a lost SYN.
DIAL_ONCE_FLOOR = 4.0

#: Relays at which a peer that cannot be dialled keeps a place: one may fail.
RESERVATIONS = 2

#: Seconds until relays are looked for again when there were too few, and until one that refused is asked again.
RESERVATION_RETRY = 5.0
RESERVATION_PAUSE = 15.0

#: Seconds between looks at our own addresses and links. Asking the C library for them takes about 0.1 ms.
REACH_POLL = 3.0

#: Seconds after the first link until others are asked to dial us: who is dialled meanwhile need not ask.
REACH_SETTLE = 1.0

#: Seconds after which what others found is asked for again: when we could be dialled, and when we could not.
REACH_LIFETIME = 1800.0
UNREACH_LIFETIME = 300.0

#: Seconds until a question that nobody could answer is asked again; doubles up to UNREACH_LIFETIME.
REACH_RETRY = 10.0

#: Peers that are asked in one go until one of them has had us dialled, and results that are remembered.
DIAL_BACK_ASKED = 3
MAX_TRIALS = 16

#: Linked relays that are asked whether they know a peer whose record names none.
MAX_HELPERS = 2

#: Seconds between two tellings of our record to all linked peers.
NEWS_PAUSE = 1.0

#: Links lost within REACH_POLL that mean that the network has changed under us, if they are half of all.
MASS_LOSS = 3

# Port mapping (portmap.py, portmap_wire.py, upnp_child.py)

#: Seconds a mapping is asked for; renewed at half of it. RFC 6886 3.3 recommends 7200; an hour leaves less behind when
#: a node dies without a word.
MAPPING_LIFETIME = 3600

#: Seconds of life that a router may grant at least; what is shorter is asked for again and again, and is taken as this.
MIN_MAPPING_LIFETIME = 120

#: Seconds after each request by PCP or NAT-PMP before the next (RFC 6886 3.1: 0.25, doubling; its nine would take 128
#: s). Routers answer within milliseconds.
MAPPING_REPEATS = (0.25, 0.5, 1.0)

#: Seconds for UPnP, from the search (1.5 s, as devices may wait before they answer) to the mapping's confirmation.
UPNP_TIME = 10.0
UPNP_SEARCH = 1.5

#: Bytes of what the UPnP child says.
MAX_UPNP_REPLY = 4096

#: Seconds until a router that mapped nothing is asked again: it may have been restarted, or another one be in charge.
MAPPING_RETRY = 900.0

#: Seconds for taking a mapping back when the node ends. It would run out by itself.
UNMAP_TIME = 0.4

#: Seconds between two races for a pipe of a link that has none: doubles up to the second figure.
RESUME_PAUSE, RESUME_PAUSE_MAX = 0.25, 2.0

#: Seconds before a link by a worse way tries the better ones again: soon, as often only the first dial was unlucky;
#: then rarely, as each try costs packets of three peers.
IMPROVE_PAUSES = (1.0, 5.0, 30.0, 120.0)
IMPROVE_PAUSE_MAX = 600.0

#: WebRTC offers per second, and at once, that are answered for one peer, for one common peer, and in all: each starts a
#: process that takes half a second of CPU and one of MAX_WEBRTC places. No common peer takes more than half of those.
WEBRTC_ASKED, WEBRTC_ASKED_VIA, WEBRTC_ASKED_TOTAL = (0.02, 3.0), (0.08, 4.0), (0.3, 8.0)

#: STUN servers that a WebRTC connection asks.
MAX_STUN_OBSERVERS = 4

# Links of strangers (eviction.py)

#: Seconds that the link of a stranger, which is of no use to us, keeps its slot while others want one: long enough to
#: join a run, which makes it useful; short enough that those who take all slots do not keep them.
STRANGER_STAY = 60.0

#: Bytes that all links together may hold unread, out of order or unacknowledged: three links at their own limits. A
#: machine that trains has more than that to spare; 128 links at their limits would take 20 GiB.
MAX_HELD = 512 << 20

#: Bytes moved on all links after which what they hold is looked at again.
HELD_CHECK = 16 << 20

# What the line of this machine carries (linemeter.py)

#: Seconds of a window in which bulk is counted: longer than the pauses that one record of each link makes, and many of
#: them in a transfer whose time matters. Windows kept, seconds for which one tells something, bytes it must hold.
LINE_WINDOW, LINE_WINDOWS, LINE_MEMORY = 0.25, 16, 1800.0
LINE_MIN_BYTES = 64 << 10

#: Bytes that come in at once from which on they are taken for bulk.
LINE_BULK = 4 << 10

#: Seconds without bulk after which a busy time is over: next to none on the way out, where a record counts for as long
#: as the network takes to accept it; on the way in, where it counts when it is there, as long as one may take.
LINE_GAP_UP, LINE_GAP_DOWN = 0.02, 0.25

#: Seconds within which what ends ends at once: a machine that lagged finds all its records gone in one moment, and a
#: window must hold them all.
LINE_INSTANT = 0.005

#: Part of a window in which a link must have been sending for its path to be what held it back.
PATH_BUSY = 0.8

#: Seconds for which a path counts as slow when nothing has gone there, and within which a window to many peers says how
#: many are usual.
PATH_MEMORY, LINE_USUAL = 86400.0, 300.0

#: So many times what is known of a path show in one window that it was something else.
PATH_FASTER = 2.0

#: Part of the line's rate below which a window left it room. Windows of one path that are kept, and paths.
LINE_ROOM = 0.5
#: Such windows at the beginning of a busy time, to several peers, after which the line itself has become slower.
LINE_ROOMY = 8
PATH_WINDOWS, LINE_PATHS = 8, 1024
