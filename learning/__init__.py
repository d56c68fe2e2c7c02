"""What the swarm computes together: tasks, rounds, the group reduce, strategies."""
