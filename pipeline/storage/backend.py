"""Read and write by URI: local paths and every fsspec backend, S3 first.

Writes are atomic: a reader sees a whole file or none. Remote operations are tried again when the reason may pass
(retry.py). Options hold secrets (keys, tokens): they are never part of a repr, a log line or a run folder.
"""

import io
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from cliper.pipeline.errors import StorageError
from cliper.pipeline.storage.direct import DirectS3, bare_tag, direct_s3, tagged
from cliper.pipeline.storage.listing import Span, glob_s3, list_s3, list_span, spans_s3
from cliper.pipeline.storage.local import created_local, read_local, too_large, write_local
from cliper.pipeline.storage.refusals import access_errors, explain, refusal
from cliper.pipeline.storage.retry import (
    error_code,
    fetch_with_retries,
    forbids,
    is_transient,
    is_unavailable,
    refuses_keys,
    with_retries,
)
from cliper.pipeline.storage.s3 import s3_options
from cliper.pipeline.storage.uris import check_scheme, is_local
from cliper.pipeline.storage.web import read_web, web_filesystem

T = TypeVar("T")


@dataclass(frozen=True)
class Stored:
    """A file as a listing shows it."""

    name: str  # relative to the listed folder
    size: int  # bytes
    modified: float | None  # seconds since 1970, by the store's clock; None if the backend does not say
    tag: str | None = None  # ETag, as the store writes it; S3 only


