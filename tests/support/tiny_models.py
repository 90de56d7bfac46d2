"""Tiny random networks of transformers' own classes, saved as the hub has them."""

from pathlib import Path
from typing import Any

import torch

from cliper.model._libraries import transformers

_WIDE: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def dino_folder(folder: Path, kind: str) -> Path:
    """A DINO of `kind`, a key of cliper.model.dino.NETWORKS, with random weights."""
    torch.manual_seed(0)
    if kind == "vit":
        config = transformers.ViTConfig(**_WIDE, intermediate_size=32, image_size=32, patch_size=8)
        network = transformers.ViTModel(config, add_pooling_layer=False)
    elif kind == "dinov2":
        network = transformers.Dinov2Model(transformers.Dinov2Config(**_WIDE, image_size=28, patch_size=14))
    elif kind == "dinov2_with_registers":
        config = transformers.Dinov2WithRegistersConfig(**_WIDE, image_size=28, patch_size=14)
        network = transformers.Dinov2WithRegistersModel(config)
    else:
        config = transformers.DINOv3ViTConfig(
            **_WIDE, intermediate_size=32, image_size=32, patch_size=16, num_register_tokens=4
        )
        network = transformers.DINOv3ViTModel(config)
    for parameter in network.parameters():  # the usual start leaves patches nearly alike
        torch.nn.init.normal_(parameter, std=0.3)
    network.save_pretrained(folder)
    return folder
