"""Evaluate many settings on a benchmark: thresholds of CLIPer with one pass of its networks, or any settings.

sweep/DIGEST/                   inside the run folder; the digest identifies variants and ground truth
    sweep.json                  the variants and the ground truth; written first
    counts/shard-000000.parquet sparse counts per image and variant
    sweep.csv, sweep.md         the results, the best first

With thresholds, the networks run once per image, and every variant's labels are computed from the same scores.
With other settings, every variant is a segmenter that labels the image. Labels are counted immediately, so only
counts are stored.
"""

import csv
import hashlib
import io
import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cliper.model.config import CLIPerConfig, LabelConfig, Settings
from cliper.model.errors import CliperError
from cliper.pipeline.config import JobConfig, validate
from cliper.pipeline.corpus.decode import Decoded, decode, to_file_grid
from cliper.pipeline.errors import EvaluationError, ImageError
from cliper.pipeline.evaluate.benchmarks import merged
from cliper.pipeline.evaluate.counts import COUNTS, ShardCounter, counts_file, merge, verify
from cliper.pipeline.evaluate.evaluation import Evaluation, check_summary, counted_shards, read_counts_file
from cliper.pipeline.evaluate.metrics import Protocol, score
from cliper.pipeline.evaluate.prepared import Prepared
from cliper.pipeline.evaluate.results import percent
from cliper.pipeline.label.job import Job
from cliper.pipeline.label.pool import Pool
from cliper.pipeline.label.segmenters import CLIPerSegmenter, chosen
from cliper.pipeline.label.stages import Tasks, load_task
from cliper.pipeline.run.masks import decode_png
from cliper.pipeline.storage.backend import Storage
from cliper.pipeline.storage.sealed import sealed_table
from cliper.pipeline.storage.uris import join

if TYPE_CHECKING:
    from cliper.model.segmentation import Segmentation

SWEPT = ("attention_threshold", *(name for name in LabelConfig.model_fields if name != "protocol"))
FIGURES = ("miou", "pixel_accuracy", "mean_accuracy")
SWEEP_COUNTS = COUNTS.append(pa.field("variant", pa.int32(), nullable=False))


# Images and their ids to (image, variant, labeled image), where the first two are numbers.
Labeler = Callable[[Sequence[np.ndarray], Sequence[str]], Iterator[tuple[int, int, "Segmentation"]]]


class Grid(ABC):
    """The variants of a sweep."""

    @abstractmethod
    def variants(self) -> list[dict[str, Any]]:
        """The swept values of each variant, by name."""

    @abstractmethod
    def load(self, job: Job) -> Labeler:
        """Load the weights once, or once per variant. Raises as the segmenter's `make` does."""


@dataclass(frozen=True)
class Thresholds(Grid):
    """Every attention threshold with every label setting of CLIPer."""

    attention_thresholds: tuple[float, ...]
    settings: tuple[LabelConfig, ...]

    def variants(self) -> list[dict[str, Any]]:
        """The swept values of each variant, in the order of CLIPer.sweep."""
        written = {name for setting in self.settings for name in setting.model_dump(exclude={"protocol"})}
        names = [name for name in LabelConfig.model_fields if name in written]
        pairs = itertools.product(self.attention_thresholds, self.settings)
        return [{"attention_threshold": a} | {name: getattr(s, name) for name in names} for a, s in pairs]

    def load(self, job: Job) -> Labeler:
        """See Grid."""
        made = job.kind.make(job.config, job.classes)
        assert isinstance(made, CLIPerSegmenter)  # by make_grid
        return partial(made.model.sweep, attention_thresholds=self.attention_thresholds, settings=self.settings)


@dataclass(frozen=True)
class AnySettings(Grid):
    """Combinations of any settings of any segmenter: `values` by path, e.g. labels.threshold, and the models."""

    values: tuple[dict[str, Any], ...]
    models: tuple[Settings, ...]

    def variants(self) -> list[dict[str, Any]]:
        """See Grid."""
        return list(self.values)

    def load(self, job: Job) -> Labeler:
        """See Grid. All variants stay in memory."""
        configs = [job.config.model_copy(update={"model": model}) for model in self.models]
        segmenters = [job.kind.make(config, job.classes) for config in configs]

        def label(images: Sequence[np.ndarray], ids: Sequence[str]) -> "Iterator[tuple[int, int, Segmentation]]":
            for variant, segmenter in enumerate(segmenters):
                for image, found in enumerate(segmenter.segment(images, ids)):
                    yield image, variant, found

        return label


