"""libdatachannel (libjuice, usrsctp, OpenSSL) through its C interface, two processes on loopback: one line of JSON.

Finds the library in the wheel of pylibdatachannel or on the system. Usage: datachannel.py MB ECHOES BYTES
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.util
import json
import os
import queue
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

MESSAGE = 64 << 10
HIGH = 1 << 20


class Configuration(ctypes.Structure):
    """``rtcConfiguration`` of rtc/rtc.h, 0.22."""

    _fields_ = (
        ("servers", ctypes.c_void_p),
        ("server_count", ctypes.c_int),
        ("proxy", ctypes.c_char_p),
        ("bind", ctypes.c_char_p),
        ("certificate", ctypes.c_int),
        ("policy", ctypes.c_int),
        ("tcp", ctypes.c_bool),
        ("mux", ctypes.c_bool),
        ("no_negotiation", ctypes.c_bool),
        ("media", ctypes.c_bool),
        ("port_begin", ctypes.c_uint16),
        ("port_end", ctypes.c_uint16),
        ("mtu", ctypes.c_int),
        ("max_message", ctypes.c_int),
    )


STATE = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_int, ctypes.c_void_p)
MESSAGE_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.POINTER(ctypes.c_char), ctypes.c_int, ctypes.c_void_p)
EVENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p)


def library() -> ctypes.CDLL:
    wheel = importlib.util.find_spec("pylibdatachannel")
    if wheel is not None and wheel.origin is not None:
        folder = Path(wheel.origin).parent.parent / "pylibdatachannel.libs"
        for name in ("libcrypto", "libssl"):
            for found in folder.glob(f"{name}*"):
                ctypes.CDLL(str(found), mode=ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(str(next(folder.glob("libdatachannel*"))))
    found_name = ctypes.util.find_library("datachannel")
    if found_name is None:
        sys.exit("no libdatachannel here")
    return ctypes.CDLL(found_name)


class End:
    """One peer connection with one channel."""

    def __init__(self, rtc: ctypes.CDLL) -> None:
        self.rtc = rtc
        self.messages: queue.Queue[int] = queue.Queue()
        self.gathered, self.opened, self.low = threading.Event(), threading.Event(), threading.Event()
        self.channels: queue.Queue[int] = queue.Queue()
        rtc.rtcInitLogger(1, None)
        self.connection = rtc.rtcCreatePeerConnection(
            ctypes.byref(Configuration(bind=b"127.0.0.1", max_message=256 << 10))
        )
        self.keep = [
            STATE(lambda _, state, __: self.gathered.set() if state == 2 else None),
            STATE(lambda _, channel, __: self.channels.put(channel)),
        ]
        rtc.rtcSetGatheringStateChangeCallback(self.connection, self.keep[0])
        rtc.rtcSetDataChannelCallback(self.connection, self.keep[1])

    def take(self, channel: int, on_message: Any) -> None:
        self.keep += [
            MESSAGE_CALLBACK(lambda _, __, size, ___: on_message(size)),
            EVENT(lambda *_: self.opened.set()),
            EVENT(lambda *_: self.low.set()),
        ]
        self.rtc.rtcSetMessageCallback(channel, self.keep[-3])
        self.rtc.rtcSetOpenCallback(channel, self.keep[-2])
        self.rtc.rtcSetBufferedAmountLowCallback(channel, self.keep[-1])
        self.rtc.rtcSetBufferedAmountLowThreshold(channel, HIGH // 2)

    def description(self) -> str:
        if not self.gathered.wait(10):
            sys.exit("nothing gathered")
        buffer = ctypes.create_string_buffer(1 << 16)
        self.rtc.rtcGetLocalDescription(self.connection, buffer, len(buffer))
        return buffer.value.decode()


def sender(rtc: ctypes.CDLL, line: Any, mb: int, echoes: int, size: int) -> dict[str, float]:
    began = time.perf_counter()
    end = End(rtc)
    channel = rtc.rtcCreateDataChannel(end.connection, b"bench")
    end.take(channel, end.messages.put)
    print(json.dumps(end.description()), file=line, flush=True)
    rtc.rtcSetRemoteDescription(end.connection, json.loads(line.readline()).encode(), b"answer")
    if not end.opened.wait(10):
        sys.exit("the channel did not open")
    opened = time.perf_counter() - began
    times = []
    for _ in range(echoes):
        at = time.perf_counter()
        rtc.rtcSendMessage(channel, bytes(size), size)
        end.messages.get(timeout=10)
        times.append(time.perf_counter() - at)
    data, total = os.urandom(MESSAGE), mb << 20
    cpu, at = time.process_time(), time.perf_counter()
    for _ in range(total // MESSAGE):
        while rtc.rtcGetBufferedAmount(channel) > HIGH:
            end.low.clear()
            end.low.wait(0.05)
        rtc.rtcSendMessage(channel, data, MESSAGE)
    end.messages.get(timeout=60)
    seconds = time.perf_counter() - at
    theirs = json.loads(line.readline())
    return {
        "mb_s": total / seconds / 1e6,
        "echo_s": sorted(times)[len(times) // 2],
        "open_s": opened,
        "sender_cpu_s_per_mb": (time.process_time() - cpu) / (total / 1e6),
        "receiver_cpu_s_per_mb": theirs / (total / 1e6),
    }


def receiver(rtc: ctypes.CDLL, line: Any, mb: int, size: int) -> None:
    end = End(rtc)
    rtc.rtcSetRemoteDescription(end.connection, json.loads(line.readline()).encode(), b"offer")
    print(json.dumps(end.description()), file=line, flush=True)
    channel = end.channels.get(timeout=10)
    got, cpu, done = 0, 0.0, threading.Event()

    def on_message(length: int) -> None:
        nonlocal got, cpu
        if length == size:
            rtc.rtcSendMessage(channel, bytes(size), size)
            cpu = time.process_time()
            return
        got += length
        if got == mb << 20:
            rtc.rtcSendMessage(channel, b"done", 4)
            done.set()

    end.take(channel, on_message)
    done.wait(60)
    print(json.dumps(time.process_time() - cpu), file=line, flush=True)
    line.readline()


def main() -> None:
    mb, echoes, size = (int(word) for word in sys.argv[1:4])
    ours, theirs = socket.socketpair()
    child = os.fork()
    line = (theirs if child == 0 else ours).makefile("rw")
    (ours if child == 0 else theirs).close()
    rtc = library()
    if child == 0:
        receiver(rtc, line, mb, size)
        os._exit(0)
    result = sender(rtc, line, mb, echoes, size)
    print(json.dumps(result), flush=True)
    print("end", file=line, flush=True)
    os.waitpid(child, 0)
    os._exit(0)  # the library's threads are still there


if __name__ == "__main__":
    main()
