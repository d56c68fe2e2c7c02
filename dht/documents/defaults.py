"""Constants of documents, each with unit, reason and source."""

from __future__ import annotations

# --- what one envelope may hold (guard) --------------------------------------------------------------------------

#: Bytes of the Yjs update in one envelope. A snapshot has to fit in it: with MAX_AUTHOR_BYTES the size of one author's
#: part of a document. A commit record is below 1 KiB, a point of metrics below 200 bytes.
MAX_UPDATE = 128 * 1024

#: Structs (runs of content written at once) in one update. An honest one takes at least 4 bytes, so that this bound is
#: reached only by updates of many tiny ones, which cost 100 times their size in memory.
MAX_STRUCTS = 16384

#: Pieces into which one author's part of a document falls: runs of content that lie beside one another. Each takes
#: about 200 bytes while its author's guard is held; a hostile update makes one of 11 bytes.
MAX_RUNS = 32768

#: Ranges in the delete set of one update.
MAX_DELETED_RANGES = 16384

#: Values inside one update (of arrays, objects and content), nested ones included. Each is a Python object when read.
MAX_VALUES = 65536

#: Levels of nesting: shared types in shared types and plain values in plain values together. DESIGN.md, section 5:
#: pycrdt recurses over them, and 20,000 nested arrays (40 KB) end the process.
MAX_NESTING = 64

#: Clocks of one incarnation at most. Yjs counts them in 32 bits; the guard leaves room for adding two.
MAX_CLOCK = (1 << 31) - 1

#: Bytes of a key, of a name of a root type, of a text attribute.
MAX_NAME = 256

#: Root types in one author's part of a document.
MAX_ROOTS = 64

# --- what one author and one document may hold (replica) --------------------------------------------------------------

#: Envelopes of one author since its snapshot. Its author compacts at COMPACT_ENVELOPES; who does not is heard no more.
MAX_ENVELOPES = 256

#: Bytes of updates of one author since its snapshot, the snapshot included.
MAX_AUTHOR_BYTES = 256 * 1024

#: Envelopes after which an author replaces its own by a snapshot: a quarter of what others take, so that an author
#: never stands at the limit; a newcomer fetches and applies at most this many per author.
COMPACT_ENVELOPES = 64

#: Bytes of updates after which an author replaces its own envelopes by a snapshot, if that is the smaller one by half.
COMPACT_BYTES = 64 * 1024

#: Bytes of a snapshot after which its author begins a fresh incarnation, with what it says now written anew: Yjs keeps
#: about 35 bytes of every map key that was ever deleted, so that a map whose keys come and go (a key per round) would
#: grow past MAX_UPDATE after a few thousand of them. A quarter: 64 envelopes of 32 keys each add 72 KiB at most.
FRESH_BYTES = 32 * 1024

#: Authors of one document. A swarm of a few thousand members; 4,096 with 2 KiB each are 8 MiB.
MAX_AUTHORS = 4096

#: Bytes of updates held of one document.
MAX_DOCUMENT_BYTES = 64 * 1024 * 1024

#: Envelopes per second, and at once, from one author. A member writes a metric every few seconds and a wish now and
#: then. The burst lets a newcomer take in a whole chain at once.
AUTHOR_RATE, AUTHOR_BURST = 2.0, 320.0

#: Bytes of updates per second, and at once, from one author.
AUTHOR_BYTE_RATE, AUTHOR_BYTE_BURST = 16384.0, 512.0 * 1024

# --- time -------------------------------------------------------------------------------------------------------------

#: Seconds an envelope lives unless its author says otherwise: a peer that is away for a week finds its facts again.
LIFETIME = 7 * 86400.0

#: Seconds an envelope may live at most: what a dead author wrote takes room with everybody until then.
MAX_LIFETIME = 90 * 86400.0

# --- names ------------------------------------------------------------------------------------------------------------

#: Characters of a document's name.
MAX_DOCUMENT_NAME = 64

#: Bytes of a document's scope: a run id, a public key.
MAX_SCOPE = 64

#: Peers a policy can list.
MAX_LISTED = 1024

#: Signatures remembered as right: one check takes 70 µs, and an envelope comes by several times.
KNOWN_SIGNATURES = 16384

# --- on disk ----------------------------------------------------------------------------------------------------------

#: Bytes of the file of marks, after which it is written anew with one record per document. A record takes 96.
MAX_MARKS = 64 * 1024

#: Bytes to which SQLite cuts its write-ahead log after a checkpoint.
MAX_LOG = 4 * 1024 * 1024

#: KiB of database pages held in memory. Documents are in memory anyway; after the start the database is only written.
CACHE_KIB = 512

#: Database pages (4 KiB) given back to the file system by one call of ``tidy``: a few milliseconds.
VACUUM_PAGES = 256

#: Damaged databases that are kept for people to look at. The oldest goes first.
MAX_SET_ASIDE = 3

#: Rows in a row that cannot be read, after which a damaged table is taken to have no more.
MAX_MISSING_ROWS = 4096

# --- gossip: broadcast, anti-entropy, the service ---------------------------------------------------------------------

