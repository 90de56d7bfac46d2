"""Labeling: the actor, its segmenter, the pool it runs in, and what a job will cost."""
