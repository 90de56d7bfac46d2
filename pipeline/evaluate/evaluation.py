"""Evaluate a labeling run against a prepared benchmark, shard by shard.

evaluation/BENCHMARK-TRUTH/        inside the run folder
    evaluation.json                run and ground truth of the counts; written first
    counts/shard-000000.parquet    sparse integer counts per image (counts.py); its presence is the commit
    PROTOCOL/metrics.json, ...     results (page.py)

Counts are added as integers over images in the order of their ids, so a result does not depend on the number of
shards, actors or attempts.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa

from cliper.pipeline.errors import EvaluationError
from cliper.pipeline.evaluate.counts import COUNTS, Counts, ShardCounter, counts_file, merge, verify
from cliper.pipeline.evaluate.prepared import Prepared
from cliper.pipeline.evaluate.registry import DATASETS
from cliper.pipeline.parallel import Workers, crew
from cliper.pipeline.run.folder import Run, class_names, differences
from cliper.pipeline.run.shards import shards_in
from cliper.pipeline.storage.backend import Storage
from cliper.pipeline.storage.digests import checked, with_digest
from cliper.pipeline.storage.sealed import DamagedFileError, read_sealed
from cliper.pipeline.storage.uris import join

COUNTS_VERSION = 1
_READERS = 8  # threads, without other workers
_TOGETHER = 16  # files of one task


@dataclass(frozen=True)
class Evaluation:
    """An opened evaluation folder of a run."""

    run: Run
    prepared: Prepared
    folder: str
    count_failed: bool = False
    identity: Mapping[str, Any] = field(default_factory=dict)

    def counter(self, folder: str | None = None) -> ShardCounter:
        """The stage that counts a shard; it writes to the evaluation's folder unless another is given."""
        index = self.prepared.index()
        truths = dict(zip(index.column("image_id").to_pylist(), index.column("truth").to_pylist(), strict=True))
        return ShardCounter(
            run=self.run,
            folder=folder or self.folder,
            truth_uri=self.prepared.uri,
            storage=self.run.storage,
            truths=truths,
            classes=len(self.prepared.class_names),
            ignore_labels=self.prepared.ignore_labels,
            count_failed=self.count_failed,
        )

    def uncounted_shards(self) -> list[int]:
        """Shards that are labeled but not counted, in order."""
        return sorted(self.run.done_shards() - counted_shards(self.run.storage, self.folder))

    def read(self, workers: Workers = 1) -> Counts:
        """Sum the counts of all shards. Raises EvaluationError unless every image was counted exactly once."""
        table = read_counts(self.run.storage, self.folder, workers)
        verify(table, self.prepared.index())
        return merge(table, len(self.prepared.class_names))


