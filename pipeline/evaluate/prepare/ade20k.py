"""ADE20K, the 150 classes of the Scene Parsing Challenge 2016 (Zhou et al., CVPR 2017)."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from cliper.pipeline.errors import DatasetError
from cliper.pipeline.evaluate.prepare.base import IGNORE, Labels, Sample, need_files, need_folder, read_labels

WHERE = "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip"
CLASSES = 150


def samples(root: Path, labels: str) -> Iterator[Sample]:
    """The 2,000 validation images. `labels`: ``annotations``."""
    home = need_folder(root, ["ADEChallengeData2016", "ade/ADEChallengeData2016", "."], "ADE20K", WHERE)
    images = need_folder(home, ["images/validation"], "ADE20K images", WHERE)
    folder = need_folder(home, ["annotations/validation"], "ADE20K labels", WHERE)
    pictures = sorted(images.glob("*.jpg"))
    files = need_files((folder / f"{p.stem}.png" for p in pictures), "ADE20K labels", WHERE)
    for picture, file in zip(pictures, files, strict=True):
        yield Sample(picture.stem, picture, partial(_reduce_zero, file))


def _reduce_zero(file: Path) -> Labels:
    """The file's 0 ("other objects") is not counted; 1 to 150 are the classes."""
    labels = read_labels(file)
    if int(labels.max()) > CLASSES:
        raise DatasetError(
            f"{file} holds {int(labels.max())}; expected 0 to {CLASSES}: the challenge's labels, not those of the "
            f"full ADE20K. Get them: {WHERE}"
        )
    return np.where(labels == 0, IGNORE, labels).astype(np.uint8)
