"""Check what a segmenter returns before it becomes a row of status ok."""

from typing import TYPE_CHECKING, Any

import numpy as np

from cliper.pipeline.errors import ImageError

if TYPE_CHECKING:
    from cliper.model.labels import Segmentation

_FEW = 16  # labels up to which counting them one by one is faster than counting all at once
_BLOCK = 1 << 18  # labels compared at once


def refuse_wrong(found: "Segmentation", size: tuple[int, int], classes: int) -> None:
    """Raise ImageError of kind `wrong_result` unless `found` is the result of an image of `size` (height, width).

    Labels are integers [height, width] from 0 to `classes`, `pixels` counts them, presence is [classes],
    statistics per class are [classes + 1], and presence and confidence are finite where they go into a row.
    """
    labels = found.labels
    if not isinstance(labels, np.ndarray) or labels.dtype.kind not in "iu" or labels.shape != size:
        what = f"{labels.dtype} {labels.shape}" if isinstance(labels, np.ndarray) else type(labels).__name__
        raise ImageError("wrong_result", f"labels are {what}, not integers {size}")
    present = _check_counts(labels, _array(found.pixels, "pixels", classes + 1))
    _array(found.class_margin, "class_margin", classes + 1)
    overall = _array([found.confidence, found.confidence_p10], "confidence", 2)
    scores = [_array(found.presence, "presence", classes), overall]
    for name in ("class_confidence", "class_confidence_p10"):
        scores.append(_array(getattr(found, name), name, classes + 1)[present])
    together = np.concatenate(scores)
    if np.count_nonzero(np.isfinite(together)) < len(together):
        raise ImageError("wrong_result", "presence or confidence is not a finite number")


def _array(values: Any, name: str, length: int) -> np.ndarray:
    array = np.asarray(values)
    if array.shape != (length,) or array.dtype.kind not in "iuf":
        raise ImageError("wrong_result", f"{name} is {array.dtype} {array.shape}, not numbers ({length},)")
    return array


def _check_counts(labels: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Compare the labels with their counts, which also proves their range; returns the labels that occur."""
    present = np.flatnonzero(pixels)
    if _are_counted(labels, pixels, present):
        return present
    if int(labels.min()) < 0 or int(labels.max()) >= len(pixels):
        raise ImageError(
            "wrong_result", f"labels are {labels.min()} to {labels.max()}; the list has {len(pixels) - 1}"
        )
    raise ImageError("wrong_result", "`pixels` does not count the labels")


def _are_counted(labels: np.ndarray, pixels: np.ndarray, present: np.ndarray) -> bool:
    """Whether `present` are the labels that occur, and each as often as `pixels` has it."""
    if len(present) > _FEW:
        return bool(labels.min() >= 0) and np.array_equal(
            np.bincount(labels.ravel(), minlength=len(pixels)), pixels
        )
    claimed = pixels[present].tolist()
    if sum(claimed) != labels.size:
        return False
    return _counts(labels, present.tolist()) == claimed


def _counts(labels: np.ndarray, present: list[int]) -> list[int]:
    """How often each label of `present` occurs. Blocks stay in the processor's cache; 0 needs no comparison."""
    flat, counts = labels.ravel(), [0] * len(present)
    equal = np.empty(min(flat.size, _BLOCK), bool)
    for start in range(0, flat.size, _BLOCK):
        block = flat[start : start + _BLOCK]
        same = equal[: block.size]
        for place, label in enumerate(present):
            if label == 0:
                counts[place] += block.size - int(np.count_nonzero(block))
            else:
                np.equal(block, label, out=same)
                counts[place] += int(np.count_nonzero(same))
    return counts
