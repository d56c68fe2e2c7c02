"""The control socket: private, strict, never in the way of the node."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from shoal.learning.events import Event, RoundReport, RunStatus, Standing
from shoal.node import control, defaults, local_socket
from shoal.node.control import (
    ControlClient,
    ControlServer,
    Done,
    Ended,
    EventFrame,
    EventLog,
    Export,
    Framer,
    GetPeers,
    GetStatus,
    NodeStatus,
    PeerInfo,
    PeerList,
    RoundFrame,
    Stop,
    Watcher,
    encode,
)
from shoal.node.datadir import DataDir
from shoal.transport.errors import ConfigError, DecodeError

RUN = RunStatus(
    "ab", "digits", "diloco", "available", 3, "scatter", "waiting for a", "a", ("a", "b"), 64, 128, 0.5, "accuracy",
    None, "d1", 0, False,
)  # fmt: skip
STATUS = NodeStatus(7, "/d", "peer", "shoal1x", 1.5, ("tcp://127.0.0.1:1",), "all", 2, 10, 20, 3, RUN)
PEERS = PeerList(
    (PeerInfo("a", "tcp://127.0.0.1:2", "out", "aegis256", 0.25, 1, 2, True),),
    (Standing("a", 20, 20, 17, 0.85, 17, 0.93, 0.9, 5, 1, 2, 3), Standing("b")),
)
REPORT = RoundReport(3, 2.0, 0.1, ("a",), 0, (), (), "all came", 64, 0.5, None, "d1")
EVENT = Event(0.5, 3, "scatter", "begin")


async def answer(request: Any) -> Any:
    match request:
        case GetStatus():
            return STATUS
        case GetPeers():
            return PEERS
        case Stop():
            return Done("bye")
        case Export(path):
            raise ConfigError(f"cannot write {path}")
        case _:
            raise AssertionError(request)


@asynccontextmanager
async def serving(path: Path, events: EventLog | None = None) -> AsyncIterator[DataDir]:
    data = DataDir(path)
    data.create()
    server = ControlServer(data, answer, events or EventLog())
    async with trio.open_nursery() as nursery:
        await nursery.start(lambda task_status: server.run(task_status=task_status))
        yield data
        nursery.cancel_scope.cancel()


@pytest.mark.real
async def test_status_peers_and_stop_are_answered(tmp_path: Path) -> None:
    async with serving(tmp_path) as data:
        client = ControlClient(data)
        assert await trio.to_thread.run_sync(client.status) == STATUS
        assert await trio.to_thread.run_sync(client.peers) == PEERS
        assert await trio.to_thread.run_sync(client.stop) == Done("bye")


@pytest.mark.real
async def test_a_refusal_reaches_the_caller_as_text(tmp_path: Path) -> None:
    async with serving(tmp_path) as data:
        with pytest.raises(ConfigError, match="^cannot write /x$"):
            await trio.to_thread.run_sync(ControlClient(data).export, "/x")


@pytest.mark.real
async def test_the_socket_is_for_its_owner_only_and_gone_afterwards(tmp_path: Path) -> None:
    async with serving(tmp_path) as data:
        path = Path(ControlClient(data).locator().removeprefix("unix:"))
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not path.exists()
    assert not data.control_path.exists()


@pytest.mark.real
async def test_a_data_directory_with_a_very_long_path_still_gets_a_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    runtime = Path(tempfile.mkdtemp())  # pytest's own folders are long themselves
    request.addfinalizer(lambda: shutil.rmtree(runtime))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    async with serving(tmp_path / ("long" * 30)) as data:
        assert len(os.fsencode(ControlClient(data).locator())) < defaults.MAX_SOCKET_PATH + len("unix:")
        assert await trio.to_thread.run_sync(ControlClient(data).status) == STATUS
    folder = runtime / f"shoal-{os.getuid()}"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o755)
    with pytest.raises(ConfigError, match="is not a folder of yours with mode 0700"):
        local_socket.locator_for(tmp_path / ("long" * 30))


def test_without_a_node_the_client_says_how_to_start_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        ControlClient(DataDir(tmp_path)).status()
    assert "no node is running here" in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "shoal start TASK" in str(caught.value)


def test_the_socket_of_a_killed_node_counts_as_no_node(tmp_path: Path) -> None:
    data = DataDir(tmp_path)
    locator = local_socket.locator_for(tmp_path)
    with socket.socket(socket.AF_UNIX) as raw:
        raw.bind(locator.removeprefix("unix:"))
    data.control_path.write_text(locator)
    with pytest.raises(ConfigError, match="no node is running here"):
        ControlClient(data).status()


def test_a_suspended_node_is_named_with_its_pid(tmp_path: Path) -> None:
    data = DataDir(tmp_path)
    locator = local_socket.locator_for(tmp_path)
    with socket.socket(socket.AF_UNIX) as raw, data.locked():
        raw.bind(locator.removeprefix("unix:"))
        raw.listen()
        data.control_path.write_text(locator)
        with pytest.raises(ConfigError, match=rf"\(pid {os.getpid()}, .*did not answer within 0.1 s"):
            ControlClient(data, timeout=0.1).status()


@pytest.mark.real
async def test_a_late_watcher_sees_everything_from_the_start_and_the_end(tmp_path: Path) -> None:
    events = EventLog()
    events.append(EventFrame(EVENT))
    async with serving(tmp_path, events) as data:
        watcher = await Watcher.open(data)
        assert await watcher.receive() == EventFrame(EVENT)
        events.append(RoundFrame(REPORT, 64, 5, 6))
        assert await watcher.receive() == RoundFrame(REPORT, 64, 5, 6)
        events.append(Ended("finished", "all rounds done", STATUS))
        with trio.fail_after(2):
            await events.drained()
        assert await watcher.receive() == Ended("finished", "all rounds done", STATUS)
        assert await watcher.receive() is None
        await watcher.aclose()


@pytest.mark.real
@pytest.mark.parametrize("how", [trio.BrokenResourceError, KeyboardInterrupt])
async def test_a_watcher_of_a_node_that_is_killed_just_then_leaves_no_socket(
    how: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    async def broken(self: trio.SocketStream, data: bytes) -> None:
        opened.append(self.socket)
        raise how

    async with serving(tmp_path) as data:
        monkeypatch.setattr(trio.SocketStream, "send_all", broken)
        with pytest.raises(ConfigError if how is trio.BrokenResourceError else how):
            await Watcher.open(data)
    assert [socket.fileno() for socket in opened] == [-1]


@pytest.mark.real
async def test_garbage_ends_that_connection_only(tmp_path: Path) -> None:
    async with serving(tmp_path) as data:
        for garbage in (b"GET / HTTP/1.1\r\n\r\n", b"\xff\xff\xff\xff", encode(Done())):
            async with await local_socket.open_stream(ControlClient(data).locator()) as stream:
                await stream.send_all(garbage)
                assert await stream.receive_some(1) == b""
        assert await trio.to_thread.run_sync(ControlClient(data).status) == STATUS


@pytest.mark.real
async def test_a_connection_that_says_nothing_is_closed_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(defaults, "CONTROL_TIMEOUT", 0.1)
    async with serving(tmp_path) as data, await local_socket.open_stream(ControlClient(data).locator()) as stream:
        assert await stream.receive_some(1) == b""


async def test_a_watcher_that_falls_behind_loses_the_oldest_frames_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "EVENT_BUFFER", 3)
    events = EventLog()
    for number in range(10):
        events.append(EventFrame(Event(0.0, number, "run", "begin")))
    events.append(Ended("left", "stopped", STATUS))
    got: list[bytes] = []

    async def send(data: bytes) -> None:
        got.append(data)

    await events.follow(send)
    frames = list(Framer().feed(b"".join(got)))
    assert [f.event.round for f in frames[:-1]] == [8, 9]
    assert isinstance(frames[-1], Ended)


def test_frames_split_anywhere_are_put_together_again() -> None:
    framer = Framer()
    data = encode(STATUS) + encode(PEERS)
    got = [message for i in range(len(data)) for message in framer.feed(data[i : i + 1])]
    assert got == [STATUS, PEERS]


def test_a_frame_that_announces_4_gb_is_refused_before_it_is_read() -> None:
    with pytest.raises(DecodeError, match="4294967295 bytes, at most"):
        list(Framer().feed(b"\xff\xff\xff\xff"))


def test_nan_and_infinity_become_nothing() -> None:
    assert control.finite(float("nan")) is None
    assert control.finite(float("inf")) is None
    assert control.finite(0.0) == 0.0
    assert control.finite(None) is None
