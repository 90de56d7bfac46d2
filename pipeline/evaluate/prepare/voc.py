"""PASCAL VOC 2012 segmentation: palette PNGs, or grayscale SegmentationClassAug (SBD, Hariharan et al.)."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from cliper.pipeline.errors import DatasetError
from cliper.pipeline.evaluate.prepare.base import (
    IGNORE,
    Sample,
    need_file,
    need_files,
    need_folder,
    read_labels,
    read_list,
)

WHERE = (
    "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar (VOCdevkit/VOC2012); "
    "SegmentationClassAug is a separate download of the SBD labels"
)
CHECKED = 20  # label files in which a border must be found
FOLDERS = {"class": "SegmentationClass", "aug": "SegmentationClassAug"}


def samples(root: Path, labels: str) -> Iterator[Sample]:
    """The 1,449 validation images. `labels`: ``class`` or ``aug``; the files hold 0 to 20 and 255 already."""
    home = need_folder(root, ["VOCdevkit/VOC2012", "VOC2012", "."], "VOC 2012", WHERE)
    images = need_folder(home, ["JPEGImages"], "VOC 2012 images", WHERE)
    truth = need_folder(home, [FOLDERS[labels]], "VOC 2012 labels", WHERE)
    split = need_file(home / "ImageSets/Segmentation/val.txt", "VOC 2012 validation list", WHERE)
    names = read_list(split)
    pictures = need_files((images / f"{name}.jpg" for name in names), "VOC 2012 images", WHERE)
    files = need_files((truth / f"{name}.png" for name in names), "VOC 2012 labels", WHERE)
    _check_borders(files[:CHECKED])
    for name, picture, file in zip(names, pictures, files, strict=True):
        yield Sample(name, picture, partial(read_labels, file))


def _check_borders(files: Sequence[Path]) -> None:
    """Raise DatasetError if objects have no border: in published labels it is 255, which is not counted."""
    if not any((read_labels(file) == IGNORE).any() for file in files):
        raise DatasetError(
            f"{files[0].parent}: none of {len(files)} files holds {IGNORE}, the border between objects; in this "
            f"copy borders became background, which lowers every result. Get the original labels: {WHERE}"
        )
