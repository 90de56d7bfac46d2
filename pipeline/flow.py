"""The flow, whole:

    manifest -> load bytes -> segment (decode | batch | model | encode, one actor per GPU) -> one Parquet per shard

One shard is one Ray block from end to end, so that a file depends on nothing but its shard. Ray Data schedules,
restarts what dies (poison.py bounds how often) and holds back the fast stages; the stages are plain functions
and one actor class.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any
from uuid import uuid4

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext
from ray.exceptions import ObjectStoreFullError, OutOfDiskError, RayError, RayTaskError

from cliper_model.allocator import KEEP_FREED_MEMORY
from cliper_model.classes import ClassList
from cliper_model.errors import CliperError
from pipeline.config import JobConfig, ResourceConfig
from pipeline.errors import ResourceError
from pipeline.load import load_entries
from pipeline.manifest import Manifest
from pipeline.redo import Failed, merge_into_shard, with_tries
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

    @property
    def actor_options(self) -> dict[str, Any]:
        """What Ray gives an actor; one on the CPU keeps freed memory (cliper_model/allocator.py)."""
        return {
            "num_cpus": self.cpus_per_actor,
            "num_gpus": self.gpus_per_actor or None,
            "runtime_env": {} if self.gpus_per_actor else {"env_vars": KEEP_FREED_MEMORY},
        }


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


def plan_pool(wanted: ResourceConfig, nodes: Sequence[Mapping[str, float]]) -> Pool:
    """Size the actors from the nodes ({"CPU": 8.0, "GPU": 1.0} each): one per GPU, else one per four CPUs.

    Raises ResourceError if they cannot be scheduled beside one loading and one writing task; every actor has to
    fit on one node.
    """
    cpus, gpus = sum(node.get("CPU", 0.0) for node in nodes), sum(int(node.get("GPU", 0)) for node in nodes)
    actors = wanted.actors or gpus or max(1, int(cpus) // 4)
    if gpus and actors > gpus:
        raise ResourceError(f"{actors} actors need a GPU each, the cluster has {gpus}; lower --actors")
    spare = cpus - 2 * IO_CPUS
    if wanted.cpus_per_actor is not None:
        choices = [wanted.cpus_per_actor]
    else:  # as many whole CPUs as fit, but one beside a GPU
        choices = [1.0] if gpus else [float(n) for n in range(max(1, int(spare / actors)), 0, -1)]
    for per_actor in choices:
        if actors * per_actor <= spare and places(nodes, per_actor, 1 if gpus else 0) >= actors:
            return Pool(actors, per_actor, 1 if gpus else 0)
    raise ResourceError(
        f"{actors} actors with {choices[-1]:g} CPUs each and {2 * IO_CPUS:g} for reading and writing do not fit "
        f"{_describe(nodes)}; lower --actors or --cpus-per-actor, or add nodes"
    )


def places(nodes: Sequence[Mapping[str, float]], cpus: float, gpus: int) -> int:
    """How many actors fit, each on one node."""
    by_cpu = [int(node.get("CPU", 0.0) / cpus + 1e-9) for node in nodes]
    by_gpu = [
        int(node.get("GPU", 0.0)) // gpus if gpus else count for node, count in zip(nodes, by_cpu, strict=True)
    ]
    return sum(map(min, by_cpu, by_gpu))


def _describe(nodes: Sequence[Mapping[str, float]]) -> str:
    cpus = [node.get("CPU", 0.0) for node in nodes]
    if len(cpus) == 1:
        return f"{cpus[0]:g} CPUs"
    return f"{len(cpus)} nodes with {', '.join(f'{count:g}' for count in cpus[:8])}{' ...' * (len(cpus) > 8)} CPUs"
