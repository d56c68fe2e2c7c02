"""What a run is: the founder's signed spec, from which every joiner builds the same thing."""

from __future__ import annotations

import hashlib

import attrs

from ..transport.errors import DecodeError
from ..transport.identity import Identity, PeerId
from ..transport.wire import pack, unpack

MODES = ("available", "strict")

#: Characters of a task's name.
MAX_TASK_NAME = 64


#: Characters of a codec's name. Whether there is such a codec is seen where one is needed: this module loads no torch.
MAX_CODEC_NAME = 64

#: Slices at which each peer looks in a round, at most.
MAX_AUDIT = 16.0

#: Rounds of a trial, at most.
MAX_ADMISSION = 1000

#: Characters of a topology's text, likewise.
MAX_TOPOLOGY = 64

#: Characters of an aggregator's text, likewise.
MAX_AGGREGATOR = 256


#: Stages of a model, at most; micro-batches of a step, at most.
MAX_STAGES, MAX_MICRO = 64, 256

#: What a stage that nobody holds goes on with, where that can be had (:mod:`.pipeline.rescue`).
RECOVERIES = ("checkfree", "kept", "copy", "skip", "random")


class BadSpec(DecodeError):
    """A spec that its founder has signed and nobody can follow: asking somebody else for it does not help."""


@attrs.frozen
class ParameterSpec:
    """One parameter or persistent buffer of a model. ``dtype`` is torch's name without the prefix: ``float32``."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.name} {'x'.join(map(str, self.shape)) or 'scalar'} {self.dtype}"


@attrs.frozen
class Pipeline:
    """How a model is cut over peers (:mod:`.pipeline`). ``stages``: parts of it. ``micro``: micro-batches of a step.
    ``swap``: half of them pass the first two and the last two inner stages in the other order (CheckFree+).
    ``codec``: how activations and their gradients travel. ``recovery``: one of :data:`RECOVERIES`."""

    stages: int
    micro: int
    swap: bool = False
    codec: str = "fp32"
    recovery: str = "checkfree"


@attrs.frozen
class StageOf:
    """This run is that of one stage of the run ``whole``. ``generation``: how often the stage was lost before.
    ``rate``: times as great its learning rate is as the task's, for it was recovered. ``step``: of training,
    at which its first round begins."""

    whole: bytes
    stage: int
    generation: int = 0
    rate: float = 1.0
    step: int = 0


@attrs.frozen
class RunSpec:
    """Everything that must be equal on all peers of a run.

    ``task``: the name of a task, never code to import. ``task_hash``: BLAKE2b-256 of its source (a
    difference is a warning). ``strategy_args``: ``(name, value)`` pairs. ``group``: peers in one group
    reduce, 0 for all of them. ``min_peers``: rounds begin once the roster has this many. ``rounds``: 0
    for endless. ``created``: Unix seconds. ``origin``: digest of the state that it begins with, empty for the founder's
    fresh model. ``codec``: how contributions and results of rounds travel, where a strategy says nothing else.
    ``aggregator``: the rule that combines contributions, see docs/aggregation.md. ``audit``: slices at which each peer
    looks in a round, in the mean, see docs/audits.md; 0: none, and nothing is signed. ``admission``: rounds in which a
    newcomer's work must be fit before it votes and has weight, see docs/byzantine.md; 0: it does at once. ``topology``:
    who meets whom in gossip, see :mod:`.topologies`; empty: random groups. ``pipeline``: the model is cut into stages,
    each of which has a run of its own, founded by its first holder, with ``part`` saying which one it is.
    """

    task: str
    task_hash: bytes
    strategy: str
    strategy_args: tuple[tuple[str, float], ...]
    seed: int
    mode: str
    group: int
    min_peers: int
    rounds: int
    parameters: tuple[ParameterSpec, ...]
    founder: PeerId
    created: float
    origin: bytes = b""
    codec: str = "fp32"
    aggregator: str = "mean"
    audit: float = 0.0
    admission: int = 0
    topology: str = ""
    pipeline: Pipeline | None = None
    part: StageOf | None = None


@attrs.frozen
class SignedSpec:
    """A packed :class:`RunSpec` and the founder's signature; the run id is the hash of the bytes."""

    spec: bytes
    signature: bytes

    _LABEL = b"shoal run spec v1\0"

    @classmethod
    def sign(cls, identity: Identity, spec: RunSpec) -> SignedSpec:
        data = pack(spec)
        return cls(data, identity.sign(cls._LABEL + data))

    @property
    def run_id(self) -> bytes:
        """32 bytes that name the run."""
        return hashlib.blake2b(self._LABEL + self.spec, digest_size=32).digest()

    def open(self) -> RunSpec:
        """Verify and decode. Raises :class:`DecodeError`, :class:`BadSpec` when the founder itself is to blame."""
        spec = unpack(RunSpec, self.spec)
        if not spec.founder.verify(self._LABEL + self.spec, self.signature):
            raise DecodeError("run spec with a wrong signature", peer=spec.founder.short)
        if spec.mode not in MODES:
            raise BadSpec(f"run spec with unknown mode {spec.mode[:32]!r}", peer=spec.founder.short)
        if not _is_plain(spec.codec, MAX_CODEC_NAME):
            raise BadSpec(f"run spec with the codec {spec.codec[:MAX_CODEC_NAME]!r}", peer=spec.founder.short)
        if not _is_plain(spec.aggregator, MAX_AGGREGATOR):
            raise BadSpec(f"run spec with the aggregator {spec.aggregator[:MAX_CODEC_NAME]!r}", peer=spec.founder.short)
        if spec.topology and not _is_plain(spec.topology, MAX_TOPOLOGY):
            raise BadSpec(f"run spec with the topology {spec.topology[:MAX_TOPOLOGY]!r}", peer=spec.founder.short)
        if any(c in spec.task for c in ":./\\"):
            # A spec only ever carries a display name. A name that looks importable is refused outright.
            raise BadSpec(
                f"run spec names a module ({spec.task[:MAX_TASK_NAME]!r}); the network never names code",
                peer=spec.founder.short,
            )
        if not is_task_name(spec.task):
            raise BadSpec(f"run spec with the task name {spec.task[:MAX_TASK_NAME]!r}", peer=spec.founder.short)
        if not 0 <= spec.audit <= MAX_AUDIT:
            raise BadSpec(f"run spec with {spec.audit} audits of each peer in a round", peer=spec.founder.short)
        if not 0 <= spec.admission <= MAX_ADMISSION:
            raise BadSpec(f"run spec with {spec.admission} rounds on trial", peer=spec.founder.short)
        if not (spec.min_peers >= 0 and spec.rounds >= 0 and spec.group >= 0):
            raise BadSpec("run spec with a negative number of peers or rounds", peer=spec.founder.short)
        wrong = _cut_fault(spec)
        if wrong is not None:
            raise BadSpec(f"run spec {wrong}", peer=spec.founder.short)
        return spec


