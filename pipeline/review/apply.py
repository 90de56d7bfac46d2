"""Apply corrections from Label Studio: a new version of the masks next to the originals."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from cliper.pipeline.corpus.decode import to_file_grid, upright
from cliper.pipeline.errors import ReviewError
from cliper.pipeline.export.brush import decode_brush
from cliper.pipeline.review.select import choose
from cliper.pipeline.run.corrections import Corrections, corrected_row, read_corrections, write_corrections
from cliper.pipeline.run.folder import Run, class_names
from cliper.pipeline.run.masks import unpack_mask
from cliper.pipeline.run.reader import labeled_shards
from cliper.pipeline.run.rows import read_tables

_LIGHT = ("image_id", "margin", "classes")
_MASK = ("mask", "mask_codec")


@dataclass(frozen=True)
class Review:
    """The result of `apply_review`. `stored` is False if the same corrections already exist, as `version`."""

    version: int | None  # None: the file holds no annotation
    stored: bool
    changed: int
    confirmed: int  # reviewed without a change
    skipped: int  # tasks without an annotation


def apply_review(run: Run, export: bytes, source: str) -> Review:
    """Import Label Studio's JSON export as a new version of corrections; the run's own rows are not changed.

    Of several annotations of an image, the one updated last is used; if brushes overlap, the later one is used; a
    pixel without a brush is background. The whole export is checked before anything is written. Raises
    ReviewError.
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
    """(image id, annotation) pairs; of one image, the annotation updated last comes last."""
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
    """Rows of corrections.SCHEMA, in shard order."""
    current, rows, missing = read_corrections(run), [], set(annotations)
    for shard in labeled_shards(run):
        for ids in read_tables(run, ["image_id"], shards=[shard]):
            here = missing & set(ids["image_id"].to_pylist())
            missing -= here
            for row in _full_rows(run, shard, here, current):
                rows.append({"shard": shard} | _correct(run, row, annotations[row["image_id"]], source))
    if missing:
        raise ReviewError(f"{source}: {run.uri} has no image '{min(missing)}'; the file belongs to another run")
    return rows


def _full_rows(run: Run, shard: int, image_ids: set[str], current: Corrections) -> list[dict[str, Any]]:
    if not image_ids:
        return []
    tables = read_tables(run, shards=[shard], corrections=current)
    return [row for table in tables for row in choose(table, image_ids)]


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
            continue  # choices, ratings and similar results have no pixels
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
    return when if when.tzinfo else when.replace(tzinfo=UTC)


def _who(annotation: Mapping[str, Any]) -> str | None:
    who = annotation.get("completed_by")
    if isinstance(who, dict):
        who = who.get("email") or who.get("id")
    return None if who is None else str(who)
