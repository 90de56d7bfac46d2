"""Splits, classes, instances, regions, doubtful classes and polygons of an export, as their readers see them."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy.ndimage import label
from typer.testing import CliRunner

import cliper
from cliper.jobs.cli import app
from cliper.model.errors import ConfigError
from cliper.pipeline.export.driver import LISTING, export, make_plan
from cliper.pipeline.export.options import Options
from cliper.pipeline.export.regions import components, fill_holes, remove_small
from cliper.pipeline.run.folder import Run
from cliper.pipeline.run.rows import LABELED
from tests.support.export_runs import ODD_NAMES, scenes, scripted_run, stored_masks

EIGHT = np.ones((3, 3), int)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return scripted_run(tmp_path_factory.mktemp("options"), scenes(60), shard={"images": 16})


def exported(run: Run, to: str, folder: Path, images: bool = False, **options: object) -> Path:
    export(run, make_plan(run, to, LABELED, images, Options(**options)), str(folder))  # type: ignore[arg-type]
    return folder


def listed_splits(folder: Path) -> dict[str, str]:
    rows = [json.loads(line) for line in (folder / LISTING).read_text().splitlines()]
    return {row["image_id"]: row["split"] for row in rows}


def test_splits_by_share_folder_pattern_and_list(run: Run, tmp_path: Path) -> None:
    shares = listed_splits(exported(run, "coco", tmp_path / "a", val_share=0.3, test_share=0.2))
    assert set(shares.values()) == {"train", "val", "test"}
    assert {p.name for p in (tmp_path / "a" / "annotations").iterdir()} == {
        f"instances_{split}.json" for split in ("train", "val", "test")
    }
    for name, split_by in (("b", "folder"), ("c", "^(part[0-9])/")):
        found = listed_splits(exported(run, "huggingface", tmp_path / name, val_share=0.5, split_by=split_by))
        groups = {image_id.rpartition("/")[0]: split for image_id, split in found.items() if "part" in image_id}
        assert len(groups) == 3
        assert all(found[i] == groups[i.rpartition("/")[0]] for i in found if "part" in i)
    given = listed_splits(exported(run, "voc", tmp_path / "d", val_share=0.0, listed={"Photo.jpg": "test"}))
    assert Counter(given.values()) == {"train": 59, "test": 1}
    lists = tmp_path / "d" / "VOCdevkit/VOC2012/ImageSets/Segmentation"
    assert len((lists / "trainval.txt").read_text().splitlines()) == 59


def test_instances_are_connected_regions_and_their_scores_count(run: Run, tmp_path: Path) -> None:
    """COCOeval gives the export's own results an average precision of 1 for things and stuff."""
    things = (ODD_NAMES[0], ODD_NAMES[2])
    exported(run, "coco", tmp_path / "coco", instances=True, things=things)
    exported(run, "coco-results", tmp_path / "results", instances=True, things=things)
    truth = COCO(tmp_path / "coco/annotations/instances_train.json")
    masks, expected = stored_masks(run), 0
    for image in truth.loadImgs(truth.getImgIds()):
        labels = masks[image["cliper_image_id"]]
        numbers = [k for k in np.unique(labels).tolist() if k]
        expected += sum(label(labels == k, EIGHT)[1] if k in (1, 3) else 1 for k in numbers)
    assert len(truth.getAnnIds()) == expected
    assert [c["isthing"] for c in truth.loadCats([1, 2, 3])] == [1, 0, 1]
    assert all(0 <= one["score"] <= 1 for one in truth.loadAnns(truth.getAnnIds()))
    evaluation = COCOeval(truth, truth.loadRes(str(tmp_path / "results" / "results.json")), "segm")
    evaluation.params.maxDets = [1000, 1000, 1000]
    evaluation.evaluate()
    evaluation.accumulate()
    precision = evaluation.eval["precision"]
    assert precision[precision > -1].min() == pytest.approx(1)


@pytest.mark.parametrize("kind", ["polygon", "rle-uncompressed"])
def test_coco_segmentations_are_the_same_masks(kind: str, run: Run, tmp_path: Path) -> None:
    exported(run, "coco", tmp_path, segmentation=kind)
    found, masks = COCO(tmp_path / "annotations/instances_train.json"), stored_masks(run)
    for image in found.loadImgs(found.getImgIds()):
        labels = np.zeros((image["height"], image["width"]), int)
        for one in found.loadAnns(found.getAnnIds(image["id"])):
            assert isinstance(one["segmentation"], list) == (kind == "polygon")
            mask = found.annToMask(one)
            assert (one["area"], one["bbox"]) == (mask.sum(), coco_mask.toBbox(found.annToRLE(one)).tolist())
            labels[mask.astype(bool)] = one["category_id"]
        assert np.array_equal(labels, masks[image["cliper_image_id"]])


@pytest.mark.parametrize("to", ["coco", "yolo-seg"])
def test_simplified_polygons_report_their_iou(to: str, run: Run, tmp_path: Path) -> None:
    options = Options(simplify=1.0, segmentation="polygon" if to == "coco" else "rle")
    done = export(run, make_plan(run, to, LABELED, False, options), str(tmp_path / "out"))
    assert done.iou is not None
    assert 0.7 < done.iou < 1
    plain = export(
        run, make_plan(run, to, LABELED, False, replace(options, simplify=0.0)), str(tmp_path / "exact")
    )
    assert plain.iou is None
    sizes = [sum(p.stat().st_size for p in (tmp_path / n).rglob("*") if p.is_file()) for n in ("out", "exact")]
    assert sizes[0] < 0.8 * sizes[1]


