"""The benchmarks behind ``scripts/bench.py``: a parent that gives orders, children that do the work."""
