"""The manifest: every image of the corpus, listed once, cut into shards, stored as Parquet in the run folder.

manifest/part-00000.parquet    one row group per shard
manifest/index.json            written last: the manifest counts only when it is there
"""

import hashlib
import itertools
import json
import math
from array import array
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cliper.pipeline.config import ActorRange, JobConfig, ShardConfig
from cliper.pipeline.corpus.cut import cut_shards
from cliper.pipeline.corpus.ids import IdHashes, id_hashes
from cliper.pipeline.corpus.left_out import LeftOut
from cliper.pipeline.corpus.sources import Entry
from cliper.pipeline.corpus.sources.tables import ENTRIES, entries_of, tables_of
from cliper.pipeline.errors import InputError, RunError
from cliper.pipeline.parallel import Crew, crew
from cliper.pipeline.storage.backend import Storage
from cliper.pipeline.storage.sealed import SEAL, DamagedFileError, SealedWriter, check_seal, open_sealed
from cliper.pipeline.storage.uris import join

SHARDS_PER_PART = 1000
AHEAD = 16  # files of a manifest that are written at the same time, at most
SHARDS_OF_SMALL = 32  # at least, for a small corpus; or SHARDS_PER_ACTOR times the actors
SHARDS_PER_ACTOR = 4

SCHEMA = ENTRIES.append(pa.field("shard", pa.int32(), nullable=False))


