"""COCO 2017 validation: 80 objects (three forms) and the 171 classes of COCO-Stuff 164k (Caesar et al.).

The layouts of the official CLIPer code are read too: `coco2014/coco_seg_anno` (objects drawn by its authors, 0 is
background, k class k) and `coco2017/stuff_anno164` (classes counted from 0 to 170).
"""

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
IMAGES = ["val2017", "images/val2017", "coco2017/val2017"]
STUFF = ["stuffthingmaps/val2017", "stuffthingmaps_trainval2017/val2017", "annotations/val2017"]
COUNTED = ["coco2017/stuff_anno164/val2017", "stuff_anno164/val2017"]  # label maps that hold class - 1
MASKS = ["coco2014/coco_seg_anno", "coco_seg_anno"]
WHERE_MASKS = (
    "the masks are part of the official CLIPer code's data (coco2014/coco_seg_anno); the images: " + WHERE
)

# A label file holds category - 1. Eleven categories of the numbering were never annotated.
_UNUSED = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91}
_CATEGORIES = [number for number in range(1, 183) if number not in _UNUSED]
_STUFF_TABLE = lookup({number - 1: k for k, number in enumerate(_CATEGORIES, 1)})
# Stuff and unlabeled pixels are background here (GroupViT's definition).
_OBJECT_TABLE = lookup({number - 1: k for k, number in enumerate(_CATEGORIES[:80], 1)}, rest=0)
_COUNTED_STUFF = lookup({k - 1: k for k in range(1, 172)})
_COUNTED_OBJECTS = lookup({k - 1: k for k in range(1, 81)}, rest=0)


def object_samples(root: Path, labels: str) -> Iterator[Sample]:
    """The 5,000 validation images.

    `labels`: ``instances`` (drawn from the json), ``stuff`` (label maps) or ``masks`` (drawn by CLIPer's authors).
    """
    if labels == "instances":
        return _from_instances(root)
    return _from_masks(root) if labels == "masks" else _from_maps(root, _OBJECT_TABLE, _COUNTED_OBJECTS)


def stuff_samples(root: Path, labels: str) -> Iterator[Sample]:
    """The 5,000 validation images with 171 classes; 255 is unlabeled. `labels`: ``stuff``."""
    return _from_maps(root, _STUFF_TABLE, _COUNTED_STUFF)


def _from_masks(root: Path) -> Iterator[Sample]:
    folder = need_folder(root, MASKS, "COCO-Object masks", WHERE_MASKS)
    images = need_folder(root, IMAGES, "COCO 2017 validation images", WHERE_MASKS)
    pictures = sorted(images.glob("*.jpg"))
    files = need_files((folder / f"{p.stem}.png" for p in pictures), "COCO-Object masks", WHERE_MASKS)
    for picture, file in zip(pictures, files, strict=True):
        yield Sample(picture.stem, picture, partial(read_labels, file))


def _from_maps(root: Path, published: np.ndarray, counted: np.ndarray) -> Iterator[Sample]:
    images = need_folder(root, IMAGES, "COCO 2017 validation images", WHERE_STUFF)
    folder = need_folder(root, [*STUFF, *COUNTED], "COCO-Stuff label maps", WHERE_STUFF)
    is_counted = folder in {root / option for option in COUNTED}
    table, numbers = (counted, range(171)) if is_counted else (published, [c - 1 for c in _CATEGORIES])
    pictures = sorted(images.glob("*.jpg"))
    files = need_files((folder / f"{p.stem}.png" for p in pictures), "COCO-Stuff label maps", WHERE_STUFF)
    for picture, file in zip(pictures, files, strict=True):
        yield Sample(picture.stem, picture, _mapped(file, table, {*numbers, IGNORE}))


