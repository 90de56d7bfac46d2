"""A bound on the change of refined scores caused by attention weights on the sharp threshold of FGC.

`weight >= threshold` includes or drops a whole summand. If a weight equals the threshold up to rounding, machines
decide differently, and both results are correct. The bound covers the affected entries and their possible change.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cliper.model.diffusion import QueryKey

NEAR = 1e-5  # relative distance from the threshold within which rounding may decide
EPSILON = 1e-5  # the official code adds it to both divisors


def flip_bound(
    coarse: Tensor, layers: Sequence[QueryKey], threshold: float, mode: str = "chain", selection: int = 0
) -> tuple[Tensor, int]:
    """Bound on the change of one image's refined scores [K, N], and the number of weights on the threshold.

    `coarse` [K, h, w]; the plain formula on the layers' query and key [1, H, N, D], in float64.
    """
    side = round(layers[0].query.shape[-2] ** 0.5)
    scores = F.interpolate(coarse[None].double(), size=(side, side), mode="bilinear", align_corners=False)
    start = scores.flatten(2)[0].T  # [N, K]
    heads = [(layer, head) for layer in layers for head in range(layer.query.shape[1])]
    if mode == "selection":
        heads = [heads[selection]]
    if mode != "mean":
        x, bound, count = start, torch.zeros_like(start), 0
        for layer, head in reversed(heads):
            x, bound, near = _apply(layer, head, threshold, x, bound)
            count += near
        return bound.T, count
    parts = [_apply(layer, head, threshold, start, torch.zeros_like(start)) for layer, head in heads]
    return torch.stack([bound for _, bound, _ in parts]).mean(dim=0).T, sum(near for *_, near in parts)


def _apply(layer: QueryKey, head: int, threshold: float, x: Tensor, bound: Tensor) -> tuple[Tensor, Tensor, int]:
    """One head's map times `x` [N, K]: the product, its bound from that of `x`, and the weights on the threshold.

    Rows with such weights are computed twice, with all of them kept and with all of them dropped.
    """
    query, key = layer.query[0, head].double(), layer.key[0, head].double()
    weights = torch.softmax(query @ key.T * layer.scale, dim=-1)  # [N, N]
    weights /= weights.amax(dim=0, keepdim=True) + EPSILON
    near = (weights - threshold).abs() <= NEAR * threshold  # [N, N]
    kept = weights * ((weights >= threshold) | near)
    product = _normalised(kept) @ x
    propagated = _normalised(kept) @ bound
    rows = near.any(dim=1).nonzero()[:, 0]
    dropped = _normalised(kept[rows] * ~near[rows])
    propagated[rows] = torch.maximum(propagated[rows], dropped @ bound) + (product[rows] - dropped @ x).abs()
    return product, propagated, int(near.sum())


def _normalised(weights: Tensor) -> Tensor:
    return weights / (weights.sum(dim=1, keepdim=True) + EPSILON)
