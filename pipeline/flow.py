"""The flow, whole:

    manifest -> load bytes -> segment (decode | batch | model | encode, one actor per GPU) -> one Parquet per shard

One shard is one Ray block from end to end, so that a file depends on nothing but its shard. Ray Data schedules,
restarts what dies (poison.py bounds how often) and holds back the fast stages; the stages are plain functions
and one actor class.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext

from cliper_model.classes import ClassList
from pipeline.config import JobConfig, ResourceConfig
from pipeline.errors import ResourceError
from pipeline.load import load_entries
from pipeline.manifest import Manifest
from pipeline.run import Run
from pipeline.schema import label_schema
from pipeline.segment import SegmenterFactory, SegmentShard
from pipeline.sink import write_shard

IO_CPUS = 0.25  # of a loading or a writing task: they wait for storage most of the time


@dataclass(frozen=True)
class Pool:
    """The segmenting actors."""

    actors: int
    cpus_per_actor: float
    gpus_per_actor: int


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
) -> Iterator[dict[str, Any]]:
    """Label `shards` and yield one summary per shard as it is committed (see sink.write_shard), in any order.

    `model` is the one-line description of the weights that every file carries. `then` is one more stage: it gets
    and returns the summary of a shard that was just committed (evaluation counts it against the ground truth).
    """
    schema = label_schema(classes.names, run.fingerprint, config.mask_codec, model)

    def load(block: pa.Table) -> pa.Table:
        [shard] = block.column("shard").to_pylist()
        entries = manifest.read_shard(run.storage, run.uri, shard)
        return load_entries(run.storage, shard, entries, config.input.image_column)

    def write(block: pa.Table) -> pa.Table:
        return write_shard(block, run.storage, run.uri, schema)

    cpu_threads = max(1, int(pool.cpus_per_actor))

    with one_shard_per_block():
        labeled = (
            ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards))
            .map_batches(load, batch_size=None, batch_format="pyarrow", num_cpus=IO_CPUS, zero_copy_batch=True)
            .map_batches(
                SegmentShard,
                fn_constructor_args=(factory, config, classes, run, cpu_threads),
                batch_size=None,
                batch_format="pyarrow",
                zero_copy_batch=True,
                compute=ActorPoolStrategy(size=pool.actors, max_tasks_in_flight_per_actor=2),
                num_cpus=pool.cpus_per_actor,
                num_gpus=pool.gpus_per_actor or None,
            )
            .map_batches(write, batch_size=None, batch_format="pyarrow", num_cpus=IO_CPUS, zero_copy_batch=True)
        )
        if then is not None:
            labeled = labeled.map_batches(then, batch_size=None, batch_format="pyarrow", num_cpus=IO_CPUS)
        yield from labeled.iter_rows()


@contextmanager
def one_shard_per_block() -> Iterator[None]:
    """Ray Data settings for this flow: blocks are never split, and its own progress bars are off."""
    context = DataContext.get_current()
    before = (context.target_max_block_size, context.enable_progress_bars)
    context.target_max_block_size, context.enable_progress_bars = None, False
    try:
        yield
    finally:
        context.target_max_block_size, context.enable_progress_bars = before


def plan_pool(wanted: ResourceConfig, available: dict[str, float]) -> Pool:
    """Size the actors from the cluster: one per GPU, else one per four CPUs.

    Raises ResourceError if they cannot be scheduled beside one loading and one writing task.
    """
    cpus, gpus = available.get("CPU", 0.0), int(available.get("GPU", 0))
    actors = wanted.actors or gpus or max(1, int(cpus) // 4)
    spare = cpus - 2 * IO_CPUS
    default_cpus = 1.0 if gpus else max(1.0, float(int(spare / actors)))
    per_actor = wanted.cpus_per_actor or default_cpus
    if actors * per_actor > spare:
        raise ResourceError(
            f"{actors} actors with {per_actor:g} CPUs each and {2 * IO_CPUS:g} for reading and writing do not fit "
            f"{cpus:g} CPUs; lower --actors or --cpus-per-actor, or add nodes"
        )
    if gpus and actors > gpus:
        raise ResourceError(f"{actors} actors need a GPU each, the cluster has {gpus}; lower --actors")
    return Pool(actors, per_actor, 1 if gpus else 0)
