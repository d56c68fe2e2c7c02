"""The documents of a run in virtual time: who is alive, what was committed and measured, who is banned and why."""

from __future__ import annotations

import itertools
import random
from typing import Any, ClassVar

import attrs
import pycrdt
import pytest
import trio

from shoal.dht.documents import messages
from shoal.dht.documents.envelope import NOTHING, Envelope, Evidence, Header, client_id
from shoal.dht.documents.messages import PushEnvelopes, Sent
from shoal.learning import defaults
from shoal.learning.rundocs import RunDocuments
from shoal.learning.rundocs_content import (
    BanReader,
    Content,
    Present,
    ban_entry,
    read_commits,
    read_metrics,
    read_roster,
    read_spec,
    run_documents,
    thin,
    writers,
)
from shoal.node.node import Founding
from shoal.sim.world import Member, Scenario, World, simulate
from shoal.transport.errors import ConfigError, DecodeError
from shoal.transport.identity import Identity, PeerId
from shoal.transport.memory_flow import Route

from ..sim import tiny


class Slow(tiny.Pull):
    """Rounds of one virtual second."""

    step_seconds: ClassVar[float] = 0.5


class Slower(tiny.Pull):
    step_seconds: ClassVar[float] = 5.0


def scenario(nodes: int, rounds: int, strategy: str = "exchange", **fields: Any) -> Scenario:
    if strategy == "exchange":
        return attrs.evolve(tiny.scenario(nodes, rounds), make_task=Slow, limit=7200.0, evaluate_every=1, **fields)
    founding = Founding(strategy="noloco", min_peers=nodes, rounds=rounds)
    return Scenario(nodes, founding, make_task=Slow, route=Route(latency=tiny.LATENCY), limit=36_000.0, **fields)


def docs(member: Member) -> RunDocuments:
    assert member.node.documents is not None
    return member.node.documents


def read(member: Member, name: str) -> Content:
    return docs(member).document(name).read()


def roster(member: Member) -> dict[str, Present]:
    return {present.peer.text: present for present in read_roster(read(member, "roster"))}


async def rounds(world: World, round: int) -> None:
    await world.until(
        lambda: all(m.node.run_here is not None and m.run.round >= round for m in world.live()), f"round {round}"
    )


def test_members_learn_of_each_other_of_commits_and_of_metrics() -> None:
    async def script(world: World) -> None:
        await rounds(world, 20)
        await trio.sleep(defaults.BEAT_MIN * 2)
        members = world.live()
        for member in members:
            wall = member.node.host.wall()
            seen = roster(member)
            assert sorted(seen) == sorted(other.peer for other in members)
            assert all(present.alive(wall)[0] for present in seen.values())
            assert all(present.state == "training" for present in seen.values())
            notes = {note.round: note for note in read_commits(read(member, "commits"))}
            assert [round for round in range(1, 18) if round not in notes] == []
            for note in notes.values():
                assert note.count == len(note.members) <= 4
                assert note.samples > 0
            histories = read_metrics(read(member, "metrics"))
            assert [history.peer.text for history in histories] == sorted(other.peer for other in members)
            assert all(len(history.points) >= 10 for history in histories)
            assert all(point.metric is not None for history in histories for point in history.points)
            spec = read_spec(read(member, "spec"), member.run.run_id)
            assert spec == member.run.signed
            assert member.node.documents is not None
            assert docs(member).documents.faults() == {}  # type: ignore[union-attr]
        for number in sorted(world.members):
            world.stop(number)

    simulate(scenario(4, 100_000), script)


def test_the_dead_are_told_from_the_living_and_from_those_who_said_goodbye() -> None:
    async def script(world: World) -> None:
        await rounds(world, 15)
        await trio.sleep(defaults.BEAT_MIN * 2)
        dead, gone = world.members[2].peer, world.members[3].peer
        world.kill(2)
        world.stop(3)
        await trio.sleep(defaults.BEAT_MIN * (defaults.BEATS_MISSED + 1) + defaults.BEAT_SLACK)
        for number in (0, 1):
            member = world.members[number]
            seen, wall = roster(member), member.node.host.wall()
            said = {peer: present.alive(wall) for peer, present in seen.items()}
            assert said[world.members[0].peer][0]
            assert said[world.members[1].peer][0]
            assert not said[dead][0]
            assert said[dead][1].startswith("silent for")
            assert said[gone] == (False, "said goodbye")
        again = world.restart(2)
        await world.until(lambda: again.node.run_here is not None and again.run.round > 20, "the dead one again")
        await trio.sleep(defaults.BEAT_MIN * 3)
        member = world.members[0]
        assert roster(member)[dead].alive(member.node.host.wall())[0]
        for number in (0, 1, 2):
            world.stop(number)

    simulate(scenario(4, 100_000), script)


