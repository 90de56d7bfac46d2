"""Early-layer fusion on CUDA: summed attention, Sinkhorn rounds and affinity without intermediate maps.

The formulas are those of `fusion` and `backbone.encode`. Importing this module needs Triton.
"""

# ruff: noqa: N803  (Triton's compile-time arguments are in capitals)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import math
from collections.abc import Iterator

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]
from torch import Tensor

from cliper.model.kernels.refine_triton import launch_options, padded_length, precision_of, row_logsumexp


@triton.jit
def attention_sum_kernel(
    query, key, logsum, out, stride_l, stride_b, stride_n, heads, pairs, tokens, out_n, scale,
    layers: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out[b, h, i, j] = sum over layers of the softmax attention; the padding columns become 0."""
    pair = tl.program_id(2)
    start = (pair // heads).to(tl.int64) * stride_b + (pair % heads) * WIDTH
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    width = tl.arange(0, WIDTH)
    place = rows[:, None] * stride_n + width[None, :]
    other = columns[None, :] * stride_n + width[:, None]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for layer in range(0, layers):
        first = start + layer * stride_l
        q = tl.load(query + first + place, mask=rows[:, None] < tokens, other=0.0)
        k = tl.load(key + first + other, mask=columns[None, :] < tokens, other=0.0)
        row_sum = tl.load(logsum + (layer * pairs + pair) * tokens + rows, mask=rows < tokens, other=0.0)
        total += tl.exp2(tl.dot(q, k, input_precision=PRECISION) * scale - row_sum[:, None])
    total = tl.where(columns[None, :] < tokens, total, 0.0)
    target = out + (pair.to(tl.int64) * tokens + rows[:, None]) * out_n + columns[None, :]
    tl.store(target, total, mask=(rows[:, None] < tokens) & (columns[None, :] < out_n))


@triton.jit
def row_scale_kernel(attention, column, out, stride_b, stride_n, tokens, LENGTH: tl.constexpr, ROWS: tl.constexpr):
    """out[i] = 1 / (sum over j of a_ij * column_j)."""
    pair = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = attention + pair.to(tl.int64) * stride_b + rows[:, None] * stride_n
    total = tl.zeros([ROWS], tl.float32)
    for first in range(0, LENGTH, 64):
        columns = first + tl.arange(0, 64)
        inside = (rows[:, None] < tokens) & (columns[None, :] < tokens)
        a = tl.load(start + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(a * tl.load(column + pair * tokens + columns, mask=columns < tokens, other=0.0), axis=1)
    tl.store(out + pair * tokens + rows, 1 / total, mask=rows < tokens)


@triton.jit
def column_sum_kernel(
    attention, row, out, stride_b, stride_n, tokens, LENGTH: tl.constexpr, COLUMNS: tl.constexpr
):
    """out[j] = sum over i of row_i * a_ij."""
    pair = tl.program_id(1)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    start = attention + pair.to(tl.int64) * stride_b + columns[None, :]
    total = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, LENGTH, 64):
        rows = first + tl.arange(0, 64)
        inside = (rows[:, None] < tokens) & (columns[None, :] < tokens)
        a = tl.load(start + rows[:, None] * stride_n, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(row + pair * tokens + rows, mask=rows < tokens, other=0.0)
        total += tl.sum(a * scale[:, None], axis=0)
    tl.store(out + pair * tokens + columns, total, mask=columns < tokens)


@triton.jit
def spread_kernel(
    attention, row, column, mean, value, out, stride_b, stride_n, heads, tokens,
    WIDTH: tl.constexpr, LENGTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Symmetrised, thresholded and row-normalised attention times values, one head's tile of rows."""
    pair = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    width = tl.arange(0, WIDTH)
    matrix = attention + pair.to(tl.int64) * stride_b
    stats = pair * tokens
    channels = heads * WIDTH
    start = (pair // heads).to(tl.int64) * tokens * channels + (pair % heads) * WIDTH
    row_i = tl.load(row + stats + rows, mask=rows < tokens, other=0.0)
    column_i = tl.load(column + stats + rows, mask=rows < tokens, other=0.0)
    weights = tl.zeros([ROWS], tl.float32)
    product = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in range(0, LENGTH, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        inside = (rows[:, None] < tokens) & (columns[None, :] < tokens)
        across = tl.load(matrix + rows[:, None] * stride_n + columns[None, :], mask=inside, other=0.0)
        mirror = (columns[:, None] < tokens) & (rows[None, :] < tokens)
        down = tl.load(matrix + columns[:, None] * stride_n + rows[None, :], mask=mirror, other=0.0)
        row_j = tl.load(row + stats + columns, mask=columns < tokens, other=0.0)
        column_j = tl.load(column + stats + columns, mask=columns < tokens, other=0.0)
        mean_j = tl.load(mean + stats + columns, mask=columns < tokens, other=0.0)
        above = across.to(tl.float32) * row_i[:, None] * column_j[None, :]
        above += tl.trans(down.to(tl.float32)) * row_j[None, :] * column_i[:, None]
        above = tl.maximum(above - mean_j[None, :], 0.0) * LENGTH  # of order 1, to keep small ones in float16
        place = value + start + columns[:, None] * channels + width[None, :]
        v = tl.load(place, mask=columns[:, None] < tokens, other=0.0)
        weights += tl.sum(above, axis=1)
        product = tl.dot(above.to(v.dtype), v, product, input_precision=PRECISION)
    place = out + start + rows[:, None] * channels + width[None, :]
    tl.store(place, (product / weights[:, None]).to(out.dtype.element_ty), mask=rows[:, None] < tokens)


def attention_sum(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Sum of softmax attention over layers: [B, H, N, N] of two [L, B, H, N, D] with heads side by side in memory.

    Float32 for float32 models, else float16: sums stay below the number of layers, and their smallest parts
    are dropped by the affinity. Rows are padded in memory to a multiple of 16 elements.
    """
    layers, batch, heads, tokens, width = query.shape
    logsum = row_logsumexp(query.flatten(0, 1), key.flatten(0, 1), scale)  # [L * B, H, N]
    padded = 16 * triton.cdiv(tokens, 16)
    dtype = torch.float32 if query.dtype == torch.float32 else torch.float16
    out = query.new_empty(batch, heads, tokens, padded, dtype=dtype)
    grid = (triton.cdiv(tokens, 64), triton.cdiv(tokens, 64), batch * heads)
    attention_sum_kernel[grid](
        query, key, logsum, out, query.stride(0), query.stride(1), query.stride(3), heads, batch * heads, tokens,
        padded, scale * math.log2(math.e), layers, WIDTH=width, ROWS=64, COLUMNS=64,
        PRECISION=precision_of(query.dtype), **launch_options(query.dtype),
    )  # fmt: skip
    return out[..., :tokens]


def sinkhorn_vectors(attention: Tensor, rounds: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(row, column, mean) of `fusion.sinkhorn_rounds`, float32 [B, H, N] each."""
    batch, heads, tokens, _ = attention.shape
    flat = attention.flatten(0, 1)
    strides = (flat.stride(0), flat.stride(1), tokens)
    grid, length = (triton.cdiv(tokens, 32), batch * heads), padded_length(tokens)
    row = torch.ones(batch, heads, tokens, device=attention.device)
    sums = torch.empty_like(row)
    column_sum_kernel[grid](flat, row, sums, *strides, LENGTH=length, COLUMNS=32)
    for _ in range(rounds):
        column, row, sums = 1 / sums, torch.empty_like(row), torch.empty_like(row)
        row_scale_kernel[grid](flat, column, row, *strides, LENGTH=length, ROWS=32)
        column_sum_kernel[grid](flat, row, sums, *strides, LENGTH=length, COLUMNS=32)
        yield row, column, (1 + column * sums) / tokens


def spread_values(attention: Tensor, row: Tensor, column: Tensor, mean: Tensor, value: Tensor) -> Tensor:
    """`fusion.spread_values` of one layer: attention [B, H, N, N], vectors [B, H, N], value [B, H, N, D].

    Returns the value's shape and dtype, with heads side by side in memory.
    """
    batch, heads, tokens, width = value.shape
    value = value.transpose(1, 2).contiguous()  # [B, N, H, D]
    out = torch.empty_like(value)
    flat = attention.flatten(0, 1)
    spread_kernel[(triton.cdiv(tokens, 64), batch * heads)](
        flat, row, column, mean, value, out, flat.stride(0), flat.stride(1), heads, tokens,
        WIDTH=width, LENGTH=padded_length(tokens), ROWS=64, COLUMNS=64,
        PRECISION=precision_of(value.dtype), **launch_options(value.dtype),
    )  # fmt: skip
    return out.transpose(1, 2)
