"""The official order of computation, written from its description: the baseline of every ratio.

One image at a time; the prompt embedded for every image; the attention of every UNet layer materialised and kept;
the UNet run to its end; the heads' maps multiplied as matrices; scores of all classes at full size.
The formulas agree with `cliper_model` (tests/model/test_speed_paths.py); only the order and the memory differ.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cliper.model.backbone import embed_patches, project_qkv
from cliper.model.config import CLIPerConfig


class KeepEverything:
    """Plain attention processor that appends its probabilities [B * H, N, M] to a list."""

    def __init__(self, kept: list[Tensor]) -> None:
        self.kept = kept

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Tensor:
        """Attention as softmax(q k^T * scale) v, with the probabilities in memory."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))  # [B * H, N, D]
        key, value = (attn.head_to_batch_dim(project(context)) for project in (attn.to_k, attn.to_v))
        probabilities = attn.get_attention_scores(query, key)  # [B * H, N, M]
        self.kept.append(probabilities)
        return attn.to_out[0](attn.batch_to_head_dim(probabilities @ value))


@dataclass(frozen=True)
class Official:
    """The networks, and the steps of one image in the official order."""

    config: CLIPerConfig
    visual: Any
    text: Tensor  # [T, C], unit vectors
    classes: int
    diffusion: Any  # benchmarks.models.StableDiffusion

    def clip(self, pixels: Tensor) -> Tensor:
        """Step 3 to 6: pixels [1, 3, h, w] to coarse scores [1, K, h/p, w/p]."""
        settings = self.config.fusion
        features, maps = self._encode(pixels)
        attention = torch.stack(maps).sum(dim=0)  # [1, H, N, N]
        block = self.visual.transformer.resblocks[-1]
        logits = []
        for feature in features:
            attention = attention / attention.sum(dim=-2, keepdim=True)
            attention = attention / attention.sum(dim=-1, keepdim=True)
            weights = (attention + attention.transpose(-2, -1)) / 2
            weights = torch.clamp(weights - weights.mean(dim=-2, keepdim=True), min=0)
            weights = weights / weights.sum(dim=-1, keepdim=True)
            _, _, value = project_qkv(block.attn, block.ln_1(feature))
            out = block.attn.out_proj((weights @ value).transpose(1, 2).flatten(2))
            embedded = F.normalize(self.visual.ln_post(out) @ self.visual.proj, dim=-1)
            logits.append(settings.logit_scale * embedded[:, 1:] @ self.text.T.to(embedded))  # [1, hw, T]
        scores = torch.stack(logits).softmax(dim=-1)[..., : self.classes].transpose(2, 3)  # [L, 1, K, hw]
        selected = scores[settings.select_layer]
        selected[selected < settings.attention_threshold * selected.amax(dim=-1, keepdim=True)] = 0
        coarse = selected @ weights.mean(dim=1)[:, 1:, 1:] + scores.mean(dim=0)
        patch = self.visual.patch_size[0]
        return coarse.unflatten(-1, (pixels.shape[-2] // patch, pixels.shape[-1] // patch))

    def _encode(self, pixels: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Features of every layer, and the attention of every layer but the last, all in memory."""
        settings = self.config.fusion
        x = embed_patches(self.visual, pixels.to(self.visual.proj.dtype), settings.position_dtype)
        features, maps = [], []
        for block in self.visual.transformer.resblocks[:-1]:
            normed = block.ln_1(x)
            features.append(normed)
            query, key, value = project_qkv(block.attn, normed)
            attention = (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(dim=-1)
            maps.append(attention)
            x = x + block.attn.out_proj((attention @ value).transpose(1, 2).flatten(2))
            x = x + block.mlp(block.ln_2(x))
        return [*features, x], maps

    def maps(self, image: np.ndarray, noise: Tensor) -> list[Tensor]:
        """Step 7: uint8 [H, W, 3] to the probabilities [heads, N, M] of every attention of the UNet."""
        sd = self.diffusion
        parameter = next(sd.unet.parameters())
        tokens = torch.full((1, 77), 49407, device=parameter.device)  # "" is an end token and padding
        prompt = sd.text_encoder(tokens)[0]
        pixels = torch.from_numpy(np.array(image)).to(parameter.device).permute(2, 0, 1)[None].float() / 255
        pixels = F.interpolate(pixels, size=(512, 512), mode="nearest") * 2 - 1
        latents = sd.vae.encode(pixels.to(parameter.dtype)).latent_dist.mean * sd.vae.config.scaling_factor
        timestep = sd.scheduler.timesteps[45].to(parameter.device)
        noisy = sd.scheduler.add_noise(latents, noise[None].to(latents), timestep[None])
        kept: list[Tensor] = []
        sd.unet.set_attn_processor(KeepEverything(kept))
        sd.unet(noisy, timestep, encoder_hidden_states=prompt)
        return kept

    def refine(self, coarse: Tensor, maps: list[Tensor]) -> Tensor:
        """Step 7, continued: coarse [1, K, h, w] and the UNet's maps to refined scores [1, K, S, S]."""
        heads = torch.cat([maps[layer] for layer in (-4, -6)])  # [n, N, N]
        heads = heads / (heads.amax(dim=-2, keepdim=True) + 1e-5)
        heads = torch.where(heads < self.config.fusion.attention_threshold, torch.zeros_like(heads), heads)
        heads = heads / (heads.sum(dim=-1, keepdim=True) + 1e-5)
        product = heads[0]
        for head in heads[1:]:
            product = product @ head  # [N, N]
        side = round(heads.shape[-1] ** 0.5)
        scores = F.interpolate(coarse, size=(side, side), mode="bilinear", align_corners=False)
        refined = product @ scores.flatten(2)[0].T.to(product)  # [N, K]
        return refined.T.unflatten(-1, (side, side))[None].to(coarse)

    def label(self, coarse: Tensor, refined: Tensor, size: tuple[int, int]) -> np.ndarray:
        """Step 8 and 9: labels of an image of (H, W), every class at full size."""
        settings = self.config.labels
        presence = 0.5 * coarse.flatten(2).amax(dim=-1) + 0.5 * refined.flatten(2).amax(dim=-1)  # [1, K]
        scores = F.interpolate(refined, size=size, mode="bilinear", align_corners=False)[0]  # [K, H, W]
        scores = scores / (scores.flatten(1).amax(dim=1)[:, None, None] + 1e-5) * presence[0, :, None, None]
        scores[scores < settings.background_threshold] = 0
        scores[presence[0] <= settings.presence_threshold] = 0
        labels = torch.where(scores.amax(dim=0) > 0, scores.argmax(dim=0) + 1, 0)
        return labels.cpu().numpy()
