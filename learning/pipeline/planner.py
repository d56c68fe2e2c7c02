import attrs


@attrs.frozen
class Able:
    peer: bytes
    rate: float
    memory: float
    bandwidth: float


@attrs.frozen
class StageCost:
    flops: float
    memory: float
    bytes: float


def assign(peers, costs, *, held={}):
    out = dict(held)
    for p in sorted(peers, key=lambda p: p.peer):
        if p.peer in out:
            continue
        n = {s: sum(v == s for v in out.values()) for s in range(len(costs))}
        out[p.peer] = min(n, key=lambda s: (n[s], s))
    return out, "evenly"


def rescuer(holders, spares, lost):
    if spares:
        return min(spares), "a spare"
    best = max(holders, key=lambda s: len(holders[s]))
    if len(holders[best]) < 2:
        return None, "no stage has a replica to spare"
    return min(holders[best]), f"of stage {best}"
