"""Count masks against the ground truth: a row of sparse counts per image, a file per shard, and their sum."""

import posixpath
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from cliper.pipeline.errors import EvaluationError, RunError
from cliper.pipeline.evaluate.boundary import boundary_counts
from cliper.pipeline.evaluate.metrics import Ints, Labels, empty, evaluated, image_confusion
from cliper.pipeline.run.folder import Run
from cliper.pipeline.run.masks import decode_png, unpack_mask
from cliper.pipeline.run.reader import open_shard
from cliper.pipeline.run.shards import shard_name
from cliper.pipeline.storage.backend import Storage
from cliper.pipeline.storage.sealed import sealed_table
from cliper.pipeline.storage.uris import join

Row = dict[str, Any]


def _field(name: str, kind: pa.DataType, meaning: str) -> pa.Field:
    return pa.field(name, kind, nullable=False, metadata={"meaning": meaning})


COUNTS = pa.schema(
    [
        _field("image_id", pa.string(), "as in the prepared benchmark"),
        _field("cells", pa.list_(pa.int64()), "non-zero cells of [K + 1, K + 2]: truth * (K + 2) + prediction"),
        _field("counts", pa.list_(pa.int64()), "pixels in each of them"),
        _field("pixels", pa.int64(), "of the image"),
        _field("ignored", pa.int64(), "pixels whose truth is not counted"),
        _field("boundary_classes", pa.list_(pa.int64()), "classes with contour pixels"),
        _field("boundary_intersection", pa.list_(pa.int64()), "contour pixels in truth and prediction"),
        _field("boundary_union", pa.list_(pa.int64()), "contour pixels in truth or prediction"),
        _field("failed", pa.bool_(), "there is no mask: every pixel is counted as predicted outside the list"),
    ]
)


def counts_file(shard: int) -> str:
    """The counts of a shard, relative to the evaluation folder."""
    return f"counts/{shard_name(shard)}"


def write_counts(
    block: pa.Table, count_shard: Callable[[int], pa.Table], storage: Storage, folder: str, rows_per_image: int = 1
) -> pa.Table:
    """Count the shards named in column `shard` into `folder`; adds `counted` (images) and `problem` (or null).

    Errors are returned, not raised: an exception in a Ray task would be retried and wrapped.
    """

    def attempt(shard: int) -> tuple[int, str | None]:
        try:
            table = count_shard(shard)
        except (EvaluationError, RunError) as error:
            return 0, str(error)
        storage.write(join(folder, counts_file(shard)), sealed_table(table, compression="zstd"))
        return len(table) // rows_per_image, None

    outcomes = [attempt(shard) for shard in block.column("shard").to_pylist()]
    counted, problems = pa.array([c for c, _ in outcomes]), pa.array([p for _, p in outcomes], pa.string())
    return block.append_column("counted", counted).append_column("problem", problems)


@dataclass(frozen=True)
class ShardCounter:
    """A stage of the flow that counts committed shards. It neither holds nor imports a model."""

    run: Run
    folder: str  # of the evaluation
    truth_uri: str  # of the prepared benchmark
    storage: Storage = field(repr=False)
    truths: Mapping[str, str]  # image_id to ground-truth file, relative to `truth_uri`
    classes: int
    ignore_labels: Sequence[int]
    count_failed: bool

    def stage(self, block: pa.Table) -> pa.Table:
        """Count the shards named in column `shard`; adds `counted` (images) and `problem` (null if none).

        See write_counts.
        """
        return write_counts(block, self.count_shard, self.storage, self.folder)

    def count_shard(self, shard: int) -> pa.Table:
        """Read a shard's masks and their ground truth: a table of COUNTS, one row per image of the benchmark.

        Images of the run that are not in the benchmark are skipped.
        """
        with open_shard(self.run, shard) as file:
            rows = file.read(["image_id", "mask", "mask_codec", "status", "error_message"]).to_pylist()
        known = [(name, row) for row in rows if (name := self.benchmark_id(row["image_id"])) is not None]
        uris = [join(self.truth_uri, self.truths[name]) for name, _ in known]
        truths = self.storage.read_many(uris, [None] * len(uris))
        counted = [self._count(name, row, data) for (name, row), data in zip(known, truths, strict=True)]
        return pa.Table.from_pylist(counted, COUNTS)

    def benchmark_id(self, image_id: str) -> str | None:
        """The benchmark's id for an image of the run: its id, or its file name without folder and extension."""
        stem = posixpath.splitext(posixpath.basename(image_id))[0]
        return next((name for name in (image_id, stem) if name in self.truths), None)

    def _count(self, name: str, row: Row, data: bytes | Exception) -> Row:
        if isinstance(data, Exception):
            raise EvaluationError(
                f"image '{name}': its ground truth cannot be read ({type(data).__name__}: {data})"
            )
        truth = decode_png(data)
        prediction = self._prediction(name, row, truth)
        try:
            return {"image_id": name, "failed": row["status"] != "ok"} | self.count_image(truth, prediction)
        except EvaluationError as error:
            raise EvaluationError(f"image '{name}': {error}") from error

    def _prediction(self, name: str, row: Row, truth: Labels) -> Labels:
        if row["status"] == "ok":
            return unpack_mask(row)
        if not self.count_failed:
            raise EvaluationError(
                f"image '{name}' was not labeled ({row['error_message']}); repair it and label again, or add "
                "--count-failed to count its pixels as wrong"
            )
        return np.full(truth.shape, min(self.classes + 1, 65_535), dtype=np.uint16)

    def count_image(self, truth: Labels, prediction: Labels) -> Row:
        """Count one image; both maps are uint8 or uint16 [H, W]."""
        confusion = image_confusion(truth, prediction, self.classes, self.ignore_labels)
        contour = boundary_counts(truth, prediction, evaluated(truth, self.ignore_labels), self.classes)
        return {
            "cells": confusion.cells,
            "counts": confusion.counts,
            "pixels": truth.size,
            "ignored": truth.size - int(confusion.counts.sum()),
            "boundary_classes": contour.classes,
            "boundary_intersection": contour.intersection,
            "boundary_union": contour.union,
        }


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
    """Verify that `table` (of COUNTS) has every image of the benchmark exactly once, with all of its pixels.

    Raises EvaluationError, which names the first offending image.
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
    """Sum the rows of a table of COUNTS, which is sorted by image id."""
    row, cells, counts = _flat(table, "cells", "counts")
    confusion = empty(classes)
    np.add.at(confusion.reshape(-1), cells, counts)
    truth, prediction = np.divmod(cells, classes + 2)
    totals = np.zeros((len(table), 3, classes + 2), dtype=np.int64)
    flat, first = totals.reshape(-1), row * 3 * (classes + 2)  # the start of an image's totals
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