@dataclass(frozen=True)
class Storage:
    """How to reach URIs. `options` go to fsspec (key, secret, endpoint_url, anon, ...); local paths need none."""

    options: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def filesystem(self, uri: str) -> tuple[Any, str]:
        """Return (fsspec filesystem, path inside it). Raises StorageError for a scheme that cannot be opened."""
        if is_local(uri):
            return fsspec.filesystem("file"), LocalFileSystem._strip_protocol(uri)  # never chained at "::"
        if not uri.startswith("s3://"):
            return _open_filesystem(uri, self.options)
        try:
            filesystem = fsspec.filesystem("s3", **s3_options(self.options))
        except (TypeError, ValueError):  # their texts repeat values
            raise StorageError(f"s3:// does not take these storage options: {', '.join(self.options)}") from None
        filesystem.retries = 1  # s3fs's own loop, see s3.CLIENT
        return filesystem, uri.removeprefix("s3://").rstrip("/")

    def objects(self, uri: str) -> tuple[Any, str]:
        """Return (client, path) for single objects: obstore's for S3 if it covers the set-up, else `filesystem`.

        The client has the methods of DirectS3. Raises StorageError as `filesystem` does.
        """
        if not uri.startswith("s3://"):
            return self.filesystem(uri)
        path = uri.removeprefix("s3://").rstrip("/")
        direct = direct_s3(s3_options(self.options), path, lambda: self.filesystem(uri)[0])
        return (direct, path) if direct is not None else self.filesystem(uri)

    def operate(self, uri: str, operation: Callable[[Any, str], T], listing: bool = False) -> T:
        """Return operation(client, path), with retries where the storage is remote; see `objects`.

        `listing`: the operation needs an fsspec filesystem. Raises FileNotFoundError, or StorageError if access is
        refused or the storage keeps failing.
        """
        filesystem, path = self.filesystem(uri) if listing else self.objects(uri)
        with access_errors(uri):
            if isinstance(filesystem, LocalFileSystem):
                return operation(filesystem, path)
            return with_retries(lambda: operation(filesystem, path))

    def read(self, uri: str) -> bytes:
        """Return a file's bytes. Raises as `operate` does."""
        data: bytes = self.operate(uri, lambda filesystem, path: filesystem.cat_file(path))
        return data

    def read_range(self, uri: str, start: int, end: int) -> bytes:
        """Return the bytes [start, end) of a file, fewer at its end. Raises as `operate` does."""
        data: bytes = self.operate(uri, lambda filesystem, path: filesystem.cat_file(path, start=start, end=end))
        return data if len(data) <= end - start else data[start:end]  # a web server that ignores ranges

    def size(self, uri: str) -> int:
        """Return a file's size in bytes. Raises as `operate` does."""
        return int(self.operate(uri, lambda filesystem, path: filesystem.info(path))["size"])

    def tag(self, uri: str) -> str:
        """Return an object's ETag without its quotes, "" if the store has none. Raises as `operate` does."""
        cached = uri.startswith("s3://")  # by s3fs

        def ask(client: Any, path: str) -> Any:
            return (
                client.info(path, refresh=True)
                if cached and not isinstance(client, DirectS3)
                else client.info(path)
            )

        return bare_tag(str(self.operate(uri, ask).get("ETag") or ""))

    def read_many(
        self,
        uris: Sequence[str],
        ranges: Sequence[tuple[int, int] | None],
        most: int = 2**40,
        tags: Sequence[str | None] = (),
    ) -> list[bytes | Exception]:
        """Fetch files, or byte ranges [start, end) of them, concurrently where the backend can.

        An object that cannot be read, or has more than `most` bytes, is its exception in the result; the others
        are not affected. `tags`: the ETags that objects had, without quotes; one read whole that has another is
        OtherTagError, which may be wrong where s3fs reads and ETags are no MD5.

        Raises StorageError if a store refuses our keys, is unavailable for all, or gives none of several objects:
        that is not the objects' fault, and the run can go on from here another time. Web hosts are not one store:
        an object of a dead host is its exception, after a bounded time.
        """
        results: list[bytes | Exception] = [b""] * len(uris)
        by_backend: dict[str, list[int]] = {}
        for i, uri in enumerate(uris):
            scheme = uri.partition("://")[0].lower()
            by_backend.setdefault("" if is_local(uri) else scheme.replace("https", "http"), []).append(i)
        for scheme, members in by_backend.items():
            wanted = [uris[i] for i in members], [ranges[i] for i in members]
            known = [tags[i] for i in members] if any(tags) else []
            for i, data in zip(members, self._read_from(scheme, *wanted, most, known), strict=True):
                results[i] = data
        return results

    def _read_from(
        self,
        scheme: str,
        uris: Sequence[str],
        ranges: Sequence[tuple[int, int] | None],
        most: int,
        tags: Sequence[str | None],
    ) -> list[bytes | Exception]:
        if not scheme:
            return read_local(uris, ranges, most)
        if scheme == "http":
            return read_web(uris, ranges, most, self.options)
        found = self._read_together(uris, ranges, tags)
        return [too_large(None, most) if isinstance(data, bytes) and len(data) > most else data for data in found]

    def _read_together(
        self, uris: Sequence[str], ranges: Sequence[tuple[int, int] | None], tags: Sequence[str | None]
    ) -> list[bytes | Exception]:
        try:
            clients = [self.objects(uri) for uri in uris]
        except StorageError as error:  # an unknown scheme, or one whose package is not installed
            return [error] * len(uris)
        starts = [None if r is None else r[0] for r in ranges]
        ends = [None if r is None else r[1] for r in ranges]

        def fetch(places: Sequence[int]) -> list[bytes | Exception]:
            """One attempt for the objects at these places of `uris`; the exceptions of those that failed."""
            found: dict[int, bytes | Exception] = {}
            for client, members in _by_client(places, clients):
                wanted = [clients[i][1] for i in members], [starts[i] for i in members], [ends[i] for i in members]
                known = [tags[i] for i in members] if tags else []
                read: Sequence[bytes | Exception]
                if isinstance(client, DirectS3):
                    read = client.cat_ranges(*wanted, tags=known)
                else:
                    read = tagged(client.cat_ranges(*wanted, on_error="return"), known)
                found.update(zip(members, read, strict=True))
            return [_empty_if_out_of_range(found[i], starts[i]) for i in places]

        results = fetch_with_retries(fetch, len(uris))
        errors = [result for result in results if isinstance(result, Exception)]
        none = len(errors) == len(uris)
        unreachable = none and len(uris) > 1 and all(is_transient(error) or forbids(error) for error in errors)
        unreachable = unreachable or (none and all(is_unavailable(error) for error in errors))
        for uri, result in zip(uris, results, strict=True):
            if isinstance(result, Exception) and (unreachable or refuses_keys(result)):
                raise refusal(uri, result) from result
        return results

    def write(self, uri: str, data: bytes) -> None:
        """Write a whole file under its final name or not at all; an existing file is replaced.

        Local: temporary name, fsync, rename. Remote: one PUT, or one completed multipart upload.
        """

        def put(filesystem: Any, path: str) -> None:
            if isinstance(filesystem, LocalFileSystem):
                write_local(Path(path), data)
            else:
                filesystem.pipe_file(path, data)

        self.operate(uri, put)

    def read_json(self, uri: str) -> Any:
        """Return the content of a JSON file. Raises as `operate` does, and ValueError for other content."""
        return json.loads(self.read(uri))

    def write_json(self, uri: str, content: Any, indent: int | None = None) -> None:
        """Write a JSON file in UTF-8, as `write` does."""
        self.write(uri, json.dumps(content, indent=indent, ensure_ascii=False).encode())

    @contextmanager
    def create(self, uri: str) -> Iterator[BinaryIO]:
        """A file to fill step by step, as atomic as `write`: it appears when the block ends without an error.

        A remote file is gathered in the temporary folder first.
        """
        filesystem, path = self.filesystem(uri)
        if isinstance(filesystem, LocalFileSystem):
            try:
                with created_local(Path(path)) as handle:
                    yield handle
            except OSError as error:
                raise refusal(uri, error) from error
            return
        with tempfile.TemporaryDirectory() as folder:
            gathered = Path(folder) / "file"
            with gathered.open("wb") as handle:
                yield handle
            self.operate(uri, lambda filesystem, path: filesystem.put_file(str(gathered), path))

    def remove(self, uri: str) -> None:
        """Delete one file."""
        self.operate(uri, lambda filesystem, path: filesystem.rm_file(path))

    def exists(self, uri: str) -> bool:
        """Return whether a file or folder is there, asking the store and not a cache."""

        def ask(filesystem: Any, path: str) -> bool:
            filesystem.invalidate_cache()
            return bool(filesystem.exists(path))

        return self.operate(uri, ask, listing=True)

    def glob(self, pattern: str) -> Iterator[Stored]:
        """Yield the files of a remote store that match a pattern, by path inside the filesystem, sorted."""
        if pattern.startswith("s3://"):
            filesystem, path = self.filesystem(pattern)
            bucket = path.partition("/")[0]
            with access_errors(pattern):
                for key, size, modified, tag in glob_s3(filesystem, path):
                    yield Stored(f"{bucket}/{key}", size, modified, tag)
            return
        found = self.operate(pattern, lambda fs, path: fs.glob(path, detail=True), listing=True)
        for name in sorted(found):
            if found[name]["type"] == "file":
                yield Stored(name, int(found[name]["size"]), None, found[name].get("ETag"))

    def open(self, uri: str, ahead: bool = True) -> Any:
        """Open for random reads (binary, seekable); remote reads are retried like everything else.

        `ahead`: whether more is fetched than was asked for, which saves requests where small parts are read in
        order. Without, every read is one request for just its bytes.
        """
        options = {} if ahead or is_local(uri) else {"cache_type": "none"}
        handle = self.operate(uri, lambda filesystem, path: filesystem.open(path, "rb", **options))
        return handle if is_local(uri) else io.BufferedReader(_RetriedReads(handle, uri), 8192 if ahead else 1)

    def list_files(self, uri: str) -> Iterator[tuple[str, int]]:
        """Yield (path relative to `uri`, size in bytes) of all files below it; see `list_stored`."""
        for stored in self.list_stored(uri):
            yield stored.name, stored.size

    def list_stored(self, uri: str) -> Iterator[Stored]:
        """Yield all files below a folder or prefix, in sorted order.

        Streams: S3 is read page by page, so a million keys cost about a thousand requests and little memory.
        """
        filesystem, path = self.filesystem(uri)
        with access_errors(uri):
            if isinstance(filesystem, LocalFileSystem):
                yield from _walk_local(Path(path), "")
            elif uri.startswith("s3://"):
                yield from (Stored(*found) for found in list_s3(filesystem, path))
            else:
                found = with_retries(lambda: filesystem.find(path, detail=True))
                for name in sorted(found):
                    yield Stored(name.removeprefix(path).lstrip("/"), int(found[name]["size"]), None)

    def spans(self, uri: str) -> Iterator[Span]:
        """Cut the listing of an s3:// prefix or pattern into spans, in order, for `list_span`."""
        filesystem, path = self.filesystem(uri)
        with access_errors(uri):
            yield from spans_s3(filesystem, path)

    def list_span(self, uri: str, span: Span) -> Iterator[Stored]:
        """Yield the objects of a span of a prefix or pattern, by path inside the filesystem, in order."""
        filesystem, path = self.filesystem(uri)
        bucket = path.partition("/")[0]
        with access_errors(uri):
            for key, size, modified, tag in list_span(filesystem, bucket, span):
                yield Stored(f"{bucket}/{key}", size, modified, tag)


