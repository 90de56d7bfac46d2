"""COCO 2017 validation: 80 objects (two definitions) and the 171 classes of COCO-Stuff 164k (Caesar et al.)."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cliper.pipeline.errors import DatasetError
from cliper.pipeline.evaluate.prepare.base import (
    IGNORE,
    Labels,
    Sample,
    lookup,
    need_file,
    need_files,
    need_folder,
    read_labels,
)

WHERE = (
    "http://images.cocodataset.org/zips/val2017.zip and "
    "http://images.cocodataset.org/annotations/annotations_trainval2017.zip (annotations/instances_val2017.json)"
)
WHERE_STUFF = (
    "http://images.cocodataset.org/zips/val2017.zip and "
    "http://calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset/stuffthingmaps_trainval2017.zip"
)
IMAGES = ["val2017", "images/val2017"]
STUFF = ["stuffthingmaps/val2017", "stuffthingmaps_trainval2017/val2017", "annotations/val2017"]

# A label file holds category - 1. Eleven categories of the numbering were never annotated.
_UNUSED = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91}
_CATEGORIES = [number for number in range(1, 183) if number not in _UNUSED]
_STUFF_TABLE = lookup({number - 1: k for k, number in enumerate(_CATEGORIES, 1)})
# Stuff and unlabeled pixels are background here (GroupViT's definition).
_OBJECT_TABLE = lookup({number - 1: k for k, number in enumerate(_CATEGORIES[:80], 1)}, rest=0)


def object_samples(root: Path, labels: str) -> Iterator[Sample]:
    """The 5,000 validation images. `labels`: ``instances`` (drawn from the json) or ``stuff`` (label maps)."""
    return _from_instances(root) if labels == "instances" else _from_maps(root, _OBJECT_TABLE)


def stuff_samples(root: Path, labels: str) -> Iterator[Sample]:
    """The 5,000 validation images with 171 classes; 255 is unlabeled. `labels`: ``stuff``."""
    return _from_maps(root, _STUFF_TABLE)


def _from_maps(root: Path, table: np.ndarray) -> Iterator[Sample]:
    images = need_folder(root, IMAGES, "COCO 2017 validation images", WHERE_STUFF)
    folder = need_folder(root, STUFF, "COCO-Stuff label maps", WHERE_STUFF)
    pictures = sorted(images.glob("*.jpg"))
    files = need_files((folder / f"{p.stem}.png" for p in pictures), "COCO-Stuff label maps", WHERE_STUFF)
    for picture, file in zip(pictures, files, strict=True):
        yield Sample(picture.stem, picture, _mapped(file, table))


def _mapped(file: Path, table: np.ndarray) -> Callable[[], Labels]:
    def read() -> Labels:
        """Labels [H, W] of `file` by `table`. Raises DatasetError for a label that is not published."""
        numbers = read_labels(file)
        if numbers.dtype != np.uint8:
            raise DatasetError(f"{file} is {numbers.dtype}; COCO-Stuff label maps are 8-bit PNGs")
        unknown = sorted(set(np.unique(numbers).tolist()) - {c - 1 for c in _CATEGORIES} - {IGNORE})
        if unknown:
            raise DatasetError(
                f"{file} holds {unknown[0]}, which is no COCO-Stuff label; is it the original file?"
            )
        return np.asarray(table[numbers])

    return read


def _from_instances(root: Path) -> Iterator[Sample]:
    images = need_folder(root, IMAGES, "COCO 2017 validation images", WHERE)
    file = need_file(root / "annotations/instances_val2017.json", "COCO 2017 annotations", WHERE)
    content = _read_instances(file)
    classes = {c["id"]: k for k, c in enumerate(sorted(content["categories"], key=lambda c: c["id"]), 1)}
    if len(classes) != 80:
        raise DatasetError(f"{file} lists {len(classes)} categories, expected 80. Get it: {WHERE}")
    regions = defaultdict(list)
    for region in content["annotations"]:
        regions[region["image_id"]].append(region)
    entries = sorted(content["images"], key=lambda image: image["id"])
    pictures = need_files((images / entry["file_name"] for entry in entries), "COCO 2017 validation images", WHERE)
    for entry, picture in zip(entries, pictures, strict=True):
        yield Sample(picture.stem, picture, partial(_draw, entry, regions[entry["id"]], classes))


def _read_instances(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DatasetError(f"{file} is not JSON: {error}") from error
    missing = [key for key in ("images", "annotations", "categories") if key not in content]
    if missing:
        raise DatasetError(f"{file} has no '{missing[0]}'; expected COCO instance annotations. Get it: {WHERE}")
    return content


def _draw(image: dict[str, Any], regions: list[dict[str, Any]], classes: dict[int, int]) -> Labels:
    """Paint the instances, large ones first, so that what lies in front of something larger stays visible.

    Crowd regions are painted like any other: their pixels do show the class.
    """
    from pycocotools import mask as coco

    height, width = image["height"], image["width"]
    labels = np.zeros((height, width), dtype=np.uint8)
    for region in sorted(regions, key=lambda r: (-r["area"], r["id"])):
        shape = region["segmentation"]
        if isinstance(shape, list):  # polygons
            shape = coco.merge(coco.frPyObjects(shape, height, width))
        elif isinstance(shape["counts"], list):  # uncompressed run lengths
            shape = coco.frPyObjects(shape, height, width)
        labels[coco.decode(shape).astype(bool)] = classes[region["category_id"]]
    return labels
