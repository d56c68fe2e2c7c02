"""How many connections strangers may make: token buckets by source address, and who gives way among the half-open ones.

Sans-IO: told ``now``. An admission costs 1 to 6 µs, so that it can be asked for every connection before a task exists.

A source is one IPv4 address or one IPv6 /64 (a customer gets at least that much; within it addresses are free). Each
has a bucket of its own. All together draw from one bucket more, as a swarm of sources costs what they cost together.
That bucket alone would let an attacker with many addresses keep everybody else out, hence two more: one for the sources
that were of use to us (:meth:`Throttle.vouch`), one for networks (IPv4 /24, IPv6 /48) we have not admitted lately: a
newcomer needs one connection, an attacker with it gets one per network and minute.

What a source that is refused asks for leaves no trace here: memory and eviction are bounded by what is admitted. A
source that finds the table full takes over the bucket of the one that was silent longest, as it stands: whoever comes
from ever new addresses gains nothing by pushing out used-up buckets.
"""

from __future__ import annotations

import ipaddress
from functools import lru_cache

import attrs

from . import defaults


@attrs.define(eq=False)
class TokenBucket:
    """``rate`` tokens per second, ``burst`` at most; begins full. ``updated``: now, in seconds."""

    rate: float
    burst: float
    updated: float
    tokens: float = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.tokens = self.burst

    def holds(self, now: float) -> bool:
        """Is there a token? Does not use it."""
        self.tokens = min(self.burst, self.tokens + max(0.0, now - self.updated) * self.rate)
        self.updated = now
        return self.tokens >= 1

    def take(self, now: float) -> bool:
        """Use one token; False when there is none."""
        if not self.holds(now):
            return False
        self.tokens -= 1
        return True


@lru_cache(maxsize=1024)
def source_of(host: str) -> tuple[str, str]:
    """(source, network) of ``host``: an IP literal, or the name of a host in a memory world."""
    if ":" not in host:
        head, _, last = host.rpartition(".")
        return host, f"{head}.0/24" if last.isdecimal() else host
    address = ipaddress.IPv6Address(host)
    if address.ipv4_mapped is not None:
        return source_of(str(address.ipv4_mapped))
    bits = int(address)
    return f"{bits >> 64:x}/64", f"{bits >> 80:x}/48"


class Throttle:
    """Decides for each incoming connection whether it gets a handshake. One per node."""

    def __init__(self, now: float) -> None:
        self._sources: dict[str, TokenBucket] = {}  # least recently admitted first
        self._networks: dict[str, float] = {}  # when one of them was admitted last, oldest first
        self._vouched: dict[str, None] = {}  # least recently vouched for first
        self._strangers = TokenBucket(defaults.STRANGER_CONNECTIONS, defaults.STRANGER_CONNECTIONS_BURST, now)
        self._newcomers = TokenBucket(defaults.NEWCOMER_CONNECTIONS, defaults.NEWCOMER_CONNECTIONS_BURST, now)
        self._known = TokenBucket(defaults.STRANGER_CONNECTIONS, defaults.STRANGER_CONNECTIONS_BURST, now)

    def __len__(self) -> int:
        """Sources remembered now."""
        return len(self._sources)

    def admit(self, host: str, now: float) -> tuple[bool, str]:
        """May one more connection come in from ``host``? Returns (decision, reason)."""
        source, network = source_of(host)
        bucket = self._sources.get(source)
        if bucket is not None and not bucket.holds(now):
            return False, f"more than {bucket.rate:.0f} connections per second from {source}"
        if source in self._vouched:
            common, reason = self._known, "its address has been of use to us"
        elif self._strangers.holds(now):
            common, reason = self._strangers, "within limits"
        else:
            common, reason = self._newcomers, "its network is new to us"
            last = self._networks.get(network)
            if last is not None and now - last < defaults.NEWCOMER_AFTER:
                return False, f"more than {self._strangers.rate:.0f} connections per second from all strangers"
        if not common.take(now):
            return False, f"more than {common.rate:.0f} connections per second in all ({reason})"
        self._remember(source, network, now)
        return True, reason

    def vouch(self, host: str) -> None:
        """A peer at ``host`` answered calls of ours: a flood of strangers must not keep it out from now on."""
        source, _ = source_of(host)
        self._vouched.pop(source, None)
        self._vouched[source] = None
        if len(self._vouched) > defaults.MAX_VOUCHED:
            del self._vouched[next(iter(self._vouched))]

    def _remember(self, source: str, network: str, now: float) -> None:
        """One connection of ``source`` is admitted."""
        bucket = self._sources.pop(source, None)
        if bucket is None:
            bucket = TokenBucket(defaults.SOURCE_CONNECTIONS, defaults.SOURCE_CONNECTIONS_BURST, now)
            if len(self._sources) >= defaults.MAX_SOURCES:
                bucket = self._sources.pop(next(iter(self._sources)))
        bucket.holds(now)
        bucket.tokens = max(0.0, bucket.tokens - 1)
        self._sources[source] = bucket
        self._networks.pop(network, None)
        self._networks[network] = now
        if len(self._networks) > defaults.MAX_SOURCES:
            del self._networks[next(iter(self._networks))]


class HalfOpen:
    """Connections whose handshake is not over yet: when there are too many, the source with most of them loses one."""

    def __init__(self, limit: int = defaults.MAX_HALF_OPEN) -> None:
        self._limit = limit
        self._by_source: dict[str, dict[int, None]] = {}
        self._source: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._source)

    def add(self, number: int, host: str) -> int | None:
        """``number`` begins; returns the number that must give way for it, which is then forgotten here.

        That is the oldest of the source that holds most, itself included: a crowd from one source only ever pushes out
        its own, and one that is alone at its source stays as long as anybody holds two.
        """
        source, _ = source_of(host)
        self._source[number] = source
        self._by_source.setdefault(source, {})[number] = None
        if len(self._source) <= self._limit:
            return None
        most = max(self._by_source.values(), key=len)
        victim = next(iter(most))
        self.remove(victim)
        return victim

    def remove(self, number: int) -> None:
        """``number`` is over, however it ended. A number that is unknown, or gave way, is no error."""
        source = self._source.pop(number, None)
        if source is None:
            return
        of_source = self._by_source[source]
        del of_source[number]
        if not of_source:
            del self._by_source[source]
