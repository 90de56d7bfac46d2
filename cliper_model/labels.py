"""From class scores to a label map at the image's own size, in bounded memory.

The scores of all classes at full size never exist: the map is computed in bands of rows, twice (once for
each class's range, once for the labels). Upsampling a band is one small matrix product.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cliper.model.classes import mask_dtype
from cliper.model.config import LabelConfig, SigmoidConfig
from cliper.model.segmentation import BINS, STEPS, Segmentation

__all__ = ["LABEL_RULES", "Segmentation", "presence_scores", "segment_scores"]

BAND_ELEMENTS = 4_000_000  # class scores held at once: 16 MB in float32
_Decision = tuple[Tensor, Tensor, Tensor]  # winner, confidence, margin: each [rows, W]
_LANES = 64  # partial sums per label: an accelerator adds to one address slowly


@dataclass(frozen=True)
class _Planes:
    """The classes that can win, each with the line `slope * refined + offset` that makes it comparable."""

    refined: Tensor  # [P, h, w]
    across: Tensor  # [w, W]: interpolation along the width
    slope: Tensor  # [P, 1, 1]
    offset: Tensor  # [P, 1, 1]

    def band(self, down: Tensor) -> Tensor:
        """Rows of the full-size scores: [rows, h] -> [P, rows, W]."""
        return upsample_band(self.refined, down, self.across) * self.slope + self.offset


def upsample_band(scores: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """Interpolate scores [P, h, w] to some rows [rows, h] of the full size, all columns [w, W]: [P, rows, W]."""
    return (down @ scores) @ across


def presence_scores(coarse: Tensor, refined: Tensor) -> Tensor:
    """Image-level score of every class [B, K]: half the peak of coarse, half the peak of refined (step 8)."""
    return 0.5 * coarse.float().flatten(2).amax(dim=-1) + 0.5 * refined.flatten(2).amax(dim=-1)


@torch.inference_mode()
def segment_scores(
    refined: Tensor,
    presence: Tensor,
    size: tuple[int, int],
    config: LabelConfig | SigmoidConfig,
    background_plane: bool = False,
) -> Segmentation:
    """Label one image: scores [K, h, w] and presence [K], both float32, to a Segmentation of `size` (H, W).

    `config` chooses and sets the rule of LABEL_RULES: a LabelConfig (its `protocol`) or a SigmoidConfig.
    `background_plane` (only for ``mmseg``): one more plane, the last, is the background's.
    """
    return LABEL_RULES[config.protocol](refined, presence, size, config, background_plane)


def label_gated(
    refined: Tensor, presence: Tensor, size: tuple[int, int], config: LabelConfig, background_plane: bool = False
) -> Segmentation:
    """Rule ``cliper``: the official decision.

    A class whose presence is at or below the presence threshold has score 0 everywhere and cannot win.
    """
    gated = presence > config.presence_threshold
    kept = _candidates(gated)  # [P]
    bands = _row_bands(size, refined.shape[-2], len(kept), refined.device)
    planes = _scale(refined[kept], (presence * gated)[kept], size, bands, config)
    labels, tally = _decide_bands(
        bands,
        size,
        len(kept),
        refined.device,
        lambda down: _decide(planes.band(down), config.background_threshold, config.margin_threshold),
    )
    ids = torch.cat([kept.new_zeros(1), kept + 1])  # [P + 1]: label of each position
    return tally.summarise(ids, labels, presence)


def label_most_probable(
    scores: Tensor, presence: Tensor, size: tuple[int, int], config: LabelConfig, background_plane: bool = False
) -> Segmentation:
    """Rule ``mmseg``: the class with the largest share of the upsampled scores wins, if that is enough."""
    classes = len(scores) - background_plane
    return _label_all(
        scores,
        presence[:classes],
        size,
        lambda band: _decide_by_share(band, config.probability_threshold, classes, config.margin_threshold),
    )


def label_independent(
    scores: Tensor, presence: Tensor, size: tuple[int, int], config: SigmoidConfig, background_plane: bool = False
) -> Segmentation:
    """Rule ``sigmoid``: every class has a probability of its own; the largest wins, if it is enough.

    Background is where it is below `threshold` t; with `margin_rule`, where s1 * sqrt(s1 - s2) < t^1.25 for the
    best score s1 and the second s2: a confident class that another one equals does not win.
    """
    return _label_all(scores, presence, size, lambda band: _decide_alone(band, config))


# How scores become labels, by the name in `protocol`. Add a rule here.
LABEL_RULES: dict[str, Callable[[Tensor, Tensor, tuple[int, int], Any, bool], Segmentation]] = {
    "cliper": label_gated,
    "mmseg": label_most_probable,
    "sigmoid": label_independent,
}


def _label_all(
    scores: Tensor, presence: Tensor, size: tuple[int, int], decide: Callable[[Tensor], _Decision]
) -> Segmentation:
    """Label with every class in the running; `decide` gets bands of the upsampled scores [P, rows, W]."""
    across = upsampling_matrix(scores.shape[-1], size[1], scores.device).T  # [w, W]
    bands = _row_bands(size, scores.shape[-2], len(scores), scores.device)
    labels, tally = _decide_bands(
        bands, size, len(presence), scores.device, lambda down: decide(upsample_band(scores, down, across))
    )
    return tally.summarise(torch.arange(len(presence) + 1), labels, presence)


def _decide_bands(
    bands: list[Tensor],
    size: tuple[int, int],
    classes: int,
    device: torch.device,
    decide: Callable[[Tensor], _Decision],
) -> tuple[Tensor, "_Tally"]:
    """Decide band by band: labels [H, W] (0, or 1 + place among `classes`) and their statistics."""
    labels = torch.zeros(size, dtype=_position_dtype(classes), device=device)
    tally = _Tally(classes + 1, device)
    row = 0
    for down in bands:
        winner, confidence, margin = decide(down)
        labels[row : row + len(down)] = winner
        tally.add(winner, confidence, margin)
        row += len(down)
    return labels, tally


def _position_dtype(classes: int) -> torch.dtype:
    """A byte a pixel if that can hold 0 and every class: the array copied to the host."""
    return torch.uint8 if classes < 256 else torch.int32


def _candidates(gated: Tensor) -> Tensor:
    """Indices [P] of the classes to upsample, of a mask [K] of those that can win.

    Their number would have to be fetched from an accelerator before its work could go on: there all classes
    are upsampled, and those that cannot win are weighed with 0, which is below every background threshold and
    loses to the background plane.
    """
    if gated.device.type == "cpu":
        return gated.nonzero()[:, 0]
    return torch.arange(len(gated), device=gated.device)


def _lead(best: Tensor, second: Tensor, threshold: float) -> tuple[Tensor, float]:
    """How far the best of two scores wins, s1 * sqrt(s1 - s2), and what is needed at a threshold: t^1.25."""
    return best * (best - second).clamp(min=0).sqrt(), threshold**1.25


def _decide_by_share(
    scores: Tensor, threshold: float, classes: int, margin: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Winner (0, or 1 + plane below `classes`), confidence and margin of a band [P, rows, W]: each [rows, W]."""
    share = scores / scores.sum(dim=0).clamp(min=1e-12)
    best, plane = share.max(dim=0)
    second = share.scatter(0, plane[None], -torch.inf).amax(dim=0).clamp(min=0)
    strength, needed = _lead(best, second, margin)
    sure = (best >= threshold) & (strength >= needed)
    return (
        torch.where(sure & (plane < classes), plane + 1, 0),
        torch.where(sure, best, 1 - best).clamp(0, 1),
        torch.where(sure, best - second, torch.maximum(threshold - best, needed - strength)).clamp(0, 1),
    )


