"""Images stored in Parquet, and what list and image files have in common: opening, columns, types."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cliper.pipeline.config import InputConfig
from cliper.pipeline.corpus.left_out import LeftOut
from cliper.pipeline.corpus.sources.entry import Entry, checked_id
from cliper.pipeline.corpus.sources.files import Found
from cliper.pipeline.corpus.sources.select import Selection
from cliper.pipeline.errors import InputError
from cliper.pipeline.parallel import map_ahead
from cliper.pipeline.storage.backend import Storage
from cliper.pipeline.storage.sealed import DamagedFileError, open_sealed

READERS = 8  # files listed at the same time
LARGE_GROUP = 512 << 20  # bytes of images in a row group that are worth a notice


def list_parquet_images(
    storage: Storage, files: Iterable[Found], config: InputConfig, left_out: LeftOut
) -> Iterator[Entry]:
    """Parquet files (one, a folder, a glob or a brace range) with a column of image bytes, plain or as struct
    {bytes, path}. Only the footers and the column of ids are read.
    """
    selection = Selection(config, left_out)
    files = (
        found
        for found in files
        if found.how == "named" or selection.container(found.name, (".parquet",), "Parquet file")
    )
    with ThreadPoolExecutor(READERS) as pool:
        for found, rows in map_ahead(
            pool, lambda found: (found, _read_file(storage, found, config)), files, READERS
        ):
            left_out.add(rows.notes)
            yield from (entry for entry in _entries(found, rows) if selection.row(entry.image_id))


@dataclass(frozen=True)
class _Rows:
    """What one file's footer says. `groups`: (rows, mean bytes of an image) of every row group."""

    groups: list[tuple[int, int]]
    ids: pa.ChunkedArray | None  # null without a column of ids
    id_column: str | None
    notes: LeftOut


def _read_file(storage: Storage, found: Found, config: InputConfig) -> _Rows:
    notes = LeftOut()
    with storage.open(found.uri, ahead=False) as handle:
        file = open_parquet(handle, found.uri)
        schema = file.schema_arrow
        need_column(found.uri, schema, config.image_column, "--image-column")
        _need_image_type(found.uri, schema.field(config.image_column))
        _note_large_groups(file, found.uri, config.image_column, notes)
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        sizes = [(g.num_rows, _column_bytes(g, config.image_column) // max(g.num_rows, 1)) for g in groups]
        if config.id_column not in schema.names:
            return _Rows(sizes, None, None, notes)
        need_column(found.uri, schema, config.id_column, "--id-column")
        need_id_type(found.uri, schema.field(config.id_column))
        return _Rows(sizes, file.read([config.id_column]).column(0), config.id_column, notes)


def _entries(found: Found, rows: _Rows) -> Iterator[Entry]:
    ids = _row_ids(found, rows)
    row = 0
    for group, (count, size) in enumerate(rows.groups):
        for _ in range(count):
            yield Entry(next(ids), found.uri, size, row=row, group=group, stamp=rows.id_column)
            row += 1


def _row_ids(found: Found, rows: _Rows) -> Iterator[str]:
    if rows.ids is None:
        stem = found.name[:-8] if found.name.lower().endswith(".parquet") else found.name
        yield from (f"{stem}/{row}" for row in range(sum(count for count, _ in rows.groups)))
        return
    values = (value for chunk in rows.ids.chunks for value in chunk.to_pylist())
    yield from (checked_id(value, f"{found.uri}, row {row}") for row, value in enumerate(values))


def _note_large_groups(file: pq.ParquetFile, uri: str, column: str, left_out: LeftOut) -> None:
    groups = (file.metadata.row_group(i) for i in range(file.metadata.num_row_groups))
    largest = max((_column_bytes(group, column) for group in groups), default=0)
    if largest > LARGE_GROUP:
        left_out.note(
            f"{uri} has a row group of {largest >> 20} MB, which every shard cut from it reads whole; "
            "write it with smaller row groups (row_group_size)"
        )


def _column_bytes(group: pq.RowGroupMetaData, column: str) -> int:
    """Stored bytes of a column in a row group, its struct fields together."""
    chunks = (group.column(i) for i in range(group.num_columns))
    return sum(c.total_compressed_size for c in chunks if c.path_in_schema.split(".")[0] == column)


def open_parquet(handle: Any, uri: str, most: int = 0) -> pq.ParquetFile:
    """Open a Parquet file. Raises InputError for anything else.

    `most`: the seal of one of ours is checked, and every byte of one up to this size.
    """
    try:
        return open_sealed(handle, most=most) if most else pq.ParquetFile(handle)
    except (pa.ArrowException, OSError, DamagedFileError) as error:
        raise InputError(f"{uri} is not a Parquet file: {' '.join(str(error).split())}") from error


def need_column(uri: str, schema: pa.Schema, column: str, option: str) -> None:
    """Raise InputError unless there is a column of this name; points to a column that holds images or URIs."""
    if schema.names.count(column) > 1:
        raise InputError(f"{uri} has {schema.names.count(column)} columns called '{column}'; rename all but one")
    if column in schema.names:
        return
    hint = ""
    images = [field.name for field in schema if image_problem(field.type) is None]
    if option == "--uri-column" and images:
        hint = f". The column '{images[0]}' holds image bytes: --format parquet --image-column {images[0]}"
    raise InputError(f"{uri} has no column '{column}'; it has: {', '.join(schema.names)}. Name it: {option}{hint}")


def need_text(uri: str, field: pa.Field, option: str) -> None:
    """Raise InputError unless a column is text."""
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise InputError(
            f"{uri}: column '{field.name}' is {field.type}; URIs are text (string). Name it: {option}"
        )


def need_id_type(uri: str, field: pa.Field) -> None:
    """Raise InputError unless a column can hold ids: text or whole numbers."""
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    if not (text or pa.types.is_integer(kind)):
        raise InputError(
            f"{uri}: column '{field.name}' is {field.type}; ids are text or whole numbers: --id-column"
        )


def image_problem(kind: pa.DataType) -> str | None:
    """Why a column of this type holds no images, or None."""
    if pa.types.is_struct(kind):
        names = [kind.field(i).name for i in range(kind.num_fields)]
        inner = kind.field("bytes").type if "bytes" in names else None
        return None if inner is not None and _is_binary(inner) else "a struct without a binary field 'bytes'"
    if _is_binary(kind):
        return None
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return "text; decode base64 to binary first, and read URIs with --format list --uri-column"
    return f"{kind}"


def _is_binary(kind: pa.DataType) -> bool:
    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_binary_view)
    return any(test(kind) for test in tests)


def _need_image_type(uri: str, field: pa.Field) -> None:
    problem = image_problem(field.type)
    if problem is not None:
        raise InputError(
            f"{uri}: column '{field.name}' is {problem}. Images are binary or struct {{bytes, path}}; "
            "name their column: --image-column"
        )
