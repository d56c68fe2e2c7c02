"""Run in a process of its own: a gossip swarm of digits in virtual time; prints one JSON object.

Arguments: nodes, rounds, inner steps, seed.
"""

from __future__ import annotations

import hashlib
import json
import resource
import sys

from shoal.node.node import Founding
from shoal.sim.world import Scenario, simulate


def main(nodes: int, rounds: int, steps: int, seed: int) -> None:
    founding = Founding(
        strategy="noloco", strategy_args=(("inner_steps", steps),), group=8, min_peers=nodes, rounds=rounds, seed=1
    )
    world = simulate(Scenario(nodes=nodes, founding=founding, seed=seed))
    weights = hashlib.blake2b(digest_size=16)
    for member in world.live():
        weights.update(member.run.weights().numpy().tobytes())
    result = {
        "weights": weights.hexdigest(),
        "trace": world.trace.hexdigest(),
        "events": world.trace.events,
        "rounds": sorted({member.run.round for member in world.live()}),
        "groups": sorted({len(report.members) for member in world.live() for report in member.run.reports}),
        "retries": sum(report.retries for member in world.live() for report in member.run.reports),
        "losses": [member.run.reports[-1].loss for member in world.live()],
        "user_s": resource.getrusage(resource.RUSAGE_SELF).ru_utime,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:5]))
