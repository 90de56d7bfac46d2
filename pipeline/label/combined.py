"""Segmenters made of others: a vote inside regions, and the mean of several."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from cliper.model.errors import ConfigError
from cliper.model.labels import segment_scores
from cliper.model.networks.configs import EnsembleConfig, MasksConfig
from cliper.model.segmentation import Segmentation
from cliper.pipeline.label.fallback import Segmenter
from cliper.pipeline.label.heatmaps import HasHeat

Regions = npt.NDArray[np.int64]  # [H, W]: the number of every pixel's region, from 0; -1 outside all regions


def superpixels(image: np.ndarray, count: int, compactness: float) -> Regions:
    """About `count` regions of similar colour (SLIC) of uint8 RGB [H, W, 3]."""
    from skimage.segmentation import slic

    found = slic(image, n_segments=count, compactness=compactness, start_label=0, channel_axis=-1)
    _, regions = np.unique(found, return_inverse=True)
    return regions.reshape(image.shape[:2]).astype(np.int64)


class Voter:
    """Labels that are constant inside regions of the image, from those of another segmenter."""

    def __init__(
        self,
        config: MasksConfig,
        inner: Segmenter,
        classes: int,
        regions: Callable[[np.ndarray], Regions] | None = None,
    ) -> None:
        """`regions` finds those of an image; None is superpixels.

        Raises ConfigError if the vote needs scores and `inner` has none.
        """
        self.config, self.inner, self.classes = config, inner, classes
        self.regions = regions or partial(superpixels, count=config.count, compactness=config.compactness)
        if config.vote == "mean":
            scores_of(inner, config.segmenter)

    def segment(self, images: Sequence[np.ndarray], image_ids: Sequence[str]) -> list[Segmentation]:
        """Label uint8 RGB images [H, W, 3]; results in the same order."""
        found = self.inner.segment(images, image_ids)
        vote = self._by_mean if self.config.vote == "mean" else self._by_majority
        return [vote(image, i, one) for image, i, one in zip(images, image_ids, found, strict=True)]

    def _by_majority(self, image: np.ndarray, image_id: str, found: Segmentation) -> Segmentation:
        regions = self.regions(image)
        numbers = regions + 1  # 0 is outside
        labels, share, lead = majority(numbers, found.labels, self.classes)
        inside, own = regions >= 0, found.class_confidence[found.labels]
        return Segmentation.of(
            np.where(inside, labels[numbers], found.labels),
            self.classes,
            confidence=np.where(inside, share[numbers], own),
            margin=np.where(inside, lead[numbers], found.class_margin[found.labels]),
            presence=found.presence,
        )

    def _by_mean(self, image: np.ndarray, image_id: str, found: Segmentation) -> Segmentation:
        regions = self.regions(image)
        inside, own = regions >= 0, found.class_confidence[found.labels]
        numbers = regions + 1  # 0 is outside
        heat = torch.from_numpy(scores_of(self.inner, self.config.segmenter).heat(image, image_id)).float()
        means = region_means(heat, numbers)  # [K, R]
        voted = segment_scores(means[:, None], heat.amax(dim=(1, 2)), (1, means.shape[1]), self.config.labels)
        best, labels = means.numpy().max(axis=0), voted.labels[0]
        confidence = np.where(labels > 0, best, 1 - best)
        return Segmentation.of(
            np.where(inside, labels[numbers], found.labels),
            self.classes,
            confidence=np.where(inside, confidence[numbers], own),
            presence=voted.presence,
        )


def majority(
    regions: Regions, labels: np.ndarray, classes: int
) -> tuple[np.ndarray, npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The most frequent label of every region (the smallest of equals), its share, and its lead: each [R]."""
    size = int(regions.max()) + 1
    cells = regions.ravel() * (classes + 1) + labels.ravel().astype(np.int64)
    counts = np.bincount(cells, minlength=size * (classes + 1)).reshape(size, classes + 1)
    ranked = np.sort(counts, axis=1)
    total = np.maximum(counts.sum(axis=1), 1)
    return counts.argmax(axis=1), ranked[:, -1] / total, (ranked[:, -1] - ranked[:, -2]) / total


def region_means(scores: Tensor, regions: Regions) -> Tensor:
    """The mean of scores [K, h, w], resized to the regions' size, in every region: float32 [K, R]."""
    flat = torch.from_numpy(regions).flatten()
    pixels = torch.bincount(flat).clamp(min=1)
    means = []
    for one in scores:  # a class at a time: full size is needed for one only
        full = F.interpolate(one[None, None], size=regions.shape, mode="bilinear", align_corners=False).flatten()
        means.append(torch.zeros(len(pixels), dtype=torch.float64).index_add_(0, flat, full.double()) / pixels)
    return torch.stack(means).float()


class Ensemble:
    """The weighted mean of the scores of several segmenters."""

    def __init__(self, config: EnsembleConfig, members: Mapping[str, Segmenter]) -> None:
        """`members` in the order of the configuration. Raises ConfigError for one without scores."""
        self.config = config
        self.members = [scores_of(member, name.partition("-")[2]) for name, member in members.items()]

    def segment(self, images: Sequence[np.ndarray], image_ids: Sequence[str]) -> list[Segmentation]:
        """Label uint8 RGB images [H, W, 3]; results in the same order."""
        found = []
        for image, image_id in zip(images, image_ids, strict=True):
            mean = torch.from_numpy(self.heat(image, image_id))
            size = (image.shape[0], image.shape[1])
            found.append(segment_scores(mean, mean.amax(dim=(1, 2)), size, self.config.labels))
        return found

    def heat(self, image: np.ndarray, image_id: str) -> npt.NDArray[np.float32]:
        """The mean of the members' scores: float32 [K, side, side]."""
        side = self.config.side
        weights = [member.weight for member in self.config.members]
        total = torch.zeros(1)
        for member, weight in zip(self.members, weights, strict=True):
            scores = torch.from_numpy(member.heat(image, image_id))[None].float()
            resized = F.interpolate(scores, size=(side, side), mode="bilinear", align_corners=False)[0]
            total = total + weight / sum(weights) * resized
        mean: npt.NDArray[np.float32] = total.numpy()
        return mean


def scores_of(segmenter: Segmenter, name: str) -> HasHeat:
    """The segmenter as one with score maps. Raises ConfigError if it has none."""
    if not isinstance(segmenter, HasHeat):
        raise ConfigError(f"the segmenter '{name}' has no scores to average; use vote: majority")
    return segmenter
