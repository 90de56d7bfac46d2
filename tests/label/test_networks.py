"""Every segmenter through label, evaluate and serve, on tiny random weights; votes and means."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from cliper.jobs.evaluations import _stored_setting
from cliper.model.classes import ClassList
from cliper.model.errors import ConfigError
from cliper.model.networks.configs import MasksConfig
from cliper.model.networks.sam2 import Sam2Regions
from cliper.model.segmentation import Segmentation
from cliper.pipeline.config import JobConfig, load_config
from cliper.pipeline.corpus.sources import list_entries
from cliper.pipeline.evaluate.evaluation import open_evaluation
from cliper.pipeline.evaluate.prepare.write import prepare
from cliper.pipeline.evaluate.proposals import proposals
from cliper.pipeline.evaluate.results import figures, summarise
from cliper.pipeline.label.combined import Voter, majority, region_means, superpixels
from cliper.pipeline.label.estimate import measure
from cliper.pipeline.label.segmenters import SEGMENTERS, chosen, members_of
from cliper.pipeline.report.preview import Choice, Previewer
from cliper.pipeline.run.folder import Run
from cliper.pipeline.run.masks import unpack_mask
from cliper.pipeline.run.verify import verify_run
from cliper.pipeline.storage.backend import Storage
from tests.support.direct import label_directly
from tests.support.fakes import Brightness, jpeg
from tests.support.labeled import rows_of
from tests.support.tiny_models import sam2_folder, sam3_folder, tipsv2_folder

CLASSES = ClassList.parse(["donut", "kite = kite; toy", "grass"])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """`model:` of every segmenter, with tiny weights."""
    sam, tips = (make(tmp_path_factory.mktemp("m")) for make in (sam3_folder, tipsv2_folder))
    cliper = load_config("tiny").cliper.model_dump(mode="json", exclude={"dtype", "batch_size"}) | {"fgc": None}
    cliper["fusion"] |= {"short_side": 64}
    found: dict[str, dict[str, Any]] = {
        "cliper": cliper,
        "sam3": {"model": str(sam), "labels": {"threshold": 0.1}},
        "sam3-active": {"model": str(sam), "labels": {"threshold": 0.1}, "proposer": cliper, "top": 2},
        "tipsv2": {"model": str(tips), "short_side": 56, "temperature": 0.1, "prompts": {"templates": ["{}"]}},
        "masks": {"segmenter": "cliper", "model": cliper, "count": 20},
    }
    found["tipsv2"]["prompts"]["mean_class"] = False
    found["ensemble"] = {
        "members": [{"segmenter": n, "model": found[n]} for n in ("cliper", "sam3")],
        "side": 16,
        "labels": {"threshold": 0.1},
    }
    return found


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "raw" / "images"
    folder.mkdir(parents=True)
    for seed in range(2):
        (folder / f"p{seed}.jpg").write_bytes(jpeg(seed))
    return folder


def test_every_segmenter_is_tried(models: dict[str, Any]) -> None:
    assert set(models) == set(SEGMENTERS)


@pytest.mark.parametrize("name", ["sam3", "sam3-active", "tipsv2", "masks", "ensemble"])
def test_label_evaluate_plan_and_serve(
    name: str, models: dict[str, dict[str, Any]], corpus: Path, tmp_path: Path
) -> None:
    config = JobConfig.model_validate({"segmenter": name, "model": models[name], "batch_size": 2})
    run = label_directly(str(corpus), str(tmp_path / "run"), config, CLASSES)
    assert verify_run(run).whole
    rows = rows_of(run)
    assert [row["status"] for row in rows] == ["ok"] * 2, rows[0]["error_message"]
    assert all(len(digest) == 64 for digest in run.identity["weights"].values())
    assert sum(entry["class_id"] > 0 for row in rows for entry in row["classes"]) > 0
    assert [row["proposed"] is not None for row in rows] == [name == "sam3-active"] * 2
    _evaluate(run, corpus, tmp_path)
    preview = Previewer(config).label((corpus / "p1.jpg").read_bytes(), "p1.jpg", Choice(CLASSES, (), 0, 0, False))
    assert np.array_equal(preview.labels, unpack_mask(rows[1]))
    kind, settings = chosen(config)
    entries = list(list_entries(Storage(), str(corpus), settings.input))
    assert measure(entries, Storage(), kind.make, settings, CLASSES).failed == 0


def _evaluate(run: Run, corpus: Path, tmp_path: Path) -> None:
    """Count a run against its own masks."""
    (corpus.parent / "labels").mkdir()
    (corpus.parent / "classes.txt").write_text("\n".join(CLASSES.names))
    for row in rows_of(run):
        Image.fromarray(unpack_mask(row)).save(corpus.parent / "labels" / f"{Path(row['image_id']).stem}.png")
    evaluation = open_evaluation(run, prepare("folder", corpus.parent, str(tmp_path / "out"), Storage()))
    counted = evaluation.counter().stage(pa.table({"shard": evaluation.uncounted_shards()}))
    assert counted["problem"].null_count == len(counted)
    confusion = evaluation.read().confusion
    assert confusion.sum() == np.diag(confusion).sum() > 0
    found = proposals(evaluation.counter(), evaluation.read())
    if "proposer_backbone" in run.identity["weights"]:
        assert found == {"recall": 1.0, "mean": 2.0}  # its own masks hold proposed classes only
        setting = _stored_setting(run, None, None, None)
        results = summarise(evaluation.read(), evaluation.identity, setting) | {"proposals": found}
        assert ("classes proposed per image", "2.00") in figures(results)
    else:
        assert found is None


def test_members_are_named_and_checked(models: dict[str, dict[str, Any]]) -> None:
    config = JobConfig.model_validate({"segmenter": "ensemble", "model": models["ensemble"]})
    kind, config = chosen(config)
    assert list(members_of(config)) == ["0-cliper", "1-sam3"]
    pinned = kind.pin(config)
    assert kind.identity(pinned) == kind.identity(config)
    assert set(kind.identity(config)) == {"0-cliper-backbone", "1-sam3-sam3"}
    assert kind.describe(config).startswith("mean of CLIPer embedded:tiny, without FGC and SAM 3 ")
    wrong = JobConfig.model_validate({"segmenter": "masks", "model": {"segmenter": "cliper", "model": {"fg": 1}}})
    kind, wrong = chosen(wrong)
    with pytest.raises(ConfigError, match="model of the segmenter 'cliper': unknown key 'model.fg'"):
        kind.identity(wrong)


def test_majority_equals_counting() -> None:
    generator = np.random.default_rng(0)
    regions = generator.integers(0, 6, (20, 30))
    labels = generator.integers(0, 4, (20, 30)).astype(np.uint8)
    won, share, lead = majority(regions, labels, 3)
    for region in range(6):
        counts = [int((labels[regions == region] == k).sum()) for k in range(4)]
        assert won[region] == counts.index(max(counts))
        assert share[region] == pytest.approx(max(counts) / sum(counts))
        assert lead[region] == pytest.approx((sorted(counts)[-1] - sorted(counts)[-2]) / sum(counts))


def test_region_means_equal_averaging() -> None:
    regions = np.random.default_rng(1).integers(0, 5, (12, 16))
    scores = torch.rand(2, 3, 4)
    full = torch.nn.functional.interpolate(scores[None], size=(12, 16), mode="bilinear", align_corners=False)[0]
    expected = [[float(one[torch.from_numpy(regions == r)].mean()) for r in range(5)] for one in full]
    assert np.allclose(region_means(scores, regions).numpy(), expected, atol=1e-6)


class Halves:
    """Scores 0.9 for class 1 on the left, for class 2 on the right; labels with noise."""

    def heat(self, image: np.ndarray, image_id: str) -> np.ndarray:
        left = np.zeros((4, 4), np.float32)
        left[:, :2] = 0.9
        return np.stack([left, 0.9 - left])

    def segment(self, images: list[np.ndarray], image_ids: list[str]) -> list[Segmentation]:
        labels = np.where(np.arange(40) < 20, 1, 2) * np.ones((40, 1), int)
        labels[::7, ::5] = 0
        return [Segmentation.of(labels, 2) for _ in images]


@pytest.fixture
def halves() -> Iterator[np.ndarray]:
    image = np.zeros((40, 40, 3), np.uint8)
    image[:, 20:] = 200
    yield image


def test_sam2_finds_regions(tmp_path: Path, models: dict[str, dict[str, Any]]) -> None:
    folder = sam2_folder(tmp_path)
    content = {**models["masks"], "regions": "sam2", "weights": str(folder), "points": 9, "min_iou": 0.0}
    kind, config = chosen(JobConfig.model_validate({"segmenter": "masks", "model": content, "dtype": "float32"}))
    assert set(kind.identity(config)) == {"sam2", "0-cliper-backbone"}
    assert kind.pin(config).model.model_dump()["weights"] == str(folder)
    voter = kind.make(config, CLASSES)
    assert isinstance(voter, Voter)
    regions_of, image = voter.regions, np.array(Image.open(io.BytesIO(jpeg(3))))
    assert isinstance(regions_of, Sam2Regions)
    with torch.inference_mode():  # the class's own forward, point by point
        pixels = regions_of.preprocess(image)[None]
        for number in (0, 10, 80):
            x, y = (number % 9 + 0.5) / 9 * 64, (number // 9 + 0.5) / 9 * 64
            out = regions_of.network(pixel_values=pixels, input_points=torch.tensor([[[[x, y]]]]))
            expected = out.pred_masks[0, 0, out.iou_scores[0, 0].argmax()]
            assert torch.allclose(regions_of.masks(image)[number], expected, atol=1e-4)
    regions = regions_of(image)
    assert regions.shape == image.shape[:2]
    [found] = voter.segment([image], ["x"])
    [before] = voter.inner.segment([image], ["x"])
    for number in np.unique(regions[regions >= 0]):
        assert len(np.unique(found.labels[regions == number])) == 1
    assert (found.labels == before.labels)[regions < 0].all()


@pytest.mark.parametrize("vote", ["majority", "mean"])
def test_votes_clean_regions(vote: Any, halves: np.ndarray) -> None:
    voter = Voter(MasksConfig(vote=vote, count=8), Halves(), 2)
    [found] = voter.segment([halves], ["x"])
    assert (found.labels[:, :20] == 1).all()
    assert (found.labels[:, 20:] == 2).all()
    assert 0.5 < found.confidence < 1
    regions = superpixels(halves, 8, 10.0)
    assert regions.shape == (40, 40)
    assert not {*np.unique(regions[:, :20])} & {*np.unique(regions[:, 20:])}
    with pytest.raises(ConfigError, match="'dark' has no scores to average; use vote: majority"):
        Voter(MasksConfig(segmenter="dark", vote="mean"), Brightness(JobConfig(), CLASSES), 3)
