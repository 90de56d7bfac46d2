"""Runs of equal labels from one pass over the label map, shared by all run-length formats."""

import numpy as np


def runs(flat: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Maximal runs of equal values of a flat array: starts int64 [n], lengths int64 [n], values [n]."""
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    return starts, np.diff(starts, append=flat.size), flat[starts]


def label_counts(flat: np.ndarray) -> dict[int, np.ndarray]:
    """For every label but 0 of a flat label map: the number of places outside, inside, outside, ... of it.

    int64 [n] each, starting with outside (possibly 0 places) and adding up to `flat.size`; in the labels' order.
    """
    starts, lengths, values = runs(flat)
    order = np.argsort(values, kind="stable")
    present, first = np.unique(values[order], return_index=True)
    members = np.split(order, first[1:])
    return {
        label: _counts(starts[own], lengths[own], flat.size)
        for label, own in zip(present.tolist(), members, strict=True)
        if label
    }


def _counts(starts: np.ndarray, lengths: np.ndarray, total: int) -> np.ndarray:
    counts = np.empty(2 * len(starts) + 1, np.int64)
    counts[0], counts[1::2] = starts[0], lengths
    counts[2::2] = np.append(starts[1:], total) - (starts + lengths)
    return counts if counts[-1] else counts[:-1]
