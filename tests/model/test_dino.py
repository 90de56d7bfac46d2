"""DINO in CLIPer: the official formulas, every kind of tower, and the combinations with FGC."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cliper.model.classes import ClassList
from cliper.model.config import CLIPerConfig, DinoConfig, FusionConfig
from cliper.model.errors import ConfigError, WeightsError
from cliper.model.fusion import encode_logits
from cliper.model.loading.weights import pin
from cliper.model.networks.dino import MEAN, NETWORKS, STD, Dino, PatchFeatures, attention_rows, spread
from cliper.model.resident import Resident
from cliper.model.segmenter import CLIPer
from cliper.pipeline.config import JobConfig, load_config
from cliper.pipeline.label.segmenters import chosen
from tests.support import reference
from tests.support.tiny_models import dino_folder

CPU = torch.device("cpu")
CLASSES = ClassList.parse(["donut", "kite", "grass"])


@pytest.fixture(scope="module", params=list(NETWORKS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dino_folder(tmp_path_factory.mktemp("dino"), request.param)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dino_folder(tmp_path_factory.mktemp("vit"), "vit")


def photo(seed: int, height: int, width: int) -> np.ndarray:
    coarse = torch.rand(1, 3, 5, 7, generator=torch.Generator().manual_seed(seed))
    image = F.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)
    return (image[0].permute(1, 2, 0) * 255).byte().numpy()


def tiny(model: Path, **changes: object) -> CLIPerConfig:
    base = load_config("tiny").cliper.model_dump() | {"dtype": "float32"}
    return CLIPerConfig.model_validate(base | {"dino": {"model": str(model)}} | changes)


def test_features_are_the_last_layers_patch_tokens(folder: Path) -> None:
    dino = Dino.load(DinoConfig(model=str(folder)), CPU, torch.float32)
    image = photo(0, 75, 100)
    found = dino.of_image(image)
    height, width = 75 // dino.patch * dino.patch, 100 // dino.patch * dino.patch
    assert found.grid == (height // dino.patch, width // dino.patch)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    pixels = F.interpolate(pixels, size=(height, width), mode="bilinear", align_corners=False)
    pixels = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.inference_mode():
        tokens = dino.network(pixels, **dino.forward_options).last_hidden_state[0]
    patches = tokens[len(tokens) - found.grid[0] * found.grid[1] :]
    assert torch.allclose(found.vectors, F.normalize(patches, dim=-1), atol=1e-6)
    assert dino.prefix == len(tokens) - len(patches)


def test_refinement_equals_the_official_formula(folder: Path) -> None:
    config = DinoConfig(model=str(folder))
    dino = Dino.load(config, CPU, torch.float32)
    features = dino.of_image(photo(1, 90, 120))
    scores = torch.rand(4, 9, 12)
    unit = features.vectors.T.unflatten(-1, features.grid)
    weights = reference.dino_map(unit, 3.0, 1.2)
    assert (weights == 0).float().mean() > 0.2  # entries are left out
    resized = F.interpolate(scores[None], size=features.grid, mode="bilinear", align_corners=False)[0].flatten(1)
    expected = (weights @ resized.T).T.unflatten(-1, features.grid)
    assert torch.allclose(spread(features, scores, config), expected, atol=1e-5)


def test_a_uniform_image_keeps_its_scores() -> None:
    vectors = F.normalize(torch.ones(12, 5), dim=-1)
    scores = torch.rand(2, 3, 4)
    assert torch.equal(spread(PatchFeatures(vectors, (3, 4)), scores, DinoConfig(model="x")), scores)
    assert torch.equal(attention_rows(vectors, vectors, 3.0, 1.2), torch.zeros(12, 12))


@pytest.mark.parametrize("pixels_seen", ["twice", "once"])
def test_proxy_equals_the_official_formula(vit: Path, pixels_seen: str) -> None:
    config = tiny(vit, fgc=None, fusion={"short_side": 96, "attention": "proxy", "logit_scale": 30})
    config = config.model_copy(update={"dino": DinoConfig(model=str(vit), proxy_pixels=pixels_seen)})
    model = CLIPer.load(config, CLASSES, "cpu")
    assert model.dino is not None
    pixels = model.preprocess(photo(2, 96, 128))[None]
    mean, std = (torch.tensor(model.visual.preprocess_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
    seen = pixels if pixels_seen == "twice" else pixels * std + mean
    seen = (seen - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    patch = model.visual.patch_size[0]
    grid = (pixels.shape[-2] // patch, pixels.shape[-1] // patch)
    with torch.inference_mode():
        found = F.interpolate(model.dino.features(seen), size=grid, mode="bilinear", align_corners=False)[0]
        ours = encode_logits(model.visual, pixels, model.text, config.fusion, model._proxy())
        expected = reference.dino_map(found, 1.0, 1.0)
        assert torch.allclose(ours.attention[0], expected, atol=1e-5)
        # The values of the last block, spread by that one map in every head; official step 4 for the other types.
        block = model.visual.transformer.resblocks[-1]
        from cliper.model.backbone import encode, merge_heads, project_value

        features = encode(model.visual, pixels, config.fusion.position_dtype).features
        value = project_value(block.attn, block.ln_1(features))[..., 1:, :]
        embedded = model.visual.ln_post(merge_heads(block.attn, expected @ value)) @ model.visual.proj
        logits = 30 * F.normalize(embedded, dim=-1) @ model.text.T
    assert torch.allclose(ours.logits, logits.transpose(2, 3).unflatten(-1, grid), atol=1e-3)


def test_refinement_and_fgc_combine(vit: Path) -> None:
    images, ids = [photo(3, 80, 100), photo(4, 100, 130)], ["a", "b"]
    fgc = load_config("tiny").cliper.fgc
    fusion = {"short_side": 64, "logit_scale": 30}
    resident = Resident(tiny(vit, fusion=fusion), "cpu")
    grids = {}
    for with_dino in (True, False):
        for with_fgc in (True, False):
            config = resident.config.model_copy(
                update={"dino": resident.config.dino if with_dino else None, "fgc": fgc if with_fgc else None}
            )
            model = resident.segmenter(config, CLASSES)
            scores = model.scores(images, ids) if not with_dino else model.scores(images[:1], ids[:1])
            grids[with_dino, with_fgc] = tuple(scores.refined[0].shape)
            labels = [found.labels for found in model.segment(images, ids)]
            assert [one.shape for one in labels] == [(80, 100), (100, 130)]
    side = 320 // 8
    assert grids[True, True] == grids[False, True] == (3, side, side)
    assert grids[True, False] == (3, 10, 12)  # the image's own size in patches of 8
    assert grids[False, False] == (3, *[s // model.visual.patch_size[0] for s in model.resized_shape((80, 100))])
    with pytest.raises(ConfigError, match="DINO with settings other than the loaded ones"):
        other = resident.config.model_copy(update={"dino": DinoConfig(model=str(vit), scale=2)})
        resident.segmenter(other, CLASSES)


def test_sizes_are_bounded(vit: Path) -> None:
    dino = Dino.load(DinoConfig(model=str(vit), long_side=64), CPU, torch.float32)
    assert dino.of_image(photo(5, 40, 200)).grid == (1, 8)
    assert dino.of_image(photo(5, 3, 3)).grid == (1, 1)


def test_weights_are_checked_hashed_and_pinned(vit: Path, tmp_path: Path) -> None:
    config = JobConfig(model=tiny(vit))
    kind, config = chosen(config)
    identity = kind.identity(config)
    assert set(identity) == {"backbone", "fgc", "dino"}
    assert "DINO" in kind.describe(config)
    assert pin(config.cliper) == config.cliper
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    for model, message in (
        (tmp_path, "dino.model '.*': missing: model.safetensors"),
        (tmp_path / "none", "dino.model '.*' is not a folder"),
    ):
        with pytest.raises(WeightsError, match=message):
            kind.identity(JobConfig(model=tiny(model)))
    (tmp_path / "model.safetensors").write_bytes((vit / "model.safetensors").read_bytes())
    with pytest.raises(WeightsError, match="type 'bert'; supported: vit, dinov2"):
        kind.identity(JobConfig(model=tiny(tmp_path)))
    wider = (vit / "config.json").read_text().replace('"intermediate_size": 32', '"intermediate_size": 64')
    (tmp_path / "config.json").write_text(wider)
    with pytest.raises(WeightsError, match="holds .* values, and ViTModel needs"):
        kind.identity(JobConfig(model=tiny(tmp_path)))


def test_proxy_needs_dino() -> None:
    with pytest.raises(ValueError, match="'proxy' needs dino.model"):
        CLIPerConfig(fusion=FusionConfig(attention="proxy"))


def test_settings_without_dino_are_written_as_before() -> None:
    assert "dino" not in CLIPerConfig().model_dump()
    assert "dino" in tiny(Path("x")).model_dump()
