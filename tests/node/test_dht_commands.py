"""`shoal dht …` on real processes: relays, which have a DHT and load no torch."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest

from shoal.dht.kademlia.keys import node_key, to_bytes
from shoal.node.dht_commands import render_table, render_walk
from shoal.node.dht_messages import DhtBucket, DhtContact, DhtQuery, DhtTableInfo, DhtWalked
from shoal.transport.identity import PeerId

from .test_process import Shoal
from .test_process import shoal as shoal
from .test_relay import started

PEERS = [PeerId(bytes([n]) * 32).text for n in range(5)]
CONTACT = DhtContact(PEERS[1], "tcp://192.0.2.1:4001", 12.34, 65.0, 0, ("192.0.2.0/24",))
TABLE = DhtTableInfo(
    PEERS[0], bytes(32), 20, (DhtBucket(3, (CONTACT,), 2, None),), 1, 7, 8, 31.7, (("lookups", 4), ("lies", 0))
)


def eventually(holds: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    import time

    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.1)


def contacts(shoal: Shoal, data: str) -> int:
    done = shoal.run("dht", "table", "--json", data=data)
    if done.returncode != 0:
        return -1
    return sum(len(bucket["contacts"]) for bucket in json.loads(done.stdout)["buckets"])


class Relays:
    """Relay processes that know each other; all of them end with the test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.children: dict[str, subprocess.Popen[str]] = {}

    def start(self, name: str, *arguments: str) -> str:
        """Returns the address it prints."""
        child, lines = started(self.folder / name, "--host", "127.0.0.1", "--no-port-mapping", *arguments)
        self.children[name] = child
        found = re.search(r"--via (\S+)", "\n".join(lines))
        assert found is not None, lines
        return found[1]

    def kill(self, name: str) -> None:
        child = self.children.pop(name)
        child.send_signal(signal.SIGKILL)
        child.communicate()


@pytest.fixture
def relays(shoal: Shoal) -> object:
    made = Relays(shoal.folder)
    yield made
    for name in list(made.children):
        made.kill(name)


@pytest.mark.process
def test_what_one_node_puts_the_others_get_also_after_it_was_killed_and_found_back(
    shoal: Shoal, relays: Relays, tmp_path: Path
) -> None:
    via = relays.start("a")
    for name in ("b", "c"):
        relays.start(name, "--via", via)
    eventually(lambda: contacts(shoal, "c") == 2, "c knows a and b")

    first = shoal.run("dht", "put", "greeting", "hello", data="b")
    assert "stored by 2 other peers, version 1" in first.stdout
    (shoal.folder / "value").write_bytes(b"\x00\xff")
    again = shoal.run("dht", "put", "greeting", f"@{shoal.folder / 'value'}", "--json", data="b")
    stored = json.loads(again.stdout)
    assert stored["record"]["seq"] == 2
    key = f"{stored['record']['author']}/greeting"
    assert f"get it with: shoal dht get owned {key}" in first.stdout
    got = shoal.run("dht", "get", "owned", key, data="c")
    assert got.returncode == 0
    assert "version  2" in got.stdout
    assert "00ff" in got.stdout

    for what in (["--random"], [stored["record"]["author"], "--paths", "2"], [key]):
        walk = shoal.run("dht", "walk", *what, data="c")
        assert walk.returncode == 0, walk.stderr
        assert "2 queries, 0 failed" in walk.stdout
        assert "the 2 closest peers" in walk.stdout
    assert shoal.run("dht", "providers", "00" * 32, data="c").returncode == 1

    # Killed without a word, and started without an address: what it wrote to disk leads it back.
    eventually((shoal.folder / "b" / "dht").exists, "b wrote down what it knows", 10.0)
    before = (shoal.folder / "b" / "dht").stat().st_mtime_ns
    shoal.run("dht", "put", "other", "mine", data="b")
    eventually(lambda: (shoal.folder / "b" / "dht").stat().st_mtime_ns > before, "b wrote down its record", 10.0)
    relays.kill("b")
    relays.kill("a")
    relays.start("b")
    eventually(lambda: contacts(shoal, "b") >= 1, "b found c", 10.0)
    relays.kill("c")
    mine = shoal.run("dht", "get", "owned", f"{stored['record']['author']}/other", "--raw", data="b")
    assert mine.stdout == "mine"


@pytest.mark.process
@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["get", "owned", "xyz"], "'xyz' is not a key or PEER/NAME"),
        (["get", "owned", "xyz/name"], "'xyz' is not a peer id"),
        (["providers", "shoal1aaaa"], "ticket"),
        (["put", "name", "@/nowhere"], "cannot read /nowhere"),
        (["walk"], "name what to look for"),
        (["walk", "--random", "00"], "name what to look for"),
        (["table"], "no node is running here"),
    ],
)
def test_bad_input_is_named_before_anybody_is_asked(shoal: Shoal, arguments: list[str], complaint: str) -> None:
    done = shoal.run("dht", *arguments, data="nobody")
    assert done.returncode == 2
    assert complaint in done.stderr
    assert done.stdout == ""


def test_the_table_shows_every_contact_and_how_good_it_is() -> None:
    text = render_table(TABLE)
    assert "1 in 1 buckets of up to 20; 2 wait for a place" in text
    assert "good: 1 of 1 answered the last time, 1 lost" in text
    assert "about 32 peers" in text
    assert "7 records, 8 announcements" in text
    assert re.search(r"aeaqcaib\s+tcp://192.0.2.1:4001\s+12.3 ms\s+1:05 ago\s+-\s+192.0.2.0/24", text)
    assert "lookups 4" in text
    assert "lies" not in text
    silent = attrs.evolve(CONTACT, failures=1, rtt_ms=None)
    assert "poor: 1 of 1" in render_table(attrs.evolve(TABLE, buckets=(DhtBucket(3, (silent,), 0, 5.0),)))
    assert "alone: it knows nobody" in render_table(attrs.evolve(TABLE, buckets=(), lost=0, swarm=None))


def test_a_walk_shows_each_query_and_why_it_failed() -> None:
    peer = PeerId.parse(PEERS[2])
    walked = DhtWalked(
        to_bytes(node_key(peer)),
        2,
        (
            DhtQuery(PEERS[1], 0.0, 0.0015, 1, 254, 20, 0, ""),
            DhtQuery(PEERS[2], 0.002, 1.0, 2, 0, 0, None, "no answer within 1 s"),
        ),
        ((PEERS[1], 254),),
        1,
        1.002,
    )
    text = render_walk(walked)
    assert "on 2 disjoint paths" in text
    assert re.search(r"0.0 ms\s+aeaqcaib\s+1\s+254 bits\s+1.5 ms\s+20 peers\s+0 bits", text)
    assert "failed: no answer within 1 s" in text
    assert "2 queries, 1 failed, 1 hops" in text
