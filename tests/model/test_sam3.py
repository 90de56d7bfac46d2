"""SAM 3: scores equal the class's own forward, prompt by prompt; proposals; weights and messages."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cliper.model._libraries import transformers
from cliper.model.classes import ClassList
from cliper.model.config import CLIPerConfig
from cliper.model.errors import ConfigError, WeightsError
from cliper.model.networks.configs import Sam3ActiveConfig, Sam3Config
from cliper.model.networks.locate import pin
from cliper.model.networks.sam3 import Sam3, Sam3Active, identity, load
from cliper.pipeline.config import load_config
from tests.support.hub import Hub
from tests.support.tiny_models import sam3_folder

CLASSES = ClassList.parse(["donut", "kite = kite; a flying toy", "grass", "brick wall"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sam3_folder(tmp_path_factory.mktemp("sam3"))


@pytest.fixture(scope="module")
def sam(folder: Path) -> Sam3:
    found = load(Sam3Config(model=str(folder), chunk=3, query_threshold=0.2), CLASSES, "cpu", "float32", 1)
    assert isinstance(found, Sam3)
    return found


def photo(seed: int, height: int = 40, width: int = 60) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def alone(sam: Sam3, tokenizer: Any, image: np.ndarray, word: str) -> tuple[np.ndarray, float]:
    """The formula on the outputs of Sam3Model.forward, called with pixels and ids of one prompt."""
    text = tokenizer([word], padding="max_length", max_length=32, return_tensors="pt")
    with torch.inference_mode():
        out = sam.network(pixel_values=sam.preprocess(image)[None], **{k: text[k] for k in text})
    presence = float(1 / (1 + np.exp(-out.presence_logits.item())))
    maps = [1 / (1 + np.exp(-out.semantic_seg[0, 0].numpy())) * presence]
    for logit, mask in zip(out.pred_logits[0].tolist(), out.pred_masks[0].numpy(), strict=True):
        query = 1 / (1 + np.exp(-logit)) * presence
        if query > sam.config.query_threshold:
            maps.append(1 / (1 + np.exp(-mask)) * query)
    return np.max(maps, axis=0), presence


def test_scores_equal_the_classes_own_forward(sam: Sam3, folder: Path) -> None:
    tokenizer, image = transformers.AutoTokenizer.from_pretrained(folder), photo(0)
    scores, presence = sam.scores(image, range(4))
    by_word = {w: alone(sam, tokenizer, image, w) for group in CLASSES.words for w in group}
    for c, group in enumerate(CLASSES.words):
        expected = np.max([by_word[word][0] for word in group], axis=0)
        assert np.allclose(scores[c].numpy(), expected, atol=1e-5)
        assert float(presence[c]) == pytest.approx(max(by_word[word][1] for word in group), abs=1e-5)
    assert scores.shape == (4, 16, 16)
    different = [float((scores[a] - scores[b]).abs().max()) for a in range(4) for b in range(a)]
    assert min(different) > 1e-3  # the prompt matters


def test_the_input_is_that_of_the_processor(sam: Sam3) -> None:
    processor = transformers.Sam3ImageProcessor(size={"height": 56, "width": 56})
    image = photo(1, 90, 70)
    expected = processor(images=[image.copy()], return_tensors="pt")["pixel_values"][0]
    assert torch.allclose(sam.preprocess(image), expected, atol=2 / 127)


def test_masks_do_not_depend_on_neighbours_or_chunks(folder: Path, sam: Sam3) -> None:
    other = load(Sam3Config(model=str(folder), chunk=1, query_threshold=0.2), CLASSES, "cpu", "float32", 1)
    [first, _] = sam.segment([photo(2), photo(3, 33, 31)], ["a", "b"])
    [again] = other.segment([photo(2)], ["a"])
    assert first.labels.shape == (40, 60)
    assert (first.labels == again.labels).mean() > 0.999
    assert np.isclose(sam.heat(photo(2), "a").max(axis=(1, 2)).max(), other.heat(photo(2), "a").max(), atol=1e-5)


def proposer() -> CLIPerConfig:
    tiny = load_config("tiny").cliper
    return tiny.model_copy(update={"fgc": None, "fusion": tiny.fusion.model_copy(update={"short_side": 64})})


def test_only_proposed_classes_are_prompted(folder: Path) -> None:
    config = Sam3ActiveConfig(
        model=str(folder), proposer=proposer(), top=2, always=("brick wall",), query_threshold=0.2
    )
    active = load(config, CLASSES, "cpu", "float32", 1)
    assert isinstance(active, Sam3Active)
    image = photo(4)
    presence = active.proposer.scores([image], ["x"]).presence[0]
    expected = sorted({*presence.topk(2).indices.tolist(), 3})
    [found] = active.segment([image], ["x"])
    assert found.proposed is not None
    assert found.proposed.tolist() == [c + 1 for c in expected]
    assert set(np.unique(found.labels)) <= {0, *found.proposed.tolist()}
    full, _ = active.sam.scores(image, range(4))
    heat = active.heat(image, "x")
    for c in range(4):
        assert np.allclose(heat[c], full[c] if c in expected else 0, atol=1e-5)
    with pytest.raises(ConfigError, match="always: 'cat' is not in the class list; it has: donut"):
        Sam3Active(config.model_copy(update={"always": ("cat",)}), active.sam, active.proposer)


def test_weights_are_named_hashed_and_refused(folder: Path, hub: Hub, tmp_path: Path) -> None:
    assert set(identity(Sam3Config(model=str(folder)))) == {"sam3"}
    assert set(identity(Sam3ActiveConfig(model=str(folder), proposer=proposer()))) == {"sam3", "proposer_backbone"}
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.add("owner/sam", files)
    pinned = pin(Sam3Config(model="owner/sam"))
    assert pinned.revision == hub.repositories["owner/sam"].branches["main"]
    assert identity(pinned) == identity(Sam3Config(model=str(folder)))
    hub.add("facebook/sam3", files, gated=True)
    with pytest.raises(WeightsError, match=r"'facebook/sam3' is gated: accept its terms at .*, then set HF_TOKEN"):
        identity(Sam3Config())
    hub.down = True
    with pytest.raises(WeightsError, match="'facebook/sam3' is not in the cache"):
        identity(Sam3Config())
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes(files[name])
    with pytest.raises(WeightsError, match="has no tokenizer; expected one of"):
        identity(Sam3Config(model=str(tmp_path)))