def _decide_alone(scores: Tensor, config: SigmoidConfig) -> _Decision:
    """Winner (0 or 1 + class), confidence and margin of a band of probabilities [P, rows, W]: each [rows, W]."""
    best, plane = scores.max(dim=0)
    second = scores.scatter(0, plane[None], -torch.inf).amax(dim=0).clamp(min=0)
    strength, needed = best, config.threshold
    if config.margin_rule:
        strength, needed = _lead(best, second, config.threshold)
    wins = strength >= needed
    return (
        torch.where(wins, plane + 1, 0),
        torch.where(wins, best, 1 - best).clamp(0, 1),
        torch.where(wins, best - second, needed - strength).clamp(0, 1),
    )


@lru_cache(maxsize=32)  # image sizes repeat
def upsampling_matrix(source: int, target: int, device: torch.device) -> Tensor:
    """Bilinear interpolation (align_corners=False) along one axis as a matrix, float32 [target, source]."""
    centre = (torch.arange(target, device=device, dtype=torch.float64) + 0.5) * (source / target) - 0.5
    centre = centre.clamp(min=0)
    left = centre.floor().long().clamp(max=source - 1)
    right = (left + 1).clamp(max=source - 1)
    weight = (centre - left).float()[:, None]
    matrix = torch.zeros(target, source, device=device)
    matrix.scatter_add_(1, left[:, None], 1 - weight)
    return matrix.scatter_add_(1, right[:, None], weight)


