"""Whether the ids of a corpus differ: 64 bits of each are compared, in bounded memory."""

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType

import numpy as np

HELD = 1_000_000  # hashes in memory; more go to files in the temporary folder
BUCKETS = 64  # files, by the first bits of the hash
SUSPECTS = 10_000  # doubled hashes that are given out at once


def id_hashes(ids: Sequence[str]) -> np.ndarray:
    """64 bits that stand for each id, uint64 [n]."""
    return np.frombuffer(b"".join(blake2b(text.encode(), digest_size=8).digest() for text in ids), np.uint64)


class IdHashes:
    """Collects hashes and finds those that occur twice. A context manager, which removes its files.

    Memory: 8 bytes for each of up to HELD hashes; behind that, 8 bytes each on disk, and one of BUCKETS files in
    memory at the end: 13 MB for 100 million.
    """

    def __init__(self) -> None:
        self._held: list[np.ndarray] = []
        self._count = 0
        self._folder: TemporaryDirectory[str] | None = None

    def __enter__(self) -> "IdHashes":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def add(self, hashes: np.ndarray) -> None:
        """Add hashes, uint64 [n]."""
        self._held.append(hashes)
        self._count += len(hashes)
        if self._count > HELD:
            self._spill()

    def doubled(self) -> Iterator[np.ndarray]:
        """The hashes that were added more than once, at most SUSPECTS at a time, ascending."""
        if self._folder is None:
            yield from _doubled(self._held)
            return
        self._spill()
        for bucket in range(BUCKETS):
            yield from _doubled([np.fromfile(self._file(bucket), np.uint64)])

    def _spill(self) -> None:
        self._folder = self._folder or TemporaryDirectory(prefix="cliper-ids-")
        hashes = np.sort(np.concatenate([np.empty(0, np.uint64), *self._held]))
        self._held, self._count = [], 0
        borders = np.arange(1, BUCKETS, dtype=np.uint64) * np.uint64(2**64 // BUCKETS)
        for bucket, some in enumerate(np.split(hashes, np.searchsorted(hashes, borders))):
            with self._file(bucket).open("ab") as file:
                some.tofile(file)

    def _file(self, bucket: int) -> Path:
        assert self._folder is not None
        return Path(self._folder.name) / str(bucket)


def _doubled(parts: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    hashes = np.sort(np.concatenate([np.empty(0, np.uint64), *parts]))
    found = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
    for first in range(0, len(found), SUSPECTS):
        yield found[first : first + SUSPECTS]
