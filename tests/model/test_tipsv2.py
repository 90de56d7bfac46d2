"""TIPSv2: cosines of the class's own patch tokens and text vectors, windows, words and background."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cliper.model._libraries import transformers
from cliper.model.classes import ClassList
from cliper.model.config import LabelConfig, PromptConfig, SlidingConfig
from cliper.model.errors import ConfigError
from cliper.model.networks.configs import Tipsv2Config
from cliper.model.networks.locate import pin
from cliper.model.networks.tipsv2 import Tipsv2, identity, load
from tests.support.tiny_models import tipsv2_folder

CLASSES = ClassList.parse(["cat", "sky = sky; clouds", "tree"])
PROMPTS = PromptConfig(templates=("a photo of a {}.", "{}"), mean_class=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tipsv2_folder(tmp_path_factory.mktemp("tipsv2"))


def loaded(folder: Path, **settings: object) -> Tipsv2:
    content = {"model": str(folder), "prompts": PROMPTS, "short_side": 56, "temperature": 0.1} | settings
    return load(Tipsv2Config.model_validate(content), CLASSES, "cpu", "float32", 1)


def photo(seed: int) -> np.ndarray:
    coarse = torch.rand(1, 3, 5, 7, generator=torch.Generator().manual_seed(seed))
    image = F.interpolate(coarse, size=(64, 90), mode="bicubic").clamp(0, 1)
    return (image[0].permute(1, 2, 0) * 255).byte().numpy()


@torch.inference_mode()
def test_scores_equal_the_classes_own_outputs(folder: Path) -> None:
    model, tokenizer = loaded(folder), transformers.AutoTokenizer.from_pretrained(folder)
    pixels = model.preprocess(photo(0))
    assert pixels.shape == (3, 56, 84)  # 64 x 90 at a short side of 56, in patches of 14
    vectors = {}
    for word in ("cat", "sky", "clouds", "tree"):
        texts = [template.format(word) for template in PROMPTS.templates]
        out = model.network(
            pixel_values=pixels[None],
            **tokenizer(texts, padding="max_length", max_length=64, return_tensors="pt"),
        )
        vectors[word] = F.normalize(out.text_embeds.mean(dim=0), dim=0)
        patches = F.normalize(out.vision_model_output.last_hidden_state[0, 2:], dim=-1)  # [CLS], register, patches
    logits = torch.stack([patches @ vector / 0.1 for vector in vectors.values()])  # [4, N]
    shares = logits.softmax(dim=0)
    expected = torch.stack([shares[0], torch.maximum(shares[1], shares[2]), shares[3]]).unflatten(-1, (4, 6))
    assert torch.allclose(model.scores(photo(0)), expected, atol=1e-5)
    assert expected.amax(dim=0).std() > 1e-3


def test_windows_are_averaged_with_the_whole(folder: Path) -> None:
    whole = loaded(folder)
    pixels = whole.preprocess(photo(1))[None]
    one = loaded(folder, sliding=SlidingConfig(crop=84, stride=84))  # a single window: the whole image
    assert torch.allclose(one.scores(photo(1)), whole.scores(photo(1)), atol=1e-5)
    model = loaded(folder, sliding=SlidingConfig(crop=56, stride=28))
    with torch.inference_mode():
        left, right = model.logits(pixels[..., :56]), model.logits(pixels[..., 28:])
        mean = torch.cat([left[..., :2], (left[..., 2:] + right[..., :2]) / 2, right[..., 2:]], dim=-1)
        assert torch.allclose(model._windows(pixels, model.logits(pixels)), mean, atol=1e-5)
    with pytest.raises(ConfigError, match="multiples of the patch size, 14"):
        loaded(folder, sliding=SlidingConfig(crop=30, stride=15))


def test_background_words_are_a_class_of_their_own(folder: Path) -> None:
    prompts = PROMPTS.model_copy(update={"background_words": ("ground", "wall")})
    model = loaded(folder, prompts=prompts)
    assert model.scores(photo(2)).shape[0] == 4
    [found] = model.segment([photo(2)], ["x"])
    assert found.presence.shape == (3,)
    assert found.labels.shape == (64, 90)
    sure = loaded(folder, labels=LabelConfig(protocol="mmseg", probability_threshold=0.99))
    assert sure.segment([photo(2)], ["x"])[0].pixels[0] == 64 * 90


def test_weights_are_hashed(folder: Path) -> None:
    config = Tipsv2Config(model=str(folder))
    assert set(identity(config)) == {"tipsv2"}
    assert pin(config) == config
    own = load(config.model_copy(update={"short_side": 56}), CLASSES, "cpu", "float32", 1)
    assert own.temperature == pytest.approx(float(own.network.temperature))
