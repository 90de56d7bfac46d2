"""Load weights: a setting to files, their hashes, the checks before a run starts."""
