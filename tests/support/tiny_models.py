"""Tiny random networks of transformers' own classes, saved as the hub has them."""

from pathlib import Path
from typing import Any

import torch

from cliper.model._libraries import diffusers, transformers
from cliper.model.loading.weights import EMBEDDED

_WIDE: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def dino_folder(folder: Path, kind: str) -> Path:
    """A DINO of `kind`, a key of cliper.model.networks.dino.NETWORKS, with random weights."""
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


def _scatter(network: Any, std: float = 0.2) -> Any:
    """Weights of which outputs depend visibly: the usual start is near 0."""
    for name, parameter in network.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=std)
    return network


def sam3_folder(folder: Path) -> Path:
    """A SAM 3 of 100,000 random weights for inputs of 56 x 56, with a CLIP tokenizer."""
    torch.manual_seed(1)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(EMBEDDED["tiny"] / "sd" / "tokenizer")
    inner: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
    backbone = inner | {"model_type": "sam3_vit_model", "num_hidden_layers": 2, "image_size": 56, "patch_size": 14}
    windows: dict[str, Any] = {"window_size": 2, "global_attn_indexes": [1], "pretrain_image_size": 28}
    config = transformers.Sam3Config(
        vision_config={
            "backbone_config": backbone | windows,
            "fpn_hidden_size": 32,
            "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        },
        text_config=inner
        | {"model_type": "clip_text_model", "vocab_size": len(tokenizer), "num_hidden_layers": 1}
        | {"max_position_embeddings": 32, "projection_dim": 16, "eos_token_id": tokenizer.eos_token_id}
        | {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id},
        geometry_encoder_config=inner | {"num_layers": 1},
        detr_encoder_config=inner | {"num_layers": 1},
        detr_decoder_config=inner | {"num_layers": 2, "num_queries": 5},
        mask_decoder_config={"hidden_size": 32, "num_attention_heads": 2},
    )
    _scatter(transformers.Sam3Model(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tipsv2_folder(folder: Path) -> Path:
    """A TIPSv2 of 30,000 random weights with a tokenizer of letters."""
    torch.manual_seed(2)
    letters = ["<pad>", "<unk>", "\u2581", *"abcdefghijklmnopqrstuvwxyz.,()"]
    tokenizer = transformers.Tipsv2Tokenizer(vocab={letter: i for i, letter in enumerate(letters)}, merges=[])
    config = transformers.Tipsv2Config(
        text_config=_WIDE | {"vocab_size": len(letters), "intermediate_size": 32},
        vision_config=_WIDE | {"image_size": 56, "patch_size": 14},
    )
    _scatter(transformers.Tipsv2Model(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_vae_folder(folder: Path) -> Path:
    """An AutoencoderTiny with random weights: 4 channels at 1/8 of the side."""
    torch.manual_seed(3)
    channels: dict[str, Any] = {"encoder_block_out_channels": (8, 8, 8, 8), "decoder_block_out_channels": (8,) * 4}
    blocks: dict[str, Any] = {"num_encoder_blocks": (1, 1, 1, 1), "num_decoder_blocks": (1, 1, 1, 1)}
    diffusers.AutoencoderTiny(**channels, **blocks).save_pretrained(folder)
    return folder


def sam2_folder(folder: Path) -> Path:
    """A SAM 2 of 300,000 random weights for inputs of 64 x 64."""
    torch.manual_seed(4)
    stages: dict[str, Any] = {
        "blocks_per_stage": [1, 1, 2, 1],
        "embed_dim_per_stage": [8, 16, 32, 64],
        "num_attention_heads_per_stage": [1, 1, 1, 1],
        "window_size_per_stage": [4, 4, 4, 2],
        "global_attention_blocks": [3],
    }
    config = transformers.Sam2Config(
        vision_config={
            "backbone_config": {"model_type": "sam2_hiera_det_model", "hidden_size": 8, "image_size": [64, 64]}
            | stages,
            "backbone_channel_list": [64, 32, 16, 8],
            "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
            "fpn_hidden_size": 32,
        },
        prompt_encoder_config={"hidden_size": 32, "image_size": 64},
        mask_decoder_config={
            "hidden_size": 32,
            "num_attention_heads": 2,
            "mlp_dim": 32,
        },
    )
    _scatter(transformers.Sam2Model(config)).save_pretrained(folder)
    return folder
