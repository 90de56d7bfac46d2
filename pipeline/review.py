"""People look at the masks that need it most, and what they correct comes back into the run.

`pick` orders images by how much a look is worth, `review_tasks` hands them to Label Studio, `apply_review` takes
its export back as a new version of corrections (corrections.py).
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from heapq import nsmallest
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.corrections import Corrections, corrected_row, read_corrections, write_corrections
from pipeline.decode import to_file_grid, upright
from pipeline.errors import ReviewError
from pipeline.export.brush import decode_brush
from pipeline.export.label_studio import image_url, task
from pipeline.masks import unpack_mask
from pipeline.metrics import image_confusion, image_totals, ratio
from pipeline.rows import LABELED, RowFilter, read_tables
from pipeline.run import Run, class_names

_LIGHT = ("image_id", "margin", "classes")
_MASK = ("mask", "mask_codec")


@dataclass(frozen=True)
class Pick:
    """An image worth a look. All terms are 0 to 1, more is more urgent; `score` is their mean.

    `doubt`: share of the run's images that lead their second-best class by a wider margin. `rarity`: of the
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
        """Mean of the terms there are."""
        terms = [self.doubt, self.rarity, *([] if self.disagreement is None else [self.disagreement])]
        return sum(terms) / len(terms)


def pick(
    run: Run,
    count: int,
    keep: RowFilter = LABELED,
    against: Run | None = None,
    again: bool = False,
) -> list[Pick]:
    """The `count` images most worth a look, the most urgent first; ties in the order of ids.

    Reads metadata twice, and masks only for `against`, a run over the same shards with the same classes. Images
    that were reviewed before are left out unless `again`. Memory: 4 bytes per image, and the picks.
    Raises FilterError, or ReviewError if the runs cannot be compared.
    """
    if against is not None and class_names(run.identity) != class_names(against.identity):
        raise ReviewError(f"{run.uri} and {against.uri} have different classes; masks of one list can be compared")
    corrections = read_corrections(run)
    reviewed = set() if again else set(corrections.rows["image_id"].to_pylist())
    margins, images = _survey(run, keep, corrections)
    picks = (
        _judge(row, shard, margins, images, disagreement)
        for shard, row, disagreement in _candidates(run, keep, corrections, against)
        if row["image_id"] not in reviewed
    )
    return nsmallest(count, picks, key=lambda found: (-found.score, found.image_id))


def _survey(run: Run, keep: RowFilter, corrections: Corrections) -> tuple[np.ndarray, Counter[int]]:
    """All margins ascending, float32 [n], and the number of images by class."""
    margins, images = [np.zeros(0, np.float32)], Counter[int]()
    for table in read_tables(run, _LIGHT, keep, corrections=corrections):
        margins.append(table["margin"].to_numpy())
        for classes in table["classes"].to_pylist():
            images.update(entry["class_id"] for entry in classes if entry["class_id"])
    return np.sort(np.nan_to_num(np.concatenate(margins))), images


def _candidates(
    run: Run, keep: RowFilter, corrections: Corrections, against: Run | None
) -> Iterator[tuple[int, dict[str, Any], float | None]]:
    columns = _LIGHT if against is None else (*_LIGHT, *_MASK)
    for shard in sorted(run.done_shards()):
        for table in read_tables(run, columns, keep, [shard], corrections):
            others = _masks(against, shard) if against is not None else {}
            for row in table.to_pylist():
                yield shard, row, None if against is None else _disagreement(row, others, run, against)


def _masks(run: Run, shard: int) -> dict[str, dict[str, Any]]:
    if shard not in run.done_shards():
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


def _judge(
    row: Mapping[str, Any], shard: int, margins: np.ndarray, images: Counter[int], disagreement: float | None
) -> Pick:
    wider = len(margins) - np.searchsorted(margins, np.float32(np.nan_to_num(row["margin"])), side="right")
    rarest = min((images[entry["class_id"]] for entry in row["classes"] if entry["class_id"]), default=None)
    rarity = 0.0 if rarest is None else 1 - math.log1p(rarest) / math.log1p(len(margins))
    return Pick(row["image_id"], shard, float(wider) / len(margins), rarity, disagreement)


