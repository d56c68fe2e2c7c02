"""Constants of the learning floor, each with unit, reason and source."""

from __future__ import annotations

# --- data -----------------------------------------------------------------------------------------------------------

#: Samples that a part of a Dirichlet split has at least: one minibatch. A peer with three samples learns noise.
MIN_PART = 32

# --- training -------------------------------------------------------------------------------------------------------

#: Seconds of one uninterrupted slice of training on the worker thread. Cancellation (Ctrl-C, a lost quorum) waits for
#: the slice to end, and the promise is to be gone within 2 s; entering and leaving the thread costs about 0.1 ms.
TRAIN_SLICE = 0.05

#: Seconds of compute that one training step is modelled to take in virtual time, unless the task says otherwise.
STEP_SECONDS = 0.05

#: Bytes of a message to or from a training process at most: a traceback may be long. Vectors do not travel in them.
APART_MESSAGE = 1 << 20

# --- messages to people -----------------------------------------------------------------------------------------------

#: Differing parameters named in full when a model does not match the run's; the rest are counted.
SHOWN_DIFFERENCES = 4

# --- exact arithmetic, digests ----------------------------------------------------------------------------------------

#: Elements of one pass of exact arithmetic: 256 KiB of float32, so that sum, product and input share an L2 of 1 MiB
#: (mean of 8 vectors of 64 MiB: 57 ms; 96 ms unchunked).
EXACT_CHUNK = 1 << 16

#: Elements of a linear layer that are moved at a time for a look along a random direction: 2 MiB.
LOOK_BLOCK = 1 << 19

#: Elements under one scale of int8 and e3m0. The scale costs 0.4 % of int8's bytes and 0.8 % of e3m0's; a block of
#: 4 KiB stays in the first cache between the search for its largest value and the rounding; with four times as many
#: elements the step is 11 % larger for N(0,1), and one outlier spoils four times as many neighbours.
CODEC_BLOCK = 1024

#: float32 bits of the smallest largest magnitude of a block that is not coded as zeros, 2^-100: below 2^-121 the
#: inverse of a scale would overflow, and no gradient of use is that small.
CODEC_LEAST_BITS = 0x0D800000

#: Step of EControl: it converges for 0.02 to 0.1 where 0.5 diverges (ten heterogeneous quadratics, top 10 %).
ECONTROL_ETA = 0.05

#: Elements up to which a pass over them runs on the event loop: it takes 0.2 to 0.5 ms, the way to a thread and back
#: 0.1, or 10 when the machine is busy, and a round has a dozen such passes one after the other.
INLINE = 1 << 20

#: Elements that are coded, or decoded, at once where codes travel: a whole slice need not be in memory in its code. A
#: multiple of CODEC_BLOCK; 512 KiB of int8.
CODED_PIECE = 1 << 19

#: Bytes under one AEGIS tag in a fingerprint. Fixed: it is part of what the fingerprint is.
FINGERPRINT_PIECE = 4 << 20

#: Bytes per second above which AEGIS must be running on AES instructions (5 GB/s with them, 10 MB/s without).
AEGIS_MIN_RATE = 200e6

# --- tensors of a reduce --------------------------------------------------------------------------------------------

#: Bytes that are staged between a device and the network in one go. The copy of a bucket hides behind that of the next
#: and the network: at 8 MiB it takes 0.5 ms over PCIe and 2 to 4 ms of a core, against 0.1 ms for the way to a thread.
BUCKET = 8 << 20

#: Pinned buffers of BUCKET bytes that a process keeps: two for each of two reduces in flight and the way back of each.
PINNED_BUFFERS = 8

# --- rounds -----------------------------------------------------------------------------------------------------------

#: Seconds between two dials to a lost peer, first and at most: a restarted peer is back within a round, a dead one
#: costs a dial every ten seconds.
REDIAL_FIRST = 0.5
REDIAL_LAST = 10.0

#: Messages that wait for one peer. A round sends a few dozen per peer and attempt.
MAX_QUEUED_MESSAGES = 256

