"""Compute failed rows of a run again, and put the new rows into the shards' files.

A shard's file is replaced whole and atomically, so an interrupted retry leaves every shard as it was before or as
it is after. A row that is fine is never touched, whatever a repeated task may find.
"""

import re
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import pyarrow as pa

from cliper.model.classes import ClassList
from cliper.pipeline.config import JobConfig, validate
from cliper.pipeline.corpus.manifest import Manifest
from cliper.pipeline.errors import RunError
from cliper.pipeline.parallel import map_ahead
from cliper.pipeline.run.check import read_labels
from cliper.pipeline.run.folder import Run, differences, identity_of
from cliper.pipeline.run.reader import damaged, open_shard
from cliper.pipeline.run.schema import COLUMNS, by_name
from cliper.pipeline.run.shards import shard_file
from cliper.pipeline.run.status import READERS, failures_of
from cliper.pipeline.storage.uris import join

_COUNTS = re.compile(r"([^/]+)/counts/(shard-\d{6,}\.parquet)")  # below evaluation/, see evaluate/evaluation.py


@dataclass(frozen=True)
class Failed:
    """Failed images of one shard, in its order, and how often each was tried."""

    image_ids: list[str]
    tried: list[int]


def stored_settings(run: Run) -> tuple[JobConfig, ClassList]:
    """The settings and classes a run was labeled with, from run.json; resources are not among them.

    Raises ConfigError for settings this version does not know.
    """
    source = join(run.uri, "run.json")
    content = {key: value for key, value in run.identity.items() if key in JobConfig.model_fields}
    table = run.identity["classes"]
    classes = ClassList.parse([table[label] for label in sorted(table, key=int)], source)
    return validate(JobConfig, content, source), classes


def require_same(run: Run, config: JobConfig, classes: ClassList, weights: Mapping[str, str]) -> None:
    """Raise RunError if this version of cliper and these weights would write other rows than the run holds."""
    now = identity_of(config, classes, run.identity["input_uri"], weights)
    different = differences(run.identity, now)
    if different:
        raise RunError(
            f"{run.uri} was labeled differently: {'; '.join(different[:3])}. Rows of both would not fit together; "
            "install that version, restore those weights, or label again with --new-run"
        )


def find_failed(run: Run, manifest: Manifest, error_types: Collection[str] = ()) -> dict[int, Failed]:
    """The failed images of every finished shard, of all types unless some are given.

    Reads footers, and of shards with failures three small columns. Raises RunError for a file that is damaged.
    """
    shards = sorted(shard for shard in run.done_shards() if shard < manifest.shards)
    with ThreadPoolExecutor(READERS) as pool:
        found = map_ahead(pool, lambda shard: _failed_in(run, shard, error_types), shards, ahead=2 * READERS)
        return {shard: failed for shard, failed in zip(shards, found, strict=True) if failed.image_ids}


def _failed_in(run: Run, shard: int, error_types: Collection[str]) -> Failed:
    causes = failures_of(run, shard)
    if causes is not None and not any(not error_types or cause in error_types for cause in causes):
        return Failed([], [])
    with open_shard(run, shard) as file:
        rows = file.read(["image_id", "error_type", "attempts"]).to_pylist()
    chosen = [
        r for r in rows if r["error_type"] is not None and (not error_types or r["error_type"] in error_types)
    ]
    return Failed([row["image_id"] for row in chosen], [row["attempts"] for row in chosen])


def with_tries(loaded: pa.Table, failed: Failed) -> pa.Table:
    """Add column `tried` to loaded images: how often each was tried before."""
    tried = dict(zip(failed.image_ids, failed.tried, strict=True))
    counts = [tried[image_id] for image_id in loaded.column("image_id").to_pylist()]
    return loaded.append_column("tried", pa.array(counts, pa.int32()))


def merge_into_shard(run: Run, block: pa.Table, keep_ok: bool = True) -> pa.Table:
    """Lay new rows of one shard, a table of `shard` and COLUMNS, over its file: all its rows, for write_shard.

    `keep_ok`: see `merge_rows`. Raises RunError for a file that is damaged.
    """
    [shard] = block.column("shard").unique().to_pylist()
    try:
        old = by_name(read_labels(run.storage.read(join(run.uri, shard_file(shard)))), COLUMNS)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged(run, shard, error) from error
    merged = merge_rows(old, block.drop_columns(["shard"]), keep_ok)
    return merged.add_column(0, "shard", pa.array([shard] * len(merged), pa.int32()))


def merge_rows(old: pa.Table, new: pa.Table, keep_ok: bool = True) -> pa.Table:
    """`old` with its rows replaced by those of `new` with the same image_id; the order stays.

    Both are tables of COLUMNS. With `keep_ok`, only failed rows are replaced. New rows of other images are left
    out.
    """
    places = {image_id: len(old) + i for i, image_id in enumerate(new.column("image_id").to_pylist())}
    rows = zip(old.column("image_id").to_pylist(), old.column("status").to_pylist(), strict=True)
    chosen = [
        i if keep_ok and status == "ok" else places.get(image_id, i) for i, (image_id, status) in enumerate(rows)
    ]
    return pa.concat_tables([old, new.cast(old.schema)]).take(pa.array(chosen, pa.int64()))


def forget_counts(run: Run, shards: Collection[int]) -> None:
    """Remove the counts of evaluations in these shards, and their results: both are about to be out of date."""
    folder, wanted = join(run.uri, "evaluation"), {shard_file(shard).rpartition("/")[2] for shard in shards}
    try:
        files = [name for name, _ in run.storage.list_files(folder)]
    except FileNotFoundError:
        return
    counts = [(match[1], name) for name in files if (match := _COUNTS.fullmatch(name)) and match[2] in wanted]
    stale = {evaluation for evaluation, _ in counts}
    results = [n for n in files if n.endswith("/metrics.json") and n.partition("/")[0] in stale]
    for name in [*results, *(name for _, name in counts)]:  # results first: where they are, all is counted
        with suppress(FileNotFoundError):
            run.storage.remove(join(folder, name))