def review_tasks(run: Run, picks: Sequence[Pick]) -> list[dict[str, Any]]:
    """Label Studio tasks of the picks, in their order, with the masks as they stand as predictions."""
    names, corrections, rows = class_names(run.identity), read_corrections(run), {}
    for shard in sorted({found.shard for found in picks}):
        wanted = {found.image_id for found in picks if found.shard == shard}
        columns = ("image_id", "uri", "orientation", "confidence", "run_fingerprint", *_MASK)
        for table in read_tables(run, columns, LABELED, [shard], corrections):
            rows.update({row["image_id"]: row for row in _choose(table, wanted)})
    return [_task(rows[found.image_id], found, names) for found in picks]


def _choose(table: pa.Table, image_ids: set[str]) -> list[dict[str, Any]]:
    places = [i for i, image_id in enumerate(table["image_id"].to_pylist()) if image_id in image_ids]
    chosen: list[dict[str, Any]] = table.take(pa.array(places, pa.int64())).to_pylist()
    return chosen


def _task(row: Mapping[str, Any], found: Pick, names: Sequence[str]) -> dict[str, Any]:
    labels = np.ascontiguousarray(upright(unpack_mask(row), row["orientation"]))
    made = task(row, labels, names, image_url(row["uri"]))
    terms = {"doubt": found.doubt, "rarity": found.rarity, "disagreement": found.disagreement}
    review = {
        name: round(value, 4) for name, value in ({"score": found.score} | terms).items() if value is not None
    }
    made["data"] |= {"run_fingerprint": row["run_fingerprint"], "review": review}
    return made


@dataclass(frozen=True)
class Review:
    """What `apply_review` did. `stored` is False if the same corrections were there already, as `version`."""

    version: int | None  # None: the file holds no annotation
    stored: bool
    changed: int
    confirmed: int  # looked at, and the mask is right as it is
    skipped: int  # tasks without an annotation


def apply_review(run: Run, export: bytes, source: str) -> Review:
    """Take Label Studio's JSON export back as a new version of corrections; the run's own rows stay as they are.

    Of several annotations of an image the one updated last counts; where brushes overlap, the later one; a pixel
    without a brush is background. Everything is checked before anything is written. Raises ReviewError.
    """
    tasks = _parse(export, source)
    annotations = dict(_annotations(tasks, run, source))
    rows = _corrected(run, annotations, source)
    changed = sum(row["changed"] for row in rows)
    version, stored = write_corrections(run, rows) if rows else (None, False)
    skipped = len({_image_id(entry, source) for entry in tasks} - set(annotations))
    return Review(version, stored, changed, len(rows) - changed, skipped)


def _parse(export: bytes, source: str) -> list[dict[str, Any]]:
    try:
        tasks = json.loads(export)
    except ValueError as error:
        raise ReviewError(
            f"{source} is not JSON: {error}; export the project from Label Studio as JSON"
        ) from error
    if not isinstance(tasks, list) or not all(isinstance(entry, dict) for entry in tasks):
        raise ReviewError(f"{source} is not a list of tasks; export the project from Label Studio as JSON")
    return tasks


def _image_id(entry: Mapping[str, Any], source: str) -> str:
    data = entry.get("data")
    if not isinstance(data, dict) or not isinstance(data.get("image_id"), str):
        raise ReviewError(f"{source}: a task has no data.image_id; only tasks that cliper wrote can be applied")
    image_id: str = data["image_id"]
    return image_id


