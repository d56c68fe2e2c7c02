"""Constants of the dht floor, each with unit, reason and source."""

from __future__ import annotations

#: Peers in a bucket, peers that hold a record, peers in an answer. Kademlia (Maymounkov & Mazières 2002,
#: section 2.2) chooses k such that any k peers very unlikely all fail within an hour; 20 there and in IPFS.
K = 20

#: Queries in flight when a lookup begins. Kademlia section 2.3 uses 3.
ALPHA = 3

#: Queries in flight at most. A lookup rises to this while answers fail or bring nothing closer: beyond 10 the
#: extra queries measurably only add messages (Stutzbach & Rejaie 2006, "Improving Lookup Performance").
ALPHA_MAX = 10

#: Disjoint paths of lookups that must not be misled: for our own neighbours, of writes, of reads that found nothing,
#: and in crowded regions. S/Kademlia (Baumgart & Mies 2007, section 5): with k = 16 and 8 paths 99 % of lookups succeed
#: among 20 % adversarial peers. In `shoal lab dht` (1,000 nodes, a fifth of them adversaries) 3 paths find 96.3 % of
#: the records, 8 paths 99.3 %. The paths go on at the same time: latency is that of a single one.
CAREFUL_PATHS = 8

#: Of the peers closest to a write's place on each path, and of all of them in the end, how many must have answered
#: before the others are asked to store (whether they are there shows by that). As go-libp2p ("resiliency", beta 3): the
#: closest peers know who else is near. With 3 of them 94.8 % of records are found again where a fifth of the nodes are
#: adversaries, with 8 or 20 97.8 % (`shoal lab dht`, 400 nodes); 20 made a write in 32 peers 41 requests instead of 30.
WRITE_SETTLED = 8

#: The same in a swarm of up to 2k peers, where a writer knows most of those that are to store: it hears of new ones.
WRITE_SETTLED_FEW = 3

#: Holders whose answers settle a read of a record that can change: a holder that was away may be one version behind.
READ_QUORUM = 3

#: Estimates of the swarm's size that are kept: their median moves little when a few of them are wrong.
SIZE_SAMPLES = 15

#: Seconds after which an estimate is taken anew before a place counts as crowded; and the lookups, at places of chance,
#: for that. 90 queries, once a minute at most, and only on suspicion.
SIZE_FRESH, SIZE_LOOKUPS = 60.0, 3

#: Peers that a lookup must have found for its distances to count: 5, as the lookups that refresh buckets find.
SIZE_MIN_PEERS = 5

#: Part of the expected distance of the k-th closest peer below which a place counts as crowded. The number of peers
#: within it is Poisson: 20 where 7 are expected happens 4 times in 100,000. Attackers that stay above it leave 7 honest
#: peers among the 20.
CROWDED = 0.35

#: Part of the swarm's size below which what the closest peers say of it means that others are hidden from us: three
#: standard deviations of the estimate.
HIDDEN = 0.45

#: Lookups that search a crowded place's region: its half, quarter, eighth and sixteenth beside the crowd.
REGION_LOOKUPS = 4

#: Peers that an answer names beside the record: those who hold it too are among them, and each costs the asker 4 µs.
#: Twice READ_QUORUM, as some may be gone.
HOLDER_NAMES = 6

#: Queries of one lookup at most. An honest lookup among 10,000 peers needs about 30; liars can force no more than this.
MAX_QUERIES = 240

#: Candidates one lookup remembers at most; the closest stay.
MAX_CANDIDATES = 400

#: Seconds after which a query that is not answered gives its place to the next one. Most of the Internet's round trips
#: are below 0.2 s, and a first question takes four of them (connection, handshake, call).
SLOW_AFTER = 0.8

#: Different records of one peer that a lookup keeps until it asks that peer: one is current, one may be old, others are
#: forged.
MAX_CLAIMS = 4

#: Failures among the peers that one peer named, after which its other suggestions are believed last: honest
#: tables that lost 30 % of their peers name 6 dead of 20; three standard deviations more are 12.
DISCREDIT_FAILURES = 12

#: Seconds a whole lookup may take. At ALPHA_MAX parallel dead addresses this covers all dials of 30 dead peers.
LOOKUP_DEADLINE = 60.0

#: Newcomers remembered per full bucket. Kademlia section 4.1 (replacement cache); twice the usual loss of a bucket.
REPLACEMENTS = 10

#: Peers of one /24 (IPv4) or /48 (IPv6) in a bucket: one rented network cannot fill a bucket. As in go-libp2p.
MAX_PER_NETWORK = 2

