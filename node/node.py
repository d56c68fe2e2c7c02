"""One running node: host, endpoint, DHT and run composed; CLI, own loops and simulators start it alike."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import attrs
import trio
from torch import Tensor

from ..dht.kademlia.node import Dht
from ..learning import topologies
from ..learning.apart import Apart
from ..learning.checkpoints import Keeping
from ..learning.events import Event, RoundReport, RunStatus, Standing
from ..learning.faults import Faults
from ..learning.peer import Trainer
from ..learning.pipeline.messages import CREW, AskCrew
from ..learning.reduce.codecs import resolve as resolve_codec
from ..learning.run import Run
from ..learning.rundocs import RunDocuments
from ..learning.shard import Shard
from ..learning.spec import BadSpec, RunSpec, SignedSpec
from ..learning.store import RunStore
from ..learning.sync import HEAD, AskHead, ask_heads
from ..learning.task import BUILTIN, Task, resolve, source_hash, title
from ..transport.address import Address
from ..transport.endpoint import Endpoint
from ..transport.errors import ConfigError, DecodeError, PeerUnreachable, RemoteError, RemoteRefused
from ..transport.host import Host
from ..transport.identity import Identity, PeerId
from ..transport.traversal import Traversal
from . import defaults
from .control import PeerInfo
from .founding import Founding as Founding
from .founding import found
from .helping import Helping
from .linkinfo import Traffic, peer_infos
from .listening import best_of_each, for_ticket, free_bind
from .mapping import PortKeeper
from .reach import reach_of
from .stages import Stages
from .ticket import Ticket

log = logging.getLogger(__name__)


@attrs.frozen
class NodeConfig:
    """What one node is to do.

    ``bind``: addresses to listen at; ``fallback``: tried when those are taken. ``folder``: where the run is kept, None
    for memory only; a run found there is resumed. ``documents``: the database of the run's documents, likewise.
    ``task``: as named on this machine, empty for the built-in one that the run names. ``founding`` or ``ticket``: one
    of them unless ``folder`` holds a run. ``psk``: 32 bytes, the key of a private swarm to found (a ticket brings its
    own). ``train_apart``: train in a process of its own. ``via``: addresses of relays and other peers to begin with.
    ``traversal``: how to get through NATs, None: not at all; ``map_port``: ask the router for a port. ``snapshot``: of
    an earlier life's DHT. ``version``: of this program, for others to see. ``linger``: seconds to stay, at most, for
    others that are not finished yet. ``keeping``: which states stay on disk. ``origin``: a model file that the run to
    found begins with. ``whole``: at the end, fetch all stages of a model that was cut, for an export. ``memory``:
    bytes that a stage may take here, 0: not known.
    """

    bind: tuple[Address, ...] = ()
    fallback: tuple[Address, ...] = ()
    folder: Path | None = None
    documents: Path | None = None
    task: str = ""
    founding: Founding | None = None
    ticket: Ticket | None = None
    psk: bytes | None = attrs.field(default=None, repr=False)
    via: tuple[Address, ...] = ()
    traversal: Traversal | None = None
    map_port: bool = False
    device: str = "cpu"
    train_apart: bool = False
    time_budget: float | None = None
    evaluate_every: int = 1
    faults: Faults = attrs.field(factory=Faults)
    snapshot: bytes | None = None
    version: str = ""
    linger: float = defaults.LINGER
    join_timeout: float = defaults.JOIN_TIMEOUT
    keeping: Keeping = attrs.field(factory=Keeping)
    origin: Path | None = None
    whole: bool = False
    memory: int = 0


class Node:
    """A node from start to goodbye. Everything it asks of the world it asks ``host``.

    ``task``: a task object instead of ``config.task``; ``trainer``: a user's own loop instead of a worker. The
    hooks are called on the event loop and must not wait: ``on_event`` for every event of the run, ``on_round`` after
    each committed round with this peer's own number of samples in it, ``on_note`` with a sentence for people.
    """

    def __init__(
        self,
        host: Host,
        identity: Identity,
        config: NodeConfig,
        *,
        task: Task | None = None,
        trainer: Trainer | None = None,
        on_event: Callable[[Event], None] = lambda event: None,
        on_round: Callable[[RoundReport, int], None] = lambda report, samples: None,
        on_note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.host, self.identity, self.config = host, identity, config
        self.store = RunStore(config.folder, config.keeping.quota)
        #: The key of the private swarm that this node belongs to; None in an open one.
        self.psk = config.ticket.psk if config.ticket else config.psk
        self.endpoint = Endpoint(host, identity, psk=self.psk, traversal=config.traversal)
        self.port = PortKeeper(self.endpoint, on_note)
        self._helping = Helping(self.endpoint)
        self._traffic = Traffic(self.endpoint)
        self.dht = Dht(self.endpoint)
        self.run_here: Run | None = None
        self.documents: RunDocuments | None = None
        self.signed: SignedSpec | None = None
        #: Why the node ended: ``finished`` or ``left``; empty before.
        self.outcome = ""
        self._task, self._trainer = task, trainer
        self._on_event, self._on_round, self._on_note = on_event, on_round, on_note
        self._started = 0.0
        self._origin: dict[str, Tensor] | None = None
        #: Where the run's model is cut into stages: which one is held here.
        self.staged: Stages | None = None
        #: Set once the node takes part in a run and has a ticket.
        self.taking_part = trio.Event()
        self._stop = trio.Event()

    # -- life ----------------------------------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen, find or found the run, take part until it is finished, :meth:`stop` or cancellation.

        ``task_status`` is started once the node takes part in a run and has a ticket. Raises :class:`ConfigError`
        (port in use, unknown task, a model that is not the run's …) and :class:`RemoteError` (nobody there to join).
        """
        self._started = self.host.now()
        async with trio.open_nursery() as nursery:
            bind = await free_bind(self.host.network, self.config.bind, self.config.fallback, self._on_note)
            await nursery.start(self.endpoint.run, bind)
            if self.config.traversal is not None:
                nursery.start_soon(self._helping.run, bind)
            if self.config.map_port:
                nursery.start_soon(self.port.run)
            self._restore()
            nursery.start_soon(self._until_stopped, nursery.cancel_scope)
            self.signed = await self._find_spec()
            spec = self.signed.open()
            # Of a newer version, perhaps: better said now than in the first round.
            resolve_codec(spec.codec)
            if spec.topology:
                topologies.check(spec.topology)
            nursery.start_soon(self.dht.run)
            task = await self._load_task(spec)
            if spec.pipeline is not None:
                self._check_staged()
                self.staged = Stages(self, task)
                await nursery.start(self.staged.run)
                self._joined(task_status)
                await self.staged.over.wait()
            else:
                trainer = self._trainer
                if self.config.train_apart:
                    trainer = await nursery.start(self._train_apart, task, spec)
                origin, self._origin = self._origin, None  # the run lets go of it once it is saved
                run = self.make_run(self.signed, task, self.store, trainer, origin)
                del origin
                await self.conduct(run, nursery, lambda: self._joined(task_status))
            self.outcome = "finished"
            nursery.cancel_scope.cancel()
        self.outcome = self.outcome or "left"

    def _check_staged(self) -> None:
        """Raises :class:`ConfigError` for what does not go with a model in stages."""
        if self._trainer is not None:
            raise ConfigError("an own training loop holds the whole model, and this run's is cut into stages")
        for name, given in (("--train-apart", self.config.train_apart), ("--time-budget", self.config.time_budget)):
            if given:
                raise ConfigError(f"{name} does not go with a run whose model is cut into stages")

    def _joined(self, task_status: trio.TaskStatus[None]) -> None:
        self.taking_part.set()
        task_status.started()

    def make_run(
        self,
        signed: SignedSpec,
        task: Task,
        store: RunStore,
        trainer: Trainer | None,
        origin: dict[str, Tensor] | None,
        evaluate_every: int | None = None,
    ) -> Run:
        """The part of this node in ``signed``, as it was configured."""
        return Run(
            self.endpoint,
            self.dht,
            signed,
            task,
            store=store,
            device=self.config.device,
            on_event=self._event,
            time_budget=self.config.time_budget,
            evaluate_every=self.config.evaluate_every if evaluate_every is None else evaluate_every,
            faults=self.config.faults,
            # Addresses that have answered already would only be dialled a second time.
            bootstrap=() if len(self.dht.table) else self._bootstrap(),
            trainer=trainer,
            keeping=self.config.keeping,
            origin=origin,
        )

    async def conduct(
        self,
        run: Run,
        nursery: trio.Nursery,
        joined: Callable[[], None] = lambda: None,
        documents: Path | None = None,
    ) -> None:
        """Take part in ``run`` until it is finished and nobody needs us for it, in ``nursery``, where it stays."""
        await self.host.run_blocking(lambda: run.store.blobs)
        self.run_here = run
        self.documents = RunDocuments(
            run, path=documents or self.config.documents, version=self.config.version, note=self._on_note
        )
        await nursery.start(self.documents.run)
        await nursery.start(run.run)
        joined()
        await run.finished.wait()
        await self._linger(run)
        await self.documents.leave()

    async def _train_apart(self, task: Task, spec: RunSpec, *, task_status: trio.TaskStatus[Trainer]) -> None:
        shard = Shard(spec.seed, self.identity.peer_id.key, 0, 0, 1)
        async with Apart.open(task, self.config.task or spec.task, shard, self.config.device) as trainer:
            task_status.started(trainer)
            await trio.sleep_forever()

    def stop(self) -> None:
        """Say goodbye and end: :meth:`run` returns within about :data:`defaults.GOODBYE` seconds."""
        self._stop.set()

    async def _until_stopped(self, scope: trio.CancelScope) -> None:
        await self._stop.wait()
        if self.documents is not None:
            await self.documents.leave()
        if self.run_here is not None and not self.run_here.finished.is_set():
            await self.run_here.leave()
        scope.cancel()

    def _restore(self) -> None:
        if self.config.snapshot is None:
            return
        try:
            self.dht.restore(self.config.snapshot)
        except DecodeError as error:
            # Only a shortcut: the ticket's addresses and the founder's find the swarm too.
            log.warning(
                "what was known of the swarm (`dht` in the data directory) cannot be read and is left aside: %s", error
            )

    # -- the run -------------------------------------------------------------------------------------------------------

    async def _find_spec(self) -> SignedSpec:
        stored = await self.host.run_blocking(self.store.load_spec)
        if stored is not None:
            try:
                stored.open()
            except DecodeError as error:
                where = f"{self.config.folder}/spec"
                raise ConfigError(f"{where} is damaged ({error}); delete it to join the run anew") from None
            await self._enter_swarm()
            return stored
        if self.config.ticket is not None:
            return await self._fetch_spec(self.config.ticket)
        if self.config.founding is None:
            raise ConfigError("a node needs a run to found, a ticket, or a folder that holds a run")
        signed, self._origin = await self._found(self.config.founding)
        if self.config.via:
            await self._enter_swarm()
        return signed

    async def _enter_swarm(self) -> None:
        """After a restart: the others may be there, or not yet."""
        addresses = self._bootstrap()
        try:
            await self.dht.bootstrap(addresses)
        except PeerUnreachable as error:
            self._on_note(f"none of the others answers yet ({error.message}); they are looked for all the time")

    async def _found(self, founding: Founding) -> tuple[SignedSpec, dict[str, Tensor] | None]:
        task = await self._load_task(None)
        spec, origin = await found(
            self.host, founding, task, None if self._trainer is None else self._trainer.model, self.config.origin,
            self.identity.peer_id, apart=self.config.train_apart,
        )  # fmt: skip
        return SignedSpec.sign(self.identity, spec), origin

    async def _fetch_spec(self, ticket: Ticket) -> SignedSpec:
        """Ask the peers at the ticket's addresses, and whoever the DHT names, for the run. Retries for a while."""
        pause, told = defaults.BOOTSTRAP_RETRY, ""
        give_up = self.host.now() + self.config.join_timeout
        while True:
            try:
                return await self._ask_for_spec(ticket)
            except RemoteError as error:
                if error.lasting:
                    raise PeerUnreachable(
                        f"could not join the run {ticket.run_id.hex()[:8]}: {error}. Trying again would not help"
                    ) from error
                if self.host.now() + pause > give_up:
                    raise PeerUnreachable(
                        f"could not join the run {ticket.run_id.hex()[:8]} "
                        f"within {self.config.join_timeout:g} s: {error}. "
                        "Is the node that printed the ticket still running, and can this machine reach it? "
                        "`shoal doctor TICKET` looks into it"
                    ) from error
                if str(error) != told:
                    told = str(error)
                    self._on_note(f"not joined yet: {told}; trying again for {give_up - self.host.now():.0f} s")
            await trio.sleep(pause)
            pause = min(2 * pause, defaults.BOOTSTRAP_RETRY_MAX)

    async def _ask_for_spec(self, ticket: Ticket) -> SignedSpec:
        await self.dht.bootstrap(self._bootstrap())
        known = {link.peer: None for link in self.endpoint.links()}
        for record in await self.dht.providers(ticket.run_id):
            known[record.open(self.host.wall()).peer] = None
        failures: list[tuple[str, str]] = []
        elsewhere = 0
        for peer in known:
            signed: SignedSpec | None = None
            try:
                signed = await self._ask_one(peer, ticket.run_id)
                if signed.run_id != ticket.run_id or signed.open().founder != ticket.founder:
                    raise DecodeError("answered with another run than the ticket's", peer=peer.short)
            except BadSpec as error:
                if signed is not None and signed.run_id == ticket.run_id:
                    # The ticket names exactly these bytes: whoever else is asked, they stay the same.
                    raise ConfigError(f"this run cannot be joined: {error}") from None
                failures.append((peer.short, error.message))
            except RemoteError as error:
                elsewhere += isinstance(error, RemoteRefused) and error.code == "unknown-run"
                failures.append((peer.short, error.message))
            else:
                return signed
        raise PeerUnreachable(
            "no peer there takes part in the run",
            attempts=tuple(failures),
            # Each takes part in a run, and it is another one. (A relay, or a node that begins, answers otherwise.)
            lasting=elsewhere == len(failures) > 0,
        )

    async def _ask_one(self, peer: PeerId, run: bytes) -> SignedSpec:
        try:
            return (await self.endpoint.call(peer, HEAD, AskHead(run), timeout=defaults.ASK_TIMEOUT)).spec
        except RemoteRefused as refused:
            # Where the model is cut into stages, each of them has a run, and nobody a head of the whole.
            try:
                return (await self.endpoint.call(peer, CREW, AskCrew(run), timeout=defaults.ASK_TIMEOUT)).spec
            except RemoteRefused:
                raise refused from None

    async def _load_task(self, spec: RunSpec | None) -> Task:
        """The task of this node: what the user named here, else the built-in one that the spec names."""
        if self._task is None:
            # Importing a user's module may take seconds.
            if self.config.task:
                self._task = await self.host.run_blocking(lambda: resolve(self.config.task, allow_import=True))
            elif spec is not None and spec.task not in BUILTIN:
                raise ConfigError(
                    f"the run trains the task {spec.task!r}, which is not built in, and code is never taken from the "
                    "network: name your copy of it with --task module:Class"
                )
            elif spec is not None:
                self._task = await self.host.run_blocking(lambda: resolve(spec.task, allow_import=False))
            else:
                raise ConfigError("name the task to train: a built-in one (digits, stdlib) or module:Class")
            if spec is not None and source_hash(self._task) != spec.task_hash:
                self._on_note(
                    f"warning: the source of task {title(self._task)} here differs from the founder's; "
                    "if that is not intended, use the same version on all machines"
                )
        return self._task

    async def _linger(self, run: Run) -> None:
        """Stay until the other members have the last round too: the stragglers among them may need us."""
        with trio.move_on_after(self.config.linger):
            while True:
                # Whoever has no link any more has left, and says so by that.
                others = [peer for peer in run.companions() if self.endpoint.link(peer) is not None]
                heads = await ask_heads(self.endpoint, run.run_id, others, run.gossip, defaults.LINGER_ASK)
                behind = [peer for peer in heads if heads[peer].settled < run.round]
                if not behind:
                    return
                await trio.sleep(defaults.LINGER_POLL)

    # -- what others see -----------------------------------------------------------------------------------------------

    def ticket(self) -> Ticket | None:
        """A ticket for this node's run through this node and others it knows; None before there is a run."""
        if self.signed is None:
            return None
        addresses = dict.fromkeys(for_ticket(self.endpoint.addresses()))
        addresses |= dict.fromkeys(self.config.via)
        for link in self.endpoint.links():
            contact = self.endpoint.contact(link.peer)
            if contact is not None:
                addresses |= dict.fromkeys(best_of_each(contact.open(self.host.wall()).addresses))
        addresses |= dict.fromkeys(self._bootstrap())
        return Ticket(
            self.signed.run_id, self.signed.open().founder, tuple(addresses)[: defaults.MAX_TICKET_ADDRESSES], self.psk
        )

    def _bootstrap(self) -> tuple[Address, ...]:
        """Where to begin: ``via`` and the ticket, but our own addresses (a founder may be started with its ticket)."""
        own = self.endpoint.addresses()
        given = self.config.via + (self.config.ticket.addresses if self.config.ticket else ())
        return tuple(dict.fromkeys(address for address in given if address not in own))

    def status(self) -> RunStatus | None:
        return None if self.run_here is None else self.run_here.status()

    async def export(self, path: Path) -> str:
        """Write the model to ``path`` as safetensors; returns a sentence. Raises :class:`ConfigError`."""
        if self.staged is not None:
            return await self.staged.export(path)
        if self.run_here is None:
            raise ConfigError("this node takes part in no run yet; it has no state")
        return await self.run_here.export(path)

    def reach(self) -> str:
        """Who can connect to this node, a sentence."""
        return reach_of(self.endpoint)[1]

    def uptime(self) -> float:
        """Seconds since :meth:`run` began."""
        return self.host.now() - self._started

    def traffic(self) -> tuple[int, int]:
        """Wire bytes sent and received over all links, past ones included."""
        return self._traffic.total()

    def peers(self) -> tuple[PeerInfo, ...]:
        """The live links, by peer."""
        status = self.status()
        return peer_infos(self.endpoint, () if status is None else status.members)

    def standings(self) -> tuple[Standing, ...]:
        """What this node has seen of all peers of the run, the one seen last first."""
        return () if self.run_here is None else self.run_here.standings.all()

    def _event(self, event: Event) -> None:
        self._on_event(event)
        if self.documents is not None:
            self.documents.event(event)
        run = self.run_here
        if run is not None and (event.phase, event.what) == ("commit", "done") and run.reports:
            self._on_round(run.reports[-1], run.status().samples)
