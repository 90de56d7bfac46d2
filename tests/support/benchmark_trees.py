"""Miniature benchmarks in their own layouts and file formats, and finished runs on them.

Every builder writes a tree below a folder and returns the ground truth it stands for, by image id: 0 is
background, k class k, 255 not counted. The way from classes to file contents is written out here a second time.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image
from pycocotools import mask as coco
from scipy.io import savemat

from cliper.model.classes import ClassList
from cliper.pipeline.config import JobConfig, ShardConfig
from cliper.pipeline.corpus.manifest import write_manifest
from cliper.pipeline.corpus.sources import Entry
from cliper.pipeline.evaluate.prepared import Prepared
from cliper.pipeline.run.folder import Run, begin_run, class_table
from cliper.pipeline.run.masks import encode_png, pack_mask
from cliper.pipeline.run.schema import COLUMNS, label_schema
from cliper.pipeline.run.shards import write_shard
from cliper.pipeline.storage.backend import Storage

Truths = dict[str, np.ndarray]
SHAPE = (8, 12)


def maps(ids: list[str], labels: list[int], shape: tuple[int, int] = SHAPE) -> Truths:
    """Random blocks of the given labels, different for every id."""
    truths = {}
    for seed, image_id in enumerate(ids):
        coarse = np.random.default_rng(seed).choice(labels, (shape[0] // 2, shape[1] // 4))
        truths[image_id] = np.kron(coarse, np.ones((2, 4))).astype(np.uint8)
    return truths


def photo(path: Path, shape: tuple[int, int] = SHAPE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(path.name)).integers(0, 255, (*shape, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)


def grey(path: Path, labels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(labels).save(path)


def names(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def voc(root: Path, folder: str = "SegmentationClass") -> Truths:
    home, truths = root / "VOCdevkit/VOC2012", maps(["2007_000033", "2007_000042"], [0, 1, 15, 20, 255])
    names(home / "ImageSets/Segmentation/val.txt", list(truths))
    for name, truth in truths.items():
        photo(home / f"JPEGImages/{name}.jpg")
        grey(home / f"{folder}/{name}.png", truth)
        if folder == "SegmentationClass":  # a palette image, as VOC has them
            (home / f"{folder}/{name}.png").write_bytes(encode_png(truth))
    photo(home / "JPEGImages/2007_999999.jpg")  # of the train split
    return truths


def voc_aug(root: Path) -> Truths:
    return voc(root, "SegmentationClassAug")


CONTEXT_NUMBERS = {1: 2, 7: 25, 37: 284, 59: 458}  # class to category: aeroplane, bird, person, wood


def _context_numbers(truth: np.ndarray) -> np.ndarray:
    numbers = np.full(truth.shape, 1, dtype=np.uint16)  # accordion: none of the 59, so background
    for k, number in CONTEXT_NUMBERS.items():
        numbers[truth == k] = number
    return numbers


def _context_images(root: Path) -> tuple[Path, Truths]:
    home, truths = root / "VOCdevkit/VOC2010", maps(["2008_000002", "2008_000003"], [0, *CONTEXT_NUMBERS])
    for name in truths:
        photo(home / f"JPEGImages/{name}.jpg")
    return home, truths


def context_mat(root: Path) -> Truths:
    home, truths = _context_images(root)
    names(home / "ImageSets/Main/val.txt", [*truths, "2008_000999"])  # the last has no label map
    (root / "trainval").mkdir()
    for name, truth in truths.items():
        savemat(root / f"trainval/{name}.mat", {"LabelMap": _context_numbers(truth)})
    return truths


def context_json(root: Path) -> Truths:
    home, truths = _context_images(root)
    images, regions = [], []
    for image_id, (name, truth) in enumerate(truths.items(), 1):
        size = {"height": truth.shape[0], "width": truth.shape[1]}
        images.append({"image_id": image_id, "file_name": f"{name}.jpg", "phase": "val", **size})
        for k, number in CONTEXT_NUMBERS.items():
            region = coco.encode(np.asfortranarray(truth == k))
            region["counts"] = region["counts"].decode()
            regions.append({"image_id": image_id, "category_id": number, "segmentation": region})
    images.append({"image_id": 99, "file_name": "2008_000999.jpg", "phase": "train", "height": 4, "width": 4})
    (home / "trainval_merged.json").write_text(json.dumps({"images": images, "annos_segmentation": regions}))
    return truths


def context_png(root: Path) -> Truths:
    home, truths = _context_images(root)
    names(home / "ImageSets/SegmentationContext/val.txt", list(truths))
    for name, truth in truths.items():
        grey(home / f"SegmentationClassContext/{name}.png", truth)
    return truths


THINGS = [n for n in range(1, 91) if n not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]  # COCO category ids
STUFF = list(range(92, 183))


def _rectangle(left: int, top: int, right: int, bottom: int) -> list[float]:
    return [left, top, right, top, right, bottom, left, bottom]


def coco_instances(root: Path) -> Truths:
    """A bus (class 6) with a person (1) in front, a crowd of toothbrushes (80), and an image without objects."""
    truth = np.zeros(SHAPE, dtype=np.uint8)
    truth[1:7, 1:9] = 6
    truth[2:5, 3:6] = 1
    crowd = np.zeros(SHAPE, dtype=np.uint8)
    crowd[6:8, 10:12] = 1
    truth[crowd > 0] = 80
    runs = coco.encode(np.asfortranarray(crowd))
    lengths = [len(list(group)) for group in _groups(crowd.flatten(order="F"))]
    assert runs["size"] == list(SHAPE)
    person, bus = [_rectangle(3, 2, 6, 5)], [_rectangle(1, 1, 9, 7)]
    shape = {"size": list(SHAPE), "counts": lengths}
    annotations = [
        {"id": 1, "image_id": 139, "category_id": 1, "area": 9, "iscrowd": 0, "segmentation": person},
        {"id": 2, "image_id": 139, "category_id": 6, "area": 48, "iscrowd": 0, "segmentation": bus},
        {"id": 3, "image_id": 139, "category_id": 90, "area": 4, "iscrowd": 1, "segmentation": shape},
    ]
    images = [{"id": i, "file_name": f"{i:012d}.jpg", "height": 8, "width": 12} for i in (285, 139)]
    content = {"images": images, "annotations": annotations, "categories": [{"id": n} for n in reversed(THINGS)]}
    (root / "annotations").mkdir(parents=True)
    (root / "annotations/instances_val2017.json").write_text(json.dumps(content))
    for image in images:
        photo(root / f"val2017/{image['file_name']}")
    return {"000000000139": truth, "000000000285": np.zeros(SHAPE, dtype=np.uint8)}


def _groups(values: np.ndarray) -> list[list[int]]:
    """Runs of equal values, beginning with zeros, as COCO counts them."""
    groups: list[list[int]] = [[]]
    current = 0
    for value in values.tolist():
        if value != current:
            groups.append([])
            current = value
        groups[-1].append(value)
    return groups


def _coco_maps(root: Path) -> Truths:
    """Label maps as published (category - 1, 255 unlabeled), and the truths of the 171 classes."""
    categories = [*THINGS, *STUFF]
    truths = maps(["000000000139", "000000000285"], [1, 12, 80, 81, 171, 255])
    for name, truth in truths.items():
        stored = np.full(truth.shape, 255, dtype=np.uint8)
        for k, number in enumerate(categories, 1):
            stored[truth == k] = number - 1
        photo(root / f"images/val2017/{name}.jpg")
        grey(root / f"annotations/val2017/{name}.png", stored)
    return truths


def coco_stuff(root: Path) -> Truths:
    return _coco_maps(root)


def coco_object_from_stuff(root: Path) -> Truths:
    return {name: np.where(truth > 80, 0, truth).astype(np.uint8) for name, truth in _coco_maps(root).items()}


def coco_stuff_counted(root: Path) -> Truths:
    """The official code's layout: classes from 0 to 170."""
    truths = maps(["000000000139", "000000000285"], [1, 12, 80, 81, 171, 255])
    for name, truth in truths.items():
        photo(root / f"coco2017/val2017/{name}.jpg")
        grey(
            root / f"coco2017/stuff_anno164/val2017/{name}.png",
            np.where(truth == 255, 255, truth - 1).astype(np.uint8),
        )
    return truths