def _cut_fault(spec: RunSpec) -> str | None:
    cut, part = spec.pipeline, spec.part
    if cut is not None and not (2 <= cut.stages <= MAX_STAGES and 1 <= cut.micro <= MAX_MICRO):
        return f"with {cut.stages} stages and {cut.micro} micro-batches"
    if cut is not None and not _is_plain(cut.codec, MAX_CODEC_NAME):
        return f"with the codec {cut.codec[:MAX_CODEC_NAME]!r} of activations"
    if cut is not None and cut.recovery not in RECOVERIES:
        return f"with the recovery {cut.recovery[:MAX_CODEC_NAME]!r} of stages"
    if part is not None and not (cut is not None and len(part.whole) == 32 and 0 <= part.stage < cut.stages):
        return "of a stage that no model has"
    if part is not None and not (
        0 <= part.generation < 1 << 31 and 0.0 < part.rate <= 1e3 and 0 <= part.step < 1 << 62
    ):
        return f"of a stage lost {part.generation} times, with {part.rate} times the learning rate"
    return None


def _is_plain(text: str, limit: int) -> bool:
    return 0 < len(text) <= limit and text.isascii() and text.isprintable()


def is_task_name(name: str) -> bool:
    """Whether ``name`` may travel as the display name of a task: letters, digits, - and _."""
    return 0 < len(name) <= MAX_TASK_NAME and name.replace("-", "").replace("_", "").isalnum()
