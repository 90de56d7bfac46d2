"""Where images come from. A source is a function that yields one Entry per image; add one to SOURCES."""

import csv
import io
import posixpath
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cliper.pipeline.config import InputConfig
from cliper.pipeline.corpus.decode import SUFFIXES
from cliper.pipeline.errors import InputError
from cliper.pipeline.storage.backend import Storage, absolute, is_local, join


@dataclass(frozen=True)
class Entry:
    """One image: a file, a byte range of a file (`offset`, `bytes`), or a row of a Parquet file (`row`)."""

    image_id: str
    uri: str
    bytes: int | None = None
    offset: int | None = None
    row: int | None = None


def list_entries(storage: Storage, uri: str, config: InputConfig) -> Iterator[Entry]:
    """Yield the corpus in a fixed order. Raises InputError or StorageError."""
    uri = absolute(uri)
    name = config.format if config.format != "auto" else detect_format(uri)
    try:
        yield from SOURCES[name](storage, uri, config)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"input {uri} does not exist") from error


def detect_format(uri: str) -> str:
    """Go by the ending: .parquet, .csv and .txt are lists, .tar is WebDataset, anything else holds image files."""
    ending = posixpath.splitext(uri)[1].lower()
    return {".parquet": "list", ".csv": "list", ".txt": "list", ".tar": "tar"}.get(ending, "images")


def list_images(storage: Storage, uri: str, config: InputConfig) -> Iterator[Entry]:
    """A file, a folder or prefix (recursive; files with an image's ending), or a glob (all it matches)."""
    if any(c in uri for c in "*?["):
        yield from _glob(storage, uri)
        return
    filesystem, path = storage.filesystem(uri)
    if is_local(uri) and filesystem.isfile(path):
        yield Entry(posixpath.basename(path), uri, filesystem.size(path))
        return
    for name, size in storage.list_files(uri):
        if name.lower().endswith(SUFFIXES):
            yield Entry(name, join(uri, name), size)


def _glob(storage: Storage, pattern: str) -> Iterator[Entry]:
    """Ids are relative to the longest folder without a wildcard."""
    _, path = storage.filesystem(pattern)
    fixed = path[: min(path.index(c) for c in "*?[" if c in path)].rpartition("/")[0]
    found = storage.glob(pattern)
    for name in sorted(found):
        if found[name]["type"] == "file":
            relative = name.removeprefix(fixed).lstrip("/")
            yield Entry(relative, _with_scheme(pattern, name), found[name]["size"])


def _with_scheme(uri: str, path: str) -> str:
    return path if is_local(uri) else f"{uri.split('://', 1)[0]}://{path}"


def list_uris(storage: Storage, uri: str, config: InputConfig) -> Iterator[Entry]:
    """Parquet or CSV with a column of URIs (relative ones are beside the list) and maybe one of ids, or
    plain text with a URI per line."""
    base = posixpath.dirname(uri)
    for row in _list_rows(storage, uri, config):
        target, image_id = row.get(config.uri_column), row.get(config.id_column)
        if not target:
            raise InputError(f"{uri}: a row has no '{config.uri_column}' (input.uri_column): {row}")
        absolute = "://" in target or target.startswith("/")
        yield Entry(str(image_id or target), target if absolute else join(base, target) if base else target)


def _list_rows(storage: Storage, uri: str, config: InputConfig) -> Iterator[dict[str, Any]]:
    with storage.open(uri) as handle:
        if not uri.lower().endswith(".parquet"):
            try:
                yield from _text_rows(handle, uri, config)
            except (UnicodeDecodeError, csv.Error) as error:
                raise InputError(f"{uri} is not a list in UTF-8 text: {error}") from error
            return
        file = _parquet(handle, uri)
        _need_columns(uri, file.schema_arrow.names, config.uri_column)
        columns = [c for c in (config.uri_column, config.id_column) if c in file.schema_arrow.names]
        for batch in file.iter_batches(columns=columns):
            yield from batch.to_pylist()


def _text_rows(handle: Any, uri: str, config: InputConfig) -> Iterator[dict[str, Any]]:
    with io.TextIOWrapper(handle, encoding="utf-8-sig", newline="") as text:
        if uri.lower().endswith(".txt"):
            yield from ({config.uri_column: line.strip()} for line in text if line.strip())
            return
        reader = csv.DictReader(text)
        _need_columns(uri, reader.fieldnames or (), config.uri_column)
        yield from reader


def _need_columns(uri: str, names: Any, needed: str) -> None:
    if needed not in names:
        raise InputError(
            f"{uri} has no column '{needed}'; it has: {', '.join(names)}. Name it in the config (input)"
        )


def _parquet(handle: Any, uri: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(handle)
    except pa.ArrowInvalid as error:
        raise InputError(f"{uri} is not a Parquet file: {error}") from error


def list_parquet_images(storage: Storage, uri: str, config: InputConfig) -> Iterator[Entry]:
    """Parquet files (one, a folder or a glob) with a column of image bytes, plain or as struct {bytes, path}."""
    for name, file_uri in _files(storage, uri, ".parquet"):
        with storage.open(file_uri) as handle:
            file = _parquet(handle, file_uri)
            _need_columns(file_uri, file.schema_arrow.names, config.image_column)
            if config.id_column not in file.schema_arrow.names:
                yield from (Entry(f"{name}/{row}", file_uri, row=row) for row in range(file.metadata.num_rows))
                continue
            row = 0
            for batch in file.iter_batches(columns=[config.id_column]):
                for image_id in batch.column(0).to_pylist():
                    yield Entry(str(image_id), file_uri, row=row)
                    row += 1


def list_tars(storage: Storage, uri: str, config: InputConfig) -> Iterator[Entry]:
    """WebDataset tars (one, a folder or a glob), uncompressed: every member with an image's ending."""
    for name, file_uri in _files(storage, uri, ".tar"):
        with storage.open(file_uri) as handle:
            try:
                with tarfile.open(fileobj=handle, mode="r:") as archive:
                    for member in archive:
                        if member.isfile() and member.name.lower().endswith(SUFFIXES):
                            image_id = f"{name}/{member.name}"
                            yield Entry(image_id, file_uri, member.size, offset=member.offset_data)
            except tarfile.TarError as error:
                raise InputError(f"{file_uri} is not an uncompressed tar: {error}") from error


def _files(storage: Storage, uri: str, suffix: str) -> Iterator[tuple[str, str]]:
    """(name without suffix, URI) of the files meant by a file, folder, prefix or glob."""
    if any(c in uri for c in "*?["):
        matches: Iterator[tuple[str, str]] = ((entry.image_id, entry.uri) for entry in _glob(storage, uri))
    elif uri.lower().endswith(suffix):
        matches = iter([(posixpath.basename(uri), uri)])
    else:
        matches = ((name, join(uri, name)) for name, _ in storage.list_files(uri) if name.endswith(suffix))
    for name, file_uri in matches:
        yield name.removesuffix(suffix), file_uri


SOURCES: dict[str, Callable[[Storage, str, InputConfig], Iterator[Entry]]] = {
    "images": list_images,
    "list": list_uris,
    "parquet": list_parquet_images,
    "tar": list_tars,
}
