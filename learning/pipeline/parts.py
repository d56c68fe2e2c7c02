"""The runs of stages: how one follows from the run of the whole, and whether one that somebody names does."""

from __future__ import annotations

import attrs

from ...transport.errors import DecodeError
from ..spec import ParameterSpec, RunSpec, SignedSpec
from . import defaults

#: What is a stage's own: its first holder, when, what it begins with; all else is as the founder of the whole signed.
_OWN = ("parameters", "founder", "created", "min_peers", "rounds", "origin", "part")


def parameters_of(whole: RunSpec, stage: int) -> tuple[ParameterSpec, ...]:
    """Of a stage, by their names in it: the whole names them with the number of the stage in front."""
    front = f"{stage}."
    return tuple(
        attrs.evolve(each, name=each.name.removeprefix(front))
        for each in whole.parameters
        if each.name.startswith(front)
    )


def part_fault(run: bytes, whole: RunSpec, signed: SignedSpec, stage: int, generation: int) -> str | None:
    """Why ``signed`` is not the spec of ``stage`` of the run ``run`` in this ``generation``; None when it is."""
    try:
        spec = signed.open()
    except DecodeError as error:
        return str(error)
    of = spec.part
    if of is None or (of.whole, of.stage, of.generation) != (run, stage, generation):
        return "it is of something else"
    if of.rate != (1.0 if generation == 0 else defaults.RECOVERED_RATE):
        return f"it learns at {of.rate} times the rate"
    if spec.parameters != parameters_of(whole, stage):
        return "its parameters are not those of the stage"
    differ = [
        name
        for name in (field.name for field in attrs.fields(RunSpec))
        if name not in _OWN and getattr(spec, name) != getattr(whole, name)
    ]
    return f"it differs from the whole in {', '.join(differ)}" if differ else None
