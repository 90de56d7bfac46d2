"""Boundary IoU of label maps: agreement within a band along the contours (Cheng et al., CVPR 2021).

The band of a class is the part of its region that erosion by a square of side 2 d + 1 removes, d = 2% of the
image's diagonal; like the reference implementation, the image's own border counts as a contour. All classes are
eroded at once: a pixel is inside its region exactly if the minimum and the maximum label around it are equal.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Labels = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]

BAND = 0.02  # of the diagonal


@dataclass(frozen=True)
class BoundaryCounts:
    """Pixels of one image's contour bands, for the classes that have any."""

    classes: npt.NDArray[np.int64]  # [n], increasing
    intersection: npt.NDArray[np.int64]  # [n]
    union: npt.NDArray[np.int64]  # [n], all > 0


def boundary_counts(truth: Labels, prediction: Labels, keep: Mask, classes: int) -> BoundaryCounts:
    """Count band pixels of `truth` and `prediction` (uint8 or uint16 [H, W]) where `keep` [H, W] is True.

    Bands are found on the whole maps, so that ignored pixels bound a region but are not counted. Labels above
    `classes` are dropped.
    """
    distance = band_width(truth.shape)
    in_truth = contour_band(truth, distance) & keep
    in_prediction = contour_band(prediction, distance) & keep
    both = in_truth & in_prediction & (truth == prediction)
    intersection = _histogram(truth[both], classes)
    union = _histogram(truth[in_truth], classes) + _histogram(prediction[in_prediction], classes) - intersection
    present = np.flatnonzero(union)
    return BoundaryCounts(present.astype(np.int64), intersection[present], union[present])


def band_width(shape: tuple[int, ...]) -> int:
    """The width of the band in pixels: 2% of the diagonal, at least 1."""
    return max(1, round(BAND * math.hypot(*shape)))


def contour_band(labels: Labels, distance: int) -> Mask:
    """Pixels within `distance` (Chebyshev) of another label or of the image's border: bool [H, W]."""
    height, width = labels.shape
    band = np.ones(labels.shape, dtype=bool)
    side = 2 * distance + 1
    if height >= side and width >= side:
        low = _running(np.minimum, _running(np.minimum, labels, side).T, side).T
        high = _running(np.maximum, _running(np.maximum, labels, side).T, side).T
        band[distance : height - distance, distance : width - distance] = low != high
    return band


def _running(combine: Any, values: Labels, side: int) -> Labels:
    """Minimum or maximum over `side` rows: [H, W] -> [H - side + 1, W].

    Windows double (1, 2, 4, ...) until two of them overlap to `side`: log2(side) passes instead of `side`.
    """
    out = np.ascontiguousarray(values)
    reach = 1
    while reach < side:
        step = min(reach, side - reach)
        out = combine(out[:-step], out[step:])
        reach += step
    return out


def _histogram(labels: Labels, classes: int) -> npt.NDArray[np.int64]:
    return np.bincount(labels, minlength=classes + 1)[: classes + 1].astype(np.int64)
