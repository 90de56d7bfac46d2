"""Write a small file only if no other process has written it meanwhile; the basis of the lease.

Local disks decide by a lock on the folder. S3 decides by conditional PUTs (If-None-Match, If-Match), which AWS,
MinIO, R2 and recent Ceph honour; some stores ignore the condition, some refuse it. Where nobody decides, the
outcome says so, and the caller has to wait and read back.
"""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from cliper.pipeline.errors import StorageError
from cliper.pipeline.storage.backend import Storage
from cliper.pipeline.storage.direct import DirectS3
from cliper.pipeline.storage.refusals import access_errors, refusal
from cliper.pipeline.storage.retry import error_code
from cliper.pipeline.storage.uris import is_local

# "unconditional": written, but another writer may overwrite it at the same moment.
Outcome = Literal["done", "refused", "unconditional"]

_REFUSED = ("PreconditionFailed", "ConditionalRequestConflict", "412", "409")
_NOT_OFFERED = ("NotImplemented", "501", "InvalidArgument", "InvalidRequest", "400")


def read_versioned(storage: Storage, uri: str) -> tuple[bytes, str] | None:
    """Return (content, version) of a file, or None if it is not there; the version changes with the content."""
    try:
        content, version = (
            storage.operate(uri, _content_and_tag) if uri.startswith("s3://") else (storage.read(uri), "")
        )
    except FileNotFoundError:
        return None
    return content, version or _digest(content)


def write_if(storage: Storage, uri: str, content: bytes, version: str | None) -> Outcome:
    """Write the whole file if it is still at `version`; None: if it is not there. Raises StorageError."""
    if is_local(uri):
        folder = Path(storage.filesystem(uri)[1]).parent
        with access_errors(uri), _locked(folder) as locked:
            return _check_and_write(storage, uri, content, version, locked)
    if uri.startswith("s3://"):
        return _put_if(storage, uri, content, version)
    return _check_and_write(storage, uri, content, version, False)


def decides(storage: Storage, uri: str, content: bytes) -> bool:
    """Return whether conditions count, for a file that was just written with `content`.

    Creating it again must be refused; a store that ignores the condition writes the same content once more.
    """
    return write_if(storage, uri, content, None) == "refused"


def _check_and_write(storage: Storage, uri: str, content: bytes, version: str | None, locked: bool) -> Outcome:
    found = read_versioned(storage, uri)
    if version != (found and found[1]):
        return "refused"
    storage.write(uri, content)
    return "done" if locked else "unconditional"


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold the lock of a folder, made if need be; False where the file system has none for folders (NFS)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # FileNotFoundError in /proc, for example
        raise refusal(str(folder), error) from error
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _put_if(storage: Storage, uri: str, content: bytes, version: str | None) -> Outcome:
    condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}

    def put(filesystem: Any, path: str) -> None:
        if isinstance(filesystem, DirectS3):
            filesystem.put_if(path, content, version)
            return
        bucket, _, key = path.partition("/")
        filesystem.call_s3("put_object", Bucket=bucket, Key=key, Body=content, **condition)

    try:
        storage.operate(uri, put)
    except FileNotFoundError:
        if version is None:
            raise  # there is no such bucket
        return "refused"
    except StorageError as error:
        code = error_code(error)
        if code in _REFUSED:
            return "refused"
        if code not in _NOT_OFFERED:
            raise
        storage.write(uri, content)
        return "unconditional"
    return "done"


def _content_and_tag(filesystem: Any, path: str) -> tuple[bytes, str | None]:
    """An S3 object's content and ETag."""
    if isinstance(filesystem, DirectS3):
        return filesystem.read_versioned(path)
    # The tag is asked for before the content: if both change in between, a write on this tag is refused.
    tag: str = filesystem.info(path, refresh=True)["ETag"]
    return filesystem.cat_file(path), tag


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
