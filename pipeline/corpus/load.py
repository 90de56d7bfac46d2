"""The first stage: the encoded bytes of one shard. An object that cannot be read is a row with its reason."""

import posixpath
import queue
import tarfile
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cliper.pipeline.corpus.sources import Entry
from cliper.pipeline.corpus.sources.entry import ETAG, MTIME, header_stamp
from cliper.pipeline.errors import ImageError, StorageError
from cliper.pipeline.storage.backend import Storage
from cliper.pipeline.storage.direct import OtherTagError
from cliper.pipeline.storage.local import local_path, too_large
from cliper.pipeline.storage.refusals import explain
from cliper.pipeline.storage.uris import absolute, is_local, join

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


MOST_BYTES = 512 << 20  # of one image file; a larger object is a failed row
SLOW_IMAGES = 2  # that are tried alone before the store counts as too slow

Fetched = list[bytes | Exception]


@dataclass(frozen=True)
class Pace:
    """The slowest remote store that is waited for: `seconds`, plus the bytes at `rate` (bytes per second)."""

    seconds: float = 180.0
    rate: float = 50_000.0

    def seconds_for(self, files: Sequence[Entry]) -> float:
        """The time that reading files may take, with retries; 1 MB stands for an unknown size."""
        return self.seconds + sum(2**20 if entry.bytes is None else entry.bytes for entry in files) / self.rate

    @property
    def too_slow(self) -> str:
        """The complaint about a store below it."""
        return f"the store delivers less than {self.rate / 1000:g} kB/s"


def load_entries(
    storage: Storage,
    shard: int,
    entries: Sequence[Entry],
    image_column: str,
    most: int = MOST_BYTES,
    pace: Pace = Pace(),
    dated: bool = False,
) -> pa.Table:
    """Fetch every entry's bytes: a table of SCHEMA in the order of `entries`, `data` null where it failed.

    `most`: bytes of one image file. `dated`: a local file with another modification time than was listed fails as
    well; a copy of the corpus may have other times.
    """
    fetched: dict[str, bytes | Exception] = {}
    files = [entry for entry in entries if entry.row is None]
    fetched.update({e.image_id: too_large(e.bytes, most) for e in files if (e.bytes or 0) > most})
    files = [entry for entry in files if entry.image_id not in fetched]
    read = list(zip(files, _read(storage, files, most, pace), strict=True))
    suspects = [entry for entry, data in read if isinstance(data, OtherTagError)]
    fetched.update({entry.image_id: _complete(entry, data) for entry, data in read})
    if dated:
        fetched.update(_touched(files, fetched))
    fetched.update(_other_objects(storage, suspects, fetched))
    fetched.update(_load_rows(storage, [e for e in entries if e.row is not None], image_column, most))
    rows = [
        {"shard": shard, "image_id": e.image_id, "uri": e.uri} | _outcome(fetched[e.image_id]) for e in entries
    ]
    return pa.Table.from_pylist(rows, SCHEMA)


def _read(storage: Storage, files: Sequence[Entry], most: int, pace: Pace) -> list[bytes | Exception]:
    """Fetch files, in a time that grows with their sizes; those that take longer are fetched alone once more.

    Raises StorageError as `read_many` does, and if the store is too slow for the first images alone as well.
    """
    if all(is_local(entry.uri) for entry in files):
        return _fetch(storage, files, most)
    found = _within(pace.seconds_for(files), lambda: _fetch(storage, files, most))
    if found is not None:
        return found
    alone: list[bytes | Exception] = []
    for entry in files:
        one = _within(pace.seconds_for([entry]), partial(_fetch, storage, [entry], most))
        alone += [ImageError("unreadable", f"{pace.too_slow} for this image")] if one is None else one
        if len(alone) == min(SLOW_IMAGES, len(files)) and not any(isinstance(data, bytes) for data in alone):
            raise StorageError(f"{entry.uri}: {pace.too_slow}; the same command continues when it is faster")
    return alone