def test_a_document_that_cannot_be_written_does_not_silence_the_others(caplog: pytest.LogCaptureFixture) -> None:
    async def script(world: World) -> None:
        await rounds(world, 3)
        member, before = world.members[0], docs(world.members[0])

        async def refuse(change: object) -> None:
            raise ConfigError("others would refuse this")

        commits = before.document("commits")
        write, commits.write = commits.write, refuse  # type: ignore[method-assign,assignment]
        await rounds(world, 60)
        wall = member.node.host.wall()
        assert all(present.alive(wall)[0] and present.round > 20 for present in roster(world.members[1]).values())
        assert len(before._notes) <= defaults.COMMITS_KEPT
        commits.write = write  # type: ignore[method-assign]
        await rounds(world, 70)
        assert any(
            note.writer.text == member.peer and note.round > 50 for note in read_commits(read(member, "commits"))
        )
        for number in sorted(world.members):
            world.stop(number)

    with caplog.at_level("WARNING", "shoal.learning.rundocs"):
        simulate(scenario(2, 100_000), script)
    assert [record.getMessage() for record in caplog.records if record.name == "shoal.learning.rundocs"] == [
        "the run's document commits could not be written, and is tried again: others would refuse this"
    ]


def test_a_partition_of_the_run_heals_to_one_state_of_its_documents() -> None:
    async def script(world: World) -> None:
        await rounds(world, 3)
        await trio.sleep(20)
        world.partition((0, 1), (2, 3, 4))
        await trio.sleep(60)
        healed = world.members[0].node.host.wall()
        assert not all(present.alive(healed)[0] for present in roster(world.members[0]).values())
        world.heal()

        def one_state() -> bool:
            # Everybody writes all the time: compare what was written before the partition ended, on either side.
            members = world.live()
            known = [[note for note in read_commits(read(one, "commits")) if note.at < healed] for one in members]
            alive = [
                len(roster(one)) == 5 and all(p.alive(one.node.host.wall())[0] for p in roster(one).values())
                for one in members
            ]
            return all(alive) and all(notes == known[0] for notes in known)

        await world.until(one_state, "one state", 300.0)
        for member in world.live():
            writers = {note.writer.text for note in read_commits(read(member, "commits"))}
            assert len(writers) >= 3, "of both sides"
            assert read_spec(read(member, "spec"), member.run.run_id) is not None
            assert docs(member).bans() == []
        for number in sorted(world.members):
            world.stop(number)

    simulate(attrs.evolve(scenario(5, 100_000), make_task=Slower), script)


def forked(member: Member, number: int = 2) -> list[Envelope]:
    """Envelopes of one counter that contradict each other, signed by a member with its own key."""
    spec = docs(member).specs["metrics"]
    identity, wall = member.node.identity, member.node.host.wall()
    found = []
    for value in range(number):
        doc: pycrdt.Doc[Any] = pycrdt.Doc(client_id=client_id(identity.peer_id, spec.id, 1 << 50))
        doc.get("points", type=pycrdt.Map)["x"] = value
        found.append(
            Envelope.sign(
                identity,
                spec.id,
                doc.get_update(),
                incarnation=1 << 50,
                counter=0,
                previous=NOTHING,
                expires=wall + 600,
            )
        )
    return found


def test_a_member_that_forks_is_banned_by_all_with_the_proof_and_its_words_are_refused() -> None:
    async def script(world: World) -> None:
        await rounds(world, 10)
        await trio.sleep(20)
        liar, others = world.members[3], [world.members[number] for number in (0, 1, 2)]
        one, other = forked(liar)
        run = liar.run.run_id
        for victim, envelope in ((others[0], one), (others[1], other)):
            sent = PushEnvelopes(run, (Sent(envelope, 1),))
            await liar.node.endpoint.call(victim.node.identity.peer_id, messages.PUSH, sent, timeout=10)
        await trio.sleep(60)
        for member in others:
            (ban,) = docs(member).bans()
            assert ban.peer.text == liar.peer
            assert "signed two histories" in ban.reason
            assert liar.peer not in roster(member)
            assert all(liar.node.identity.peer_id not in read(member, name) for name in docs(member).specs)
            banned = docs(member).documents.banned(run)  # type: ignore[union-attr]
            assert [peer.text for peer in banned] == [liar.peer]
        # Whoever comes later believes the proof, whatever it did not see itself; and so does whoever is restarted.
        late = world.start(4)
        await world.until(lambda: late.node.run_here is not None and late.run.round > 20, "a newcomer")
        await trio.sleep(30)
        assert [ban.peer.text for ban in docs(late).bans()] == [liar.peer]
        assert liar.peer not in roster(late)
        for number in sorted(world.members):
            world.stop(number)

    four = scenario(4, 100_000)
    simulate(attrs.evolve(four, nodes=5, late=(4,)), script)


