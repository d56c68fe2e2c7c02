"""``bench.py webrtc``: a byte stream over a WebRTC data channel: bulk, a small echo, processor time; beside others."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import trio

from shoal.transport.address import Address
from shoal.transport.host import RealHost
from shoal.transport.network import ByteStream
from shoal.transport.webrtc import WebRtcAnswerer, WebRtcStream, offer
from shoal.transport.webrtc_signal import IceServers

from .report import Row, machine, show, write

ECHO = 1024
LOOPBACK = ("127.0.0.1",)
SYSTEMS = ("shoal", "aiortc as it comes", "libdatachannel", "tcp")
NAMES = {
    "shoal": "shoal (aiortc, batched)",
    "aiortc as it comes": "aiortc as it comes",
    "libdatachannel": "libdatachannel (C++)",
    "tcp": "trio TCP",
}


async def run(options: argparse.Namespace) -> None:
    rows = {name: Row("webrtc", {"what": "bulk"}, NAMES[name], "mb_s") for name in SYSTEMS}
    missing = ""
    for turn in range(options.runs + 1):
        for name, row in rows.items():
            if name == "libdatachannel":
                if missing:
                    continue
                result = await _libdatachannel(options)
                missing = result.get("missing", "")
                if missing:
                    continue
            else:
                result = await _ours(name, options)
            if turn:
                row.runs.append(result["mb_s"])
                for key in ("echo_s", "open_s", "sender_cpu_s_per_mb", "receiver_cpu_s_per_mb"):
                    row.extra.setdefault(key, []).append(result[key])
    measured = [row for row in rows.values() if row.runs]
    lines = [
        (
            row.system,
            f"{row.median:.1f}",
            f"{min(row.runs):.1f}",
            f"{max(row.runs):.1f}",
            *(
                f"{statistics.median(row.extra[key]) * 1e3:.2f}"
                for key in ("echo_s", "sender_cpu_s_per_mb", "receiver_cpu_s_per_mb")
            ),
            f"{statistics.median(row.extra['open_s']):.2f}",
        )
        for row in measured
    ]
    title = "a byte stream over a data channel on loopback"
    head = ("system", "MB/s", "min", "max", "echo p50, ms", "CPU sender, ms/MB", "receiver, ms/MB", "opens in, s")
    notes = [
        f"machine: {machine()['cores']} cores, load {machine()['load']}; {options.runs} runs in turns",
        "CPU: of the processes that speak the protocol; of trio TCP, of both ends together in one process.",
    ]
    show(title, head, lines, notes)
    if missing:
        print(f"{NAMES['libdatachannel']}: left out: {missing}")
    write(measured, options.json)


def _cpu(pid: int) -> float:
    """Seconds of processor time a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def _ours(name: str, options: argparse.Namespace) -> dict[str, Any]:
    began = time.perf_counter()
    if name == "tcp":
        return await _tcp(options)
    here, there = RealHost(), RealHost()
    arrived, arrivals = trio.open_memory_channel[ByteStream](1)
    plain = name != "shoal"
    answerer = WebRtcAnswerer(there, arrived.send, IceServers, interfaces=LOOPBACK, plain=plain)
    async with trio.open_nursery() as nursery:
        await nursery.start(answerer.run)

        async def ask(kind: str, body: bytes) -> bytes:
            return await answerer.answer(body)

        async with (
            await offer(here, ask, IceServers(), interfaces=LOOPBACK, plain=plain) as ours,
            await arrivals.receive() as theirs,
        ):
            opened = time.perf_counter() - began
            assert isinstance(theirs, WebRtcStream)
            result = await _measure(ours, theirs, ours.engine.pid, theirs.engine.pid, options)
        nursery.cancel_scope.cancel()
    return {**result, "open_s": opened}


async def _tcp(options: argparse.Namespace) -> dict[str, Any]:
    network = RealHost().network
    began = time.perf_counter()
    async with (
        await network.listen(Address("tcp", "127.0.0.1", 0)) as listener,
        await network.dial(listener.address) as ours,
        await listener.accept() as theirs,
    ):
        opened = time.perf_counter() - began
        return {**await _measure(ours, theirs, os.getpid(), os.getpid(), options), "open_s": opened}


async def _measure(
    ours: ByteStream, theirs: ByteStream, our_pid: int, their_pid: int, options: argparse.Namespace
) -> dict[str, float]:
    times: list[float] = []
    async with trio.open_nursery() as nursery:

        async def echo() -> None:
            for _ in range(options.echoes):
                await theirs.send_all(await _exactly(theirs, ECHO))

        nursery.start_soon(echo)
        for _ in range(options.echoes):
            began = time.perf_counter()
            await ours.send_all(bytes(ECHO))
            await _exactly(ours, ECHO)
            times.append(time.perf_counter() - began)
    size = options.mb << 20
    before = _cpu(our_pid), _cpu(their_pid)
    began = time.perf_counter()
    async with trio.open_nursery() as nursery:

        async def send() -> None:
            piece = os.urandom(1 << 20)
            for _ in range(options.mb):
                await ours.send_all(piece)

        nursery.start_soon(send)
        left = size
        while left:
            data = await theirs.receive_some(min(left, 1 << 18))
            assert data, "the stream ended early"
            left -= len(data)
    seconds = time.perf_counter() - began
    return {
        "mb_s": size / seconds / 1e6,
        "echo_s": statistics.median(times),
        "sender_cpu_s_per_mb": (_cpu(our_pid) - before[0]) / (size / 1e6),
        "receiver_cpu_s_per_mb": (_cpu(their_pid) - before[1]) / (size / 1e6),
    }


async def _exactly(stream: ByteStream, size: int) -> bytes:
    got = bytearray()
    while len(got) < size:
        data = await stream.receive_some(size - len(got))
        assert data, "the stream ended early"
        got += data
    return bytes(got)


async def _libdatachannel(options: argparse.Namespace) -> dict[str, Any]:
    script = Path(__file__).with_name("datachannel.py")
    command = [options.peer_python, str(script), str(options.mb), str(options.echoes), str(ECHO)]
    done = await trio.run_process(command, capture_stdout=True, stderr=subprocess.DEVNULL, check=False)
    if done.returncode:
        return {"missing": f"{options.peer_python} cannot run it (pip install pylibdatachannel)"}
    result: dict[str, Any] = json.loads(done.stdout)
    return result


if __name__ == "__main__":
    sys.exit("run bench.py webrtc")