def coco_object_counted(root: Path) -> Truths:
    return {name: np.where(t > 80, 0, t).astype(np.uint8) for name, t in coco_stuff_counted(root).items()}


def coco_object_masks(root: Path) -> Truths:
    """The official code's masks lie in one folder with those of the training images."""
    truths = maps(["000000000139", "000000000285"], [0, 1, 12, 80, 255])
    for name, truth in truths.items():
        photo(root / f"coco2017/val2017/{name}.jpg")
        grey(root / f"coco2014/coco_seg_anno/{name}.png", truth)
    grey(root / "coco2014/coco_seg_anno/000000000009.png", truth)
    return truths


def ade20k(root: Path) -> Truths:
    home, truths = root / "ADEChallengeData2016", maps(["ADE_val_00000001", "ADE_val_00000002"], [1, 13, 150, 255])
    for name, truth in truths.items():
        photo(home / f"images/validation/{name}.jpg")
        grey(home / f"annotations/validation/{name}.png", np.where(truth == 255, 0, truth).astype(np.uint8))
    return truths


CITY_LABELS = {1: 7, 6: 17, 14: 26, 19: 33}  # class to labelId: road, pole, car, bicycle
CITY_VOID = (0, 4, 9)  # unlabeled, static, parking


def _city(root: Path, suffix: str, encode: Callable[[np.ndarray], np.ndarray]) -> Truths:
    frames = maps(["frankfurt_000000_000294", "munster_000001_000019"], [*CITY_LABELS, 255], (8, 16))
    for name, truth in frames.items():
        city = name.split("_")[0]
        photo(root / f"leftImg8bit/val/{city}/{name}_leftImg8bit.png", (8, 16))
        grey(root / f"gtFine/val/{city}/{name}_gtFine_{suffix}.png", encode(truth))
        (root / f"gtFine/val/{city}/{name}_gtFine_polygons.json").write_text(json.dumps({"objects": []}))
    return frames


