"""The flow, whole:

    manifest -> load bytes -> segment (decode | batch | model | encode, one actor per GPU) -> one Parquet per shard

One shard is one row of Ray Data from end to end: a stage is called with one shard and returns one, so that a file
depends only on its shard. Ray Data schedules the stages, restarts dead actors (run/attempts.py limits the
restarts) and applies backpressure. The stages are plain functions (label/stages.py) and one actor class.
"""

import gc
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar
from uuid import uuid4

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext
from ray.exceptions import ObjectStoreFullError, OutOfDiskError, RayError, RayTaskError

from cliper.model.errors import CliperError
from cliper.pipeline.errors import ResourceError
from cliper.pipeline.label.cluster import reserved
from cliper.pipeline.label.feed import FEW, chunks, few_ahead, row_of, spread, task_of
from cliper.pipeline.label.job import Job
from cliper.pipeline.label.pool import IO_BUNDLE, IO_CPUS, Pool
from cliper.pipeline.label.stages import Task, load_task, make_actor, write_task

try:
    from ray.data import TaskPoolStrategy
except ImportError:  # before Ray 2.55
    from ray.data._internal.compute import TaskPoolStrategy

Row = dict[str, Any]
Stage = Callable[[pa.Table], pa.Table]
T = TypeVar("T")

# Ray requires an integer batch size for stages on GPUs. 1 passes one shard per call, however rows are grouped.
ONE_SHARD: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow", "zero_copy_batch": True}

# Actors in a row that may end before they have started and are replaced; by default Ray Data ends the run. On a
# busy machine, Ray has ended an actor that the pool still held: "all references to the actor were removed". A
# CliperError of a segmenter's load ends the run at once (actor.py); another exception may be of one node.
INIT_DEATHS = 2

# No record per task in Ray's GCS: 12 kB a shard. The dashboard shows the stages' totals.
UNSEEN: dict[str, Any] = {"enable_task_events": False}


def label_corpus(
    job: Job, tasks: Sequence[Task], pool: Pool, then: Stage | None = None, board: str | None = None
) -> Generator[Row, None, None]:
    """Label shards and yield the summary of each commit (see write_shard), in any order.

    Close it before Ray ends (contextlib.closing): closed later, it would wait forever.

    `then` is an additional stage that receives and returns the summary of a committed shard (evaluation counts the
    shard against the ground truth). The actors write their progress to `board` (label/watch.py).
    """
    threads, driver = max(1, int(pool.cpus_per_actor)), uuid4().hex  # `driver` identifies this call
    repetition = any(task.again is not None for task in tasks)
    yield from over_shards(
        tasks,
        load=lambda task: load_task(job, task),
        actor=lambda: make_actor(job, threads, driver, board),
        write=lambda labeled: write_task(job, labeled, repetition),
        then=then,
        pool=pool,
    )


def over_shards(
    tasks: Sequence[T],
    load: Callable[[T], pa.Table],
    actor: Callable[[], Stage],
    pool: Pool,
    write: Stage | None = None,
    then: Stage | None = None,
) -> Generator[Row, None, None]:
    """Send tasks, one per shard, through load -> actor -> write -> then on Ray Data; yields the resulting rows.

    `actor` creates the stage held by each actor. The last of `actor` and `write` returns one row per shard. Tasks
    are pickled; `tasks` may be lazy.
    """

    def load_shard(batch: pa.Table) -> pa.Table:
        return pack(load(task_of(batch)))

    def write_shard(batch: pa.Table) -> pa.Table:
        assert write is not None
        return write(unpack(batch))

    room = reserved([IO_BUNDLE] * pool.io_bundles, IO_CPUS)
    with ray_data_settings(max(pool.actors, pool.max_actors)), room as options:
        stages = {**ONE_SHARD, **options, **UNSEEN, "compute": TaskPoolStrategy(size=pool.io_tasks)}
        actors = {**ONE_SHARD, **pool.actor_options, **UNSEEN, "compute": _actor_pool(pool)}
        with ray_arguments_allowed():
            flow = _source(tasks, options).map_batches(load_shard, **stages)
            flow = flow.map_batches(ShardActor, fn_constructor_args=(actor, write is not None), **actors)
            for stage in [*([] if write is None else [write_shard]), *([] if then is None else [then])]:
                flow = flow.map_batches(stage, **stages)
        try:
            yield from flow.iter_rows()
        finally:  # actors end with the last reference to them, which a cycle may hold (seen in Ray 2.50)
            del flow
            gc.collect()