def test_a_ban_without_a_proof_bans_nobody() -> None:
    async def script(world: World) -> None:
        await rounds(world, 10)
        await trio.sleep(20)
        liar, victim = world.members[2], world.members[1]
        honest = docs(victim).document("roster").replica
        held = honest.range_of(victim.node.identity.peer_id)
        assert held is not None
        header = honest.envelopes(held.author, held.incarnation, held.first, held.next)[0].header
        lies: dict[str, Any] = {
            victim.peer: ban_entry(attrs.evolve(_evidence(world), first=header, second=header)),
            world.members[0].peer: b"because I say so",
        }

        def lie(doc: pycrdt.Doc[Any]) -> None:
            doc.get("bans", type=pycrdt.Map).update(lies)

        await docs(liar).document("bans").write(lie)
        await trio.sleep(60)
        for member in world.live():
            assert liar.node.identity.peer_id in read(member, "bans")
            assert docs(member).bans() == []
            assert docs(member).documents.banned(member.run.run_id) == {}  # type: ignore[union-attr]
            assert len(roster(member)) == 3
        for number in sorted(world.members):
            world.stop(number)

    simulate(scenario(3, 100_000), script)


def _evidence(world: World) -> Any:
    from shoal.dht.documents.envelope import Evidence

    one, other = forked(world.members[2])
    return Evidence.of(one, other)


def test_a_member_that_writes_without_pause_makes_nobody_read_all_bans_each_time() -> None:
    async def script(world: World) -> None:
        await rounds(world, 3)
        await trio.sleep(defaults.BEAT_MIN)
        liar, victim = world.members[2], world.members[1]
        reads = 0
        read_bans = docs(victim)._bans.read

        def counted(content: Content) -> Any:
            nonlocal reads
            reads += 1
            return read_bans(content)

        docs(victim)._bans.read = counted  # type: ignore[method-assign]
        for number in range(100):

            def change(doc: pycrdt.Doc[Any], number: int = number) -> None:
                doc.get("x", type=pycrdt.Map).update({"n": number})

            await docs(liar).document("bans").write(change)
            await trio.sleep(0.05)
        await trio.sleep(5)
        assert read(victim, "bans")[liar.node.identity.peer_id] == {"x": {"n": 99}}
        assert 2 <= reads <= 15
        for number in sorted(world.members):
            world.stop(number)

    simulate(scenario(3, 100_000), script)


def test_a_member_vouches_for_few_that_nobody_has_seen_and_they_for_nobody() -> None:
    invented = [Identity(number.to_bytes(32, "big")).peer_id for number in range(1, 400)]

    def note(number: int, peers: list[PeerId]) -> dict[str, Any]:
        named = [peer.text for peer in peers]
        entry = {"round": number, "branch": 0, "count": len(named), "samples": 1, "total": 1, "at": 1.0}
        return {**entry, "members": named, "digest": f"{number:016x}", "certificate": "0" * 16}

    async def script(world: World) -> None:
        await rounds(world, 3)
        await trio.sleep(defaults.BEAT_MIN)
        liar, victim = world.members[2], world.members[1]
        # By now everybody is seen by everybody; what the liar says is of rounds long ago.
        peers = iter(invented)
        for number in range(20):
            batch = [next(peers) for _ in range(15)]

            def change(doc: pycrdt.Doc[Any], number: int = number, batch: list[PeerId] = batch) -> None:
                entry = note(1_000 + number, batch)
                doc.get("commits", type=pycrdt.Map)[f"{entry['round']}.{entry['digest']}"] = entry

            await docs(liar).document("commits").write(change)
            await trio.sleep(0.3)
        await trio.sleep(10)
        held = read_commits(read(victim, "commits"))
        assert sum(note.round >= 1_000 for note in held) == 20  # it was heard
        believed = [peer for peer in invented if docs(victim)._is_member(peer)]
        assert len(believed) == defaults.MAX_VOUCHED
        # Whom it named and nobody has seen vouches for nobody.
        assert not any(docs(victim)._former[peer] for peer in believed)
        for number in sorted(world.members):
            world.stop(number)

    simulate(scenario(3, 100_000), script)