def _mapped(file: Path, table: np.ndarray, allowed: set[int]) -> Callable[[], Labels]:
    def read() -> Labels:
        """Labels [H, W] of `file`, mapped by `table`. Raises DatasetError for an unknown label."""
        numbers = read_labels(file)
        if numbers.dtype != np.uint8:
            raise DatasetError(f"{file} is {numbers.dtype}; COCO-Stuff label maps are 8-bit PNGs")
        unknown = sorted(set(np.unique(numbers).tolist()) - allowed)
        if unknown:
            raise DatasetError(
                f"{file} holds {unknown[0]}, which is not a label of this kind of COCO-Stuff; original files "
                f"(category - 1, to 181) belong in {STUFF[0]}, those with classes 0 to 170 in {COUNTED[0]}"
            )
        return np.asarray(table[numbers])

    return read


def _from_instances(root: Path) -> Iterator[Sample]:
    images = need_folder(root, IMAGES, "COCO 2017 validation images", WHERE)
    file = need_file(root / "annotations/instances_val2017.json", "COCO 2017 annotations", WHERE)
    content = _read_instances(file)
    classes = {number: k for k, number in enumerate(sorted(c["id"] for c in content["categories"]), 1)}
    if len(classes) != 80:
        raise DatasetError(f"{file} lists {len(classes)} categories, expected 80. Get it: {WHERE}")
    regions = defaultdict(list)
    for region in content["annotations"]:
        _check_region(region, classes, file)
        regions[region["image_id"]].append(region)
    entries = sorted(content["images"], key=lambda image: image["id"])
    pictures = need_files((images / entry["file_name"] for entry in entries), "COCO 2017 validation images", WHERE)
    for entry, picture in zip(entries, pictures, strict=True):
        yield Sample(picture.stem, picture, partial(_draw, entry, regions[entry["id"]], classes))


_FIELDS: dict[str, dict[str, Any]] = {  # the fields that every entry must have
    "images": {"id": int, "file_name": str, "height": int, "width": int},
    "categories": {"id": int},
    "annotations": {"id": int, "image_id": int, "category_id": int, "area": (int, float)},
}


def _read_instances(file: Path) -> dict[str, Any]:
    """The content of an instances JSON file, with the fields of every entry checked. Raises DatasetError."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DatasetError(f"{file} is not JSON: {error}") from error
    found = content if isinstance(content, dict) else {}
    for key, fields in _FIELDS.items():
        entries = found.get(key)
        if not isinstance(entries, list):
            raise DatasetError(f"{file} has no '{key}'; expected COCO instance annotations. Get it: {WHERE}")
        for entry in entries:
            wrong = [
                n
                for n, kind in fields.items()
                if not isinstance(entry, dict) or not isinstance(entry.get(n), kind)
            ]
            if wrong:
                raise DatasetError(f"{file}: an entry of '{key}' has no usable '{wrong[0]}': {str(entry)[:120]}")
    return found


def _check_region(region: dict[str, Any], classes: dict[int, int], file: Path) -> None:
    """Raise DatasetError for a category outside the list, or a shape that is neither polygons nor run lengths."""
    if region["category_id"] not in classes:
        raise DatasetError(
            f"{file}: annotation {region['id']} has category {region['category_id']}, "
            "which 'categories' does not list"
        )
    shape = region.get("segmentation")
    if isinstance(shape, dict):
        usable = isinstance(shape.get("counts"), (list, str)) and isinstance(shape.get("size"), list)
    else:  # a list of four numbers would be read as a box
        usable = isinstance(shape, list) and len(shape) > 0 and all(map(_is_polygon, shape))
    if not usable:
        raise DatasetError(
            f"{file}: the segmentation of annotation {region['id']} is {str(shape)[:60]}; expected polygons "
            "([[x, y, x, y, x, y, ...], ...]) or run lengths ({size, counts})"
        )


def _is_polygon(points: Any) -> bool:
    numbers = isinstance(points, list) and all(isinstance(value, (int, float)) for value in points)
    return numbers and len(points) >= 6 and len(points) % 2 == 0


def _draw(image: dict[str, Any], regions: list[dict[str, Any]], classes: dict[int, int]) -> Labels:
    """Draw the instances, large ones first, so that a small object in front of a larger one stays visible.

    Crowd regions are drawn like any other: their pixels do show the class.
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
