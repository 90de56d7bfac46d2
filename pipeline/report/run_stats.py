"""Statistics over the rows of a run: totals, failures, classes, confidence, and the images to show.

Reads metadata columns only, shard by shard; memory does not grow with the run.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cliper.pipeline.corpus.manifest import Manifest, read_manifest
from cliper.pipeline.errors import RunError
from cliper.pipeline.parallel import Workers, crew
from cliper.pipeline.run.folder import Run, class_names
from cliper.pipeline.run.reader import labeled_shards
from cliper.pipeline.run.rows import read_tables

BINS = 20  # of a confidence histogram, each 0.05 wide
PICKS = 6  # images kept per class and kind
SAMPLED = ("most confident", "random", "least confident")
EXAMPLES = 3  # failed images named per cause
_COLUMNS = ("image_id", "classes", "confidence", "status", "error_type", "error_message", "stage", "pages")
_READERS = 4  # threads, without other workers
_TOGETHER = 8  # shards of one task; fixed, so that sums do not depend on the number of workers

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Sampled:
    """An image to show for a class: the place of its row, and the reason for the choice (one of SAMPLED)."""

    label: int
    shard: int
    place: int
    kind: str


@dataclass
class Failures:
    """The number of images that failed for one cause, with a few examples as (image id, message)."""

    images: int = 0
    examples: list[tuple[str, str]] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)  # shard and row of each example


class _Best:
    """The PICKS rows of every class with the highest score of one kind."""

    def __init__(self) -> None:
        self.score: Floats = np.zeros(0)
        self.keys: Integers = np.zeros((3, 0), dtype=np.int64)  # label, shard, place

    def add(self, score: Floats, keys: Integers) -> None:
        """Add candidate rows: score [n] and keys [3, n]. Of equal scores, the earlier row is kept."""
        score, keys = np.concatenate([self.score, score]), np.concatenate([self.keys, keys], axis=1)
        order = np.lexsort((keys[2], keys[1], -score, keys[0]))
        label = keys[0, order]
        first = np.flatnonzero(np.r_[True, label[1:] != label[:-1]]) if len(label) else label
        rank = np.arange(len(label)) - np.repeat(first, np.diff(np.r_[first, len(label)]))
        kept = order[rank < PICKS]
        self.score, self.keys = score[kept], keys[:, kept]


class RunStats:
    """Counts over all rows added; `classes` is the number of foreground classes, label 0 is background."""

    def __init__(self, classes: int) -> None:
        self.rows = 0
        self.several = 0  # files with more than one page or frame
        self.several_first = ""  # the id of one
        self.statuses: Counter[str] = Counter()
        self.failures: dict[tuple[str, str], Failures] = defaultdict(Failures)  # by (cause, stage)
        self.confidence = np.zeros(BINS, dtype=np.int64)
        self.images = np.zeros(classes + 1, dtype=np.int64)
        self.pixels = np.zeros(classes + 1, dtype=np.int64)
        self.confidence_sum = np.zeros(classes + 1)
        self.class_confidence = np.zeros((classes + 1, BINS), dtype=np.int64)
        self._best = {kind: _Best() for kind in SAMPLED}

    def add(self, shard: int, table: pa.Table) -> None:
        """Count the rows of one shard, in file order."""
        self.rows += len(table)
        self.statuses.update(table["status"].to_pylist())
        self._add_pages(table.filter(pc.greater(table["pages"], 1)))
        self._add_failures(shard, table)
        known = table["confidence"].drop_null().to_numpy()
        self.confidence += np.bincount(_bins(known), minlength=BINS)
        self._add_classes(shard, table["classes"].combine_chunks())

    def _add_pages(self, several: pa.Table) -> None:
        self.several += len(several)
        if len(several) and not self.several_first:
            self.several_first = several["image_id"][0].as_py()

    def _add_failures(self, shard: int, table: pa.Table) -> None:
        places = np.flatnonzero(pc.not_equal(table["status"], "ok").to_numpy(zero_copy_only=False))
        failed = table.select(("image_id", "error_type", "error_message", "stage")).take(places)
        for place, row in zip(places.tolist(), failed.to_pylist(), strict=True):
            cause = self.failures[row["error_type"] or "unknown", row["stage"] or "unknown"]
            cause.images += 1
            if len(cause.examples) < EXAMPLES:
                cause.examples.append((row["image_id"], row["error_message"] or ""))
                cause.places.append((shard, place))

    def _add_classes(self, shard: int, column: pa.ListArray) -> None:
        entries, place = pc.list_flatten(column), pc.list_parent_indices(column).to_numpy().astype(np.int64)
        label = pc.struct_field(entries, "class_id").to_numpy(zero_copy_only=False).astype(np.int64)
        pixels = pc.struct_field(entries, "pixels").to_numpy(zero_copy_only=False)
        mean = pc.struct_field(entries, "mean_confidence").to_numpy(zero_copy_only=False).astype(np.float64)
        mean = np.nan_to_num(mean)
        self.images += np.bincount(label, minlength=len(self.images))
        np.add.at(self.pixels, label, pixels.astype(np.int64))
        self.confidence_sum += np.bincount(label, weights=mean, minlength=len(self.images))
        np.add.at(self.class_confidence, (label, _bins(mean)), 1)
        keys = np.stack([label, np.full_like(label, shard), place])
        chance = np.random.default_rng(shard).random(len(label))
        for kind, score in zip(SAMPLED, (mean, chance, -mean), strict=True):
            self._best[kind].add(score, keys)

    def merge(self, other: "RunStats") -> None:
        """Add the counts of later shards."""
        self.rows += other.rows
        self.statuses.update(other.statuses)
        self.several += other.several
        self.several_first = self.several_first or other.several_first
        for key, found in other.failures.items():
            mine = self.failures[key]
            mine.images += found.images
            mine.examples = (mine.examples + found.examples)[:EXAMPLES]
            mine.places = (mine.places + found.places)[:EXAMPLES]
        for name in ("confidence", "images", "pixels", "confidence_sum", "class_confidence"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for kind, best in other._best.items():
            self._best[kind].add(best.score, best.keys)

    def picks(self, label: int) -> list[Sampled]:
        """The images to show for a class, each once: the first of every kind of SAMPLED, the second, and so on."""
        chosen: dict[tuple[int, int], tuple[int, Sampled]] = {}
        for kind in (SAMPLED[0], SAMPLED[2], SAMPLED[1]):  # if images are few, the extremes take precedence
            best = self._best[kind].keys
            fresh = [place for _, *place in best[:, best[0] == label].T.tolist() if tuple(place) not in chosen]
            for rank, (shard, place) in enumerate(fresh):
                chosen[shard, place] = rank, Sampled(label, shard, place, kind)
        order = sorted(chosen.values(), key=lambda found: (found[0], SAMPLED.index(found[1].kind)))
        return [pick for _, pick in order]

    def mean_confidence(self) -> Floats:
        """Mean confidence of every label over the images that contain it, float64 [K + 1]; nan without images."""
        with np.errstate(invalid="ignore"):
            return self.confidence_sum / self.images


def _bins(confidence: npt.NDArray[np.floating]) -> Integers:
    return np.clip(np.nan_to_num(confidence) * BINS, 0, BINS - 1).astype(np.int64)


@dataclass(frozen=True)
class Collected:
    """A run, its finished shards, and the statistics of the shards that were read."""

    run: Run
    manifest: Manifest
    done: tuple[int, ...]  # shards
    read: tuple[int, ...]  # shards; fewer than `done` if the run is larger than the sample
    stats: RunStats


def collect(run: Run, sample: int, workers: Workers = 1) -> Collected:
    """Read the finished shards, or a random selection of at least `sample` rows if they hold more.

    The same run and sample give the same choice and the same statistics, whatever the workers. Raises RunError if
    no shard is finished, or a file is damaged.
    """
    manifest = read_manifest(run.storage, run.uri)
    done = labeled_shards(run)
    if manifest is None or not done:
        raise RunError(f"{run.uri} has no finished shard yet; `cliper label` with the same options continues it")
    read = choose_shards(manifest, done, sample)
    stats = RunStats(len(class_names(run.identity)))
    tasks = [read[i : i + _TOGETHER] for i in range(0, len(read), _TOGETHER)]
    with crew(workers, most=len(tasks) // 2, threads=_READERS) as readers:
        for part in readers.map(partial(_stats_of, run, len(class_names(run.identity))), tasks):
            stats.merge(part)
    return Collected(run, manifest, tuple(done), tuple(read), stats)


def choose_shards(manifest: Manifest, done: Sequence[int], sample: int) -> list[int]:
    """All finished shards, or as many at random as reach `sample` rows; in order."""
    images = np.array(manifest.counts)
    order = np.random.default_rng(0).permutation(np.array(done))
    before = np.cumsum(images[order]) - images[order]  # rows read before each shard
    return sorted(order[before < sample].tolist())


def _stats_of(run: Run, classes: int, shards: Sequence[int]) -> RunStats:
    stats = RunStats(classes)
    for shard in shards:
        stats.add(shard, _read(run, shard))
    return stats


def _read(run: Run, shard: int) -> pa.Table:
    tables = list(read_tables(run, _COLUMNS, shards=[shard]))
    return tables[0] if tables else pa.table({name: [] for name in _COLUMNS})
