"""Tasks that come with Shoal: ``digits`` and ``stdlib``. Resolved by name in :mod:`shoal.learning.task`."""