def make_grid(config: JobConfig, values: Mapping[str, Sequence[Any]]) -> Grid:
    """All combinations of `values` (setting name to list); other settings keep the model's value.

    Names are CLIPer's thresholds (SWEPT), or else paths in the settings of the segmenter, joined by dots. Raises
    EvaluationError for an unknown name and ConfigError for an impossible value.
    """
    kind, config = chosen(config)
    if isinstance(config.model, CLIPerConfig) and set(values) <= set(SWEPT):
        return _thresholds(config.model, values)
    content = config.model.model_dump(mode="json")
    allowed = [*(SWEPT if isinstance(config.model, CLIPerConfig) else ()), *sorted(_paths(content))]
    for name in values:
        if name not in _paths(content):
            raise EvaluationError(f"'{name}' cannot be swept; allowed: {', '.join(allowed)}")
    variants = [dict(zip(values, each, strict=True)) for each in itertools.product(*values.values())]
    models = [validate(kind.config, _with_values(content, variant), "--sweep") for variant in variants]
    return AnySettings(tuple(variants), tuple(models))


def _thresholds(model: CLIPerConfig, values: Mapping[str, Sequence[Any]]) -> Thresholds:
    thresholds = tuple(values.get("attention_threshold", [model.fusion.attention_threshold]))
    for threshold in thresholds:
        validate(type(model.fusion), model.fusion.model_dump() | {"attention_threshold": threshold}, "--sweep")
    names = [name for name in values if name != "attention_threshold"]
    settings = [
        validate(LabelConfig, model.labels.model_dump() | dict(zip(names, each, strict=True)), "--sweep")
        for each in itertools.product(*(values[name] for name in names))
    ]
    return Thresholds(thresholds, tuple(settings))


