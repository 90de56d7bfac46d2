"""Shards of entries, by the product's code and by a plain loop."""

from collections.abc import Iterator, Sequence
from itertools import groupby

from cliper.pipeline.config import ShardConfig
from cliper.pipeline.corpus.cut import LARGE_BYTES, LARGE_GROUP, cut_shards
from cliper.pipeline.corpus.sources import Entry
from cliper.pipeline.corpus.sources.tables import entries_of, table_of


def shards_of(entries: Sequence[Entry], limits: ShardConfig, rows: int = 7) -> list[list[Entry]]:
    """Cut entries that arrive in tables of `rows`."""
    found = []
    for table, counts in cut_shards(
        (table_of(entries[i : i + rows]) for i in range(0, len(entries), rows)), limits
    ):
        left = entries_of(table)
        for count in counts:
            found.append(left[:count])
            left = left[count:]
        assert not left
    return found


def plain_shards(entries: Sequence[Entry], limits: ShardConfig) -> list[list[Entry]]:
    """The same, one unit after the other."""
    shards: list[list[Entry]] = [[]]
    for unit in _units(entries, limits):
        images, size = len(shards[-1]) + len(unit), _size(shards[-1]) + _size(unit)
        if shards[-1] and (images > limits.images or size > limits.megabytes * 2**20):
            shards.append([])
        shards[-1] += unit
    return [shard for shard in shards if shard]


def _units(entries: Sequence[Entry], limits: ShardConfig) -> Iterator[list[Entry]]:
    for (_, group), members in groupby(entries, lambda entry: (entry.uri, entry.group)):
        unit = list(members)
        small = len(unit) <= LARGE_GROUP * limits.images and _size(unit) <= LARGE_BYTES * limits.megabytes * 2**20
        yield from [unit] if group is not None and small else ([entry] for entry in unit)


def _size(entries: Sequence[Entry]) -> int:
    return sum(entry.bytes or 0 for entry in entries)
