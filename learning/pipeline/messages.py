"""What peers of a run with stages say to each other. Every message names the whole run (``run``)."""

from __future__ import annotations

import attrs

from ...transport.address import SignedPeerRecord
from ...transport.frames import Priority
from ...transport.identity import PeerId
from ...transport.rpc import Method
from ..rounds.bounded import Bounded
from ..rounds.messages import Signed
from ..rounds.methods import Ack
from ..spec import MAX_STAGES, SignedSpec
from ..sync import HeadInfo
from . import defaults

#: What a peer is doing: it has no stage; it loads one; it has the weights of one and trains it; the run is over.
#: ``loading``: a stage that others have; ``resuming``: one as it was kept here; ``ready``: has the stage and trains it.
STATES = ("spare", "loading", "resuming", "ready", "finished")
#: Of who is at a stage.
SEATED = STATES[1:4]


@attrs.frozen
class Seat(Bounded):
    """``peer`` is to hold ``stage``."""

    peer: PeerId
    stage: int


@attrs.frozen
class Beat(Bounded):
    """What a peer is doing, told to all others of the run whenever it changes, and now and then.

    ``stage``: of ``state`` loading or ready, else without meaning. ``part``: id of the stage's own run, empty before it
    has one. ``generation``: how often the stage was lost. ``step``: the step of training it is at. ``rounds``: done by
    the stage. ``rate``: samples that it computes in a second at its stage, thousandths, 0: not known; ``memory``: bytes
    it can use, 0: not known. ``plan``: who begins with which stage, of the founder only. ``into``, ``out``: bytes of
    activations that come to it and that it gives on for a sample; ``line``: bytes a second that its uplink carries; all
    three 0: not known.
    """

    run: bytes
    state: str
    stage: int
    part: bytes
    generation: int
    step: int
    rounds: int
    rate: int
    memory: int
    plan: tuple[Seat, ...] = ()
    into: int = 0
    out: int = 0
    line: int = 0

    def __attrs_post_init__(self) -> None:
        Bounded.__attrs_post_init__(self)
        if self.state not in STATES:
            raise ValueError(f"the state {self.state[:32]!r}")
        if len(self.run) != 32 or len(self.part) not in (0, 32) or self.stage >= MAX_STAGES:
            raise ValueError("a beat of no run, or of no stage")
        if len(self.plan) > defaults.MAX_CREW or any(seat.stage >= MAX_STAGES for seat in self.plan):
            raise ValueError(f"a plan with {len(self.plan)} seats, or for more stages than there may be")


@attrs.frozen
class AskCrew:
    """Who takes part in ``run``?"""

    run: bytes


@attrs.frozen
class CrewInfo:
    """``spec``: of the whole run. ``contacts``: records of those that take part, the sender's own among them."""

    spec: SignedSpec
    contacts: tuple[SignedPeerRecord, ...]

    def __attrs_post_init__(self) -> None:
        if len(self.contacts) > defaults.MAX_CREW:
            raise ValueError(f"{len(self.contacts)} contacts")


@attrs.frozen
class AskPart:
    """The spec of the stage's run ``part``, which the receiver says to be in."""

    run: bytes
    part: bytes


@attrs.frozen
class PartInfo:
    spec: SignedSpec


@attrs.frozen
class Shape(Bounded):
    """Of a tensor that travels in a body: ``size`` bytes of it, in ``codec`` (floats) or as they are (``dtype``)."""

    dims: tuple[int, ...]
    dtype: str
    codec: str
    size: int

    def __attrs_post_init__(self) -> None:
        Bounded.__attrs_post_init__(self)
        if len(self.dims) > defaults.MAX_DIMS or len(self.dtype) > 16 or len(self.codec) > 64:
            raise ValueError("a tensor with too many dimensions, or of no dtype")
        count = 1
        for dim in self.dims:
            count *= dim
        if count > defaults.MAX_ELEMENTS or self.size > defaults.MAX_BODY:
            raise ValueError(f"a tensor of {count} elements, {self.size} bytes")


@attrs.frozen
class Key(Bounded):
    """A micro-batch: the ``index``-th of the ``step``-th step of the peer that feeds it."""

    feeder: PeerId
    step: int
    index: int


@attrs.frozen
class Hop(Bounded):
    """A micro-batch went through ``peer``, under the number that its sender gave the attempt."""

    peer: PeerId
    token: int