#: Turns of the event loop from giving a message to the post until it is written: the task of its queue, the call, the
#: link's writer take two or three each. Some 10 µs in all.
TURNS_TO_LEAVE = 10

#: Seconds after which the task of an empty queue ends.
IDLE_QUEUE = 60.0

#: Seconds in which a peer plans no ring after one that did not close, which costs the time of a phase: of the path that
#: was the reason more is known then. Doubled with each that breaks soon after, up to the second figure.
RING_AGAIN, RING_NEVER = 60.0, 3600.0

#: Seconds a message for a round that we have not reached yet waits for us to get there. Peers that commit at once
#: differ by a round trip and the outer step; anything later is answered as refused and sent again.
EARLY_MESSAGE = 5.0

#: Messages for rounds not reached yet that may wait at the same time, all peers together, and of one peer: it says that
#: it is ready, and may lead.
MAX_EARLY_MESSAGES = 256
MAX_EARLY_OF_PEER = 8

#: Bytes of such messages of one peer, as they travelled: a plan for the largest roster takes 38 KB. 16 MiB of all.
MAX_EARLY_BYTES = 64 << 10

#: Seconds stragglers are waited for after a quorum is ready: at least this, or as long as training took. Twice as slow
#: as the median is still in; slower peers use a time budget.
GRACE_FLOOR = 3.0

#: Seconds of silence after which a leader is suspected. It sends word four times in this while.
SUSPECT = 6.0

#: Seconds of a bulk phase at least; on top comes the time the bytes need on the measured link.
TRANSFER_FLOOR = 4.0

#: Seconds the last accepts are waited for once a quorum has accepted.
ACCEPT_WAIT = 0.25

#: Committed rounds that are remembered, with the result of the last two: peers that missed a commit ask for it.
REMEMBERED_COMMITS = 8
REMEMBERED_RESULTS = 2

#: Bytes of a round's result above which those of earlier rounds are given up when it is gathered: whoever has not come
#: for them by then is behind and loads a state. Without this a reduce takes twice the memory it needs.
LARGE_RESULT = 4 << 20

#: Elements from which on memory of a round is kept for the next one, and seconds between two rounds beyond which it is
#: not: to touch 64 MiB anew takes 6 to 30 ms, which only rounds in quick succession notice.
SMALL_BUFFER = 1 << 16
KEEP_MEMORY = 10.0

#: Bytes of a download of a result that have a deadline of their own: 8 s on a line of 1 Mbit/s.
DOWNLOAD_PIECE = 1 << 20

#: Members to whom a peer sends bulk to learn what its line carries, for how many seconds at most (the meter wants three
#: windows of 0.25 s), how many bytes (a second at 500 Mbit/s), and seconds until it may be done again.
PROBE_PEERS, PROBE_TIME, PROBE_BYTES, PROBE_EVERY = 3, 2.0, 64 << 20, 1800.0

#: Bytes of the first body of a probe, and of any: it doubles as long as one takes less than so many seconds, since what
#: is under way together has to fill the line for a round trip. Seconds to wait for links before.
PROBE_FIRST, PROBE_BODY, PROBE_QUICK, PROBE_WAIT = 32 << 10, 4 << 20, 0.25, 5.0

#: Peers in one roster. Larger swarms use gossip groups.
MAX_ROSTER = 256

#: Seconds without a majority after which survivors of an ``available`` run go on as a branch. Longer than a restart of
#: a node (about 5 s) and than the detection of a frozen peer (about 10 s).
LEASE = 15.0

#: Seconds between two looks for peers of the run outside the roster, and between two wishes of a joiner.
SCOUT_EVERY = 5.0
WISH_EVERY = 1.0

#: Seconds a wish counts after it was last repeated.
WISH_LIFETIME = 10.0

#: Wishes kept at the same time.
MAX_WISHES = 64

#: Lost members that are asked now and then whether they went on as a branch: the last ones.
MAX_FORMER = 16

