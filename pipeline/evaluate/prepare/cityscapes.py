"""Cityscapes fine annotations (Cordts et al., CVPR 2016): 19 classes, whole frames or their square halves."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from cliper.pipeline.errors import DatasetError
from cliper.pipeline.evaluate.prepare.base import (
    IGNORE,
    Labels,
    Sample,
    lookup,
    need_files,
    need_folder,
    read_labels,
)

WHERE = (
    "https://www.cityscapes-dataset.com/downloads (free registration): leftImg8bit_trainvaltest.zip and "
    "gtFine_trainvaltest.zip"
)
# labelIds of the 19 classes, in the order of their trainIds (cityscapesScripts, helpers/labels.py).
LABEL_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_FROM_LABEL_IDS = lookup({label: k for k, label in enumerate(LABEL_IDS, 1)})
_FROM_TRAIN_IDS = lookup({train_id: train_id + 1 for train_id in range(19)})
_TABLES = {"labelIds": (_FROM_LABEL_IDS, range(34)), "labelTrainIds": (_FROM_TRAIN_IDS, range(19))}


def samples(root: Path, labels: str) -> Iterator[Sample]:
    """The 500 validation frames. `labels`: ``halves`` (each frame cut into two squares) or ``whole``."""
    images = need_folder(root, ["leftImg8bit/val"], "Cityscapes images", WHERE)
    folder = need_folder(root, ["gtFine/val"], "Cityscapes labels", WHERE)
    pictures = sorted(images.glob("*/*_leftImg8bit.png"))
    frames = [picture.name.removesuffix("_leftImg8bit.png") for picture in pictures]
    # The official zip holds labelIds; labelTrainIds exist only where its preparation script was run.
    kind = "labelIds" if any(folder.glob("*/*_gtFine_labelIds.png")) else "labelTrainIds"
    wanted = (folder / frame.split("_")[0] / f"{frame}_gtFine_{kind}.png" for frame in frames)
    files = need_files(wanted, "Cityscapes labels", WHERE)
    for frame, picture, file in zip(frames, pictures, files, strict=True):
        if labels == "whole":
            yield Sample(frame, picture, _reader(file, kind, None))
            continue
        for side, box in _halves(picture).items():
            yield Sample(f"{frame}_{side}", picture, _reader(file, kind, box), box)


def _halves(picture: Path) -> dict[str, tuple[int, int, int, int]]:
    """Left and right square of a frame that is twice as wide as high."""
    with Image.open(picture) as image:
        width, height = image.size
    if width != 2 * height:
        raise DatasetError(f"{picture} is {width}x{height}; a Cityscapes frame is twice as wide as high")
    return {"left": (0, 0, height, height), "right": (height, 0, width, height)}


def _reader(file: Path, kind: str, box: tuple[int, int, int, int] | None) -> Callable[[], Labels]:
    table, allowed = _TABLES[kind]

    def read() -> Labels:
        """Labels [H, W] of `file`, cropped to `box`. Raises DatasetError for an unknown id."""
        ids = read_labels(file)
        unknown = sorted(set(np.unique(ids).tolist()) - set(allowed) - {IGNORE})
        if unknown:
            raise DatasetError(f"{file} holds {unknown[0]}; expected {kind} {allowed[0]} to {allowed[-1]}, or 255")
        classes = table[ids]
        if box is None:
            return np.asarray(classes)
        left, top, right, bottom = box
        return np.ascontiguousarray(classes[top:bottom, left:right])

    return read
