"""`shoal doc show|watch`: tables for people, JSON for programs, from a running node and from what it left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pycrdt
import pytest

from shoal.dht.documents.replica import Replica
from shoal.dht.documents.store import DocumentStore
from shoal.learning.rundocs_content import run_documents
from shoal.node.cli import OK, USAGE, main
from shoal.node.datadir import DataDir, NodeRecord
from shoal.node.doc_commands import _clock, bars
from shoal.node.doc_messages import from_json, to_json
from shoal.node.ticket import Ticket
from shoal.transport.errors import DecodeError
from shoal.transport.identity import Identity

ALICE, BOB = (Identity(bytes([number]) * 32) for number in (1, 2))
RUN = b"\7" * 32


def written(store: DocumentStore, name: str, author: Identity, root: str, values: dict[str, Any]) -> None:
    """What a node of ``author`` would have stored of a document."""
    spec, wall = run_documents(RUN, ALICE.peer_id)[name], time.time()
    replica = Replica(spec, lambda peer: True)
    replica.begin(author.peer_id, store.reserve(spec.id, author.peer_id, wall))
    draft = replica.write(lambda doc: doc.get(root, type=pycrdt.Map).update(values), author, wall)
    assert draft is not None
    store.append([draft], author.peer_id)


@pytest.fixture
def left(tmp_path: Path) -> Path:
    """The data directory of a node that has run and runs no more."""
    data = DataDir(tmp_path / "node")
    data.create()
    Identity.load_or_create(data.key_path, lambda size: bytes([1]) * size)
    data.write_record(NodeRecord(Ticket(RUN, ALICE.peer_id, (), None).encode(), "digits", "", 0, True))
    store = DocumentStore(data.documents_path)
    now = time.time()
    entry = {"joined": now - 60, "seen": now - 3, "beat": 10.0, "round": 7, "version": "0.1", "state": "training"}
    written(store, "roster", ALICE, "entry", entry)
    written(store, "roster", BOB, "entry", entry | {"seen": now - 600, "round": 3, "version": "\x1b[2J evil"})
    commit = {
        "round": 7, "branch": 0, "at": now - 5, "digest": "ab" * 8, "members": [ALICE.peer_id.text, BOB.peer_id.text],
        "count": 2, "samples": 1280, "total": 8960, "certificate": "cd" * 8,
    }  # fmt: skip
    written(store, "commits", BOB, "commits", {"7.abab": commit})
    points = {str(round): [now, 1.0 / round, 0.5 + round / 100, 640] for round in range(1, 8)}
    written(store, "metrics", ALICE, "points", points)
    written(store, "bans", BOB, "bans", {ALICE.peer_id.text: b"no proof"})
    store.close()
    return data.path


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["doc", *arguments]) == OK
    return capsys.readouterr().out


def test_what_a_node_left_is_listed(left: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "show", "--data-dir", str(left))
    assert "no node is running" in text
    for name in ("spec", "roster", "commits", "metrics", "bans"):
        assert f"\n{name} " in text
    row = next(line.split() for line in text.splitlines() if line.startswith("roster"))
    assert row[1:3] == ["2", "2"]


def test_the_roster_tells_who_is_alive_and_no_author_can_play_with_the_terminal(
    left: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = output(capsys, "show", "roster", "--data-dir", str(left))
    alice = next(line for line in text.splitlines() if line.startswith(ALICE.peer_id.short))
    bob = next(line for line in text.splitlines() if line.startswith(BOB.peer_id.short))
    assert "(here)" in alice
    assert " yes " in alice
    assert "no: silent for 6" in bob
    assert "\x1b" not in text


def test_commits_metrics_bans_and_spec_are_tables(left: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commits = output(capsys, "show", "commits", "--data-dir", str(left))
    assert "1,280" in commits
    assert "abababababababab" in commits
    assert f"2: {ALICE.peer_id.short} {BOB.peer_id.short}" in commits
    metrics = output(capsys, "show", "metrics", "--data-dir", str(left))
    assert "1-7" in metrics
    assert "0.1429" in metrics
    assert "0.5700" in metrics
    assert "nobody is banned" in output(capsys, "show", "bans", "--data-dir", str(left)), "without a proof"
    assert "has not written it down" in output(capsys, "show", "spec", "--data-dir", str(left))


def test_programs_get_json(left: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doc", "show", "bans", "--json", "--data-dir", str(left)]) == OK
    found = json.loads(capsys.readouterr().out)
    assert found["name"] == "bans"
    assert found["content"] == {BOB.peer_id.text: {"bans": {ALICE.peer_id.text: {"hex": b"no proof".hex()}}}}
    assert main(["doc", "show", "--json", "--data-dir", str(left)]) == OK
    listed = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in listed["documents"]] == ["spec", "roster", "commits", "metrics", "bans"]


@pytest.mark.parametrize("action", ["show", "watch"])
def test_an_unknown_document_is_named_and_the_known_ones_listed(
    action: str, left: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doc", action, "rooster", "--data-dir", str(left)]) == USAGE
    error = capsys.readouterr().err
    assert "'rooster'" in error
    assert "roster, commits" in error


def test_without_any_run_it_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doc", "show", "--data-dir", str(tmp_path)]) == USAGE
    assert "shoal start TASK" in capsys.readouterr().err
    assert main(["doc", "watch", "--data-dir", str(tmp_path)]) == USAGE
    assert "no node is running here" in capsys.readouterr().err


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["doc"], ["doc", "show"], ["doc", "watch"]):
        with pytest.raises(SystemExit) as caught:
            main([*arguments, "--help"])
        assert caught.value.code == OK
        text = capsys.readouterr().out
        assert "examples:" in text
        assert f"usage: shoal {' '.join(arguments)}" in text


def test_contents_travel_as_json_and_the_largest_authors_give_way() -> None:
    content = {
        ALICE.peer_id: {"a": {"x": b"\0\xff", "y": [1, None, True, {"z": "\x1b"}]}},
        BOB.peer_id: {"b": {"text": "x" * 1000}},
    }
    text, omitted = to_json(content, 10_000)
    assert (from_json(text), omitted) == (content, 0)
    text, omitted = to_json(content, 500)
    assert (from_json(text), omitted) == ({ALICE.peer_id: content[ALICE.peer_id]}, 1)
    assert from_json(to_json({}, 0)[0]) == {}


def test_what_one_author_writes_hides_no_other() -> None:
    """A text called "hex" beside nothing else looks like bytes; a time may be beyond all calendars."""
    content: dict[Any, Any] = {ALICE.peer_id: {"entry": {"x": 1}}, BOB.peer_id: {"hex": "aa"}}
    assert from_json(to_json(content, 10_000)[0])[ALICE.peer_id] == content[ALICE.peer_id]
    assert [_clock(at) for at in (1e18, -1e300)] == ["--:--:--"] * 2


@pytest.mark.parametrize("text", ["", "[]", "{", '{"x": {}}', "1", f'{{"{ALICE.peer_id.text}": 1}}', "[" * 100_000])
def test_an_answer_that_is_no_document_is_refused(text: str) -> None:
    with pytest.raises(DecodeError):
        from_json(text)


def test_bars_show_the_course_of_many_values_in_little_room() -> None:
    assert bars([]) == "-"
    assert bars([1.0]) == "▁"
    assert bars([1.0, 1.0]) == "▁▁"
    assert bars([0.0, 1.0, 2.0, 7.0]) == "▁▂▃█"
    assert len(bars([float(value) for value in range(1000)], 32)) == 32


@pytest.mark.process
def test_a_running_node_is_asked_and_watched(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "shoal.node.process", *arguments, "--data-dir", str(tmp_path / "node")]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    start = [sys.executable, "-m", "shoal.node.process", "start", "digits", "--time-budget", "0.3", "--host"]
    start += ["127.0.0.1", "--no-port-mapping", "--leash", "--data-dir", str(tmp_path / "node")]
    with subprocess.Popen(
        start, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as node:
        assert node.stdout is not None
        try:
            assert any(line.startswith("join with") for line in iter(node.stdout.readline, ""))
            deadline = time.monotonic() + 60
            while "yes" not in (said := run("doc", "show", "roster")).stdout:
                assert time.monotonic() < deadline, said
            assert "no node is running" not in said.stdout
            assert "signature   good" in run("doc", "show", "spec").stdout
            watch = [sys.executable, "-m", "shoal.node.process", "doc", "watch", "--data-dir", str(tmp_path / "node")]
            with subprocess.Popen(watch, stdout=subprocess.PIPE, text=True) as watching:
                assert watching.stdout is not None
                lines = [watching.stdout.readline() for _ in range(7)]  # five documents, then what is new in them
                watching.send_signal(signal.SIGINT)
                assert watching.wait(20) == OK
            assert any(" roster " in line for line in lines[:5])
            assert any(" commits " in line for line in lines[5:]) or any(" roster " in line for line in lines[5:])
            run("stop")
            assert "left" in run("doc", "show", "roster").stdout
        finally:
            node.kill() if os.name == "nt" else node.send_signal(signal.SIGKILL)