def _by_client(places: Sequence[int], clients: Sequence[tuple[Any, str]]) -> Iterator[tuple[Any, list[int]]]:
    """Group places by their client: obstore's has one per bucket, fsspec's is one for all."""
    groups: dict[Any, tuple[Any, list[int]]] = {}
    for i in places:
        client = clients[i][0]
        key = client.bucket if isinstance(client, DirectS3) else ""
        groups.setdefault(key, (client, []))[1].append(i)
    yield from groups.values()


def _empty_if_out_of_range(data: bytes | Exception, start: int | None) -> bytes | Exception:
    """A range from byte 0 fails for one reason: the object has no bytes."""
    return b"" if start == 0 and isinstance(data, Exception) and error_code(data) == "InvalidRange" else data


class _RetriedReads(io.RawIOBase):
    """Retries for the reads of an fsspec file, whose cache and position survive a failed one."""

    def __init__(self, handle: Any, uri: str) -> None:
        self.handle, self.uri = handle, uri

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return int(self.handle.seek(offset, whence))

    def tell(self) -> int:
        return int(self.handle.tell())

    def readinto(self, buffer: Any, /) -> int:
        """Fill `buffer` from the file's position; a repeated attempt starts at the same place."""
        place = self.handle.tell()

        def attempt() -> bytes:
            self.handle.seek(place)
            data: bytes = self.handle.read(len(buffer))
            return data

        with access_errors(self.uri):
            data = with_retries(attempt)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self.handle.close()
        super().close()