#: Seconds between two saves of the state to disk while rounds are short.
SAVE_EVERY = 5.0

#: fp32 elements of one vector that a round may reduce: four times the state, for strategies that send several.
VECTORS_PER_ROUND = 4

#: Seconds for a question to several peers at once (heads, wishes, branches): a few round trips of a bad link.
ASK_HEADS = 4.0

#: Times that a round may give up a value it had accepted, because nobody that can be reached holds its result any more.
MAX_REDONE = 100

#: Seconds between two looks whether a majority is still there.
GUARD_EVERY = 0.5

#: Seconds after the end of training without a commit, before we ask others whether we were left behind.
STUCK_AFTER = 8.0

# --- state ----------------------------------------------------------------------------------------------------------

#: Vectors of a state that a joiner accepts, and their size in multiples of the weights'.
MAX_VECTORS = 4090
MAX_STATE_FACTOR = 8

#: Seconds that a joiner goes on without any holder of the state it loads: the run moves on meanwhile.
STATE_PATIENCE = 5.0

#: Settled states that are kept in memory in any case: the last one, and the one that a commit has just vouched for.
SNAPSHOTS = 2

#: Older states that are kept as long as somebody loads them: how many at most, how many seconds after they were last
#: asked for (a joiner asks several times a second), and how many in all (256 MiB at 1 Mbit/s take 36 minutes).
HELD_SNAPSHOTS = 2
HOLD_IDLE = 10.0
HOLD_MAX = 3600.0

#: Seconds that a round waits at most for peers that were admitted by the one before and are loading the state. Each is
#: waited for like that once in so many seconds, and there are two such spans between two waits, lest those that never
#: make it slow down all rounds.
JOIN_GRACE = 60.0
JOIN_GRACE_AGAIN = 600.0

# --- replay -----------------------------------------------------------------------------------------------------------

#: Records of a run that a peer keeps in memory for those who replay them, of about 1 KB each for four members.
LEDGER_RECORDS = 2048

#: Bytes of memory for them, at most.
LEDGER_MEMORY = 32 << 20

#: Records in one answer, and their bytes: a message has 1 MiB and 65,536 values.
LEDGER_PAGE = 128
LEDGER_BYTES = 600_000

#: Seconds in which a holder gives all records that are asked of it, some ten pages: one that gives a record at a time,
#: each just in time, would keep a joiner for an hour.
LEDGER_WAIT = 10.0

#: Rounds that are replayed at most instead of loading the state.
REPLAY_ROUNDS = 1024

#: Seconds to move one element along one direction: signs take 4 ns on one core, normal numbers five times that. And
#: what a replay may take in any case, or as long as the state would take at so many bytes per second.
REPLAY_ELEMENT = 5e-9
REPLAY_SECONDS = 5.0
REPLAY_RATE = 2e6

# --- checkpoints ----------------------------------------------------------------------------------------------------

#: Rounds between two checkpoints, and seconds after which one is kept in any case: rounds of large models take minutes.
CHECKPOINT_ROUNDS = 10
CHECKPOINT_SECONDS = 300.0

#: Seconds that lie at least between two, where the user did not choose: toys do 60 rounds a second, and a history of
#: one second helps nobody. The rounds between two are doubled for it so often at most.
CHECKPOINT_APART = 30.0
MOST_ROUNDS_APART = 1 << 20

#: Checkpoints that stay although nobody pinned them.
CHECKPOINTS = 3

#: Bytes that the blobs of a run may take on disk.
BLOB_QUOTA = 50_000_000_000

# --- gossip -----------------------------------------------------------------------------------------------------------

#: Rounds for which a member that does no more of them is still drawn into groups. Its last round must be known to all
#: by then, or they draw different groups: news reach a thousand peers in ten exchanges of :data:`GOSSIP_EVERY`.
VIEW_ROUNDS = 32

#: Seconds between two exchanges of views with random members.
GOSSIP_EVERY = 2.0

