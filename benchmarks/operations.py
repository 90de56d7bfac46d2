"""Operations and peak memory of an image at full size, counted without weights on torch's meta device.

    python -m benchmarks.operations

An addition and a multiplication are two operations, as in `torch.utils.flop_counter`. That module leaves out the
attention kernel that the CPU uses; `counter` counts it as well.
"""

import contextlib
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from benchmarks.models import UNET, VAE
from cliper.model._libraries import diffusers, open_clip, transformers
from cliper.model.config import FGCConfig, FusionConfig
from cliper.model.diffusion import _AllRead, _Record
from cliper.model.fusion import coarse_scores
from cliper.model.networks.sam3 import _repeated, _TextFeatures
from cliper.model.unet import attention_modules, wanted_layers

META = torch.device("meta")
GRID = (336, 448)  # CLIP's input for 375 x 500 pixels, a common photograph of PASCAL VOC
TOKENS, HEADS, WIDTH = 4096, 10, 64  # of the two self-attention layers that FGC reads at 512 pixels
CLASSES = (20, 81, 150, 1203)
PROPOSED, CHUNK, SAM_TOKENS = 8, 8, 32


@dataclass(frozen=True)
class Cost:
    """Operations, and the peak of activations and of weights in bytes."""

    operations: float
    activations: float
    weights: float

    def __add__(self, other: "Cost") -> "Cost":
        """One after the other: operations and weights add up, activations do not."""
        peak = max(self.activations, other.activations)
        return Cost(self.operations + other.operations, peak, self.weights + other.weights)

    def times(self, count: float) -> "Cost":
        """The same step `count` times."""
        return Cost(self.operations * count, self.activations, self.weights)

    @property
    def memory(self) -> float:
        """Peak bytes."""
        return self.activations + self.weights


def counter() -> FlopCounterMode:
    """A counter of operations that knows the CPU's attention kernel."""

    def attention(q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return int(sdpa_flop_count(q, k, v))

    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={kernel: attention})


class _Live(TorchDispatchMode):
    """The bytes of all tensors that exist at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return out

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@torch.inference_mode()
def cost(step: Callable[[], Any], *networks: Any) -> Cost:
    """The cost of calling `step`; the weights are those of `networks`."""
    live, flops = _Live(), counter()
    with flops, live:
        kept = step()
    del kept
    weights = sum(p.numel() * p.element_size() for network in networks for p in network.parameters())
    return Cost(flops.get_total_flops(), live.peak, weights)


def tensor(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """A tensor without values."""
    return torch.empty(*shape, dtype=dtype, device=META)


def clip(name: str, classes: int) -> Cost:
    """Coarse scores of a whole image by an open_clip architecture."""
    with META:
        visual = open_clip.create_model(name, load_weights=False, device="meta").visual.half()
    text = tensor(classes + 1, visual.proj.shape[1], dtype=torch.float32)
    pixels = tensor(1, 3, *GRID, dtype=torch.float32)
    return cost(lambda: coarse_scores(visual, pixels, text, classes, FusionConfig(), None), visual)


def diffusion(resolution: int, tiny_vae: bool = False) -> Cost:
    """The diffusion stage of FGC: VAE encoder, and the UNet up to the last attention that is read."""
    with META:
        unet = diffusers.UNet2DConditionModel(**UNET).half()
        vae = (diffusers.AutoencoderTiny() if tiny_vae else diffusers.AutoencoderKL(**VAE)).half()
    vae.decoder = None
    if not tiny_vae:
        vae.post_quant_conv = None
    modules = attention_modules(unet)
    reads: dict[int, Any] = {}
    wanted = wanted_layers(FGCConfig(), modules)
    for index in wanted:
        modules[index].module.set_processor(_Record(index, reads, frozenset(wanted)))

    def step() -> Any:
        pixels = tensor(1, 3, resolution, resolution)
        encoded = vae.encode(pixels)
        latents = encoded.latents if tiny_vae else encoded.latent_dist.mean
        with contextlib.suppress(_AllRead):
            unet(latents, 101, encoder_hidden_states=tensor(1, 77, UNET["cross_attention_dim"]))

    return cost(step, unet, vae)


def refinement(resolution: int, classes: int) -> Cost:
    """FGC's maps, each computed once and multiplied with the scores."""
    tokens = (resolution // 8) ** 2
    return Cost(HEADS * 2 * tokens**2 * (WIDTH + classes), 4 * tokens**2, 0)


def dino(classes: int, patch: int = 8, size: tuple[int, int] = (375, 500)) -> Cost:
    """DINO ViT-B/8 over an image at its own size, and its map times the scores."""
    height, width = (side // patch * patch for side in size)
    with META:
        network = transformers.ViTModel(transformers.ViTConfig(patch_size=patch), add_pooling_layer=False).half()
    tower = cost(lambda: network(tensor(1, 3, height, width), interpolate_pos_encoding=True), network)
    tokens = height * width // patch**2
    return tower + Cost(2 * tokens**2 * (network.config.hidden_size + classes), 4 * 1024 * tokens, 0)


def sam3() -> tuple[Cost, Cost]:
    """SAM 3: the image, and one prompt."""
    with META:
        network = transformers.Sam3Model(transformers.Sam3Config()).half()
    side, kept = network.config.image_size, []
    image = cost(lambda: kept.append(network.get_vision_features(pixel_values=tensor(1, 3, side, side))), network)
    # The decoder reads the values of this tensor, which has none on the meta device.
    shapes = torch.tensor([kept[0].fpn_hidden_states[-2].shape[-2:]])
    network.detr_decoder.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {"spatial_shapes": shapes}), with_kwargs=True
    )
    text = tensor(CHUNK, SAM_TOKENS, network.config.detr_encoder_config.hidden_size)

    def prompts() -> Any:
        return network(vision_embeds=_repeated(kept[0], CHUNK), text_embeds=_TextFeatures(text))

    chunk = cost(prompts)
    return image, Cost(chunk.operations / CHUNK, chunk.activations, 0)


