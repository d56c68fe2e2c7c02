"""Constants of blobs, each with unit, reason and source."""

from __future__ import annotations

# --- the tree ---------------------------------------------------------------------------------------------------------

#: Bytes of a chunk: what is asked for, checked and kept at a time. BLAKE3 takes 0.3 ms for it, so a check never holds
#: up the event loop; a call costs about 0.3 ms too, so smaller ones would cost more in calls than in bytes. IPFS uses
#: 256 KiB, BitTorrent v2 16 KiB leaves under pieces of up to 16 MiB.
CHUNK = 1 << 20

#: Leaves in one page of a tree: 32 KiB, one small message, vouch for 1 GiB of chunks.
PAGE = 1024

#: Parts of one blob. The outline of a blob is one message: of 1 MiB and 65,536 values at most.
MAX_PARTS = 4096

#: Bytes of a part's label.
MAX_LABEL = 160

#: Chunks of one blob: 1 TiB in chunks of :data:`CHUNK`. Its leaves are 32 MiB, its bitmap 128 KiB.
MAX_CHUNKS = 1 << 20

#: Bytes of a chunk that somebody else's tree may have: one is buffered per request in flight.
MAX_CHUNK = 4 << 20

# --- fetching ---------------------------------------------------------------------------------------------------------

#: Chunks and bytes of one request. Long ones save calls; whoever asks can still break one off in the middle.
MAX_ASK_CHUNKS = 64
MAX_ASK_BYTES = 32 << 20

#: Requests in flight at one peer: while one is answered, the next one is already there.
ASKS_PER_PEER = 2

#: Seconds of work that a peer is given ahead, on top of two round trips; and the most it is given, in bytes.
AHEAD = 0.25
MAX_AHEAD = 64 << 20

#: Peers that are asked for one and the same chunk at the end of a download.
MAX_COPIES = 3

#: Seconds over which a peer's measured rate forgets.
RATE_MEMORY = 2.0

#: Bytes that are waited for at a time: few while nothing is known of a peer, so that a dead one is found out soon.
PIECE_FIRST = 64 << 10

#: Seconds without a byte, besides what the bytes need, after which a peer's chunks are asked for elsewhere as well.
STALL_FLOOR = 1.0

#: Seconds without a byte, besides what the bytes need, after which a request is given up, on either side. A peer that
#: is gone is known to be after about 10 s (transport's keepalive); a line that is slower than it was needs patience.
GIVE_UP = 10.0

#: Bytes that a holder sends with one deadline, which follows from the line's measured bandwidth. A whole chunk:
#: quarters of it cost 15 % of the throughput over loopback.
SEND_PIECE = 1 << 20

#: Failures in a row after which a peer is left alone, and the seconds of the first pause after one (doubling).
MAX_STRIKES = 3
FIRST_PAUSE = 0.25

#: Seconds between two looks at what a partial holder, or one that had nothing, has got in the meantime.
REFRESH = 3.0

#: Seconds between two searches for further holders, while there are some and while there are none.
SEARCH_EVERY = 10.0
SEARCH_AGAIN = 1.0

#: Seconds that a download goes on without any holder: a restart of a node takes 5, a rejoin of the DHT a minute.
PATIENCE = 60.0

#: Holders that one download asks at a time: more streams than this only share the same downlink, and on a slow one
#: (1 Mbit/s) each must still bring a piece within :data:`GIVE_UP`.
MAX_HOLDERS = 12

#: Holders that one download remembers, liars among them: a flood of names costs no more memory than this.
MAX_NAMES = 256

#: Bytes of chunks that are written to disk before they are flushed together and count as kept, and the seconds after
#: which they are in any case.
FLUSH_BYTES = 32 << 20
FLUSH_EVERY = 1.0

# --- serving ----------------------------------------------------------------------------------------------------------

#: Requests for chunks that are answered at once, for one peer and for all. Each holds at most one chunk in memory and
#: one thread while it reads the disk.
READS_PER_PEER = 4
READS = 64

#: Requests that a peer without any gets through even when there are :data:`READS`: slow readers lock nobody out.
FAIR_READS = 1
MAX_FAIR_READS = 64

#: Seconds that a refused peer is told to wait before it asks again; the asker takes its own pause if that is longer.
BUSY_PAUSE = 0.5

# --- keeping ----------------------------------------------------------------------------------------------------------

#: Bytes that the blobs of a data directory may take, pinned ones included, unless the user says otherwise.
QUOTA = 50_000_000_000

#: Bytes of disk that are left free beyond what a blob needs: the state itself and the log must still be written.
KEEP_FREE = 64 << 20

#: Bytes of a note that stands beside a blob.
MAX_NOTE = 256 << 10

#: Chunks of a partial blob from which on it is announced: a search costs as much as fetching some chunks.
ANNOUNCE_CHUNKS = 16

#: Blobs of one node that are announced, newest first. The DHT takes 256 topics of one provider.
MAX_ANNOUNCED = 64

#: Seconds between two looks at which blobs are to be announced or withdrawn.
ANNOUNCE_EVERY = 5.0
