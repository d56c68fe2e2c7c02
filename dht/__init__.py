"""What the swarm knows together: Kademlia lookups and signed records."""