def tipsv2() -> Cost:
    """TIPSv2-B/14 at a short side of 448."""
    with META:
        network = transformers.Tipsv2Model(transformers.Tipsv2Config()).half()
    return cost(lambda: network.get_image_features(pixel_values=tensor(1, 3, 448, 602)), network)


def table() -> dict[str, list[Cost]]:
    """The cost of every segmenter for each number in CLASSES."""
    image, prompt = sam3()
    vit, coarse, stage = tipsv2(), clip("ViT-L-14-quickgelu", 20), diffusion(512)
    tower = dino(0)
    rows: dict[str, list[Cost]] = {}
    for classes in CLASSES:
        score = Cost(2 * 12 * 768 * 768 * classes, 4 * 288 * 288 * classes, 0)
        entries = {
            "cliper, ViT-L/14 without FGC": coarse,
            "cliper, ViT-L/14 with FGC": coarse + stage + refinement(512, classes),
            "cliper, ViT-L/14 with DINO ViT-B/8": coarse + tower,
            "tipsv2, B/14": vit,
            "sam3": image + prompt.times(classes) + Cost(0, score.activations, 0),
            f"sam3-active, {PROPOSED} proposed": coarse + image + prompt.times(min(PROPOSED, classes)),
        }
        for name, found in entries.items():
            rows.setdefault(name, []).append(found)
    return rows


def fgc_table() -> dict[str, Cost]:
    """The diffusion stage by resolution and encoder."""
    rows = {f"{side} pixels": diffusion(side) + refinement(side, 20) for side in (512, 384, 256)}
    return rows | {"512 pixels, tiny VAE encoder": diffusion(512, tiny_vae=True) + refinement(512, 20)}


def main() -> None:
    """Print both tables as Markdown."""
    print("| segmenter | " + " | ".join(f"{c} classes: TFLOP, GB" for c in CLASSES) + " |")
    print("|---" * (len(CLASSES) + 1) + "|")
    for name, row in table().items():
        print(f"| {name} | " + " | ".join(f"{c.operations / 1e12:.2f}, {c.memory / 1e9:.1f}" for c in row) + " |")
    print("\n| FGC | GFLOP | of them refinement | GB |\n|---|---|---|---|")
    for name, found in fgc_table().items():
        part = refinement(int(name.split()[0]), 20).operations / 1e9
        print(f"| {name} | {found.operations / 1e9:,.0f} | {part:,.0f} | {found.memory / 1e9:.1f} |")


if __name__ == "__main__":
    main()
