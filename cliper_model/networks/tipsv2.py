"""TIPSv2 as a segmenter: the patch tokens of a pass are compared with the text, without further attention."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from cliper.model.classes import ClassList
from cliper.model.errors import ConfigError
from cliper.model.fusion import class_scores, window_starts
from cliper.model.labels import segment_scores
from cliper.model.loading.pretrained import (
    architecture,
    check_pretrained,
    hash_of,
    load_pretrained,
    load_tokenizer,
)
from cliper.model.networks.configs import Tipsv2Config
from cliper.model.networks.locate import locate
from cliper.model.prompts import embed_classes
from cliper.model.segmentation import Segmentation
from cliper.model.segmenter import MAX_ASPECT, pick_device, pick_dtype

NETWORKS = {"tipsv2": "Tipsv2Model"}
OPTIONAL = ("temperature",)  # not in published checkpoints: the configuration has it


class _Text(nn.Module):
    """The text tower with open_clip's interface, for `embed_classes`."""

    def __init__(self, network: Any, tokenizer: Any) -> None:
        super().__init__()
        self.network, self.tokenizer = network, tokenizer
        self.length = int(network.config.text_config.max_position_embeddings)
        self.padding = network.config.text_config.pad_token_id or 0

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """Token ids, int64 [len(texts), length]."""
        ids: Tensor = self.tokenizer(
            list(texts), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )["input_ids"]
        return ids

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Text vectors [n, C]."""
        mask = (tokens != self.padding).long()
        vectors: Tensor = self.network.get_text_features(input_ids=tokens, attention_mask=mask).pooler_output
        return vectors


class Tipsv2:
    """A resident TIPSv2 with the embedded class list."""

    def __init__(self, config: Tipsv2Config, network: Any, tokenizer: Any, classes: ClassList) -> None:
        """Embed the class list. `network`: a Tipsv2Model on its device. Raises ConfigError for other windows."""
        self.config, self.network = config, network.eval().requires_grad_(False)
        vision = network.config.vision_config
        self.patch = int(vision.patch_size if isinstance(vision.patch_size, int) else vision.patch_size[0])
        self.prefix = 1 + int(vision.num_register_tokens)  # tokens before the patches
        if config.sliding and (config.sliding.crop % self.patch or config.sliding.stride % self.patch):
            raise ConfigError(f"sliding.crop and sliding.stride must be multiples of the patch size, {self.patch}")
        self.plane = config.labels.protocol == "mmseg" and bool(config.prompts.background_words)
        text = _Text(network, tokenizer)
        found = embed_classes(text, text.tokens, classes, config.prompts, self.plane)
        self.text, self.classes, self.words = found.vectors, found.classes, found.words
        self.temperature = config.temperature or float(network.temperature)

    def segment(self, images: Sequence[np.ndarray], image_ids: Sequence[str]) -> list[Segmentation]:
        """Label uint8 RGB images [H, W, 3] of any sizes, one after the other; results in the same order."""
        results = []
        for image in images:
            scores = self.scores(image)
            size = (image.shape[0], image.shape[1])
            results.append(segment_scores(scores, scores.amax(dim=(1, 2)), size, self.config.labels, self.plane))
        return results

    def heat(self, image: np.ndarray, image_id: str) -> npt.NDArray[np.float32]:
        """The shares of the classes in one image: float32 [K, h, w], 0 to 1."""
        heat: npt.NDArray[np.float32] = self.scores(image).cpu().numpy()
        return heat

    @torch.inference_mode()
    def scores(self, image: np.ndarray) -> Tensor:
        """Softmax over all text vectors, by class: float32 [K, h/p, w/p] (with a background plane: K + 1)."""
        pixels = self.preprocess(image).to(self.network.device)[None]  # [1, 3, h, w]
        logits = self.logits(pixels)  # [T, h/p, w/p]
        if self.config.sliding is not None:
            logits = 0.5 * logits + 0.5 * self._windows(pixels, logits)
        return class_scores(logits[None, None], self.classes, self.words)[0, 0]

    def logits(self, pixels: Tensor) -> Tensor:
        """Cosines of every patch of [1, 3, h, w] with every text vector over the temperature: [T, h/p, w/p]."""
        grid = (pixels.shape[-2] // self.patch, pixels.shape[-1] // self.patch)
        found = self.network.get_image_features(pixel_values=pixels.to(self.network.dtype))
        tokens = found.last_hidden_state[0, self.prefix :].float()  # [N, C]
        unit = torch.nn.functional.normalize(tokens, dim=-1)
        return (unit @ self.text.T / self.temperature).T.unflatten(-1, grid)

    def _windows(self, pixels: Tensor, whole: Tensor) -> Tensor:
        """The mean of the logits of all windows, [T, h/p, w/p]."""
        sliding, patch = self.config.sliding, self.patch
        assert sliding is not None
        total, count = torch.zeros_like(whole), torch.zeros_like(whole[0])
        for top in window_starts(pixels.shape[-2], sliding.crop, sliding.stride):
            for left in window_starts(pixels.shape[-1], sliding.crop, sliding.stride):
                part = self.logits(pixels[..., top : top + sliding.crop, left : left + sliding.crop])
                rows = slice(top // patch, top // patch + part.shape[-2])
                columns = slice(left // patch, left // patch + part.shape[-1])
                total[:, rows, columns] += part
                count[rows, columns] += 1
        return total / count

    def preprocess(self, image: np.ndarray) -> Tensor:
        """Uint8 [H, W, 3] to float32 [3, h, w] in [0, 1]: bilinear, sides are multiples of the patch."""
        short = self.config.short_side
        ratio = short / min(image.shape[:2])
        height, width = (
            max(1, int(min(side * ratio, MAX_ASPECT * short) / self.patch + 0.5)) * self.patch
            for side in image.shape[:2]
        )
        resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255


def load(config: Tipsv2Config, classes: ClassList, device: str, dtype: str, batch_size: int) -> Tipsv2:
    """Load the weights onto `device` and embed the class list. Raises WeightsError or ConfigError."""
    where = pick_device(device)
    found = locate(config)
    network = architecture(found, NETWORKS, "model.model")
    model = load_pretrained(found, network, "model.model", pick_dtype(dtype, where), OPTIONAL).to(where)
    return Tipsv2(config, model, load_tokenizer(found, "model.model"), classes)


def identity(config: Tipsv2Config) -> dict[str, str]:
    """SHA-256 of the files. Raises WeightsError if they are missing or would not load."""
    found = locate(config)
    check_pretrained(found, architecture(found, NETWORKS, "model.model"), "model.model", OPTIONAL)
    load_tokenizer(found, "model.model")
    return {"tipsv2": hash_of(found)}
