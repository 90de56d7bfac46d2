"""PASCAL Context (Mottaghi et al., CVPR 2014): 59 frequent classes out of 459, on VOC 2010 images.

Three formats are in circulation: the authors' .mat label maps with 459 classes, the "detail" JSON with run-length
masks, and converted PNGs. Category numbers are the same in the first two.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cliper.pipeline.errors import DatasetError
from cliper.pipeline.evaluate.prepare.base import (
    Labels,
    Sample,
    lookup,
    need_file,
    need_files,
    need_folder,
    read_labels,
    read_list,
)

WHERE = (
    "images: http://host.robots.ox.ac.uk/pascal/VOC/voc2010/VOCtrainval_03-May-2010.tar (VOCdevkit/VOC2010); "
    "labels: https://cs.stanford.edu/~roozbeh/pascal-context/trainval.tar.gz (trainval/*.mat), "
    "or trainval_merged.json of the PASCAL in Detail API"
)
# Numbers of the 59 classes among the 459, in the order of their names, which is also the order of the class list.
CATEGORIES = (
    2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98,
    104, 105, 113, 115, 144, 158, 159, 162, 187, 189, 207, 220, 232, 258, 259, 260, 284, 295, 296, 308,
    324, 326, 347, 349, 354, 355, 360, 366, 368, 397, 415, 416, 420, 424, 427, 440, 445, 454, 458,
)  # fmt: skip
# The other 400 classes are background.
_TABLE = lookup({number: k for k, number in enumerate(CATEGORIES, 1)}, size=460, rest=0)


def samples(root: Path, labels: str) -> Iterator[Sample]:
    """The validation images. `labels`: ``mat`` (5,105 images), ``json`` or ``png`` (5,104)."""
    home = need_folder(root, ["VOCdevkit/VOC2010", "VOC2010", "."], "PASCAL Context", WHERE)
    images = need_folder(home, ["JPEGImages"], "VOC 2010 images", WHERE)
    yield from _READERS[labels](root, home, images)


def _from_mat(root: Path, home: Path, images: Path) -> Iterator[Sample]:
    options = ["trainval", "VOCdevkit/VOC2010/trainval", "VOC2010/trainval", "pascal-context/trainval"]
    folder = need_folder(root, options, "PASCAL Context labels (.mat)", WHERE)
    split = need_file(home / "ImageSets/Main/val.txt", "VOC 2010 validation list", WHERE)
    # The list covers all VOC tasks; the images of Context are those that have a label map.
    every = [(name, folder / f"{name}.mat") for name in read_list(split)]
    labeled = [(name, file) for name, file in every if file.is_file()]
    if not labeled:
        raise DatasetError(
            f"PASCAL Context: {folder} has no .mat file for any image of {split}. Get them: {WHERE}"
        )
    pictures = need_files((images / f"{name}.jpg" for name, _ in labeled), "VOC 2010 images", WHERE)
    for (name, file), picture in zip(labeled, pictures, strict=True):
        yield Sample(name, picture, partial(_read_mat, file))


def _read_mat(file: Path) -> Labels:
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        numbers = loadmat(file)["LabelMap"]
    except (KeyError, ValueError, OSError, NotImplementedError, MatReadError) as error:
        raise DatasetError(
            f"{file} is not a PASCAL Context label map (a .mat file with 'LabelMap'): {error}"
        ) from error
    return _to_classes(numbers, str(file))


def _to_classes(numbers: Labels, source: str) -> Labels:
    if int(numbers.max()) >= len(_TABLE) or int(numbers.min()) < 0:
        raise DatasetError(f"{source} holds category {int(numbers.max())}; PASCAL Context has 1 to 459")
    return np.asarray(_TABLE[numbers.astype(np.intp)])


def _from_json(root: Path, home: Path, images: Path) -> Iterator[Sample]:
    name = "trainval_merged.json"
    file = next((p / name for p in (home, root) if (p / name).is_file()), root / name)
    content = _read_detail(need_file(file, "PASCAL Context labels (json)", WHERE))
    regions = defaultdict(list)
    for region in content["annos_segmentation"]:
        regions[region["image_id"]].append(region)
    pictures = [image for image in content["images"] if image["phase"] == "val"]
    files = need_files((images / image["file_name"] for image in pictures), "VOC 2010 images", WHERE)
    for image, path in zip(pictures, files, strict=True):
        yield Sample(path.stem, path, partial(_draw, image, regions[image["image_id"]], str(file)))


def _read_detail(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        missing = [key for key in ("images", "annos_segmentation") if key not in content]
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DatasetError(f"{file} is not JSON: {error}") from error
    if missing:
        raise DatasetError(f"{file} has no '{missing[0]}'; expected trainval_merged.json of PASCAL in Detail")
    return content


def _draw(image: dict[str, Any], regions: list[dict[str, Any]], source: str) -> Labels:
    """Draw the regions in the file's order, as the Detail API does."""
    from pycocotools import mask as coco

    numbers = np.zeros((image["height"], image["width"]), dtype=np.uint16)
    for region in regions:
        numbers[coco.decode(region["segmentation"]).astype(bool)] = region["category_id"]
    return _to_classes(numbers, source)


def _from_png(root: Path, home: Path, images: Path) -> Iterator[Sample]:
    folder = need_folder(home, ["SegmentationClassContext"], "PASCAL Context labels (.png)", WHERE)
    split = need_file(home / "ImageSets/SegmentationContext/val.txt", "PASCAL Context validation list", WHERE)
    names = read_list(split)
    pictures = need_files((images / f"{name}.jpg" for name in names), "VOC 2010 images", WHERE)
    files = need_files((folder / f"{name}.png" for name in names), "PASCAL Context labels", WHERE)
    for name, picture, file in zip(names, pictures, files, strict=True):
        yield Sample(name, picture, partial(read_labels, file))


_READERS = {"mat": _from_mat, "json": _from_json, "png": _from_png}