def _annotations(
    tasks: Iterable[Mapping[str, Any]], run: Run, source: str
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(image id, annotation), the last of an image last."""
    found = []
    for entry in tasks:
        image_id = _image_id(entry, source)
        fingerprint = entry["data"].get("run_fingerprint", run.fingerprint)
        if fingerprint != run.fingerprint:
            raise ReviewError(f"{source}: '{image_id}' is of run {fingerprint}; {run.uri} is {run.fingerprint}")
        for annotation in entry.get("annotations") or []:
            if not annotation.get("was_cancelled"):
                found.append((_when(annotation, source), image_id, annotation))
    for _, image_id, annotation in sorted(found, key=lambda item: item[:2]):
        yield image_id, annotation


def _corrected(run: Run, annotations: Mapping[str, Mapping[str, Any]], source: str) -> list[dict[str, Any]]:
    """Rows of corrections.SCHEMA, in the order of shards."""
    current, rows, missing = read_corrections(run), [], set(annotations)
    for shard in sorted(run.done_shards()):
        for ids in read_tables(run, ["image_id"], shards=[shard]):
            here = missing & set(ids["image_id"].to_pylist())
            missing -= here
            for row in _full_rows(run, shard, here, current):
                rows.append({"shard": shard} | _correct(run, row, annotations[row["image_id"]], source))
    if missing:
        raise ReviewError(f"{source}: {run.uri} has no image '{min(missing)}'; the file is of another run")
    return rows


def _full_rows(run: Run, shard: int, image_ids: set[str], current: Corrections) -> list[dict[str, Any]]:
    if not image_ids:
        return []
    tables = read_tables(run, shards=[shard], corrections=current)
    return [row for table in tables for row in _choose(table, image_ids)]


def _correct(run: Run, row: dict[str, Any], annotation: Mapping[str, Any], source: str) -> dict[str, Any]:
    if row["status"] != "ok":
        raise ReviewError(f"{source}: '{row['image_id']}' was not labeled ({row['error_message']})")
    before = unpack_mask(row)
    size = upright(before, row["orientation"]).shape
    try:
        seen = _paint(annotation.get("result") or [], size, class_names(run.identity))
    except ReviewError as error:
        raise ReviewError(f"{source}: '{row['image_id']}': {error}") from error
    after = np.ascontiguousarray(to_file_grid(seen, row["orientation"]))
    return corrected_row(run, row, after) | {
        "corrected_by": _who(annotation),
        "corrected_at": _when(annotation, source),
        "source": source,
        "changed": not np.array_equal(before, after),
    }


def _paint(results: Sequence[Mapping[str, Any]], size: tuple[int, int], names: Sequence[str]) -> np.ndarray:
    """The label map, uint16 [h, w] in the grid the editor shows, of an annotation's brushes."""
    labels = np.zeros(size, np.uint16)
    numbers = {name: label for label, name in enumerate(names, 1)}
    for result in results:
        if not str(result.get("type")).endswith("labels"):
            continue  # choices, ratings and the like say nothing about pixels
        if result["type"] != "brushlabels" or "rle" not in result.get("value", {}):
            raise ReviewError(f"it holds a region of type '{result['type']}'; only brushes (brushlabels) are read")
        value, found = result["value"], (result.get("original_height"), result.get("original_width"))
        if found != size or result.get("image_rotation"):
            raise ReviewError(
                f"a brush is {found[1]} x {found[0]} pixels, its image {size[1]} x {size[0]}, unrotated"
            )
        chosen = value.get("brushlabels") or []
        if len(chosen) != 1 or chosen[0] not in numbers:
            raise ReviewError(f"the run has no class '{', '.join(chosen)}'; it has: {', '.join(names)}")
        try:
            labels[decode_brush(value["rle"], *size)] = numbers[chosen[0]]
        except (ValueError, TypeError) as error:
            raise ReviewError(f"a brush cannot be read: {error}") from error
    return labels


def _when(annotation: Mapping[str, Any], source: str) -> datetime:
    text = str(annotation.get("updated_at") or annotation.get("created_at"))
    try:
        when = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError as error:
        raise ReviewError(f"{source}: an annotation has no time (updated_at is '{text}')") from error
    return when if when.tzinfo else when.replace(tzinfo=timezone.utc)


def _who(annotation: Mapping[str, Any]) -> str | None:
    who = annotation.get("completed_by")
    if isinstance(who, dict):
        who = who.get("email") or who.get("id")
    return None if who is None else str(who)
