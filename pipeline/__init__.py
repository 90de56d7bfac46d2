"""The flow: a corpus of images in, Parquet shards of masks out, on Ray Data."""
