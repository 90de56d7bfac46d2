"""Benchmarks as people download them, read one dataset family per module."""