def _source(tasks: Sequence[Any], options: Mapping[str, Any]) -> ray.data.Dataset:
    """One row per task, made as they are needed (label/feed.py); uses no CPU."""
    few = len(tasks) <= FEW
    rows = [row_of(task) for task in tasks] if few else chunks(tasks)
    source = ray.data.from_items(rows, override_num_blocks=len(rows))
    if few:
        return source
    one = {**ONE_SHARD, **options, **UNSEEN, "num_cpus": 0, "compute": TaskPoolStrategy(size=1)}
    return source.map_batches(spread, **one)


class ShardActor:
    """Ray Data's view of the actor: takes a packed shard, returns the stage's table, packed if a stage follows."""

    def __init__(self, make: Callable[[], Stage], packed: bool) -> None:
        self.stage, self.packed = make(), packed

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Unpack one shard and run the stage on it."""
        done = self.stage(unpack(batch))
        return pack(done) if self.packed else done


def _actor_pool(pool: Pool) -> ActorPoolStrategy:
    """A fixed or elastic pool, with two shards per actor: one being labeled, the next already loaded."""
    if pool.elastic:
        return ActorPoolStrategy(min_size=pool.actors, max_size=pool.max_actors, max_tasks_in_flight_per_actor=2)
    return ActorPoolStrategy(size=pool.actors, max_tasks_in_flight_per_actor=2)


def pack(table: pa.Table) -> pa.Table:
    """A shard as one row: column `table` holds the Arrow stream of all its rows. Nothing is copied twice."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    data = sink.getvalue()
    offsets = pa.py_buffer(np.array([0, data.size], dtype=np.int64))
    return pa.table({"table": pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, data])})


def unpack(batch: pa.Table) -> pa.Table:
    """The rows of a packed shard, without a copy. Raises ValueError for a batch of several shards."""
    if len(batch) != 1:
        raise ValueError(f"a batch must be one shard, got {len(batch)}")
    return pa.ipc.open_stream(batch.column("table")[0].as_buffer()).read_all()


@contextmanager
def ray_arguments_allowed() -> Iterator[None]:
    """Hide the notice that Ray 2.64 takes two arguments from stages; pyproject.toml stays below it.

    They are `scheduling_strategy` and `enable_task_events`.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
        yield


@contextmanager
def ray_data_settings(actors: int) -> Iterator[None]:
    """Ray Data settings for this flow: a row is a block, few wait, and its own progress bars are off.

    A block of one row is never split, and blocks of this size are not merged either. A CliperError raised by a
    stage is re-raised unchanged instead of wrapped in Ray's error.
    """
    context = DataContext.get_current()
    ours = {
        "target_max_block_size": 1,  # byte
        "enable_progress_bars": False,
        "raise_original_map_exception": True,
        "max_consecutive_actor_init_deaths": INIT_DEATHS,  # unknown to Ray 2.50
        "_kv_configs": context._kv_configs | few_ahead(actors),
    }
    ours = {name: value for name, value in ours.items() if hasattr(context, name)}
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
    """The CliperError to show the user, or None for an unexpected error, which needs its traceback."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, CliperError):
        return type(cause)(str(cause).splitlines()[0])  # Ray appends lines on its own settings
    if isinstance(cause, OutOfDiskError | ObjectStoreFullError):
        return ResourceError(
            "Ray has no space left: its object store and the disk under it are full; free some of it, or use "
            "fewer --actors, and run the same command again"
        )
    return None
