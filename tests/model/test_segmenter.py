"""The whole method on tiny weights: batching, order, neighbours, determinism, geometry errors."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cliper.model import ClassList, CLIPer, CLIPerConfig, ConfigError
from cliper.model.diffusion import image_noise
from cliper.model.segmenter import MAX_ASPECT
from tests.conftest import PARITY
from tests.support.sharp import flip_bound

CLASSES = ClassList.parse(["cat", "cup = a cup of coffee", "person", "sky"])


def config(clip: Path, **parts: object) -> CLIPerConfig:
    settings: dict[str, object] = {
        "backbone": {"model": f"local-dir:{clip}"},
        "fusion": {"short_side": 96},
        "prompts": {"templates": ["a photo of a {}."], "background_words": ["wall", "grass"]},
        "fgc": None,
        "labels": {"presence_threshold": 0.1, "background_threshold": 0.1},
    }
    return CLIPerConfig.model_validate(settings | parts)


@pytest.fixture(scope="module")
def clip_only(tiny_clip: Path) -> CLIPer:
    return CLIPer.load(config(tiny_clip), CLASSES, "cpu")


@pytest.fixture(scope="module")
def with_fgc(tiny_clip: Path) -> CLIPer:
    fgc = {"model": str(PARITY / "sd_tiny"), "resolution": 128}
    return CLIPer.load(config(tiny_clip, fgc=fgc), CLASSES, "cpu")


def test_results_come_back_in_order_at_the_images_own_sizes(clip_only: CLIPer, photos: list[np.ndarray]) -> None:
    images = [photos[0], photos[1][:100, :180], photos[2], photos[0][:60], photos[1]]
    found = clip_only.segment(images, [str(i) for i in range(5)])
    assert [f.labels.shape for f in found] == [image.shape[:2] for image in images]
    for i, image in enumerate(images):
        alone = clip_only.segment([image], [str(i)])[0]
        assert np.array_equal(alone.labels, found[i].labels)
        assert alone.confidence == found[i].confidence


def test_a_batch_scores_like_one_by_one(with_fgc: CLIPer, photos: list[np.ndarray]) -> None:
    images = [photos[0], np.ascontiguousarray(photos[0][::-1]), np.ascontiguousarray(photos[0][:, ::-1])]
    together = with_fgc.scores(images, ["a", "b", "c"])
    for i, image in enumerate(images):
        alone = with_fgc.scores([image], ["abc"[i]])
        torch.testing.assert_close(together.coarse[i], alone.coarse[0], atol=1e-4, rtol=0)
        torch.testing.assert_close(together.presence[i], alone.presence[0], atol=1e-4, rtol=0)
        # Rounding decides for a weight on FGC's threshold; the change stays within the bound.
        assert with_fgc.diffusion is not None
        layers, sharp = with_fgc.diffusion([image], ["abc"[i]]), with_fgc.config.fusion.attention_threshold
        bound, _ = flip_bound(alone.coarse[0], layers, sharp)
        assert ((together.refined[i] - alone.refined[0]).abs().flatten(1) <= 2e-4 + bound).all()


def test_masks_do_not_depend_on_neighbours_or_order(with_fgc: CLIPer, photos: list[np.ndarray]) -> None:
    ids = ["x", "y", "z"]
    forward = with_fgc.segment(photos, ids)
    backward = with_fgc.segment(photos[::-1], ids[::-1])[::-1]
    for one, other in zip(forward, backward, strict=True):
        assert np.array_equal(one.labels, other.labels)
        assert np.array_equal(one.presence, other.presence)


@pytest.mark.parametrize("fits", [1, 2])
def test_a_batch_too_large_for_the_gpu_is_split(
    clip_only: CLIPer, photos: list[np.ndarray], monkeypatch: pytest.MonkeyPatch, fits: int
) -> None:
    """Five images of one shape and one of another, batches of 4 that do not fit: the masks are those of `fits`."""
    images, ids = [photos[0], photos[0][::-1], photos[0][:, ::-1]] * 2, list("abcdef")
    images[3] = photos[0][:60]
    sizes, scores_at = [], clip_only.scores_at

    def small_device(batch: list[np.ndarray], *rest: object) -> object:
        sizes.append(len(batch))
        if len(batch) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return scores_at(batch, *rest)

    monkeypatch.setattr(CLIPer, "full_batch", 4)
    monkeypatch.setattr(clip_only, "scores_at", small_device)
    halved = clip_only.segment(images, ids)
    assert set(sizes) == {4, 2, fits}
    monkeypatch.setattr(CLIPer, "full_batch", fits)
    for one, other in zip(halved, clip_only.segment(images, ids), strict=True):
        assert np.array_equal(one.labels, other.labels)
        assert np.array_equal(one.presence, other.presence)
    monkeypatch.setattr(clip_only, "scores_at", lambda *_: small_device([images[0]] * 9))
    with pytest.raises(torch.OutOfMemoryError):
        clip_only.segment(images, ids)


def test_noise_depends_on_seed_and_id_alone() -> None:
    assert torch.equal(image_noise(0, "a", 8), image_noise(0, "a", 8))
    assert not torch.equal(image_noise(0, "a", 8), image_noise(0, "b", 8))
    assert not torch.equal(image_noise(0, "a", 8), image_noise(1, "a", 8))
    assert image_noise(0, "a", 64).std() == pytest.approx(1, abs=0.02)


def test_fgc_changes_scores_and_needs_the_id(with_fgc: CLIPer, photos: list[np.ndarray]) -> None:
    one, other = (with_fgc.scores(photos[:1], [image_id]) for image_id in ("a", "b"))
    assert torch.equal(one.coarse, other.coarse)
    assert not torch.equal(one.refined, other.refined)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_precisions_agree_on_most_pixels(tiny_clip: Path, photos: list[np.ndarray], dtype: str) -> None:
    exact = CLIPer.load(config(tiny_clip), CLASSES, "cpu").segment(photos, ["a", "b", "c"])
    other = CLIPer.load(config(tiny_clip, dtype=dtype), CLASSES, "cpu").segment(photos, ["a", "b", "c"])
    for one, two in zip(exact, other, strict=True):
        assert (one.labels == two.labels).mean() > 0.9


def test_sliding_windows_smaller_and_larger_than_the_image(tiny_clip: Path, photos: list[np.ndarray]) -> None:
    for crop in (64, 224):
        model = CLIPer.load(config(tiny_clip, sliding={"crop": crop, "stride": 32}), CLASSES, "cpu")
        assert model.segment(photos[:1], ["a"])[0].labels.shape == photos[0].shape[:2]


@pytest.mark.parametrize("shape", [(5, 400), (400, 5), (1, 1)])
def test_extreme_shapes(clip_only: CLIPer, shape: tuple[int, int]) -> None:
    if max(shape) / min(shape) > 50:
        clip_only = CLIPer(
            clip_only.config.model_copy(
                update={"fusion": clip_only.config.fusion.model_copy(update={"short_side": 16})}
            ),
            clip_only.visual,
            clip_only.text,
            clip_only.classes,
            None,
        )
    image = np.full((*shape, 3), 127, np.uint8)
    assert clip_only.segment([image], ["thin"])[0].labels.shape == shape


@pytest.mark.parametrize("shape", [(1, 64), (3, 300), (64, 1), (2, 40_000)])
def test_strips_are_resized_to_a_bounded_size(clip_only: CLIPer, shape: tuple[int, int]) -> None:
    height, width = clip_only.resized_shape(shape)
    assert max(height, width) == MAX_ASPECT * min(height, width) == MAX_ASPECT * 96
    image = np.full((*shape, 3), 127, np.uint8)
    assert clip_only.segment([image], ["a"])[0].labels.shape == shape


def test_panoramas_keep_their_aspect(clip_only: CLIPer) -> None:
    assert clip_only.resized_shape((100, 1600)) == (96, 16 * 96)
    assert clip_only.resized_shape((100, 1000)) == (96, 10 * 96)


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((0, 4, 3), np.uint8)]
)
def test_wrong_arrays_are_refused(clip_only: CLIPer, image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected uint8"):
        clip_only.segment([image], ["wrong"])


def test_impossible_geometry_names_the_patch(tiny_clip: Path) -> None:
    with pytest.raises(ConfigError, match=r"multiples of the backbone's patch size, 16"):
        CLIPer.load(config(tiny_clip, sliding={"crop": 100, "stride": 50}), CLASSES, "cpu")
    with pytest.raises(ConfigError, match=r"select_layer -9 is out of range; this backbone has 4 layers"):
        CLIPer.load(config(tiny_clip, fusion={"short_side": 96, "select_layer": -9}), CLASSES, "cpu")


def test_cross_attention_cannot_be_chosen(tiny_clip: Path) -> None:
    fgc = {"model": str(PARITY / "sd_tiny"), "layers": [-5]}
    with pytest.raises(ConfigError, match="-5 is cross-attention; use -6"):
        CLIPer.load(config(tiny_clip, fgc=fgc), CLASSES, "cpu")


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu(tiny_clip: Path, photos: list[np.ndarray]) -> None:
    settings = config(tiny_clip, fgc={"model": str(PARITY / "sd_tiny")}, dtype="float32", batch_size=2)
    cpu = CLIPer.load(settings, CLASSES, "cpu").segment(photos, ["a", "b", "c"])
    cuda = CLIPer.load(settings, CLASSES, "cuda").segment(photos, ["a", "b", "c"])
    for one, two in zip(cpu, cuda, strict=True):
        assert (one.labels == two.labels).mean() > 0.999


@pytest.mark.gpu
def test_cuda_masks_do_not_depend_on_neighbours(tiny_clip: Path, photos: list[np.ndarray]) -> None:
    settings = config(tiny_clip, fgc={"model": str(PARITY / "sd_tiny")}, batch_size=4)
    model = CLIPer.load(settings, CLASSES, "cuda")
    together = model.segment(photos * 2, list("abcdef"))
    for i, image in enumerate(photos * 2):
        assert np.array_equal(model.segment([image], ["abcdef"[i]])[0].labels, together[i].labels)
