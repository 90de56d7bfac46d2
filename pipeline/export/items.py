"""The rows of one shard as Items, with their images where those are copied."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from cliper.pipeline.corpus.load import load_entries
from cliper.pipeline.corpus.sources import Entry
from cliper.pipeline.errors import ImageError
from cliper.pipeline.export.base import Exporter, Item, Plan
from cliper.pipeline.export.images import in_mask_grid, size_of
from cliper.pipeline.export.names import file_name
from cliper.pipeline.run.corrections import Corrections
from cliper.pipeline.run.folder import Run
from cliper.pipeline.run.rows import ALL_ROWS, read_tables

BATCH = 32  # rows held as Python objects, with their images, at a time


@dataclass(frozen=True)
class LeftOut:
    """An image that passes the filter but is not exported, and why."""

    image_id: str
    reason: str


def read_items(
    run: Run, shard: int, plan: Plan, exporter: Exporter, corrections: Corrections
) -> Iterator[Item | LeftOut]:
    """The images of a shard that pass the plan's filter, in order; holds one shard of rows.

    Raises RunError if images are wanted and the run has no manifest to find them by.
    """
    yield from _failed(run, shard, plan, corrections)
    entries = _entries(run, shard) if plan.images else {}
    for table in read_tables(run, keep=plan.keep, shards=[shard], corrections=corrections):
        for batch in table.to_batches(max_chunksize=BATCH):
            yield from _items(run, shard, batch, plan, exporter, entries)


def _failed(run: Run, shard: int, plan: Plan, corrections: Corrections) -> Iterator[LeftOut]:
    """Failed images that the filter's status leaves out: they are listed, not lost."""
    if not plan.keep.statuses:
        return
    columns = ["image_id", "status", "error_type"]
    for table in read_tables(run, columns, ALL_ROWS, [shard], corrections):
        for row in table.to_pylist():
            if row["status"] != "ok" and row["status"] not in plan.keep.statuses:
                yield LeftOut(row["image_id"], f"{row['status']}: {row['error_type']}")


def _entries(run: Run, shard: int) -> dict[str, Entry]:
    return {entry.image_id: entry for entry in run.manifest().read_shard(run.storage, run.uri, shard)}


def _items(
    run: Run, shard: int, batch: pa.RecordBatch, plan: Plan, exporter: Exporter, entries: Mapping[str, Entry]
) -> Iterator[Item | LeftOut]:
    rows = batch.to_pylist()
    images: list[Mapping[str, Any]] = [{}] * len(rows)
    if plan.images:
        chosen = [entries[row["image_id"]] for row in rows]
        column = run.identity["input"]["image_column"]
        images = load_entries(run.storage, shard, chosen, column).to_pylist()
    for row, image in zip(rows, images, strict=True):
        yield _item(row, image, plan, exporter, run.identity["max_pixels"])


def _item(
    row: Mapping[str, Any], image: Mapping[str, Any], plan: Plan, exporter: Exporter, max_pixels: int
) -> Item | LeftOut:
    has_mask = row["mask"] is not None and row["mask"]["bytes"] is not None
    if not has_mask and not exporter.keeps_failed:
        return LeftOut(row["image_id"], "no mask")
    name = file_name(row["image_id"], plan.clashing)
    if not plan.images or not has_mask:
        return Item(row, name, as_seen=exporter.as_seen, edit=plan.edit)
    try:
        data, ending = _picture(row, image, exporter, max_pixels)
    except ImageError as error:
        return LeftOut(row["image_id"], f"image {error.kind}")
    return Item(row, name, data, ending, edit=plan.edit)


def _picture(
    row: Mapping[str, Any], image: Mapping[str, Any], exporter: Exporter, max_pixels: int
) -> tuple[bytes, str]:
    """The image file in the mask's grid. Raises ImageError, also if it is no longer the image that was labeled."""
    if image["data"] is None:
        raise ImageError(image["error_type"], image["error_message"])
    data, ending = in_mask_grid(image["data"], exporter.image_formats, max_pixels)
    if row["width"] is not None and size_of(data) != (row["width"], row["height"]):
        raise ImageError("changed", f"it is {size_of(data)} pixels now")
    return data, ending
