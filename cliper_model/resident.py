"""Networks that are loaded once and shared by changing class lists and settings."""

from functools import lru_cache

import torch

from cliper.model.backbone import load_backbone
from cliper.model.classes import ClassList
from cliper.model.config import CLIPerConfig, PromptConfig
from cliper.model.diffusion import DiffusionAttention
from cliper.model.errors import ConfigError
from cliper.model.networks.dino import Dino
from cliper.model.prompts import TextVectors, embed_classes
from cliper.model.segmenter import CLIPer, pick_device, pick_dtype

_LISTS_KEPT = 8  # class lists whose vectors are remembered


class Resident:
    """CLIP with its text tower, DINO and the diffusion model, in memory.

    `segmenter` returns the equivalent of `CLIPer.load` without loading weights: new classes are embedded, new
    thresholds are free.
    """

    def __init__(self, config: CLIPerConfig, device: str | torch.device = "auto") -> None:
        """Load the weights that `config` names. Raises WeightsError or ConfigError."""
        where = pick_device(device)
        dtype = pick_dtype(config.dtype, where)
        self.config = config
        self.model, self.tokenizer = load_backbone(config.backbone, where, dtype)
        self.diffusion = None if config.fgc is None else DiffusionAttention(config.fgc, where, dtype)
        self.dino = None if config.dino is None else Dino.load(config.dino, where, dtype)
        self._text = lru_cache(maxsize=_LISTS_KEPT)(self._embed)

    def segmenter(self, config: CLIPerConfig, classes: ClassList) -> CLIPer:
        """A CLIPer for these classes and settings, which may disable FGC.

        Raises ConfigError if they need networks that are not loaded.
        """
        loaded = self.config
        if (config.backbone, config.dtype) != (loaded.backbone, loaded.dtype):
            raise ConfigError("another backbone or dtype than the loaded one needs a new Resident")
        if config.fgc is not None and config.fgc != loaded.fgc:
            raise ConfigError("FGC with settings other than the loaded ones needs a new Resident")
        if config.dino is not None and config.dino != loaded.dino:
            raise ConfigError("DINO with settings other than the loaded ones needs a new Resident")
        text = self._text(classes, config.prompts, config.labels.protocol == "mmseg")
        diffusion = None if config.fgc is None else self.diffusion
        dino = None if config.dino is None else self.dino
        return CLIPer(config, self.model.visual, text.vectors, text.classes, diffusion, text.words, dino)

    def _embed(self, classes: ClassList, prompts: PromptConfig, background_is_class: bool) -> TextVectors:
        return embed_classes(self.model, self.tokenizer, classes, prompts, background_is_class)
