"""`shoal lab nat`: what each pair must reach, what the report says, and the matrix itself with real node processes."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import attrs
import pytest
import trio
from rich.console import Console

from shoal.sim import cli
from shoal.sim.lab import MATRIX as MATRIX_KINDS
from shoal.sim.lab import all_pairs, choose_kinds
from shoal.sim.lab_messages import (
    Account,
    Attach,
    Beat,
    Beaten,
    Failed,
    Meet,
    Watched,
    read_answer,
    read_command,
    write_answer,
    write_command,
)
from shoal.sim.lab_report import Matrix, PairResult, required
from shoal.sim.netlab import KINDS, unavailable
from shoal.transport.errors import ConfigError, DecodeError

needs_lab = pytest.mark.skipif(unavailable() is not None, reason=f"no NAT lab here: {unavailable()}")

BEHIND_CONE = ("cone", "cgnat", "udp_blocked")
BEHIND_NAT = (*BEHIND_CONE, "symmetric")


# What is required


@pytest.mark.parametrize("kind", KINDS)
def test_a_dual_stack_public_host_and_any_other_link_directly_or_by_reversal(kind: str) -> None:
    for pair in (("public", kind), (kind, "public")):
        assert required(*pair).ways == ("direct", "reversal")


@pytest.mark.parametrize("one", BEHIND_CONE)
@pytest.mark.parametrize("other", BEHIND_CONE)
def test_two_behind_nats_that_keep_the_port_must_punch(one: str, other: str) -> None:
    assert "punch" in required(one, other).ways
    assert "relay" not in required(one, other).ways


@pytest.mark.parametrize("other", BEHIND_NAT)
def test_behind_a_symmetric_nat_the_relay_is_enough_and_the_watch_ends_by_time(other: str) -> None:
    for pair in (("symmetric", other), (other, "symmetric")):
        assert "relay" in required(*pair).ways
        assert required(*pair).enough == ()


@pytest.mark.parametrize("other", BEHIND_NAT)
def test_a_router_with_upnp_makes_its_host_as_good_as_public_for_ipv4(other: str) -> None:
    assert required(other, "upnp").ways == required("upnp", other).ways == ("direct", "reversal")


@pytest.mark.parametrize("other", ["public4", "upnp", *BEHIND_NAT])
def test_ipv6_only_and_ipv4_only_need_the_relay(other: str) -> None:
    assert required("ipv6", other).ways == required(other, "ipv6").ways == ("relay",)


def test_ipv6_behind_a_firewall_is_good_for_reversal_and_punching() -> None:
    assert required("dual", "ipv6").ways == required("ipv6", "dual").ways == ("direct", "reversal")
    assert "punch" in required("dual", "dual").ways


def test_two_behind_one_nat_must_meet_on_their_lan() -> None:
    assert all_pairs(["public", "cone"]) == [
        ("public", "public"), ("public", "cone"), ("cone", "public"), ("cone", "cone"), ("cone", "neighbour"),
    ]  # fmt: skip
    assert required("cone", "neighbour").ways == ("direct",)


# Choosing, messages, reports


def test_kinds_come_in_the_order_of_the_matrix_whatever_order_was_asked_for() -> None:
    kinds, skipped = choose_kinds(["symmetric", "cone"])
    assert [*kinds, *(name for name, _ in skipped)] == ["cone", "symmetric"]


def test_an_unknown_kind_is_named_with_those_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["lab", "nat", "--kinds", "cone,tunnel"]) == 2
    assert "'tunnel'; there are public, public4, cone" in capsys.readouterr().err


def test_a_folder_that_does_not_exist_is_refused_before_anything_runs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["lab", "nat", "--json", str(tmp_path / "no" / "out.json")]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_where_there_can_be_no_lab_the_command_says_why(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert cli.main(["lab", "nat"]) == 2
    assert "not root" in capsys.readouterr().err


def test_messages_survive_the_pipe() -> None:
    for command in (Attach("p", ("tcp://1.2.3.4:5",)), Meet("p", 8.0, ("direct",)), Beat("p", 1.0, 0.1, 0.0)):
        assert read_command(write_command(command)) == command
    for answer in (
        Account("p", ("a",), "00", "11", (), "reachable", "why"),
        Watched(((0.1, "relay"), (0.5, "punch"))),
        Beaten(3, 2, 1.5, True, 1, ((0.0, "direct"),), ("why",)),
        Failed("because"),
    ):
        assert read_answer(write_answer(answer)) == answer


@pytest.mark.parametrize("line", [b"", b"{}", b"[]", b'{"what": "Unknown"}', b'{"what": "Failed"}'])
def test_a_line_that_is_no_message_is_refused(line: bytes) -> None:
    with pytest.raises(DecodeError):
        read_answer(line)


MATRIX = Matrix(
    ("cone", "symmetric"),
    (
        PairResult("cone", "cone", 0.05, "relay", 0.4, "punch", ((0.05, "relay"), (0.4, "punch")), 1e8),
        PairResult("cone", "symmetric", 0.06, "relay", 0.06, "relay", ((0.06, "relay"),), 5e7),
        PairResult("cone", "neighbour", 0.02, "direct", 0.02, "direct", ((0.02, "direct"),), 3e8),
        PairResult("symmetric", "cone", error="nobody answers"),
        PairResult("symmetric", "symmetric", 0.06, "relay", 0.06, "relay", ((0.06, "relay"),), 5e7),
    ),
    12.0,
)


def test_a_pair_that_is_not_connected_as_required_is_explained() -> None:
    assert not MATRIX.ok
    (complaint,) = (result.complaint() for result in MATRIX.results if not result.ok)
    assert "symmetric → cone has no link (nobody answers); required relay" in complaint
    worse = PairResult("cone", "cone", 0.05, "relay", 0.05, "relay")
    assert "cone → cone has relay; required punch" in worse.complaint()
    twice = attrs.evolve(worse, earlier="no link (nobody answers)")
    assert "cone → cone has relay, and at the first try no link (nobody answers); required punch" in twice.complaint()
    better = attrs.evolve(twice, way="punch")
    assert better.ok and better.second_try() == "cone → cone has punch, at the first try no link (nobody answers)"


def test_the_table_shows_way_and_times_of_every_pair() -> None:
    console = Console(file=io.StringIO(), width=120)
    console.print(MATRIX.table())
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "50 → 400" in shown and "punch" in shown and "none!" in shown


def test_the_summary_has_medians_by_way() -> None:
    lines = MATRIX.summary()
    assert [line.split()[:2] for line in lines] == [["direct", "1"], ["punch", "1"], ["relay", "2"]]
    assert "first byte after 50 ms, this way after 400 ms, 100 MB/s" in lines[1]


def test_the_json_holds_every_pair_with_what_is_required_of_it() -> None:
    report = json.loads(MATRIX.to_json())
    assert report["ok"] is False and len(report["pairs"]) == 5
    first = report["pairs"][0]
    assert first["way"] == "punch" and first["best"] == 0.4 and first["ok"] is True and "punch" in first["required"]


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    MATRIX.plot(tmp_path / "nat.png")
    assert (tmp_path / "nat.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="cannot write the plot"):
        MATRIX.plot(tmp_path / "missing" / "nat.png")


# With real nodes


@needs_lab
@pytest.mark.netns
def test_every_pair_of_kinds_connects_as_required(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "nat.json"
    code = cli.main(["lab", "nat", "--json", str(out), "--plot", str(tmp_path / "nat.png")])
    shown = capsys.readouterr().out
    report = json.loads(out.read_text())
    assert code == 0 and report["ok"], shown
    # Ten pairs at once on two cores, beside other tests: a hole may be punched too late, but not often.
    assert sum(bool(pair["earlier"]) for pair in report["pairs"]) <= 10, shown
    ways = {(pair["dialler"], pair["answerer"]): pair["way"] for pair in report["pairs"]}
    assert ways["cone", "cone"] == "punch"
    assert ways["symmetric", "symmetric"] in ("relay", "webrtc")
    assert ways["ipv6", "cone"] == ways["cone", "ipv6"] == "relay"
    assert all(pair["first"] < 10 and pair["rate"] > 0 for pair in report["pairs"]), shown
    assert sorted([*report["kinds"], *report["skipped"]]) == sorted(MATRIX_KINDS)


@needs_lab
@pytest.mark.netns
def test_links_survive_a_change_of_address_and_the_death_of_the_relay_and_two_train_through_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scenarios.json"
    code = cli.main(["lab", "nat", "--scenario", "address-change,kill-relay,train-relay", "--json", str(out)])
    results = {result["name"]: result for result in json.loads(out.read_text())}
    assert code == 0, capsys.readouterr().out
    assert list(results) == [
        "address-change/own-address", "address-change/router-address", "address-change/punched", "kill-relay",
        "train-relay",
    ]  # fmt: skip
    assert all(result["ok"] for result in results.values())
    assert len(results["train-relay"]["figures"]["both"]) >= 4
    assert results["kill-relay"]["figures"]["ways"][-1][1] == "punch"


def test_an_unknown_scenario_is_named_with_those_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["lab", "nat", "--scenario", "earthquake"]) == 2
    assert "'earthquake'; there are address-change, kill-relay, train-relay" in capsys.readouterr().err


@needs_lab
@pytest.mark.netns
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_ends_the_matrix_and_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "shoal.sim.cli", "lab", "nat", "--kinds", "public,cone"]
    process = await trio.lowlevel.open_process(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with trio.fail_after(30):
            while len(_ours(process.pid)) < 6:
                await trio.sleep(0.02)
        process.send_signal(number)
        with trio.fail_after(10):
            assert await process.wait() == 130
        assert _ours(process.pid) == []
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def _ours(pid: int) -> list[str]:
    folder = Path("/run/netns")
    return [path.name for path in folder.iterdir() if path.name.startswith(f"shoal-{pid}-")] if folder.exists() else []
