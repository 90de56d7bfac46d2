"""The output folder of an export, local or S3. A few threads write small files, since each write waits for I/O."""

import json
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, BinaryIO

from cliper.pipeline.storage.backend import Storage
from cliper.pipeline.storage.uris import join

THREADS = 8
_WAITING = 4 * THREADS  # files held in memory at most


class Folder:
    """Writes files by name below `uri`; as a context manager it waits for all of them, or raises."""

    def __init__(self, storage: Storage, uri: str) -> None:
        self.storage, self.uri = storage, uri
        self._pool = ThreadPoolExecutor(THREADS)
        self._pending: deque[Future[None]] = deque()

    def write(self, name: str, data: bytes) -> None:
        """Write a file in the background; a later call may raise its error."""
        if len(self._pending) >= _WAITING:
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(self.storage.write, join(self.uri, name), data))

    def create(self, name: str) -> AbstractContextManager[BinaryIO]:
        """Open a file for streaming; it appears when the block ends without an error."""
        return self.storage.create(join(self.uri, name))

    def __enter__(self) -> "Folder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)
        if kind is None:
            for pending in self._pending:
                pending.result()


def compact_json(value: Any) -> bytes:
    """JSON without spaces, non-ASCII characters unescaped."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def write_list(handle: BinaryIO, values: Iterable[Any]) -> None:
    """Write a JSON list, one value at a time."""
    handle.write(b"[")
    for i, value in enumerate(values):
        handle.write(b",\n" if i else b"\n")
        handle.write(compact_json(value))
    handle.write(b"\n]")


def write_object(handle: BinaryIO, members: Iterator[tuple[str, Any]]) -> None:
    """Write a JSON object; members that are iterators become lists, written one value at a time."""
    for i, (key, value) in enumerate(members):
        handle.write((b",\n" if i else b"{\n") + compact_json(key) + b": ")
        if isinstance(value, Iterator):
            write_list(handle, value)
        else:
            handle.write(compact_json(value))
    handle.write(b"\n}\n")
