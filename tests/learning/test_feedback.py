"""Error feedback and EControl: what was dropped is sent later, once, and only for rounds that counted."""

from __future__ import annotations

import threading
import time
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from shoal.learning import exact
from shoal.learning.reduce import kernels, pure_kernels
from shoal.learning.reduce.codecs import (
    BF16,
    E3M0,
    FP16,
    FP32,
    INT8,
    Codec,
    Control,
    EControl,
    ErrorFeedback,
    TopK,
    combine,
    encode_compensated,
)
from shoal.learning.reduce.coding import Coding
from shoal.transport.errors import ProtocolMisuse

CODECS: list[Codec] = [FP32, FP16, BF16, INT8, E3M0, TopK(Fraction(1, 10))]
each = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)


@pytest.fixture(params=["in use", "pure"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "pure":
        monkeypatch.setattr(kernels, "active", pure_kernels)


def normal(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def sent(codec: Codec, data: bytes | bytearray, n: int) -> Tensor:
    out = torch.empty(n)
    codec.decode(data, out)
    return out


@each
def test_the_residual_is_what_was_not_sent(codec: Codec, path: None) -> None:
    n = 3001
    vector, residual, new = normal(n), normal(n, 1) * 0.01, torch.empty(n)
    code = bytearray(codec.wire_size(n))
    encode_compensated(codec, vector, residual, new, code)
    whole = exact.add(vector, residual)
    plain = bytearray(len(code))
    codec.encode(whole, plain)
    assert code == plain
    assert torch.equal(new, exact.sub(whole, sent(codec, code, n)))
    encode_compensated(codec, vector, residual, residual, code)  # in place
    assert torch.equal(residual, new)


@each
def test_with_feedback_all_that_was_given_arrives_in_the_end(codec: Codec, path: None) -> None:
    n, rounds = 2048, 30
    feedback = ErrorFeedback(codec, n)
    given_, arrived, without = torch.zeros(n), torch.zeros(n), torch.zeros(n)
    largest = 0.0
    for number in range(rounds):
        vector = normal(n, number) + 0.3
        code = bytearray(codec.wire_size(n))
        feedback.encode(vector, 0, code)
        feedback.commit()
        given_ += vector
        arrived += sent(codec, code, n)
        codec.encode(vector, code)
        without += sent(codec, code, n)
        largest = max(largest, feedback.residual.abs().max().item())
    # Equal to a rounding error; the residual does not grow.
    assert torch.allclose(arrived + feedback.residual, given_, atol=1e-4)
    if codec is not FP32:
        assert (arrived - given_).norm() < 0.6 * (without - given_).norm()


@each
def test_until_a_round_is_settled_a_part_gives_the_same_bytes(codec: Codec) -> None:
    n = 5000
    feedback = ErrorFeedback(codec, n)
    code, again, other = (bytearray(codec.wire_size(n)) for _ in range(3))
    feedback.encode(normal(n), 0, code)
    feedback.commit()
    before = feedback.state()["residual"]
    feedback.encode(normal(n, 1), 0, code)
    feedback.encode(normal(n, 1), 0, again)
    assert code == again
    feedback.rollback()
    assert torch.equal(feedback.residual, before)
    feedback.encode(normal(n, 1), 0, other)
    assert other == code
    feedback.commit()
    if codec is not FP32:
        assert not torch.equal(feedback.residual, before)


@pytest.mark.parametrize("codec", [INT8, E3M0], ids=lambda codec: codec.name)
def test_a_vector_sent_in_parts_owes_what_the_whole_does(codec: Codec) -> None:
    n = 5000
    whole, parts = ErrorFeedback(codec, n), ErrorFeedback(codec, n)
    for number in range(3):
        vector = normal(n, number)
        code = bytearray(codec.wire_size(n))
        whole.encode(vector, 0, code)
        whole.commit()
        for start, stop in ((2048, n), (0, 1024), (1024, 2048), (2048, 3072), (3072, n)):  # the first is cut anew
            part = bytearray(codec.wire_size(stop - start))
            parts.encode(vector[start:stop], start, part)
            assert part == code[codec.wire_size(start) :][: len(part)]
        parts.commit()
        assert torch.equal(parts.residual, whole.residual)
    parts.encode(normal(1024), 0, bytearray(codec.wire_size(1024)))
    parts.commit()
    assert torch.equal(parts.residual[1024:], whole.residual[1024:])
    assert not torch.equal(parts.residual[:1024], whole.residual[:1024])


@pytest.mark.parametrize("make", [ErrorFeedback, EControl])
def test_parts_outside_and_values_not_finite_are_refused_and_leave_nothing(
    make: type[ErrorFeedback] | type[EControl],
) -> None:
    feedback = make(INT8, 2000)
    before = feedback.state()
    for start, n in ((-1, 10), (1999, 2), (2001, 0)):
        with pytest.raises(ProtocolMisuse, match="of a vector of 2000"):
            feedback.encode(torch.ones(n), start, bytearray(INT8.wire_size(n)))
    with pytest.raises(ProtocolMisuse, match="NaN at 3"):
        feedback.encode(torch.tensor([0.0, 1.0, 2.0, float("nan")]), 0, bytearray(8))
    feedback.commit()
    assert all(torch.equal(value, before[name]) for name, value in feedback.state().items())


def test_a_sum_that_overflows_is_said_to() -> None:
    feedback = ErrorFeedback(INT8, 1)
    feedback.load({"residual": torch.tensor([3e38])})
    with pytest.raises(ProtocolMisuse, match="the sum overflows"):
        feedback.encode(torch.tensor([3e38]), 0, bytearray(5))


@pytest.mark.parametrize("make", [ErrorFeedback, EControl])
def test_a_state_that_was_saved_goes_on_with_the_same_bytes(make: type[ErrorFeedback] | type[EControl]) -> None:
    codec = TopK(Fraction(1, 10))
    one = make(codec, 500)
    for number in range(3):
        one.encode(normal(500, number), 0, bytearray(codec.wire_size(500)))
        one.commit()
    other = make(codec, 500)
    other.load(one.state())
    codes = [bytearray(codec.wire_size(500)) for _ in range(2)]
    for feedback, code in zip((one, other), codes, strict=True):
        feedback.encode(normal(500, 9), 0, code)
    assert codes[0] == codes[1]
    one.reset()
    assert all(not value.any() for value in one.state().values())


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ({}, "a state of nothing, expected residual"),
        ({"residual": torch.zeros(3)}, r"residual of \(3,\) torch.float32, expected \(4,\)"),
        ({"residual": torch.zeros(4).double()}, "float64"),
        ({"residual": torch.tensor([0.0, 0.0, float("inf"), 0.0])}, "residual is not finite: infinity at 2"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(state: dict[str, Tensor], expected: str) -> None:
    with pytest.raises(ProtocolMisuse, match=expected):
        ErrorFeedback(INT8, 4).load(state)


# --- EControl ---------------------------------------------------------------------------------------------------------


class Quadratics:
    """Ten contributors with ``f_i(x) = 1/2 (x - c_i)' H_i (x - c_i)``, each with another optimum; d = 50."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(8)
        self.hessians, self.centres = [], []
        for _ in range(10):
            basis = torch.linalg.qr(torch.randn(50, 50, generator=generator, dtype=torch.float64))[0]
            values = torch.rand(50, generator=generator, dtype=torch.float64) * 0.9 + 0.1
            self.hessians.append((basis * values) @ basis.T)
            self.centres.append(torch.randn(50, generator=generator, dtype=torch.float64))
        total = torch.stack(self.hessians).sum(0)
        moments = torch.stack([h @ c for h, c in zip(self.hessians, self.centres, strict=True)]).sum(0)
        self.optimum = torch.linalg.solve(total, moments)

    def gradients(self, x: Tensor) -> list[Tensor]:
        return [(h @ (x.double() - c)).float() for h, c in zip(self.hessians, self.centres, strict=True)]

    def error(self, x: Tensor) -> float:
        return float((x.double() - self.optimum).norm() / self.optimum.norm())


def mean_of(codes: list[bytearray], codec: Codec) -> Tensor:
    out = torch.empty(50)
    combine([(codec, code) for code in codes], [1.0] * len(codes), out)
    return out


TOP5 = TopK(Fraction(1, 10))


def run(how: str, rate: float, steps: int, eta: float = 0.05) -> float:
    """The relative error after ``steps``; contributions and mean go through the codec's bytes."""
    problem = Quadratics()
    x = torch.zeros(50)
    feedbacks = [ErrorFeedback(TOP5, 50) for _ in range(10)]
    controls = [EControl(TOP5, 50, eta) for _ in range(10)]
    control = Control(50)
    for _ in range(steps):
        codes = [bytearray(TOP5.wire_size(50)) for _ in range(10)]
        for number, (gradient, code) in enumerate(zip(problem.gradients(x), codes, strict=True)):
            if how == "top-k alone":
                TOP5.encode(gradient, code)
            elif how == "error feedback":
                feedbacks[number].encode(gradient, 0, code)
                feedbacks[number].commit()
            else:
                controls[number].encode(gradient, 0, code)
                controls[number].commit()
        direction = mean_of(codes, TOP5)
        if how == "EControl":
            direction = control.step(direction)
        x = x - rate * direction
        if not x.isfinite().all() or x.norm() > 1e6:
            return float("inf")
    return problem.error(x)


def test_top_k_alone_stalls_where_contributors_differ() -> None:
    assert run("top-k alone", 0.1, 300) > 0.3


def test_error_feedback_stalls_in_proportion_to_the_step() -> None:
    small, large = run("error feedback", 0.02, 1200), run("error feedback", 0.3, 200)
    assert small > 1e-3
    assert large > 3 * small


def test_econtrol_converges_to_the_precision_of_float32() -> None:
    assert run("EControl", 0.1, 500) < 1e-5


def test_econtrol_with_a_tiny_eta_is_slow_and_with_a_large_one_diverges() -> None:
    slow, right = run("EControl", 0.1, 300, eta=0.00025), run("EControl", 0.1, 300)
    assert slow > 10 * right
    assert run("EControl", 0.1, 1000, eta=0.8) > 1.0


def test_all_that_econtrol_holds_back_is_known() -> None:
    # h is what was sent in all, and e what is missing: e_T = sum (g_t - h_{t+1}).
    control = EControl(TOP5, 50)
    owed, total = torch.zeros(50), torch.zeros(50)
    for number in range(20):
        code = bytearray(TOP5.wire_size(50))
        control.encode(normal(50, number), 0, code)
        control.commit()
        total += sent(TOP5, code, 50)
        owed += normal(50, number) - total
        assert torch.allclose(control.control, total, atol=1e-5)
        assert torch.allclose(control.error, owed, atol=1e-4)


def test_econtrol_may_send_a_part_again_and_cut_anew() -> None:
    codec = TopK(Fraction(1, 10))
    once, again = EControl(codec, 200), EControl(codec, 200)
    for number in range(3):
        vector = normal(200, number)
        for start, stop in ((0, 50), (50, 200)):
            once.encode(vector[start:stop], start, bytearray(codec.wire_size(stop - start)))
        once.commit()
        for start, stop in ((0, 200), (0, 50), (50, 200), (50, 200)):  # cut anew, and once more
            again.encode(vector[start:stop], start, bytearray(codec.wire_size(stop - start)))
        again.commit()
        assert all(torch.equal(value, again.state()[name]) for name, value in once.state().items())
    again.encode(normal(200), 0, bytearray(codec.wire_size(200)))
    again.rollback()
    again.commit()
    assert all(torch.equal(value, again.state()[name]) for name, value in once.state().items())


def test_members_of_econtrol_apply_the_same_bits() -> None:
    one, other = Control(50), Control(50)
    for number in range(5):
        assert torch.equal(one.step(normal(50, number)), other.step(normal(50, number)))
    third = Control(50)
    third.load(one.state())
    assert torch.equal(third.step(normal(50, 7)), other.step(normal(50, 7)))
    with pytest.raises(ProtocolMisuse):
        third.load({"control": torch.zeros(49)})
    third.reset()
    assert not third.value.any()


@pytest.mark.parametrize("eta", [0.0, -1.0, 1.5, float("nan")])
def test_steps_of_no_sense_are_refused(eta: float) -> None:
    with pytest.raises(ProtocolMisuse, match="EControl with eta"):
        EControl(TOP5, 50, eta)


def test_a_feedback_codes_for_one_thread_at_a_time() -> None:
    """The slices of one contribution are coded in several threads."""

    class Watched:
        codec = INT8
        inside = most = 0

        def encode(self, part: torch.Tensor, start: int, out: object) -> None:
            self.inside += 1
            self.most = max(self.most, self.inside)
            time.sleep(1e-3)
            self.inside -= 1

        def commit(self) -> None: ...

        def rollback(self) -> None: ...

    feedback = Watched()
    coding = Coding.of("int8", feedback)
    threads = [threading.Thread(target=coding.encode, args=(torch.zeros(8), 0, bytearray(12))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert feedback.most == 1
