"""Fast paths equal the plain formulas; the benchmark's official order equals the production code."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.official import Official
from cliper.model import fusion
from cliper.model._libraries import diffusers
from cliper.model.backbone import attend
from cliper.model.config import CLIPerConfig, FGCConfig
from cliper.model.diffusion import DiffusionAttention, QueryKey, encode_latents
from cliper.model.errors import ConfigError, WeightsError
from cliper.model.labels import presence_scores, segment_scores
from cliper.model.loading.weights import resolve_diffusion, sha256_of
from cliper.model.presets import PRESETS, preset
from cliper.model.refine import refine
from tests.conftest import PARITY
from tests.parity import Recorded
from tests.support.kernel_checks import random_heads, run_kernel_checks
from tests.support.tiny_models import tiny_vae_folder


def literal_maps(attention: Tensor, rounds: int) -> list[Tensor]:
    """The affinity after every Sinkhorn round, matrix by matrix as the method is written down."""
    maps = []
    for _ in range(rounds):
        attention = attention / attention.sum(dim=-2, keepdim=True)
        attention = attention / attention.sum(dim=-1, keepdim=True)
        symmetric = (attention + attention.transpose(-2, -1)) / 2
        above = (symmetric - symmetric.mean(dim=-2, keepdim=True)).clamp(min=0)
        maps.append(above / above.sum(dim=-1, keepdim=True))
    return maps


def test_sinkhorn_vectors_equal_the_matrices() -> None:
    query, key, value = random_heads()
    attention = attend(query, key).sum(dim=0)
    rounds = list(fusion.sinkhorn_rounds(attention, 3))
    for scaling, expected in zip(rounds, literal_maps(attention, 3), strict=True):
        spread = fusion.spread_values(attention, scaling, value)
        assert torch.allclose(spread, expected @ value, atol=1e-5)
    assert torch.allclose(fusion.mean_affinity(attention, rounds[-1]), expected.mean(dim=1), atol=1e-6)


def test_fusion_kernels_equal_the_plain_functions() -> None:
    pytest.importorskip("triton")
    run_kernel_checks("fusion")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_configurations(name: str) -> None:
    config = preset(CLIPerConfig(), name)
    assert CLIPerConfig.model_validate(config.model_dump()) == config
    assert (config == CLIPerConfig()) == (name == "exact")


def test_unknown_preset_lists_the_known() -> None:
    with pytest.raises(ConfigError, match="exact, fast, fast-384, fast-256, clip-only"):
        preset(CLIPerConfig(), "faster")


@torch.inference_mode()
def test_official_order_of_the_benchmark_gives_the_same_scores_and_labels() -> None:
    recorded = Recorded(PARITY)
    config = recorded.config(next(case for case in recorded.fusion["cases"] if case["name"] == "default"))
    ours = recorded.segmenter(config)
    official = Official(config, ours.visual, ours.text, ours.classes, None)
    photo = recorded.photo("coffee")
    pixels = ours.preprocess(photo)[None]
    coarse = fusion.coarse_scores(ours.visual, pixels, ours.text, ours.classes, config.fusion, None)
    assert torch.allclose(official.clip(pixels), coarse, atol=1e-4)

    query, key, _ = random_heads(layers=2, tokens=144)
    layers = [QueryKey(q[:1], k[:1], 0.25) for q, k in zip(query, key, strict=True)]
    maps = [attend(layer.query[0], layer.key[0]) for layer in layers]  # softmax, scale 1 / sqrt(16)
    unused = torch.zeros(())
    in_unet_order = [maps[1], unused, maps[0], unused, unused, unused]  # -4 is the first layer, -6 the second
    refined = refine(coarse, layers, config.fusion.attention_threshold, "chain")
    assert torch.allclose(official.refine(coarse, in_unet_order), refined, atol=1e-4)

    size = photo.shape[:2]
    labels = segment_scores(refined[0], presence_scores(coarse, refined)[0], size, config.labels).labels
    assert (official.label(coarse, refined, size) == labels).mean() > 0.999


def test_a_tiny_encoder_replaces_the_vae(tmp_path: Path) -> None:
    folder = tiny_vae_folder(tmp_path / "taesd")
    own = FGCConfig(resolution=64, layers=(-4,))
    small = own.model_copy(update={"vae": str(folder)})
    assert sha256_of(resolve_diffusion(small).files) != sha256_of(resolve_diffusion(own).files)
    assert "vae" not in own.model_dump()
    step = DiffusionAttention(small, torch.device("cpu"), torch.float32)
    pixels = torch.rand(1, 3, 64, 64) * 2 - 1
    expected = diffusers.AutoencoderTiny.from_pretrained(folder).encode(pixels).latents
    with torch.inference_mode():
        assert torch.allclose(encode_latents(step.vae, pixels), expected, atol=1e-6)
    assert expected.shape == (1, 4, 8, 8)
    [found] = step([np.zeros((30, 40, 3), np.uint8)], ["x"])
    assert found.query.shape[-2] == 64
    (tmp_path / "taesd" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(WeightsError, match="holds AutoencoderKL with 4 channels, not an AutoencoderTiny"):
        DiffusionAttention(small, torch.device("cpu"), torch.float32)
    (tmp_path / "taesd" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"fgc\.vae '.*': missing: diffusion_pytorch_model.safetensors"):
        resolve_diffusion(small)
