"""Shoal: train one model on many machines that nobody owns together."""
