"""Shipped settings: label/*.yaml, benchmarks/*.yaml, classes/*.txt, cluster/*.yaml."""
