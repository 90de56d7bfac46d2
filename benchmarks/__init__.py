"""The performance harness: `python -m benchmarks.run` writes build/bench.json and prints one table."""