@attrs.frozen
class Push(Bounded):
    """A micro-batch for the stage ``order[at]``. ``token``: the sender's number for this attempt, never used again.

    The body: the tensors ``shapes`` in their order, first what the stage computes with, then those of the batch, whose
    nesting ``nest`` describes (:mod:`.cargo`). ``samples``: in it.
    """

    run: bytes
    key: Key
    token: int
    order: tuple[int, ...]
    at: int
    samples: int
    shapes: tuple[Shape, ...]
    nest: str

    def __attrs_post_init__(self) -> None:
        Bounded.__attrs_post_init__(self)
        if not 0 < self.at < len(self.order) <= MAX_STAGES or sorted(self.order) != list(range(len(self.order))):
            raise ValueError("a way through the stages that is none")
        if not 1 <= len(self.shapes) <= defaults.MAX_TENSORS or self.samples < 1:
            raise ValueError(f"a micro-batch with {len(self.shapes)} tensors and {self.samples} samples")


@attrs.frozen
class Pushed(Bounded):
    """``late``: the receiver has done with that step, and is at ``step``: nothing was taken."""

    late: bool
    step: int


@attrs.frozen
class Pull(Bounded):
    """The gradient of what ``key`` brought under ``token``, in the body. ``path``: whom it went through from there on,
    the sender first. ``loss``: of the micro-batch, summed over its samples."""

    run: bytes
    key: Key
    token: int
    path: tuple[Hop, ...]
    shape: Shape
    loss: float

    def __attrs_post_init__(self) -> None:
        Bounded.__attrs_post_init__(self)
        if not 1 <= len(self.path) < MAX_STAGES:
            raise ValueError(f"a path through {len(self.path)} peers")


@attrs.frozen
class Won(Bounded):
    """The way that one micro-batch took, as it counts."""

    index: int
    path: tuple[Hop, ...]


@attrs.frozen
class StepDone(Bounded):
    """The sender has the gradients of all micro-batches of its step: exactly these ways count."""

    run: bytes
    step: int
    won: tuple[Won, ...]

    def __attrs_post_init__(self) -> None:
        Bounded.__attrs_post_init__(self)
        if len(self.won) > defaults.MAX_MICRO_BATCHES:
            raise ValueError(f"a step of {len(self.won)} micro-batches")


@attrs.frozen
class Look(Bounded):
    """Compute the stage ``order[at]`` and all after it on the tensor in the body, without gradients (evaluation).

    The answer's body is the last stage's output, behind its length and its packed :class:`Shape`.
    """

    run: bytes
    order: tuple[int, ...]
    at: int
    shape: Shape

    def __attrs_post_init__(self) -> None:
        Bounded.__attrs_post_init__(self)
        if not 0 < self.at < len(self.order) <= MAX_STAGES or sorted(self.order) != list(range(len(self.order))):
            raise ValueError("a way through the stages that is none")


@attrs.frozen
class AskStage(Bounded):
    """The weights of ``stage``, which the receiver holds, as they are now."""

    run: bytes
    stage: int


@attrs.frozen
class StageState(Bounded):
    """``size`` fp32 elements follow from the answer's body. ``norm``: L2 norm of the last gradient.
    ``rounds``, ``step``: done. ``digest``: SHA-256 of the body."""

    stage: int
    size: int
    norm: float
    rounds: int
    step: int
    digest: bytes


@attrs.frozen
class AskKept(Bounded):
    """Which settled state of ``stage`` do you have?"""

    run: bytes
    stage: int


@attrs.frozen
class Kept(Bounded):
    """The newest settled state of a stage that the sender has, as a blob: ``head.digest`` is its id, ``head.record``
    the commit that it is the state after, with its proof. ``signed``: holders that say so
    (:func:`.copies.state_bytes`). ``age``: seconds since they did, by the sender's clock."""

    head: HeadInfo
    signed: tuple[Signed, ...]
    age: float

    def __attrs_post_init__(self) -> None:
        Bounded.__attrs_post_init__(self)
        if len(self.signed) > defaults.MAX_CREW or self.head.contacts or self.head.view or not 0.0 <= self.age < 1e12:
            raise ValueError("a state with too many signatures, with peers, or from the future")
        if not 0 <= self.head.settled < 1 << 63:
            raise ValueError(f"a state after round {self.head.settled}")


BEAT = Method("stages.beat", Beat, Beat)
CREW = Method("stages.crew", AskCrew, CrewInfo)
PART = Method("stages.part", AskPart, PartInfo)
PUSH = Method("stages.push", Push, Pushed, Priority.BULK)
PULL = Method("stages.pull", Pull, Ack, Priority.BULK)
STEP = Method("stages.step", StepDone, Ack)
LOOK = Method("stages.look", Look, Ack, Priority.BULK)
STAGE = Method("stages.weights", AskStage, StageState, Priority.BULK)
KEPT = Method("stages.kept", AskKept, Kept)
