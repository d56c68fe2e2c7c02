"""Lies of nodes in processes of their own that are no contributions (sim/liar.py). Loads no torch."""

from __future__ import annotations

#: An owner that returns a wrong combination of its slices.
LYING_OWNER = "lying_owner"

#: A peer whose fingerprints of results are wrong.
LYING_DIGEST = "lying_digest"
