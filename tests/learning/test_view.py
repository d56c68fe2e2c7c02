"""The view of a gossip swarm: who counts as a member, and for how long."""

from __future__ import annotations

import pytest

from shoal.learning import defaults
from shoal.learning.view import SwarmView
from shoal.transport.identity import PeerId

ME, ANN, BOB = (PeerId(bytes([number]) * 32) for number in (1, 2, 3))


def test_a_peer_is_a_member_once_it_was_heard_of() -> None:
    view = SwarmView(ME)
    assert view.members(0) == (ME,)
    view.hear(BOB, 0)
    view.hear(ANN, 0)
    assert view.members(0) == (ME, ANN, BOB)


def test_old_news_told_again_are_no_news() -> None:
    view = SwarmView(ME)
    view.hear(ANN, 5)
    view.hear(ANN, 4)
    assert view.rounds[ANN] == 5


def test_a_silent_member_is_drawn_until_its_last_round_is_long_past() -> None:
    view = SwarmView(ME)
    view.hear(ANN, 7)
    assert ANN in view.members(7 + defaults.VIEW_ROUNDS)
    assert ANN not in view.members(8 + defaults.VIEW_ROUNDS)


def test_a_view_is_bounded_and_gives_up_who_is_furthest_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "MAX_VIEW", 3)
    view = SwarmView(ME)
    view.hear(ANN, 2)
    view.hear(BOB, 5)
    late = PeerId(bytes([4]) * 32)
    view.hear(late, 2)
    assert view.members(5) == (ME, ANN, BOB)
    view.hear(late, 4)
    assert view.members(5) == (ME, BOB, late)


def test_one_peer_far_ahead_does_not_empty_the_view() -> None:
    view = SwarmView(ME)
    view.hear(ANN, 0)
    view.hear(BOB, 1 << 30)
    assert view.members(0) == (ME, ANN, BOB)
