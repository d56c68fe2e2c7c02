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
