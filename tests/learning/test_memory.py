"""Memory of rounds: used again when the last view is gone, and never before."""

from __future__ import annotations

import threading
import time

import torch

from shoal.learning import defaults
from shoal.learning.reduce.memory import RoundMemory

SIZE = defaults.SMALL_BUFFER


def test_a_vector_is_used_again_once_the_last_view_of_it_is_gone() -> None:
    memory = RoundMemory()
    vector = memory.take(SIZE)
    place = vector.data_ptr()
    view, array = vector[10:20], vector.numpy()[5:6]
    for holder in (vector, view, array):
        assert memory.take(SIZE).data_ptr() != place, holder
    del vector
    del holder
    assert memory.take(SIZE).data_ptr() != place
    del view
    assert memory.take(SIZE).data_ptr() != place
    del array
    others = [memory.take(SIZE) for _ in range(2)]
    assert place in [other.data_ptr() for other in others]


def test_a_slightly_smaller_vector_takes_the_place_of_a_larger_one_but_not_of_one_twice_as_large() -> None:
    memory = RoundMemory()
    memory.take(3 * SIZE)
    assert memory.held == 12 * SIZE
    assert memory.take(2 * SIZE).shape == (2 * SIZE,)
    assert memory.held == 12 * SIZE
    assert memory.take(SIZE).dtype == torch.float32
    assert memory.held == 16 * SIZE


def test_of_those_that_fit_the_smallest_is_taken() -> None:
    memory = RoundMemory()
    large, small = memory.take(2 * SIZE), memory.take(SIZE)
    place = small.data_ptr()
    del large, small
    assert memory.take(SIZE).data_ptr() == place


def test_what_was_released_stays_whole_for_who_holds_it() -> None:
    memory = RoundMemory()
    vector = memory.take(SIZE).fill_(7.0)
    memory.release()
    assert memory.held == 0
    other = memory.take(SIZE).fill_(1.0)
    assert bool((vector == 7.0).all())
    assert bool((other == 1.0).all())


def test_small_vectors_are_not_kept() -> None:
    memory = RoundMemory()
    memory.take(SIZE - 1)
    assert memory.held == 0


def test_sizes_that_differ_in_every_round_do_not_pile_up() -> None:
    memory = RoundMemory()
    for number in range(20):
        kept = memory.take(SIZE << number % 7)
        memory.take(3 * SIZE)
        memory.next_round()
        assert memory.held <= 4 * (2 * 64 + 3) * SIZE
    place = memory.take(3 * SIZE).data_ptr()
    memory.next_round()
    assert memory.take(3 * SIZE).data_ptr() == place
    assert kept.numel() == SIZE << 19 % 7
    for _ in range(3):
        memory.next_round()
    assert memory.held == 0


def test_a_round_of_other_sizes_takes_the_place_of_the_last_ones_and_is_not_added_to_it() -> None:
    memory = RoundMemory()
    for share in (4, 9, 4, 11, 4):
        result = memory.take(32 * SIZE)
        parts = [memory.take(share * SIZE) for _ in range(4)]
        assert memory.held <= 4 * (32 + 4 * 11) * SIZE
        del result, parts
        memory.next_round()


def test_what_somebody_holds_is_not_given_up_for_something_new() -> None:
    memory = RoundMemory()
    held, free = memory.take(4 * SIZE).fill_(5.0), memory.take(4 * SIZE)
    memory.next_round()
    del free
    new = memory.take(10 * SIZE).fill_(1.0)
    assert memory.held == 4 * 14 * SIZE
    assert bool((held == 5.0).all()) and bool((new == 1.0).all())


def test_memory_of_this_round_is_kept_for_the_rest_of_it() -> None:
    memory = RoundMemory()
    place = memory.take(4 * SIZE).data_ptr()
    memory.take(10 * SIZE)
    assert memory.take(4 * SIZE).data_ptr() == place


class Hesitant(RoundMemory):
    """Lets other threads run after every look at what is free."""

    def _free(self, index: int) -> bool:
        free = super()._free(index)
        time.sleep(1e-4)
        return free


def test_threads_that_ask_at_the_same_time_never_get_the_same_memory() -> None:
    """They did: two slices were then coded into one place, and all peers agreed on a wrong mean."""
    memory, wrong, gate = Hesitant(), list[int](), threading.Barrier(4)
    for held in [memory.take(SIZE) for _ in range(8)]:
        held.zero_()
    del held

    def work(name: int) -> None:
        gate.wait()
        for _ in range(20):
            mine = memory.take(SIZE).numpy()
            mine[0] = name
            time.sleep(1e-3)
            if mine[0] != name:
                wrong.append(name)
            del mine

    threads = [threading.Thread(target=work, args=(name,)) for name in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
