"""CLIPer, the method from top to bottom: images in, label maps out.

model = CLIPer.load(CLIPerConfig(), ClassList.parse(["donut", "kite"]))
[segmentation] = model.segment([image], ["image-0"])
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cliper.model.backbone import load_backbone, patch_size
from cliper.model.classes import ClassList
from cliper.model.config import CLIPerConfig, LabelConfig
from cliper.model.diffusion import DiffusionAttention, QueryKey
from cliper.model.errors import ConfigError
from cliper.model.fusion import Proxy, combine_layers, layer_scores
from cliper.model.labels import Segmentation, presence_scores, segment_scores
from cliper.model.networks.dino import Dino, spread
from cliper.model.prompts import embed_classes
from cliper.model.refine import refine

MAX_ASPECT = 16  # of the backbone's input: its attention maps grow with the square of the long side


@dataclass(frozen=True)
class Scores:
    """The scores of a batch of B images, from which labels are computed."""

    coarse: Tensor  # float32 [B, K, h/p, w/p]
    # float32 [B, K, S, S] with FGC; without, [K, fh, fw] of each image with DINO; without both, the coarse scores
    refined: Tensor | tuple[Tensor, ...]
    presence: Tensor  # float32 [B, K]


class CLIPer:
    """A resident model for one class list. It keeps no state between calls."""

    def __init__(
        self,
        config: CLIPerConfig,
        visual: Any,
        text: Tensor,
        classes: int,
        diffusion: DiffusionAttention | None,
        words: Sequence[int] = (),
        dino: Dino | None = None,
    ) -> None:
        """Assemble from parts: `text` [T, C] unit vectors, the first `classes` of them foreground.

        With `words`, class c has the next `words[c]` vectors; see `class_scores`. `dino` if `config` has it.
        """
        self.config, self.visual, self.text, self.classes = config, visual, text, classes
        self.words = tuple(words)
        self.background_plane = config.labels.protocol == "mmseg" and bool(config.prompts.background_words)
        self.diffusion, self.dino = diffusion, dino
        self.device = text.device
        _check_geometry(config, patch_size(visual), len(visual.transformer.resblocks))

    @classmethod
    def load(cls, config: CLIPerConfig, classes: ClassList, device: str | torch.device = "auto") -> "CLIPer":
        """Load the weights onto `device` ("auto": CUDA if available) and embed the class list.

        Raises WeightsError or ConfigError.
        """
        where = pick_device(device)
        dtype = pick_dtype(config.dtype, where)
        model, tokenizer = load_backbone(config.backbone, where, dtype)
        text = embed_classes(model, tokenizer, classes, config.prompts, config.labels.protocol == "mmseg")
        diffusion = None if config.fgc is None else DiffusionAttention(config.fgc, where, dtype)
        dino = None if config.dino is None else Dino.load(config.dino, where, dtype)
        return cls(config, model.visual, text.vectors, text.classes, diffusion, text.words, dino)

    def segment(self, images: Sequence[np.ndarray], image_ids: Sequence[str]) -> list[Segmentation]:
        """Label uint8 RGB images [H, W, 3] of any sizes; results in the same order.

        Images that resize to the same shape run as one batch of at most `config.batch_size`. On the CPU a batch is
        always one image, and on CUDA always full (padded), so that an image's mask does not depend on the rest of
        its batch: libraries choose other summation orders for other batch sizes. If a full batch does not fit the
        GPU, its size is halved, down to one, and batches stay full at each size: the size depends on the shape
        alone. Raises ValueError for an image of another type or shape, torch.OutOfMemoryError if one alone does
        not fit.
        """
        for image, image_id in zip(images, image_ids, strict=True):
            _check_image(image, image_id)
        found = self._segment_in_batches(images, image_ids, self.full_batch)
        return [found[i] for i in range(len(images))]

    @property
    def full_batch(self) -> int:
        """Images that run together on this device."""
        return 1 if self.device.type == "cpu" else self.config.batch_size

    def _segment_in_batches(
        self, images: Sequence[np.ndarray], image_ids: Sequence[str], size: int
    ) -> dict[int, Segmentation]:
        thresholds, settings = [self.config.fusion.attention_threshold], [self.config.labels]
        found: dict[int, Segmentation] = {}
        too_large: list[int] = []
        for batch in self._batches(images, size):
            try:
                swept = list(self._sweep_batch(images, image_ids, batch, thresholds, settings))
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                too_large += dict.fromkeys(batch)
            else:
                found |= {i: segmentation for i, _, segmentation in swept}
        if too_large:  # the exception, and the tensors that its traceback holds, are released here
            torch.cuda.empty_cache()
            chosen = [images[i] for i in too_large], [image_ids[i] for i in too_large]
            smaller = self._segment_in_batches(*chosen, size // 2)
            found |= {too_large[k]: segmentation for k, segmentation in smaller.items()}
        return found

    def sweep(
        self,
        images: Sequence[np.ndarray],
        image_ids: Sequence[str],
        attention_thresholds: Sequence[float],
        settings: Sequence[LabelConfig],
    ) -> Iterator[tuple[int, int, Segmentation]]:
        """Label like `segment` under every attention threshold and label setting, from one pass of the networks.

        Yields (image, variant, segmentation), variant = threshold * len(settings) + setting.
        """
        for batch in self._batches(images, self.full_batch):
            yield from self._sweep_batch(images, image_ids, batch, attention_thresholds, settings)

    def _sweep_batch(
        self,
        images: Sequence[np.ndarray],
        image_ids: Sequence[str],
        batch: Sequence[int],
        attention_thresholds: Sequence[float],
        settings: Sequence[LabelConfig],
    ) -> Iterator[tuple[int, int, Segmentation]]:
        every = self.scores_at([images[i] for i in batch], [image_ids[i] for i in batch], attention_thresholds)
        for first, scores in enumerate(every):
            for row, i in enumerate(dict.fromkeys(batch)):
                for second, chosen in enumerate(settings):
                    segmentation = self.label(scores, row, images[i].shape[:2], chosen)
                    yield i, first * len(settings) + second, segmentation

    def _batches(self, images: Sequence[np.ndarray], size: int) -> Iterator[list[int]]:
        """Indices of images that share a batch of `size`; a short batch is padded with its last image."""
        groups = defaultdict(list)
        for i, image in enumerate(images):
            groups[self.resized_shape(image.shape[:2])].append(i)
        for group in groups.values():
            for start in range(0, len(group), size):
                batch = group[start : start + size]
                yield batch + batch[-1:] * (size - len(batch))

    def scores(self, images: Sequence[np.ndarray], image_ids: Sequence[str]) -> Scores:
        """Class scores of images [H, W, 3] that all resize to the same shape."""
        return next(self.scores_at(images, image_ids, [self.config.fusion.attention_threshold]))

    @torch.inference_mode()
    def scores_at(
        self, images: Sequence[np.ndarray], image_ids: Sequence[str], thresholds: Sequence[float]
    ) -> Iterator[Scores]:
        """The scores for each attention threshold, from one pass through CLIP and the diffusion model."""
        config = self.config
        pixels = torch.stack([self.preprocess(image) for image in images]).to(self.device)  # [B, 3, h, w]
        layers, whole = layer_scores(
            self.visual, pixels, self.text, self.classes, config.fusion, config.sliding, self.words, self._proxy()
        )
        refines = self.dino is not None and self.dino.config.refine
        features = [self.dino.of_image(image) for image in images] if self.dino and refines else None
        attention = None if self.diffusion is None else self.diffusion(images, image_ids)
        for threshold in thresholds:
            fusion = config.fusion.model_copy(update={"attention_threshold": threshold})
            coarse = combine_layers(layers, whole, fusion)  # [B, K, h/p, w/p]
            refined: Tensor | tuple[Tensor, ...] = coarse
            if features is not None and config.dino is not None:
                refined = tuple(spread(f, s, config.dino) for f, s in zip(features, coarse, strict=True))
            if attention is not None and config.fgc is not None:
                fgc, own = config.fgc, config.fgc.attention_threshold
                sharp = threshold if own is None else own
                input_scores = _same_grid(refined, attention)
                refined = refine(input_scores, attention, sharp, fgc.refinement, fgc.selection)  # [B, K, S, S]
            yield Scores(coarse, refined, _presence(coarse, refined))

    def _proxy(self) -> Proxy | None:
        """The maps that replace CLIP's attention, if the configuration says so."""
        if self.config.fusion.attention != "proxy" or self.dino is None:
            return None
        dino = self.dino
        mean, std = (
            torch.tensor(self.visual.preprocess_cfg[key], device=self.device).view(3, 1, 1)
            for key in ("mean", "std")
        )
        return lambda pixels, grid: dino.proxy(pixels, grid, mean, std)

    def label(
        self, scores: Scores, row: int, size: tuple[int, int], settings: LabelConfig | None = None
    ) -> Segmentation:
        """Compute the labels of image number `row` of a batch at its own `size` (H, W).

        `settings` replace the configuration's, to try other thresholds on the same scores.
        """
        labels = settings or self.config.labels
        return segment_scores(scores.refined[row], scores.presence[row], size, labels, self.background_plane)

    def heat(self, scores: Scores, row: int = 0) -> Tensor:
        """The scores compared between classes in image `row`: float32 [K, h, w], 0 to 1, at their own size.

        Protocol ``cliper``: every class scaled to its presence; ``mmseg``: shares of the sum.
        """
        refined = scores.refined[row].float()  # [K, h, w]
        if self.config.labels.protocol == "mmseg":
            return (refined / refined.sum(dim=0).clamp(min=1e-12)).clamp(0, 1)
        peak = refined.amax(dim=(1, 2), keepdim=True)
        return (refined / (peak + 1e-5) * scores.presence[row][: len(refined), None, None]).clamp(0, 1)

    def resized_shape(self, size: tuple[int, int]) -> tuple[int, int]:
        """The backbone's input size for an image of (H, W): short side as configured, multiples of the patch.

        A long side of more than MAX_ASPECT times the short one is squeezed to that ratio.
        """
        short = self.config.fusion.short_side
        ratio = short / min(size)
        patch = patch_size(self.visual)
        height, width = (max(1, int(min(side * ratio, MAX_ASPECT * short) / patch + 0.5)) * patch for side in size)
        return height, width

    def preprocess(self, image: np.ndarray) -> Tensor:
        """Resize (PIL bicubic, no crop) and normalise uint8 [H, W, 3] to float32 [3, h, w]."""
        height, width = self.resized_shape(image.shape[:2])
        resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255
        mean, std = (torch.tensor(self.visual.preprocess_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
        return (pixels - mean) / std


def _same_grid(scores: Tensor | tuple[Tensor, ...], attention: Sequence[QueryKey]) -> Tensor:
    """Scores of images on grids of their own, on the grid of FGC: [B, K, S, S]. A batch [B, K, h, w] stays."""
    if isinstance(scores, Tensor):
        return scores
    side = round(attention[0].query.shape[-2] ** 0.5)
    resized = [F.interpolate(s[None], size=(side, side), mode="bilinear", align_corners=False) for s in scores]
    return torch.cat(resized)


def _presence(coarse: Tensor, refined: Tensor | tuple[Tensor, ...]) -> Tensor:
    """`presence_scores` of a batch, also of images on grids of their own: [B, K]."""
    if isinstance(refined, Tensor):
        return presence_scores(coarse, refined)
    pairs = zip(coarse, refined, strict=True)
    return torch.cat([presence_scores(one[None], other[None]) for one, other in pairs])


def pick_device(device: str | torch.device) -> torch.device:
    """Resolve "auto" to CUDA if available, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Resolve "auto" to float16 on CUDA, else float32."""
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _check_image(image: np.ndarray, image_id: str) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"image '{image_id}' is {image.dtype} {image.shape}; expected uint8 [H, W, 3], RGB")


def _check_geometry(config: CLIPerConfig, patch: int, layers: int) -> None:
    if config.sliding is not None and (config.sliding.crop % patch or config.sliding.stride % patch):
        raise ConfigError(
            f"sliding.crop {config.sliding.crop} and sliding.stride {config.sliding.stride} must be multiples "
            f"of the backbone's patch size, {patch}"
        )
    if not -layers <= config.fusion.select_layer < layers:
        raise ConfigError(
            f"fusion.select_layer {config.fusion.select_layer} is out of range; this backbone has {layers} layers "
            f"(allowed: {-layers} to {layers - 1})"
        )