#: Members that a newcomer asks where the run is, drawn anew each time.
GOSSIP_ASK = 4

#: Seconds between two exchanges while not enough peers are there to begin: news reach a thousand in a dozen.
GATHER_EVERY = 0.5

#: Exchanges of views with members, per one with peers of the run that are not in the view.
STRANGERS_EVERY = 8

#: Members of a view.
MAX_VIEW = 1024

# --- trust ------------------------------------------------------------------------------------------------------------

#: Links of a proof that a head belongs to the run, at most. One is added only when most of a roster has been replaced
#: since the one before: 256 complete turnovers of the swarm.
MAX_TRUST = 256

#: Links of a proof in one message: for rosters of MAX_ROSTER about 45 kB and 2,600 values each, of 1 MiB and 65,536.
TRUST_PAGE = 16
#: Bytes of such links at most: those of rounds that admitted somebody hold 20 kB of opinions more, where all of
#: MAX_ROSTER voters have one.
TRUST_BYTES = 900_000

#: Believed rosters off the way to our own that are remembered: other branches, and rosters just before.
REMEMBERED_ROSTERS = 32

# --- documents of a run -----------------------------------------------------------------------------------------------

#: Seconds between two words of a member that it is there: a person who looks at the roster sees a death within half a
#: minute. With many members BEAT_EACH seconds per member, so that all of them together say two words per second.
BEAT_MIN, BEAT_EACH = 10.0, 0.5
#: Seconds at most; a reader takes no member at its word that it will be silent for longer.
MAX_BEAT = 3600.0
#: Seconds between two writes of one member at least: others take two envelopes per second from an author, not more.
SPEAK_EVERY = 2.0
#: Beats that may be missed, and seconds of clocks that differ and words that travel, before a member counts as silent.
BEATS_MISSED, BEAT_SLACK = 2.5, 5.0
#: Rounds that each member keeps of those that fell to it to write down; 32 of 2 kB are a quarter of what it may write.
COMMITS_KEPT = 32
#: Members named in such a note; of more, only their number.
COMMIT_MEMBERS = 32
#: Bytes of a record that stands in such a note: of some 16 members. Larger ones are only had from members.
NOTE_RECORD = 4096
#: Seconds after which the second in line writes a commit down that the first did not.
COMMIT_SECOND = 5.0
#: Points of its history that a member keeps: 256 of 40 bytes, compacted 10 kB.
POINTS_KEPT = 256
#: Bytes of a proof, characters of a text in a document.
MAX_EVIDENCE, MAX_DOCUMENT_TEXT = 4096, 128
#: Bans of one author that are read: about what fits.
MAX_BANS = 1024
#: Proofs of lies in rounds of one author that are read, a few ms each; its part of a document holds two large ones.
MAX_LIES = 4
#: Proofs remembered as checked, right or wrong: what 40 members who do nothing else can write. A check takes 70 µs.
PROOFS_CHECKED = 16384
#: Seconds between two looks at a document that changes all the time: an author of many pieces takes 50 ms to read.
LOOK_EVERY = 1.0
#: Members and former ones remembered, whose words are taken: as many as a document takes authors.
MAX_REMEMBERED = 4096
#: Of these, so many may one member name that we have not seen ourselves: its notes of 32 rounds name those who took
#: part before we came. Names can be invented, and each may write 256 KiB into a document of 64 MiB.
MAX_VOUCHED = 32
#: Seconds, at most, before a proof is written down: others may have done it by then.
BAN_JITTER = 3.0
#: Seconds for the last word of a member that leaves.
LAST_WORD = 0.4

# --- standing -------------------------------------------------------------------------------------------------------

#: Values that "lately" is about: rounds, qualities. A peer that turns bad shows within a few; one round moves it 5 %.
STANDING_WINDOW = 20

#: Peers of whom something is remembered: as many as a view has, four times a roster. 200 kB on disk.
MAX_STANDINGS = 1024

