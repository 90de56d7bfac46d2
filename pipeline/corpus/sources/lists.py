"""Lists of URIs: Parquet, CSV, TSV, JSON, JSON Lines, or text with a URI per line; text may be compressed."""

import csv
import io
import json
import posixpath
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from lzma import LZMAError
from typing import Any

import fsspec

from cliper.pipeline.config import InputConfig
from cliper.pipeline.corpus.left_out import LeftOut
from cliper.pipeline.corpus.sources.entry import Entry, checked_id, is_unicode
from cliper.pipeline.corpus.sources.files import Found
from cliper.pipeline.corpus.sources.parquet import need_column, need_id_type, need_text, open_parquet
from cliper.pipeline.corpus.sources.select import Selection
from cliper.pipeline.errors import InputError
from cliper.pipeline.storage.backend import Storage, absolute, join
from cliper.pipeline.storage.sealed import WHOLE

TEXT = (".csv", ".tsv", ".txt", ".jsonl", ".ndjson", ".json")
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
LISTS = (".parquet", *(text + packed for text in TEXT for packed in ("", *COMPRESSIONS)))

Row = tuple[str, Any, Any]  # where it is, the URI, the id (_NO_ID if there is no such column)
_NO_ID = object()


def list_uris(storage: Storage, files: Iterable[Found], config: InputConfig, left_out: LeftOut) -> Iterator[Entry]:
    """One list, or those of a folder, glob or brace range: a column of URIs and maybe one of ids.

    Relative URIs are below the list's folder. Without ids, the URI as it is written is the id.
    """
    selection = Selection(config, left_out)
    for found in files:
        if found.how != "named" and not selection.container(found.name, LISTS, "list"):
            continue
        base = posixpath.dirname(found.uri)
        for where, target, value in _rows(storage, found, config):
            if not isinstance(target, str) or not target.strip() or not is_unicode(target):
                raise InputError(
                    f"{where}: the URI is {target!r:.60}; every row needs one, as text, in '{config.uri_column}' "
                    "(--uri-column)"
                )
            entry = Entry(checked_id(target if value is _NO_ID else value, where), _resolved(base, target.strip()))
            if selection.row(entry.image_id):
                yield entry


def _resolved(base: str, target: str) -> str:
    if "://" in target:
        return absolute(target)
    return target if target.startswith("/") or not base else join(base, target)


def _rows(storage: Storage, found: Found, config: InputConfig) -> Iterator[Row]:
    name = found.name.lower()
    compression = next((method for suffix, method in COMPRESSIONS.items() if name.endswith(suffix)), None)
    kind = posixpath.splitext(posixpath.splitext(name)[0] if compression else name)[1]
    with storage.open(found.uri) as handle:
        if kind == ".parquet":
            yield from _parquet_rows(handle, found.uri, config)
            return
        with _text_errors(found.uri), _decompressed(handle, compression, found.uri) as plain:
            text = io.TextIOWrapper(plain, encoding="utf-8-sig", newline="")
            yield from _TEXT_READERS.get(kind, _lines)(text, found.uri, config)


@contextmanager
def _text_errors(uri: str) -> Iterator[None]:
    try:
        yield
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{uri} is not a list in UTF-8 text: {error}") from error
    except (EOFError, zlib.error, LZMAError, OSError) as error:
        raise InputError(f"{uri} cannot be read to its end: {type(error).__name__}: {error}") from error


@contextmanager
def _decompressed(handle: Any, compression: str | None, uri: str) -> Iterator[Any]:
    if compression is None:
        yield handle
        return
    opener = fsspec.compression.compr.get(compression)
    if opener is None:
        raise InputError(f"{uri}: {compression} is not read here; unpack it, or pip install zstandard")
    with opener(handle, mode="rb") as plain:
        yield plain


def _parquet_rows(handle: Any, uri: str, config: InputConfig) -> Iterator[Row]:
    file = open_parquet(handle, uri, WHOLE)
    schema = file.schema_arrow
    need_column(uri, schema, config.uri_column, "--uri-column")
    need_text(uri, schema.field(config.uri_column), "--uri-column")
    columns = [config.uri_column]
    if config.id_column in schema.names:
        need_id_type(uri, schema.field(config.id_column))
        columns.append(config.id_column)
    row = 0
    for batch in file.iter_batches(columns=columns):
        for values in batch.to_pylist():
            yield f"{uri}, row {row}", values[config.uri_column], values.get(config.id_column, _NO_ID)
            row += 1


def _lines(text: Any, uri: str, config: InputConfig) -> Iterator[Row]:
    for number, line in enumerate(text, 1):
        if line.strip():
            yield f"{uri}, line {number}", line.strip(), _NO_ID


def _comma_separated(text: Any, uri: str, config: InputConfig) -> Iterator[Row]:
    return _table(text, uri, config, ",")


def _tab_separated(text: Any, uri: str, config: InputConfig) -> Iterator[Row]:
    return _table(text, uri, config, "\t")


def _table(text: Any, uri: str, config: InputConfig, delimiter: str) -> Iterator[Row]:
    reader = csv.DictReader(text, delimiter=delimiter)
    _need_name(uri, reader.fieldnames or (), config.uri_column)
    for values in reader:
        where = f"{uri}, line {reader.line_num}"
        if None in values or None in values.values():
            raise InputError(
                f"{where} has not as many values as the header has columns; quote values with '{delimiter}'"
            )
        yield where, values[config.uri_column], values.get(config.id_column, _NO_ID)


def _json_lines(text: Any, uri: str, config: InputConfig) -> Iterator[Row]:
    for number, line in enumerate(text, 1):
        if line.strip():
            yield _json_row(_json(line, f"{uri}, line {number}"), f"{uri}, line {number}", config)


def _json_list(text: Any, uri: str, config: InputConfig) -> Iterator[Row]:
    content = _json(text.read(), uri)
    if not isinstance(content, list):
        raise InputError(
            f'{uri} is not a list, but a JSON {type(content).__name__}; write [{{"uri": ...}}, ...] or .jsonl'
        )
    for number, item in enumerate(content):
        yield _json_row(item, f"{uri}, item {number}", config)


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"{where} is not JSON: {error}") from error


def _json_row(item: Any, where: str, config: InputConfig) -> Row:
    if isinstance(item, str):
        return where, item, _NO_ID
    if not isinstance(item, dict):
        raise InputError(f"{where} is {item!r:.60}; expected an object with '{config.uri_column}', or a URI")
    _need_name(where, list(item), config.uri_column)
    return where, item[config.uri_column], item.get(config.id_column, _NO_ID)


def _need_name(where: str, names: Sequence[str], needed: str) -> None:
    if needed not in names:
        raise InputError(f"{where} has no column '{needed}'; it has: {', '.join(names)}. Name it: --uri-column")


_TEXT_READERS = {
    ".csv": _comma_separated,
    ".tsv": _tab_separated,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_list,
}