def read_counts(storage: Storage, folder: str, workers: Workers = 1) -> pa.Table:
    """All counts in an evaluation folder: a table of COUNTS, sorted by image id."""
    files = [join(folder, counts_file(shard)) for shard in sorted(counted_shards(storage, folder))]
    tasks = [files[i : i + _TOGETHER] for i in range(0, len(files), _TOGETHER)]
    with crew(workers, most=len(tasks) // 2, threads=_READERS) as readers:
        tables = readers.map(partial(_counts_of, storage), tasks)
        return pa.concat_tables([COUNTS.empty_table(), *tables]).sort_by("image_id")


def _counts_of(storage: Storage, files: Sequence[str]) -> pa.Table:
    return pa.concat_tables([read_counts_file(storage, file, COUNTS) for file in files])


def read_counts_file(storage: Storage, uri: str, schema: pa.Schema) -> pa.Table:
    """The counts of one shard. Raises EvaluationError for a damaged file."""
    try:
        return read_sealed(storage.read(uri), schema)
    except (DamagedFileError, FileNotFoundError) as error:
        raise EvaluationError(f"{uri} is damaged ({error}); remove it and count again") from error


def counted_shards(storage: Storage, folder: str) -> set[int]:
    """The shards that have a file of counts."""
    try:
        names = [name for name, _ in storage.list_files(join(folder, "counts"))]
    except FileNotFoundError:
        return set()
    return shards_in(names)


def open_evaluation(run: Run, prepared: Prepared, count_failed: bool = False) -> Evaluation:
    """Create the evaluation folder in a run, or continue it.

    Raises EvaluationError if the run's classes differ from the benchmark's, or if the folder holds counts against
    another ground truth.
    """
    _check_classes(class_names(run.identity), prepared)
    identity = {
        "benchmark": prepared.benchmark,
        "truth_form": prepared.truth_form,
        "truth": prepared.fingerprint,
        "class_names": list(prepared.class_names),
        "ignore_labels": list(prepared.ignore_labels),
        "run": run.fingerprint,
        "count_failed": count_failed,
        "counts_version": COUNTS_VERSION,
    }
    folder = join(run.uri, "evaluation", f"{prepared.benchmark}-{prepared.truth_form}")
    file = join(folder, "evaluation.json")
    try:
        different = differences(checked(run.storage.read(file), required=False), identity)
    except FileNotFoundError:
        run.storage.write(file, with_digest(identity, indent=1))
        different = []
    except DamagedFileError as error:
        again = f"remove {folder}, and the same command counts again"
        raise EvaluationError(f"{file} is damaged ({error}); {again}") from error
    if different:
        raise EvaluationError(
            f"{folder} holds counts of another evaluation: {'; '.join(different)}. "
            "Remove that folder to count again"
        )
    return Evaluation(run, prepared, folder, count_failed, identity)


def _check_classes(names: tuple[str, ...], prepared: Prepared) -> None:
    wanted = prepared.class_names
    if names == wanted:
        return
    places = [k for k in range(max(len(names), len(wanted))) if names[k : k + 1] != wanted[k : k + 1]]
    k = places[0]
    raise EvaluationError(
        f"the run has {len(names)} classes and {prepared.benchmark} {len(wanted)}; class {k + 1} is "
        f"{_quoted(names, k)} in the run and {_quoted(wanted, k)} in the benchmark. "
        f"Label with the classes of the ground truth: cliper label --classes {_class_list(prepared)}"
    )


def _class_list(prepared: Prepared) -> str:
    """The value of --classes: a shipped list, or the file of the user's own images."""
    return (
        DATASETS[prepared.benchmark].classes
        or "ROOT/classes.txt, where ROOT is the folder given to 'cliper prepare'"
    )


def _quoted(names: Sequence[str], k: int) -> str:
    return f"'{names[k]}'" if k < len(names) else "absent"


def count_stored(evaluation: Evaluation, shards: Sequence[int], workers: Workers = 1) -> Iterator[dict[str, Any]]:
    """Count labeled shards; yields {shard, counted} after each commit.

    Raises EvaluationError for the first shard that cannot be counted; committed counts are kept.
    """
    if shards:  # the counter holds the benchmark's index
        yield from count_shards(evaluation.counter().stage, shards, workers)


def count_shards(
    stage: Callable[[pa.Table], pa.Table], shards: Sequence[int], workers: Workers
) -> Iterator[dict[str, Any]]:
    """Run a counting stage (see write_counts) on every shard; yields its summaries, checked, in order."""
    with crew(workers, most=len(shards) // 2) as counters:
        for summary in counters.map(partial(_count_shard, stage), shards):
            yield check_summary(summary)


def _count_shard(stage: Callable[[pa.Table], pa.Table], shard: int) -> dict[str, Any]:
    [summary] = stage(pa.table({"shard": [shard]})).to_pylist()
    return dict(summary)


def check_summary(summary: dict[str, Any]) -> dict[str, Any]:
    """Return the summary of a counted shard. Raises EvaluationError if it could not be counted."""
    if summary["problem"] is not None:
        raise EvaluationError(summary["problem"])
    return summary


def require_labeled(run: Run) -> None:
    """Raise EvaluationError if the labeling run is not finished, RunError if it has no manifest."""
    manifest = run.manifest()
    pending = run.pending_shards(manifest)
    if pending:
        raise EvaluationError(
            f"{run.uri} is not finished: {len(pending)} of {manifest.shards} shards are not labeled. Continue it "
            "with its own 'cliper label' command, then evaluate"
        )
