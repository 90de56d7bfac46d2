"""Read and write by URI: local paths and every fsspec backend, S3 first.

Writes are atomic: a reader sees a whole file or none. Options hold secrets (keys, tokens): they are never
part of a repr, a log line or a run folder.
"""

import os
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import StorageError

_S3_CLIENT = {
    # Stalls end in an error that is retried, never in a hang.
    "connect_timeout": 10,
    "read_timeout": 60,
    "retries": {"max_attempts": 6, "mode": "standard"},
    # Stores other than AWS send the whole object's checksum with a byte range, which then cannot match.
    "response_checksum_validation": "when_required",
    "request_checksum_calculation": "when_required",
}
_S3_PAGE = 1000  # keys per listing request, the protocol's maximum


@dataclass(frozen=True)
class Stored:
    """A file as a listing shows it."""

    name: str  # relative to what was listed
    size: int  # bytes
    modified: float | None  # seconds since 1970, by the store's clock; None if the backend does not say


@dataclass(frozen=True)
class Storage:
    """How to reach URIs. `options` go to fsspec (key, secret, endpoint_url, anon, ...); local paths need none."""

    options: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def filesystem(self, uri: str) -> tuple[Any, str]:
        """Return (fsspec filesystem, path inside it)."""
        if not uri.startswith("s3://"):
            filesystem, path = fsspec.core.url_to_fs(uri, **({} if is_local(uri) else dict(self.options)))
            return filesystem, path
        return fsspec.filesystem("s3", **s3_options(self.options)), uri.removeprefix("s3://").rstrip("/")

    def read(self, uri: str) -> bytes:
        """Return a file's bytes. Raises FileNotFoundError, or StorageError where access is refused."""
        filesystem, path = self.filesystem(uri)
        with access_errors(uri):
            data: bytes = filesystem.cat_file(path)
        return data

    def read_many(self, uris: Sequence[str], ranges: Sequence[tuple[int, int] | None]) -> list[bytes | Exception]:
        """Fetch files, or byte ranges [start, end) of them, concurrently where the backend can.

        An object that cannot be read is its exception in the result; the others are not affected.
        """
        results: list[bytes | Exception] = [b""] * len(uris)
        by_backend: dict[bool, list[int]] = {}
        for i, uri in enumerate(uris):
            by_backend.setdefault(is_local(uri), []).append(i)
        for members in by_backend.values():
            filesystem, _ = self.filesystem(uris[members[0]])
            paths = [self.filesystem(uris[i])[1] for i in members]
            starts = [None if (r := ranges[i]) is None else r[0] for i in members]
            ends = [None if (r := ranges[i]) is None else r[1] for i in members]
            fetched = filesystem.cat_ranges(paths, starts, ends, on_error="return")
            for i, data in zip(members, fetched, strict=True):
                results[i] = data
        return results

    def write(self, uri: str, data: bytes) -> None:
        """Write a whole file under its final name or not at all; an existing file is replaced.

        Local: temporary name, fsync, rename. Remote: one PUT, or one completed multipart upload.
        """
        filesystem, path = self.filesystem(uri)
        with access_errors(uri):
            if isinstance(filesystem, LocalFileSystem):
                _write_local(Path(path), data)
            else:
                filesystem.pipe_file(path, data)

    @contextmanager
    def create(self, uri: str) -> Iterator[BinaryIO]:
        """A file to fill step by step, as atomic as `write`: it appears when the block ends without an error.

        A remote file is gathered in the temporary folder first.
        """
        filesystem, path = self.filesystem(uri)
        if isinstance(filesystem, LocalFileSystem):
            try:
                with _created_local(Path(path)) as handle:
                    yield handle
            except OSError as error:
                raise StorageError(f"cannot write {uri}: {explain(error)}") from error
            return
        with tempfile.TemporaryDirectory() as folder:
            gathered = Path(folder) / "file"
            with gathered.open("wb") as handle:
                yield handle
            with access_errors(uri):
                filesystem.put_file(str(gathered), path)

    def remove(self, uri: str) -> None:
        """Delete one file."""
        filesystem, path = self.filesystem(uri)
        with access_errors(uri):
            filesystem.rm_file(path)

    def exists(self, uri: str) -> bool:
        """Return whether a file or folder is there, asking the store and not a cache."""
        filesystem, path = self.filesystem(uri)
        with access_errors(uri):
            filesystem.invalidate_cache()
            return bool(filesystem.exists(path))

    def open(self, uri: str) -> Any:
        """Open for random reads (binary, seekable)."""
        filesystem, path = self.filesystem(uri)
        with access_errors(uri):
            return filesystem.open(path, "rb")

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
                yield from _list_s3(filesystem, path)
            else:
                found = filesystem.find(path, detail=True)
                for name in sorted(found):
                    yield Stored(name.removeprefix(path).lstrip("/"), int(found[name]["size"]), None)


