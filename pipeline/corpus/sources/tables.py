"""Entries as Arrow tables, one row each: how listings travel between processes and into the manifest."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import pyarrow as pa

from cliper.pipeline.corpus.sources.entry import Entry

ROWS = 10_000  # of a table that is made from single entries

ENTRIES = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("bytes", pa.int64()),  # encoded size; null if the source does not say
        pa.field("offset", pa.int64()),  # first byte inside `uri`, for members of a tar
        pa.field("row", pa.int64()),  # row inside `uri`, for images stored in Parquet
        pa.field("group", pa.int32()),  # row group of `row`
        pa.field("stamp", pa.string()),  # see Entry; null in manifests of before
    ]
)


def table_of(entries: Sequence[Entry]) -> pa.Table:
    """A table of ENTRIES."""
    return pa.Table.from_pydict(
        {name: [getattr(entry, name) for entry in entries] for name in ENTRIES.names}, ENTRIES
    )


def tables_of(entries: Iterable[Entry]) -> Iterator[pa.Table]:
    """Tables of at most ROWS entries, in order."""
    entries = iter(entries)
    while rows := list(islice(entries, ROWS)):
        yield table_of(rows)


def entries_of(table: pa.Table) -> list[Entry]:
    """The entries of a table, in order; columns that manifests of before do not have are null."""
    columns = [
        table.column(name).to_pylist() if name in table.column_names else [None] * len(table)
        for name in ENTRIES.names
    ]
    return [Entry(*row) for row in zip(*columns, strict=True)]


def packed(table: pa.Table) -> bytes:
    """A table compressed to about a tenth, to be sent to another process."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def unpacked(data: bytes) -> pa.Table:
    """The inverse of `packed`."""
    return pa.ipc.open_stream(data).read_all()
