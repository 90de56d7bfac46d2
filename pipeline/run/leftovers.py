"""Find leftovers of interrupted work in a run folder, and remove those whose names cliper writes."""

import re
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass

from cliper.pipeline.corpus.manifest import Manifest
from cliper.pipeline.run.attempts import attempted_shard
from cliper.pipeline.run.folder import Run
from cliper.pipeline.run.shards import shard_number
from cliper.pipeline.storage.uploads import abort_upload, incomplete_uploads
from cliper.pipeline.storage.uris import join

_PART = re.compile(r"part-\d{5,}(-\d+)?\.parquet")
_TEMPORARY = re.compile(r"\.[^/]+\.[0-9a-f]{32}\.tmp")  # see storage.local.created_local


@dataclass(frozen=True)
class Orphan:
    """A file, or an incomplete S3 upload, that no part of the run needs."""

    file: str  # relative to the run folder
    reason: str
    ours: bool = True  # written by cliper: may be removed
    upload_id: str | None = None


def orphan_files(run: Run, manifest: Manifest, done: Collection[int]) -> Iterator[Orphan]:
    """Yield the orphaned files of a run folder. `done`: the shards that have a file.

    Temporary files of a running driver look the same.
    """
    for name, _ in run.storage.list_files(run.uri):
        orphan = judge(name, manifest.shards, done)
        if orphan is not None:
            yield orphan
    for name in unnamed_parts(run, manifest):
        yield Orphan(f"manifest/{name}", "not named by manifest/index.json")


def unnamed_parts(run: Run, manifest: Manifest) -> list[str]:
    """Manifest files that the index does not name, relative to `manifest/`: left by an interrupted extension."""
    named = {part.file for part in manifest.parts}
    names = (name for name, _ in run.storage.list_files(join(run.uri, "manifest")))
    return [name for name in names if _PART.fullmatch(name) and name not in named]


def orphan_uploads(run: Run) -> Iterator[Orphan]:
    """Yield incomplete uploads below the run's prefix. Raises StorageError if the store does not list them."""
    for name, upload_id in incomplete_uploads(run.storage, run.uri):
        yield Orphan(name, "an upload that was never completed", upload_id=upload_id)


def judge(name: str, shards: int, done: Collection[int]) -> Orphan | None:
    """Classify an orphaned file; None if the file is needed, or lies in evaluations or foreign folders."""
    if _TEMPORARY.fullmatch(name.rpartition("/")[2]):
        return Orphan(name, "left by an interrupted write")
    if name.startswith("attempts/") and attempted_shard(name.removeprefix("attempts/")) in done:
        return Orphan(name, "attempts at a finished shard")
    if name.startswith("labels/"):
        shard = shard_number(name.removeprefix("labels/"))
        if shard is None:
            return Orphan(name, "not the file of a shard", ours=False)
        if shard >= shards:
            return Orphan(name, f"the manifest has {shards} shards", ours=False)
    return None


def clean_run(run: Run) -> Iterator[Orphan]:
    """Remove the orphans that are ours, and yield each. Raises RunError or StorageError."""
    manifest = run.manifest()
    for orphan in [*orphan_files(run, manifest, run.done_shards()), *orphan_uploads(run)]:
        if orphan.ours:
            remove_orphan(run, orphan)
            yield orphan


def remove_orphan(run: Run, orphan: Orphan) -> None:
    """Delete the file, or abort the upload. Raises ValueError for a file that cliper did not write."""
    if not orphan.ours:
        raise ValueError(f"{orphan.file} is not ours to remove")
    uri = join(run.uri, orphan.file)
    if orphan.upload_id is None:
        with suppress(FileNotFoundError):
            run.storage.remove(uri)
    else:
        abort_upload(run.storage, uri, orphan.upload_id)
