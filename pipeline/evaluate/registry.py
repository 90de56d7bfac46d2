"""The eight benchmarks and the user's own images, with the reader of each download. Add one to DATASETS."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cliper.pipeline.config import suggest
from cliper.pipeline.errors import DatasetError
from cliper.pipeline.evaluate.prepare import ade20k, cityscapes, coco, context, folder, voc
from cliper.pipeline.evaluate.prepare.base import Sample


@dataclass(frozen=True)
class Dataset:
    """A benchmark: its classes, ignored labels, kinds of ground truth, and the reader of its download."""

    title: str
    ignore_labels: tuple[int, ...]  # truth labels that are not counted; 0 where background is no class
    truths: Mapping[str, int]  # forms of the ground truth, and how many images each has; the first is the default
    samples: Callable[[Path, str], Iterator[Sample]]
    where: str
    classes: str = ""  # shipped class list; empty: classes.txt of the data set


WITH_BACKGROUND = (255,)
WITHOUT_BACKGROUND = (0, 255)

DATASETS: dict[str, Dataset] = {
    "voc21": Dataset(
        "PASCAL VOC 2012 with background", WITH_BACKGROUND, {"class": 1449, "aug": 1449}, voc.samples, voc.WHERE,
        "voc21",
    ),
    "voc20": Dataset(
        "PASCAL VOC 2012 without background", WITHOUT_BACKGROUND, {"class": 1449, "aug": 1449}, voc.samples,
        voc.WHERE, "voc20",
    ),
    "context60": Dataset(
        "PASCAL Context with background", WITH_BACKGROUND, {"mat": 5105, "json": 5104, "png": 5104},
        context.samples, context.WHERE, "context60",
    ),
    "context59": Dataset(
        "PASCAL Context without background", WITHOUT_BACKGROUND, {"mat": 5105, "json": 5104, "png": 5104},
        context.samples, context.WHERE, "context59",
    ),
    "coco_object": Dataset(
        "COCO-Object", WITH_BACKGROUND, {"instances": 5000, "stuff": 5000, "masks": 5000}, coco.object_samples,
        coco.WHERE, "coco_object",
    ),
    "coco_stuff": Dataset(
        "COCO-Stuff 164k", WITHOUT_BACKGROUND, {"stuff": 5000}, coco.stuff_samples, coco.WHERE_STUFF, "coco_stuff"
    ),
    "ade20k": Dataset(
        "ADE20K", WITHOUT_BACKGROUND, {"annotations": 2000}, ade20k.samples, ade20k.WHERE, "ade20k"
    ),
    "cityscapes": Dataset(
        "Cityscapes", WITHOUT_BACKGROUND, {"halves": 1000, "whole": 500}, cityscapes.samples, cityscapes.WHERE,
        "cityscapes",
    ),
    "folder": Dataset("Your own images", (255, 65_535), {"png": 0}, folder.samples, folder.WHERE),
}  # fmt: skip


def find_dataset(name: str) -> Dataset:
    """Return a benchmark by name. Raises DatasetError that suggests or lists them."""
    if name not in DATASETS:
        raise DatasetError(f"unknown benchmark '{name}'; {suggest(name, DATASETS)}")
    return DATASETS[name]
