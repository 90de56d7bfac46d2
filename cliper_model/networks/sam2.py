"""Regions of an image by SAM 2: the masks of a grid of points, without classes."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from cliper.model.loading.pretrained import architecture, check_pretrained, hash_of, load_pretrained
from cliper.model.networks.configs import MasksConfig
from cliper.model.networks.dino import MEAN, STD
from cliper.model.networks.locate import locate
from cliper.model.segmenter import pick_device, pick_dtype

NETWORKS = {"sam2": "Sam2Model", "sam2_video": "Sam2Model"}  # a video checkpoint holds the image model
CHUNK = 64  # points that run together


class Sam2Regions:
    """A resident SAM 2 as a function from images to regions."""

    def __init__(self, config: MasksConfig, network: Any) -> None:
        """Use a Sam2Model on its device."""
        self.config, self.network = config, network.eval().requires_grad_(False)
        self.side = int(network.config.prompt_encoder_config.image_size)
        centres = (torch.arange(config.points) + 0.5) / config.points * self.side
        self.points = torch.cartesian_prod(centres, centres).flip(1)  # [P, 2], (x, y) row by row

    @torch.inference_mode()
    def __call__(self, image: np.ndarray) -> npt.NDArray[np.int64]:
        """Regions of uint8 RGB [H, W, 3]: int64 [H, W], -1 outside all masks. Smaller masks lie on larger ones."""
        masks = self.masks(image)  # [M, h, w]
        areas = (masks > 0).flatten(1).sum(dim=1)
        size = (image.shape[0], image.shape[1])
        regions = torch.full(size, -1, dtype=torch.int64)
        for number in areas.argsort(descending=True, stable=True).tolist():
            full = F.interpolate(masks[number][None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
            regions[full.cpu() > 0] = number
        found: npt.NDArray[np.int64] = regions.numpy()
        return found

    @torch.inference_mode()
    def masks(self, image: np.ndarray) -> Tensor:
        """The best mask of every point if its predicted IoU is at least `min_iou`: logits, float32 [M, h, w]."""
        pixels = self.preprocess(image).to(self.network.device, self.network.dtype)[None]
        embeddings = self.network.get_image_embeddings(pixels)
        kept = []
        for points in self.points.split(CHUNK):
            asked = points[None, :, None].to(pixels)  # [1, P, 1, 2]
            found = self.network(image_embeddings=list(embeddings), input_points=asked, multimask_output=True)
            iou, best = found.iou_scores[0].float().max(dim=-1)  # [P]
            chosen = found.pred_masks[0].float()[torch.arange(len(best), device=best.device), best]  # [P, h, w]
            kept.append(chosen[iou >= self.config.min_iou])
        return torch.cat(kept)

    def preprocess(self, image: np.ndarray) -> Tensor:
        """Uint8 [H, W, 3] to float32 [3, side, side]: bilinear, ImageNet's mean and deviation."""
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
        size = (self.side, self.side)
        resized = F.interpolate(pixels, size=size, mode="bilinear", antialias=True)[0]
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        return (resized - mean) / std


def load(config: MasksConfig, device: str, dtype: str) -> Sam2Regions:
    """Load `config.weights` onto `device`. Raises WeightsError or ConfigError."""
    where, found = pick_device(device), locate(config)
    network = architecture(found, NETWORKS, "model.weights")
    return Sam2Regions(
        config, load_pretrained(found, network, "model.weights", pick_dtype(dtype, where)).to(where)
    )


def identity(config: MasksConfig) -> dict[str, str]:
    """SHA-256 of the files. Raises WeightsError if they are missing or would not load."""
    found = locate(config)
    check_pretrained(found, architecture(found, NETWORKS, "model.weights"), "model.weights")
    return {"sam2": hash_of(found)}