#: Failed queries in a row after which a contact leaves its bucket even without a replacement: one may be a lost link.
MAX_FAILURES = 2

#: Seconds after which a silent contact is pinged. Half of the mean session of 10 minutes that remains
#: of a peer seen once in published churn traces (Stutzbach & Rejaie 2006, "Understanding Churn").
LIVENESS_INTERVAL = 300.0

#: Seconds within which a peer that was heard before need not be noted again: most of what a busy swarm hears.
HEARD_ANEW = 1.0

#: Seconds between lookups in a bucket that saw none. Kademlia section 2.3: one hour.
REFRESH_INTERVAL = 3600.0

#: Peers that must have answered in the lookup that refreshes a bucket: it is to find a few live contacts there, not the
#: k closest to a random key. A lookup that wants 20 takes 25 queries, one that wants 5 takes 8.
REFRESH_WIDTH = 5

#: Live contacts with which a bucket needs no refresh when a peer joins: a lookup asks 3 of them at a time, and what
#: others ask us fills it further. Each bucket is refreshed within the hour all the same.
REFRESH_ENOUGH = 8

#: Seconds between two looks at what is due. Half a minute of delay is nothing to intervals of minutes.
TICK = 15.0

#: Seconds between two attempts to reach lost peers and bootstrap addresses again: partitions heal in about a minute.
REJOIN_INTERVAL = 60.0

#: Peers remembered after they left the table, to try again.
MAX_LOST = 128

#: Peers tried per rejoin attempt.
REJOIN_BATCH = 3

#: Seconds after which holders hand a record on to the peers now closest to it (Kademlia section 2.5: one hour).
#: A holder that was given the record by another one in that time skips its turn.
REPLICATE_INTERVAL = 3600.0

#: Seconds a record may live. A day, so that a run whose author left is found until its members publish anew.
RECORD_LIFETIME = 86400.0

#: Bytes of a record's value. One run spec; larger things are blobs, whose hash goes here.
MAX_VALUE = 4096

#: Bytes of a record's key and of a provider topic: a public key and a hash.
MAX_KEY = 64

#: Characters of a namespace.
MAX_NAMESPACE = 32

#: Records held for others: about 60 MiB at full size, 15 MiB at the usual 1 KiB.
MAX_RECORDS = 16384

#: Records of one author held here. An author's records spread over the whole key space, so this is plenty.
MAX_RECORDS_PER_AUTHOR = 128

#: Seconds a provider announcement lives unless the provider says otherwise: a dead provider is forgotten within this.
PROVIDE_LIFETIME = 1800.0

#: Seconds an announcement may live at most. The peer record inside lives no longer (transport PEER_RECORD_LIFETIME).
MAX_PROVIDE_LIFETIME = 7200.0

#: Part of its lifetime after which an announcement is renewed: two renewals may fail.
RENEW_FRACTION = 1 / 3

#: Providers held per topic. Beyond it the one that expires first gives way.
MAX_PROVIDERS = 256

#: Topics one provider may announce here.
MAX_TOPICS_PER_PROVIDER = 256

#: Seconds between two searches of a full store for what has expired: a flood of requests must not pay for more.
SWEEP_INTERVAL = 1.0

#: Announcements held in all: about 15 MiB. With MAX_RECORDS below the values of one message (a snapshot).
MAX_ANNOUNCEMENTS = 32768

#: Providers in one answer: 64 of about 450 bytes.
MAX_PROVIDERS_ANSWER = 64

#: Requests per second, and at once, from one peer of our routing table. A request costs about 0.3 ms here.
FRIEND_RATE, FRIEND_BURST = 1000.0, 2000.0

#: Requests per second, and at once, from one stranger. A joining peer sends each other peer a handful.
STRANGER_RATE, STRANGER_BURST = 50.0, 200.0

#: Requests per second, and at once, from all strangers together: at most about a third of one core.
STRANGERS_RATE, STRANGERS_BURST = 1000.0, 4000.0

#: Strangers whose rate is remembered.
MAX_STRANGERS = 4096

#: Contacts in a snapshot: as many as are remembered for another try. One that answers is enough to rejoin.
SNAPSHOT_CONTACTS = MAX_LOST

#: Bytes of a snapshot that is read back.
MAX_SNAPSHOT = 1 << 28

#: Seconds that the other addresses of a ticket get once one of them has answered. In networks that are not ours nobody
#: answers, and a dial gives up after 10 s; a second way in within this time is welcome.
BOOTSTRAP_GRACE = 0.5
