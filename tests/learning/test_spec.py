"""Run specs: signed by the founder, and never a name of code."""

from __future__ import annotations

import attrs
import pytest

from shoal.learning.admission import admission_of
from shoal.learning.spec import MAX_ADMISSION, BadSpec, ParameterSpec, RunSpec, SignedSpec
from shoal.transport.errors import ConfigError, DecodeError
from shoal.transport.identity import Identity

FOUNDER = Identity(b"\x01" * 32)

SPEC = RunSpec(
    task="digits",
    task_hash=b"h" * 32,
    strategy="diloco",
    strategy_args=(("inner_steps", 20.0),),
    seed=1,
    mode="strict",
    group=0,
    min_peers=1,
    rounds=0,
    parameters=(ParameterSpec("layer.weight", (10, 64), "float32"), ParameterSpec("scale", (), "float32")),
    founder=FOUNDER.peer_id,
    created=1.8e9,
)


def test_a_signed_spec_opens_to_what_was_signed() -> None:
    signed = SignedSpec.sign(FOUNDER, SPEC)
    assert signed.open() == SPEC
    assert len(signed.run_id) == 32


@pytest.mark.parametrize("admission", [-1, MAX_ADMISSION + 1])
def test_a_spec_with_a_trial_that_cannot_be_is_refused(admission: int) -> None:
    with pytest.raises(BadSpec, match="rounds on trial"):
        SignedSpec.sign(FOUNDER, attrs.evolve(SPEC, admission=admission)).open()


def test_runs_with_a_rule_against_liars_have_a_trial_unless_told_otherwise() -> None:
    assert admission_of(None, "mean", True) == 0
    assert admission_of(None, "median", True) == 3
    assert admission_of(0, "median", True) == 0
    assert admission_of(7, "mean", True) == 7
    with pytest.raises(ConfigError, match="it is 0 to 1000"):
        admission_of(1001, "median", True)
    with pytest.raises(ConfigError, match="admission must be 0"):
        admission_of(1, "mean", False)


def test_another_founder_time_or_seed_makes_another_run() -> None:
    ids = {
        SignedSpec.sign(FOUNDER, spec).run_id
        for spec in (SPEC, attrs.evolve(SPEC, seed=2), attrs.evolve(SPEC, created=1.8e9 + 1))
    }
    assert len(ids) == 3


@pytest.mark.parametrize("task", ["my_task:Digits", "my_task.Digits", "a.b:C", "/etc/passwd", "../x", "a/b", ":", "."])
def test_a_spec_that_names_a_module_or_a_file_is_refused(task: str) -> None:
    signed = SignedSpec.sign(FOUNDER, attrs.evolve(SPEC, task=task))
    with pytest.raises(DecodeError, match="names a module.*the network never names code") as caught:
        signed.open()
    assert repr(task) in str(caught.value)


def test_a_spec_signed_by_somebody_else_than_its_founder_is_refused() -> None:
    signed = SignedSpec.sign(Identity(b"\x02" * 32), SPEC)
    with pytest.raises(DecodeError, match="wrong signature"):
        signed.open()


def test_a_spec_altered_in_any_byte_is_refused_and_names_another_run() -> None:
    signed = SignedSpec.sign(FOUNDER, SPEC)
    for at in range(len(signed.spec)):
        altered = attrs.evolve(signed, spec=signed.spec[:at] + bytes([signed.spec[at] ^ 1]) + signed.spec[at + 1 :])
        assert altered.run_id != signed.run_id
        with pytest.raises(DecodeError):
            altered.open()


def test_an_unknown_mode_is_refused_by_name() -> None:
    with pytest.raises(DecodeError, match="unknown mode 'eventual'"):
        SignedSpec.sign(FOUNDER, attrs.evolve(SPEC, mode="eventual")).open()


@pytest.mark.parametrize("codec", ["", "x" * 65, "\x1b[2Jint8", "int8\n", "ｉｎｔ８"])
def test_a_codec_that_is_no_short_printable_name_is_refused(codec: str) -> None:
    with pytest.raises(DecodeError, match="run spec with the codec"):
        SignedSpec.sign(FOUNDER, attrs.evolve(SPEC, codec=codec)).open()


@pytest.mark.parametrize("aggregator", ["", "x" * 257, "\x1b[2Jmean", "mean\n", "ｍｅａｎ"])
def test_an_aggregator_that_is_no_short_printable_text_is_refused(aggregator: str) -> None:
    with pytest.raises(DecodeError, match="run spec with the aggregator"):
        SignedSpec.sign(FOUNDER, attrs.evolve(SPEC, aggregator=aggregator)).open()


@pytest.mark.parametrize("topology", ["x" * 65, "\x1b[2Jring", "ring\n", "ｒｉｎｇ"])
def test_a_topology_that_is_no_short_printable_name_is_refused(topology: str) -> None:
    with pytest.raises(DecodeError, match="run spec with the topology"):
        SignedSpec.sign(FOUNDER, attrs.evolve(SPEC, topology=topology)).open()


def test_a_parameter_is_shown_with_its_shape_and_type() -> None:
    assert [str(parameter) for parameter in SPEC.parameters] == ["layer.weight 10x64 float32", "scale scalar float32"]
