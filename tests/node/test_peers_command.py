"""What `shoal peers` says of other peers: only what there is, and who is gone."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import attrs
import pytest

from shoal.learning.events import RunStatus, Standing
from shoal.node import commands, defaults
from shoal.node.commands import render_peers, render_status
from shoal.node.control import ControlClient, NodeStatus, PeerInfo, PeerList
from shoal.transport.wire import pack, unpack

LINKS = tuple(PeerInfo(name * 13, f"tcp://192.0.2.{at}:1", "out", "aegis256", 0.25, 1, 2, True)
              for at, name in enumerate(("alic", "bobb")))  # fmt: skip
ALICE, BOB = (link.peer for link in LINKS)
CAROL = "caro" * 13


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()]


def test_without_a_history_there_are_only_links() -> None:
    head, *rows = cells(render_peers(PeerList(LINKS)))
    assert head[-1] == "ROUND" and [row[-1] for row in rows] == ["member", "member"]


def test_a_node_alone_says_so() -> None:
    assert render_peers(PeerList(())).startswith("no links: this node is alone so far")


def test_rounds_quality_and_audits_stand_beside_the_link() -> None:
    found = PeerList(
        LINKS, (Standing(ALICE, 20, 20, 17, 0.85, 17, 0.934, 0.9, passed=5, lied=1, unanswered=2, false_accusations=1),)
    )
    head, alice, bob = cells(render_peers(found))
    assert head[-4:] == ["ROUND", "CONTRIBUTED", "QUALITY", "AUDITS"]
    assert alice[-3:] == ["17/20", "0.93", "5 ok, 1 lied, 2 unanswered, 1 false accusation"]
    assert bob[-3:] == ["-", "-", "-"]


def test_a_column_in_which_there_is_nothing_is_left_out() -> None:
    head, alice, _ = cells(render_peers(PeerList(LINKS, (Standing(ALICE, 20, 20, 17, 0.85),))))
    assert head[-2:] == ["ROUND", "CONTRIBUTED"] and alice[-1] == "17/20"
    head, alice, _ = cells(render_peers(PeerList(LINKS, (Standing(ALICE, false_accusations=2),))))
    assert head[-2:] == ["ROUND", "AUDITS"] and alice[-1] == "2 false accusations"


def test_what_changed_lately_is_said() -> None:
    seen = Standing(ALICE, 1000, 1000, 980, 0.2, 980, 0.9, 0.1)
    _, alice, _ = cells(render_peers(PeerList(LINKS, (seen,))))
    assert alice[-2:] == ["980/1000, lately 20 %", "0.90, lately 0.10"]
    never = attrs.evolve(seen, quality_lately=0.0, lately=0.0)
    assert cells(render_peers(PeerList(LINKS, (never,))))[1][-2:] == ["980/1000, lately 0 %", "0.90, lately 0.00"]


def test_peers_without_a_link_follow_in_a_table_of_their_own() -> None:
    found = PeerList(LINKS, (Standing(CAROL, 7, 5, 3, 0.6), Standing(ALICE, 9, 9, 9, 1.0), Standing("d" * 52)))
    text = render_peers(found)
    links, gone = text.split("\n\nseen in this run, no link now:\n")
    assert len(links.splitlines()) == 3
    assert cells(gone) == [["PEER", "LAST ROUND", "CONTRIBUTED"], ["carocaro", "7", "3/5"], ["dddddddd", "-", "-"]]
    assert "no links" in render_peers(attrs.evolve(found, peers=())) and "carocaro" in text


def test_who_is_on_trial_is_marked_with_the_rounds_that_it_has_left() -> None:
    head, alice, bob = cells(render_peers(PeerList(LINKS, (), ((BOB, 2),))))
    assert head[-1] == "ROUND"
    assert (alice[-1], bob[-1]) == ("member", "on trial, 2 left")


def test_the_status_names_those_on_trial() -> None:
    run = RunStatus(
        "ab" * 32, "digits", "diloco", "strict", 5, "train", "", "", (ALICE, BOB, CAROL), 1, 2, None, "", None, "", 0,
        False, ((BOB, 2), (CAROL, 1)),
    )  # fmt: skip
    status = NodeStatus(1, "/data", ALICE, "", 1.0, (), "unknown", 2, 0, 0, 0, run)
    text = render_status(status)
    assert "on trial        bobbbobb for 2 rounds more, carocaro for 1 round more" in text
    assert "on trial" not in render_status(attrs.evolve(status, run=attrs.evolve(run, trial=())))
    assert unpack(NodeStatus, pack(status)) == status


def test_of_many_without_a_link_the_last_are_named_and_whoever_was_caught() -> None:
    many = [Standing(f"{number:04}" * 13, 300 - number, 1, 1, 1.0) for number in range(300)]
    many[200] = attrs.evolve(many[200], lied=1)
    many[250] = attrs.evolve(many[250], false_accusations=1)
    lines = render_peers(PeerList((), tuple(many))).splitlines()
    shown = [line.split()[0][:4] for line in lines[4:-1]]
    assert shown == [f"{number:04}" for number in (*range(defaults.SHOWN_WITHOUT_LINK), 200, 250)]
    assert lines[-1] == f"and {300 - len(shown)} more: --json names them all"


def test_the_json_has_every_number(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    seen = Standing(ALICE, 20, 20, 17, 0.85, 17, 0.93, 0.9, 5, 1, 2, 3)
    monkeypatch.setattr(ControlClient, "peers", lambda self: PeerList(LINKS, (seen,)))
    assert commands.peers(Namespace(data_dir=tmp_path, json=True)) == 0
    found = json.loads(capsys.readouterr().out)
    assert [peer["peer"] for peer in found["peers"]] == [ALICE, BOB]
    assert found["standings"] == [attrs.asdict(seen)]
