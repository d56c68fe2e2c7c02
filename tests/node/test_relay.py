"""`shoal relay`: a node without torch through which others meet."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import attrs
import pytest
import trio

from shoal.node.relay_node import RelayNode
from shoal.node.ticket import Ticket
from shoal.sim.virtual import VirtualHost
from shoal.transport.address import Address
from shoal.transport.aead import NOMINAL_CIPHERS
from shoal.transport.identity import Identity

from .test_node import FOUNDING, Somewhere, members, ticket
from .test_process import JOIN, PATIENCE, START, Shoal
from .test_process import members as count
from .test_process import shoal as shoal

AT = Address("mem", "relay", 4001)


def relay_of(here: Somewhere, psk: bytes | None = None, **settings: object) -> RelayNode:
    host = VirtualHost("relay", here.network, seed=7)
    host.ciphers = NOMINAL_CIPHERS
    return RelayNode(host, Identity(b"relay".ljust(32, b".")), bind=(AT,), psk=psk, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("psk", [None, b"k" * 32])
async def test_peers_that_know_only_the_relay_meet(psk: bytes | None) -> None:
    async with trio.open_nursery() as nursery:
        here = Somewhere(nursery)
        await nursery.start(relay_of(here, psk).run)
        alice = await here.start("alice", founding=FOUNDING, psk=psk, via=(AT,))
        invitation = ticket(alice)
        assert AT in invitation.addresses
        # whatever else the ticket names does not answer
        bob = await here.start("bob", ticket=attrs.evolve(invitation, addresses=(Address("mem", "gone", 1), AT)))
        await members(alice, 2)
        assert bob.endpoint.link(alice.identity.peer_id) is not None
        nursery.cancel_scope.cancel()


async def test_a_relay_that_is_stopped_says_goodbye_and_comes_back_with_what_it_knew() -> None:
    async with trio.open_nursery() as nursery:
        here = Somewhere(nursery)
        first = relay_of(here)
        done = trio.Event()

        async def run() -> None:
            await first.run()
            done.set()

        nursery.start_soon(run)
        await first.ready.wait()
        alice = await here.start("alice", founding=FOUNDING, via=(AT,))
        with trio.fail_after(30):
            while alice.identity.peer_id not in [contact.peer for contact in first.dht.table]:
                await trio.sleep(0.1)
        snapshot = first.dht.snapshot()
        first.stop()
        with trio.fail_after(2):
            await done.wait()
        notes: list[str] = []
        second = relay_of(here, snapshot=snapshot, on_note=notes.append)
        await nursery.start(second.run)
        with trio.fail_after(120):
            while not len(second.dht.table):
                await trio.sleep(0.5)
        assert notes == []
        nursery.cancel_scope.cancel()


async def test_a_snapshot_that_cannot_be_read_is_left_aside() -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(relay_of(Somewhere(nursery), snapshot=b"rubbish").run)
        nursery.cancel_scope.cancel()


def started(folder: Path, *arguments: str) -> tuple[subprocess.Popen[str], list[str]]:
    """A relay process and its first lines, up to the addresses it prints."""
    child = subprocess.Popen(
        [sys.executable, "-m", "shoal.node.process", "relay", "--data-dir", str(folder), "--port", "0", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True, start_new_session=True,
    )  # fmt: skip
    assert child.stdout is not None
    lines = []
    for line in child.stdout:
        lines.append(line.rstrip())
        if "--via" in line and "127.0.0.1" in line:
            break
    return child, lines


@pytest.mark.process
def test_two_processes_meet_through_a_relay_process(shoal: Shoal) -> None:
    relay, lines = started(shoal.folder / "r", "--host", "127.0.0.1")
    try:
        found = re.search(r"--via (\S+)", "\n".join(lines))
        assert found is not None
        shoal.spawn(*START, "--via", found[1], data="a")
        first = Ticket.parse(shoal.rounds("a", 1).ticket)
        only = attrs.evolve(first, addresses=(Address.parse(found[1]),)).encode()
        shoal.spawn("join", only, *JOIN, data="b")
        shoal.until("b", lambda s: count(s) == 2, "two members")

        status = shoal.run("status", data="r").stdout
        assert status.startswith("relay ")
        assert "run  " not in status
        # A second link to a peer, of a dial that came too late to be of use, goes by itself.
        give_up = time.monotonic() + PATIENCE
        while len(shoal.client("r").peers().peers) != 2 and time.monotonic() < give_up:
            time.sleep(0.1)
        assert {peer.peer for peer in shoal.client("r").peers().peers} == {shoal.client(n).status().peer for n in "ab"}
        done = shoal.run("export", str(shoal.folder / "x.safetensors"), data="r")
        assert done.returncode == 2
        assert "it trains nothing" in done.stderr
        assert "`shoal relay` there goes on" in shoal.run("stop", data="r").stdout
        assert relay.wait(PATIENCE) == 0
    finally:
        relay.kill()
        relay.communicate()


@pytest.mark.process
def test_a_relay_never_imports_torch_and_ends_at_ctrl_c(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "class Forbidden:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'numpy', 'safetensors'): raise ImportError(f'no {name} here')\n"
        "sys.meta_path.insert(0, Forbidden())\n"
        "from shoal.node.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, "relay", "--data-dir", str(tmp_path), "--port", "0", "--private"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, env={**os.environ},
    ) as child:  # fmt: skip
        try:
            assert child.stdout is not None
            head = "".join(next(child.stdout) for _ in range(4))
            assert "relay of a private swarm" in head, head
            child.send_signal(signal.SIGINT)
            assert child.wait(10.0) == 0
        finally:
            child.kill()
    assert (tmp_path / "swarm-key").stat().st_mode & 0o777 == 0o600
