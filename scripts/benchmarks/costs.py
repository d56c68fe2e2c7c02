"""What a byte costs on one core of this machine: the floor under every result."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable

import attrs
import torch

from shoal.learning import exact
from shoal.learning.digest import fingerprint, local_fingerprints
from shoal.learning.state import bytes_view
from shoal.transport.aead import SUITES, Aead, choose, local_ciphers

_RECORD = 256 << 10
_BYTES = 16 << 20


@attrs.frozen
class Costs:
    """Nanoseconds of one core per byte. ``wire``: TCP sending and receiving; ``cipher``: sealing and opening;
    ``reduce``: per byte of input; ``check``: looking for NaN; ``fingerprint``."""

    wire: float
    cipher: float
    reduce: float
    check: float
    fingerprint: float

    def reduce_floor(self, peers: int, size: int) -> float:
        """Seconds of a group reduce of ``size`` bytes among ``peers`` on this machine, were nothing else to do."""
        travels = 2 * (peers - 1) * size
        everywhere = peers * size
        # Every contribution is checked by its giver, and what travelled by its owner again.
        checked = everywhere + (peers - 1) * size
        work = travels * (self.wire + self.cipher) + checked * self.check
        work += everywhere * (self.reduce + self.fingerprint)
        return work * 1e-9 / min(peers, os.cpu_count() or 1)

    def link_floor(self, size: int) -> float:
        """Seconds for ``size`` bytes over one encrypted link, sender and receiver on a core each."""
        return size * (self.wire + self.cipher) * 1e-9 / min(2, os.cpu_count() or 1)


def measure() -> Costs:
    """Takes about a second. The best of several runs each: other work on the machine only ever adds."""
    cipher, _ = choose(local_ciphers(), local_ciphers())
    suite = SUITES[cipher]
    aead = Aead(suite, bytes(suite.key))
    buffer = bytearray(_RECORD + suite.tag)

    def both_ways(rounds: int = _BYTES // _RECORD) -> None:
        for counter in range(rounds):
            aead.seal(buffer, 0, _RECORD, counter, b"")
            aead.open(buffer, 0, len(buffer), counter, b"")

    parts = [torch.ones(_BYTES // 4 // 4) for _ in range(4)]
    out = torch.empty_like(parts[0])
    whole = torch.ones(_BYTES // 4)
    algorithm = local_fingerprints()[0]
    return Costs(
        wire=_best(_loopback),
        cipher=_best(both_ways),
        reduce=_best(lambda: exact.weighted_mean(parts, [1.0] * 4, out=out)),
        check=_best(lambda: exact.check_finite(whole)),
        fingerprint=_best(lambda: fingerprint(algorithm, bytes(32), bytes_view(whole))),
    )


def _best(act: Callable[[], object], times: int = 7) -> float:
    """CPU nanoseconds per byte of ``act``, which handles ``_BYTES``."""
    best = float("inf")
    for _ in range(times):
        began = time.process_time_ns()
        act()
        best = min(best, (time.process_time_ns() - began) / _BYTES)
    return best


def _loopback() -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    out = socket.create_connection(listening.getsockname())
    into, _ = listening.accept()
    with listening, out, into:
        out.setblocking(False)
        into.setblocking(False)
        data = memoryview(bytearray(_RECORD))
        buffer = bytearray(_RECORD)
        sent = got = 0
        while got < _BYTES:
            if sent < _BYTES:
                try:
                    sent += out.send(data[: _BYTES - sent])
                except BlockingIOError:
                    pass
            try:
                got += into.recv_into(buffer)
            except BlockingIOError:
                pass
