"""The benchmarks, and the form they are prepared to: an index of images and one ground-truth PNG each.

dataset.json          what it is; written last
index.parquet         image_id, uri, truth, width, height; also an input for `cliper label`
truth/IMAGE_ID.png    labels [H, W]: 0 = background, k = class k of the class list, the largest value = not counted
images/               only where images are cut (Cityscapes halves) or copied
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import DatasetError
from pipeline.prepare import ade20k, cityscapes, coco, context, folder, voc
from pipeline.prepare.base import Sample
from pipeline.storage import Storage, absolute, join

INDEX = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),  # absolute, or relative to the prepared folder
        pa.field("truth", pa.string(), nullable=False),  # relative to the prepared folder
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Dataset:
    """A benchmark: what is counted, and how its download is read."""

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
        "COCO-Object", WITH_BACKGROUND, {"instances": 5000, "stuff": 5000}, coco.object_samples, coco.WHERE,
        "coco_object",
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


@dataclass(frozen=True)
class Prepared:
    """A prepared benchmark, opened for reading."""

    uri: str
    storage: Storage = field(repr=False)
    benchmark: str
    truth_form: str
    class_names: tuple[str, ...]
    ignore_labels: tuple[int, ...]
    images: int
    expected: int  # 0: any number
    fingerprint: str  # of the ground truth

    @property
    def complete(self) -> bool:
        """Whether it holds as many images as the published benchmark."""
        return self.expected in (0, self.images)

    @property
    def index_uri(self) -> str:
        """The list of images, as `cliper label --input` takes it."""
        return join(self.uri, "index.parquet")

    def index(self) -> pa.Table:
        """A table of INDEX, sorted by image_id."""
        with self.storage.open(self.index_uri) as handle:
            return pq.read_table(handle, schema=INDEX)


def find_dataset(name: str) -> Dataset:
    """Return a benchmark by name. Raises DatasetError that lists them."""
    if name not in DATASETS:
        raise DatasetError(f"unknown benchmark '{name}'; known: {', '.join(DATASETS)}")
    return DATASETS[name]


def open_prepared(uri: str, storage: Storage) -> Prepared:
    """Open what `prepare` wrote. Raises DatasetError."""
    try:
        content = json.loads(storage.read(join(uri, "dataset.json")))
    except FileNotFoundError as error:
        raise DatasetError(
            f"{uri} holds no prepared benchmark (dataset.json); "
            f"run 'cliper prepare BENCHMARK --root DIR --out {uri}'"
        ) from error
    content |= {key: tuple(content[key]) for key in ("class_names", "ignore_labels")}
    return Prepared(absolute(uri), storage, **content)
