"""SAM 3 as a segmenter: one pass over the image, then a pass per chunk of prompts.

The class of transformers computes everything; its `forward` multiplies no presence into the scores, so the scores
of a class are put together here: max(mask x query x presence, semantic x presence), each a sigmoid.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from cliper.model.classes import ClassList
from cliper.model.errors import ConfigError
from cliper.model.labels import segment_scores
from cliper.model.loading.hashes import cliper_hashes
from cliper.model.loading.pretrained import (
    architecture,
    check_pretrained,
    hash_of,
    load_pretrained,
    load_tokenizer,
)
from cliper.model.networks.configs import Sam3ActiveConfig, Sam3Config
from cliper.model.networks.locate import locate
from cliper.model.segmentation import Segmentation
from cliper.model.segmenter import CLIPer, pick_device, pick_dtype

NETWORKS = {"sam3": "Sam3Model", "sam3_video": "Sam3Model"}  # a video checkpoint holds the image model
TOKENS = 32  # of a prompt, padded: SAM 3's text encoder has no more


class Sam3:
    """A resident SAM 3 with the embedded prompts of one class list."""

    def __init__(self, config: Sam3Config, network: Any, tokenizer: Any, classes: ClassList) -> None:
        """Embed the words of every class once. `network`: a Sam3Model on its device."""
        self.config, self.network, self.classes = config, network.eval().requires_grad_(False), classes
        self.side = int(network.config.image_size)
        words = [(c, word) for c, group in enumerate(classes.words) for word in group]
        self.owner = [c for c, _ in words]  # the class of every prompt
        self.text, self.mask = self._embed(tokenizer, [word for _, word in words])

    @torch.inference_mode()
    def _embed(self, tokenizer: Any, words: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Prompts to text features [P, TOKENS, C] and their attention mask [P, TOKENS]."""
        device = self.network.device
        found = tokenizer(
            list(words), padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
        )
        ids, mask = found["input_ids"].to(device), found["attention_mask"].to(device)
        parts = [
            self.network.get_text_features(input_ids=i, attention_mask=m).pooler_output
            for i, m in zip(ids.split(64), mask.split(64), strict=True)
        ]
        return torch.cat(parts), mask

    def segment(self, images: Sequence[np.ndarray], image_ids: Sequence[str]) -> list[Segmentation]:
        """Label uint8 RGB images [H, W, 3] of any sizes, one after the other; results in the same order."""
        return [self._one(image, image_id) for image, image_id in zip(images, image_ids, strict=True)]

    def _one(self, image: np.ndarray, image_id: str) -> Segmentation:
        return self._labeled(*self.scores(image, range(len(self.classes))), image)

    def _labeled(self, scores: Tensor, presence: Tensor, image: np.ndarray) -> Segmentation:
        return segment_scores(scores, presence, (image.shape[0], image.shape[1]), self.config.labels)

    def heat(self, image: np.ndarray, image_id: str) -> npt.NDArray[np.float32]:
        """The scores of one image: float32 [K, h, w], 0 to 1."""
        heat: npt.NDArray[np.float32] = self.scores(image, range(len(self.classes)))[0].cpu().numpy()
        return heat

    @torch.inference_mode()
    def scores(self, image: np.ndarray, wanted: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Scores [K, h, w] and presence [K] of the classes with numbers `wanted`; 0 for the others. Float32."""
        pixels = self.preprocess(image).to(self.network.device, self.network.dtype)[None]
        seen = self.network.get_vision_features(pixel_values=pixels)
        chosen = set(wanted)
        places = [p for p, c in enumerate(self.owner) if c in chosen]
        size = tuple(seen.fpn_hidden_states[0].shape[-2:])
        scores = pixels.new_zeros(len(self.classes), *size, dtype=torch.float32)  # [K, h, w]
        presence = scores.new_zeros(len(self.classes))
        for start in range(0, len(places), self.config.chunk):
            chunk = places[start : start + self.config.chunk]
            found = self.network(
                vision_embeds=_repeated(seen, len(chunk)),
                text_embeds=_TextFeatures(self.text[chunk]),
                attention_mask=self.mask[chunk],
            )
            for row, place in enumerate(chunk):
                c = self.owner[place]
                one, here = prompt_scores(found, row, self.config.query_threshold)
                scores[c] = torch.maximum(scores[c], one)
                presence[c] = torch.maximum(presence[c], here)
        return scores, presence

    def preprocess(self, image: np.ndarray) -> Tensor:
        """Uint8 [H, W, 3] to float32 [3, side, side] in [-1, 1]: bilinear, the aspect ratio is not kept."""
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
        size = (self.side, self.side)
        return F.interpolate(pixels, size=size, mode="bilinear", antialias=True)[0] * 2 - 1


class _TextFeatures:
    """Text features as Sam3Model.forward takes them: it reads `pooler_output`."""

    def __init__(self, pooler_output: Tensor) -> None:
        self.pooler_output = pooler_output


def _repeated(seen: Any, count: int) -> Any:
    """The features of one image for `count` prompts, without copies: every level of the pyramid is expanded."""
    return type(seen)(
        fpn_hidden_states=tuple(level.expand(count, -1, -1, -1) for level in seen.fpn_hidden_states),
        fpn_position_encoding=tuple(level.expand(count, -1, -1, -1) for level in seen.fpn_position_encoding),
    )


def prompt_scores(found: Any, row: int, threshold: float) -> tuple[Tensor, Tensor]:
    """The score map [h, w] and the presence (a scalar) of prompt number `row` of SAM 3's output, in float32."""
    presence = found.presence_logits[row].float().sigmoid().squeeze()
    queries = found.pred_logits[row].float().sigmoid() * presence  # [Q]
    best = found.semantic_seg[row, 0].float().sigmoid() * presence  # [h, w]
    kept = (queries > threshold).nonzero()[:, 0]
    masks = found.pred_masks[row, kept].float().sigmoid() * queries[kept, None, None]
    return (torch.maximum(best, masks.amax(dim=0)) if len(kept) else best), presence


class Sam3Active:
    """SAM 3 that is prompted with the classes CLIPer proposes."""

    def __init__(self, config: Sam3ActiveConfig, sam: Sam3, proposer: CLIPer) -> None:
        """Raises ConfigError if a class of `always` is not in the list."""
        self.config, self.sam, self.proposer = config, sam, proposer
        names = sam.classes.names
        unknown = [name for name in config.always if name not in names]
        if unknown:
            raise ConfigError(f"always: '{unknown[0]}' is not in the class list; it has: {', '.join(names[:8])}")
        self.always = [names.index(name) for name in config.always]

    def segment(self, images: Sequence[np.ndarray], image_ids: Sequence[str]) -> list[Segmentation]:
        """See Sam3.segment. `proposed` of a result holds the labels that were prompted."""
        results = []
        for image, image_id in zip(images, image_ids, strict=True):
            wanted = self.propose(image, image_id)
            found = self.sam._labeled(*self.sam.scores(image, wanted), image)
            results.append(replace(found, proposed=np.array(wanted, np.int32) + 1))
        return results

    def propose(self, image: np.ndarray, image_id: str) -> list[int]:
        """Numbers of the classes to prompt, ascending: the `top` by presence, and those of `always`."""
        batch = self.proposer.full_batch
        presence = self.proposer.scores([image] * batch, [image_id] * batch).presence[0]  # [K]
        order = presence.argsort(descending=True, stable=True)[: self.config.top].tolist()
        return sorted({*(c for c in order if float(presence[c]) >= self.config.min_presence), *self.always})

    def heat(self, image: np.ndarray, image_id: str) -> npt.NDArray[np.float32]:
        """The scores of one image: float32 [K, h, w], 0 for classes that were not proposed."""
        heat: npt.NDArray[np.float32] = self.sam.scores(image, self.propose(image, image_id))[0].cpu().numpy()
        return heat


def load(config: Sam3Config, classes: ClassList, device: str, dtype: str, batch_size: int) -> Sam3 | Sam3Active:
    """Load the weights onto `device` and embed the class list. Raises WeightsError or ConfigError."""
    where = pick_device(device)
    kind = pick_dtype(dtype, where)
    found = locate(config)
    network = architecture(found, NETWORKS, "model.model")
    model = load_pretrained(found, network, "model.model", kind).to(where)
    sam = Sam3(config, model, load_tokenizer(found, "model.model"), classes)
    if not isinstance(config, Sam3ActiveConfig):
        return sam
    proposer = config.proposer.model_copy(update={"dtype": dtype, "batch_size": batch_size})
    return Sam3Active(config, sam, CLIPer.load(proposer, classes, where))


def identity(config: Sam3Config) -> dict[str, str]:
    """SHA-256 of the files, and of the proposer's. Raises WeightsError if they are missing or would not load."""
    found = locate(config)
    check_pretrained(found, architecture(found, NETWORKS, "model.model"), "model.model")
    load_tokenizer(found, "model.model")
    proposer = cliper_hashes(config.proposer) if isinstance(config, Sam3ActiveConfig) else {}
    return {"sam3": hash_of(found)} | {f"proposer_{name}": digest for name, digest in proposer.items()}
