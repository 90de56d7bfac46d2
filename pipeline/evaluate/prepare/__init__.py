"""Readers of downloaded benchmarks, one dataset family per module."""
