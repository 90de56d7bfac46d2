"""Weights are checked before they are loaded: every form loads alike, and every fault is one message."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cliper.model._libraries import diffusers, transformers
from cliper.model.config import BackboneConfig, CLIPerConfig, FGCConfig
from cliper.model.diffusion import DiffusionAttention
from cliper.model.errors import CliperError, ConfigError
from cliper.model.loading.check import check_backbone, check_diffusion, check_weights
from cliper.model.loading.weights import resolve_backbone, resolve_diffusion
from tests.conftest import PARITY

CPU = torch.device("cpu")
WHOLE = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


@pytest.fixture
def sd(tmp_path: Path) -> Path:
    folder = tmp_path / "sd"
    shutil.copytree(PARITY / "sd_tiny", folder)
    return folder


def checked(folder: Path, **settings: Any) -> None:
    config = FGCConfig(model=str(folder), **settings)
    check_diffusion(resolve_diffusion(config), config)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def without(path: Path, prefix: str) -> None:
    save_file({name: value for name, value in load_file(path).items() if not name.startswith(prefix)}, path)


UNET, VAE, TEXT = (f"{part}/{stem}.safetensors" for part, stem in WHOLE.items())
SCHEDULER = "scheduler/scheduler_config.json"

FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no scheduler config": (lambda f: (f / SCHEDULER).unlink(), f"missing: {SCHEDULER}"),
    "no text encoder weights": (lambda f: (f / TEXT).unlink(), f"missing: {TEXT}"),
    "empty tokenizer folder": (
        lambda f: [p.unlink() for p in (f / "tokenizer").iterdir()],
        "missing: tokenizer/tokenizer.json (or vocab.json with merges.txt)",
    ),
    "empty tokenizer file": (
        lambda f: (f / "tokenizer/tokenizer.json").write_text(""),
        "tokenizer cannot be read",
    ),
    "unknown scheduler": (lambda f: edit(f / SCHEDULER, _class_name="NoScheduler"), "scheduler is 'NoScheduler'"),
    "null scheduler": (lambda f: edit(f / SCHEDULER, _class_name=None), "scheduler is None; supported: PNDM"),
    "flow matching": (
        lambda f: edit(f / SCHEDULER, _class_name="FlowMatchEulerDiscreteScheduler"),
        "scheduler is 'FlowMatchEulerDiscreteScheduler'; supported: PNDMScheduler, DDIMScheduler, DDPMScheduler",
    ),
    "Euler": (
        lambda f: edit(f / SCHEDULER, _class_name="EulerDiscreteScheduler"),
        "scheduler is 'EulerDiscreteScheduler'",
    ),
    "scheduler config is a list": (lambda f: (f / SCHEDULER).write_text("[]"), "holds list, not an object"),
    "broken JSON": (lambda f: (f / "unet/config.json").write_text("{"), "unet/config.json cannot be read as JSON"),
    "truncated UNet": (lambda f: cut(f / UNET), f"{UNET} cannot be read"),
    "truncated VAE": (lambda f: cut(f / VAE), "it is truncated or not a checkpoint"),
    "truncated text encoder": (lambda f: cut(f / TEXT), f"{TEXT} cannot be read"),
    "tensors missing": (lambda f: without(f / UNET, "mid_block"), "has no tensor 'mid_block"),
    "VAE without encoder": (lambda f: without(f / VAE, "encoder.conv_in"), "has no tensor 'encoder.conv_in"),
    "text encoder of another size": (
        lambda f: edit(f / "text_encoder/config.json", hidden_size=32, num_attention_heads=2),
        "expects text vectors of 16, the text encoder makes 32",
    ),
    "another UNet's weights": (
        lambda f: edit(f / "unet/config.json", block_out_channels=[16, 16, 32, 64]),
        "does not fit its configuration",
    ),
    "nonsense in a config": (
        lambda f: edit(f / "unet/config.json", down_block_types=["NoSuchBlock"]),
        "does not describe a network",
    ),
    "SDXL": (
        lambda f: edit(f / "unet/config.json", addition_embed_type="text_time"),
        "needs more inputs than text (addition_embed_type='text_time': SDXL?)",
    ),
    "inpainting": (lambda f: edit(f / "unet/config.json", in_channels=9), "the UNet takes 9 channels, not 4"),
    "another VAE": (lambda f: edit(f / "vae/config.json", latent_channels=16), "does not make 4 channels"),
    "vocabulary too small": (lambda f: edit(f / "text_encoder/config.json", vocab_size=50), "does not fit"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_a_diffusers_folder(sd: Path, fault: str) -> None:
    damage, message = FAULTS[fault]
    checked(sd)
    damage(sd)
    with pytest.raises(CliperError) as caught:
        checked(sd)
    assert message in str(caught.value)
    assert str(sd) in str(caught.value)
    with pytest.raises(CliperError):  # and if it is loaded without a driver
        DiffusionAttention(FGCConfig(model=str(sd)), CPU, torch.float32)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((-4, -12), r"different sizes \(-4: 64 x 64, -12: 32 x 32\); .* those of -4: .*-6, -4, -2"),
        ((-3,), "-3 is cross-attention; use -4"),
        ((-99,), "-99 is out of range; this UNet has"),
    ],
)
def test_layers_must_be_self_attention_of_one_size(sd: Path, layers: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        checked(sd, layers=layers)


def save_as(source: Path, target: Path, form: str) -> None:
    """Replace the weights of a copied diffusers folder by another form of the same."""
    networks = {
        "unet": diffusers.UNet2DConditionModel.from_pretrained(source, subfolder="unet", low_cpu_mem_usage=False),
        "vae": diffusers.AutoencoderKL.from_pretrained(source, subfolder="vae", low_cpu_mem_usage=False),
    }
    size = {"unet": "500KB", "vae": "60KB"}
    for part, network in networks.items():
        (target / part / f"{WHOLE[part]}.safetensors").unlink()
        shards = {"max_shard_size": size[part]} if "sharded" in form else {}
        network.half().save_pretrained(
            target / part,
            safe_serialization="bin" not in form,
            variant="fp16" if "fp16" in form else None,
            **shards,
        )
    text = target / TEXT
    if "bin" in form:
        torch.save(
            load_file(text), text.with_name("pytorch_model.fp16.bin" if "fp16" in form else "pytorch_model.bin")
        )
        text.unlink()
    elif "fp16" in form:
        text.rename(text.with_name("model.fp16.safetensors"))


@pytest.mark.parametrize("form", ["fp16", "bin", "fp16 bin", "sharded", "fp16 sharded"])
def test_every_form_of_the_weights_computes_the_same(sd: Path, photos: list[np.ndarray], form: str) -> None:
    save_as(PARITY / "sd_tiny", sd, form)
    checked(sd)
    [expected, _], [found, _] = (
        DiffusionAttention(FGCConfig(model=str(folder)), CPU, torch.float32)(photos[:1], ["photo"])
        for folder in (PARITY / "sd_tiny", sd)
    )
    torch.testing.assert_close(found.query, expected.query, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found.key, expected.key, atol=1e-6, rtol=1e-6)


def test_names_of_attention_before_diffusers_0_14(sd: Path) -> None:
    """Stable Diffusion 1.5's VAE has them."""
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, value in load_file(sd / VAE).items():
        short = next((n for n in names if f".{n}." in name), None)
        old[name if short is None else name.replace(short, names[short])] = value
    assert any(".proj_attn." in name for name in old)
    save_file(old, sd / VAE)
    checked(sd)
    edit(sd / "text_encoder/config.json")
    DiffusionAttention(FGCConfig(model=str(sd)), CPU, torch.float32)


