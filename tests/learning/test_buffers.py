"""What a peer holds during a round, and what it refuses to hold."""

from __future__ import annotations

import torch

from shoal.learning import exact
from shoal.learning.reduce.buffers import MAX_PIECES, Buffers, Part
from shoal.learning.reduce.codecs import FP32, INT8, Codec
from shoal.learning.reduce.coding import Coding
from shoal.learning.reduce.slices import Slice
from shoal.learning.state import bytes_view
from shoal.transport.identity import Identity

A, B, C = sorted(Identity(bytes([n]) * 32).peer_id for n in (1, 2, 3))


def filled(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def part(vector: torch.Tensor, codec: Codec = FP32) -> Part:
    if codec is FP32:
        return Part(codec, bytes_view(vector), vector)
    data = bytearray(codec.wire_size(len(vector)))
    codec.encode(vector, data)
    return Part(codec, memoryview(data))


def take_early(buffers: Buffers, slices: tuple[Slice, ...], codec: str) -> None:
    """Where owners themselves send what they combined."""
    buffers.take_early(slices, codec, lambda index: slices[index].owner)


def test_combining_gives_the_weighted_mean_in_the_order_of_the_members() -> None:
    buffers = Buffers(8)
    buffers.own = torch.arange(8, dtype=torch.float32) / 3
    other = torch.arange(8, dtype=torch.float32) * 7
    buffers.keep(A, 2, 6, buffers.own_part(2, 6))
    buffers.keep(B, 2, 6, part(other[2:6].clone()))
    buffers.open((0, 0), 8)
    buffers.combination((A, B), (1, 3), [(2, 6)])()
    assert buffers.result is not None
    assert torch.equal(buffers.result[2:6], exact.weighted_mean([buffers.own[2:6], other[2:6]], [1.0, 3.0]))


def test_combining_nobody_gives_zeros() -> None:
    buffers = Buffers(4)
    buffers.open((0, 0), 4)
    buffers.combination((), (), [(0, 4)])()
    assert buffers.result is not None
    assert torch.equal(buffers.result, torch.zeros(4))


def test_a_combination_under_way_in_a_thread_outlives_the_end_of_the_round() -> None:
    buffers = Buffers(4)
    buffers.keep(A, 0, 4, part(filled([1, 2, 3, 4])))
    buffers.open((0, 0), 4)
    combine, result = buffers.combination((A,), (1,), [(0, 4)]), buffers.result
    buffers.drop_inputs()
    combine()
    assert result is not None
    assert torch.equal(result, filled([1, 2, 3, 4]))


def test_absurd_ranges_get_no_memory() -> None:
    buffers = Buffers(100)
    for start, stop in ((-1, 5), (5, 5), (6, 5), (0, 101), (1 << 62, (1 << 62) + 1)):
        assert buffers.room_for(A, start, stop) is None
        assert buffers.room_early(A, start, stop) is None
    room = buffers.room_for(A, 0, 100)
    assert room is not None and room.vector is not None
    assert room.vector.shape == (100,) and room.vector.dtype == torch.float32
    coded = buffers.room_for(A, 0, 100, INT8)
    assert coded is not None and len(coded.data) == INT8.wire_size(100)


def test_nobody_can_fill_our_memory_and_one_peer_does_not_use_up_anothers_share() -> None:
    buffers = Buffers(100)
    assert sum(buffers.room_for(A, 0, 100) is not None for _ in range(10)) == 2
    assert sum(buffers.room_early(A, 0, 100) is not None for _ in range(10)) == 2
    assert buffers.room_for(B, 0, 100) is not None
    assert buffers.room_early(B, 0, 100) is not None


def test_nobody_can_send_a_slice_element_by_element() -> None:
    buffers = Buffers(1 << 20)
    assert sum(buffers.room_for(A, n, n + 1) is not None for n in range(MAX_PIECES + 10)) == MAX_PIECES


def test_an_early_slice_lands_once_its_generation_opens() -> None:
    buffers = Buffers(4)
    buffers.keep_early(0, 1, 1, Slice(2, 4, B), part(filled([8, 9])))
    buffers.open((0, 0), 4)
    take_early(buffers, (Slice(0, 2, A), Slice(2, 4, B)), "fp32")
    assert not buffers.filled
    buffers.open((0, 1), 4)
    take_early(buffers, (Slice(0, 2, A), Slice(2, 4, B)), "fp32")
    assert buffers.filled == {1: None}
    assert buffers.result is not None
    assert torch.equal(buffers.result[2:], filled([8, 9]))


def test_an_early_slice_from_somebody_else_than_its_owner_never_lands() -> None:
    buffers = Buffers(4)
    buffers.keep_early(0, 0, 0, Slice(0, 4, C), part(filled([6, 6, 6, 6])))
    buffers.keep_early(0, 0, 0, Slice(0, 4, B), part(filled([1, 2, 3, 4])))
    buffers.open((0, 0), 4)
    take_early(buffers, (Slice(0, 4, B),), "fp32")
    assert buffers.result is not None
    assert torch.equal(buffers.result, filled([1, 2, 3, 4]))


def test_a_slice_that_is_there_already_is_not_overwritten() -> None:
    buffers = Buffers(4)
    buffers.open((0, 0), 4)
    assert buffers.result is not None
    buffers.result[:] = filled([1, 2, 3, 4])
    buffers.filled[0] = None
    buffers.keep_early(0, 0, 0, Slice(0, 4, B), part(filled([6, 6, 6, 6])))
    take_early(buffers, (Slice(0, 4, B),), "fp32")
    assert torch.equal(buffers.result, filled([1, 2, 3, 4]))


def test_slices_of_an_older_generation_are_given_up() -> None:
    buffers = Buffers(4)
    buffers.keep_early(0, 0, 0, Slice(0, 4, B), part(filled([1, 2, 3, 4])))
    buffers.open((1, 0), 4)
    take_early(buffers, (Slice(0, 4, B),), "fp32")
    buffers.open((0, 0), 4)
    take_early(buffers, (Slice(0, 4, B),), "fp32")
    assert not buffers.filled


def test_after_the_round_only_the_result_is_left() -> None:
    buffers = Buffers(4)
    buffers.own = torch.zeros(4)
    buffers.keep(B, 0, 4, part(torch.ones(4)))
    buffers.open((0, 0), 4)
    buffers.drop_inputs()
    assert buffers.own is None and not buffers.parts and buffers.result is not None


def test_coded_contributions_are_combined_as_they_decode_and_the_result_is_what_everybody_decodes() -> None:
    buffers = Buffers(4096)
    buffers.own, buffers.coding = torch.randn(4096, generator=torch.Generator().manual_seed(1)), Coding(INT8)
    other = torch.randn(4096, generator=torch.Generator().manual_seed(2))
    buffers.keep(A, 1024, 4096, buffers.own_part(1024, 4096))
    buffers.keep(B, 1024, 4096, part(other[1024:], INT8))
    buffers.open((0, 0), 4096)
    (coded,) = buffers.combination((A, B), (1, 3), [(1024, 4096)], INT8)()
    assert buffers.result is not None
    decoded = [torch.empty(3072), torch.empty(3072)]
    for member, out in zip((A, B), decoded, strict=True):
        INT8.decode(buffers.parts[member, 1024, 4096, "int8"].data, out)
    expected = part(exact.weighted_mean(decoded, [1.0, 3.0]), INT8)
    assert bytes(coded.data) == bytes(expected.data)
    there = torch.empty(3072)
    INT8.decode(coded.data, there)
    assert torch.equal(buffers.result[1024:], there)
    assert len(coded.data) == 3 * 1028


def test_an_early_slice_of_another_codec_than_the_plans_never_lands() -> None:
    buffers = Buffers(4)
    buffers.keep_early(0, 0, 0, Slice(0, 4, B), part(filled([1, 2, 3, 4]), INT8))
    buffers.open((0, 0), 4)
    take_early(buffers, (Slice(0, 4, B),), "fp32")
    assert not buffers.filled
