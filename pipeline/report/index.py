"""The metadata of many rows of a run as arrays: small enough to search, sort and join in memory."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cliper.pipeline.report.run_stats import Floats, Integers
from cliper.pipeline.run.folder import Run
from cliper.pipeline.run.rows import read_tables

_COLUMNS = ("image_id", "status", "confidence", "margin", "classes")
_READERS = 4


@dataclass(frozen=True)
class RowIndex:
    """Rows in the order of shards, and one entry for every label in a mask; n rows, m entries."""

    ids: pa.Array  # string [n]
    status: pa.Array  # string [n]
    confidence: Floats  # [n], nan for a failed image, as `margin`
    margin: Floats  # [n]
    shard: Integers  # [n]
    place: Integers  # [n], row in the shard
    row: Integers  # [m], ascending
    label: Integers  # [m]
    share: Floats  # [m], of the image's pixels
    sure: Floats  # [m], mean confidence of the label in the image

    @property
    def ok(self) -> npt.NDArray[np.bool_]:
        """Whether each image has a mask, bool [n]."""
        return np.asarray(pc.equal(self.status, "ok").to_numpy(zero_copy_only=False))


def read_index(run: Run, shards: Sequence[int]) -> RowIndex:
    """Read the metadata of these finished shards. Raises RunError for a damaged file."""
    with ThreadPoolExecutor(_READERS) as pool:
        tables = list(pool.map(lambda shard: list(read_tables(run, _COLUMNS, shards=[shard])), shards))
    found = [(shard, table) for shard, part in zip(shards, tables, strict=True) for table in part]
    table = pa.concat_tables([table for _, table in found])
    column = {name: table[name].combine_chunks() for name in _COLUMNS}
    sizes = [len(part) for _, part in found]
    return RowIndex(
        ids=column["image_id"],
        status=column["status"],
        confidence=_floats(column["confidence"]),
        margin=_floats(column["margin"]),
        shard=np.repeat(np.array([shard for shard, _ in found], dtype=np.int64), sizes),
        place=np.concatenate([np.arange(size, dtype=np.int64) for size in sizes]),
        **_entries(column["classes"]),
    )


def _floats(column: pa.Array) -> Floats:
    return np.asarray(column.to_numpy(zero_copy_only=False), dtype=np.float64)


def _entries(column: pa.ListArray) -> dict[str, Any]:
    entries, row = pc.list_flatten(column), pc.list_parent_indices(column).to_numpy().astype(np.int64)
    label = pc.struct_field(entries, "class_id").to_numpy(zero_copy_only=False).astype(np.int64)
    pixels = _floats(pc.struct_field(entries, "pixels"))
    whole = np.bincount(row, weights=pixels, minlength=len(column))
    return {
        "row": row,
        "label": label,
        "share": pixels / np.maximum(whole, 1)[row],
        "sure": np.nan_to_num(_floats(pc.struct_field(entries, "mean_confidence"))),
    }
