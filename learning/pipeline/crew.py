"""Who takes part in a run with stages, and which stage each holds: beats over the links, deaths seen by the links."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

import attrs
import trio

from ...dht.kademlia.node import Dht
from ...transport import deadlines
from ...transport.address import Address, SignedPeerRecord
from ...transport.endpoint import Endpoint
from ...transport.errors import RemoteError, RemoteRefused
from ...transport.identity import PeerId
from ...transport.rpc import Call
from ..rounds.presence import Presence
from ..spec import SignedSpec
from . import defaults
from .messages import BEAT, CREW, PART, SEATED, AskCrew, AskPart, Beat, CrewInfo, PartInfo
from .parts import part_fault

log = logging.getLogger(__name__)


class Crew:
    """``signed``: the whole run's spec. ``bootstrap``: addresses of peers that may take part."""

    def __init__(self, endpoint: Endpoint, dht: Dht, signed: SignedSpec, bootstrap: tuple[Address, ...] = ()) -> None:
        self.endpoint, self.host, self.dht, self.me = endpoint, endpoint.host, dht, endpoint.peer_id
        self.signed, self.spec, self.run_id = signed, signed.open(), signed.run_id
        assert self.spec.pipeline is not None
        self.stages = self.spec.pipeline.stages
        self.bootstrap = bootstrap
        #: What we say of ourselves.
        self.own = Beat(self.run_id, "spare", 0, b"", 0, 0, 0, 0, 0)
        #: Specs of stages' runs that are what they claim to be, by id.
        self.parts: dict[bytes, SignedSpec] = {}
        self._proven: dict[bytes, tuple[int, int]] = {}
        self._newest: dict[int, int] = {}
        self._asked: dict[tuple[PeerId, bytes], float] = {}
        self._nursery: trio.Nursery | None = None
        self.beats: dict[PeerId, Beat] = {}
        self._heard: dict[PeerId, float] = {}
        self._spoke: dict[PeerId, int] = {}  # beats that came from each without being asked for
        self._wake, self.changed = trio.Event(), trio.Event()
        self.presence: Presence | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Tell and listen, until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            self.presence = Presence(self.endpoint, nursery)
            self.presence.on_change = lambda peer, why: self._changed()
            self.presence.on_link = lambda peer: self._tell_soon()
            self.endpoint.serve_at_once(BEAT, self._on_beat)
            self.endpoint.serve_at_once(CREW, self._on_crew)
            self.endpoint.serve_at_once(PART, self._on_part)
            nursery.start_soon(self._speak, nursery)
            nursery.start_soon(self._scout)
            nursery.start_soon(self.dht.announce, self.run_id, defaults.SCOUT_EVERY)
            task_status.started()
            await trio.sleep_forever()

    # -- what we say --------------------------------------------------------------------------------------------------

    def say(self, **changes: Any) -> None:
        """Change what we say of ourselves, and say it at once, if it is anything new."""
        before, self.own = self.own, attrs.evolve(self.own, **changes)
        if self.own != before:
            self._tell_soon()
            self._changed()

    def _tell_soon(self) -> None:
        self._wake.set()

    def _changed(self) -> None:
        self.changed.set()
        self.changed = trio.Event()

    async def _speak(self, nursery: trio.Nursery) -> None:
        while True:
            self._forget()
            for peer in list(self.beats):
                nursery.start_soon(self._tell, peer)
            self._wake = trio.Event()
            with trio.move_on_after(defaults.BEAT_EVERY):
                await self._wake.wait()

    async def _tell(self, peer: PeerId) -> None:
        spoke = self._spoke.get(peer)
        try:
            answer = await self.endpoint.call(peer, BEAT, self.own, timeout=deadlines.silence(defaults.BEAT_TIMEOUT, 0))
        except RemoteRefused as error:
            log.debug("%s does not take our beat: %s", peer.short, error)
        except RemoteError as error:
            log.debug("%s did not hear our beat: %s", peer.short, error)
        else:
            # A beat is taken where it arrives, an answer a turn of the loop later: it may be the older one by then, and
            # the newer one the last of all, that the run is over. What changes afterwards is told anyway.
            if self._spoke.get(peer) == spoke:
                self._take(peer, answer)

    def _on_beat(self, call: Call[Beat]) -> Beat:
        if call.request.run != self.run_id:
            raise RemoteRefused("unknown-run", "this peer takes no part in that run")
        if call.peer not in self.beats and len(self.beats) >= defaults.MAX_CREW:
            raise RemoteRefused("busy", f"this run has {len(self.beats)} peers already")
        self._take(call.peer, call.request)
        if call.peer in self.beats:  # and not what was left out: strangers would have a place here for ever
            self._spoke[call.peer] = self._spoke.get(call.peer, 0) + 1
        return self.own

    def _take(self, peer: PeerId, beat: Beat) -> None:
        if beat.run != self.run_id or beat.stage >= self.stages:
            return
        known = self.beats.get(peer)
        if known is None and len(self.beats) >= defaults.MAX_CREW:
            return
        self._heard[peer] = self.host.now()
        self.beats[peer] = beat
        if known is None:
            assert self.presence is not None
            self.presence.watch(self.beats)
            self._tell_soon()
        if known != beat:
            self._changed()
        if beat.part and beat.part not in self._proven:
            self._prove_soon(peer, beat)

    def _forget(self) -> None:
        """Who is gone for long leaves its place to others, and so do runs that nobody is in."""
        now = self.host.now()
        gone = [peer for peer in self.beats if now - self._heard[peer] > defaults.FORGET]
        for peer in gone:
            beat = self.beats[peer]
            if beat.state != "finished" or beat.stage != 0:  # which says that all is over
                del self.beats[peer], self._heard[peer]
                self._spoke.pop(peer, None)
        named = {beat.part for beat in (self.own, *self.beats.values())}
        for part in [part for part in self._proven if part not in named]:
            del self._proven[part], self.parts[part]
        if gone:
            assert self.presence is not None
            self.presence.watch(self.beats)

    # -- whose word counts --------------------------------------------------------------------------------------------

    def prove(self, signed: SignedSpec, stage: int, generation: int) -> str | None:
        """Believe that ``signed`` is the run of ``stage``, unless something is wrong with it, which is returned.

        Who was away may have missed generations, but nobody can claim one that leaves no numbers for later ones.
        """
        known = self.generation(stage)
        wrong = part_fault(self.run_id, self.spec, signed, stage, generation)
        if wrong is None and 0 <= known < generation - defaults.MAX_SKIPPED:
            wrong = f"it is of generation {generation}, and {known} is the newest one known"
        if wrong is None and len(self._proven) >= defaults.MAX_PARTS:
            wrong = "too many runs of stages are known already"
        if wrong is None:
            self._proven[signed.run_id], self.parts[signed.run_id] = (stage, generation), signed
            self._newest[stage] = max(known, generation)
            self._changed()
        return wrong

    def _prove_soon(self, peer: PeerId, beat: Beat) -> None:
        """Have ``peer`` show that it is in the run that it names; not all the time."""
        now, asked = self.host.now(), (peer, beat.part)
        self._asked = {each: at for each, at in self._asked.items() if now - at < defaults.PROVE_AGAIN}
        often = sum(each == peer for each, _ in self._asked) >= defaults.PROVE_AT_ONCE
        if asked not in self._asked and not often and self._nursery is not None:
            self._asked[asked] = now
            self._nursery.start_soon(self._prove, peer, beat)

    async def _prove(self, peer: PeerId, beat: Beat) -> None:
        try:
            info = await self.endpoint.call(
                peer, PART, AskPart(self.run_id, beat.part), timeout=deadlines.silence(defaults.BEAT_TIMEOUT, 0)
            )
        except RemoteError as error:
            log.debug("%s does not show its run of stage %d: %s", peer.short, beat.stage, error)
            return
        wrong = self.prove(info.spec, beat.stage, beat.generation) if info.spec.run_id == beat.part else "another run"
        if wrong is not None:
            log.warning("%s says that it holds stage %d, which is not believed: %s", peer.short, beat.stage, wrong)

    def _on_part(self, call: Call[AskPart]) -> PartInfo:
        signed = self.parts.get(call.request.part)
        if call.request.run != self.run_id or signed is None:
            raise RemoteRefused("unknown-run", "this peer knows no such run of a stage")
        return PartInfo(signed)

    # -- finding others -----------------------------------------------------------------------------------------------

    def _on_crew(self, call: Call[AskCrew]) -> CrewInfo:
        if call.request.run != self.run_id:
            raise RemoteRefused("unknown-run", "this peer takes no part in that run")
        return CrewInfo(self.signed, self.contacts())

    def contacts(self) -> tuple[SignedPeerRecord, ...]:
        found = [self.endpoint.record()]
        for peer in self.beats:
            contact = self.endpoint.contact(peer)
            if contact is not None and self.alive(peer):
                found.append(contact)
        return tuple(found[: defaults.MAX_CREW])

    async def _scout(self) -> None:
        """Ask those that may know the run who else is there; now and then again."""
        pause = defaults.RETRY
        known: dict[Address, PeerId] = {}
        while True:
            found: dict[PeerId, None] = dict.fromkeys(self.beats)
            # Each is dialled until it has said who it is: another dial would only make a second link.
            for address in [address for address in self.bootstrap if address not in known]:
                try:
                    known[address] = (await self.endpoint.identify(address)).peer
                except RemoteError as error:
                    log.debug("%s: %s", address, error)
            try:
                for record in await self.dht.providers(self.run_id):
                    found[record.open(-float("inf")).peer] = None
            except RemoteError as error:
                log.debug("who takes part is not to be found out: %s", error)
            found |= dict.fromkeys(known.values())
            found.pop(self.me, None)
            async with trio.open_nursery() as nursery:
                for peer in list(found)[:32]:
                    nursery.start_soon(self._ask, peer)
            pause = min(2 * pause, defaults.SCOUT_EVERY)
            await trio.sleep(pause)

    async def _ask(self, peer: PeerId) -> None:
        try:
            info = await self.endpoint.call(peer, CREW, AskCrew(self.run_id), timeout=defaults.BEAT_TIMEOUT)
        except RemoteError as error:
            log.debug("%s does not say who takes part: %s", peer.short, error)
            return
        others = [peer]
        for contact in info.contacts:
            try:
                self.endpoint.learn(contact)
                others.append(contact.open(self.host.wall()).peer)
            except RemoteError as error:
                log.debug("%s knows of a peer that is none: %s", peer.short, error)
        async with trio.open_nursery() as nursery:
            for other in others:
                if other != self.me and other not in self.beats:
                    nursery.start_soon(self._tell, other)

    # -- what is so ---------------------------------------------------------------------------------------------------

    def alive(self, peer: PeerId, part: bytes | None = None) -> bool:
        """Whether a peer is there: its link is up, and it was heard lately; and, where that is asked for, whether it is
        in the run ``part`` of a stage."""
        if part is not None and (peer not in self.beats or self.beats[peer].part != part):
            return False
        if peer == self.me:
            return True
        assert self.presence is not None
        late = self.host.now() - self._heard.get(peer, 0.0) > defaults.BEAT_LOST
        return peer in self.beats and peer not in self.presence.lost and not late

    def beat(self, peer: PeerId) -> Beat:
        return self.own if peer == self.me else self.beats[peer]

    def peers(self) -> list[PeerId]:
        """Everybody who is there, ourselves among them, in canonical order."""
        return sorted([self.me, *(peer for peer in self.beats if self.alive(peer))])

    def part(self, stage: int) -> tuple[int, bytes] | None:
        """Generation and id of the run of ``stage``: of several the newest, then the smallest. None: nobody has it."""
        found = [
            (-beat.generation, beat.part)
            for beat in map(self.beat, self.peers())
            if beat.stage == stage and beat.state in SEATED and self._proven.get(beat.part) == (stage, beat.generation)
        ]
        return (-min(found)[0], min(found)[1]) if found else None

    def holders(self, stage: int, *, loading: bool = False) -> list[PeerId]:
        """Who has the weights of ``stage`` and trains it; ``loading``: also who is about to."""
        part = self.part(stage)
        states = SEATED if loading else ("ready",)
        return [
            peer
            for peer in self.peers()
            if part is not None
            and (beat := self.beat(peer)).stage == stage
            and beat.state in states
            and (beat.generation, beat.part) == part
        ]

    def resuming(self, stage: int) -> bool:
        """Whether somebody is about to go on with ``stage`` as it kept it."""
        return any(self.beat(peer).state == "resuming" for peer in self.holders(stage, loading=True))

    def keepers(self, stage: int) -> list[PeerId]:
        """Who has the weights of ``stage``: its holders that train it, and at the end those that trained it."""
        done = [peer for peer in self.peers() if (b := self.beat(peer)).state == "finished" and b.stage == stage]
        return [*self.holders(stage), *done]

    def over(self) -> bool:
        """Whether the run is finished: somebody said so who trained the first stage, and who may be gone since."""
        return any(beat.state == "finished" and beat.stage == 0 for beat in (self.own, *self.beats.values()))

    async def linger(self) -> None:
        """Say what we have to say to everybody once more, before we go."""
        with trio.move_on_after(deadlines.goodbye()):
            async with trio.open_nursery() as nursery:
                for peer in self.beats:
                    if self.alive(peer):
                        nursery.start_soon(self._tell, peer)

    def usual_step(self) -> int:
        """The step that most of those who train are at: the lower median of what they say."""
        steps = sorted(self.beat(peer).step for stage in range(self.stages) for peer in self.holders(stage))
        return steps[(len(steps) - 1) // 2] if steps else self.own.step

    def usual_rounds(self) -> int:
        """Likewise of rounds done."""
        rounds = sorted(self.beat(peer).rounds for stage in range(self.stages) for peer in self.holders(stage))
        return rounds[(len(rounds) - 1) // 2] if rounds else self.own.rounds

    def generation(self, stage: int) -> int:
        """How often ``stage`` was lost, as far as we know; -1: it was never held."""
        return self._newest.get(stage, -1)

    def steps(self) -> list[tuple[PeerId, int]]:
        """The feeders, each with the step it was in when it spoke last."""
        return [(peer, self.beat(peer).step) for peer in self.holders(0)]

    def pick(self, stage: int, avoid: Collection[PeerId] = ()) -> PeerId | None:
        """A replica of ``stage`` drawn by speed; those in ``avoid`` only when there is no other."""
        ready = [peer for peer in self.holders(stage) if peer != self.me]
        fit = [peer for peer in ready if peer not in avoid] or ready
        if not fit:
            return None
        return self.host.random.choices(fit, [self.speed(peer, fit) for peer in fit])[0]

    def speed(self, peer: PeerId, among: Collection[PeerId]) -> float:
        """Samples in a second, of those that hold the same stage, by what ``peer`` says, as far as that is believed."""
        said = sorted(rate for rate in (self.beat(other).rate for other in among) if rate)
        if not said:
            return 1.0
        usual = said[(len(said) - 1) // 2] / 1000
        own = self.beat(peer).rate / 1000
        return min(max(own or usual, usual / defaults.MAX_RATIO), usual * defaults.MAX_RATIO)
