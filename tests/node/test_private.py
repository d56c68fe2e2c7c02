"""Private swarms: who has the ticket gets in; who has not gets no handshake, at once, and a reason."""

from __future__ import annotations

import stat
from pathlib import Path

import attrs
import pytest
import trio

from shoal.node.ticket import Ticket
from shoal.transport.address import Address
from shoal.transport.errors import PeerUnreachable

from .test_node import FOUNDING, Line, Somewhere, members, ticket
from .test_process import JOIN, START, Shoal
from .test_process import members as count
from .test_process import shoal as shoal

KEY = b"k" * 32


async def joins(here: Somewhere, name: str, with_: Ticket) -> str:
    """Why ``name`` cannot join; asserts that it learns so long before it would give up."""
    began = trio.current_time()
    with pytest.RaisesGroup(PeerUnreachable) as caught:
        await here.node(name, Line(), ticket=with_).run()
    assert trio.current_time() - began < 5.0
    return str(caught.value.exceptions[0])


async def test_a_ticket_of_a_private_swarm_leads_in_and_no_other() -> None:
    async with trio.open_nursery() as nursery:
        here = Somewhere(nursery)
        alice = await here.start("alice", founding=FOUNDING, psk=KEY)
        invitation = ticket(alice)
        assert invitation.psk == KEY
        bob = await here.start("bob", ticket=invitation)
        await members(alice, 2)
        # what a member prints leads in too
        assert ticket(bob).psk == KEY
        await here.start("carol", ticket=ticket(bob))
        await members(alice, 3)

        open_one = attrs.evolve(invitation, psk=None)
        error = await joins(here, "mallory", open_one)
        assert "it belongs to a private swarm, we to an open swarm" in error
        assert "Trying again would not help" in error
        error = await joins(here, "trudy", attrs.evolve(invitation, psk=b"x" * 32))
        assert "we are not a member of its private swarm, or have another key" in error
        nursery.cancel_scope.cancel()


async def test_a_run_that_nobody_there_takes_part_in_is_given_up_at_once() -> None:
    async with trio.open_nursery() as nursery:
        here = Somewhere(nursery)
        alice = await here.start("alice", founding=FOUNDING)
        error = await joins(here, "bob", attrs.evolve(ticket(alice), run_id=b"o" * 32))
        assert "no peer there takes part in the run" in error
        assert "takes no part in that run" in error
        nursery.cancel_scope.cancel()


async def test_what_may_pass_is_tried_again() -> None:
    """A refused connection: the founder may be booting."""
    async with trio.open_nursery() as nursery:
        here = Somewhere(nursery)
        alice = here.node("alice", Line(), founding=FOUNDING)
        nobody = Ticket(b"r" * 32, alice.identity.peer_id, (Address("mem", "alice", 4001),))
        began = trio.current_time()
        with pytest.RaisesGroup(pytest.RaisesExc(PeerUnreachable, match="within 60 s")) as caught:
            await here.node("bob", Line(), ticket=nobody).run()
        assert trio.current_time() - began > 20.0
        error = str(caught.value.exceptions[0])
        # said once, not "nobody was reached (… nobody was reached (…))"
        assert "reached" not in error
        assert error.count("mem://alice:4001") == 1
        nursery.cancel_scope.cancel()


@pytest.mark.process
def test_two_processes_in_a_private_swarm_and_a_stranger(shoal: Shoal) -> None:
    founder = shoal.spawn(*START, "--private", data="a")
    first = shoal.rounds("a", 1)
    assert first.private
    assert stat.S_IMODE((shoal.folder / "a" / "swarm-key").stat().st_mode) == 0o600
    assert "the ticket below is a secret" in shoal.log("a").read_text()
    assert "the ticket below is a secret" in shoal.run("status", data="a").stdout
    shoal.spawn("join", first.ticket, *JOIN, data="b")
    shoal.until("b", lambda s: count(s) == 2 and s.private, "two members")

    known = Ticket.parse(first.ticket)
    stranger = shoal.run("join", attrs.evolve(known, psk=None).encode(), *JOIN, data="c")
    assert stranger.returncode == 1
    assert "it belongs to a private swarm, we to an open swarm" in stranger.stderr

    # resumed without a word about privacy, it is private as before, with the same key
    founder.terminate()
    founder.wait(20.0)
    shoal.spawn("start", data="a")
    again = shoal.until("a", lambda s: s.rounds >= 1 and count(s) == 2, "the founder to be back among them")
    assert again.private
    assert Ticket.parse(again.ticket).psk == known.psk


@pytest.mark.process
def test_a_key_file_is_shared_by_several_runs(shoal: Shoal) -> None:
    key = shoal.folder / "team.key"
    shoal.spawn(*START, "--private", str(key), data="a")
    first = shoal.rounds("a", 1)
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    shoal.spawn(*START, "--private", str(key), data="b")
    second = shoal.rounds("b", 1)
    assert Ticket.parse(first.ticket).psk == Ticket.parse(second.ticket).psk
    assert Ticket.parse(first.ticket).run_id != Ticket.parse(second.ticket).run_id

    assert shoal.run("stop", data="a").returncode == 0
    other = shoal.run("start", "--private", str(Path("other.key")), data="a")
    assert other.returncode == 2
    assert "private swarm with another key than other.key" in other.stderr
    key.chmod(0o644)
    refused = shoal.run(*START, "--private", str(key), data="c")
    assert refused.returncode == 2
    assert "can be read by others (mode 0644)" in refused.stderr


@pytest.mark.process
def test_an_open_run_does_not_become_private(shoal: Shoal) -> None:
    shoal.spawn(*START, data="a")
    assert not shoal.rounds("a", 1).private
    assert shoal.run("stop", data="a").returncode == 0
    refused = shoal.run("start", "--private", data="a")
    assert refused.returncode == 2
    assert "a run cannot become private later" in refused.stderr
