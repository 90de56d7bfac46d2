"""Select the masks that most need review.

`select_images` orders images by urgency, `review_tasks` exports them to Label Studio, and apply.py imports the
corrections as a new version.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from heapq import nsmallest
from typing import Any

import numpy as np
import pyarrow as pa

from cliper.pipeline.corpus.decode import upright
from cliper.pipeline.errors import ReviewError
from cliper.pipeline.evaluate.metrics import image_confusion, image_totals, ratio
from cliper.pipeline.export.formats.label_studio import image_url, task
from cliper.pipeline.parallel import Workers, crew
from cliper.pipeline.run.corrections import Corrections, read_corrections
from cliper.pipeline.run.folder import Run, class_names
from cliper.pipeline.run.masks import unpack_mask
from cliper.pipeline.run.reader import labeled_shards
from cliper.pipeline.run.rows import LABELED, RowFilter, read_tables

_LIGHT = ("image_id", "margin", "classes")
_MASK = ("mask", "mask_codec")
_TOGETHER = 8  # shards of one task


@dataclass(frozen=True)
class Candidate:
    """An image to review. All terms are 0 to 1, higher is more urgent; `score` is their mean.

    `doubt`: share of the run's images with a wider margin over their second-best class. `rarity`: of the
    rarest class in the mask, 1 - log(1 + its images) / log(1 + all images). `disagreement`: 1 - mean IoU with
    another run's mask, over the classes of either; None if there is no other run.
    """

    image_id: str
    shard: int
    doubt: float
    rarity: float
    disagreement: float | None = None

    @property
    def score(self) -> float:
        """The mean of the terms that are not None."""
        terms = [self.doubt, self.rarity, *([] if self.disagreement is None else [self.disagreement])]
        return sum(terms) / len(terms)


def select_images(
    run: Run,
    count: int,
    keep: RowFilter = LABELED,
    against: Run | None = None,
    again: bool = False,
    agreement: Mapping[str, float] | None = None,
    workers: Workers = 1,
) -> list[Candidate]:
    """The `count` images that most need review, the most urgent first; ties in the order of ids.

    Reads metadata twice, and masks only for `against`, a run over the same shards with the same classes.
    `agreement` (by image id, see evaluate/agree.py) gives the disagreement instead, 1 - agreement. Images that
    were reviewed before are skipped unless `again`. Memory: 4 bytes per image, and the picks.
    Raises FilterError, or ReviewError if the runs cannot be compared.
    """
    if against is not None and class_names(run.identity) != class_names(against.identity):
        raise ReviewError(f"{run.uri} and {against.uri} have different classes; masks of one list can be compared")
    corrections = read_corrections(run)
    reviewed = set() if again else set(corrections.rows["image_id"].to_pylist())
    shards = labeled_shards(run)
    tasks = [shards[i : i + _TOGETHER] for i in range(0, len(shards), _TOGETHER)]
    with crew(workers, most=len(tasks) // 2) as readers:
        margins, images = [np.zeros(0, np.float32)], Counter[int]()
        for found, counted in readers.map(partial(_survey, run, keep, corrections), tasks):
            margins.append(found)
            images.update(counted)
        ascending = np.sort(np.nan_to_num(np.concatenate(margins)))
        signs = readers.map(partial(_read_signs, run, keep, corrections, against, agreement or {}, images), tasks)
        picks = (_judge(sign, ascending) for part in signs for sign in part if sign.image_id not in reviewed)
        return nsmallest(count, picks, key=lambda found: (-found.score, found.image_id))


@dataclass(frozen=True)
class _Signs:
    """What decides on one image. `rarest`: images with the rarest of its classes; None without a class."""

    image_id: str
    shard: int
    margin: float
    rarest: int | None
    disagreement: float | None


def _survey(
    run: Run, keep: RowFilter, corrections: Corrections, shards: Sequence[int]
) -> tuple[np.ndarray, Counter[int]]:
    """The margins of some shards, float32 [n], and the number of images by class."""
    margins, images = [np.zeros(0, np.float32)], Counter[int]()
    for table in read_tables(run, _LIGHT, keep, shards, corrections):
        margins.append(table["margin"].to_numpy())
        for classes in table["classes"].to_pylist():
            images.update(entry["class_id"] for entry in classes if entry["class_id"])
    return np.concatenate(margins), images


def _read_signs(
    run: Run,
    keep: RowFilter,
    corrections: Corrections,
    against: Run | None,
    agreement: Mapping[str, float],
    images: Mapping[int, int],
    shards: Sequence[int],
) -> list[_Signs]:
    found = []
    for shard, row, disagreement in _candidates(run, keep, corrections, against, agreement, shards):
        rarest = min((images[entry["class_id"]] for entry in row["classes"] if entry["class_id"]), default=None)
        found.append(_Signs(row["image_id"], shard, row["margin"], rarest, disagreement))
    return found


def _candidates(
    run: Run,
    keep: RowFilter,
    corrections: Corrections,
    against: Run | None,
    agreement: Mapping[str, float],
    shards: Sequence[int],
) -> Iterator[tuple[int, dict[str, Any], float | None]]:
    """Shard, row and disagreement of every image of some shards."""
    done = set() if against is None else against.done_shards()
    columns = _LIGHT if against is None else (*_LIGHT, *_MASK)
    for shard in shards:
        for table in read_tables(run, columns, keep, [shard], corrections):
            others = _masks(against, shard, done) if against is not None else {}
            for row in table.to_pylist():
                known = agreement.get(row["image_id"])
                if known is not None:
                    yield shard, row, 1 - known
                else:
                    yield shard, row, None if against is None else _disagreement(row, others, run, against)


def _masks(run: Run, shard: int, done: set[int]) -> dict[str, dict[str, Any]]:
    if shard not in done:
        raise ReviewError(
            f"{run.uri} has no shard {shard}; finish it, or label the same corpus with the same shards"
        )
    tables = read_tables(run, ("image_id", *_MASK), LABELED, [shard])
    return {row["image_id"]: row for table in tables for row in table.to_pylist()}


def _disagreement(row: Mapping[str, Any], others: Mapping[str, Any], run: Run, against: Run) -> float:
    """1 - mean IoU over the classes of either mask."""
    image_id = row["image_id"]
    if image_id not in others:
        raise ReviewError(f"{against.uri} has no mask of '{image_id}' in the same shard as {run.uri}")
    mine, theirs = unpack_mask(row), unpack_mask(others[image_id])
    if mine.shape != theirs.shape:
        raise ReviewError(f"the masks of '{image_id}' differ in size: the runs are not of the same images")
    classes = len(class_names(run.identity))
    agree, first, second = image_totals(image_confusion(mine, theirs, classes, ()), classes)
    return float(1 - np.nanmean(ratio(agree, first + second - agree)))


def _judge(sign: _Signs, margins: np.ndarray) -> Candidate:
    wider = len(margins) - np.searchsorted(margins, np.float32(np.nan_to_num(sign.margin)), side="right")
    rarity = 0.0 if sign.rarest is None else 1 - math.log1p(sign.rarest) / math.log1p(len(margins))
    return Candidate(sign.image_id, sign.shard, float(wider) / len(margins), rarity, sign.disagreement)


def review_tasks(run: Run, picks: Sequence[Candidate]) -> list[dict[str, Any]]:
    """Label Studio tasks of the picks, in their order, with the current masks as predictions."""
    names, corrections, rows = class_names(run.identity), read_corrections(run), {}
    for shard in sorted({found.shard for found in picks}):
        wanted = {found.image_id for found in picks if found.shard == shard}
        columns = ("image_id", "uri", "orientation", "confidence", "run_fingerprint", *_MASK)
        for table in read_tables(run, columns, LABELED, [shard], corrections):
            rows.update({row["image_id"]: row for row in choose(table, wanted)})
    return [_task(rows[found.image_id], found, names) for found in picks]


def choose(table: pa.Table, image_ids: set[str]) -> list[dict[str, Any]]:
    """The rows of these images, as dictionaries."""
    places = [i for i, image_id in enumerate(table["image_id"].to_pylist()) if image_id in image_ids]
    chosen: list[dict[str, Any]] = table.take(pa.array(places, pa.int64())).to_pylist()
    return chosen


def _task(row: Mapping[str, Any], found: Candidate, names: Sequence[str]) -> dict[str, Any]:
    labels = np.ascontiguousarray(upright(unpack_mask(row), row["orientation"]))
    made = task(row, labels, names, image_url(row["uri"]))
    terms = {"doubt": found.doubt, "rarity": found.rarity, "disagreement": found.disagreement}
    review = {
        name: round(value, 4) for name, value in ({"score": found.score} | terms).items() if value is not None
    }
    made["data"] |= {"run_fingerprint": row["run_fingerprint"], "review": review}
    return made
