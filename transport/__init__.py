"""Bytes between two named peers: identity, addresses, encryption, multiplexing, RPC, and the ways to a peer."""
