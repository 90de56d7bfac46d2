"""Evaluation: prepared benchmarks, counts, metrics, results, pages and sweeps."""
