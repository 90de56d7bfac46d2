"""Every benchmark in its own layout and formats: through prepare and evaluate, to a result computed by hand."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from cliper.pipeline.errors import DatasetError
from cliper.pipeline.evaluate.evaluation import open_evaluation
from cliper.pipeline.evaluate.metrics import score
from cliper.pipeline.evaluate.prepare.context import CATEGORIES
from cliper.pipeline.evaluate.prepare.write import prepare
from cliper.pipeline.evaluate.prepared import open_prepared
from cliper.pipeline.evaluate.registry import DATASETS
from cliper.pipeline.run.masks import decode_png
from cliper.pipeline.storage.backend import Storage
from tests.support import benchmark_trees as trees

CASES = [
    ("voc21", "class", trees.voc),
    ("voc21", "aug", trees.voc_aug),
    ("voc20", "class", trees.voc),
    ("context60", "mat", trees.context_mat),
    ("context60", "json", trees.context_json),
    ("context59", "mat", trees.context_mat),
    ("context59", "png", trees.context_png),
    ("coco_object", "instances", trees.coco_instances),
    ("coco_object", "stuff", trees.coco_object_from_stuff),
    ("coco_object", "stuff", trees.coco_object_counted),
    ("coco_object", "masks", trees.coco_object_masks),
    ("coco_stuff", "stuff", trees.coco_stuff),
    ("coco_stuff", "stuff", trees.coco_stuff_counted),
    ("ade20k", "annotations", trees.ade20k),
    ("cityscapes", "halves", trees.cityscapes),
    ("cityscapes", "halves", trees.cityscapes_train_ids),
    ("cityscapes", "whole", trees.cityscapes_whole),
    ("folder", "png", trees.folder),
]


def make(name: str, form: str, build: Callable[[Path], trees.Truths], tmp_path: Path):
    root = tmp_path / "raw"
    root.mkdir()
    truths = build(root)
    return truths, prepare(name, root, str(tmp_path / "out"), Storage(), form, allow_partial=True)


def by_hand(truths, predictions, classes, ignore):
    """Confusion matrix and mIoU over the classes of the truth, pixel by pixel."""
    matrix = np.zeros((classes + 1, classes + 1), dtype=np.int64)
    for image_id, truth in truths.items():
        for t, p in zip(truth.ravel().tolist(), predictions[image_id].ravel().tolist(), strict=True):
            if t not in ignore:
                matrix[t, p] += 1
    ious = []
    for c in range(classes + 1):
        if matrix[c].sum():
            ious.append(matrix[c, c] / (matrix[c].sum() + matrix[:, c].sum() - matrix[c, c]))
    return matrix, sum(ious) / len(ious)


@pytest.mark.parametrize(("name", "form", "build"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_prepare_and_evaluate(name, form, build, tmp_path):
    truths, prepared = make(name, form, build, tmp_path)
    assert prepared == open_prepared(str(tmp_path / "out"), Storage())
    rows = prepared.index().to_pylist()
    assert [row["image_id"] for row in rows] == sorted(truths)
    for row in rows:
        stored = decode_png((tmp_path / "out" / row["truth"]).read_bytes())
        assert np.array_equal(stored, truths[row["image_id"]]), row["image_id"]
        with Image.open(tmp_path / "out" / row["uri"]) as image:  # an absolute uri replaces the folder
            assert image.size == (row["width"], row["height"]) == stored.shape[::-1]

    classes, ignore = len(prepared.class_names), DATASETS[name].ignore_labels
    rng = np.random.default_rng(7)
    predictions = {}
    for image_id, truth in truths.items():
        guess = np.where(truth == 255, 0, truth)
        wrong = rng.random(truth.shape) < 0.3
        predictions[image_id] = np.where(wrong, rng.integers(0, classes + 1, truth.shape), guess).astype(np.uint8)
    evaluation = open_evaluation(trees.stored_run(str(tmp_path / "run"), prepared, predictions), prepared)
    shards = pa.table({"shard": evaluation.uncounted_shards()})
    assert evaluation.counter().stage(shards).column("problem").null_count == len(shards)
    confusion = evaluation.read().confusion
    matrix, miou = by_hand(truths, predictions, classes, ignore)
    assert np.array_equal(confusion[:, :-1], matrix)
    assert score(confusion, "cliper", ignore).miou == pytest.approx(miou, abs=1e-12)


def test_cut_images_are_the_halves_of_the_frame(tmp_path):
    make("cityscapes", "halves", trees.cityscapes, tmp_path)
    frame = tmp_path / "raw/leftImg8bit/val/munster/munster_000001_000019_leftImg8bit.png"
    whole = np.asarray(Image.open(frame))
    halves = [
        np.asarray(Image.open(tmp_path / f"out/images/munster_000001_000019_{s}.png")) for s in ("left", "right")
    ]
    assert np.array_equal(np.concatenate(halves, axis=1), whole)


def test_context_categories_are_the_59_classes_in_order(tmp_path):
    _, prepared = make("context59", "mat", trees.context_mat, tmp_path)
    assert len(CATEGORIES) == len(set(CATEGORIES)) == 59
    assert [prepared.class_names[k - 1] for k in trees.CONTEXT_NUMBERS] == ["aeroplane", "bird", "person", "wood"]


@pytest.mark.parametrize(
    ("name", "labels", "expected"),
    [
        ("coco_stuff", [1, 12, 80, 81, 171], ["person", "stop sign", "toothbrush", "banner", "wood"]),
        ("coco_object", [1, 6, 80], ["person", "bus", "toothbrush"]),
        ("cityscapes", [1, 6, 14, 19], ["road", "pole", "car", "bicycle"]),
        ("ade20k", [1, 13, 150], ["wall", "person", "flag"]),
        ("voc21", [1, 15, 20], ["aeroplane", "person", "tvmonitor"]),
    ],
)
def test_class_numbers_are_those_of_the_datasets(name, labels, expected):
    from cliper.pipeline.config import load_classes

    names = load_classes(DATASETS[name].classes).names
    assert [names[k - 1] for k in labels] == expected


def test_images_can_be_copied_and_a_partial_benchmark_is_marked(tmp_path):
    root = tmp_path / "raw"
    truths = trees.ade20k(root)
    prepared = prepare("ade20k", root, str(tmp_path / "out"), Storage(), allow_partial=True, copy_images=True)
    assert {row["uri"] for row in prepared.index().to_pylist()} == {f"images/{name}.jpg" for name in truths}
    assert (prepared.images, prepared.expected, prepared.complete) == (2, 2000, False)


def test_the_fingerprint_is_of_the_ground_truth(tmp_path):
    prints = []
    for number, build in enumerate((trees.voc, trees.voc_aug, trees.voc)):
        root = tmp_path / str(number)
        build(root)
        form = "aug" if build is trees.voc_aug else "class"
        if number == 2:
            file = root / "VOCdevkit/VOC2012/SegmentationClass/2007_000033.png"
            trees.grey(file, np.ones(trees.SHAPE, dtype=np.uint8))
        prints.append(prepare("voc21", root, str(root / "out"), Storage(), form, allow_partial=True).fingerprint)
    assert prints[0] == prints[1] != prints[2]


def remove(path: str) -> Callable[[Path], None]:
    return lambda root: (root / path).unlink()


def rewrite(path: str, content: str) -> Callable[[Path], None]:
    return lambda root: (root / path).write_text(content)


def colour(path: str) -> Callable[[Path], None]:
    return lambda root: Image.fromarray(np.zeros((*trees.SHAPE, 3), np.uint8)).save(root / path)


def label(path: str, value: int, shape: tuple[int, int] = trees.SHAPE) -> Callable[[Path], None]:
    return lambda root: trees.grey(root / path, np.full(shape, value, dtype=np.uint8))


def region(**changes) -> Callable[[Path], None]:
    """Change the first annotation of the instances."""

    def change(root: Path) -> None:
        content = json.loads((root / INSTANCES).read_text())
        content["annotations"][0] |= changes
        (root / INSTANCES).write_text(json.dumps(content))

    return change


def zero_borders(file: Path) -> None:
    labels = np.array(Image.open(file))
    trees.grey(file, np.where(labels == 255, 0, labels).astype(np.uint8))


INSTANCES = "annotations/instances_val2017.json"
VOC = "VOCdevkit/VOC2012"
ADE = "ADEChallengeData2016/annotations/validation/ADE_val_00000001.png"
CITY = "gtFine/val/munster/munster_000001_000019_gtFine_labelIds.png"
WRONG = [
    (
        "voc21",
        "class",
        trees.voc,
        lambda root: None,
        r"found 2 images .* expected 1449.*VOCtrainval_11-May-2012.tar.*--allow-partial",
    ),
    (
        "voc21",
        "aug",
        trees.voc,
        lambda root: None,
        r"expected the folder SegmentationClassAug in .*VOC2012; found: ImageSets, JPEGImages",
    ),
    (
        "voc21",
        "class",
        trees.voc,
        remove(f"{VOC}/JPEGImages/2007_000042.jpg"),
        r"1 of 2 files are missing in .*JPEGImages, e.g. 2007_000042.jpg",
    ),
    (
        "voc21",
        "class",
        trees.voc,
        remove(f"{VOC}/ImageSets/Segmentation/val.txt"),
        r"val.txt does not exist. Get it: http",
    ),
    ("voc21", "class", trees.voc, rewrite(f"{VOC}/ImageSets/Segmentation/val.txt", ""), "names no images"),
    (
        "voc21",
        "class",
        trees.voc,
        colour(f"{VOC}/SegmentationClass/2007_000033.png"),
        "is a RGB image; labels need one channel",
    ),
    (
        "voc21",
        "class",
        trees.voc,
        label(f"{VOC}/SegmentationClass/2007_000033.png", 21),
        "holds label 21; the class list has 20",
    ),
    (
        "voc21",
        "class",
        trees.voc,
        label(f"{VOC}/SegmentationClass/2007_000033.png", 1, (4, 4)),
        "is 12x8 pixels, but its ground truth 4x4",
    ),
    ("voc21", "class", trees.voc, rewrite(f"{VOC}/JPEGImages/2007_000033.jpg", "?"), "not a readable image"),
    (
        "context60",
        "mat",
        trees.context_png,
        lambda root: None,
        r"PASCAL Context labels \(.mat\): expected the folder trainval",
    ),
    (
        "context60",
        "mat",
        trees.context_mat,
        rewrite("trainval/2008_000002.mat", "?"),
        "is not a PASCAL Context label map",
    ),
    ("context60", "json", trees.context_mat, lambda root: None, r"trainval_merged.json does not exist"),
    (
        "context60",
        "json",
        trees.context_json,
        rewrite("VOCdevkit/VOC2010/trainval_merged.json", "{"),
        "is not JSON",
    ),
    (
        "context60",
        "json",
        trees.context_json,
        rewrite("VOCdevkit/VOC2010/trainval_merged.json", '{"images": []}'),
        "no 'annos_segmentation'",
    ),
    (
        "coco_object",
        "instances",
        trees.coco_stuff,
        lambda root: None,
        r"instances_val2017.json does not exist. Get it: http",
    ),
    (
        "coco_object",
        "instances",
        trees.coco_instances,
        remove("val2017/000000000139.jpg"),
        "1 of 2 files are missing in .*val2017",
    ),
    (
        "coco_stuff",
        "stuff",
        trees.coco_instances,
        lambda root: None,
        r"COCO-Stuff label maps: expected the folder stuffthingmaps/val2017",
    ),
    (
        "coco_stuff",
        "stuff",
        trees.coco_stuff,
        label("annotations/val2017/000000000139.png", 11),
        "holds 11, which is not a label of this kind of COCO-Stuff",
    ),
    (
        "coco_stuff",
        "stuff",
        trees.coco_stuff_counted,
        label("coco2017/stuff_anno164/val2017/000000000139.png", 175),
        "holds 175, .* original files .* belong in stuffthingmaps/val2017",
    ),
    ("coco_object", "instances", trees.coco_instances, rewrite(INSTANCES, "[]"), "has no 'images'"),
    ("coco_object", "instances", trees.coco_instances, rewrite(INSTANCES, "null"), "has no 'images'"),
    (
        "coco_object",
        "instances",
        trees.coco_instances,
        region(segmentation=[[3, 2, 3, 3]]),
        r"segmentation of annotation 1 is \[\[3, 2, 3, 3\]\]; expected polygons",
    ),
    ("coco_object", "instances", trees.coco_instances, region(segmentation=[3, 2, 3, 3]), "annotation 1 is .3, 2"),
    ("coco_object", "instances", trees.coco_instances, region(segmentation=[]), "annotation 1 is ..; expected"),
    ("coco_object", "instances", trees.coco_instances, region(segmentation=None), "annotation 1 is None"),
    (
        "coco_object",
        "instances",
        trees.coco_instances,
        region(category_id=12),
        "annotation 1 has category 12, which 'categories' does not list",
    ),
    ("coco_object", "instances", trees.coco_instances, region(area="9"), "has no usable 'area'"),
    (
        "voc21",
        "aug",
        trees.voc_aug,
        lambda root: [zero_borders(f) for f in (root / VOC / "SegmentationClassAug").iterdir()],
        "none of 2 files holds 255, the border between objects; in this copy borders became background",
    ),
    ("ade20k", "annotations", trees.ade20k, label(ADE, 151), "holds 151; expected 0 to 150"),
    (
        "ade20k",
        "annotations",
        trees.voc,
        lambda root: None,
        "ADE20K images: expected the folder images/validation",
    ),
    (
        "cityscapes",
        "halves",
        trees.cityscapes,
        remove(CITY),
        "1 of 2 files are missing in .*munster.*cityscapes-dataset.com",
    ),
    ("cityscapes", "halves", trees.cityscapes, label(CITY, 90, (8, 16)), "holds 90; expected labelIds 0 to 33"),
    (
        "cityscapes",
        "quarters",
        trees.cityscapes,
        lambda root: None,
        "no ground truth 'quarters'; allowed: halves, whole",
    ),
    ("folder", "png", trees.folder, remove("classes.txt"), r"classes.txt does not exist"),
    ("folder", "png", trees.folder, remove("labels/scene-000.png"), "1 of 2 files are missing"),
    ("voc22", "class", trees.voc, lambda root: None, "unknown benchmark 'voc22'; did you mean voc21 or voc20?"),
]


@pytest.mark.parametrize(
    ("name", "form", "build", "spoil", "message"), WRONG, ids=[case[-1][:40] for case in WRONG]
)
def test_wrong_trees_get_a_helpful_message(name, form, build, spoil, message, tmp_path):
    root = tmp_path / "raw"
    root.mkdir()
    build(root)
    spoil(root)
    with pytest.raises(DatasetError, match=f"(?s){message}"):
        prepare(name, root, str(tmp_path / "out"), Storage(), form, allow_partial="--allow-partial" not in message)
    assert not (tmp_path / "out/dataset.json").exists()


def test_prepared_data_are_not_overwritten_and_must_be_there(tmp_path):
    make("folder", "png", trees.folder, tmp_path)
    with pytest.raises(DatasetError, match="holds a prepared data set already"):
        prepare("folder", tmp_path / "raw", str(tmp_path / "out"), Storage())
    with pytest.raises(DatasetError, match="is not a folder"):
        prepare("voc21", tmp_path / "absent", str(tmp_path / "other"), Storage())
    with pytest.raises(DatasetError, match="run 'cliper prepare"):
        open_prepared(str(tmp_path / "nothing"), Storage())
