"""Tensors on their way into a reduce and back: layouts, dtypes, devices, staging, and what is refused."""

from __future__ import annotations

import threading
from collections import namedtuple
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from shoal.learning import defaults
from shoal.learning.reduce.staging import Copy, Direction, DirectLane, Lane, NoStreams, Pool, StagedLane, Streams, lane
from shoal.learning.reduce.tensors import DTYPES, Bundle, empty_vector
from shoal.learning.state import Layout, flatten_model, unflatten_into
from shoal.transport.errors import ConfigError

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
CUDA = pytest.param("cuda", marks=NEEDS_CUDA)


def staged(device: torch.device, direction: Direction) -> Lane:
    """The staging of a CUDA device, without one."""
    return StagedLane(direction, NoStreams(), Pool(2, lambda size: torch.empty(size, dtype=torch.uint8)))


#: Where tensors are and how they are copied: directly, staged without streams, and on a device.
WAYS = [
    pytest.param("cpu", lane, id="cpu"),
    pytest.param("cpu", staged, id="staged"),
    pytest.param("cuda", lane, id="cuda", marks=NEEDS_CUDA),
]


@pytest.fixture
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "BUCKET", 64)


def vector_of(bundle: Bundle, way: Any = lane) -> Tensor:
    vector = empty_vector(bundle.size).fill_(7.0)
    bundle.gather(vector, way).run()
    return vector


def back(bundle: Bundle, vector: Tensor, way: Any = lane) -> Any:
    target = bundle.target(bundle.blank())
    bundle.scatter(vector, target, way).run()
    return target.given


# -- which tensors they are --------------------------------------------------------------------------------------------


def layout(*shapes: tuple[int, ...]) -> str:
    return Bundle.of([torch.zeros(shape) for shape in shapes]).layout


def test_a_layout_names_shapes_in_their_order_and_keys_of_a_dict() -> None:
    assert layout((3,), (5,)) == "3, 5"
    assert layout((5,), (3,)) == "5, 3"
    assert layout((2, 3), (), (0, 4)) == "2x3, scalar, 0x4"
    assert Bundle.of({"b": torch.zeros(2), "a": torch.zeros(1)}).layout == "'a' 1, 'b' 2"


def test_a_layout_of_many_tensors_is_short_and_differs_where_only_the_last_one_does() -> None:
    many = [(768, 768)] * 400
    one, other = layout(*many, (3,), (5,)), layout(*many, (5,), (3,))
    assert one != other
    assert one.startswith("768x768, 768x768") and "402 tensors" in one
    assert len(one) == len(other) <= 80
    assert layout(*many, (3,), (5,)) == one
    assert Bundle.of({"\n" * 90: torch.zeros(2)}).layout.isprintable()


@given(st.lists(st.lists(st.integers(0, 9), max_size=2).map(tuple), min_size=1, max_size=40), st.randoms())
def test_layouts_are_equal_exactly_where_shapes_are(shapes: list[tuple[int, ...]], random: Any) -> None:
    shapes = [*shapes, (1,)]
    shuffled = random.sample(shapes, len(shapes))
    assert (layout(*shapes) == layout(*shuffled)) == (shapes == shuffled)


# -- there and back ----------------------------------------------------------------------------------------------------

shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
kinds = st.sampled_from(["plain", "transposed", "expanded", "strided", "parameter", "shared"])


