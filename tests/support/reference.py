"""Slow, obvious formulas that the fast code must equal, written from the description with one loop per sum."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cliper.model.config import LabelConfig


def fused_maps(attention: Tensor, layers: int) -> list[Tensor]:
    """Official step 4 for one image: [H, N, N] to `layers` maps [H, N, N]."""
    maps = []
    for _ in range(layers):
        attention = attention / attention.sum(dim=-2, keepdim=True)
        attention = attention / attention.sum(dim=-1, keepdim=True)
        symmetric = (attention + attention.transpose(-1, -2)) / 2
        positive = torch.relu(symmetric - symmetric.mean(dim=-2, keepdim=True))
        maps.append(positive / positive.sum(dim=-1, keepdim=True))
    return maps


def chain(maps: list[Tensor], scores: Tensor) -> Tensor:
    """A_1 A_2 ... A_n X, multiplied from the left as the paper writes it: [N, N] each, X [N, K]."""
    product = maps[0]
    for matrix in maps[1:]:
        product = product @ matrix
    return product @ scores


def sharpened(query: Tensor, key: Tensor, scale: float, threshold: float) -> Tensor:
    """Official step 7, one head: [N, D] twice to [N, N]."""
    attention = torch.softmax(query @ key.T * scale, dim=-1)
    attention = attention / (attention.max(dim=0, keepdim=True).values + 1e-5)
    attention = torch.where(attention < threshold, 0, attention)
    return attention / (attention.sum(dim=1, keepdim=True) + 1e-5)


def labels(refined: Tensor, presence: Tensor, size: tuple[int, int], config: LabelConfig) -> np.ndarray:
    """Official step 9 with all classes at full size: refined [K, h, w] to labels [H, W]."""
    full = F.interpolate(refined[None], size=size, mode="bilinear", align_corners=False)[0]
    full = full / (full.amax(dim=(1, 2), keepdim=True) + 1e-5) * presence[:, None, None]
    if config.normalize_per_class:
        full = full - full.amin(dim=(1, 2), keepdim=True)
        full = full / (full.amax(dim=(1, 2), keepdim=True) + 1e-6)
    absent = (presence <= config.presence_threshold)[:, None, None]
    gated = torch.where(absent, 0, full)
    ranked = torch.cat([torch.zeros(1, *size), gated]).sort(dim=0, descending=True).values
    clear = ranked[0] * (ranked[0] - ranked[1]).sqrt() >= config.margin_threshold**1.25
    return np.where(clear.numpy(), _decided(full, absent, config), 0)


def _decided(full: Tensor, absent: Tensor, config: LabelConfig) -> np.ndarray:
    if config.background_threshold > 0:
        full = torch.where(full < config.background_threshold, 0, full)
        full = torch.where(absent, 0, full)
        return torch.where(full.amax(dim=0) == 0, 0, full.argmax(dim=0) + 1).numpy()
    full = torch.where(absent, 0, full)
    plane = (1 - full.amax(dim=0, keepdim=True)) ** 2
    return torch.cat([plane, full]).argmax(dim=0).numpy()


def dino_map(features: Tensor, scale: float, shift: float) -> Tensor:
    """DINO's attention of one image, patch by patch: features [C, h, w] to [N, N]."""
    patches = [features[:, y, x] for y in range(features.shape[1]) for x in range(features.shape[2])]
    cosines = torch.stack([torch.stack([F.cosine_similarity(p, q, dim=0) for q in patches]) for p in patches])
    rows = []
    for row in scale * (cosines - shift * cosines.mean()):
        weights = torch.where(row < 0, 0, row.exp())
        rows.append(weights / weights.sum())
    return torch.stack(rows)
