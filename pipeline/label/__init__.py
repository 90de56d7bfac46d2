"""Labeling: the actor, its segmenter, the pool of actors, and cost estimates."""
