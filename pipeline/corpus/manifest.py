"""The manifest: every image of the corpus, listed once, cut into shards, stored as Parquet in the run folder.

manifest/part-00000.parquet    one row group per shard
manifest/index.json            written last: the manifest counts only when it is there
"""

import hashlib
import itertools
import json
import math
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cliper.pipeline.config import ActorRange, JobConfig, ShardConfig
from cliper.pipeline.corpus.left_out import LeftOut
from cliper.pipeline.corpus.sources import Entry
from cliper.pipeline.corpus.sources.parquet import by_row_group
from cliper.pipeline.errors import InputError, RunError
from cliper.pipeline.storage.backend import Storage, join
from cliper.pipeline.storage.sealed import SEAL, DamagedFileError, SealedWriter, check_seal, open_sealed

SHARDS_PER_PART = 1000
SHARDS_OF_SMALL = 32  # at least, for a small corpus; or SHARDS_PER_ACTOR times the actors
SHARDS_PER_ACTOR = 4
LARGE_GROUP = 32  # times the images of a shard: a row group of more is split, and then read more than once
LARGE_BYTES = 4  # the same, times its bytes

SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("bytes", pa.int64()),  # encoded size; null if the source does not say
        pa.field("offset", pa.int64()),  # first byte inside `uri`, for members of a tar
        pa.field("row", pa.int64()),  # row inside `uri`, for images stored in Parquet
        pa.field("group", pa.int32()),  # row group of `row`
        pa.field("stamp", pa.string()),  # see Entry; null in manifests of before
        pa.field("shard", pa.int32(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Part:
    """One manifest file and the shards in it: row group i is shard `first_shard + i`."""

    file: str
    first_shard: int
    images: list[int]  # per shard
    seal: str = ""  # digest of the file's footer; "" in manifests of before

    @property
    def end(self) -> int:
        """The shard after the last."""
        return self.first_shard + len(self.images)


@dataclass(frozen=True)
class Manifest:
    """The index of a written manifest, with the counts of skipped files."""

    parts: list[Part]
    left_out: LeftOut = field(default_factory=LeftOut)

    @property
    def shards(self) -> int:
        """Number of shards."""
        return self.parts[-1].end

    @property
    def counts(self) -> list[int]:
        """Number of images of every shard."""
        return [count for part in self.parts for count in part.images]

    @property
    def images(self) -> int:
        """Number of images."""
        return sum(self.counts)

    def images_in(self, shards: Collection[int]) -> int:
        """Number of images in the given shards."""
        counts = self.counts
        return sum(counts[shard] for shard in shards)

    def part_of(self, shard: int) -> Part:
        """The file that lists a shard."""
        return next(p for p in reversed(self.parts) if p.first_shard <= shard)

    def read_shard(self, storage: Storage, run_uri: str, shard: int) -> list[Entry]:
        """Return the entries of one shard, in order."""
        part = self.part_of(shard)
        with open_part(storage, run_uri, part) as file:
            return _entries(file.read_row_group(shard - part.first_shard))


def read_part(storage: Storage, run_uri: str, part: Part) -> list[list[Entry]]:
    """The entries of every shard of a manifest file, in order. Raises as `open_part` does."""
    with open_part(storage, run_uri, part, whole=True) as file:
        return [_entries(file.read_row_group(group)) for group in range(len(part.images))]


def _entries(rows: pa.Table) -> list[Entry]:
    return [Entry(**{k: v for k, v in row.items() if k != "shard"}) for row in rows.to_pylist()]


def write_manifest(
    entries: Iterable[Entry],
    storage: Storage,
    run_uri: str,
    limits: ShardConfig,
    on_progress: Callable[[int], None] = lambda count: None,
    left_out: LeftOut | None = None,
) -> Manifest:
    """Cut `entries` into shards and write the manifest; memory stays at one part plus 8 bytes per image.

    `left_out`: the files that the listing skips; kept in the index. Raises InputError for an empty corpus or two
    images with one id.
    """
    parts, ids = write_parts(entries, [], storage, run_uri, limits, on_progress)
    if not parts:
        raise InputError("no images found; check the input, or its format in the config (input.format)")
    manifest = Manifest(parts, LeftOut() if left_out is None else left_out)
    refuse_collisions(ids, manifest, storage, run_uri)
    write_index(manifest, storage, run_uri)
    return manifest


def write_parts(
    entries: Iterable[Entry],
    before: Sequence[Part],
    storage: Storage,
    run_uri: str,
    limits: ShardConfig,
    on_progress: Callable[[int], None] = lambda count: None,
) -> tuple[list[Part], "array[int]"]:
    """Cut `entries` into the shards that follow those of `before`, and write their files.

    Returns the new parts, which no index names yet, and the `id_hash` of every entry.
    """
    parts, ids = list(before), array("Q")
    pending: list[list[Entry]] = []
    for shard in cut_shards(entries, limits):
        ids.extend(id_hash(entry.image_id) for entry in shard)
        on_progress(len(ids))
        pending.append(shard)
        if len(pending) == SHARDS_PER_PART:
            parts.append(_write_part(pending, parts, storage, run_uri))
            pending = []
    if pending:
        parts.append(_write_part(pending, parts, storage, run_uri))
    return parts[len(before) :], ids


def write_index(manifest: Manifest, storage: Storage, run_uri: str) -> None:
    """Put a manifest into force: its files count from now on, and no others."""
    index = {"parts": [asdict(part) for part in manifest.parts], "left_out": manifest.left_out.to_json()}
    content = json.dumps(index | {"digest": _digest(index)})
    storage.write(join(run_uri, "manifest", "index.json"), content.encode())


def read_manifest(storage: Storage, run_uri: str) -> Manifest | None:
    """Return the run's manifest, or None if it was never completed. Raises RunError if its index is damaged."""
    file = join(run_uri, "manifest", "index.json")
    try:
        content = json.loads(storage.read(file))
        stored = content.pop("digest", None)
        if stored is not None and stored != _digest(content):
            raise RunError(f"{file} is damaged: its content is not what was written; {_RESTORE}")
        return Manifest(
            [Part(**part) for part in content["parts"]], LeftOut.from_json(content.get("left_out", {}))
        )
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{file} is damaged ({type(error).__name__}); {_RESTORE}") from error


_RESTORE = "restore it from a copy, or label into another folder (--new-run)"


def _digest(index: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


@contextmanager
def open_part(storage: Storage, run_uri: str, part: Part, whole: bool = False) -> Iterator[pq.ParquetFile]:
    """A manifest file; data read inside the block is checked, with `whole` to the last byte.

    Raises RunError if it is missing, damaged, or another one.
    """
    place = join(run_uri, "manifest", part.file)
    try:
        with storage.open(place) as handle:
            file = open_sealed(handle, whole)
            if part.seal and (file.metadata.metadata or {}).get(SEAL.encode(), b"")[7:71].decode() != part.seal:
                raise DamagedFileError("it is another run's")
            yield file
    except FileNotFoundError as error:
        raise RunError(f"{place} is not there; {_RESTORE}") from error
    except (DamagedFileError, pa.ArrowException, OSError, ValueError, IndexError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise RunError(f"{place} is damaged ({reason}); {_RESTORE}") from error


def fitting_shards(config: JobConfig, entries: Iterator[Entry]) -> tuple[ShardConfig, Iterator[Entry]]:
    """Limits that cut few images into enough shards for all actors, and the same entries.

    A shard is at least a batch. Row groups of Parquet files are not cut smaller, and neither is anything if the
    configuration names `shard.images`.
    """
    limits, actors = config.shard, config.resources.actors
    most = actors.max if isinstance(actors, ActorRange) else actors or 0
    wanted = max(SHARDS_OF_SMALL, SHARDS_PER_ACTOR * most)
    first = list(itertools.islice(entries, wanted * limits.images))
    entries = itertools.chain(first, entries)
    if "images" in limits.model_fields_set or any(entry.group is not None for entry in first):
        return limits, entries
    images = max(config.batch_size, math.ceil(len(first) / wanted))
    return limits.model_copy(update={"images": min(limits.images, images)}), entries


def cut_shards(entries: Iterable[Entry], limits: ShardConfig) -> Iterator[list[Entry]]:
    """Group entries in order; a shard closes at `limits.images` or before it exceeds `limits.megabytes`.

    A row group of a Parquet file is not split, so that it is read once, unless it exceeds the limits many times.
    """
    shard: list[Entry] = []
    size = 0
    for unit in _units(entries, limits):
        extra = sum(entry.bytes or 0 for entry in unit)
        if shard and (len(shard) + len(unit) > limits.images or size + extra > limits.megabytes * 2**20):
            yield shard
            shard, size = [], 0
        shard += unit
        size += extra
    if shard:
        yield shard


def _units(entries: Iterable[Entry], limits: ShardConfig) -> Iterator[list[Entry]]:
    """Entries that stay in one shard: a single one, or those of a row group."""
    for group in by_row_group(entries):
        size = sum(entry.bytes or 0 for entry in group)
        if len(group) <= LARGE_GROUP * limits.images and size <= LARGE_BYTES * limits.megabytes * 2**20:
            yield group
        else:
            yield from ([entry] for entry in group)


def _write_part(shards: list[list[Entry]], parts: list[Part], storage: Storage, run_uri: str) -> Part:
    first = parts[-1].end if parts else 0
    return write_part(f"part-{len(parts):05d}.parquet", first, shards, storage, run_uri)


def write_part(file: str, first: int, shards: list[list[Entry]], storage: Storage, run_uri: str) -> Part:
    """Write one manifest file; `first` is the number of its first shard."""
    part = Part(file, first, [len(shard) for shard in shards])
    writer = SealedWriter(SCHEMA, compression="zstd")
    for number, shard in enumerate(shards, first):
        columns = {name: [getattr(entry, name) for entry in shard] for name in SCHEMA.names[:-1]}
        columns["shard"] = [number] * len(shard)
        writer.write(pa.Table.from_pydict(columns, SCHEMA), len(shard))
    data = writer.close()
    storage.write(join(run_uri, "manifest", part.file), data)
    return replace(part, seal=check_seal(data))


def id_hash(image_id: str) -> int:
    """64 bits that stand for an id; see `refuse_collisions`."""
    return int.from_bytes(hashlib.blake2b(image_id.encode(), digest_size=8).digest(), "big")


def refuse_collisions(ids: "array[int]", manifest: Manifest, storage: Storage, run_uri: str) -> None:
    """Raise InputError if two images of the manifest have one id; `ids` are the `id_hash` of them all.

    Compares the hashes first, and the ids themselves only where two hashes agree. Sorts `ids`.
    """
    hashes = np.frombuffer(ids, dtype=np.uint64)
    hashes.sort()  # in place: a copy would double the memory
    suspects = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    if not suspects:
        return
    seen: dict[str, Entry] = {}
    for shard in range(manifest.shards):
        for entry in manifest.read_shard(storage, run_uri, shard):
            if id_hash(entry.image_id) not in suspects:
                continue
            if entry.image_id in seen:
                raise InputError(
                    f"image_id '{entry.image_id}' occurs twice: {seen[entry.image_id].place} and {entry.place}; "
                    f"{entry.remedy}"
                )
            seen[entry.image_id] = entry
