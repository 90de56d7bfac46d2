"""The stages of one shard, in order: load, segment, write. Plain functions; flow.py runs them on Ray."""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import overload

import pyarrow as pa

from cliper.pipeline.corpus.load import Pace, load_entries
from cliper.pipeline.corpus.sources import Entry
from cliper.pipeline.label.actor import SegmentShard
from cliper.pipeline.label.job import Job
from cliper.pipeline.label.watch import Beat
from cliper.pipeline.run.changed import read_changed
from cliper.pipeline.run.failed import Failed, merge_into_shard, with_tries
from cliper.pipeline.run.schema import label_schema
from cliper.pipeline.run.shards import several_pages, write_shard
from cliper.pipeline.telemetry import timed


@dataclass(frozen=True)
class Task:
    """A shard to label; with `again`, only its failed images, whose new rows replace the failed ones.

    With `changed`, only the images of the shard that were replaced (run/changed.py); their new rows replace the
    earlier ones.
    """

    shard: int
    again: Failed | None = None
    changed: bool = False


class Tasks(Sequence[Task]):
    """The tasks of whole shards, made when they are read: 4 bytes a shard."""

    def __init__(self, shards: Iterable[int]) -> None:
        self.shards = array("i", shards)

    def __len__(self) -> int:
        return len(self.shards)

    @overload
    def __getitem__(self, place: int) -> Task: ...

    @overload
    def __getitem__(self, place: slice) -> "Tasks": ...

    def __getitem__(self, place: int | slice) -> "Task | Tasks":
        return Tasks(self.shards[place]) if isinstance(place, slice) else Task(self.shards[place])


def load_task(job: Job, task: Task) -> pa.Table:
    """The encoded images of a task: a table of load.SCHEMA, with column `tried` if the task is a repetition."""
    with timed("load", job.run.uri):
        entries = job.manifest.read_shard(job.run.storage, job.run.uri, task.shard)
        if task.again is not None:
            wanted = set(task.again.image_ids)
            entries = [_repaired(entry) for entry in entries if entry.image_id in wanted]
        if task.changed:
            newest = read_changed(job.run, task.shard)
            entries = [newest[entry.image_id] for entry in entries if entry.image_id in newest]
        resources, column = job.config.resources, job.config.input.image_column
        pace = Pace(resources.load_seconds, resources.load_rate)
        loaded = load_entries(job.run.storage, task.shard, entries, column, pace=pace, dated=True)
    return loaded if task.again is None else with_tries(loaded, task.again)


def _repaired(entry: Entry) -> Entry:
    """The entry of a failed image: its file may have been replaced since it was listed, and of any size."""
    inside = entry.offset is not None or entry.row is not None
    return entry if inside else replace(entry, bytes=None, stamp=None)


def make_actor(job: Job, cpu_threads: int, driver: str, board: str | None = None) -> SegmentShard:
    """The actor with its model loaded: a table of load.SCHEMA to a table of `shard` and COLUMNS."""
    beat = None if board is None else Beat(board)
    return SegmentShard(job.kind.make, job.config, job.classes, job.run, cpu_threads, driver, beat)


def write_task(job: Job, labeled: pa.Table, repetition: bool = False) -> pa.Table:
    """Commit a labeled shard; returns its one-row summary (see write_shard).

    Rows of some of a shard's images are laid over its file, and the summary counts these alone; with
    `repetition`, only failed rows are replaced, and the summary counts the whole shard.
    """
    with timed("write", job.run.uri):
        [shard] = labeled.column("shard").unique().to_pylist()
        part = repetition or len(labeled) < job.manifest.images_in([shard])
        whole = merge_into_shard(job.run, labeled, keep_ok=repetition) if part else labeled
        schema = label_schema(job.classes.names, job.run.fingerprint, job.config.mask_codec, job.model)
        summary = write_shard(whole, job.run.storage, job.run.uri, schema)
    return summary if repetition or not part else _counted(summary, labeled)


def _counted(summary: pa.Table, labeled: pa.Table) -> pa.Table:
    """The summary of a commit with the counts of some of its images."""
    failed = [kind for kind in labeled.column("error_type").to_pylist() if kind is not None]
    counts = {
        "images": pa.array([len(labeled)]),
        "failures": pa.array([failed], pa.list_(pa.string())),
        "several": pa.array([several_pages(labeled)]),
    }
    for name, values in counts.items():
        summary = summary.set_column(summary.schema.get_field_index(name), name, values)
    return summary
