"""Fine-grained compensation on CUDA: every head's map is recomputed in tiles and never stored.

Three kernels over tiles of softmax(q k^T * scale): the logarithm of each row's sum, each column's maximum,
and the map (divided, thresholded, normalised) times the scores. Logarithms and powers are to base 2.
The formula is `refine.head_map`. Importing this module needs Triton.
"""

# ruff: noqa: N803  (Triton's compile-time arguments are in capitals)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import math
from collections.abc import Sequence

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]
from torch import Tensor

from cliper.model.diffusion import QueryKey

EPSILON = 1e-5  # as in refine.head_map
MAX_CLASSES = 128  # scores one program accumulates; more classes run as further programs


@triton.jit
def _tile(query, key, rows, columns, width, stride, tokens, scale, PRECISION: tl.constexpr):
    """Logits of a tile, base 2: [rows, columns] of q k^T * scale."""
    q = tl.load(query + rows[:, None] * stride + width[None, :], mask=rows[:, None] < tokens, other=0.0)
    k = tl.load(key + columns[None, :] * stride + width[:, None], mask=columns[None, :] < tokens, other=0.0)
    return tl.dot(q, k, input_precision=PRECISION) * scale


@triton.jit
def row_logsumexp_kernel(
    query, key, out, stride_b, stride_h, stride_n, heads, tokens, scale,
    WIDTH: tl.constexpr, LENGTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out[b, h, i] = log2 of the sum over j of 2^(logit i, j)."""
    pair = tl.program_id(1)
    start = (pair // heads).to(tl.int64) * stride_b + (pair % heads) * stride_h
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    width = tl.arange(0, WIDTH)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for first in range(0, LENGTH, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        logits = _tile(query + start, key + start, rows, columns, width, stride_n, tokens, scale, PRECISION)
        logits = tl.where(columns[None, :] < tokens, logits, float("-inf"))
        higher = tl.maximum(peak, tl.max(logits, axis=1))
        total = total * tl.exp2(peak - higher) + tl.sum(tl.exp2(logits - higher[:, None]), axis=1)
        peak = higher
    tl.store(out + pair * tokens + rows, peak + tl.log2(total), mask=rows < tokens)


@triton.jit
def column_peak_kernel(
    query, key, logsum, out, stride_b, stride_h, stride_n, heads, tokens, scale,
    WIDTH: tl.constexpr, LENGTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out[b, h, j] = log2 of (maximum over i of the softmax at i, j, plus epsilon)."""
    pair = tl.program_id(1)
    start = (pair // heads).to(tl.int64) * stride_b + (pair % heads) * stride_h
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    width = tl.arange(0, WIDTH)
    peak = tl.full([COLUMNS], float("-inf"), tl.float32)
    for first in range(0, LENGTH, ROWS):
        rows = first + tl.arange(0, ROWS)
        logits = _tile(query + start, key + start, rows, columns, width, stride_n, tokens, scale, PRECISION)
        total = tl.load(logsum + pair * tokens + rows, mask=rows < tokens, other=float("inf"))
        peak = tl.maximum(peak, tl.max(logits - total[:, None], axis=0))
    tl.store(out + pair * tokens + columns, tl.log2(tl.exp2(peak) + 1e-5), mask=columns < tokens)


@triton.jit
def apply_kernel(
    query, key, logsum, peak, scores, out, stride_b, stride_n, stats_b, tokens, classes, scale, threshold,
    WIDTH: tl.constexpr, LENGTH: tl.constexpr, CLASSES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr, SUM_PRECISION: tl.constexpr,
):  # fmt: skip
    """One head: out[b, i, c] = (sum over j of a_ij x_jc) / (sum of a_ij + epsilon), `threshold` in base 2."""
    image = tl.program_id(1)
    start = image.to(tl.int64) * stride_b
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    width = tl.arange(0, WIDTH)
    planes = tl.program_id(2) * CLASSES + tl.arange(0, CLASSES)
    total = tl.load(logsum + image * stats_b + rows, mask=rows < tokens, other=0.0)
    weights = tl.zeros([ROWS], tl.float32)
    product = tl.zeros([ROWS, CLASSES], tl.float32)
    for first in range(0, LENGTH, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        logits = _tile(query + start, key + start, rows, columns, width, stride_n, tokens, scale, PRECISION)
        highest = tl.load(peak + image * stats_b + columns, mask=columns < tokens, other=float("inf"))
        logits = logits - total[:, None] - highest[None, :]
        sharp = tl.where(logits >= threshold, tl.exp2(logits), 0.0)
        inside = (columns[:, None] < tokens) & (planes[None, :] < classes)
        place = (image * tokens + columns[:, None]) * classes + planes[None, :]
        x = tl.load(scores + place, mask=inside, other=0.0)
        weights += tl.sum(sharp, axis=1)
        product = tl.dot(sharp, x, product, input_precision=SUM_PRECISION)
    product = product / (weights[:, None] + 1e-5)
    place = (image * tokens + rows[:, None]) * classes + planes[None, :]
    tl.store(out + place, product, mask=(rows[:, None] < tokens) & (planes[None, :] < classes))


def precision_of(dtype: torch.dtype) -> str:
    """The precision of dot products: three tf32 products replace one in float32; ignored for half precision."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def launch_options(dtype: torch.dtype) -> dict[str, int]:
    """Warps per program and pipeline stages: one float32 tile fits the shared memory of small GPUs."""
    return {"num_warps": 4, "num_stages": 1 if dtype == torch.float32 else 2}


def padded_length(tokens: int) -> int:
    """Round up to a multiple of 64, a compile-time constant, so that one compilation serves many image shapes."""
    return 64 * triton.cdiv(tokens, 64)


def row_logsumexp(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """log2 of the row sums of exp(q k^T * scale): float32 [B, H, N] from two [B, H, N, D] of equal strides."""
    batch, heads, tokens, width = query.shape
    out = query.new_empty(batch, heads, tokens, dtype=torch.float32)
    grid = (triton.cdiv(tokens, 128), batch * heads)
    row_logsumexp_kernel[grid](
        query, key, out, query.stride(0), query.stride(1), query.stride(2), heads, tokens,
        scale * math.log2(math.e), WIDTH=width, LENGTH=padded_length(tokens), ROWS=128, COLUMNS=64,
        PRECISION=precision_of(query.dtype), **launch_options(query.dtype),
    )  # fmt: skip
    return out


def column_peak(query: Tensor, key: Tensor, logsum: Tensor, scale: float) -> Tensor:
    """log2 of each key's greatest probability over the queries, plus epsilon: float32 [B, H, N]."""
    batch, heads, tokens, width = query.shape
    out = torch.empty_like(logsum)
    grid = (triton.cdiv(tokens, 128), batch * heads)
    column_peak_kernel[grid](
        query, key, logsum, out, query.stride(0), query.stride(1), query.stride(2), heads, tokens,
        scale * math.log2(math.e), WIDTH=width, LENGTH=padded_length(tokens), ROWS=64, COLUMNS=128,
        PRECISION=precision_of(query.dtype), **launch_options(query.dtype),
    )  # fmt: skip
    return out


class HeadMaps:
    """The maps of all heads of some layers, as an operator on scores (a `refine.HeadOperator`)."""

    def __init__(self, layers: Sequence[QueryKey], threshold: float) -> None:
        self.layers = layers
        self.threshold = math.log2(threshold) if threshold > 0 else -math.inf
        self.logsum = [row_logsumexp(layer.query, layer.key, layer.scale) for layer in layers]
        pairs = zip(layers, self.logsum, strict=True)
        self.peak = [column_peak(layer.query, layer.key, logsum, layer.scale) for layer, logsum in pairs]

    def __call__(self, layer: int, head: int, scores: Tensor) -> Tensor:
        """One head's map times contiguous float32 scores [B, N, K]."""
        query, key = self.layers[layer].query[:, head], self.layers[layer].key[:, head]  # [B, N, D]
        logsum, peak = self.logsum[layer][:, head], self.peak[layer][:, head]  # [B, N]
        batch, tokens, classes = scores.shape
        planes = min(MAX_CLASSES, max(16, triton.next_power_of_2(classes)))
        out = torch.empty_like(scores)
        precision = precision_of(query.dtype)
        apply_kernel[(triton.cdiv(tokens, 64), batch, triton.cdiv(classes, planes))](
            query, key, logsum, peak, scores, out, query.stride(0), query.stride(1), logsum.stride(0),
            tokens, classes, self.layers[layer].scale * math.log2(math.e), self.threshold,
            WIDTH=query.shape[-1], LENGTH=padded_length(tokens), CLASSES=planes, ROWS=64, COLUMNS=64,
            PRECISION=precision, SUM_PRECISION=precision, **launch_options(query.dtype),
        )  # fmt: skip
        return out
