"""The corpus: what is listed, how it is cut into shards, read and decoded."""
