"""Cut a corpus into shards: in order, each as full as its limits allow.

A row group of a Parquet file is not split, so that it is read once, unless it exceeds the limits many times.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cliper.pipeline.config import ShardConfig
from cliper.pipeline.corpus.sources.tables import ENTRIES

LARGE_GROUP = 32  # times the images of a shard: a row group of more is split, and then read more than once
LARGE_BYTES = 4  # the same, times its bytes


def cut_shards(tables: Iterable[pa.Table], limits: ShardConfig) -> Iterator[tuple[pa.Table, list[int]]]:
    """Yield whole shards, several in one table, and the number of rows of each.

    A shard closes at `limits.images` or before it exceeds `limits.megabytes`. The result does not depend on how
    the rows are spread over `tables`, which are of ENTRIES.
    """
    rest = ENTRIES.empty_table()
    for table in tables:
        rest = pa.concat_tables([rest, table]).combine_chunks()
        ends, open_from = _ends(rest, limits)
        sure = [end for end in ends if end < open_from]
        if sure:
            yield rest.slice(0, sure[-1]), np.diff([0, *sure]).tolist()
            rest = rest.slice(sure[-1])
    if len(rest):
        yield rest, np.diff([0, *_ends(rest, limits)[0]]).tolist()


def _ends(table: pa.Table, limits: ShardConfig) -> tuple[list[int], int]:
    """The rows at which shards end, and the row from which on a row group may continue behind the table."""
    if not len(table):
        return [], 0
    sizes = pc.fill_null(table.column("bytes"), 0).to_numpy()
    together = _together(table)
    starts, open_from = _units(together, sizes, limits)
    total = np.append(0, np.cumsum(sizes))
    ends = np.append(starts[1:], len(table))
    filled, unit = total[ends], 0
    found: list[int] = []
    while unit < len(starts):
        first = starts[unit]
        by_count = np.searchsorted(ends, first + limits.images, side="right")
        by_size = np.searchsorted(filled, total[first] + limits.megabytes * 2**20, side="right")
        unit = max(unit + 1, min(int(by_count), int(by_size)))
        found.append(int(ends[unit - 1]))
    return found, open_from


def _together(table: pa.Table) -> np.ndarray:
    """Whether each row is of the same row group as the one before it, bool [rows]."""
    group = pc.fill_null(table.column("group"), -1).to_numpy()
    same = np.zeros(len(table), bool)
    if (group >= 0).any():
        uri = table.column("uri").combine_chunks()
        same_file = pc.equal(uri.slice(1), uri.slice(0, len(uri) - 1)).to_numpy(zero_copy_only=False)
        same[1:] = (group[1:] >= 0) & (group[1:] == group[:-1]) & same_file
    return same


def _units(together: np.ndarray, sizes: np.ndarray, limits: ShardConfig) -> tuple[np.ndarray, int]:
    """The first rows of the units that are not split, row groups or single rows; and that of the last group."""
    starts = np.flatnonzero(~together)
    counts = np.diff(starts, append=len(sizes))
    large = counts > LARGE_GROUP * limits.images
    large |= np.add.reduceat(sizes, starts) > LARGE_BYTES * limits.megabytes * 2**20
    return np.flatnonzero(~together | np.repeat(large, counts)), int(starts[-1])
