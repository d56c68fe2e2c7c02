"""Constants of the node floor, each with unit, reason and source."""

from __future__ import annotations

#: Port of a relay, unless it is told otherwise: people type it, and firewalls are opened for it.
RELAY_PORT = 4001

#: Links that a relay keeps: 30 KiB each.
RELAY_LINKS = 1024

#: Addresses in a ticket. More make the line too long to paste into a chat; one that answers is enough.
MAX_TICKET_ADDRESSES = 12

#: Bytes of a decoded ticket: 12 ``mem`` addresses of 257 bytes and the fixed part fit.
MAX_TICKET_BYTES = 4096

#: Bytes of a Unix socket's path, terminator included: 108 on Linux, 104 on macOS and the BSDs. The smaller one counts.
MAX_SOCKET_PATH = 104

#: Bytes of one message on the control socket. An event or a status is far smaller; a list of 10,000 peers fits.
MAX_CONTROL_MESSAGE = 4 << 20

#: Seconds a command waits for an answer of the running node. Its loop lags by less than 0.1 s beside a busy trainer.
CONTROL_TIMEOUT = 5.0

#: Seconds from Ctrl-C to the end of the process: the promise to the user.
SHUTDOWN = 2.0

#: Seconds of the above for saying goodbye to the run and to all links. Both are bounded to 1 s by themselves.
GOODBYE = 1.0

#: Events that a slow watcher of the control socket may fall behind before it is cut off.
EVENT_BUFFER = 4096

#: Peers without a link that `shoal peers` names: who was just here, and fits on a screen.
SHOWN_WITHOUT_LINK = 16

#: How far what a peer did lately lies from what it did on the whole, for `shoal peers` to say so: 2 of 20 rounds.
CHANGED_LATELY = 0.1

#: Connections to the control socket at one time; more are closed at once.
MAX_CONTROL_CONNECTIONS = 32

#: Seconds between two tries to reach the addresses of a ticket. Doubles up to BOOTSTRAP_RETRY_MAX.
BOOTSTRAP_RETRY = 0.5
BOOTSTRAP_RETRY_MAX = 15.0

#: Seconds `join` tries the addresses of a ticket before it gives up. A founder that boots needs about 10.
JOIN_TIMEOUT = 60.0

#: Seconds between two looks at who can reach the node.
REACH_LOOK = 1.0

#: Seconds between two writes of what the node knows of the swarm to the data directory.
SNAPSHOT_INTERVAL = 60.0

#: Seconds between two looks whether there is more to lose: a node that is killed this long after it joined finds back.
SNAPSHOT_LOOK = 2.0

#: Seconds that one thread may hold the interpreter while another waits. With Python's 5 ms a training thread
#: delays the event loop by 42 ms at the 99th percentile; with this, by 2.4 ms (measured, see docs).
SWITCH_INTERVAL = 0.0005

#: Seconds for a command that fetches a checkpoint from other members: 10 GB at 100 Mbit/s.
FETCH_TIMEOUT = 900.0

#: Seconds after which a checkpoint that nobody has is given up.
FETCH_PATIENCE = 10.0

#: Seconds a node that has finished a run stays, at most, for members that still need something of the last round.
LINGER = 10.0

#: Seconds between two looks whether all members have finished too.
LINGER_POLL = 0.1

#: Seconds that members have to answer that question. One that leaves while it is asked does not answer.
LINGER_ASK = 1.0

#: Own addresses in a ticket: a public, a local and a loopback one of each IP version. The rest is left for other peers
#: and relays, so that the founder may leave.
OWN_TICKET_ADDRESSES = 6

#: Tries to find a port that is free by IPv4 and IPv6. One in ten thousand is free by one of them only.
PORT_TRIES = 8

#: Seconds that one question to a peer about the run may take while joining.
ASK_TIMEOUT = 5.0

# Doctor (doctor_checks.py, doctor_gather.py, helping.py)

#: Bytes that one probe of the line may send: 0.3 s at 100 Mbit/s; more tells little more.
PROBE_BYTES = 4 << 20

#: Bytes of the first probe; if it took longer than PROBE_SHORT seconds, it is the measurement.
PROBE_FIRST = 256 << 10
PROBE_SHORT = 0.5

#: Probes of one peer per second, and at once: a doctor needs three.
PROBE_RATE, PROBE_BURST = 0.1, 6.0

#: Seconds for one probe.
PROBE_TIME = 15.0

#: Seconds for reaching a peer by all its addresses: a dial's 10 s and a handshake.
DOCTOR_CONNECT = 12.0

#: Seconds to wait for what peers find out about us: 1 s to settle, a question, and a dial of up to 10 s by one of them.
DOCTOR_REACH = 15.0

#: Seconds for importing torch in a child process on a slow disk.
DOCTOR_TORCH = 60.0

#: Bytes of a packet below which a tunnel is on the way: Ethernet has 1500, PPPoE 1492, a tunnel less.
SMALL_MTU = 1400

#: Seconds of round trip that are worth a word: farther than the other side of the earth.
SLOW_ROUND_TRIP = 0.5

#: Bytes per second below which rounds of even small models take minutes: 1 Mbit/s.
SLOW_RATE = 125_000.0

#: Seconds of difference between two clocks that are worth a word, and that break things (transport's CLOCK_SKEW).
NOTABLE_SKEW, BAD_SKEW = 5.0, 300.0

#: Bytes of free disk below which a warning is due, and below which nothing can be saved.
DISK_LOW, DISK_FULL = 2e9, 200e6

#: Seconds `shoal dht` waits for an answer: a lookup may take its LOOKUP_DEADLINE of 60 s, a read two of them.
DHT_TIMEOUT = 150.0

#: Bytes of a record's key and of a topic, as in the dht floor: told here, so that the commands load little.
MAX_DHT_KEY = 64
#: Seconds for which a request about documents waits for a change: below CONTROL_TIMEOUT, so that who waits is told.
DOCUMENT_PATIENCE = 3.0