def test_panoptic_ids_are_unique_and_things_marked(run: Run, tmp_path: Path) -> None:
    exported(run, "coco-panoptic", tmp_path, instances=True)
    content = json.loads((tmp_path / "annotations/panoptic_train.json").read_text())
    assert {one["isthing"] for one in content["categories"]} == {1}
    counts = [len(one["segments_info"]) for one in content["annotations"]]
    assert max(counts) > len(content["categories"]), "several segments of a class"
    for one in content["annotations"]:
        image = Image.open(tmp_path / "annotations/panoptic_train" / one["file_name"])
        ids = np.array(image).astype(int) @ [1, 256, 65536]
        assert set(np.unique(ids).tolist()) - {0} == {s["id"] for s in one["segments_info"]}


def test_classes_are_renamed_merged_dropped_and_background_is_one(run: Run, tmp_path: Path) -> None:
    rename, drop = {"Straße": "ground", "草": "ground"}, ("yes",)
    folder = exported(run, "huggingface", tmp_path, rename=rename, drop=drop, background="rest")
    from datasets import load_dataset

    rows = load_dataset(str(folder), cache_dir=str(tmp_path.parent / "cache"))["train"]
    names = rows.features["classes"].feature["class_id"].names
    assert names[:2] == ["background", "ground"]
    assert names[-1] == "rest"
    assert "yes" not in names
    masks = stored_masks(run)
    for row in rows:
        labels, stored = np.array(row["mask"]), masks[row["image_id"]]
        assert ((labels == 1) == np.isin(stored, [1, 2])).all()
        assert ((labels == len(names) - 1) == np.isin(stored, [0, 7])).all()
        assert {one["class_id"]: one["pixels"] for one in row["classes"]} == Counter(labels.ravel().tolist())


def test_doubtful_classes_become_the_ignore_value(tmp_path: Path) -> None:
    from tests.dataset.test_dataset import Doubtful
    from tests.support.fakes import write_corpus
    from tests.support.labeled import label_small

    write_corpus(tmp_path / "images", 8)
    run = label_small(tmp_path / "images", tmp_path / "run", factory=Doubtful)
    for to in ("voc", "webdataset", "ade", "huggingface"):
        exported(run, to, tmp_path / to, ignore_below=0.6)
    for path in (tmp_path / "voc").rglob("*.png"):
        labels = np.array(Image.open(path))
        assert not (labels == 2).any()
        assert np.array_equal(labels, np.array(Image.open(next((tmp_path / "ade").rglob(path.name)))))
    assert any((np.array(Image.open(p)) == 255).any() for p in (tmp_path / "voc").rglob("*.png"))
    with pytest.raises(ConfigError, match="the format coco has no --ignore-below"):
        make_plan(run, "coco", LABELED, options=Options(ignore_below=0.5))


def test_small_regions_and_holes() -> None:
    labels = np.zeros((20, 20), np.uint8)
    labels[2:10, 2:10] = 1
    labels[4:6, 4:6] = 0  # a hole of 4
    labels[15, 15] = 2
    labels[0, 19] = 0
    filled = fill_holes(labels, 5)
    assert (filled[2:10, 2:10] == 1).all()
    assert np.array_equal(fill_holes(labels, 4), labels)
    assert not (remove_small(labels, 2) == 2).any()
    assert np.array_equal(remove_small(labels, 1), labels)
    ids, owners = components(np.array([[1, 0, 1], [0, 1, 0], [2, 0, 2]]), {2})
    assert owners == [1, 2, 2], "diagonal neighbors are connected"
    assert ids.max() == 3


def test_options_that_fit_no_format_or_run_are_refused(run: Run) -> None:
    refused = {
        "the format voc has no --instances": ("voc", Options(instances=True)),
        "the format webdataset has no --simplify": ("webdataset", Options(simplify=1)),
        "the format voc has no --segmentation": ("voc", Options(segmentation="polygon")),
        "the run has no class 'gras'; known: ": ("voc", Options(drop=("gras",))),
        "no class 'stras' to count as things": ("coco", Options(instances=True, things=("stras",))),
        "are from 0 to 1 together": ("voc", Options(val_share=0.7, test_share=0.7)),
        "a split is train, val, test, not 'dev'": ("voc", Options(listed={"a": "dev"})),
        "a regular expression": ("voc", Options(split_by="(")),
    }
    for message, (to, options) in refused.items():
        with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
            make_plan(run, to, LABELED, options=options)


def test_the_command_prints_splits_iou_and_empty_splits(run: Run, tmp_path: Path) -> None:
    (tmp_path / "things.txt").write_text("Straße\n")
    (tmp_path / "splits.csv").write_text("Photo.jpg,val\n")
    command = ["export", run.uri, "--to", "yolo-seg", "--output", str(tmp_path / "out"), "--workers", "1"]
    more = ["--val-share", "0", "--test-share", "0.000001", "--simplify", "1", "--rename", "草=grass"]
    files = ["--things", str(tmp_path / "things.txt"), "--split-list", str(tmp_path / "splits.csv")]
    done = CliRunner().invoke(app, [*command, *more, *files])
    assert done.exit_code == 0, done.output
    assert "splits    train 59, val 1" in done.output
    assert "polygons  IoU with the masks 0." in done.output
    assert "the test split is empty: trainers refuse it; raise --test-share, or use --split-list" in done.output
    assert "grass" in yaml.safe_load((tmp_path / "out" / "data.yaml").read_text())["names"].values()


def test_a_relative_output_gives_links_that_resolve(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cliper.open_run(run.uri).export("label-studio", "out", images=True)
    for path in (tmp_path / "out" / "tasks").iterdir():
        for task in json.loads(path.read_text()):
            from urllib.parse import unquote

            place = unquote(task["data"]["image"].removeprefix("/data/local-files/?d="))
            assert Path("/" + place).is_file()
