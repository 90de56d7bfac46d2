"""A labeled image and its statistics; numpy only."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cliper.model.classes import mask_dtype

BINS = 1024  # resolution of the confidence histogram the 10th percentile is read from
STEPS = 65_535  # confidences and margins are summed as integers, so that a sum does not depend on its order

Floats = npt.NDArray[np.float32]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Segmentation:
    """A labeled image. Class 0 is background or unknown; class k is the class list's k-th entry.

    Confidence is the winning class's score clipped to [0, 1]; for background, 1 minus the best class's score
    (with the background plane: the plane's value). Margin is the winner's lead over the runner-up; for
    background, the distance of the best class from winning.
    """

    labels: np.ndarray  # uint8 (at most 254 classes) or uint16 [H, W]
    presence: np.ndarray  # float32 [K]: image-level score of every class
    pixels: np.ndarray  # int64 [K + 1]: pixels of every label
    class_confidence: np.ndarray  # float32 [K + 1]: mean over a label's pixels; nan without pixels
    class_confidence_p10: np.ndarray  # float32 [K + 1]: 10th percentile, to 1/1024
    class_margin: np.ndarray  # float32 [K + 1]: mean
    confidence: float  # mean over the image
    confidence_p10: float
    margin: float
    proposed: np.ndarray | None = None  # int32: the labels that were considered; None if all were

    @classmethod
    def of(
        cls,
        labels: np.ndarray,
        classes: int,
        *,
        scores: np.ndarray | None = None,
        confidence: np.ndarray | None = None,
        margin: np.ndarray | None = None,
        presence: np.ndarray | None = None,
    ) -> "Segmentation":
        """The statistics of a label map: integers (or booleans) [H, W] from 0 to `classes`.

        `confidence` and `margin`, [H, W] in [0, 1], are per pixel. Without them they follow from `scores`
        [classes, H, W], as the class says; with neither, every pixel is certain: exactly 1. Without a margin, the
        confidence stands for it. `presence` [classes], by default the peaks of the scores, or 1 for each class
        that has pixels. Raises ValueError for a label or a shape that does not fit.
        """
        _check(labels, classes, scores, confidence, margin)
        grid = np.ascontiguousarray(labels).astype(mask_dtype(classes))
        pixels = np.bincount(grid.ravel(), minlength=classes + 1)
        if scores is not None:
            presence = scores.max(axis=(1, 2)) if presence is None else presence
            if confidence is None:
                confidence, lead = _from_scores(grid, scores)
                margin = lead if margin is None else margin
        shown = (pixels[1:] > 0 if presence is None else np.asarray(presence)).astype(np.float32)
        if confidence is None:
            return _certain(grid, shown, pixels)
        sums, histogram = _tally(grid, confidence, confidence if margin is None else margin, classes)
        return cls.from_counts(grid, shown, sums, histogram)

    @classmethod
    def from_counts(
        cls, labels: np.ndarray, presence: np.ndarray, sums: npt.NDArray[np.int64], histogram: Counts
    ) -> "Segmentation":
        """From sums [2, K + 1] of confidence and margin in STEPS, and the confidences in BINS, [K + 1, BINS]."""
        pixels = histogram.sum(axis=1)
        with np.errstate(invalid="ignore"):  # 0 / 0: a label without pixels has no mean
            means = (sums / pixels / STEPS).astype(np.float32)
        total = pixels.sum()
        return cls(
            labels=labels,
            presence=presence,
            pixels=pixels,
            class_confidence=means[0],
            class_confidence_p10=_tenth_percentile(histogram),
            class_margin=means[1],
            confidence=float(sums[0].sum() / total / STEPS),
            confidence_p10=float(_tenth_percentile(histogram.sum(axis=0, keepdims=True))[0]),
            margin=float(sums[1].sum() / total / STEPS),
        )


def _check(labels: np.ndarray, classes: int, scores: np.ndarray | None, *maps: np.ndarray | None) -> None:
    if labels.ndim != 2 or not labels.size or labels.dtype.kind not in "iub":
        raise ValueError(f"labels must be integers [H, W], not {labels.dtype} {labels.shape}")
    if labels.min() < 0 or labels.max() > classes:
        raise ValueError(f"labels go from 0 to {classes}; found {labels.min()} to {labels.max()}")
    if scores is not None and scores.shape != (classes, *labels.shape):
        raise ValueError(f"scores must be {(classes, *labels.shape)}, not {scores.shape}")
    if any(found is not None and found.shape != labels.shape for found in maps):
        raise ValueError(f"confidence and margin must be {labels.shape}, as the labels are")


def _from_scores(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Confidence and margin [H, W] of labels that were decided from scores [K, H, W]."""
    ranked = np.sort(np.concatenate([np.zeros_like(scores[:1]), scores]), axis=0)
    best, second = ranked[-1], ranked[-2]
    won = np.take_along_axis(scores, np.maximum(labels, 1)[None].astype(np.int64) - 1, axis=0)[0]
    rival = np.where(won >= best, second, best)
    background = labels == 0
    return np.where(background, 1 - best, won), np.where(background, 1 - best, np.maximum(won - rival, 0))


def _tally(
    labels: np.ndarray, confidence: np.ndarray, margin: np.ndarray, classes: int
) -> tuple[npt.NDArray[np.int64], Counts]:
    """Sums [2, K + 1] in STEPS and histogram [K + 1, BINS]: what `labels._Tally` adds up on a device."""
    flat, size = labels.ravel().astype(np.int64), classes + 1
    values = [np.clip(found, 0, 1).ravel() for found in (confidence, margin)]
    steps = [np.bincount(flat, np.rint(found * STEPS), size) for found in values]  # exact: below 2^53
    bins = np.minimum((values[0] * BINS).astype(np.int64), BINS - 1)
    histogram = np.bincount(flat * BINS + bins, minlength=size * BINS).reshape(size, BINS)
    return np.stack(steps).astype(np.int64), histogram


def _certain(labels: np.ndarray, presence: np.ndarray, pixels: Counts) -> Segmentation:
    ones = np.where(pixels > 0, 1.0, np.nan).astype(np.float32)
    return Segmentation(labels, presence, pixels, ones, ones, ones, 1.0, 1.0, 1.0)


def _tenth_percentile(histogram: Counts) -> Floats:
    """The middle of the bin that holds the 10th percentile of each row: float32 [rows]; nan if empty."""
    total = histogram.sum(axis=1)
    position = np.argmax(histogram.cumsum(axis=1) >= np.ceil(0.1 * total)[:, None], axis=1)
    return np.where(total > 0, (position + 0.5) / BINS, np.nan).astype(np.float32)
