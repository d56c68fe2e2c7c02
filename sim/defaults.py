"""Constants of the simulations, each with unit, reason and source."""

from __future__ import annotations

from collections.abc import Mapping

import attrs


@attrs.frozen
class TaskDefaults:
    """What `shoal sim` uses and claims for one task.

    ``at_least`` and ``above_isolated`` (of the main metric) are claimed from ``rounds`` rounds on, no sooner.
    """

    rounds: int
    at_least: float | None = None
    above_isolated: float | None = None
    ngram: bool = False


#: Rounds of a task of which nothing is known.
OTHER_TASK = TaskDefaults(rounds=12)

#: Measured on two cores, 8 peers; see README.
TASKS: Mapping[str, TaskDefaults] = {
    "digits": TaskDefaults(rounds=20, at_least=0.95, above_isolated=0.1),
    "digits-finetune": TaskDefaults(rounds=32, at_least=0.93),
    "stdlib": TaskDefaults(rounds=28, ngram=True),
    "stdlib-small": TaskDefaults(rounds=12, ngram=True),
}

#: Rounds of a strategy as multiples of the task's, where one round is one step instead of a period of them.
MORE_ROUNDS: Mapping[str, int] = {"allreduce": 8}

#: Rounds that a late peer must have left when it gets its ticket: 3 that it must commit, 4 to fetch the state in.
LATE_MARGIN = 7

#: Seconds without any word from any node after which a simulation counts as stuck. Longer than every deadline of a
#: round and than a training slice of the built-in tasks on a loaded machine.
STALL = 60.0

#: Seconds a node process has from its launch to its control socket. Eight torch imports on two cores take about 10.
BOOT = 60.0

#: Seconds between two looks whether a node's control socket is there.
POLL = 0.05

#: Seconds that a node has to end after SIGTERM before it is killed: its own promise is 2 s.
TERMINATE = 4.0

#: Lines of a node's log that are shown when it fails.
TAIL = 12

# The NAT lab

#: Seconds that one command of the lab's building (`ip`, `iptables-restore`) may take. They take milliseconds.
LAB_COMMAND = 20.0

#: Seconds that a router's miniupnpd has to listen for SSDP. Seen: 0.1.
LAB_DAEMON = 10.0

#: Most sites (customers of the lab's internet), so that each has an IPv4 /24 and an IPv6 /48 of its own.
LAB_SITES = 250

#: The port at which nodes of the lab listen, and at which its relay does.
LAB_PORT = 4001

#: Seconds that a node process has from its launch to its first answer. Seen: 0.5; ten at once on two cores: 5.
LAB_BOOT = 30.0

#: Seconds that an answer of a node process may take beyond what it was asked to spend.
LAB_ANSWER = 20.0

#: Seconds that a pair has to connect. Longer than every deadline of connecting, so that its own error is reported.
LAB_MEET = 40.0

#: Seconds for which a pair's link is watched for a better way that it must get: time for a try at once, one a second
#: later and one five seconds after that (IMPROVE_PAUSES of transport), each of which takes seconds.
LAB_WATCH = 15.0
#: Seconds for which one is watched that need not get a better one: an unexpected one is seen, too.
LAB_WATCH_RELAY = 5.0

#: Seconds between two looks at a link's way: the resolution of "time to the best way".
LAB_LOOK = 0.005

#: Bytes that a pair moves over its final way, for the rate; the most a node hands out.
LAB_BULK = 8 << 20
LAB_BULK_MAX = 1 << 28

#: Seconds that moving them may take: at the 20 Mbit/s of SCTP in Python it takes 4.
LAB_PULL = 30.0

#: Seconds that a node behind NAT has to find that out and to hold a reservation at the relay.
LAB_SETTLE = 20.0

#: Pairs of the matrix that are in the lab at once. Most of its ten seconds a pair waits, for a dial-back or a better
#: way; only one pair at a time connects.
LAB_PAIRS = 10

#: Seconds between two beats of a link that is watched while something happens to it, and until it happens.
LAB_BEAT = 0.1
LAB_CALM = 2.0

#: Seconds for which a link is watched after an address changed. The loss is noticed by the absence of a sign of life
#: (keepalive of 15 s, then its deadline), and then it takes a dial.
LAB_CHANGE = 45.0
#: Seconds of undisturbed service after which such a link counts as recovered.
LAB_AFTER = 2.0

#: Seconds for which a link is watched after its relay was killed, and how long no beat may be answered meanwhile: a
#: link that does not need the relay notices nothing.
LAB_KILLED = 10.0
LAB_UNDISTURBED = 1.0

#: Rounds that two nodes train through a relay, and seconds they have for it: two torch imports on two cores take 10.
LAB_ROUNDS = 8
LAB_TRAIN = 100.0

#: Packets that may be under way in one direction of a delayed link: 6 MB, more than any window here at 100 ms.
LAB_DELAY_QUEUE = 4096

#: Columns of the matrix where the output is no terminal.
LAB_WIDTH = 160


# Worlds of thousands of nodes (crowd.py, places.py, churn.py)

#: Seconds: side of the square in which centres of hosts lie, and spread of the hosts around theirs. See places.py for
#: what comes out.
MAP_SIDE, MAP_SPREAD = 0.11, 0.012

#: Seconds: median of the delay of an access line, one way, its spread (of the logarithm) and its greatest.
ACCESS_DELAY, ACCESS_SIGMA, ACCESS_MAX = 0.008, 0.7, 0.1

#: Bytes per second that machines send at, the least and the greatest: 1 to 100 Mbit/s.
UPLINKS = 1e6 / 8, 100e6 / 8

#: Shape of the Weibull distribution of sessions: the largest of the three that were measured, see churn.py.
SESSION_SHAPE = 0.59

#: Nodes that join in one virtual second, at most, and at most this part of those present: thousands that come within
#: a second would know only one another.
JOIN_RATE, JOIN_FRACTION = 100.0, 0.25

#: Nodes that a newcomer is told of. Whoever hears only of adversaries never gets out of their world: with a fifth of
#: the nodes hostile, one newcomer in 125 of those that are told of three.
CONTACTS = 3

#: Virtual seconds after the last join, until tables have filled by refreshes.
SETTLE = 45.0

#: Seconds to which the times of a crowd's events are rounded up: half a percent of a round trip.
CROWD_TICK = 0.001

#: Part of the departures that are silent (a machine off the network); the others close their connections (a process
#: that ends). Nobody measured it; half is the middle.
SILENT_DEPARTURES = 0.5

#: Seconds: the least mean session. A node needs about 5 to join, and with a shape of 0.59 a third of the sessions are
#: shorter than a fifth of the mean.
MIN_SESSION = 60.0

#: Departures after which what the departed left behind is collected: they, unlike the living, leave cycles.
COLLECT_EVERY = 1000

#: Adversaries around each victim's key: more than k, so that all k closest are theirs.
ECLIPSE_SIZE = 24

#: Lookups per virtual second, unless they are spread over a longer time.
LOOKUP_RATE = 20.0