def is_local(uri: str) -> bool:
    """Return whether a URI is a path on this machine."""
    return "://" not in uri or uri.startswith("file://")


def join(uri: str, *parts: str) -> str:
    """Append path parts to a URI."""
    return "/".join([uri.rstrip("/") or "/", *parts])


def s3_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in time-outs, retries and the endpoint from the environment around the user's own options."""
    merged = dict(options)
    merged["config_kwargs"] = _S3_CLIENT | dict(merged.get("config_kwargs", {}))
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        merged.setdefault("endpoint_url", endpoint)
    # Listings must be fresh: a resumed run asks which shards exist.
    return merged | {"use_listings_cache": False}


@contextmanager
def access_errors(uri: str) -> Iterator[None]:
    """Turn a store's refusals into one clear StorageError; FileNotFoundError passes through."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot access {uri}: {explain(error)}") from error
    except Exception as error:
        if type(error).__module__.startswith(("botocore", "aiobotocore", "aiohttp")):
            raise StorageError(f"cannot access {uri}: {explain(error)}") from error
        raise


def explain(error: Exception) -> str:
    """One line on what a storage error means and what to check."""
    reason = (str(error).splitlines() or [""])[0][:300]
    hints = {
        "PermissionError": "check the credentials (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, or --storage-option)",
        "NoCredentialsError": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or --storage-option anon=true",
        "EndpointConnectionError": "check the endpoint (AWS_ENDPOINT_URL, or --storage-option endpoint_url=...)",
    }
    hint = hints.get(type(error).__name__)
    return f"{type(error).__name__}: {reason}" + (f"; {hint}" if hint else "")


def _write_local(path: Path, data: bytes) -> None:
    with _created_local(path) as handle:
        handle.write(data)


@contextmanager
def _created_local(path: Path) -> Iterator[BinaryIO]:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself must survive a power cut
    finally:
        os.close(folder)


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


def _list_s3(filesystem: Any, path: str) -> Iterator[Stored]:
    bucket, _, key = path.partition("/")
    prefix = f"{key}/" if key else ""
    page: dict[str, Any] = {}
    while True:
        token = page.get("NextContinuationToken")
        more = {"ContinuationToken": token} if token else {}
        try:
            page = filesystem.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=_S3_PAGE, **more)
        except filesystem_errors() as error:
            raise _translate_s3(error) from error
        for entry in page.get("Contents", []):
            if not entry["Key"].endswith("/"):  # zero-byte folder markers
                name, modified = entry["Key"].removeprefix(prefix), entry["LastModified"].timestamp()
                yield Stored(name, int(entry["Size"]), modified)
        if not page.get("IsTruncated"):
            return


def filesystem_errors() -> tuple[type[Exception], ...]:
    """The S3 client's own error type, imported only where S3 is used."""
    from botocore.exceptions import ClientError

    return (ClientError,)


def _translate_s3(error: Exception) -> Exception:
    from s3fs.errors import translate_boto_error

    translated: Exception = translate_boto_error(error)
    return translated
