"""Prove that a run is whole: every image of the manifest in exactly one row, every row as it was written.

A run passes if, for every shard, the ids and URIs of its file are the manifest's in order; if every page passes
its CRC and the rows their digest (shards.py); if every mask decodes to its image's size, with labels of the
classes and the pixel counts of its row; and if every row that has no mask says why. As ids are unique in the
manifest (checked here as well), that puts each image in exactly one row.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import pyarrow as pa

from cliper.pipeline.corpus.ids import IdHashes, id_hashes
from cliper.pipeline.corpus.manifest import Manifest, Part, open_part, refuse_collisions
from cliper.pipeline.errors import InputError, RunError, StorageError
from cliper.pipeline.parallel import Workers, cpus, crew
from cliper.pipeline.run.changed import changed_file, changed_shards, read_changed
from cliper.pipeline.run.check import Problem, ShardCheck, ShardJob, check_shard
from cliper.pipeline.run.folder import Run, class_names
from cliper.pipeline.run.leftovers import Orphan, orphan_files, orphan_uploads
from cliper.pipeline.run.shards import shard_number

SHARDS_PER_PROCESS = 8  # fewer are not worth starting another process for
SHOWN = 100  # problems kept with their words; all are counted

# Kinds of problem and the unit of each count. A run with none of them is whole.
KINDS = {
    "unfinished": "shards without a file",
    "missing": "images without a readable row",
    "doubled": "rows of an image that has one already",
    "foreign": "rows of images that are not in the shard",
    "outdated": "images that were replaced and are not labeled again yet",
    "other_uri": "rows with another URI than the manifest's",
    "misplaced": "files whose rows are not in the manifest's order",
    "unreadable": "files that cannot be read back",
    "wrong_checksum": "files whose rows are not those that were written",
    "wrong_identity": "files of another run or other classes",
    "wrong_mask": "masks of another size, or other labels than their row says",
    "no_reason": "rows without a mask that do not say why",
    "orphans": "files and uploads that no part of the run needs",
}


@dataclass
class Report:
    """The findings. `problems` holds the first SHOWN, `notes` the checks that could not be made."""

    shards: int
    images: int
    rows: int = 0
    failed: int = 0  # rows that say why they have no mask: not a problem
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)
    orphans: list[Orphan] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    source: dict[str, int] | None = None  # images by finding, if they were compared with their source
    broken_shards: list[int] = field(default_factory=list)  # with a file that was changed after it was written

    @property
    def whole(self) -> bool:
        """Whether nothing at all is wrong."""
        return not self.counts.total()

    def add(self, problem: Problem) -> None:
        """Count a problem, and keep its words while there are few."""
        self.counts[problem.kind] += problem.count
        if len(self.problems) < SHOWN:
            self.problems.append(problem)

    def merge(self, check: ShardCheck) -> None:
        """Add one shard."""
        shard = shard_number(check.file.removeprefix("labels/"))
        if check.problems and shard is not None:
            self.broken_shards.append(shard)
        self.rows += check.rows
        self.failed += check.failed
        for problem in check.problems:
            self.add(problem)

    def to_json(self) -> str:
        """The report as JSON; every kind is there, also at 0."""
        content = {
            "whole": self.whole,
            "shards": self.shards,
            "images": self.images,
            "rows": self.rows,
            "failed": self.failed,
            **{kind: self.counts[kind] for kind in KINDS},
            "problems": [vars(problem) for problem in self.problems],
            "notes": self.notes,
            "source": self.source,
        }
        return json.dumps(content, indent=1, ensure_ascii=False)


def verify_run(run: Run, workers: Workers | None = None) -> Report:
    """Read a whole run back and check it, shard by shard by `workers` (default: as many processes as CPUs).

    Memory: a few shards per worker, one part of the manifest, and what IdHashes takes. Raises RunError if there
    is no manifest, StorageError where the store refuses access.
    """
    manifest = run.manifest()
    report = Report(manifest.shards, manifest.images)
    done = run.done_shards()
    with IdHashes() as ids, crew(workers or cpus(), most=math.ceil(len(done) / SHARDS_PER_PROCESS)) as readers:
        for check in readers.map(check_shard, _jobs(run, manifest, done, report, ids)):
            report.merge(check)
    for shard in changed_shards(run):
        report.add(_outdated(run, shard))
    _look_for_orphans(run, manifest, done, report)
    return report


def _outdated(run: Run, shard: int) -> Problem:
    try:
        count = len(read_changed(run, shard))
    except RunError as error:
        return Problem("unreadable", changed_file(shard), str(error))
    return Problem("outdated", changed_file(shard), f"{count} images; the run's 'cliper label' labels them", count)


def _jobs(run: Run, manifest: Manifest, done: set[int], report: Report, hashes: IdHashes) -> Iterator[ShardJob]:
    """The checks of every finished shard; reports shards without a file and problems of the manifest."""
    names, readable = class_names(run.identity), True
    for part in manifest.parts:
        try:
            shards = read_ids(run, part)
        except (RunError, StorageError, pa.ArrowException, OSError) as error:
            readable = False
            report.add(Problem("unreadable", f"manifest/{part.file}", f"{type(error).__name__}: {error}"))
            report.add(Problem("missing", f"manifest/{part.file}", "all of its images", sum(part.images)))
            continue
        for shard, (ids, uris) in enumerate(shards, part.first_shard):
            hashes.add(id_hashes(ids))
            if shard in done:
                yield ShardJob(run.storage, run.uri, shard, ids, run.fingerprint, names, uris if part.seal else ())
            else:
                report.add(Problem("unfinished", f"shard {shard}", f"{len(ids)} images are not labeled yet"))
                report.counts["missing"] += len(ids)
    try:
        if readable:
            refuse_collisions(hashes, manifest, run.storage, run.uri)
    except InputError as error:
        report.add(Problem("doubled", "manifest", str(error)))


def read_ids(run: Run, part: Part) -> list[tuple[list[str], list[str]]]:
    """The image ids and URIs of each shard of a manifest file. Raises the errors of Parquet and storage."""
    with open_part(run.storage, run.uri, part, whole=True) as file:
        groups = (file.read_row_group(i, columns=["image_id", "uri"]) for i in range(len(part.images)))
        return [(group["image_id"].to_pylist(), group["uri"].to_pylist()) for group in groups]


def _look_for_orphans(run: Run, manifest: Manifest, done: set[int], report: Report) -> None:
    report.orphans += orphan_files(run, manifest, done)
    try:
        report.orphans += orphan_uploads(run)
    except StorageError as error:
        report.notes.append(f"incomplete uploads were not looked for: {error}")
    for orphan in report.orphans:
        report.add(Problem("orphans", orphan.file, orphan.reason))
