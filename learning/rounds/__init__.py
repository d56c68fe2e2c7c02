"""Rounds without a coordinator: who takes part, who leads, what was agreed, and proof of it."""
