"""Many nodes on one machine: local processes, virtual time, faults, reports."""