def _row_bands(size: tuple[int, int], source: int, planes: int, device: torch.device) -> list[Tensor]:
    """Cut the row interpolation [H, h] into bands so that [planes, rows, W] stays below BAND_ELEMENTS."""
    rows = max(1, BAND_ELEMENTS // (max(planes, 1) * size[1]))
    return list(upsampling_matrix(source, size[0], device).split(rows))


def _scale(
    refined: Tensor, presence: Tensor, size: tuple[int, int], bands: list[Tensor], config: LabelConfig
) -> _Planes:
    """Step 9 as one line per class: divide by the maximum, weigh by presence, stretch to [0, 1] if asked.

    The maximum and minimum are those of the upsampled scores, as in the official code.
    """
    across = upsampling_matrix(refined.shape[-1], size[1], refined.device).T  # [w, W]
    minimum, maximum = refined.new_full((2, len(refined)), torch.inf)  # each [P]
    maximum = -maximum
    for down in bands:  # kept as running values: a list of results would pin the freed bands' memory
        low, high = torch.aminmax(upsample_band(refined, down, across).flatten(1), dim=1)
        minimum, maximum = torch.minimum(minimum, low), torch.maximum(maximum, high)
    slope = presence / (maximum + 1e-5)
    offset = torch.zeros_like(slope)
    if config.normalize_per_class:
        stretch = 1 / (slope * (maximum - minimum) + 1e-6)
        slope, offset = slope * stretch, -slope * minimum * stretch
    return _Planes(refined, across, slope[:, None, None], offset[:, None, None])


def _decide(scores: Tensor, threshold: float, margin: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Winner (0 or 1 + plane), confidence and margin of a band [P, rows, W]: each [rows, W]."""
    if len(scores) == 0:
        empty = scores.new_zeros(scores.shape[1:])
        return empty.int(), empty + 1, empty + (threshold or 1)  # the background plane is 1 everywhere
    best, plane = scores.max(dim=0)
    second = scores.scatter(0, plane[None], -torch.inf).amax(dim=0).clamp(min=0)
    rival = torch.zeros_like(best) + threshold if threshold > 0 else (1 - best) ** 2
    strength, needed = _lead(best, second, margin)
    wins = (best >= rival if threshold > 0 else best > rival) & (strength >= needed)
    background = (1 - best).clamp(0, 1) if threshold > 0 else rival.clamp(0, 1)
    lead = best - second if threshold > 0 else best - torch.maximum(second, rival)
    winner = torch.where(wins, plane.int() + 1, 0)
    return (
        winner,
        torch.where(wins, best.clamp(0, 1), background),
        torch.where(wins, lead, torch.maximum(rival - best, needed - strength)).clamp(0, 1),
    )


class _Tally:
    """Integer sums and histograms per label, added up band by band; nothing is fetched before `summarise`."""

    def __init__(self, labels: int, device: torch.device) -> None:
        self.sums = torch.zeros(2, labels * _LANES, dtype=torch.int64, device=device)  # confidence, margin
        self.histogram = torch.zeros(labels * BINS, dtype=torch.int64, device=device)  # of confidence

    def add(self, winner: Tensor, confidence: Tensor, margin: Tensor) -> None:
        """Add a band; all arguments [rows, W], values in [0, 1]."""
        flat = winner.flatten().long()
        lanes = flat * _LANES + torch.arange(len(flat), device=flat.device) % _LANES
        for row, values in enumerate((confidence, margin)):
            self.sums[row].scatter_add_(0, lanes, (values.flatten() * STEPS).round().long())
        bins = flat * BINS + (confidence.flatten() * BINS).long().clamp(max=BINS - 1)
        self.histogram.scatter_add_(0, bins, torch.ones_like(bins))

    def summarise(self, ids: Tensor, labels: Tensor, presence: Tensor) -> Segmentation:
        """Put the counts of the kept classes (`ids` [P + 1]) back in their places among all K + 1."""
        classes, index = len(presence) + 1, ids.cpu().numpy()
        histogram = self.histogram.view(-1, BINS).cpu().numpy()  # [P + 1, bins]
        sums = self.sums.view(2, -1, _LANES).sum(dim=-1).cpu().numpy()  # [2, P + 1]
        return Segmentation.from_counts(
            index.astype(mask_dtype(len(presence)))[labels.cpu().numpy()],
            presence.float().cpu().numpy(),
            _spread(sums.T, index, classes).T,
            _spread(histogram, index, classes),
        )


def _spread(values: np.ndarray, index: np.ndarray, size: int) -> np.ndarray:
    """Rows [P + 1, n] at their places among `size`; 0 elsewhere."""
    out = np.zeros((size, *values.shape[1:]), dtype=values.dtype)
    out[index] = values
    return out
