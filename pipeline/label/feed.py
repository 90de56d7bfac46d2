"""The source of the flow: tasks enter the engine as the stages take them, and none that is done is kept.

A run has up to a million shards. Handed over at once, each would cost the driver an object and a scheduling
decision before the first is labeled. Here a list of tasks goes to Ray in chunks, and one generator at a time turns
a chunk into rows, one per task. Ray pauses a generator while its rows are not read, and `FewAhead` has them read
as they are needed.
"""

import pickle
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
from ray.data import DataContext
from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES,
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
    BackpressurePolicy,
)
from ray.data._internal.execution.interfaces import PhysicalOperator

FEW = 64  # tasks that are handed over at once: a generator would be one more process to start
CHUNK = 4096  # tasks: a lost generator starts its chunk again, which takes about a second
AHEAD = 16  # results of a stage that may wait for the next one, at least


def row_of(task: Any) -> dict[str, bytes]:
    """A row that holds a task."""
    return {"task": pickle.dumps(task)}


def chunks(tasks: Sequence[Any]) -> list[dict[str, bytes]]:
    """Rows for `spread`. The slices of `tasks` are pickled whole: a lazy sequence stays small."""
    return [{"chunk": pickle.dumps(tasks[first : first + CHUNK])} for first in range(0, len(tasks), CHUNK)]


def spread(batch: pa.Table) -> Iterator[pa.Table]:
    """Yield a row per task of one chunk, as `row_of` makes them."""
    for task in pickle.loads(batch.column("chunk")[0].as_py()):
        yield pa.table({"task": pa.array([pickle.dumps(task)], pa.binary())})


def task_of(batch: pa.Table) -> Any:
    """The task in a row."""
    return pickle.loads(batch.column("task")[0].as_py())


class FewAhead(BackpressurePolicy):  # type: ignore[misc]  # Ray's internals are untyped
    """Pauses a stage while `ahead` of its results wait for the next stage, and drops Ray's statistics of blocks.

    Ray limits waiting results by bytes alone: of small shards it would accept any number. It keeps statistics of
    every block of a run for a summary at its end, which is not printed here.
    """

    def __init__(self, ahead: int, context: DataContext, topology: Any, manager: Any) -> None:
        super().__init__(context, topology, manager)
        self.ahead = ahead

    def can_add_input(self, op: PhysicalOperator) -> bool:
        """Whether the stage may start on another shard."""
        return self._waiting(op) < self.ahead

    def max_task_output_bytes_to_read(self, op: PhysicalOperator) -> int | None:
        """For the generator, one byte for each row that is needed: a row has more. No limit for other stages."""
        forget_statistics(op)
        generates = spread.__name__ in op.name
        return max(0, self.ahead - self._waiting(op)) if generates else None

    def _waiting(self, op: PhysicalOperator) -> int:
        return len(self._topology[op].output_queue)


def forget_statistics(op: Any) -> None:
    """Drop the statistics of a stage's blocks, but for the last. No effect if Ray has renamed the attribute."""
    statistics = getattr(op, "_output_blocks_stats", None)
    if isinstance(statistics, list):
        del statistics[:-1]


def few_ahead(actors: int) -> dict[str, Any]:
    """The setting of a DataContext that adds FewAhead, for a flow of that many actors, to Ray's own policies."""
    policy = partial(FewAhead, max(AHEAD, 2 * actors))
    return {ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY: [*ENABLED_BACKPRESSURE_POLICIES, policy]}
