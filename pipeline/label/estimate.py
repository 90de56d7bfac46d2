"""Time and output size of labeling a corpus, estimated from a sample that is labeled on this machine."""

import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from tempfile import TemporaryDirectory

import pyarrow as pa

from cliper.model.classes import ClassList
from cliper.pipeline.config import JobConfig
from cliper.pipeline.corpus.load import load_entries
from cliper.pipeline.corpus.sources import Entry
from cliper.pipeline.label.actor import SegmentShard
from cliper.pipeline.label.segmenters import SegmenterFactory
from cliper.pipeline.parallel import cpus
from cliper.pipeline.run.attempts import forget_attempts
from cliper.pipeline.run.folder import Run
from cliper.pipeline.run.schema import label_schema
from cliper.pipeline.run.shards import encode
from cliper.pipeline.storage.backend import Storage

PARTS = 4  # of the sample, timed separately: their spread shows how reliable the rate is


@dataclass(frozen=True)
class Corpus:
    """A listed corpus and a uniform sample of it."""

    images: int
    bytes: int | None  # encoded; None if a source does not say
    sample: list[Entry]


@dataclass(frozen=True)
class Measured:
    """Measurements of a sample that one actor labeled."""

    images: int
    failed: int
    load_seconds: float  # one task reading, with nothing else running
    start_seconds: float  # to load the model and label the first batch
    part_rates: list[float]  # images/s of each of the PARTS of the sample: decode, model and encode overlapping
    seconds: float  # of all parts
    input_bytes: int
    output_bytes: int

    @property
    def rate(self) -> float:
        """Images/s of one actor under continuous load."""
        return self.images / self.seconds


@dataclass(frozen=True)
class Estimate:
    """Estimated time, output and cost of the whole corpus on a number of actors."""

    actor_hours: float
    hours: float
    output_bytes: float
    cost: float | None


def sample_corpus(
    entries: Iterable[Entry], size: int, seed: int, report: Callable[[int], None] = lambda count: None
) -> Corpus:
    """Draw `size` entries uniformly in one pass over the listing (reservoir sampling, Vitter's algorithm R)."""
    generator, sample, count = random.Random(seed), list[Entry](), 0
    total: int | None = 0
    for entry in entries:
        count += 1
        total = None if total is None or entry.bytes is None else total + entry.bytes
        if len(sample) < size:
            sample.append(entry)
        elif (place := generator.randrange(count)) < size:
            sample[place] = entry
        report(count)
    return Corpus(count, total, sample)


def measure(
    sample: Sequence[Entry], storage: Storage, factory: SegmenterFactory, config: JobConfig, classes: ClassList
) -> Measured:
    """Label a sample with one actor in this process, as a labeling run does per shard, but without Ray."""
    began = time.perf_counter()
    table = load_entries(storage, 0, sample, config.input.image_column)
    loaded = time.perf_counter()
    with TemporaryDirectory() as folder:
        run = Run(folder, Storage(), {})
        threads = max(1, int(config.resources.cpus_per_actor or cpus()))
        actor = SegmentShard(factory, config, classes, run, threads, "plan")
        actor(table.slice(0, config.model.batch_size))  # libraries warm up on their first batch
        forget_attempts(run.storage, run.uri, 0)  # nothing is committed here: it would pass for a death
        ready = time.perf_counter()
        labeled, seconds = [], []
        for part in _parts(table):
            start = time.perf_counter()
            labeled.append(actor(part))
            seconds.append(time.perf_counter() - start)
            forget_attempts(run.storage, run.uri, 0)
    rows = pa.concat_tables(labeled).drop_columns(["shard"])
    schema = label_schema(classes.names, run.fingerprint, config.mask_codec, "")
    data = table["data"].drop_null()
    return Measured(
        images=len(rows),
        failed=sum(status != "ok" for status in rows["status"].to_pylist()),
        load_seconds=loaded - began,
        start_seconds=ready - loaded,
        part_rates=[len(part) / t for part, t in zip(labeled, seconds, strict=True)],
        seconds=sum(seconds),
        input_bytes=sum(len(value.as_py()) for value in data),
        output_bytes=len(encode(rows.cast(schema))),
    )


def estimate(corpus: Corpus, measured: Measured, actors: int, price: float | None) -> Estimate:
    """Scale a sample to the corpus; `price` is per actor (GPU) and hour."""
    hours = corpus.images / measured.rate / 3600
    return Estimate(
        actor_hours=hours,
        hours=hours / actors,
        output_bytes=measured.output_bytes / measured.images * corpus.images,
        cost=None if price is None else hours * price,
    )


def _parts(table: pa.Table) -> list[pa.Table]:
    """Cut a table into at most PARTS parts of equal length, none empty."""
    length = -(-len(table) // PARTS)
    return [table.slice(start, length) for start in range(0, len(table), length)]