#: Members that each member follows. With as many followers in the mean, two hops reach 16 + 16² of them. More partners
#: gain less than a round at 1,000 members (docs/gossip.md) and cost links, of which 64 are kept.
PARTNERS = 8
#: Of these, how many push to us: at most this many copies of an envelope, but for its first hops. With 4, and 20 % of
#: all members silent, one member in 600 is left to the telling; with 3, one in 125.
FEEDS = 4
#: Followers that a member serves at most. Mean PARTNERS, so that the Poisson tail beyond 24 is 2e-6.
MAX_FOLLOWERS = 24
#: Seconds for which names of envelopes wait to be told together. Below a human's patience, above the time that a batch
#: of envelopes takes through a store.
TELL_DELAY = 0.05
#: Seconds after which a fetch that has not ended is tried elsewhere. Some round trips across the world.
FETCH_PATIENCE = 2.0
#: Seconds for which a peer that did not answer is chosen as a partner no more.
SILENT_FOR = 60.0
#: Seconds between two renewals of following somebody; a follower is forgotten after 2.5 of them.
FOLLOW_RENEW = 60.0
#: Bytes up to which an envelope is pushed at all; larger ones are told, and fetched once.
EAGER_SIZE = 16_384
#: Envelopes remembered as seen, with who else has them. Older ones are known to the replica.
REMEMBERED = 4096
#: Envelopes, per scope, that we were told of and lack; also names kept for one peer until it is told.
MAX_WANTED = 4096
#: Of these, one peer may tell of one in so many: names can be made up, and a batch of MAX_ADVERTS still fits.
WANTED_SHARES = 8
#: Names in one message.
MAX_ADVERTS = 512
#: Names in one request for envelopes.
MAX_FETCH = 64
#: Envelopes, and bytes of them, in one message. Bytes: a quarter of what a message may hold.
MAX_SENT = 64
MAX_SENT_BYTES = 256 * 1024

#: Half bytes of an author's hash in the tree of digests. 64 bits: nobody crowds one place by grinding keys.
TREE_DEPTH = 16
#: Entries below a node up to which they are named instead of divided. 16 digests of 16 bytes cost as much as 3 entries,
#: a round trip more; with 24, 1,000 authors are 3 levels (63 and 4 below a node).
TREE_LEAF = 24
#: Nodes in one question.
MAX_NODES = 256
#: Entries and digests in one answer: some 60 kB.
MAX_COMPARED = 512
#: Nodes that wait to be asked about in one exchange; what is beyond is left for the next one.
MAX_PENDING = 8192
#: Questions in one exchange. 1,000 authors with all of them different take 20.
MAX_COMPARES = 128

#: Calls per second, and at once, that one peer may make. Sixteen neighbours that tell every 50 ms make 20 each.
PEER_CALLS, PEER_CALLS_BURST = 50.0, 250.0
#: Envelopes per second, and at once, that one peer may send. 200 signatures are 14 ms of a core; the burst is the
#: backlog of a healed partition.
PEER_ENVELOPES, PEER_ENVELOPES_BURST = 200.0, 2000.0
#: Bytes per second, and at once, that one peer may send, and be sent when it asks.
PEER_BYTES, PEER_BYTES_BURST = 2.0e6, 32.0e6
#: Peers whose conduct is remembered.
MAX_CONDUCT = 4096
#: Strikes (what no honest peer does) after which a peer is not heard: one may be a bug or a bad disk.
STRIKES = 5
#: Seconds after which one strike is forgiven.
STRIKE_FORGIVEN = 600.0
#: Seconds for which a peer with too many strikes is not heard.
MUTED_FOR = 900.0

#: Seconds, in the mean, between two exchanges of anti-entropy with somebody. The broadcast brings news; this is for
#: what it lost, and equal documents cost 100 bytes.
RECONCILE_EVERY = 20.0
#: Seconds within which a peer has to answer, connecting included.
ANSWER_DEADLINE = 10.0
#: Seconds between two looks at who is a member.
MEMBERS_EVERY = 3.0
#: Seconds between two looks for what has expired, and at the store's free pages.
EXPIRE_EVERY = 60.0
#: Pushes and names kept for a peer that is slow. What is dropped comes by anti-entropy.
MAX_OUTBOX = 512
#: Share of anti-entropy that goes to any member instead of a neighbour: it finds what a clique of neighbours hides.
RECONCILE_FAR = 0.34
#: Exchanges that one node carries on at once.
MAX_RECONCILING = 4
#: Documents that a node has open.
MAX_OPEN = 1024
#: Bytes of an envelope beside its update: ids, hash, signature, names of fields.
ENVELOPE_OVERHEAD = 400
#: Seconds to wait for an envelope that others, which follow on it, have overtaken.
EARLY_PATIENCE = 0.3
#: Authors with such envelopes, and envelopes of each, that wait.
MAX_EARLY = 64
#: Proofs in one message. Each holds two headers of 300 bytes.
MAX_PROOFS = 64
#: Seconds after which nothing more is asked of one peer in a row: somebody else has a turn, and this one again later.
#: A newcomer's first exchange (1,000 authors, 20 questions across the world) takes 10; a liar's could take hours.
EXCHANGE_TIME = 30.0
#: Exchanges with one peer behind one another, when one of them is cut short.
MAX_EXCHANGES = 16
#: Seconds for which an author whom one side does not take (yet) is passed over by anti-entropy with it. Views of who is
#: a member agree after some seconds.
PASS_OVER = 60.0