#: Every count ends here: what JSON numbers hold exactly.
MAX_STANDING_COUNT = 1 << 53

#: Seconds between two writes of what is known of others. Power loss costs that much; a write of 1024 peers is 200 kB.
STANDINGS_EVERY = 10.0

# --- admission --------------------------------------------------------------------------------------------------------

#: Rounds that a newcomer is on trial where the run's rule is one against liars: one round may be luck.
ADMISSION = 3

#: Cosine of a contribution with a combined slice above which an owner finds it fit. On digits, every peer with its own
#: mixture of classes (Dirichlet 0.3), honest work is above it for most owners in 92 to 97 % of rounds, its opposite in
#: 3 at most, Gaussian noise in none: its cosine is some 1/sqrt(elements of the slice). See docs/byzantine.md.
TRIAL_COSINE = 0.05

# --- aggregators ------------------------------------------------------------------------------------------------------

#: Elements of all rows together that are checked and combined at a time: 1 MiB of float32, half of a second cache.
AGGREGATE_CHUNK = 1 << 18

#: Steps of an iteration to convergence (IRLS, Weiszfeld) at most. Each takes some 20 µs for 16 vectors.
AGGREGATE_ITERATIONS = 1000

#: Two largest eigenvalues within this share are equal: rounding in sums of 16 products of float64, with room.
AGGREGATE_TIE = 1e-12

#: f of the minimum diameter: a search tree of at most 1.47^f nodes per question, some 10 000 of 20 µs.
MDA_MAX_F = 24

#: Sets of vectors whose eigenvalues SMEA looks at: about 1 s.
SMEA_MAX_SETS = 100_000

#: By how much inner products of others' sums may break Cauchy-Schwarz: float64 sums of 10^9 products, with room.
GRAM_SLACK = 1e-9

#: How far a result may lie from what one's own coefficients say, in its lengths; and how much larger coefficients may
#: be.
COEFFICIENT_TOLERANCE, COEFFICIENT_GROWTH = 1e-6, 100.0

#: Members up to which a leader looks at the eigenvalues of every owner's products, on the event loop: half a ms for 64,
#: 16 for 128. Those of the sum are looked at for any number, off the loop.
PARTS_SPECTRUM = 64

#: Bytes of all owners' inner products up to which the leader sends them all to everybody, so that each owner sees its
#: own in the sum: up to 24 members. Beyond it only the sum, or the leader's line would carry megabytes.
PRODUCTS_IN_FULL = 64 << 10

# --- audits of slice owners ----------------------------------------------------------------------------------------

#: Slices that each peer looks at in a round, in the mean, where the run's rule is one against liars. With one look by
#: everybody an owner that lies in its whole slice is seen in 1 - (1 - 1/(n-1))^(n-1) of rounds: 63 % or more.
AUDIT_RATE = 1.0

#: Parts of a slice of which one look takes one: a look costs a sixteenth of the vector, where a round costs each peer
#: twice the vector.
AUDIT_PARTS = 16

#: Leaves that a slice should have, so that a part is several of them, and elements below which a leaf is not cut for it
#: (1 KiB: its hash is 3 % of it).
AUDIT_LEAVES, AUDIT_LEAF = 64, 256

#: Bytes of all voters' leaves in one proof; with their paths it fits into one envelope of a document (MAX_UPDATE).
AUDIT_PROOF = 64 << 10

#: Bytes of a proof that an owner lied: of 64 voters and slices of 1 GiB. An envelope (MAX_UPDATE) holds it.
MAX_LIE = 124 << 10

#: Relative difference of inner products above which an owner's are no rounding: float64 sums of at most 2^32 products.
AUDIT_PRODUCTS = 1e-6

#: Looks of one peer that an owner answers in a round: MAX_AUDIT of its own, and those that accusations ask for; a peer
#: that asks for more wants the owner's line.
MAX_LOOKS = 128

#: Accusations of one peer that turned out false, after which its further ones are not looked into.
MAX_FALSE_ACCUSATIONS = 2