def test_gossip_runs_have_documents_too() -> None:
    async def script(world: World) -> None:
        await rounds(world, 12)
        await trio.sleep(defaults.BEAT_MIN * 3)
        for member in world.live():
            assert len(roster(member)) == 5
            assert len(read_metrics(read(member, "metrics"))) == 5
            assert read_commits(read(member, "commits"))
        for number in sorted(world.members):
            world.stop(number)

    simulate(scenario(5, 100_000, "gossip"), script)


# --- contents ---------------------------------------------------------------------------------------------------------

ONE, TWO = (Identity(bytes([number]) * 32).peer_id for number in (1, 2))


def test_histories_stay_bounded_and_get_coarser_the_further_back_they_go() -> None:
    kept: list[int] = []
    for round in range(1, 5000):
        kept.append(round)
        gone = dict.fromkeys(thin(kept, 64))
        kept = [one for one in kept if one not in gone]
        assert len(kept) <= 64
    assert kept[0] == 1
    assert kept[-20:] == list(range(4980, 5000))
    gaps = [later - earlier for earlier, later in itertools.pairwise(kept)]
    assert gaps[1] >= gaps[len(gaps) // 2] >= gaps[-1] == 1


def test_who_writes_a_round_down_is_drawn_evenly() -> None:
    members = [Identity(bytes([number]) * 32).peer_id for number in range(1, 9)]
    rng = random.Random(1)
    firsts = [writers(rng.randbytes(32), members)[0] for _ in range(800)]
    assert all(60 <= firsts.count(member) <= 150 for member in members)
    assert sorted(writers(bytes(32), members)) == sorted(members)


def test_what_has_not_the_right_shape_is_left_out() -> None:
    nonsense: list[Any] = [None, 1, "x", b"x", [], [1, 2, 3, 4], {}, {"x": {}}, {"1": [[], {}, "", b""]}, float("nan")]
    good = {"joined": 1, "seen": 2.5, "beat": 10, "round": 3, "version": "1\x1b[2J", "state": "training"}
    for bad in nonsense:
        for root in ("run", "entry", "commits", "points", "about", "bans"):
            content: Content = {ONE: {root: bad}, TWO: {"entry": good}}
            assert read_spec(content, bytes(32)) is None
            assert [present.peer for present in read_roster(content)] == [TWO]
            assert read_commits(content) == []
            assert read_metrics(content) == []
            assert BanReader([bytes(32)]).read(content) == []
        for field in good:
            changed = {ONE: {"entry": good | {field: bad}}}
            for present in read_roster(changed):
                assert present.version.isprintable()
                assert present.state.isprintable()
                assert present.alive(100.0)[1]
    assert read_roster({ONE: {"entry": good}})[0].version == "1?[2J"


def test_the_documents_of_a_run_are_named_by_run_and_founder() -> None:
    ids = [spec.id for run in (bytes(32), b"\1" * 32) for spec in run_documents(run, ONE).values()]
    assert len({id.hex(): None for id in ids}) == 10
    assert run_documents(bytes(32), ONE)["spec"].id != run_documents(bytes(32), TWO)["spec"].id


def test_many_false_proofs_are_checked_once_and_not_with_every_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a few members can write at most: proofs against made-up peers, the second signature wrong."""
    checks = 0

    def check(self: Evidence) -> None:
        nonlocal checks
        checks += 1
        raise DecodeError("wrong signature")

    monkeypatch.setattr(Evidence, "check", check)
    document = bytes(32)
    content: dict[Any, Any] = {}
    for number in range(1500):
        one = Header(document, PeerId(number.to_bytes(32, "big")), 1, 0, NOTHING, False, 1e9, bytes(32), bytes(64))
        proof = ban_entry(Evidence(one, attrs.evolve(one, expires=2e9)))
        content.setdefault((ONE, TWO)[number % 2], {"bans": {}})["bans"][one.author.text] = proof
    reader = BanReader([document])
    for _ in range(3):
        assert reader.read(content) == []
    assert checks == 1500