@dataclass(frozen=True)
class Part:
    """One manifest file and the shards in it: row group i is shard `first_shard + i`."""

    file: str
    first_shard: int
    images: Sequence[int]  # per shard; an array, since the manifest goes to every task of the flow
    seal: str = ""  # digest of the file's footer; "" in manifests of before

    @property
    def end(self) -> int:
        """The shard after the last."""
        return self.first_shard + len(self.images)

    def count(self, shard: int) -> int:
        """Number of images in a shard of this file."""
        return self.images[shard - self.first_shard]

    def to_json(self) -> dict[str, Any]:
        """The part as a dict, for `from_json`."""
        return asdict(self) | {"images": list(self.images)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Part":
        """The part of `to_json`. Raises KeyError or TypeError for other content."""
        return cls(**{**content, "images": array("i", content["images"])})


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
        return sum(self.part_of(shard).count(shard) for shard in shards)

    def part_of(self, shard: int) -> Part:
        """The file that lists a shard."""
        return self.parts[bisect_right(self.parts, shard, key=lambda part: part.first_shard) - 1]

    def read_shard(self, storage: Storage, run_uri: str, shard: int) -> list[Entry]:
        """Return the entries of one shard, in order."""
        part = self.part_of(shard)
        with open_part(storage, run_uri, part) as file:
            return entries_of(file.read_row_group(shard - part.first_shard))


def read_part(storage: Storage, run_uri: str, part: Part) -> list[list[Entry]]:
    """The entries of every shard of a manifest file, in order. Raises as `open_part` does."""
    with open_part(storage, run_uri, part, whole=True) as file:
        return [entries_of(file.read_row_group(group)) for group in range(len(part.images))]


def write_manifest(
    entries: Iterable[Entry],
    storage: Storage,
    run_uri: str,
    limits: ShardConfig,
    on_progress: Callable[[int], None] = lambda count: None,
    left_out: LeftOut | None = None,
) -> Manifest:
    """`write_listed` for single entries."""
    left_out = LeftOut() if left_out is None else left_out
    with crew(1) as team:
        return write_listed(tables_of(entries), storage, run_uri, limits, team, on_progress, left_out)


def write_listed(
    tables: Iterable[pa.Table],
    storage: Storage,
    run_uri: str,
    limits: ShardConfig,
    team: Crew,
    on_progress: Callable[[int], None],
    left_out: LeftOut,
) -> Manifest:
    """Cut tables of ENTRIES into shards and write the manifest; its files are written by the crew.

    Memory: AHEAD files (40 MB each), and a bounded part of the ids (see IdHashes). `left_out`: the files that the
    listing skips; kept in the index. Raises InputError for an empty corpus or two images with one id.
    """
    with IdHashes() as ids:
        parts = write_parts(tables, [], storage, run_uri, limits, team, ids, on_progress)
        if not parts:
            raise InputError("no images found; check the input, or its format in the config (input.format)")
        manifest = Manifest(parts, left_out)
        refuse_collisions(ids, manifest, storage, run_uri)
    write_index(manifest, storage, run_uri)
    return manifest


def write_parts(
    tables: Iterable[pa.Table],
    before: Sequence[Part],
    storage: Storage,
    run_uri: str,
    limits: ShardConfig,
    team: Crew,
    ids: IdHashes,
    on_progress: Callable[[int], None] = lambda count: None,
) -> list[Part]:
    """Cut tables into the shards that follow those of `before`, write their files, and add all ids to `ids`.

    Returns the new parts, which no index names yet.
    """
    parts: list[Part] = []
    drafts = _drafts(cut_shards(_counted(tables, on_progress), limits), before)
    for part, hashes in team.map(partial(_write_draft, storage, run_uri), drafts, AHEAD):
        parts.append(part)
        ids.add(hashes)
    return parts


def _counted(tables: Iterable[pa.Table], report: Callable[[int], None]) -> Iterator[pa.Table]:
    rows = 0
    for table in tables:
        rows += len(table)
        report(rows)
        yield table


@dataclass(frozen=True)
class _Draft:
    """A manifest file to be written: its entries, and its Part without a seal."""

    part: Part
    table: pa.Table


def _drafts(shards: Iterable[tuple[pa.Table, list[int]]], before: Sequence[Part]) -> Iterator[_Draft]:
    """Files of SHARDS_PER_PART shards each."""
    number, first = len(before), before[-1].end if before else 0
    tables: list[pa.Table] = []
    counts: list[int] = []
    for table, images in shards:
        row, shard = 0, 0
        while shard < len(images):
            more = images[shard : shard + SHARDS_PER_PART - len(counts)]
            tables.append(table.slice(row, sum(more)))
            counts += more
            row, shard = row + sum(more), shard + len(more)
            if len(counts) == SHARDS_PER_PART:
                yield _draft(number, first, counts, tables)
                number, first, tables, counts = number + 1, first + len(counts), [], []
    if counts:
        yield _draft(number, first, counts, tables)


def _draft(number: int, first: int, counts: list[int], tables: list[pa.Table]) -> _Draft:
    part = Part(f"part-{number:05d}.parquet", first, array("i", counts))
    return _Draft(part, pa.concat_tables(tables).combine_chunks())


def _write_draft(storage: Storage, run_uri: str, draft: _Draft) -> tuple[Part, np.ndarray]:
    hashes = id_hashes(draft.table.column("image_id").to_pylist())
    return write_part(draft.part, draft.table, storage, run_uri), hashes


def write_index(manifest: Manifest, storage: Storage, run_uri: str) -> None:
    """Put a manifest into force: its files count from now on, and no others."""
    index = {"parts": [part.to_json() for part in manifest.parts], "left_out": manifest.left_out.to_json()}
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
            [Part.from_json(part) for part in content["parts"]], LeftOut.from_json(content.get("left_out", {}))
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


def fitting_shards(config: JobConfig, tables: Iterator[pa.Table]) -> tuple[ShardConfig, Iterator[pa.Table]]:
    """Limits that cut few images into enough shards for all actors, and the same tables.

    A shard is at least a batch. Row groups of Parquet files are not cut smaller, and neither is anything if the
    configuration names `shard.images`.
    """
    limits, actors = config.shard, config.resources.actors
    most = actors.max if isinstance(actors, ActorRange) else actors or 0
    wanted = max(SHARDS_OF_SMALL, SHARDS_PER_ACTOR * most)
    first: list[pa.Table] = []
    rows = 0
    for table in tables:
        first.append(table)
        rows += len(table)
        if rows >= wanted * limits.images:
            break
    tables = itertools.chain(first, tables)
    grouped = any(table.column("group").null_count < len(table) for table in first)
    if "images" in limits.model_fields_set or grouped:
        return limits, tables
    images = max(config.batch_size, math.ceil(rows / wanted))
    return limits.model_copy(update={"images": min(limits.images, images)}), tables


def write_part(part: Part, table: pa.Table, storage: Storage, run_uri: str) -> Part:
    """Write one manifest file, of entries in the order of the shards; returns the part with its seal."""
    writer = SealedWriter(SCHEMA, compression="zstd")
    row = 0
    for shard, count in enumerate(part.images, part.first_shard):
        number = pa.array(np.full(count, shard, np.int32))
        writer.write(pa.table([*table.slice(row, count).columns, number], SCHEMA), count)
        row += count
    data = writer.close()
    storage.write(join(run_uri, "manifest", part.file), data)
    return replace(part, seal=check_seal(data))


def refuse_collisions(ids: IdHashes, manifest: Manifest, storage: Storage, run_uri: str) -> None:
    """Raise InputError if two images of the manifest have one id; `ids` are the hashes of them all.

    Compares the hashes first, and the ids themselves only where two hashes agree.
    """
    for suspects in ids.doubled():
        _refuse_same(set(suspects.tolist()), manifest, storage, run_uri)


def _refuse_same(suspects: Collection[int], manifest: Manifest, storage: Storage, run_uri: str) -> None:
    seen: dict[str, Entry] = {}
    for part in manifest.parts:
        for entry in itertools.chain.from_iterable(read_part(storage, run_uri, part)):
            if int(id_hashes([entry.image_id])[0]) not in suspects:
                continue
            if entry.image_id in seen:
                raise InputError(
                    f"image_id '{entry.image_id}' occurs twice: {seen[entry.image_id].place} and {entry.place}; "
                    f"{entry.remedy}"
                )
            seen[entry.image_id] = entry
