"""Full-size models with random weights: speed depends on their shapes, not on their values.

The architectures are OpenAI's CLIP as open_clip configures it and Stable Diffusion 2.1-base.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cliper.model import CLIPerConfig
from cliper.model._libraries import diffusers, open_clip, transformers
from cliper.model.config import BackboneConfig, FGCConfig
from cliper.model.diffusion import DiffusionAttention, DiffusionParts
from cliper.model.prompts import text_bank
from cliper.model.segmenter import CLIPer

ARCHITECTURES = {"B/16": "ViT-B-16-quickgelu", "L/14": "ViT-L-14-quickgelu"}

UNET: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "attention_head_dim": (5, 10, 20, 20),  # heads per block: diffusers kept the misnomer for old checkpoints
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
    "layers_per_block": 2,
    "sample_size": 768,
    "scaling_factor": 0.18215,
}
TEXT_ENCODER = {
    "vocab_size": 49408,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "projection_dim": 512,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "max_position_embeddings": 77,
}
PHOTO = (375, 500)  # height, width: a common photograph of PASCAL VOC
CLASSES = 20


@dataclass(frozen=True)
class StableDiffusion:
    """The networks one image passes through; the text encoder only in the official order."""

    unet: Any
    vae: Any
    text_encoder: Any
    scheduler: Any


def photo(seed: int, size: tuple[int, int] = PHOTO) -> np.ndarray:
    """Smooth random colours with noise, uint8 [H, W, 3]."""
    generator = np.random.default_rng(seed)
    coarse = torch.from_numpy(generator.random((1, 3, 6, 8), dtype=np.float32))
    smooth = torch.nn.functional.interpolate(coarse, size=size, mode="bilinear")[0].permute(1, 2, 0).numpy()
    noisy = smooth * 235 + generator.random((*size, 3), dtype=np.float32) * 20
    return noisy.astype(np.uint8)


@torch.no_grad()
def randomise(module: nn.Module, seed: int) -> nn.Module:
    """Fill weights so that activations keep their size: uniform by fan-in, norms 1, biases 0."""
    device = next(module.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            bound = math.sqrt(3 / parameter[0].numel())
            parameter.uniform_(-bound, bound, generator=generator)
        else:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    return module.eval().requires_grad_(False)


def _materialise(module: nn.Module, device: torch.device, dtype: torch.dtype, seed: int) -> nn.Module:
    return randomise(module.to(dtype).to_empty(device=device), seed)


def clip_visual(name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Return the vision tower of ARCHITECTURES[name]."""
    model = open_clip.create_model(ARCHITECTURES[name], load_weights=False)
    return randomise(model.visual.to(device=device, dtype=dtype), seed=1)


def stable_diffusion(device: torch.device, dtype: torch.dtype, with_text: bool) -> StableDiffusion:
    """Return Stable Diffusion 2.1-base at full size, without the VAE's decoder."""
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**UNET)
        vae = diffusers.AutoencoderKL(**VAE)
        vae.decoder = vae.post_quant_conv = None
    text = None
    if with_text:
        text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT_ENCODER))
        text = randomise(text.to(device=device, dtype=dtype), seed=4)
    scheduler = diffusers.PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    scheduler.set_timesteps(50)
    unet, vae = (_materialise(m, device, dtype, seed) for seed, m in ((2, unet), (3, vae)))
    return StableDiffusion(unet, vae, text, scheduler)


def text_vectors(visual: Any, device: torch.device) -> Tensor:
    """Random unit vectors for CLASSES classes and their mean: [CLASSES + 1, C]."""
    generator = torch.Generator().manual_seed(5)
    width = visual.proj.shape[1]
    foreground = torch.nn.functional.normalize(torch.randn(CLASSES, width, generator=generator), dim=-1)
    return text_bank(foreground.to(device), foreground.new_zeros(0, width).to(device), mean_class=True)


def segmenter(
    name: str, config: CLIPerConfig, visual: Any, diffusion: StableDiffusion | None, device: torch.device
) -> CLIPer:
    """Return our pipeline around the given networks. The configuration's weight names are not used."""
    resident = None
    if diffusion is not None and config.fgc is not None:
        dtype = next(diffusion.unet.parameters()).dtype
        prompt = torch.randn(1, 77, UNET["cross_attention_dim"], generator=torch.Generator().manual_seed(6))
        parts = DiffusionParts(diffusion.unet, diffusion.vae, diffusion.scheduler, prompt)
        resident = DiffusionAttention(config.fgc, device, dtype, parts)
    return CLIPer(config, visual, text_vectors(visual, device), CLASSES, resident)


def configuration(name: str, fgc: bool, **settings: Any) -> CLIPerConfig:
    """Return the method's default settings for an architecture, with or without FGC."""
    backbone = BackboneConfig(model=ARCHITECTURES[name], weights="openai")
    return CLIPerConfig(backbone=backbone, fgc=FGCConfig() if fgc else None, **settings)