def _label_ids(truth: np.ndarray) -> np.ndarray:
    ids = np.resize(CITY_VOID, truth.shape).astype(np.uint8)
    for k, number in CITY_LABELS.items():
        ids[truth == k] = number
    return ids


def cityscapes_whole(root: Path) -> Truths:
    return _city(root, "labelIds", _label_ids)


def cityscapes(root: Path) -> Truths:
    return _halves(_city(root, "labelIds", _label_ids))


def cityscapes_train_ids(root: Path) -> Truths:
    return _halves(_city(root, "labelTrainIds", lambda t: np.where(t == 255, 255, t - 1).astype(np.uint8)))


def _halves(frames: Truths) -> Truths:
    left = {f"{name}_left": truth[:, :8] for name, truth in frames.items()}
    return left | {f"{name}_right": truth[:, 8:] for name, truth in frames.items()}


def folder(root: Path, shape: tuple[int, int] = SHAPE, images: int = 2, classes: int = 3) -> Truths:
    truths = maps([f"scene-{i:03d}" for i in range(images)], [*range(classes + 1), 255], shape)
    names(root / "classes.txt", [f"class {k}" for k in range(1, classes + 1)])
    for name, truth in truths.items():
        photo(root / f"images/{name}.png", shape)
        grey(root / f"labels/{name}.png", truth)
    return truths


def stored_run(
    uri: str,
    prepared: Prepared,
    predictions: Mapping[str, np.ndarray],
    shard_images: int = 2,
    failed: str = "",
    storage: Storage | None = None,
) -> Run:
    """A finished labeling run with the given masks; `failed` is the id of an image without one."""
    storage = storage or Storage()
    classes = ClassList.parse(list(prepared.class_names))
    run = begin_run(
        uri, storage, {"classes": class_table(classes), "model": JobConfig().model_dump(mode="json")["model"]}
    )
    entries = [Entry(image_id, f"/nowhere/{image_id}.jpg") for image_id in predictions]
    manifest = write_manifest(entries, storage, uri, ShardConfig(images=shard_images))
    schema = label_schema(classes.names, run.fingerprint, "png", "fake")
    for shard in range(manifest.shards):
        rows = []
        for entry in manifest.read_shard(storage, uri, shard):
            row = {"image_id": entry.image_id, "uri": entry.uri, "attempts": 1, "run_fingerprint": run.fingerprint}
            if entry.image_id == failed:
                rows.append(row | {"status": "failed", "error_type": "corrupt", "error_message": "truncated"})
            else:
                rows.append(row | {"status": "ok"} | pack_mask(predictions[entry.image_id], "png"))
        table = pa.Table.from_pylist(rows, COLUMNS)
        write_shard(table.add_column(0, "shard", pa.array([shard] * len(rows))), storage, uri, schema)
    return run
