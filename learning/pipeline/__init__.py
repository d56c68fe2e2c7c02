"""Models that no single peer holds: a chain of stages, and how a lost one comes back."""
