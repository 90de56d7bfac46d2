"""One seeded UNet step of Stable Diffusion, for the self-attention of chosen layers.

Only the VAE encoder, UNet, scheduler and the embedding of the empty prompt stay in memory.
The UNet is stopped at the last attention that is read.
"""

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cliper.model import kernels
from cliper.model._libraries import diffusers, transformers
from cliper.model.config import FGCConfig
from cliper.model.errors import WeightsError
from cliper.model.loading.check import check_diffusion, check_scheduler, empty_prompt
from cliper.model.loading.files import read_json
from cliper.model.loading.weights import Diffusion, resolve_diffusion
from cliper.model.unet import attention_modules, wanted_layers

LATENT_FACTOR = 8  # pixels per latent, in every Stable Diffusion VAE


@dataclass(frozen=True)
class QueryKey:
    """Query and key of one self-attention layer, whose probabilities are softmax(q k^T * scale)."""

    query: Tensor  # [B, H, N, D]
    key: Tensor  # [B, H, N, D]
    scale: float


@dataclass(frozen=True)
class DiffusionParts:
    """The parts of Stable Diffusion that the step uses."""

    unet: Any  # diffusers.UNet2DConditionModel
    vae: Any  # diffusers.AutoencoderKL or AutoencoderTiny; only its encoder is used
    scheduler: Any  # with its timesteps set
    prompt: Tensor  # float32 [1, context, C]: the embedding of the empty prompt


class _AllRead(Exception):
    """Raised inside the UNet after the last wanted attention, to skip the remaining layers."""


