"""DINO's features of patches, and the attention that their cosines give.

The formulas are those of the official code's refinement by DINO and of its attention type ``proxy``:
A = softmax(scale * (S - shift * mean(S))) by rows, without the entries below 0, S the cosines of all patches.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cliper.model.config import DinoConfig
from cliper.model.loading.pretrained import (
    Pretrained,
    architecture,
    check_pretrained,
    load_pretrained,
    resolve_pretrained,
)

NETWORKS = {  # model_type: class of transformers
    "vit": "ViTModel",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "dinov3_vit": "DINOv3ViTModel",
}
_OPTIONS: dict[str, dict[str, Any]] = {"vit": {"add_pooling_layer": False}}  # its pooler is not trained
_FORWARD: dict[str, dict[str, Any]] = {"vit": {"interpolate_pos_encoding": True}}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
ROWS = 1024  # of the map that exist at once: 64 MB in float32 at 16,384 patches


def resolve_dino(config: DinoConfig) -> Pretrained:
    """Locate the files of `config.model`. Raises WeightsError."""
    return resolve_pretrained(config.model, config.revision, "dino.model")


def check_dino(config: DinoConfig) -> None:
    """Raise WeightsError if the model is of another kind, or its weights do not fit."""
    found = resolve_dino(config)
    network = architecture(found, NETWORKS, "dino.model")
    check_pretrained(found, network, "dino.model", **_OPTIONS.get(found.kind, {}))


@dataclass(frozen=True)
class PatchFeatures:
    """Unit vectors of the patches of one image, float32 [N, C], and their grid (h, w)."""

    vectors: Tensor
    grid: tuple[int, int]


class Dino:
    """A resident DINO tower. It keeps no state between calls."""

    def __init__(self, config: DinoConfig, network: Any, device: torch.device) -> None:
        """Use a network of NETWORKS, which is moved to `device`."""
        self.config, self.device = config, device
        self.network = network.to(device).eval().requires_grad_(False)
        patch = network.config.patch_size
        self.patch = int(patch if isinstance(patch, int) else patch[0])
        self.prefix = 1 + int(getattr(network.config, "num_register_tokens", 0))  # tokens before the patches
        self.forward_options = _FORWARD.get(network.config.model_type, {})

    @classmethod
    def load(cls, config: DinoConfig, device: torch.device, dtype: torch.dtype) -> "Dino":
        """Load `config.model`. Raises WeightsError or ConfigError."""
        found = resolve_dino(config)
        network = architecture(found, NETWORKS, "dino.model")
        options = _OPTIONS.get(found.kind, {})
        check_pretrained(found, network, "dino.model", **options)
        return cls(config, load_pretrained(found, network, "dino.model", dtype, **options), device)

    def features(self, pixels: Tensor) -> Tensor:
        """The last layer's normalised patch tokens: pixels [B, 3, h, w] to [B, C, h/p, w/p], float32."""
        grid = (pixels.shape[-2] // self.patch, pixels.shape[-1] // self.patch)
        found = self.network(pixel_values=pixels.to(self.network.dtype), **self.forward_options)
        tokens = found.last_hidden_state[:, self.prefix :]  # [B, h/p * w/p, C]
        return tokens.float().transpose(1, 2).unflatten(-1, grid)

    @torch.inference_mode()
    def of_image(self, image: np.ndarray) -> PatchFeatures:
        """The features of uint8 RGB [H, W, 3] at its own size, scaled down to at most `long_side` pixels."""
        pixels = torch.from_numpy(np.array(image)).to(self.device).permute(2, 0, 1)[None].float() / 255
        size = self._fitting(image.shape[0], image.shape[1], self.config.long_side)
        resized = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False)
        found = self.features(_normalised(resized))[0]  # [C, h/p, w/p]
        return PatchFeatures(F.normalize(found.flatten(1), dim=0).T.contiguous(), (found.shape[1], found.shape[2]))

    def proxy(self, pixels: Tensor, grid: tuple[int, int], mean: Tensor, std: Tensor) -> Tensor:
        """The maps of attention type ``proxy``: [B, N, N] over the backbone's `grid` of N patches.

        `pixels` [B, 3, h, w] are the backbone's input, normalised by its `mean` and `std`, each [3, 1, 1].
        """
        if self.config.proxy_pixels == "once":
            pixels = pixels * std + mean
        size = self._fitting(pixels.shape[-2], pixels.shape[-1])
        resized = F.interpolate(pixels.float(), size=size, mode="bilinear", align_corners=False)
        found = F.interpolate(self.features(_normalised(resized)), size=grid, mode="bilinear", align_corners=False)
        unit = F.normalize(found.flatten(2), dim=1).transpose(1, 2)  # [B, N, C]
        return torch.stack(
            [attention_rows(one, one, self.config.proxy_scale, self.config.proxy_shift) for one in unit]
        )

    def _fitting(self, height: int, width: int, longest: int | None = None) -> tuple[int, int]:
        """The size of the input: whole patches, at least one, rounded down."""
        ratio = 1.0 if longest is None else min(1.0, longest / max(height, width))
        patch = self.patch
        return max(1, int(height * ratio) // patch) * patch, max(1, int(width * ratio) // patch) * patch


def _normalised(pixels: Tensor) -> Tensor:
    mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (pixels - mean) / std


def attention_rows(queries: Tensor, keys: Tensor, scale: float, shift: float) -> Tensor:
    """Rows of the map: unit vectors [r, C] and [N, C] to [r, N], each row summing to 1.

    If all patches look alike, their mean is near 1 and a shift above 1 leaves no entry in a row: such a row is 0
    (NaN in the official code).
    """
    total = keys.sum(dim=0)
    mean = (total @ total) / len(keys) ** 2  # of all cosines
    weights = scale * (queries @ keys.T - shift * mean)  # [r, N]
    attention = weights.masked_fill(weights < 0, -torch.inf).softmax(dim=-1)
    return attention.nan_to_num_(0.0)


def spread(features: PatchFeatures, scores: Tensor, config: DinoConfig) -> Tensor:
    """Refine scores [K, h, w] to [K, fh, fw], the grid of `features`; in blocks of rows, float32.

    A patch whose row of the map is empty keeps its own scores.
    """
    resized = F.interpolate(scores[None].float(), size=features.grid, mode="bilinear", align_corners=False)[0]
    flat = resized.flatten(1).T.contiguous()  # [N, K]
    out = []
    for rows, own in zip(features.vectors.split(ROWS), flat.split(ROWS), strict=True):
        weights = attention_rows(rows, features.vectors, config.scale, config.shift)
        out.append(torch.where(weights.sum(dim=-1, keepdim=True) > 0, weights @ flat, own))
    return torch.cat(out).T.unflatten(-1, features.grid)
