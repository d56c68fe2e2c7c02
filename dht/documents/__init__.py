"""Documents: what the swarm writes down together, one single-writer CRDT per author, merged when read."""
