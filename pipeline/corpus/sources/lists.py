"""Lists of URIs: Parquet, CSV, TSV, JSON, JSON Lines, or text with a URI per line; text may be compressed."""

import codecs
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
from cliper.pipeline.corpus.formats import SUFFIXES
from cliper.pipeline.corpus.left_out import LeftOut
from cliper.pipeline.corpus.sources.entry import Entry, checked_id, is_unicode
from cliper.pipeline.corpus.sources.files import Found
from cliper.pipeline.corpus.sources.parquet import need_column, need_id_type, need_text, open_parquet
from cliper.pipeline.corpus.sources.select import Selection
from cliper.pipeline.errors import InputError
from cliper.pipeline.storage.backend import Storage
from cliper.pipeline.storage.sealed import WHOLE
from cliper.pipeline.storage.uris import absolute, join

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
        base, empty = posixpath.dirname(found.uri), True
        for where, target, value in _rows(storage, found, config):
            if not isinstance(target, str) or not target.strip() or not is_unicode(target):
                raise InputError(
                    f"{where}: the URI is {target!r:.60}; every row needs one, as text, in '{config.uri_column}' "
                    "(--uri-column)"
                )
            entry = Entry(checked_id(target if value is _NO_ID else value, where), _resolved(base, target.strip()))
            empty = False
            if selection.row(entry.image_id):
                yield entry
        if empty:
            left_out.note(f"{found.uri} has no rows")


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
    except UnicodeDecodeError as error:
        wide = error.object[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        hint = "; it is UTF-16: iconv -f UTF-16 -t UTF-8 LIST > NEW" if wide else ""
        raise InputError(f"{uri} is not a list in UTF-8 text: {error}{hint}") from error
    except csv.Error as error:
        raise InputError(f"{uri} cannot be read: {error}; is a quote open?") from error
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
        need_column(uri, schema, config.id_column, "--id-column")
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
    # Strict: an unclosed quote is an error, where it would else take all lines up to the next one into one URI.
    reader = csv.DictReader(text, delimiter=delimiter, skipinitialspace=True, strict=True)
    reader.fieldnames = _header(uri, reader.fieldnames, config, delimiter)
    for values in reader:
        where = f"{uri}, line {reader.line_num}"
        if None in values or None in values.values():
            raise InputError(
                f"{where} has not as many values as the header has columns; quote values with '{delimiter}'"
            )
        yield where, values[config.uri_column], values.get(config.id_column, _NO_ID)


def _header(uri: str, names: Sequence[str] | None, config: InputConfig, delimiter: str) -> list[str]:
    """The names of the columns. Raises InputError if they are not as needed, with the likely cause."""
    if not names:
        raise InputError(f"{uri} has no line that names the columns; it must begin with '{config.uri_column}'")
    found = [name.strip() for name in names]
    for name in (config.uri_column, config.id_column):
        if found.count(name) > 1:
            raise InputError(f"{uri} has {found.count(name)} columns called '{name}'; rename all but one")
    if config.uri_column in found:
        return found
    if len(found) == 1 and (mark := next((mark for mark in ("\t", ";", "|", ",") if mark in found[0]), None)):
        raise InputError(
            f"{uri}: its columns are divided by {mark!r}, not by {delimiter!r} (its first line: "
            f"{found[0]:.60}); a .csv has commas, a .tsv tabs"
        )
    if found[0].lower().endswith(SUFFIXES):
        raise InputError(
            f"{uri}: the first line names no columns, but is {found[0]:.60}; begin with '{config.uri_column}', "
            "or call a list of nothing but URIs .txt"
        )
    _need_name(uri, found, config.uri_column)
    return found


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
        return json.loads(text, object_pairs_hook=_object)
    except ValueError as error:
        raise InputError(f"{where} is not JSON: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError for a name that occurs twice, of which Python would take the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"'{next(name for name in names if names.count(name) > 1)}' occurs twice in one object")
    return found


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