@st.composite
def tensors(draw: st.DrawFn, device: str) -> Tensor:
    shape, dtype, kind = draw(shapes), draw(st.sampled_from(DTYPES)), draw(kinds)
    seed = draw(st.integers(0, 1000))
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    match kind:
        case "transposed":
            return values.transpose(0, -1) if values.dim() > 1 else values
        case "expanded":
            return values.unsqueeze(0).expand(3, *shape)
        case "strided":
            return values.repeat_interleave(2, dim=-1)[..., ::2] if values.dim() else values
        case "parameter":
            return nn.Parameter(values)
        case "shared":
            return values.view(-1)[: values.numel() // 2]
        case _:
            return values


@pytest.mark.parametrize(("device", "way"), WAYS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_list_of_tensors_comes_back_as_it_was(device: str, way: Any, data: st.DataObject) -> None:
    given = data.draw(st.lists(tensors(device), min_size=1, max_size=6))
    if not sum(t.numel() for t in given):
        with pytest.raises(ConfigError, match="without a single element"):
            Bundle.of(given)
        return
    bundle = Bundle.of(given)
    vector = vector_of(bundle, way)
    expected = torch.cat([t.detach().float().cpu().reshape(-1) for t in given])
    assert torch.equal(vector, expected)
    for before, after in zip(given, back(bundle, vector, way), strict=True):
        assert (before.shape, before.dtype, before.device) == (after.shape, after.dtype, after.device)
        assert after.is_contiguous() and not after.requires_grad
        assert torch.equal(before.detach(), after)


@pytest.mark.parametrize(("device", "way"), WAYS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_buckets_of_any_size_change_nothing_and_come_in_order(device: str, way: Any, data: st.DataObject) -> None:
    given = data.draw(st.lists(tensors(device), min_size=1, max_size=6).filter(lambda ts: sum(t.numel() for t in ts)))
    whole = vector_of(Bundle.of(given))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(defaults, "BUCKET", 16 * data.draw(st.integers(1, 8)))
        bundle = Bundle.of(given)
        vector = empty_vector(bundle.size).fill_(7.0)
        steps = []
        for arrived in bundle.gather(vector, way):
            steps.append(arrived)
            assert torch.equal(vector[:arrived], whole[:arrived])
        assert steps == sorted(set(steps)) and steps[-1] == bundle.size
        assert len(steps) >= bundle.size // (defaults.BUCKET // 2)
        assert all(map(torch.equal, back(bundle, vector, way), (t.detach() for t in given)))


def test_a_single_float32_tensor_is_not_copied() -> None:
    cases: list[Any] = [torch.randn(3, 4), [torch.randn(5)], {"w": nn.Parameter(torch.randn(2, 2))}, torch.randn(())]
    for case in cases:
        bundle = Bundle.of(case)
        whole = bundle.whole()
        assert whole is not None and whole.data_ptr() == bundle.tensors[0].data_ptr()
        assert whole.shape == (bundle.size,)
    with_empty = Bundle.of([torch.empty(0), torch.randn(3), torch.empty(2, 0)])
    assert with_empty.whole() is not None


@pytest.mark.parametrize(
    "given",
    [torch.randn(3).half(), torch.randn(3, 4).T, [torch.randn(2), torch.randn(2)], torch.randn(2).expand(3, 2),
     torch.view_as_complex(torch.randn(3, 2)).conj().imag],
    ids=["fp16", "transposed", "two", "expanded", "negated view"],
)  # fmt: skip
def test_all_others_are(given: Any) -> None:
    assert Bundle.of(given).whole() is None
    flat = torch.cat([t.float().reshape(-1) for t in (given if isinstance(given, list) else [given])])
    assert torch.equal(vector_of(Bundle.of(given)), flat)


def test_float32_results_on_the_cpu_are_views_of_the_result() -> None:
    bundle = Bundle.of([torch.randn(2, 3), torch.randn(4)])
    vector = empty_vector(10)
    views = bundle.views(vector)
    assert views is not None and [v.shape for v in views] == [(2, 3), (4,)]
    assert views[1].data_ptr() == vector[6:].data_ptr()  # type: ignore[union-attr]
    assert Bundle.of([torch.randn(2), torch.randn(2).half()]).views(empty_vector(4)) is None


Pair = namedtuple("Pair", "left right")


@pytest.mark.parametrize(
    "given",
    [torch.zeros(2), [torch.zeros(2)], (torch.zeros(2), torch.zeros(1)), Pair(torch.zeros(2), torch.zeros(3)),
     {"b": torch.zeros(2), "a": torch.ones(3)}],
    ids=["tensor", "list", "tuple", "named tuple", "dict"],
)  # fmt: skip
def test_what_comes_back_is_built_like_what_was_given(given: Any) -> None:
    found = back(Bundle.of(given), vector_of(Bundle.of(given)))
    assert type(found) is type(given)
    if isinstance(given, dict):
        assert list(found) == list(given)
        assert all(torch.equal(found[key], given[key]) for key in given)
    else:
        assert all(map(torch.equal, found, given))


def test_dicts_that_were_built_in_another_order_are_the_same_vector() -> None:
    one, two = torch.tensor([1.0]), torch.tensor([2.0, 3.0])
    assert vector_of(Bundle.of({"a": one, "b": two})).tolist() == [1.0, 2.0, 3.0]
    assert vector_of(Bundle.of({"b": two, "a": one})).tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(("device", "way"), WAYS)
@pytest.mark.usefixtures("small_buckets")
def test_a_result_can_be_written_to_the_tensors_themselves(device: str, way: Any) -> None:
    base = torch.zeros(6, 5, dtype=torch.bfloat16, device=device)
    parameter = nn.Parameter(torch.zeros(50, device=device))
    given = [base.T, parameter, base[:2]]
    bundle = Bundle.of(given)
    bundle.scatter(torch.arange(90.0) * 0 + 3.0, bundle.target(given), way).run()
    assert torch.equal(base.cpu(), torch.full((6, 5), 3.0, dtype=torch.bfloat16))
    assert parameter.requires_grad and parameter.is_leaf
    assert torch.equal(parameter.detach().cpu(), torch.full((50,), 3.0))


@pytest.mark.parametrize(("device", "way"), WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_are_rounded_to_the_nearest_ties_to_even(device: str, way: Any, dtype: torch.dtype) -> None:
    exact = torch.tensor([1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8, 1 + 3 * 2**-8, -0.1, 65504.0, 0.0])
    bundle = Bundle.of([torch.zeros(7, dtype=dtype, device=device), torch.zeros(0, device=device)])
    (found, _) = back(bundle, exact, way)
    assert torch.equal(found.cpu(), exact.to(dtype))


def test_an_element_is_named_by_the_tensor_it_is_in() -> None:
    bundle = Bundle.of({"w": torch.zeros(2, 2), "empty": torch.zeros(0), "b": torch.zeros(1)})
    assert [bundle.name_at(i) for i in range(5)] == ["tensor 'b'", *["tensor 'w'"] * 4]


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([torch.zeros(1), torch.zeros(2, dtype=torch.int64)], "tensor 1 cannot be reduced: its dtype is int64"),
        (torch.zeros(2, dtype=torch.float64), "the tensor cannot be reduced: its dtype is float64"),
        ((torch.zeros(2, dtype=torch.bool),), "tensor 0 cannot be reduced: its dtype is bool"),
        ({"w": torch.zeros(2, dtype=torch.complex64)}, "tensor 'w' cannot be reduced: its dtype is complex64; "),
        ([torch.eye(2).to_sparse()], "tensor 0 cannot be reduced: it is sparse (sparse_coo, float32)"),
        (torch.zeros(2, device="meta"), "the tensor cannot be reduced: it is on the meta device"),
        ([torch.zeros(1), None], "tensor 1 cannot be reduced: it is NoneType, not a torch tensor"),
        ([torch.zeros(1), 1.0], "tensor 1 cannot be reduced: it is float"),
        ({3: torch.zeros(1)}, "keys of a dict of tensors are strings, not int (3)"),
        ("abc", "reduce takes a tensor, or a list, tuple or dict of tensors, not str"),
        ([], "nothing to reduce: 0 tensors"),
        ([torch.zeros(0), torch.zeros(3, 0)], "nothing to reduce: 2 tensors without a single element"),
    ],
)  # fmt: skip
def test_what_cannot_be_reduced_is_named_by_place_and_dtype(given: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Bundle.of(given)
    assert str(caught.value).find(message) >= 0


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ([torch.zeros(2)], "out holds 1 (tensor 0), the tensors to reduce are 2 (tensor 0, tensor 1)"),
        ([torch.zeros(2), torch.zeros(1, 3)], "tensor 1 of out has shape (1, 3), not (3,)"),
        ([torch.zeros(2), torch.zeros(1).expand(3)], "tensor 1 of out has several elements in one place"),
        ([torch.zeros(2), torch.zeros(3, dtype=torch.int32)], "tensor 1 cannot be reduced: its dtype is int32"),
    ],
)
def test_an_out_that_does_not_fit_is_refused(out: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Bundle.of([torch.zeros(2), torch.zeros(3)]).target(out)
    assert str(caught.value).find(message) >= 0


# -- staging -----------------------------------------------------------------------------------------------------------


class Recorder(Streams):
    """Streams that only do what is queued when somebody waits for a mark, as late as a device might."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.marks = 0

    def follow(self) -> None:
        self.said.append("follow")

    def side(self) -> AbstractContextManager[object]:
        self.said.append("queue")
        return nullcontext()

    def mark(self) -> Callable[[], None]:
        self.marks += 1
        number = self.marks
        self.said.append(f"mark {number}")
        return lambda: self.said.append(f"wait {number}")


@pytest.mark.usefixtures("small_buckets")
def test_a_bucket_is_under_way_while_the_one_before_is_handed_on() -> None:
    streams, pool = Recorder(), Pool(8, lambda size: torch.empty(size, dtype=torch.uint8))
    source, vector = torch.arange(64.0), empty_vector(64)
    copy = Copy("fetch", [(source, vector)], lambda device, direction: StagedLane(direction, streams, pool))
    assert streams.said == ["follow"], "on the caller's thread, before anything is copied"
    for arrived in copy:
        streams.said.append(f"got {arrived}")
    assert torch.equal(vector, source)
    assert streams.said == [
        "follow", "queue", "mark 1", "queue", "mark 2", "wait 1", "got 16", "queue", "mark 3", "wait 2", "got 32",
        "queue", "mark 4", "wait 3", "got 48", "wait 4", "got 64",
    ]  # fmt: skip


@pytest.mark.usefixtures("small_buckets")
def test_a_copy_that_is_given_up_waits_for_what_the_device_still_does_and_returns_its_buffers() -> None:
    allocated: list[Tensor] = []

    def allocate(size: int) -> Tensor:
        allocated.append(torch.empty(size, dtype=torch.uint8))
        return allocated[-1]

    streams, pool = Recorder(), Pool(2, allocate)
    for _ in range(5):
        copy = Copy(
            "fetch", [(torch.arange(64.0), empty_vector(64))], lambda d, direction: StagedLane(direction, streams, pool)
        )
        steps = iter(copy)
        next(steps)
        steps.close()
        assert streams.said[-1] == f"wait {streams.marks}"
    assert len(allocated) == 2


def test_a_pool_keeps_its_buffers_and_never_pins_more_than_its_limit() -> None:
    allocated: list[int] = []

    def allocate(size: int) -> Tensor:
        allocated.append(size)
        return torch.empty(size, dtype=torch.uint8)

    pool = Pool(3, allocate)
    held = [pool.take() for _ in range(5)]
    assert [buffer.pooled for buffer in held] == [True, True, True, False, False]
    assert {buffer.memory.numel() for buffer in held} == {defaults.BUCKET}
    for buffer in held:
        pool.give(buffer)
    again = [pool.take() for _ in range(3)]
    assert all(buffer.pooled for buffer in again) and not pool.take().pooled
    assert allocated == [defaults.BUCKET] * 3


@pytest.mark.usefixtures("small_buckets")
def test_several_threads_share_a_pool() -> None:
    pool = Pool(2, lambda size: torch.empty(size, dtype=torch.uint8))
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(50):
            source, vector = torch.full((100,), float(number)), empty_vector(100)
            Copy("fetch", [(source, vector)], lambda d, way: StagedLane(way, NoStreams(), pool)).run()
            if not torch.equal(source, vector):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert wrong == []


def test_the_memory_of_the_host_is_copied_without_staging() -> None:
    assert isinstance(lane(torch.device("cpu"), "fetch"), DirectLane)


# -- whole models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_a_model_with_buffers_of_all_kinds_goes_through_the_same_staging(device: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 2).bfloat16()).to(device)
    model.register_buffer("flag", torch.tensor([True, False], device=device))
    model.register_buffer("wide", torch.arange(6.0, device=device).view(2, 3).T)
    layout = Layout.of(model)
    vector = flatten_model(layout, model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    unflatten_into(layout, torch.zeros(layout.size), model)
    assert not any(tensor.any() for tensor in model.state_dict().values())
    unflatten_into(layout, vector, model)
    for name, tensor in model.state_dict().items():
        assert tensor.device.type == device and torch.equal(tensor, state[name]), name


@NEEDS_CUDA
def test_a_copy_from_a_device_comes_after_the_kernels_that_were_queued_before_it() -> None:
    made = torch.zeros(1 << 22, device="cuda")
    for _ in range(200):
        made.add_(1.0)
    bundle = Bundle.of([made, made.view(2, -1).T])
    assert vector_of(bundle).unique().tolist() == [200.0]
