"""One pass of an open_clip vision transformer that keeps the features and attention for early-layer fusion.

The model's own modules are called one by one; nothing in open_clip is patched or subclassed.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cliper.model import kernels
from cliper.model.config import BackboneConfig
from cliper.model.errors import WeightsError
from cliper.model.loading.weights import Backbone, resolve_backbone


@dataclass(frozen=True)
class Vision:
    """The output of `encode`: per-layer inputs of the last attention, and the attention of the early layers."""

    features: Tensor  # [L, B, N, C]: ln_1 of block k on its input for k < L-1, then the last block's raw input
    # [B, H, N, N]: softmax attention summed over blocks 0..L-2, CLS first. Float32; float16 by the CUDA kernels.
    attention: Tensor


def load_backbone(config: BackboneConfig, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """Load (CLIP model, tokenizer) in evaluation mode.

    Raises WeightsError if weights are missing, do not fit the architecture, or the vision tower is not a
    plain ViT with a CLS token.
    """
    from cliper.model._libraries import open_clip
    from cliper.model.loading.check import check_backbone

    found = resolve_backbone(config)
    check_backbone(found, config.model)
    try:
        model = _create(found)
    except (RuntimeError, ValueError, KeyError, AssertionError) as error:  # open_clip asserts on shapes
        reason = str(error).splitlines()[0]
        raise WeightsError(f"{found.checkpoint} does not fit {config.model}: {reason}") from error
    _check_plain_vit(model, config.model)
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False), open_clip.get_tokenizer(found.name)


def _create(found: Backbone) -> nn.Module:
    from cliper.model._libraries import open_clip
    from cliper.model.loading.check import clip_settings

    if not found.openai:
        checkpoint = None if found.name.startswith("local-dir:") else str(found.checkpoint)
        model: nn.Module = open_clip.create_model(found.name, pretrained=checkpoint, require_pretrained=True)
        return model
    model = open_clip.CLIP(**clip_settings(found))
    open_clip.model.set_model_preprocess_cfg(model, asdict(open_clip.transform.PreprocessCfg()))
    state = torch.jit.load(str(found.checkpoint), map_location="cpu").state_dict()
    for name in ("input_resolution", "context_length", "vocab_size"):  # buffers of the archive, not weights
        state.pop(name, None)
    model.load_state_dict({name: value.float() for name, value in state.items()})
    return model


def _check_plain_vit(model: nn.Module, name: str) -> None:
    visual = getattr(model, "visual", None)
    blocks = getattr(getattr(visual, "transformer", None), "resblocks", [])
    plain = (
        len(blocks) >= 2
        and all(isinstance(getattr(block, "attn", None), nn.MultiheadAttention) for block in blocks)
        and getattr(visual, "attn_pool", None) is None
        and hasattr(visual, "class_embedding")
    )
    if not plain:
        raise WeightsError(f"backbone '{name}' is not a plain ViT with a CLS token; use e.g. ViT-B-16, ViT-L-14")


def patch_size(visual: nn.Module) -> int:
    """Return the side of a patch in pixels."""
    return int(visual.patch_size[0])  # type: ignore[index]


def position_embedding(visual: Any, grid: tuple[int, int], dtype: str) -> Tensor:
    """Resize the learned positions to `grid` patches: [1 + h*w, C], the CLS row kept.

    Bilinear, align_corners=False; `dtype` "float16" rounds the result as the official code does.
    """
    positions = visual.positional_embedding.float()
    cls, patches = positions[:1], positions[1:]
    patches = patches.T.reshape(1, -1, *visual.grid_size)  # [1, C, h0, w0]
    patches = F.interpolate(patches, size=grid, mode="bilinear", align_corners=False)
    resized = torch.cat([cls, patches.flatten(2)[0].T])  # [1 + h*w, C]
    return resized.half().float() if dtype == "float16" else resized


def embed_patches(visual: Any, pixels: Tensor, position_dtype: str) -> Tensor:
    """From normalised pixels [B, 3, h, w] to the first block's input [B, 1 + h/p * w/p, C]."""
    patches = visual.conv1(pixels)  # [B, C, h/p, w/p]
    grid = (patches.shape[-2], patches.shape[-1])
    x = patches.flatten(2).transpose(1, 2)  # [B, h/p * w/p, C]
    cls = visual.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
    x = torch.cat([cls, x], dim=1) + position_embedding(visual, grid, position_dtype).to(x.dtype)
    return visual.ln_pre(x)


