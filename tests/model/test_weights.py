"""Finding and loading weights: every file form, every refusal."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cliper.model._libraries import open_clip
from cliper.model.backbone import load_backbone
from cliper.model.config import BackboneConfig, FGCConfig
from cliper.model.errors import WeightsError
from cliper.model.loading.weights import resolve_backbone, resolve_diffusion, sha256_of
from tests.conftest import PARITY

CPU = torch.device("cpu")
NAMED = {"tiny-test-quickgelu": True, "tiny-test": False}


@pytest.fixture(scope="module", autouse=True)
def architectures(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Two architectures known to open_clip by name, as ViT-B-16 and ViT-B-16-quickgelu are."""
    folder = tmp_path_factory.mktemp("architectures")
    config = json.loads((PARITY / "clip_tiny.json").read_text())
    for name, quick in NAMED.items():
        (folder / f"{name}.json").write_text(json.dumps(config | {"quick_gelu": quick}))
    open_clip.add_model_config(folder)


@pytest.fixture(scope="module")
def state(tiny_clip: Path) -> dict[str, torch.Tensor]:
    return load_file(tiny_clip / "open_clip_model.safetensors")


def archive(state: dict[str, torch.Tensor], path: Path) -> Path:
    """A TorchScript archive with the parameter names and extra buffers of OpenAI's releases."""
    holder = torch.nn.Module()
    for name, value in (state | {"input_resolution": torch.tensor(64), "vocab_size": torch.tensor(1)}).items():
        *parents, leaf = name.split(".")
        module = holder
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, torch.nn.Module())
            module = getattr(module, parent)
        module.register_buffer(leaf, value.half() if value.is_floating_point() else value)
    torch.jit.script(holder).save(str(path))
    return path


def assert_loaded_equals(model: torch.nn.Module, state: dict[str, torch.Tensor], tolerance: float = 0) -> None:
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name], atol=tolerance, rtol=tolerance)


def test_safetensors_and_state_dict_files(state: dict[str, torch.Tensor], tiny_clip: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": state}, tmp_path / "clip.pt")
    for file in (tiny_clip / "open_clip_model.safetensors", tmp_path / "clip.pt"):
        model, _ = load_backbone(
            BackboneConfig(model="tiny-test-quickgelu", weights=str(file)), CPU, torch.float32
        )
        assert_loaded_equals(model, state)


def test_openai_archive(
    state: dict[str, torch.Tensor], tmp_path: Path, tiny_clip: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = archive(state, tmp_path / "ViT.pt")
    model, _ = load_backbone(BackboneConfig(model="tiny-test-quickgelu", weights=str(file)), CPU, torch.float32)
    assert_loaded_equals(model, state, tolerance=1e-3)  # the archive is float16
    assert caplog.text == ""  # open_clip warns of random weights if it loads none itself
    other, _ = load_backbone(BackboneConfig(model=f"local-dir:{tiny_clip}"), CPU, torch.float32)
    assert (model.visual.preprocess_cfg["mean"], model.visual.preprocess_cfg["std"]) == (  # type: ignore[index]
        other.visual.preprocess_cfg["mean"],  # type: ignore[index]
        other.visual.preprocess_cfg["std"],  # type: ignore[index]
    )


def test_openai_archive_needs_quick_gelu(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    file = archive(state, tmp_path / "ViT.pt")
    with pytest.raises(WeightsError, match="set backbone.model to 'tiny-test-quickgelu'"):
        resolve_backbone(BackboneConfig(model="tiny-test", weights=str(file)))


def test_openai_tag_needs_quick_gelu() -> None:
    with pytest.raises(WeightsError, match="set backbone.model to 'ViT-B-16-quickgelu'"):
        resolve_backbone(BackboneConfig(model="ViT-B-16", weights="openai"))


def test_weights_of_another_architecture(tiny_clip: Path) -> None:
    file = tiny_clip / "open_clip_model.safetensors"
    with pytest.raises(WeightsError, match="does not fit ViT-B-16"):
        load_backbone(BackboneConfig(model="ViT-B-16", weights=str(file)), CPU, torch.float32)


def test_towers_without_cls_token_are_refused() -> None:
    with pytest.raises(WeightsError, match="unknown backbone.model 'ViT-B-17'"):
        resolve_backbone(BackboneConfig(model="ViT-B-17", weights="openai"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BackboneConfig(model="ViT-B-16-quickgelu", weights="nosuchtag"), "neither a file nor a tag of ViT-B-16"),
        (BackboneConfig(model="local-dir:/nowhere"), "/nowhere is not a folder on this machine"),
        (BackboneConfig(model="embedded:huge"), "no embedded model 'huge'; there is: tiny"),
    ],
)
def test_missing_weights_list_the_available_ones(config: BackboneConfig, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        resolve_backbone(config)


def test_no_network_is_one_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With the hub disabled, a file that is not in the cache is an error that names the remedy."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for resolve in (
        lambda: resolve_backbone(BackboneConfig(model="ViT-L-14-quickgelu", weights="openai")),
        lambda: resolve_diffusion(FGCConfig(model="owner/model")),
    ):
        with pytest.raises(WeightsError, match="is not in the cache .* or give a local path"):
            resolve()


def test_incomplete_diffusers_folder(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    with pytest.raises(WeightsError, match="missing: scheduler/scheduler_config.json, tokenizer/tokenizer.json"):
        resolve_diffusion(FGCConfig(model=str(tmp_path)))
    with pytest.raises(WeightsError, match="is not a folder on this machine"):
        resolve_diffusion(FGCConfig(model="/no/such/folder"))


def test_hash_follows_content_and_name(tmp_path: Path) -> None:
    one, two = tmp_path / "a", tmp_path / "b"
    one.write_bytes(b"x")
    two.write_bytes(b"x")
    assert sha256_of([one]) == sha256_of([one]) != sha256_of([two])
    two.write_bytes(b"y")
    assert len({sha256_of([one]), sha256_of([two]), sha256_of([one, two])}) == 3
    assert len(resolve_diffusion(FGCConfig(model=str(PARITY / "sd_tiny"))).files) == 9
