"""Segmentation metrics from integer confusion counts. Pure numpy: no model, no Ray.

Rows of a confusion matrix are the truth (0 = background, k = class k), columns the prediction. One more column
counts predictions that are not in the class list. All counts are int64, so sums do not depend on their order.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cliper.pipeline.errors import EvaluationError

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[Any]  # uint8 or uint16 [H, W]

Protocol = Literal["cliper", "mmseg"]
PROTOCOLS: tuple[Protocol, ...] = ("cliper", "mmseg")

# The classes of the mean: those that occur in the truth, or those that occur in the truth or a prediction.
_COUNTED = {
    "cliper": lambda truth, union: truth > 0,
    "mmseg": lambda truth, union: union > 0,
}


@dataclass(frozen=True)
class SparseConfusion:
    """The non-zero cells of one [K + 1, K + 2] matrix, flattened by rows, in increasing order."""

    cells: Ints  # [n]
    counts: Ints  # [n], all > 0


@dataclass(frozen=True)
class Scores:
    """Ratios from a confusion matrix. Arrays are [K + 1], nan if the denominator is 0."""

    miou: float
    pixel_accuracy: float
    mean_accuracy: float
    frequency_weighted_iou: float
    iou: Floats
    accuracy: Floats
    counted: npt.NDArray[np.bool_]  # classes that enter miou
    truth_pixels: Ints
    predicted_pixels: Ints


def evaluated(truth: Labels, ignore_labels: Sequence[int]) -> npt.NDArray[np.bool_]:
    """The pixels to count: bool [H, W], False at every pixel whose truth is in `ignore_labels`."""
    keep = np.ones(truth.shape, dtype=bool)
    for label in ignore_labels:
        keep &= truth != label
    return keep


def image_confusion(
    truth: Labels, prediction: Labels, classes: int, ignore_labels: Sequence[int] = (255,)
) -> SparseConfusion:
    """Count the pixels of one image by (truth, prediction).

    `truth` and `prediction`: uint8 or uint16 [H, W] of one shape, labels 0..`classes`. Predictions above `classes`
    are counted in the last column. Raises EvaluationError for different shapes, or for a truth label that is
    neither in the class list nor ignored.
    """
    if truth.shape != prediction.shape:
        raise EvaluationError(
            f"the prediction is {_size(prediction)} pixels but the ground truth {_size(truth)} (height x width); "
            "a mask must have its image's size: label the same images that were prepared"
        )
    keep = evaluated(truth, ignore_labels)
    return _count(truth[keep], prediction[keep], classes)


def _count(truth: Labels, prediction: Labels, classes: int) -> SparseConfusion:
    """Count flat label vectors of equal length."""
    if truth.size and int(truth.max()) > classes:
        raise EvaluationError(
            f"the ground truth holds label {int(truth.max())}; allowed are 0 to {classes} and the ignored labels. "
            "Prepare the dataset again with 'cliper prepare'"
        )
    width = classes + 2
    clipped = np.minimum(prediction, min(classes + 1, np.iinfo(prediction.dtype).max))
    dense = np.bincount(truth.astype(np.intp) * width + clipped, minlength=(classes + 1) * width)
    cells = np.flatnonzero(dense)
    return SparseConfusion(cells.astype(np.int64), dense[cells].astype(np.int64))


def _size(labels: Labels) -> str:
    return "x".join(str(side) for side in labels.shape)


def empty(classes: int) -> Ints:
    """A confusion matrix without pixels: int64 [K + 1, K + 2]."""
    return np.zeros((classes + 1, classes + 2), dtype=np.int64)


def add(confusion: Ints, parts: Iterable[SparseConfusion]) -> Ints:
    """Add sparse counts to `confusion` [K + 1, K + 2] in place, and return it. The order does not matter."""
    flat = confusion.reshape(-1)
    for part in parts:
        np.add.at(flat, part.cells, part.counts)
    return confusion


def image_totals(part: SparseConfusion, classes: int) -> Ints:
    """Pixels per class: agreeing, in the truth, in the prediction. int64 [3, K + 1]."""
    truth, prediction = np.divmod(part.cells, classes + 2)
    totals = np.zeros((3, classes + 2), dtype=np.int64)
    np.add.at(totals[0], truth[truth == prediction], part.counts[truth == prediction])
    np.add.at(totals[1], truth, part.counts)
    np.add.at(totals[2], prediction, part.counts)
    return totals[:, : classes + 1]


def confusion_totals(confusion: Ints) -> Ints:
    """Pixels per class as in image_totals, [3, K + 1], from a full matrix [K + 1, K + 2]."""
    square = confusion[:, :-1]
    return np.stack([square.diagonal(), confusion.sum(axis=1), square.sum(axis=0)])


def score(confusion: Ints, protocol: Protocol, ignore_labels: Sequence[int] = (255,)) -> Scores:
    """Ratios of a confusion matrix [K + 1, K + 2].

    IoU_c = n_cc / (truth_c + predicted_c - n_cc). The mean runs over the classes of the truth (`cliper`), or of
    truth or prediction (`mmseg`: mmsegmentation's IoUMetric skips classes whose union is empty); never over an
    ignored class. Mean accuracy runs over the classes of the truth. Frequency-weighted IoU weighs by truth pixels
    (Long et al., CVPR 2015).
    """
    agree, truth, predicted = confusion_totals(confusion)
    union = truth + predicted - agree
    counted = counted_classes(truth, union, protocol, ignore_labels)
    iou = ratio(agree, union)
    accuracy = ratio(agree, truth)
    total = confusion.sum()
    return Scores(
        miou=_mean(iou[counted]),
        pixel_accuracy=float(agree.sum() / total) if total else float("nan"),
        mean_accuracy=_mean(accuracy[truth > 0]),
        frequency_weighted_iou=float((truth * np.nan_to_num(iou)).sum() / total) if total else float("nan"),
        iou=iou,
        accuracy=accuracy,
        counted=counted,
        truth_pixels=truth,
        predicted_pixels=predicted,
    )


def counted_classes(
    truth: Ints, union: Ints, protocol: Protocol, ignore_labels: Sequence[int]
) -> npt.NDArray[np.bool_]:
    """The classes of the protocol's mean: bool, the shape of `truth` [..., K + 1].

    Raises EvaluationError for an unknown protocol.
    """
    if protocol not in _COUNTED:
        raise EvaluationError(f"unknown protocol '{protocol}'; allowed: {', '.join(PROTOCOLS)}")
    listed = ~np.isin(np.arange(truth.shape[-1]), ignore_labels)
    return _COUNTED[protocol](truth, union) & listed


def ratio(numerator: Ints, denominator: Ints) -> Floats:
    """Elementwise quotient in float64, nan if the denominator is 0."""
    out = np.full(numerator.shape, np.nan)
    return np.divide(numerator, denominator, out=out, where=denominator > 0)


def _mean(values: Floats) -> float:
    return float(values.mean()) if len(values) else float("nan")
