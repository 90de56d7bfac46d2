"""Early-layer fusion: pure functions from the vision pass to coarse class scores.

The formulas are those of CLIPer (ICCV 2025), section 3.2, in the order of the official code.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cliper.model import kernels
from cliper.model.backbone import Vision, attend, encode, merge_heads, project_qkv, project_value
from cliper.model.config import FusionConfig, SlidingConfig

# Normalised pixels [B, 3, h, w] and the grid of patches to maps [B, hw, hw] that replace CLIP's attention.
Proxy = Callable[[Tensor, tuple[int, int]], Tensor]


@dataclass(frozen=True)
class LayerLogits:
    """The output of one pass over an image or window."""

    logits: Tensor  # [L, B, T, h, w]: scaled cosine of every layer's patches with every text vector
    attention: Tensor  # [B, hw, hw]: the map that weighed the last layer's values, head mean, without CLS


@dataclass(frozen=True)
class Scaling:
    """A Sinkhorn round of A as diag(row) A diag(column): N numbers a side instead of a new [N, N]."""

    row: Tensor  # [..., N]
    column: Tensor  # [..., N]
    mean: Tensor  # [..., N]: twice the column means of the symmetrised map


def sinkhorn_rounds(attention: Tensor, rounds: int) -> Iterator[Scaling]:
    """Normalise columns, then rows, of [..., N, N] `rounds` times (Sinkhorn-Knopp); yield every round.

    Every round is a diagonal scaling of the first matrix, so a round is two products of it with a vector.
    """
    if kernels.available(attention[..., :64]):
        from cliper.model.kernels import fusion_triton

        for vectors in fusion_triton.sinkhorn_vectors(attention, rounds):
            yield Scaling(*vectors)
        return
    row = attention.new_ones(*attention.shape[:-1], 1)  # [..., N, 1]
    sums = attention.transpose(-2, -1) @ row
    for _ in range(rounds):
        column = 1 / sums
        row = 1 / (attention @ column)
        sums = attention.transpose(-2, -1) @ row
        # Rows sum to 1 and columns to column * sums; (A + A^T) / 2 averages the two.
        mean = (1 + column * sums) / attention.shape[-1]
        yield Scaling(row[..., 0], column[..., 0], mean[..., 0])


def affinity(attention: Tensor, scaling: Scaling) -> Tensor:
    """Scale and symmetrise [..., N, N] and keep the part above each column's mean; rows are not normalised yet."""
    scaled = attention * scaling.row[..., None] * scaling.column[..., None, :]
    return (scaled + scaled.transpose(-2, -1)).sub_(scaling.mean[..., None, :]).relu_()


def spread_values(attention: Tensor, scaling: Scaling, value: Tensor) -> Tensor:
    """Multiply the row-normalised affinity of `attention` [B, H, N, N] with `value` [G, B, H, N, D].

    Computes in float32 in any precision of the model. Returns the shape and dtype of `value`.
    """
    if kernels.available(value):
        return _spread_on_cuda(attention, scaling, value)
    groups, *lead, tokens, width = value.shape
    columns = value.float().permute(1, 2, 3, 0, 4).flatten(3)  # [B, H, N, G * D]
    summed = torch.cat([columns, columns.new_ones(*lead, tokens, 1)], dim=-1)  # row sums come along
    heads = (t.flatten(0, 1) for t in (attention, scaling.row, scaling.column, scaling.mean, summed))
    # One head at a time: its map stays in the cache.
    out = torch.stack([affinity(a, Scaling(r, c, m)) @ x for a, r, c, m, x in zip(*heads, strict=True)])
    out = out[..., :-1] / out[..., -1:]  # [B * H, N, G * D]
    return out.view(*lead, tokens, groups, width).permute(3, 0, 1, 2, 4).to(value.dtype)


def _spread_on_cuda(attention: Tensor, scaling: Scaling, value: Tensor) -> Tensor:
    from cliper.model.kernels import fusion_triton

    if len(value) == 1:
        vectors = (scaling.row, scaling.column, scaling.mean)
        return fusion_triton.spread_values(attention, *vectors, value[0])[None]
    weights = affinity(attention, scaling)
    weights /= weights.sum(dim=-1, keepdim=True)  # [B, H, N, N]
    columns = value.permute(1, 2, 3, 0, 4).flatten(3)  # [B, H, N, G * D]: one product for all layers
    return (weights.to(value.dtype) @ columns).unflatten(-1, (len(value), -1)).permute(3, 0, 1, 2, 4)


