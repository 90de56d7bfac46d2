"""Local files: whatever a list names, a read ends; a file is written whole or not at all."""

import os
import stat
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from fsspec.implementations.local import LocalFileSystem

from cliper.pipeline.errors import ImageError, StorageError


def read_local(
    uris: Sequence[str], ranges: Sequence[tuple[int, int] | None], most: int
) -> list[bytes | Exception]:
    """Read files, or byte ranges [start, end) of them; one that cannot be read is its exception.

    Only regular files of at most `most` bytes are read: a FIFO would block, a device may never end.
    """
    return [_read(uri, wanted, most) for uri, wanted in zip(uris, ranges, strict=True)]


def local_path(uri: str) -> str:
    """The path of a local URI; what fsspec returns, in a tenth of the time for a path from the root."""
    return uri.rstrip("/") if uri.startswith("/") else LocalFileSystem._strip_protocol(uri)


def _read(uri: str, wanted: tuple[int, int] | None, most: int) -> bytes | Exception:
    try:
        # Not blocking: opening a FIFO without a writer waits for one.
        handle = os.open(local_path(uri), os.O_RDONLY | os.O_NONBLOCK)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        return error
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode):
        os.close(handle)
        return ImageError("unreadable", "not a regular file, but a folder, FIFO, socket or device")
    with os.fdopen(handle, "rb") as file:
        start, end = wanted or (0, found.st_size)
        if min(end, found.st_size) - start > most:
            return too_large(found.st_size, most)
        try:
            file.seek(start)
            return file.read(max(0, end - start))
        except OSError as error:
            return error


def too_large(size: int | None, most: int) -> ImageError:
    """The error of an object whose `size` is above what one image may have."""
    found = "more" if size is None else f"{size:,} bytes"
    return ImageError("oversized", f"{found}; an image file may have {most:,} bytes")


def write_local(path: Path, data: bytes) -> None:
    """Write a whole file or none."""
    with created_local(path) as handle:
        handle.write(data)


@contextmanager
def created_local(path: Path) -> Iterator[BinaryIO]:
    """A file to fill: it appears, synced to the disk, when the block ends without an error.

    Raises StorageError if its folder cannot be created.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:  # for a folder in /proc, for example
        raise StorageError(f"cannot access {path.parent}: it cannot be created") from error
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
