"""A run folder: identity, rows, shards and their commit, lease, status, verification."""
