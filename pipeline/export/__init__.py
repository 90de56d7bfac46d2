"""Exports: the masks of a run in the formats that trainers and labeling tools read."""
