"""Export a run: each shard independently, then the files that span shards. A repeated call resumes.

cliper-export.json        the plan and whether the export is finished; written first
cliper-images.jsonl       image_id, file name and uri of every image; skipped images with their reason
.cliper/00000000.jsonl    the records of one finished shard; removed at the end
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from cliper.pipeline.corpus.manifest import open_part, read_manifest
from cliper.pipeline.errors import ExportError, RunError
from cliper.pipeline.export.base import Exporter, Plan, Record, Records
from cliper.pipeline.export.folder import Folder, compact_json
from cliper.pipeline.export.items import LeftOut, read_items
from cliper.pipeline.export.names import clashing_names
from cliper.pipeline.export.registry import EXPORTERS
from cliper.pipeline.extras import require
from cliper.pipeline.parallel import Workers, crew
from cliper.pipeline.run.corrections import Corrections, Version, read_corrections
from cliper.pipeline.run.folder import Run, differences
from cliper.pipeline.run.reader import labeled_shards, shard_digests
from cliper.pipeline.run.rows import read_tables
from cliper.pipeline.storage.backend import Storage, absolute, join

MARKER = "cliper-export.json"
LISTING = "cliper-images.jsonl"
_PARTS = ".cliper"


@dataclass(frozen=True)
class Summary:
    """Counts of a finished export."""

    uri: str
    images: int
    left_out: dict[str, int]  # reason to count
    shards: int
    seconds: float  # of this call


def export(
    run: Run,
    plan: Plan,
    uri: str,
    workers: Workers = 1,
    corrected: Version = "latest",
    on_shard: Callable[[int, int], None] = lambda done, total: None,
) -> Summary:
    """Write a run's finished shards to `uri` in the format of `plan`; `on_shard` is called with (finished, all).

    Each worker holds one shard in memory; on Ray, every node writes its own shards to `uri`. Raises ExportError if
    the format cannot represent the run, or if the output holds anything but this export.
    """
    started = time.monotonic()
    exporter = find_exporter(plan.format)
    plan.keep.check(plan.class_names)
    require("export", f"the format {plan.format}", *exporter.needs)
    exporter.check(plan)
    shards = labeled_shards(run)
    if not shards:
        raise RunError(f"{run.uri} has no finished shard; label it first (cliper label)")
    corrections = read_corrections(run, corrected)
    marker = open_output(run, plan, uri, shards, corrections)
    if "images" in marker:
        _remove_parts(run.storage, uri)
        return Summary(uri, marker["images"], marker["left_out"], len(shards), time.monotonic() - started)
    plan = replace(plan, clashing=clashing_names(_ids(run)))
    todo = sorted(set(shards) - _finished(run.storage, uri))
    _export_shards(_Work(run, plan, absolute(uri), corrections), todo, workers, len(shards) - len(todo), on_shard)
    images, left_out = _finish(run.storage, exporter, plan, uri, shards)
    done = marker | {"images": images, "left_out": left_out}
    run.storage.write(join(uri, MARKER), json.dumps(done, indent=2, ensure_ascii=False).encode())
    _remove_parts(run.storage, uri)
    return Summary(uri, images, left_out, len(shards), time.monotonic() - started)


def find_exporter(name: str) -> Exporter:
    """The exporter of a format. Raises ExportError for an unknown one."""
    if name not in EXPORTERS:
        raise ExportError(f"unknown format '{name}'; known: {', '.join(sorted(EXPORTERS))}")
    return EXPORTERS[name]


def open_output(run: Run, plan: Plan, uri: str, shards: Sequence[int], corrections: Corrections) -> dict[str, Any]:
    """Start or resume the output folder; returns its marker. Raises ExportError if it holds anything else."""
    wanted = {
        "format": plan.format,
        "run": run.uri,
        "run_fingerprint": plan.fingerprint,
        "filter": json.loads(compact_json(asdict(plan.keep))),
        "images_copied": plan.images,
        "val_share": plan.val_share,
        "shards": len(shards),
        "content": _content(run, shards, corrections),
    }
    try:
        stored = json.loads(run.storage.read(join(uri, MARKER)))
    except FileNotFoundError:
        _refuse_foreign_folder(run.storage, uri)
        run.storage.write(join(uri, MARKER), json.dumps(wanted, indent=2, ensure_ascii=False).encode())
        return wanted
    except json.JSONDecodeError as error:
        raise ExportError(f"{join(uri, MARKER)} is damaged; choose another --output") from error
    different = differences({key: stored.get(key) for key in wanted}, wanted)
    if different:
        raise ExportError(
            f"{uri} holds another export: {'; '.join(different)}. Remove it, or choose another --output"
        )
    found: dict[str, Any] = stored
    return found


def _content(run: Run, shards: Sequence[int], corrections: Corrections) -> str:
    """Changes when the run gets more shards, other rows or corrections."""
    digest = hashlib.sha256(json.dumps(shard_digests(run, shards)).encode())
    for image_id, at in zip(*(corrections.rows[c].to_pylist() for c in ("image_id", "corrected_at")), strict=True):
        digest.update(f"{image_id}\0{at}\0".encode())
    return digest.hexdigest()[:16]


def _refuse_foreign_folder(storage: Storage, uri: str) -> None:
    try:
        first = next(iter(storage.list_files(uri)), None)
    except (FileNotFoundError, NotADirectoryError):
        return
    if first is not None:
        raise ExportError(f"{uri} is not empty and not an export (it holds {first[0]}); choose another --output")


def _ids(run: Run) -> Iterator[list[str]]:
    """Every image id of the corpus, labeled or not, so that names do not depend on progress or filter."""
    manifest = read_manifest(run.storage, run.uri)
    if manifest is None:
        yield from (table["image_id"].to_pylist() for table in read_tables(run, ["image_id"]))
        return
    for part in manifest.parts:
        with open_part(run.storage, run.uri, part) as file:
            yield file.read(["image_id"])["image_id"].to_pylist()


@dataclass(frozen=True)
class _Work:
    """The task of a worker: everything needed to export one shard."""

    run: Run
    plan: Plan
    uri: str
    corrections: Corrections

    def __call__(self, shard: int) -> None:
        """Export one shard; its records file is written last and is the commit."""
        exporter = EXPORTERS[self.plan.format]
        left_out: list[LeftOut] = []

        def items() -> Iterator[Any]:
            for item in read_items(self.run, shard, self.plan, exporter, self.corrections):
                if isinstance(item, LeftOut):
                    left_out.append(item)
                else:
                    yield item

        with Folder(self.run.storage, self.uri) as folder:
            lines = [compact_json(record) for record in exporter.shard(items(), folder, self.plan, shard)]
        lines += [compact_json({"image_id": item.image_id, "left_out": item.reason}) for item in left_out]
        self.run.storage.write(_part(self.uri, shard), b"\n".join(lines))


def _export_shards(
    work: _Work, shards: Sequence[int], workers: Workers, before: int, on_shard: Callable[[int, int], None]
) -> None:
    with crew(workers, most=len(shards)) as writers:
        for done, _ in enumerate(writers.map(work, shards), before + 1):
            on_shard(done, before + len(shards))


def _finish(
    storage: Storage, exporter: Exporter, plan: Plan, uri: str, shards: Sequence[int]
) -> tuple[int, dict[str, int]]:
    """Write the files that span shards; returns the exported images, and the skipped ones by reason."""

    def lines() -> Iterator[Record]:
        for shard in shards:
            yield from map(json.loads, storage.read(_part(uri, shard)).splitlines())

    reasons: Counter[str] = Counter()
    images = 0
    with Folder(storage, uri) as folder:
        with folder.create(LISTING) as listing:
            for record in lines():
                kept = {
                    key: record[key] for key in ("image_id", "name", "uri", "split", "left_out") if key in record
                }
                listing.write(compact_json(kept) + b"\n")
                reasons[record.get("left_out", "")] += 1
        images = reasons.pop("", 0)
        exporter.finish(Records(lambda: (r for r in lines() if "left_out" not in r)), folder, plan)
    return images, dict(reasons)


def _part(uri: str, shard: int) -> str:
    return join(uri, _PARTS, f"{shard:08d}.jsonl")


def _finished(storage: Storage, uri: str) -> set[int]:
    return {int(name.partition(".")[0]) for name in _part_names(storage, uri)}


def _part_names(storage: Storage, uri: str) -> list[str]:
    try:
        return [name for name, _ in storage.list_files(join(uri, _PARTS)) if not name.startswith(".")]
    except FileNotFoundError:
        return []


def _remove_parts(storage: Storage, uri: str) -> None:
    for name in _part_names(storage, uri):
        storage.remove(join(uri, _PARTS, name))
