"""``Swarm``: a user's own training loop in a run, with the node on a background thread."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

import torch
import trio
from torch import Tensor, nn

from ..learning.events import RoundReport, RunStatus
from ..learning.shard import Shard
from ..learning.task import Batch, Task
from ..transport.errors import ConfigError
from ..transport.host import RealHost
from ..transport.identity import Identity
from ..transport.traversal import Traversal
from . import defaults, swarm_key
from .boundary import first_error
from .datadir import DataDir, NodeRecord
from .listening import parse_hosts, parse_via
from .node import Founding, Node, NodeConfig
from .own_loop import Evaluate, OwnLoop
from .ticket import Ticket


class OwnTask(Task):
    """Stands for a model whose loop and data are the user's. Equal names and parameters make two of them one run's."""

    name: ClassVar[str] = "own-loop"

    def __init__(self, loop: OwnLoop) -> None:
        self._loop = loop

    def model(self) -> nn.Module:
        return self._loop.model

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        raise ConfigError("the optimiser of an own training loop stays there")

    def batches(self, shard: Shard) -> Iterator[Batch]:
        raise ConfigError("the data of an own training loop stay there")

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        raise ConfigError("the loss of an own training loop stays there")

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {}


class Swarm:
    """A run, seen from a training loop. Made by :meth:`join` or :meth:`start`; take steps inside its ``with`` block.

    ::

        with Swarm.join(ticket, model, optimizer) as swarm:
            for batch in loader:
                loss(model, batch).backward(); optimizer.step(); optimizer.zero_grad()
                swarm.step()

    The model may be on any device and must only be touched from the thread that calls :meth:`step`. The optimiser stays
    as it is: what is exchanged are the model's weights. Leaving the ``with`` block says goodbye to the others.
    """

    def __init__(self, identity: Identity, config: NodeConfig, loop: OwnLoop, data: DataDir | None) -> None:
        self._identity, self._config, self._loop, self._data = identity, config, loop, data
        self._host = ""
        self._node: Node | None = None
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._locks = ExitStack()
        self._thread = threading.Thread(target=self._main, name="shoal node", daemon=True)

    @classmethod
    def join(
        cls,
        ticket: str,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        data_dir: str | Path | None = None,
        host: str = "",
        port: int = 0,
        evaluate: Evaluate | None = None,
        samples_per_step: int = 1,
        time_budget: float | None = None,
        timeout: float = defaults.JOIN_TIMEOUT,
        via: Sequence[str] = (),
    ) -> Self:
        """Join the run of ``ticket``. Entering the ``with`` block waits until ``model`` holds the run's weights.

        ``optimizer``: only said for symmetry with :meth:`start`; it stays the loop's. ``data_dir``: where identity and
        state are kept; None for a new peer that forgets all. ``host``: an IP address to listen on, empty for every
        interface. ``evaluate``: held-out metrics of the model, after each round. ``time_budget``: seconds per round
        instead of the strategy's steps. ``via``: addresses of relays and peers to begin with. Raises
        :class:`ConfigError` for a bad ticket or a model that is not the run's, :class:`RemoteError` when nobody answers
        within ``timeout`` seconds.
        """
        return cls._begin(
            model, data_dir, host, port, evaluate, samples_per_step, time_budget,
            ticket=Ticket.parse(ticket), founding=None, timeout=timeout, via=via,
        )  # fmt: skip

    @classmethod
    def start(
        cls,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        strategy: str = "diloco",
        strategy_args: Mapping[str, float] | None = None,
        aggregator: str = "mean",
        audit: float | None = None,
        admission: int | None = None,
        mode: str = "available",
        rounds: int = 0,
        min_peers: int = 1,
        seed: int = 0,
        data_dir: str | Path | None = None,
        host: str = "",
        port: int = 0,
        evaluate: Evaluate | None = None,
        samples_per_step: int = 1,
        time_budget: float | None = None,
        private: bool | str | Path = False,
        via: Sequence[str] = (),
    ) -> Self:
        """Found a run whose initial weights are ``model``'s; :attr:`ticket` invites others. Entering the ``with`` block
        waits for ``min_peers``, so print the ticket before.

        ``strategy``: one that exchanges weights (diloco, noloco, local); ``strategy_args`` for instance
        ``{"inner_steps": 50}``. ``aggregator``: how contributions are combined, for instance ``multikrum:f=1``
        (docs/aggregation.md). ``audit``: looks of each peer at combined slices in a round, None: 1 with any rule but
        the mean (docs/audits.md). ``admission``: rounds that a newcomer is on trial, None: 3 with any rule but the mean
        (docs/byzantine.md). ``rounds``: 0 for until stopped. ``private``: only who has the ticket gets in, which
        is a secret then; a path: the file with the swarm's key, made if there is none. Others as for :meth:`join`.
        """
        founding = Founding(
            strategy=strategy,
            strategy_args=tuple(sorted((name, float(value)) for name, value in (strategy_args or {}).items())),
            aggregator=aggregator,
            audit=audit,
            admission=admission,
            mode=mode,
            rounds=rounds,
            min_peers=min_peers,
            seed=seed,
        )
        return cls._begin(
            model, data_dir, host, port, evaluate, samples_per_step, time_budget,
            ticket=None, founding=founding, timeout=defaults.JOIN_TIMEOUT, via=via, private=private,
        )  # fmt: skip

    @classmethod
    def _begin(
        cls,
        model: nn.Module,
        data_dir: str | Path | None,
        host: str,
        port: int,
        evaluate: Evaluate | None,
        samples: int,
        time_budget: float | None,
        *,
        ticket: Ticket | None,
        founding: Founding | None,
        timeout: float,
        via: Sequence[str],
        private: bool | str | Path = False,
    ) -> Self:
        loop = OwnLoop(model, evaluate=evaluate, samples=samples)
        entropy = RealHost().entropy
        with ExitStack() as stack:
            data = None if data_dir is None else DataDir(Path(data_dir))
            snapshot = psk = record = None
            if data is None:
                identity = Identity(entropy(32))
                if private:
                    psk = (
                        entropy(swarm_key.SIZE) if private is True else swarm_key.load_or_create(Path(private), entropy)
                    )
            else:
                data.create()
                stack.enter_context(data.locked())
                identity = data.identity(entropy)
                snapshot = data.read_dht()
                record = data.read_record()
                if record is not None and ticket is None:
                    ticket = Ticket.parse(record.ticket)
                if ticket is None and private:
                    psk = data.make_private(None if private is True else Path(private), entropy)
                elif ticket is None:
                    psk = data.swarm_key()
            config = NodeConfig(
                bind=parse_hosts([host] if host else (), port),
                folder=None if data is None else data.run_path,
                documents=None if data is None else data.documents_path,
                founding=founding,
                ticket=ticket,
                psk=psk,
                via=parse_via([*via, *(record.via if record is not None else ())]),
                traversal=Traversal(),
                map_port=True,
                time_budget=time_budget,
                evaluate_every=0 if evaluate is None else 1,
                snapshot=snapshot,
                join_timeout=timeout,
            )
            swarm = cls(identity, config, loop, data)
            swarm._host = host
            swarm._locks = stack.pop_all()
        swarm._thread.start()
        swarm._wait_for_node()
        return swarm

    # -- for the loop --------------------------------------------------------------------------------------------------

    def step(self, samples: int | None = None, loss: float | Tensor | None = None) -> bool:
        """Call after each optimiser step. Blocks at the end of a round while weights are exchanged.

        ``samples``: in this step; ``loss``: shown to people. True while the run goes on; afterwards the loop may go on
        alone. Raises what ended the node, if it failed.
        """
        return self._loop.step(samples, loss)

    @property
    def ticket(self) -> str:
        """The text with which others join, through this node."""
        ticket = self._node.ticket() if self._node is not None else None
        return "" if ticket is None else ticket.encode()

    @property
    def peer(self) -> str:
        """This peer's id."""
        return self._identity.peer_id.text

    @property
    def finished(self) -> bool:
        """Whether all rounds of a finite run are done."""
        return self._node is not None and self._node.outcome == "finished"

    @property
    def reports(self) -> list[RoundReport]:
        """One report per committed round so far."""
        run = self._node.run_here if self._node is not None else None
        return [] if run is None else run.reports

    def status(self) -> RunStatus | None:
        """The moment, as ``shoal status`` shows it."""
        return self._node.status() if self._node is not None else None

    def close(self) -> None:
        """Say goodbye and end the node; within about two seconds. The model stays as it is."""
        if self._node is not None and self._token is not None and self._thread.is_alive():
            try:
                self._token.run_sync_soon(self._node.stop)
            except trio.RunFinishedError:
                pass
            # The node may be about to read the model: that is done here, on the loop's thread.
            self._loop.serve_until_closed()
        self._thread.join(defaults.SHUTDOWN)
        self._locks.close()

    def __enter__(self) -> Self:
        try:
            self._loop.wait_for_grant()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- the node's thread ---------------------------------------------------------------------------------------------

    def _wait_for_node(self) -> None:
        self._ready.wait()
        if self._failure is not None:
            self._thread.join()
            self._locks.close()
            raise self._failure

    def _main(self) -> None:
        failure: BaseException | None = None
        sys.setswitchinterval(defaults.SWITCH_INTERVAL)
        try:
            trio.run(self._run)
        except BaseException as error:  # noqa: BLE001  # boundary: raised on the loop's thread, in step()
            failure = first_error(error)
        self._failure = failure
        self._loop.close(failure)
        self._ready.set()

    async def _run(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        node = Node(RealHost(), self._identity, self._config, task=OwnTask(self._loop), trainer=self._loop)
        async with trio.open_nursery() as nursery:
            await nursery.start(node.run)
            if self._data is not None:
                ticket = node.ticket()
                assert ticket is not None and node.signed is not None
                founder = node.signed.open().founder == self._identity.peer_id
                port = next((address.port for address in node.endpoint.addresses()), 0)
                via = tuple(map(str, self._config.via))
                self._data.write_record(NodeRecord(ticket.encode(), "", self._host, port, founder, via))
            self._node = node
            self._ready.set()
