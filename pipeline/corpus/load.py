"""The first stage: the encoded bytes of one shard. An object that cannot be read is a row with its reason."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cliper.pipeline.corpus.sources import Entry
from cliper.pipeline.storage.backend import Storage, explain

# Large binary: a shard's bytes may exceed the 2 GiB that 32-bit offsets address.
SCHEMA = pa.schema(
    [
        pa.field("shard", pa.int32()),
        pa.field("image_id", pa.string()),
        pa.field("uri", pa.string()),
        pa.field("data", pa.large_binary()),
        pa.field("error_type", pa.string()),
        pa.field("error_message", pa.string()),
    ]
)


def load_entries(storage: Storage, shard: int, entries: Sequence[Entry], image_column: str) -> pa.Table:
    """Fetch every entry's bytes: a table of SCHEMA in the order of `entries`, `data` null where it failed."""
    fetched: dict[str, bytes | Exception] = {}
    whole = [entry for entry in entries if entry.row is None]
    ranges = [None if e.offset is None else (e.offset, e.offset + (e.bytes or 0)) for e in whole]
    for entry, data in zip(whole, storage.read_many([e.uri for e in whole], ranges), strict=True):
        fetched[entry.image_id] = data
    fetched.update(_load_rows(storage, [e for e in entries if e.row is not None], image_column))
    rows = [
        {"shard": shard, "image_id": e.image_id, "uri": e.uri} | _outcome(fetched[e.image_id]) for e in entries
    ]
    return pa.Table.from_pylist(rows, SCHEMA)


def _outcome(data: bytes | Exception) -> dict[str, Any]:
    if isinstance(data, bytes):
        return {"data": data}
    kind = "missing" if isinstance(data, FileNotFoundError) else "unreadable"
    return {"error_type": kind, "error_message": explain(data)}


def _load_rows(storage: Storage, entries: Sequence[Entry], column: str) -> dict[str, bytes | Exception]:
    """Images stored in Parquet: each row group that is needed is read once, for this column only."""
    by_file = defaultdict(list)
    for entry in entries:
        by_file[entry.uri].append(entry)
    fetched: dict[str, bytes | Exception] = {}
    for uri, members in by_file.items():
        try:
            with storage.open(uri) as handle:
                fetched.update(_rows_of(pq.ParquetFile(handle), members, column))
        except Exception as error:  # a damaged or vanished file costs its own images only
            fetched.update({entry.image_id: error for entry in members})
    return fetched


def _rows_of(file: pq.ParquetFile, entries: Sequence[Entry], column: str) -> dict[str, bytes | Exception]:
    wanted = {entry.row: entry.image_id for entry in entries}
    found: dict[str, bytes | Exception] = {}
    first = 0
    for group in range(file.metadata.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        inside = [row for row in wanted if row is not None and first <= row < first + count]
        if inside:
            values = file.read_row_group(group, columns=[column]).column(0)
            for row in inside:
                value = values[row - first].as_py()
                found[wanted[row]] = (value["bytes"] if isinstance(value, dict) else value) or b""
        first += count
    missing = FileNotFoundError("the row is no longer in the Parquet file")
    return {entry.image_id: found.get(entry.image_id, missing) for entry in entries}