def _paths(content: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """The settings in `content`, each by its path: "labels.threshold"."""
    for name, value in content.items():
        if isinstance(value, dict):
            yield from _paths(value, f"{above}{name}.")
        else:
            yield f"{above}{name}"


def _with_values(content: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    for path, value in values.items():
        changes: Any = value
        for name in reversed(path.split(".")):
            changes = {name: changes}
        content = merged(content, changes)
    return content


def open_sweep(evaluation: Evaluation, grid: Grid) -> str:
    """Create or continue the sweep's folder in the run; returns its URI."""
    content = dict(evaluation.identity) | {"variants": grid.variants()}
    text = json.dumps(content, indent=1, ensure_ascii=False)
    folder = join(evaluation.run.uri, "sweep", hashlib.sha256(text.encode()).hexdigest()[:8])
    if not evaluation.run.storage.exists(join(folder, "sweep.json")):
        evaluation.run.storage.write(join(folder, "sweep.json"), text.encode())
    return folder


class SweepShard:
    """Ray Data actor: a table of load.SCHEMA (one shard) to its summary; writes the shard's counts."""

    def __init__(self, job: Job, grid: Grid, counter: ShardCounter, cpu_threads: int) -> None:
        """Load the weights. `cpu_threads` bounds torch's own threads.

        An expected error is reported for every shard: see SegmentShard.
        """
        import torch

        torch.set_num_threads(cpu_threads)
        self.config, self.variants, self.counter = job.config, len(grid.variants()), counter
        self.refusal: CliperError | None = None
        try:
            self.label = grid.load(job)
        except CliperError as error:
            self.refusal = error

    def __call__(self, table: pa.Table) -> pa.Table:
        """Count every variant of one shard's images."""
        shard, problem, images = table.column("shard")[0].as_py(), None, 0
        try:
            if self.refusal is not None:
                raise self.refusal
            rows = [row for window in self._windows(table.to_pylist()) for row in self._count(window)]
            images = len(rows) // self.variants
            self._write(shard, rows)
        except (CliperError, ImageError) as error:
            problem = str(error)
        columns = {"shard": [shard], "counted": [images], "problem": pa.array([problem], pa.string())}
        return pa.table(columns)

    def _windows(self, rows: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
        known = [row for row in rows if self.counter.benchmark_id(row["image_id"]) is not None]
        size = self.config.batch_size
        return (known[start : start + size] for start in range(0, len(known), size))

    def _count(self, window: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Rows of SWEEP_COUNTS: for every image of the window, every variant."""
        images = [self._decode(row) for row in window]
        ids = [row["image_id"] for row in window]
        names = [str(self.counter.benchmark_id(image_id)) for image_id in ids]
        uris = [join(self.counter.truth_uri, self.counter.truths[name]) for name in names]
        truths = [decode_png(self.counter.storage.read(uri)) for uri in uris]
        pixels = [image.pixels for image in images]
        for i, variant, found in self.label(pixels, ids):
            labels = to_file_grid(found.labels, images[i].orientation)
            counted = self.counter.count_image(truths[i], labels)
            yield {"image_id": names[i], "failed": False, "variant": variant} | counted

    def _decode(self, row: dict[str, Any]) -> Decoded:
        if row["data"] is None:
            raise EvaluationError(f"image '{row['image_id']}' cannot be read: {row['error_message']}")
        return decode(row["data"], self.config.max_pixels)

    def _write(self, shard: int, rows: list[dict[str, Any]]) -> None:
        table = pa.Table.from_pylist(rows, SWEEP_COUNTS)
        sealed = sealed_table(table, compression="zstd")
        self.counter.storage.write(join(self.counter.folder, counts_file(shard)), sealed)


def sweep_shards(
    evaluation: Evaluation, folder: str, job: Job, grid: Grid, pool: Pool
) -> Iterator[dict[str, Any]]:
    """Count the pending shards of a sweep on Ray Data; yields {shard, counted}. Raises EvaluationError."""
    from cliper.pipeline.flow import over_shards

    done = counted_shards(job.run.storage, folder)
    tasks = Tasks(shard for shard in range(job.manifest.shards) if shard not in done)
    if not tasks:
        return
    counter, threads = evaluation.counter(folder), max(1, int(pool.cpus_per_actor))
    for summary in over_shards(
        tasks,
        load=lambda task: load_task(job, task),
        actor=lambda: SweepShard(job, grid, counter, threads),
        pool=pool,
    ):
        yield check_summary(summary)


def sweep_results(
    storage: Storage, folder: str, prepared: Prepared, grid: Grid, protocol: Protocol
) -> list[dict[str, Any]]:
    """The figures of every variant, the best mIoU first; also written to sweep.csv and sweep.md."""
    tables = []
    for shard in sorted(counted_shards(storage, folder)):
        tables.append(read_counts_file(storage, join(folder, counts_file(shard)), SWEEP_COUNTS))
    table, index = pa.concat_tables([SWEEP_COUNTS.empty_table(), *tables]), prepared.index()
    rows = []
    for number, variant in enumerate(grid.variants()):
        part = table.filter(pc.equal(table["variant"], number)).sort_by("image_id")
        verify(part, index)
        scores = score(merge(part, len(prepared.class_names)).confusion, protocol, prepared.ignore_labels)
        rows.append(variant | {name: getattr(scores, name) for name in FIGURES})
    rows.sort(key=lambda row: -row["miou"])
    storage.write(join(folder, "sweep.csv"), _csv(rows).encode())
    storage.write(join(folder, "sweep.md"), sweep_table(rows).encode())
    return rows


def sweep_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The results as Markdown, without the columns that have only one value."""
    names = [n for n in rows[0] if n not in FIGURES and len({row[n] for row in rows}) > 1] or list(rows[0])[:1]
    lines = ["| " + " | ".join([*names, "mIoU", "pixel accuracy"]) + " |", "|---" * (len(names) + 2) + "|"]
    for row in rows:
        values = [str(row[name]) for name in names]
        lines.append("| " + " | ".join([*values, percent(row["miou"]), percent(row["pixel_accuracy"])]) + " |")
    return "\n".join(lines) + "\n"


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