def mean_affinity(attention: Tensor, scaling: Scaling) -> Tensor:
    """Head mean of the row-normalised affinity: [B, N, N]."""
    total = torch.zeros_like(attention[:, 0], dtype=torch.float32)
    for head in range(attention.shape[1]):
        one = Scaling(scaling.row[:, head], scaling.column[:, head], scaling.mean[:, head])
        weights = affinity(attention[:, head], one)
        total += weights / weights.sum(dim=-1, keepdim=True)
    return total / attention.shape[1]


def last_block_map(kind: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The attention maps used as baselines in the literature: [B, H, N, N] from the last block's projections."""
    pairs = {"qq": (query, query), "kk": (key, key), "vv": (value, value), "vanilla": (query, key)}
    if kind == "identity":
        tokens = query.shape[-2]
        return torch.eye(tokens, device=query.device, dtype=query.dtype).expand(*query.shape[:-1], tokens)
    return attend(*pairs[kind])


def layer_logits(
    visual: Any,
    vision: Vision,
    text: Tensor,
    config: FusionConfig,
    grid: tuple[int, int],
    proxy: Tensor | None = None,
) -> LayerLogits:
    """Pass every layer's features through the last block's attention, and compare them with the text.

    `text`: unit vectors [T, C] in float32. `proxy` [B, hw, hw] is the map of attention type ``proxy``. No residual
    and no MLP: patches stay near the text space.
    """
    block = visual.transformer.resblocks[-1]
    normed = block.ln_1(vision.features)  # [L, B, N, C]
    if proxy is not None:
        values, attention = _proxy_values(block.attn, normed, proxy)
    elif config.attention == "fused":
        values, attention = _fused_values(block.attn, normed, vision, config)  # [L, B, H, N, D], [B, N, N]
    else:
        values, attention = _last_block_values(block.attn, normed, config)
    embedded = visual.ln_post(merge_heads(block.attn, values)) @ visual.proj  # [L, B, N, C_text]
    cosine = F.normalize(embedded[..., 1:, :].float(), dim=-1) @ text.T  # [L, B, hw, T]
    logits = (config.logit_scale * cosine).transpose(2, 3).unflatten(-1, grid)
    return LayerLogits(logits, attention[:, 1:, 1:])


def _fused_values(attn: Any, normed: Tensor, vision: Vision, config: FusionConfig) -> tuple[Tensor, Tensor]:
    """Spread every layer's values by its own Sinkhorn round, or all by the last one."""
    value = project_value(attn, normed)  # [L, B, H, N, D]
    rounds = list(sinkhorn_rounds(vision.attention, len(value)))
    if config.sinkhorn == "converged":
        spread = spread_values(vision.attention, rounds[-1], value)
    else:
        parts = zip(rounds, value.split(1), strict=True)
        spread = torch.cat([spread_values(vision.attention, scaling, part) for scaling, part in parts])
    return spread, mean_affinity(vision.attention, rounds[-1])


def _proxy_values(attn: Any, normed: Tensor, proxy: Tensor) -> tuple[Tensor, Tensor]:
    """Spread every layer's values by one map [B, hw, hw] for all heads; the CLS token takes no part and gets 0."""
    weights = F.pad(proxy, (1, 0, 1, 0))  # [B, N, N]
    value = project_value(attn, normed)  # [L, B, H, N, D]
    return weights[:, None].to(value.dtype) @ value, weights


def _last_block_values(attn: Any, normed: Tensor, config: FusionConfig) -> tuple[Tensor, Tensor]:
    """Spread every layer's values by the attention map of that layer's projections."""
    spread = []
    for features in normed:
        query, key, value = project_qkv(attn, features)  # each [B, H, N, D]
        weights = last_block_map(config.attention, query, key, value)
        spread.append(weights @ value)
    return torch.stack(spread), weights.float().mean(dim=1)


def encode_logits(
    visual: Any, pixels: Tensor, text: Tensor, config: FusionConfig, proxy: Proxy | None = None
) -> LayerLogits:
    """One whole pass: normalised pixels [B, 3, h, w] -> logits [L, B, T, h/p, w/p] and attention."""
    patch = visual.patch_size[0]
    grid = (pixels.shape[-2] // patch, pixels.shape[-1] // patch)
    vision = encode(visual, pixels.to(visual.proj.dtype), config.position_dtype)
    maps = None if proxy is None else proxy(pixels, grid)
    return layer_logits(visual, vision, text, config, grid, maps)


def class_scores(logits: Tensor, classes: int, words: Sequence[int] = ()) -> Tensor:
    """Softmax of [L, B, T, ...] over all text vectors, keeping the first `classes`.

    With `words`, class c has the next `words[c]` vectors and its score is their maximum.
    """
    scores = logits.softmax(dim=2)
    if not words:
        return scores[:, :, :classes]
    per_class = scores[:, :, : sum(words)].split(list(words), dim=2)
    return torch.stack([part.amax(dim=2) for part in per_class], dim=2)


def coarse_scores(
    visual: Any,
    pixels: Tensor,
    text: Tensor,
    classes: int,
    config: FusionConfig,
    sliding: SlidingConfig | None,
    words: Sequence[int] = (),
    proxy: Proxy | None = None,
) -> Tensor:
    """Coarse scores [B, K, h/p, w/p] of normalised pixels [B, 3, h, w], in float32."""
    scores, attention = layer_scores(visual, pixels, text, classes, config, sliding, words, proxy)
    return combine_layers(scores, attention, config)


def layer_scores(
    visual: Any,
    pixels: Tensor,
    text: Tensor,
    classes: int,
    config: FusionConfig,
    sliding: SlidingConfig | None,
    words: Sequence[int] = (),
    proxy: Proxy | None = None,
) -> tuple[Tensor, Tensor]:
    """Class scores of every layer [L, B, K, h/p, w/p], and the attention [B, hw, hw] of the whole image.

    `proxy` computes the maps of attention type ``proxy``, of the image and of every window.
    """
    whole = encode_logits(visual, pixels, text, config, proxy)
    scores = class_scores(whole.logits, classes, words)  # [L, B, K, h, w]
    if sliding is not None:
        windows = sliding_logits(visual, pixels, text, config, sliding, proxy)
        scores = 0.5 * class_scores(windows, classes, words) + 0.5 * scores
    return scores, whole.attention


def combine_layers(scores: Tensor, attention: Tensor, config: FusionConfig) -> Tensor:
    """Selected layer, thresholded and spread by the attention, plus the mean over layers.

    `scores` [L, B, K, h, w], `attention` [B, hw, hw]; returns [B, K, h, w].
    """
    selected = scores[config.select_layer]  # [B, K, h, w]
    peak = selected.amax(dim=(-2, -1), keepdim=True)
    kept = selected * (selected >= config.attention_threshold * peak)
    weights = attention if config.combination == "v2" else attention.transpose(-2, -1)
    spread = (kept.flatten(2) @ weights).unflatten(-1, scores.shape[-2:])  # [B, K, h, w]
    if not config.feature_fusion:
        return spread
    if config.combination == "v1":
        return spread + scores[:-1].mean(dim=0)
    # The official code thresholds in place, so the selected layer enters the mean thresholded as well.
    mean = (scores.sum(dim=0) - selected + kept) / len(scores)
    return spread + mean


def window_starts(length: int, crop: int, stride: int) -> list[int]:
    """Starts of windows of size `crop` that cover `length`; the last one is moved back to end at the border."""
    count = max(length - crop + stride - 1, 0) // stride + 1
    return [max(min(i * stride, length - crop), 0) for i in range(count)]


def sliding_logits(
    visual: Any,
    pixels: Tensor,
    text: Tensor,
    config: FusionConfig,
    sliding: SlidingConfig,
    proxy: Proxy | None = None,
) -> Tensor:
    """Average the windows' logits, then spread them by the windows' accumulated attention: [L, B, T, h, w]."""
    patch = visual.patch_size[0]
    height, width = pixels.shape[-2] // patch, pixels.shape[-1] // patch
    index = torch.arange(height * width, device=pixels.device).view(height, width)
    logits: Tensor | None = None
    count = pixels.new_zeros(height, width)
    attention = pixels.new_zeros(len(pixels), height * width, height * width)  # [B, hw, hw]
    pairs = pixels.new_zeros(height * width, height * width)
    for top in window_starts(pixels.shape[-2], sliding.crop, sliding.stride):
        for left in window_starts(pixels.shape[-1], sliding.crop, sliding.stride):
            window = pixels[..., top : top + sliding.crop, left : left + sliding.crop]
            part = encode_logits(visual, window, text, config, proxy)
            rows = slice(top // patch, top // patch + part.logits.shape[-2])
            columns = slice(left // patch, left // patch + part.logits.shape[-1])
            if logits is None:
                logits = part.logits.new_zeros(*part.logits.shape[:-2], height, width)
            logits[..., rows, columns] += part.logits
            count[rows, columns] += 1
            inside = index[rows, columns].flatten()
            attention[:, inside[:, None], inside[None]] += part.attention
            pairs[inside[:, None], inside[None]] += 1
    assert logits is not None  # window_starts yields at least one window
    attention = attention / (pairs + 1e-5)
    attention = attention / attention.sum(dim=-1, keepdim=True)
    mean = (logits / count).flatten(-2)  # [L, B, T, hw]
    return (mean @ attention).unflatten(-1, (height, width))
