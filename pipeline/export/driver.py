"""Export a run: each shard independently, then the files that span shards. A repeated call resumes.

cliper-export.json        the plan and whether the export is finished; written first
cliper-images.jsonl       image_id, file name and uri of every image; skipped images with their reason
.cliper/00000000.jsonl    the records of one finished shard; removed at the end
"""

import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from cliper.model.errors import ConfigError
from cliper.pipeline.config import suggest
from cliper.pipeline.corpus.manifest import open_part, read_manifest
from cliper.pipeline.errors import ExportError, RunError
from cliper.pipeline.export.base import Exporter, Plan, Record, Records
from cliper.pipeline.export.folder import Folder, compact_json
from cliper.pipeline.export.items import LeftOut, read_items
from cliper.pipeline.export.names import clashing_names
from cliper.pipeline.export.options import Options
from cliper.pipeline.export.registry import EXPORTERS
from cliper.pipeline.extras import require
from cliper.pipeline.parallel import Workers, crew
from cliper.pipeline.run.corrections import Corrections, Version, read_corrections
from cliper.pipeline.run.folder import Run, class_names, differences
from cliper.pipeline.run.reader import labeled_shards, shard_digests
from cliper.pipeline.run.rows import RowFilter, read_tables
from cliper.pipeline.storage.backend import Storage
from cliper.pipeline.storage.digests import checked, with_digest
from cliper.pipeline.storage.sealed import DamagedFileError
from cliper.pipeline.storage.uris import absolute, join

MARKER = "cliper-export.json"
LISTING = "cliper-images.jsonl"
_PARTS = ".cliper"


@dataclass(frozen=True)
class Summary:
    """Counts of a finished export."""

    uri: str
    images: int
    left_out: dict[str, int]  # reason to count
    splits: dict[str, int]  # images by split; empty for a format without splits
    iou: float | None  # of simplified polygons with the masks; None if they are exact
    shards: int
    seconds: float  # of this call


