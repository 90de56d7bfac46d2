"""The flow, whole:

    manifest -> load bytes -> segment (decode | batch | model | encode, one actor per GPU) -> one Parquet per shard

One shard is one Ray block from end to end, so that a file depends on nothing but its shard. Ray Data schedules,
restarts what dies (run/attempts.py bounds it) and holds back the fast stages; the stages are plain functions
and one actor class.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any
from uuid import uuid4

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext
from ray.exceptions import ObjectStoreFullError, OutOfDiskError, RayError, RayTaskError

from cliper.model.classes import ClassList
from cliper.model.errors import CliperError
from cliper.pipeline.config import JobConfig
from cliper.pipeline.corpus.load import load_entries
from cliper.pipeline.corpus.manifest import Manifest
from cliper.pipeline.errors import ResourceError
from cliper.pipeline.label.actor import SegmentShard
from cliper.pipeline.label.pool import IO_CPUS, Pool
from cliper.pipeline.label.segmenters import SegmenterFactory
from cliper.pipeline.run.failed import Failed, merge_into_shard, with_tries
from cliper.pipeline.run.folder import Run
from cliper.pipeline.run.schema import label_schema
from cliper.pipeline.run.shards import write_shard


def label_corpus(
    run: Run,
    manifest: Manifest,
    shards: Sequence[int],
    factory: SegmenterFactory,
    config: JobConfig,
    classes: ClassList,
    pool: Pool,
    model: str,
    then: Callable[[pa.Table], pa.Table] | None = None,
    again: Mapping[int, Failed] | None = None,
) -> Iterator[dict[str, Any]]:
    """Label `shards` and yield one summary per shard as it is committed (see sink.write_shard), in any order.

    `model` is the one-line description of the weights that every file carries. `then` is one more stage: it gets
    and returns the summary of a shard that was just committed (evaluation counts it against the ground truth).
    `again` names the failed images of each shard that are to be computed again; their rows replace the old ones.
    """
    redo = again is not None
    items = [{"shard": shard} | ({} if again is None else asdict(again[shard])) for shard in shards]
    schema = label_schema(classes.names, run.fingerprint, config.mask_codec, model)

    def load(block: pa.Table) -> pa.Table:
        [item] = block.to_pylist()
        entries = manifest.read_shard(run.storage, run.uri, item["shard"])
        if redo:
            entries = [entry for entry in entries if entry.image_id in item["image_ids"]]
        loaded = load_entries(run.storage, item["shard"], entries, config.input.image_column)
        return with_tries(loaded, item) if redo else loaded

    def write(block: pa.Table) -> pa.Table:
        return write_shard(merge_into_shard(run, block) if redo else block, run.storage, run.uri, schema)

    cpu_threads = max(1, int(pool.cpus_per_actor))
    driver = uuid4().hex  # of this call alone

    with one_shard_per_block():
        labeled = (
            ray.data.from_items(items, override_num_blocks=len(items))
            .map_batches(load, batch_size=None, batch_format="pyarrow", num_cpus=IO_CPUS, zero_copy_batch=True)
            .map_batches(
                SegmentShard,
                fn_constructor_args=(factory, config, classes, run, cpu_threads, driver),
                batch_size=None,
                batch_format="pyarrow",
                zero_copy_batch=True,
                compute=ActorPoolStrategy(size=pool.actors, max_tasks_in_flight_per_actor=2),
                **pool.actor_options,
            )
            .map_batches(write, batch_size=None, batch_format="pyarrow", num_cpus=IO_CPUS, zero_copy_batch=True)
        )
        if then is not None:
            labeled = labeled.map_batches(then, batch_size=None, batch_format="pyarrow", num_cpus=IO_CPUS)
        yield from labeled.iter_rows()


@contextmanager
def one_shard_per_block() -> Iterator[None]:
    """Ray Data settings for this flow: blocks are never split, and its own progress bars are off.

    An error that a stage raised for the user (a CliperError) arrives as itself instead of as Ray's report of it.
    """
    context = DataContext.get_current()
    ours = {
        "target_max_block_size": None,
        "enable_progress_bars": False,
        "raise_original_map_exception": True,
    }
    before = {name: getattr(context, name) for name in ours}
    _configure(context, ours)
    try:
        yield
    except RayError as error:
        expected = _expected(error)
        if expected is None:
            raise
        raise expected from None
    finally:
        _configure(context, before)


def _configure(context: DataContext, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        setattr(context, name, value)


def _expected(error: RayError) -> CliperError | None:
    """The error to show a user, or None for what only a traceback explains."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, CliperError):
        return type(cause)(str(cause).splitlines()[0])  # Ray appends lines on its own settings
    if isinstance(cause, OutOfDiskError | ObjectStoreFullError):
        return ResourceError(
            "Ray has no space left: its object store and the disk under it are full; free some of it, or use "
            "fewer --actors, and run the same command again"
        )
    return None
