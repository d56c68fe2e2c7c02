"""Founding a run: what was asked for and what the task says, as a spec."""

from __future__ import annotations

from pathlib import Path

import attrs
from torch import Tensor, nn

from ..learning import topologies
from ..learning.admission import admission_of
from ..learning.checkpoints import read_model
from ..learning.pipeline.rescue import check_recovery
from ..learning.pipeline.staged import signature_of_stages
from ..learning.placing import audit_of, rule_of
from ..learning.reduce.codecs import resolve as resolve_codec
from ..learning.spec import RunSpec, is_task_name
from ..learning.strategies import resolve as resolve_strategy
from ..learning.task import Task, signature, source_hash, title
from ..transport.errors import ConfigError
from ..transport.host import Host
from ..transport.identity import PeerId
from .stages import cut_of


@attrs.frozen
class Founding:
    """The run to found, as far as the task does not say it. See :class:`shoal.learning.spec.RunSpec`.

    ``audit``: None for :data:`shoal.learning.defaults.AUDIT_RATE` with any rule but the mean, and none with that;
    ``admission``: likewise for :data:`~shoal.learning.defaults.ADMISSION`. ``stages``: parts that the model is cut
    into, 0: it is not; ``micro``: micro-batches of a step, 0: as many as stages; ``swap``, ``activations``,
    ``recovery``: see :class:`shoal.learning.spec.Pipeline`.
    """

    strategy: str = "diloco"
    strategy_args: tuple[tuple[str, float], ...] = ()
    mode: str = "available"
    group: int = 0
    min_peers: int = 1
    rounds: int = 0
    seed: int = 0
    codec: str = "fp32"
    topology: str = ""
    aggregator: str = "mean"
    audit: float | None = None
    admission: int | None = None
    stages: int = 0
    micro: int = 0
    swap: bool = False
    activations: str = "fp32"
    recovery: str = "checkfree"


async def found(
    host: Host,
    founding: Founding,
    task: Task,
    model: nn.Module | None,
    path: Path | None,
    founder: PeerId,
    *,
    apart: bool = False,
) -> tuple[RunSpec, dict[str, Tensor] | None]:
    """The spec of a run on ``task``, and the state that it begins with, if ``path`` names one.

    ``model``: of an own training loop. ``apart``: this node trains in a process of its own. Raises
    :class:`ConfigError` for wrong arguments, before anything is signed.
    """
    arguments = {**task.recommended.get(founding.strategy, {}), **dict(founding.strategy_args)}
    # Wrong arguments fail here, before anything is signed.
    strategy = resolve_strategy(founding.strategy, arguments)
    resolve_codec(founding.codec)
    topologies.check_strategy(founding.topology, founding.strategy, strategy.replicated, strategy.group)
    pipeline = cut_of(founding, own_loop=model is not None, origin=path is not None, apart=apart)
    if pipeline is not None:
        await host.run_blocking(check_recovery, task, pipeline)
        parameters = await host.run_blocking(signature_of_stages, task, pipeline.stages)
    elif model is not None:
        parameters = signature(model)
    else:
        parameters = signature(await host.run_blocking(task.model))
    name = title(task)
    if not is_task_name(name):
        raise ConfigError(f"the task's name {name!r} cannot travel: use letters, digits, - and _ only (Task.name)")
    digest, origin = b"", None
    if path is not None:
        digest, origin = await host.run_blocking(read_model, path, parameters, founding.strategy)
    spec = RunSpec(
        task=name,
        task_hash=source_hash(task),
        strategy=founding.strategy,
        strategy_args=tuple(sorted(arguments.items())),
        seed=founding.seed,
        mode=founding.mode,
        group=founding.group,
        min_peers=founding.min_peers,
        rounds=founding.rounds,
        parameters=parameters,
        founder=founder,
        created=host.wall(),
        origin=digest,
        codec=founding.codec,
        topology=founding.topology,
        aggregator=founding.aggregator,
        audit=audit_of(founding.audit, founding.aggregator, founding.codec),
        admission=admission_of(founding.admission, founding.aggregator, strategy.replicated),
        pipeline=pipeline,
    )
    rule_of(spec, strategy)
    return spec, origin
