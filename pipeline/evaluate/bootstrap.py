"""Bootstrap over images: the variation of a benchmark's mIoU with other images of the same kind.

Images are drawn with replacement (Efron's percentile interval). A draw only needs each image's per-class totals,
so a thousand draws are one matrix product. Results depend on the set of images and on the seed alone.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cliper.pipeline.errors import EvaluationError
from cliper.pipeline.evaluate.metrics import Floats, Ints, Protocol, counted_classes, ratio

DRAWS = 1000
SEED = 0
_CHUNK = 100  # draws multiplied at once: bounds memory at 100 x images weights


@dataclass(frozen=True)
class Interval:
    """A 95% interval: 2.5th and 97.5th percentile of the draws."""

    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """Run B minus run A on the same images."""

    miou: float
    interval: Interval
    share_better: float  # share of draws in which B is above A, 0 to 1


def drawn_miou(
    totals: Ints, protocol: Protocol, ignore_labels: tuple[int, ...], draws: int = DRAWS, seed: int = SEED
) -> Floats:
    """The mIoU of `draws` resamples: float64 [draws], from totals int64 [N, 3, K + 1] (agree, truth, predicted).

    The images must be in a fixed order (by image id) for the draws to be reproducible.
    """
    images = len(totals)
    if not images:
        raise EvaluationError("no images to draw from: the evaluation is empty")
    flat = totals.reshape(images, -1).astype(np.float64)  # exact: counts stay far below 2^53
    rng = np.random.default_rng(seed)
    values = [
        _miou(rng.multinomial(images, np.full(images, 1 / images), size=size) @ flat, protocol, ignore_labels)
        for size in _chunks(draws)
    ]
    return np.concatenate(values)


def _chunks(draws: int) -> list[int]:
    return [min(_CHUNK, draws - start) for start in range(0, draws, _CHUNK)]


def _miou(drawn: Floats, protocol: Protocol, ignore_labels: tuple[int, ...]) -> Floats:
    """The mIoU of every draw: [D, 3 * (K + 1)] -> [D]."""
    agree, truth, predicted = np.moveaxis(drawn.reshape(len(drawn), 3, -1).astype(np.int64), 1, 0)  # each [D, K+1]
    union = truth + predicted - agree
    counted = counted_classes(truth, union, protocol, ignore_labels)
    iou = np.where(counted, np.nan_to_num(ratio(agree, union)), 0.0)
    return np.asarray(iou.sum(axis=1) / np.maximum(counted.sum(axis=1), 1))


def interval(values: Floats) -> Interval:
    """The central 95% of `values`."""
    low, high = np.percentile(values, [2.5, 97.5])
    return Interval(float(low), float(high))


def difference(
    first: Ints, second: Ints, protocol: Protocol, ignore_labels: tuple[int, ...], draws: int = DRAWS
) -> Difference:
    """Compare two runs on the same images with the same draws: totals int64 [N, 3, K + 1] each, in one order.

    The draws are paired: both runs are scored on the same resampled images, which removes the variation caused by
    easy and hard images.
    """
    if first.shape != second.shape:
        raise EvaluationError(f"runs of {len(first)} and {len(second)} images or other classes cannot be paired")
    a, b = (drawn_miou(totals, protocol, ignore_labels, draws) for totals in (first, second))
    whole = [
        _miou(t.sum(axis=0).reshape(1, -1).astype(np.float64), protocol, ignore_labels)[0] for t in (first, second)
    ]
    share: npt.NDArray[np.float64] = np.asarray(b > a, dtype=np.float64)
    return Difference(float(whole[1] - whole[0]), interval(b - a), float(share.mean()))
