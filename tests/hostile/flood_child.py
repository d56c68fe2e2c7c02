"""Makes as many connections as it can: ``flood_child.py PORT SECONDS KIND HELD``; prints how many, as JSON.

Non-blocking connects without waiting for any; ``HELD`` sockets stay open at once, the oldest is reset. KIND: ``silent``
says nothing, ``garbage`` sends some bytes, ``hello`` begins a handshake as it should.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import struct
import sys
import time
from collections import deque

from shoal.transport.identity import Identity
from shoal.transport.secure import SecureChannel


def main(port: int, seconds: float, kind: str, held: int) -> None:
    channel = SecureChannel(initiator=True, identity=Identity(os.urandom(32)), entropy=os.urandom, wall=time.time())
    words = {"silent": b"", "garbage": b"\xf5" * 40, "hello": channel.start()}[kind]
    open_now: deque[socket.socket] = deque()
    attempts = 0
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        for _ in range(20):
            attempt = socket.socket()
            attempt.setblocking(False)
            # Closed with a reset: no port stays taken for a minute.
            attempt.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            try:
                failed = attempt.connect_ex(("127.0.0.1", port))
                attempts += 1
                if not failed and words:
                    attempt.send(words)
                elif failed not in (0, errno.EINPROGRESS):
                    attempt.close()
                    continue
            except OSError:
                pass
            open_now.append(attempt)
            if len(open_now) > held:
                open_now.popleft().close()
    took = time.monotonic() - began
    sys.stdout.write(json.dumps({"attempts": attempts, "seconds": took, "rate": attempts / took}) + "\n")
    for each in open_now:
        each.close()


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
