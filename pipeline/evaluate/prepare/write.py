"""Write the prepared form of a benchmark, which prepared.py describes."""

import hashlib
import io
import itertools
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from cliper.model.classes import ClassList, ignore_value
from cliper.pipeline.config import load_classes, suggest
from cliper.pipeline.errors import DatasetError
from cliper.pipeline.evaluate.prepare import folder
from cliper.pipeline.evaluate.prepare.base import Labels, Sample
from cliper.pipeline.evaluate.prepared import INDEX, Prepared, content_digest, open_prepared
from cliper.pipeline.evaluate.registry import Dataset, find_dataset
from cliper.pipeline.parallel import cpus
from cliper.pipeline.run.masks import encode_png
from cliper.pipeline.storage.backend import Storage
from cliper.pipeline.storage.sealed import sealed_table
from cliper.pipeline.storage.uris import join


def prepare(
    name: str,
    root: Path,
    out: str,
    storage: Storage,
    truth_form: str | None = None,
    allow_partial: bool = False,
    copy_images: bool = False,
    on_progress: Callable[[int], None] = lambda count: None,
) -> Prepared:
    """Read the benchmark `name` below the local folder `root` and write its prepared form to `out`.

    `allow_partial` accepts fewer images than published and marks the results. `copy_images` copies the images
    to `out` as well, so that other machines can read them. Raises DatasetError.
    """
    dataset = find_dataset(name)
    form = truth_form or next(iter(dataset.truths))
    if form not in dataset.truths:
        raise DatasetError(f"{name} has no ground truth '{form}'; {suggest(form, dataset.truths, 'allowed')}")
    if not root.is_dir():
        raise DatasetError(f"{root} is not a folder. {dataset.title}: {dataset.where}")
    classes = load_classes(dataset.classes or _own_classes(root))
    found = list(dataset.samples(root, form))
    _check_count(dataset, form, len(found), root, allow_partial)
    if storage.exists(join(out, "dataset.json")):
        raise DatasetError(f"{out} holds a prepared data set already; remove it or choose another --output")
    writer = _Writer(out, storage, classes, dataset.ignore_labels, copy_images)
    rows, digests = writer.write_all(found, on_progress)
    content = {
        "benchmark": name,
        "truth_form": form,
        "class_names": list(classes.names),
        "ignore_labels": list(dataset.ignore_labels),
        "images": len(rows),
        "expected": dataset.truths[form],
        "fingerprint": hashlib.sha256("".join(digests).encode()).hexdigest()[:16],
    }
    storage.write(join(out, "index.parquet"), sealed_table(pa.Table.from_pylist(rows, INDEX), compression="zstd"))
    content["digest"] = content_digest(content)
    storage.write(join(out, "dataset.json"), json.dumps(content, indent=1, ensure_ascii=False).encode())
    return open_prepared(out, storage)


def _own_classes(root: Path) -> str:
    path = root / "classes.txt"
    if not path.is_file():
        raise DatasetError(f"{path} does not exist; {folder.WHERE}")
    return str(path)


def _check_count(dataset: Dataset, form: str, found: int, root: Path, allow_partial: bool) -> None:
    expected = dataset.truths[form]
    if not found:
        raise DatasetError(f"{dataset.title}: no images in {root}. Get them: {dataset.where}")
    if expected and found != expected and not allow_partial:
        raise DatasetError(
            f"{dataset.title}: found {found} images with ground truth in {root}, expected {expected}. "
            f"Get the rest: {dataset.where}. To continue without them, add --allow-partial"
        )


@dataclass(frozen=True)
class _Writer:
    """Writes samples, several at a time."""

    out: str
    storage: Storage = field(repr=False)
    classes: ClassList
    ignore_labels: Sequence[int]
    copy_images: bool

    def write_all(
        self, found: list[Sample], on_progress: Callable[[int], None]
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Write every sample: rows of INDEX sorted by image_id, and a digest of each ground truth."""
        ordered = sorted(found, key=lambda sample: sample.image_id)
        twice = [a.image_id for a, b in itertools.pairwise(ordered) if a.image_id == b.image_id]
        if twice:
            raise DatasetError(f"two images are called '{twice[0]}'; names must differ without their extension")
        rows, digests = [], []
        with ThreadPoolExecutor(cpus()) as pool:
            for row, digest in pool.map(self._write_one, ordered):
                rows.append(row)
                digests.append(digest)
                on_progress(len(rows))
        return rows, digests

    def _write_one(self, sample: Sample) -> tuple[dict[str, Any], str]:
        truth = sample.truth()
        self._check(sample, truth)
        data = encode_png(truth)
        name = f"truth/{sample.image_id}.png"
        self.storage.write(join(self.out, name), data)
        height, width = truth.shape
        row = {"image_id": sample.image_id, "uri": self._image(sample), "truth": name}
        digest = hashlib.sha256(sample.image_id.encode() + truth.tobytes()).hexdigest()
        return row | {"width": width, "height": height}, digest

    def _check(self, sample: Sample, truth: Labels) -> None:
        width, height = _image_size(sample)
        if truth.shape != (height, width):
            raise DatasetError(
                f"{sample.image} is {width}x{height} pixels, but its ground truth "
                f"{truth.shape[1]}x{truth.shape[0]}"
            )
        classes = len(self.classes)
        labels = np.flatnonzero(np.bincount(truth.reshape(-1)))
        allowed = {*self.ignore_labels, ignore_value(classes)}
        unknown = [int(label) for label in labels if label > classes and int(label) not in allowed]
        if unknown:
            raise DatasetError(
                f"the ground truth of {sample.image} holds label {unknown[0]}; "
                f"the class list has {classes} classes"
            )

    def _image(self, sample: Sample) -> str:
        """The URI to read the image from; the image is cut or copied first if necessary."""
        if sample.box is not None:
            name = f"images/{sample.image_id}.png"
            self.storage.write(join(self.out, name), _cut(sample.image, sample.box))
            return name
        if not self.copy_images:
            return str(sample.image.resolve())
        name = f"images/{sample.image_id}{sample.image.suffix.lower()}"
        self.storage.write(join(self.out, name), sample.image.read_bytes())
        return name


def _image_size(sample: Sample) -> tuple[int, int]:
    """(width, height), from the file's header or the cut."""
    if sample.box is not None:
        left, top, right, bottom = sample.box
        return right - left, bottom - top
    try:
        with Image.open(sample.image) as image:
            return image.size
    except OSError as error:
        raise DatasetError(f"{sample.image} is not a readable image: {error}") from error


def _cut(path: Path, box: tuple[int, int, int, int]) -> bytes:
    buffer = io.BytesIO()
    with Image.open(path) as image:
        image.crop(box).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
