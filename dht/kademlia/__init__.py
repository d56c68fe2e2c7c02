"""Kademlia: who is there, signed records, and providers of topics."""
