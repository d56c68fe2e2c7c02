"""Pooled buffers: never two owners, used again when free, bounded."""

from __future__ import annotations

from shoal.transport.pool import SIZE, BufferPool


def test_a_buffer_that_somebody_looks_at_is_never_given_away() -> None:
    pool = BufferPool()
    held = [pool.take() for _ in range(20)]
    for i, view in enumerate(held):
        view[:] = bytes([i]) * SIZE
    part = held[3][10:20]
    del held[3]
    again = pool.take()
    again[:] = b"x" * SIZE
    assert bytes(part) == b"\x03" * 10
    assert [view[0] for view in held] == [i for i in range(20) if i != 3]


def test_a_buffer_is_used_again_once_its_last_view_is_gone() -> None:
    pool = BufferPool()
    for _ in range(1000):
        view = pool.take()
        part = view[5:]
        del view
        part.release()
        del part
    assert len(pool) == 1


def test_what_is_kept_is_bounded_whatever_is_held() -> None:
    pool = BufferPool(limit=4)
    held = [pool.take() for _ in range(10)]
    assert len(pool) == 4
    assert len({id(view.obj) for view in held}) == 10


def test_buffers_keep_their_size() -> None:
    pool = BufferPool()
    for _ in range(100):
        assert len(pool.take()) == SIZE