def _walk_local(folder: Path, prefix: str) -> Iterator[Stored]:
    """Depth first in sorted order; follows links to files, not to folders (they may be circular)."""
    with os.scandir(folder) as entries:
        children = sorted(entries, key=lambda entry: entry.name)
    for entry in children:
        if entry.is_dir(follow_symlinks=False):
            yield from _walk_local(Path(entry.path), f"{prefix}{entry.name}/")
        elif entry.is_file():
            with suppress(FileNotFoundError):  # a run may be at work: temporary names come and go
                found = entry.stat()
                yield Stored(f"{prefix}{entry.name}", found.st_size, found.st_mtime)


def _open_filesystem(uri: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    """Return (fsspec filesystem, path inside it) for a remote URI. Raises StorageError."""
    scheme = uri.partition("://")[0]
    check_scheme(uri, scheme)
    if scheme in ("http", "https"):
        return web_filesystem(options), uri
    try:
        # Not fsspec.core.url_to_fs: that would chain file systems at "::".
        kind = fsspec.get_filesystem_class(scheme)
        filesystem, path = kind(**(kind._get_kwargs_from_urls(uri) | dict(options))), kind._strip_protocol(uri)
    except ImportError as error:
        package = _PACKAGES.get(scheme)
        remedy = f"pip install {package}" if package else explain(error)
        raise StorageError(f"{scheme}:// needs another package: {remedy}") from error
    except TypeError:  # its text may repeat values
        raise StorageError(f"{scheme}:// does not take these storage options: {', '.join(options)}") from None
    except Exception as error:  # every backend has its own for missing accounts and wrong options
        raise StorageError(f"cannot open {uri}: {explain(error)}; options go in --storage-option") from error
    return filesystem, path


_PACKAGES = {"gs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs", "adl": "adlfs"}
_PACKAGES |= {"hf": "huggingface_hub", "sftp": "paramiko", "ssh": "paramiko", "oss": "ossfs", "oci": "ocifs"}