def test_a_text_encoder_of_older_transformers(sd: Path) -> None:
    state = {f"text_model.{name}": value for name, value in load_file(sd / TEXT).items()}
    save_file(state | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, sd / TEXT, {"format": "pt"})
    checked(sd)
    transformers.CLIPTextModel.from_pretrained(sd, subfolder="text_encoder")


def test_faults_of_a_backbone(tiny_clip: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(tiny_clip, folder)
    config = BackboneConfig(model=f"local-dir:{folder}")
    check_weights(CLIPerConfig(backbone=config, fgc=None))
    weights, settings = folder / "open_clip_model.safetensors", folder / "open_clip_config.json"
    content = json.loads(settings.read_text())

    def refused(message: str) -> None:
        with pytest.raises(CliperError, match=message):
            check_backbone(resolve_backbone(config), config.model)

    vision = content["model_cfg"]["vision_cfg"]
    for change, message in (
        ({"width": vision["width"] * 2}, "does not fit local-dir:"),
        ({"timm_model_name": "vit"}, "is not a plain ViT"),
        ({"layers": [2, 2, 2, 2]}, "is not a plain ViT"),
    ):
        model = content["model_cfg"] | {"vision_cfg": vision | change}
        settings.write_text(json.dumps(content | {"model_cfg": model}))
        refused(message)
    settings.write_text("{}")
    refused("has no complete model_cfg")
    settings.write_text(json.dumps(content))
    cut(weights)
    refused("open_clip_model.safetensors cannot be read .*truncated or not a checkpoint")
    weights.unlink()
    refused("no weights beside open_clip_config.json")
