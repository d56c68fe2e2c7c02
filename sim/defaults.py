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