def _fetch(storage: Storage, files: Sequence[Entry], most: int) -> list[bytes | Exception]:
    return storage.read_many([e.uri for e in files], [_span(e, most) for e in files], most, _tags(files))


def _tags(files: Sequence[Entry]) -> list[str | None]:
    """The ETags of whole objects, as they were listed."""
    stamps = ((e.stamp or "") if e.offset is None else "" for e in files)
    return [stamp[len(ETAG) :] if stamp.startswith(ETAG) else None for stamp in stamps]


def _within(seconds: float, fetch: Callable[[], Fetched]) -> Fetched | None:
    """The result of `fetch`, or None if it takes longer; its thread is abandoned then. Raises its errors."""
    outcome: queue.SimpleQueue[Fetched | Exception] = queue.SimpleQueue()

    def run() -> None:
        try:
            outcome.put(fetch())
        except Exception as error:
            outcome.put(error)

    threading.Thread(target=run, name="fetch", daemon=True).start()
    try:
        found = outcome.get(timeout=seconds)
    except queue.Empty:
        return None
    if isinstance(found, Exception):
        raise found
    return found


def _span(entry: Entry, most: int) -> tuple[int, int] | None:
    """The bytes to fetch: a member's, None for a whole file, or for one of unknown size a little too many."""
    if entry.offset is not None:
        return entry.offset - _header(entry), entry.offset + (entry.bytes or 0)
    return (0, most + 1) if entry.bytes is None else None


def _header(entry: Entry) -> int:
    """Bytes to read before a member, to see whether it is still the one that was listed."""
    return tarfile.BLOCKSIZE if entry.offset is not None and entry.stamp is not None else 0


def _complete(entry: Entry, data: bytes | Exception) -> bytes | Exception:
    """The bytes read, if they are those that were listed: of the same size, a tar's member under the same header.

    A member that the end of the tar cuts off is an error, not a shorter image.
    """
    if isinstance(data, OtherTagError):
        data = data.data
    if isinstance(data, Exception):
        return data
    header, body = data[: _header(entry)], data[_header(entry) :]
    if entry.stamp is not None and entry.offset is not None and (reason := _other_member(entry.stamp, header)):
        return ImageError("changed", f"{reason}; the tar is not the one that was listed")
    if entry.bytes is None or len(body) == entry.bytes:
        return body
    if entry.offset is None:
        return ImageError("changed", f"{len(body):,} bytes; {entry.bytes:,} were listed")
    return ImageError("truncated", f"the tar ends inside this member: {len(body)} of {entry.bytes} bytes")


def _other_objects(
    storage: Storage, suspects: Sequence[Entry], fetched: Mapping[str, bytes | Exception]
) -> dict[str, Exception]:
    """The objects that were replaced since they were listed, of those whose ETags seem to differ.

    Each is looked up; the first that is still as it was listed shows that this store's ETags are no MD5, and ends
    the check.
    """
    other: dict[str, Exception] = {}
    for entry in suspects:
        if not isinstance(fetched[entry.image_id], bytes):
            continue
        try:
            if storage.tag(entry.uri) == (entry.stamp or "").removeprefix(ETAG):
                break
            other[entry.image_id] = ImageError(
                "changed", "another ETag; the object is not the one that was listed"
            )
        except (StorageError, FileNotFoundError) as error:
            other[entry.image_id] = error
    return other


def _touched(files: Sequence[Entry], fetched: Mapping[str, bytes | Exception]) -> dict[str, Exception]:
    """The local files that were modified since they were listed; looked up after reading."""
    found: dict[str, Exception] = {}
    for entry in files:
        listed = entry.stamp if isinstance(fetched[entry.image_id], bytes) else None
        if listed is None or not listed.startswith(MTIME):
            continue
        try:
            if str(Path(local_path(entry.uri)).stat().st_mtime_ns) != listed[len(MTIME) :]:
                found[entry.image_id] = ImageError(
                    "changed", "another modification time; the file is not the one that was listed"
                )
        except OSError as error:
            found[entry.image_id] = error
    return found


