"""The view of a gossip swarm: who counts as a member, and who comes back."""

from __future__ import annotations

import pytest

from shoal.learning import defaults
from shoal.learning.view import SwarmView
from shoal.transport.identity import PeerId

ME, ANN, BOB = (PeerId(bytes([number]) * 32) for number in (1, 2, 3))
LONG = defaults.VIEW_SECONDS + 1


def test_a_peer_is_a_member_once_it_was_heard_of() -> None:
    view = SwarmView(ME)
    assert view.members(0, 0.0) == (ME,)
    view.hear(BOB, 0, 1.0)
    view.hear(ANN, 0, 1.0)
    assert view.members(0, 1.0) == (ME, ANN, BOB)


def test_fast_rounds_alone_make_nobody_stale() -> None:
    view = SwarmView(ME)
    view.hear(ANN, 0, 0.0)
    assert ANN in view.members(100, defaults.VIEW_SECONDS - 1)
    assert ANN not in view.members(100, LONG)


def test_slow_rounds_alone_make_nobody_stale() -> None:
    view = SwarmView(ME)
    view.hear(ANN, 3, 0.0)
    assert ANN in view.members(3 + defaults.VIEW_ROUNDS, 1e6)
    assert ANN not in view.members(4 + defaults.VIEW_ROUNDS, 1e6)


def test_old_news_told_again_are_no_news() -> None:
    view = SwarmView(ME)
    view.hear(ANN, 5, 0.0)
    view.hear(ANN, 5, LONG)
    view.hear(ANN, 4, LONG)
    assert view.rounds[ANN] == 5
    assert ANN not in view.members(50, LONG)


def test_a_lost_peer_comes_back_only_with_a_later_round() -> None:
    view = SwarmView(ME)
    view.hear(ANN, 5, 0.0)
    view.lose((ANN, ME, BOB), 7)
    assert view.members(7, 1.0) == (ME,)
    view.hear(ANN, 7, 2.0)
    assert view.members(7, 2.0) == (ME,)
    view.hear(ANN, 8, 2.0)
    assert view.members(8, 2.0) == (ME, ANN)


def test_a_lost_peer_that_says_it_is_here_is_believed_at_once() -> None:
    view = SwarmView(ME)
    view.hear(ANN, 5, 0.0)
    view.lose((ANN,), 7)
    view.welcome(ANN, 2, 3.0)
    assert view.members(7, 3.0) == (ME, ANN)


def test_a_view_is_bounded_and_gives_up_who_was_silent_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "MAX_VIEW", 3)
    view = SwarmView(ME)
    view.hear(ANN, 0, 0.0)
    view.hear(BOB, 0, 5.0)
    late = PeerId(bytes([4]) * 32)
    view.hear(late, 0, 6.0)
    assert view.members(0, 6.0) == (ME, ANN, BOB)
    view.hear(late, 0, LONG)
    assert view.members(0, LONG) == (ME, BOB, late)
    view.lose((late,), 9)
    view.hear(ANN, 0, LONG)
    assert view.members(0, LONG) == (ME, ANN, BOB)


def test_one_peer_far_ahead_does_not_empty_the_view() -> None:
    view = SwarmView(ME)
    view.hear(ANN, 0, 0.0)
    view.hear(BOB, 1 << 30, 0.0)
    assert view.members(0, 0.0) == (ME, ANN, BOB)