def encode(visual: Any, pixels: Tensor, position_dtype: str = "float16") -> Vision:
    """Run blocks 0..L-2 on normalised pixels [B, 3, h, w] whose sides are multiples of the patch size."""
    x = embed_patches(visual, pixels, position_dtype)  # [B, N, C]
    blocks = visual.transformer.resblocks
    if kernels.available(split_heads(x, blocks[0].attn.num_heads)):
        return _encode_on_cuda(blocks, x)
    batch, tokens, _ = x.shape
    # Always float32, in any precision of the model: as many normalisation rounds follow as there are layers.
    total = x.new_zeros(batch, blocks[0].attn.num_heads, tokens, tokens, dtype=torch.float32)
    features = []
    for block in blocks[:-1]:
        normed = block.ln_1(x)
        features.append(normed)
        query, key, value = project_qkv(block.attn, normed)  # each [B, H, N, D]
        attention = attend(query, key)  # [B, H, N, N]
        total += attention
        x = _finish_block(block, x, attention @ value)
    features.append(x)
    return Vision(torch.stack(features), total)


def _finish_block(block: Any, x: Tensor, attended: Tensor) -> Tensor:
    """Apply the rest of a block after attention [B, H, N, D] to its input `x` [B, N, C]."""
    x = x + block.ls_1(merge_heads(block.attn, attended))
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def _encode_on_cuda(blocks: Any, x: Tensor) -> Vision:
    """`encode` with fused attention; the summed maps are computed afterwards from every block's q and k."""
    from cliper.model.kernels.fusion_triton import attention_sum

    heads = blocks[0].attn.num_heads
    projected = x.new_empty(len(blocks) - 1, *x.shape[:2], 3 * x.shape[2])  # [L - 1, B, N, 3C]
    features = x.new_empty(len(blocks), *x.shape)  # [L, B, N, C]
    for i, block in enumerate(blocks[:-1]):
        features[i] = normed = block.ln_1(x)
        weight, bias = block.attn.in_proj_weight, block.attn.in_proj_bias
        torch.addmm(bias, normed.flatten(0, 1), weight.T, out=projected[i].flatten(0, 1))
        query, key, value = (split_heads(part, heads) for part in projected[i].chunk(3, dim=-1))
        x = _finish_block(block, x, F.scaled_dot_product_attention(query, key, value))
    features[-1] = x
    query, key, _ = (split_heads(part, heads) for part in projected.chunk(3, dim=-1))  # each [L - 1, B, H, N, D]
    return Vision(features, attention_sum(query, key, query.shape[-1] ** -0.5))


def project_qkv(attn: nn.MultiheadAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Project [..., N, C] to query, key and value, each [..., H, N, C / H]."""
    qkv = F.linear(x, attn.in_proj_weight, attn.in_proj_bias)  # [..., N, 3C]
    query, key, value = (split_heads(part, attn.num_heads) for part in qkv.chunk(3, dim=-1))
    return query, key, value


def project_value(attn: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """Project [..., N, C] to the value alone, [..., H, N, C / H]."""
    width = attn.embed_dim
    return split_heads(F.linear(x, attn.in_proj_weight[-width:], attn.in_proj_bias[-width:]), attn.num_heads)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[..., N, C] -> [..., H, N, C / H]."""
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def merge_heads(attn: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """[..., H, N, C / H] -> the attention's output projection of [..., N, C]."""
    return attn.out_proj(x.transpose(-3, -2).flatten(-2))


def attend(query: Tensor, key: Tensor) -> Tensor:
    """Softmax attention of [..., H, N, D] with the usual 1 / sqrt(D): [..., H, N, N], rows sum to 1."""
    scale = query.shape[-1] ** -0.5
    return torch.softmax((query * scale) @ key.transpose(-2, -1), dim=-1)
