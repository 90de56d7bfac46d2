"""Add up the counts of all shards, and prove that nothing was lost or counted twice."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.errors import EvaluationError
from pipeline.metrics import Ints, empty


@dataclass(frozen=True)
class Counts:
    """All counts of an evaluation, images in the order of their ids."""

    image_ids: tuple[str, ...]
    confusion: Ints  # [K + 1, K + 2]
    totals: Ints  # [N, 3, K + 1]: pixels that agree, in the truth, in the prediction
    boundary: Ints  # [2, K + 1]: contour pixels in both, in either
    ignored_pixels: int
    failed: tuple[str, ...]  # images without a mask


def verify(table: pa.Table, index: pa.Table) -> None:
    """Prove that every image of the benchmark is in `table` (of COUNTS) once, with every one of its pixels.

    Raises EvaluationError that names an image.
    """
    counted = Counter(table.column("image_id").to_pylist())
    wanted = dict(
        zip(
            index.column("image_id").to_pylist(),
            np.multiply(index.column("width").to_numpy(), index.column("height").to_numpy().astype(np.int64)),
            strict=True,
        )
    )
    missing = [image_id for image_id in wanted if image_id not in counted]
    if missing:
        raise EvaluationError(
            f"{len(missing)} of {len(wanted)} images of the benchmark were not counted, e.g. '{missing[0]}': "
            "the run does not hold them under this id. Label the prepared list of images: "
            "cliper label --input PREPARED/index.parquet"
        )
    twice = [image_id for image_id, count in counted.items() if count > 1]
    if twice:
        raise EvaluationError(
            f"image '{twice[0]}' was counted {counted[twice[0]]} times: the run holds several files of that name"
        )
    for image_id, pixels, ignored, counts in zip(
        *(table.column(name).to_pylist() for name in ("image_id", "pixels", "ignored", "counts")), strict=True
    ):
        if pixels != wanted[image_id] or ignored + sum(counts) != pixels:
            raise EvaluationError(
                f"image '{image_id}': {ignored + sum(counts)} of {wanted[image_id]} pixels counted"
            )


def merge(table: pa.Table, classes: int) -> Counts:
    """Add up the rows of a table of COUNTS, which is sorted by image id."""
    row, cells, counts = _flat(table, "cells", "counts")
    confusion = empty(classes)
    np.add.at(confusion.reshape(-1), cells, counts)
    truth, prediction = np.divmod(cells, classes + 2)
    totals = np.zeros((len(table), 3, classes + 2), dtype=np.int64)
    flat, first = totals.reshape(-1), row * 3 * (classes + 2)  # where an image's totals begin
    agree = truth == prediction
    np.add.at(flat, (first + truth)[agree], counts[agree])
    np.add.at(flat, first + (classes + 2) + truth, counts)
    np.add.at(flat, first + 2 * (classes + 2) + prediction, counts)
    boundary = np.zeros((2, classes + 1), dtype=np.int64)
    for kind, name in enumerate(("boundary_intersection", "boundary_union")):
        _, contour_classes, pixels = _flat(table, "boundary_classes", name)
        np.add.at(boundary[kind], contour_classes, pixels)
    ids = table.column("image_id").to_pylist()
    failed = table.column("failed").to_pylist()
    return Counts(
        image_ids=tuple(ids),
        confusion=confusion,
        totals=totals[:, :, : classes + 1],
        boundary=boundary,
        ignored_pixels=int(table.column("ignored").to_numpy().sum()),
        failed=tuple(image_id for image_id, bad in zip(ids, failed, strict=True) if bad),
    )


def _flat(table: pa.Table, *names: str) -> tuple[Ints, Ints, Ints]:
    """The rows of two list columns of equal lengths, and their flat values."""
    first, second = (table.column(name).combine_chunks() for name in names)
    lengths = first.value_lengths().to_numpy(zero_copy_only=False)
    row = np.repeat(np.arange(len(table)), lengths)
    return row, first.flatten().to_numpy(), second.flatten().to_numpy()