class _Record:
    """Attention processor that computes ordinary attention and keeps query and key.

    Stable Diffusion's attention has no mask, no spatial norm and no internal residual here, so plain
    scaled dot-product attention is the whole computation.
    """

    def __init__(self, index: int, reads: dict[int, QueryKey], wanted: frozenset[int]) -> None:
        self.index, self.reads, self.wanted = index, reads, wanted

    def __call__(self, attn: Any, hidden_states: Tensor, **_: Any) -> Tensor:
        query, key, value = (
            project(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # [B, H, N, D]
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        self.reads[self.index] = QueryKey(query, key, attn.scale)
        if self.wanted <= self.reads.keys():
            raise _AllRead
        out = F.scaled_dot_product_attention(query, key, value, scale=attn.scale)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


class DiffusionAttention:
    """Stable Diffusion, resident, as a function from images to self-attention."""

    def __init__(
        self, config: FGCConfig, device: torch.device, dtype: torch.dtype, parts: DiffusionParts | None = None
    ) -> None:
        """Use the given networks, or load `config.model`, a diffusers folder or hub id.

        Raises WeightsError or ConfigError.
        """
        parts = load_parts(config, dtype) if parts is None else parts
        self.config, self.device, self.dtype = config, device, dtype
        # In half precision, convolutions are several times faster in channels-last layout. In float32 they gain 4%
        # and round differently from the official code, which FGC's sharp thresholds can make visible.
        self.memory_format = torch.contiguous_format if dtype == torch.float32 else torch.channels_last
        networks = (n.to(device, memory_format=self.memory_format) for n in (parts.unet, parts.vae))
        self.unet, self.vae = (n.eval().requires_grad_(False) for n in networks)
        self.scheduler, self.prompt = parts.scheduler, parts.prompt.to(device, dtype)  # [1, context, C]
        self.timestep = self.scheduler.timesteps[config.step_index].to(device)
        self.recorded: dict[int, _Recorded] = {}  # by batch size; CUDA only
        self.modules = attention_modules(self.unet)
        self.wanted = wanted_layers(config, self.modules)

    @torch.inference_mode()
    def __call__(self, images: Sequence[np.ndarray], image_ids: Sequence[str]) -> list[QueryKey]:
        """Return query and key of each of `config.layers`, in that order, each [B, H, N, D].

        `images`: uint8 RGB [h, w, 3] of any sizes; `image_ids` and `config.seed` determine the noise.
        """
        pixels = torch.stack([self._prepare(image) for image in images])  # [B, 3, R, R]
        side = self.config.resolution // LATENT_FACTOR
        noise = torch.stack([image_noise(self.config.seed, i, side) for i in image_ids])  # [B, 4, R/8, R/8]
        return self.attention(pixels, noise)

    def _prepare(self, image: np.ndarray) -> Tensor:
        """Resize uint8 [h, w, 3] to float32 [3, R, R] in [-1, 1], ignoring the aspect ratio (official)."""
        pixels = torch.from_numpy(np.array(image)).to(self.device).permute(2, 0, 1)[None]  # [1, 3, h, w]
        size = (self.config.resolution, self.config.resolution)
        if self.config.resize == "nearest":
            resized = F.interpolate(pixels, size=size, mode="nearest").float()
        else:
            resized = F.interpolate(pixels.float(), size=size, mode="bilinear", antialias=True)
        return resized[0] / 255 * 2 - 1

    @torch.inference_mode()
    def attention(self, pixels: Tensor, noise: Tensor) -> list[QueryKey]:
        """Pixels [B, 3, R, R] in [-1, 1] and standard normal noise [B, 4, R/8, R/8] to one QueryKey per layer.

        With the CUDA fast paths (see kernels/) the step is recorded once per batch size and replayed: the
        results are overwritten by the next call.
        """
        if self.device.type != "cuda" or not kernels.asked_for():
            return self._step(pixels, noise)
        if len(pixels) not in self.recorded:
            self.recorded[len(pixels)] = _Recorded(self._step, pixels, noise)
        return self.recorded[len(pixels)].replay(pixels, noise)

    def _step(self, pixels: Tensor, noise: Tensor) -> list[QueryKey]:
        pixels = pixels.to(self.dtype, memory_format=self.memory_format)
        latents = encode_latents(self.vae, pixels)  # [B, 4, R/8, R/8]
        noisy = self.scheduler.add_noise(latents, noise.to(latents), self.timestep.expand(len(latents)))
        reads: dict[int, QueryKey] = {}
        wanted = frozenset(self.wanted)
        for index, attention in enumerate(self.modules):
            if index in wanted:
                attention.module.set_processor(_Record(index, reads, wanted))
        with contextlib.suppress(_AllRead):
            self.unet(noisy, self.timestep, encoder_hidden_states=self.prompt.expand(len(latents), -1, -1))
        return [reads[index] for index in self.wanted]


def encode_latents(vae: Any, pixels: Tensor) -> Tensor:
    """Scaled latents [B, 4, R/8, R/8] of pixels [B, 3, R, R] in [-1, 1]; an AutoencoderTiny scales them itself."""
    found = vae.encode(pixels)
    if hasattr(found, "latents"):
        latents: Tensor = found.latents
        return latents
    return found.latent_dist.mean * vae.config.scaling_factor


class _Recorded:
    """A step recorded as a CUDA graph: its hundreds of kernels are launched at once."""

    def __init__(self, step: Callable[[Tensor, Tensor], list[QueryKey]], pixels: Tensor, noise: Tensor) -> None:
        self.pixels, self.noise = pixels.clone(), noise.to(pixels, copy=True)
        side_stream = torch.cuda.Stream()  # libraries choose their algorithms and workspaces before the recording
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):
            step(self.pixels, self.noise)
        torch.cuda.current_stream().wait_stream(side_stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.reads = step(self.pixels, self.noise)

    def replay(self, pixels: Tensor, noise: Tensor) -> list[QueryKey]:
        self.pixels.copy_(pixels)
        self.noise.copy_(noise)
        self.graph.replay()
        return self.reads


def image_noise(seed: int, image_id: str, side: int) -> Tensor:
    """Standard normal noise [4, side, side] that depends on the seed and the image id alone.

    Drawn on the CPU in float32: the same on every machine, in every batch and order.
    """
    digest = hashlib.sha256(f"{seed}:{image_id}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randn(4, side, side, generator=generator)


def load_parts(config: FGCConfig, dtype: torch.dtype) -> DiffusionParts:
    """Load `config.model` onto the CPU. Raises WeightsError or ConfigError."""
    found = resolve_diffusion(config)
    check_diffusion(found, config)
    unet = _load(diffusers.UNet2DConditionModel, found, "unet", torch_dtype=dtype, low_cpu_mem_usage=False)
    if found.vae is not None:
        vae = _load_tiny_vae(found.vae, dtype)
    else:
        vae = _load(diffusers.AutoencoderKL, found, "vae", torch_dtype=dtype, low_cpu_mem_usage=False)
        vae.decoder = vae.post_quant_conv = None
    return DiffusionParts(unet, vae, _load_scheduler(found.folder, config), _embed_empty_prompt(found))


def _load_tiny_vae(folder: Path, dtype: torch.dtype) -> Any:
    """The encoder of an AutoencoderTiny with 4 channels. Raises WeightsError for another network."""
    settings = read_json(folder / "config.json")
    if settings.get("_class_name") != "AutoencoderTiny" or settings.get("latent_channels", 4) != 4:
        raise WeightsError(
            f"fgc.vae: {folder} holds {settings.get('_class_name')} with {settings.get('latent_channels', 4)} "
            "channels, not an AutoencoderTiny with 4, e.g. madebyollin/taesd"
        )
    try:
        vae = diffusers.AutoencoderTiny.from_pretrained(folder, torch_dtype=dtype, low_cpu_mem_usage=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise WeightsError(f"fgc.vae: cannot load {folder}: {str(error).splitlines()[0]}") from error
    vae.decoder = None
    return vae


def _load(network: Any, found: Diffusion, part: str, **settings: Any) -> Any:
    """Load a network from the files that its hash covers: variant, and safetensors or pickle."""
    chosen = found.network(part)
    form = {"variant": chosen.variant, "use_safetensors": chosen.suffix == "safetensors"}
    try:
        return network.from_pretrained(found.folder, subfolder=part, **form, **settings)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise WeightsError(f"cannot load Stable Diffusion's {part} from {found.folder}: {reason}") from error


def _load_scheduler(folder: Path, config: FGCConfig) -> Any:
    """Load the checkpoint's own scheduler, set to `config.steps` timesteps."""
    scheduler = getattr(diffusers, check_scheduler(folder)).from_pretrained(folder, subfolder="scheduler")
    scheduler.set_timesteps(config.steps)
    return scheduler


def _embed_empty_prompt(found: Diffusion) -> Tensor:
    """Embed "" once, float32 [1, context, C]; the text encoder is dropped on return."""
    encoder = _load(transformers.CLIPTextModel, found, "text_encoder", torch_dtype=torch.float32)
    with torch.inference_mode():
        return encoder(empty_prompt(found.folder))[0]