def _other_member(stamp: str, header: bytes) -> str | None:
    """Why a header is not the one that was listed; None if it is."""
    try:
        found = tarfile.TarInfo.frombuf(header, tarfile.ENCODING, "surrogateescape")
    except tarfile.HeaderError:
        return "no header stands before the member"
    own_name = not stamp.endswith(" 0")
    return None if header_stamp(found, own_name) == stamp else f"the member there is {found.name[:100]!r} now"


def _outcome(data: bytes | Exception) -> dict[str, Any]:
    if isinstance(data, bytes):
        return {"data": data}
    if isinstance(data, ImageError):
        return {"error_type": data.kind, "error_message": str(data)}
    kind = "missing" if isinstance(data, FileNotFoundError) else "unreadable"
    return {"error_type": kind, "error_message": explain(data)}


def _load_rows(storage: Storage, entries: Sequence[Entry], column: str, most: int) -> dict[str, bytes | Exception]:
    """Images stored in Parquet: each row group that is needed is read once, for this column only."""
    by_file = defaultdict(list)
    for entry in entries:
        by_file[entry.uri].append(entry)
    fetched: dict[str, bytes | Exception] = {}
    for uri, members in by_file.items():
        try:
            with storage.open(uri, ahead=False) as handle:
                values = _values_of(pq.ParquetFile(handle), members, column)
        except Exception as error:  # a damaged or vanished file affects only its own images
            fetched.update({entry.image_id: error for entry in members})
            continue
        fetched.update({image_id: value for image_id, value in values.items() if not isinstance(value, str)})
        paths = {image_id: _beside(uri, value) for image_id, value in values.items() if isinstance(value, str)}
        read = storage.read_many(list(paths.values()), [(0, most + 1)] * len(paths), most)
        fetched.update(zip(paths, read, strict=True))
    return fetched


def _values_of(file: pq.ParquetFile, entries: Sequence[Entry], column: str) -> dict[str, bytes | str | Exception]:
    """Image id to its bytes, or to the path that stands in place of bytes."""
    wanted = {entry.row: entry.image_id for entry in entries}
    found: dict[str, bytes | str | Exception] = {}
    first = 0
    for group in range(file.metadata.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        inside = [row for row in wanted if row is not None and first <= row < first + count]
        if inside:
            ids = next((entry.stamp for entry in entries if entry.stamp), None)
            table = file.read_row_group(group, columns=[column, *([ids] if ids and ids != column else [])])
            values = table.column(column)
            found.update({wanted[row]: _image_of(values[row - first].as_py()) for row in inside})
            if ids:
                found.update(_other_rows({row: wanted[row] for row in inside}, table.column(ids), first))
        first += count
    missing = FileNotFoundError("the row is no longer in the Parquet file")
    return {entry.image_id: found.get(entry.image_id, missing) for entry in entries}


def _other_rows(wanted: Mapping[int, str], ids: pa.ChunkedArray, first: int) -> dict[str, Exception]:
    """The images whose row holds another id now."""
    now = {image_id: ids[row - first].as_py() for row, image_id in wanted.items()}
    return {
        image_id: ImageError("changed", f"its row holds {str(found)[:60]!r} now; the file is not the one listed")
        for image_id, found in now.items()
        if str(found) != image_id
    }


def _image_of(value: Any) -> bytes | str | Exception:
    if isinstance(value, dict):
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if isinstance(value, bytes | str):
        return value
    return ImageError("missing", "the row holds no image: null")


def _beside(uri: str, path: str) -> str:
    """The URI of a path in a Parquet file: relative ones are beside it."""
    return absolute(path) if "://" in path or path.startswith("/") else join(posixpath.dirname(uri), path)
