"""What the swarm knows together: Kademlia, documents and blobs."""