def make_plan(run: Run, to: str, keep: RowFilter, images: bool = False, options: Options | None = None) -> Plan:
    """The plan of an export, its options checked. Raises ExportError for an unknown format, ConfigError."""
    exporter, chosen = find_exporter(to), options or Options()
    exporter.refuse_other_options(to, chosen)
    chosen.check(class_names(run.identity))
    if chosen.val_share is None:
        chosen = replace(chosen, val_share=exporter.val_share or 0.0)
    return Plan(to, run.uri, run.fingerprint, class_names(run.identity), keep, images, chosen)


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
    the format cannot represent the run, or if the output holds anything but this export, and ConfigError or
    FilterError for options that do not fit the run.
    """
    started, uri = time.monotonic(), absolute(uri)
    exporter = find_exporter(plan.format)
    plan.keep.check(plan.run_classes)
    _check_groups(run, plan.options.split_by)
    needs = exporter.needs if plan.edit is None else (*exporter.needs, "scipy")
    require("export", f"the format {plan.format}", *needs)
    exporter.check(plan)
    shards = labeled_shards(run)
    if not shards:
        raise RunError(f"{run.uri} has no finished shard; label it first (cliper label)")
    corrections = read_corrections(run, corrected)
    marker = open_output(run, plan, uri, shards, corrections)
    if "images" in marker:
        _remove_parts(run.storage, uri)
        return _summary(uri, marker, shards, started)
    plan = replace(plan, clashing=clashing_names(_ids(run)))
    todo = sorted(set(shards) - _finished(run.storage, uri))
    work = _Work(run, plan, exporter if workers == "ray" else None, uri, corrections)
    _export_shards(work, todo, workers, len(shards) - len(todo), on_shard)
    done = marker | _finish(run.storage, exporter, plan, uri, shards)
    run.storage.write(join(uri, MARKER), with_digest(done, indent=2))
    _remove_parts(run.storage, uri)
    return _summary(uri, done, shards, started)


def _summary(uri: str, done: Mapping[str, Any], shards: Sequence[int], started: float) -> Summary:
    seconds = time.monotonic() - started
    return Summary(uri, done["images"], done["left_out"], done["splits"], done["iou"], len(shards), seconds)


def find_exporter(name: str) -> Exporter:
    """The exporter of a format. Raises ExportError for an unknown one."""
    if name not in EXPORTERS:
        raise ExportError(f"unknown format '{name}'; {suggest(name, EXPORTERS)}")
    return EXPORTERS[name]


def open_output(run: Run, plan: Plan, uri: str, shards: Sequence[int], corrections: Corrections) -> dict[str, Any]:
    """Start or resume the output folder; returns its marker. Raises ExportError if it holds anything else."""
    wanted = {
        "format": plan.format,
        "run_fingerprint": plan.fingerprint,
        "filter": json.loads(compact_json(asdict(plan.keep))),
        "images_copied": plan.images,
        "options": json.loads(compact_json(asdict(plan.options))),
        "shards": len(shards),
        "content": _content(run, shards, corrections),
    }
    named = {"run": run.uri} | wanted
    try:
        stored = checked(run.storage.read(join(uri, MARKER)), required=False)
    except FileNotFoundError:
        _refuse_foreign_folder(run.storage, uri)
        run.storage.write(join(uri, MARKER), with_digest(named, indent=2))
        return named
    except DamagedFileError as error:
        raise ExportError(f"{join(uri, MARKER)} is damaged ({error}); choose another --output") from error
    different = differences({key: stored.get(key) for key in wanted}, wanted)
    if different:
        raise ExportError(
            f"{uri} holds another export: {'; '.join(different)}. Remove it, or choose another --output"
        )
    return stored


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


def _check_groups(run: Run, split_by: str) -> None:
    """Raise ConfigError for a regular expression that no image id matches, e.g. a misspelt "folder"."""
    if split_by in ("image", "folder"):
        return
    if not any(re.search(split_by, image_id) for ids in _ids(run) for image_id in ids):
        raise ConfigError(
            f"--split-by '{split_by}' matches no image id; it is image, folder or a regular expression over ids"
        )


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
    exporter: Exporter | None  # for tasks of Ray, whose processes do not import a user's program; else by name
    uri: str
    corrections: Corrections

    def __call__(self, shard: int) -> None:
        """Export one shard; its records file is written last and is the commit."""
        exporter = self.exporter or EXPORTERS[self.plan.format]
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
        lines.append(hashlib.sha256(b"\n".join(lines)).hexdigest().encode())
        self.run.storage.write(_part(self.uri, shard), b"\n".join(lines))


def _export_shards(
    work: _Work, shards: Sequence[int], workers: Workers, before: int, on_shard: Callable[[int, int], None]
) -> None:
    with crew(workers, most=len(shards)) as writers:
        for done, _ in enumerate(writers.map(work, shards), before + 1):
            on_shard(done, before + len(shards))


def _finish(storage: Storage, exporter: Exporter, plan: Plan, uri: str, shards: Sequence[int]) -> dict[str, Any]:
    """Write the files that span shards; returns the counts of `Summary` by name."""

    def lines() -> Iterator[Record]:
        for shard in shards:
            yield from _records(storage, _part(uri, shard))

    reasons: Counter[str] = Counter()
    splits: Counter[str] = Counter()
    overlap = np.zeros(2)
    has_splits = exporter.val_share is not None
    kept = ("image_id", "name", "uri", *(["split"] if has_splits else []), "left_out")
    with Folder(storage, uri) as folder:
        with folder.create(LISTING) as listing:
            for record in lines():
                listing.write(compact_json({key: record[key] for key in kept if key in record}) + b"\n")
                reasons[record.get("left_out", "")] += 1
                splits[record.get("split", "")] += 1
                overlap += record.get("overlap", (0, 0))
        exporter.finish(Records(lambda: (r for r in lines() if "left_out" not in r)), folder, plan)
    del splits[""]
    images, iou = reasons.pop("", 0), float(overlap[0] / overlap[1]) if overlap[1] else None
    return {"images": images, "left_out": dict(reasons), "splits": dict(splits) if has_splits else {}, "iou": iou}


def _records(storage: Storage, part: str) -> Iterator[Record]:
    """The records of a shard's file, whose last line is the SHA-256 of the others. Raises ExportError."""
    *lines, digest = storage.read(part).split(b"\n")
    if hashlib.sha256(b"\n".join(lines)).hexdigest().encode() != digest:
        raise ExportError(f"{part} is damaged; remove it, and the same command exports its shard again")
    return map(json.loads, lines)


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
