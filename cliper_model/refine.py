"""Fine-grained compensation: self-attention maps applied to class scores.

The maps are only ever multiplied with the scores, so the chain A_1 A_2 ... A_n X is evaluated from the right:
n * 2 * N^2 * K operations instead of n * 2 * N^3 for the product of the maps, and one head's map in memory
instead of all. N is 4096 at 512 pixels.

`head_map` is the formula. The CPU applies it in blocks of rows that stay in the cache; CUDA uses the kernels of
`refine_triton`, which store no map at all. Without Triton, `head_map` itself is multiplied.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cliper.model import kernels
from cliper.model.config import Refinement
from cliper.model.diffusion import QueryKey

ROWS = 512  # rows of a map processed at once on the CPU: 8 MB of float32 at N = 4096
EPSILON = 1e-5  # the official code adds it to both divisors

HeadOperator = Callable[[int, int, Tensor], Tensor]  # (layer, head, scores [B, N, K]) -> [B, N, K]


def head_map(query: Tensor, key: Tensor, scale: float, threshold: float) -> Tensor:
    """Return the sharpened self-attention of one head, rows summing to 1: [B, N, N] from two [B, N, D].

    Softmax, divided by each key's maximum over the queries, thresholded, normalised by rows (official step 7).
    """
    # baddbmm scales the product as diffusers does: the threshold below is sharp, so rounding matters.
    logits = torch.baddbmm(query.new_empty(1, 1, 1), query, key.transpose(-2, -1), beta=0, alpha=scale)
    attention = torch.softmax(logits, dim=-1, dtype=torch.float32)  # [B, N, N]
    attention /= attention.amax(dim=-2, keepdim=True) + EPSILON
    attention *= attention >= threshold
    attention /= attention.sum(dim=-1, keepdim=True) + EPSILON
    return attention


def apply_head(
    query: Tensor, key: Tensor, scale: float, threshold: float, scores: Tensor, buffer: Tensor
) -> Tensor:
    """`head_map(...) @ scores` of one image, in blocks of rows: [N, K] from float32 [N, D], [N, D] and [N, K].

    `buffer` [N, N] holds the softmax between the two passes; its contents do not matter.
    """
    keys = key.T  # [D, N]
    peak = query.new_zeros(len(key))  # [N]: each key's maximum over the queries
    for block, rows in zip(buffer.split(ROWS), query.split(ROWS), strict=True):
        torch.addmm(query.new_empty(1, 1), rows, keys, beta=0, alpha=scale, out=block)
        torch.softmax(block, dim=-1, out=block)
        torch.maximum(peak, block.amax(dim=0), out=peak)
    sharpen = 1 / (peak + EPSILON)
    below = math.nextafter(threshold, -math.inf)  # F.threshold drops equal values, the formula keeps them
    summed = torch.cat([scores, scores.new_ones(len(scores), 1)], dim=1)  # [N, K + 1]: row sums last
    out = [F.threshold(block.mul_(sharpen), below, 0.0, inplace=True) @ summed for block in buffer.split(ROWS)]
    product = torch.cat(out)  # [N, K + 1]
    return product[:, :-1] / (product[:, -1:] + EPSILON)


def refine(
    coarse: Tensor, layers: Sequence[QueryKey], threshold: float, mode: Refinement, selection: int = 0
) -> Tensor:
    """Refine coarse scores [B, K, h, w] to [B, K, S, S], S = sqrt(N), in float32.

    Heads are numbered through the layers in order. `chain` applies all maps, the last head first; `mean`
    averages them; `selection` applies head number `selection` alone (IndexError if there is none).
    """
    side = round(layers[0].query.shape[-2] ** 0.5)
    scores = F.interpolate(coarse.float(), size=(side, side), mode="bilinear", align_corners=False)
    flat = scores.flatten(2).transpose(1, 2).contiguous()  # [B, N, K]
    apply = head_operator(layers, threshold)
    heads = [(i, head) for i, layer in enumerate(layers) for head in range(layer.query.shape[1])]
    if mode == "selection":
        heads = [heads[selection]]
    if mode == "mean":
        flat = torch.stack([apply(layer, head, flat) for layer, head in heads]).mean(dim=0)
    else:
        for layer, head in reversed(heads):
            flat = apply(layer, head, flat)
    return flat.transpose(1, 2).unflatten(-1, (side, side))  # [B, K, S, S]


def head_operator(layers: Sequence[QueryKey], threshold: float) -> HeadOperator:
    """Return the fastest way to multiply one head's map into scores on the device of `layers`."""
    if layers[0].query.device.type == "cpu":
        return _streamed(layers, threshold)
    if all(kernels.available(layer.query) for layer in layers):
        from cliper.model.kernels.refine_triton import HeadMaps

        return HeadMaps(layers, threshold)
    return _plain(layers, threshold)


def _plain(layers: Sequence[QueryKey], threshold: float) -> HeadOperator:
    def apply(layer: int, head: int, scores: Tensor) -> Tensor:
        query, key = layers[layer].query[:, head], layers[layer].key[:, head]
        return head_map(query, key, layers[layer].scale, threshold) @ scores

    return apply


def _streamed(layers: Sequence[QueryKey], threshold: float) -> HeadOperator:
    tokens = layers[0].query.shape[-2]
    buffer = torch.empty(tokens, tokens)

    def apply(layer: int, head: int, scores: Tensor) -> Tensor:
        query, key = (t[:, head].float() for t in (layers[layer].query, layers[layer].key))  # [B, N, D]
        scale = layers[layer].scale
        return torch.stack(
            [apply_head(q, k, scale, threshold, x, buffer) for q, k, x in zip(query, key, scores, strict=True)]
        )

    return apply
