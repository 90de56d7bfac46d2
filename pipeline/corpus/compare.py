"""Compare a new listing of the corpus with the manifest: what is new, vanished, or no longer as it was listed.

Memory: 57 bytes per image of the manifest, and the entries that differ.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from cliper.pipeline.corpus.manifest import Manifest, read_part
from cliper.pipeline.corpus.sources.entry import MTIME, Entry
from cliper.pipeline.errors import InputError
from cliper.pipeline.storage.backend import Storage

CHUNK = 4096  # entries looked up at once

# changed: another image (size, ETag, tar header, URI). touched: the same size, but a file of another modification
# time, which a copy changes as well. moved: the same image at another place in its tar or Parquet file.
Kind = Literal["changed", "touched", "moved"]


@dataclass(frozen=True)
class Difference:
    """An image that is listed otherwise than in the manifest; `entry` is as it is now."""

    kind: Kind
    shard: int
    entry: Entry
    reason: str


@dataclass
class Comparison:
    """The result, complete when `new_entries` is used up."""

    known: int  # images of the manifest
    new: int = 0
    differences: list[Difference] = field(default_factory=list)
    vanished: int = 0  # images of the manifest that are not listed any more
    vanished_rows: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))  # their places, ascending
    first_new: str = ""


class Known:
    """The manifest's images as arrays, in its order; `order` sorts their ids."""

    def __init__(self, storage: Storage, run_uri: str, manifest: Manifest) -> None:
        """Read the whole manifest. Raises RunError for a damaged file."""
        self.ends = np.cumsum(manifest.counts)
        ids = np.empty(manifest.images, "S16")
        self.facts = np.empty((manifest.images, 4), np.int64)  # URI, size, stamp, place
        place = 0
        for part in manifest.parts:
            for shard in read_part(storage, run_uri, part):
                for entry in shard:
                    ids[place], self.facts[place] = _digest(entry.image_id), facts(entry)
                    place += 1
        self.order = np.argsort(ids)
        self.ids = ids[self.order]
        self.seen = np.zeros(manifest.images, bool)

    def places(self, entries: list[Entry]) -> np.ndarray:
        """The place in the manifest of each entry's id, int64 [n]; -1 if it has none."""
        wanted = np.array([_digest(entry.image_id) for entry in entries], "S16")
        at = np.minimum(np.searchsorted(self.ids, wanted), len(self.ids) - 1)
        return np.where(self.ids[at] == wanted, self.order[at], -1)

    def shard_of(self, place: int) -> int:
        """The shard of a place in the manifest."""
        return int(np.searchsorted(self.ends, place, side="right"))


def new_entries(known: Known, listed: Iterable[Entry], found: Comparison) -> Iterator[Entry]:
    """Yield the entries whose id is not in the manifest; the others are compared, with the result in `found`.

    Raises InputError for an id of the manifest that is listed twice.
    """
    for chunk in _chunks(listed):
        for entry, place in zip(chunk, known.places(chunk).tolist(), strict=True):
            if place < 0:
                found.new += 1
                found.first_new = found.first_new or entry.image_id
                yield entry
                continue
            if known.seen[place]:
                raise InputError(f"image_id '{entry.image_id}' occurs twice: again {entry.place}; {entry.remedy}")
            known.seen[place] = True
            change = _change(known.facts[place].tolist(), entry)
            if change is not None:
                found.differences.append(Difference(change[0], known.shard_of(place), entry, change[1]))
    found.vanished_rows = np.flatnonzero(~known.seen)
    found.vanished = len(found.vanished_rows)


def facts(entry: Entry) -> tuple[int, int, int, int]:
    """URI, size, stamp and place of an entry, as numbers; size -1 and stamp 0 if the listing has none.

    The size of a row of a Parquet file is that of its row group's average row, which is no fact about it.
    """
    size = -1 if entry.bytes is None or entry.row is not None else entry.bytes
    place = _number(f"{entry.offset} {entry.row} {entry.group}")
    return _number(entry.uri), size, 0 if entry.stamp is None else _number(entry.stamp), place


def _change(before: list[int], entry: Entry) -> tuple[Kind, str] | None:
    uri, size, stamp, place = facts(entry)
    if before[0] != uri:
        return "changed", f"is at {entry.uri} now"
    if before[1] != size and -1 not in (before[1], size):
        return "changed", f"{size:,} bytes; {before[1]:,} were listed"
    if before[2] != stamp and 0 not in (before[2], stamp):
        if entry.stamp is not None and entry.stamp.startswith(MTIME):
            return "touched", "the same size, another modification time"
        return "changed", "another ETag" if entry.offset is None else "another header in the tar"
    return ("moved", f"is at {entry.place} now") if before[3] != place else None


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


def _chunks(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    chunk: list[Entry] = []
    for entry in entries:
        chunk.append(entry)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
